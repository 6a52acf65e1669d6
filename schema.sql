-- The data model of vmrm, as documentation that runs. One database holds one current experiment,
-- its journal and that of the experiments before it, and the pool, which belongs to none of them.
-- Rows are the truth; every process keeps only caches of them. Times named …_at are UTC seconds
-- since the epoch, as REAL, and always come from the caller, never from SQLite's clock; durations
-- are named …_s, sizes …_bytes. A process is a text of four words, as vmrm.Process says: its pid,
-- its start in clock ticks after boot, the host's boot id, its pid namespace; so CAST(… AS INTEGER)
-- is the pid. A change that a handler must see raises the VM's revision in the same transaction
-- (triggers below), so that a handler reads one number to know whether to look.

PRAGMA application_id = 1986884205;  -- 'vmrm' in ASCII: a file without it is not ours
PRAGMA user_version = 3;             -- an older file is upgraded, a newer one refused

-- One row per experiment. The one without destroyed_at is the current one; it is made by the
-- first command that needs it and closed by `destroy`. launched_at and start_at are written once
-- and stand until they are cleared.
CREATE TABLE experiments (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    created_at REAL NOT NULL,
    source TEXT NOT NULL DEFAULT '',           -- the experiment file, as the user named it
    content_hash TEXT NOT NULL DEFAULT '',     -- SHA-256 of what was loaded; '' if made by hand
    start_buffer_s REAL NOT NULL DEFAULT 60 CHECK (start_buffer_s >= 0),
    on_failure TEXT NOT NULL DEFAULT 'abort' CHECK (on_failure IN ('abort', 'drop', 'wait')),
    launched_at REAL,                          -- the first run
    continued_at REAL,                         -- the last run
    late TEXT NOT NULL DEFAULT 'start' CHECK (late IN ('start', 'skip', 'shift')),  -- what it said
    allow_host INTEGER NOT NULL DEFAULT 0 CHECK (allow_host IN (0, 1)),  -- entries may run here
    start_at REAL,                             -- time 0: written by the barrier, whole seconds
    start_cleared INTEGER NOT NULL DEFAULT 0 CHECK (start_cleared IN (0, 1)),  -- until a launch
    halt TEXT CHECK (halt IN ('abort', 'stop', 'kill', 'end')),  -- what every handler must do now
    ended_at REAL,                             -- the supervisor's last act
    destroyed_at REAL,
    purged INTEGER NOT NULL DEFAULT 0 CHECK (purged IN (0, 1))  -- with its journal and its files
) STRICT;
CREATE UNIQUE INDEX one_current_experiment ON experiments (destroyed_at IS NULL)
    WHERE destroyed_at IS NULL;

-- One row per VM of the current experiment, in the order they were added. The ordinal names the
-- VM's wake-up socket and is never used again. state moves as vmrm.VM_MOVES says.
CREATE TABLE vms (
    ordinal INTEGER PRIMARY KEY AUTOINCREMENT,
    server_uuid TEXT NOT NULL UNIQUE CHECK (server_uuid <> ''),
    server_name TEXT NOT NULL UNIQUE COLLATE NOCASE CHECK (
        length(server_name) <= 64 AND instr(server_name, char(0)) = 0
        AND server_name GLOB '[A-Za-z0-9]*' AND server_name NOT GLOB '*[^A-Za-z0-9._-]*'),
    state TEXT NOT NULL DEFAULT 'uninitialized' CHECK (state IN
        ('uninitialized', 'configuring', 'configured', 'failed', 'testing', 'n/a')),
    state_at REAL NOT NULL,
    reason TEXT NOT NULL DEFAULT '',           -- why it failed
    "current_time" TEXT NOT NULL DEFAULT '',   -- the schedule time reached; '' until contacted
    control_ip TEXT NOT NULL DEFAULT '',
    path TEXT NOT NULL DEFAULT '',             -- the agent's address; '' cannot be run
    address TEXT NOT NULL DEFAULT '',          -- the same in one spelling, if it is the VM's own
    pool TEXT NOT NULL DEFAULT '',             -- the group it is leased from: path comes with it
    pool_vm TEXT NOT NULL DEFAULT '',          -- its name there
    pool_token TEXT NOT NULL DEFAULT '',       -- the lease's, one for all VMs of the experiment
    engine TEXT NOT NULL DEFAULT 'QemuVM',     -- which driver
    launch_dir TEXT NOT NULL DEFAULT '',       -- '' is the driver's own: /var/launch, C:\launch
    agent_timeout_s REAL NOT NULL DEFAULT 300 CHECK (agent_timeout_s > 0),
    set_time INTEGER NOT NULL DEFAULT 1 CHECK (set_time IN (0, 1)),
    skew_s REAL,                               -- guest clock minus host clock, when last measured
    handler TEXT,                              -- the live handler, or the last one: a process
    finished_at REAL,                          -- all finite work of its schedule is done
    revision INTEGER NOT NULL DEFAULT 0
) STRICT;

-- The schedule of one VM: the JSON text exactly as it was put. A generation ends when the schedule
-- is destroyed (text becomes NULL) or replaced, so that its entries are never taken for those of
-- the next one; entries that are only added belong to the same one.
-- No foreign key: a schedule may come before its VM, and `run` reports one without.
CREATE TABLE schedules (
    server_name TEXT PRIMARY KEY COLLATE NOCASE,
    generation INTEGER NOT NULL DEFAULT 1,
    text TEXT CHECK (text IS NULL OR json_valid(text))
) STRICT;

-- The journal: one row per attempt of an entry, written by the VM's handler before the program is
-- sent ('armed') and updated as it goes on. Rows outlive the experiment. Exactly one attempt of
-- an entry is open at any time; a failed or unknown one is followed by another only if retried
-- says that somebody, or the entry's `rerun`, asked for it.
CREATE TABLE attempts (
    id INTEGER PRIMARY KEY AUTOINCREMENT,      -- never used twice
    experiment_id INTEGER NOT NULL,
    server_name TEXT NOT NULL COLLATE NOCASE,
    generation INTEGER NOT NULL,
    ordinal INTEGER NOT NULL,                  -- the entry's place in the schedule, from 1
    attempt INTEGER NOT NULL CHECK (attempt >= 1),
    outcome TEXT NOT NULL CHECK (outcome IN
        ('armed', 'running', 'done', 'failed', 'unknown', 'skipped')),
    planned_at REAL,                           -- NULL in negative time, which has no instant
    armed_at REAL NOT NULL,
    sent_at REAL,                              -- guest-exec left the host
    answered_at REAL,                          -- the agent named a pid
    ended_at REAL CHECK ((ended_at IS NULL) = (outcome IN ('armed', 'running'))),
    boot_id TEXT NOT NULL DEFAULT '',          -- which boot of the guest it belongs to
    pid INTEGER,
    exit_code INTEGER,
    reboot INTEGER NOT NULL DEFAULT 0 CHECK (reboot IN (0, 1)),    -- asks to run after a reboot
    retried INTEGER NOT NULL DEFAULT 0 CHECK (retried IN (0, 1)),
    error TEXT NOT NULL DEFAULT '',
    claim TEXT NOT NULL DEFAULT '',            -- its directory in the guest, and nobody else's
    overdue INTEGER NOT NULL DEFAULT 0 CHECK (overdue IN (0, 1)),  -- due while nothing ran
    UNIQUE (experiment_id, server_name, generation, ordinal, attempt)
) STRICT;
CREATE UNIQUE INDEX one_open_attempt ON attempts (experiment_id, server_name, generation, ordinal)
    WHERE outcome IN ('armed', 'running');

-- What the journal's rows of a former generation are about: the schedule's text when its generation
-- or its experiment ended, kept by a trigger.
CREATE TABLE past_schedules (
    experiment_id INTEGER NOT NULL,
    server_name TEXT NOT NULL COLLATE NOCASE,
    generation INTEGER NOT NULL,
    text TEXT NOT NULL,
    PRIMARY KEY (experiment_id, server_name, generation)
) STRICT;

-- One row per pause, break or resume that a command gave a VM. Effective times are always
-- recomputed from the schedule and those of these rows that are not ignored.
CREATE TABLE holds (
    id INTEGER PRIMARY KEY,
    experiment_id INTEGER NOT NULL,
    server_name TEXT NOT NULL COLLATE NOCASE,
    at REAL NOT NULL,
    experiment_time REAL NOT NULL,             -- 0 before time 0; -inf resumes a break at -inf
    duration_s REAL CHECK (duration_s > 0),    -- inf is a break, NULL a resume
    ignored INTEGER NOT NULL DEFAULT 0 CHECK (ignored IN (0, 1))  -- without a break; break in one
) STRICT;

-- One row per request of a command to a live handler (exec, push, pull, …). The client writes it,
-- the handler claims it by one UPDATE and answers in the same row; bulk data travels as files in
-- requests/<id>/, which the client keeps locked while it lives and deletes with the row.
CREATE TABLE requests (
    id TEXT PRIMARY KEY,
    server_name TEXT NOT NULL COLLATE NOCASE,
    operation TEXT NOT NULL,
    arguments TEXT NOT NULL CHECK (json_valid(arguments)),
    deadline_at REAL NOT NULL,
    claimed_by TEXT,                           -- the handler, a process
    withdrawn INTEGER NOT NULL DEFAULT 0 CHECK (withdrawn IN (0, 1)),
    answered_at REAL,
    answer TEXT CHECK (answer IS NULL OR json_valid(answer)),
    CHECK (NOT (withdrawn AND claimed_by IS NOT NULL))
) STRICT;
CREATE INDEX open_requests ON requests (server_name) WHERE answered_at IS NULL;

-- The file store: names over contents. The content itself is the file store/<sha256>.
CREATE TABLE files (
    store TEXT NOT NULL,
    name TEXT NOT NULL COLLATE NOCASE CHECK (
        length(name) <= 64 AND instr(name, char(0)) = 0
        AND name GLOB '[A-Za-z0-9]*' AND name NOT GLOB '*[^A-Za-z0-9._-]*'),
    sha256 TEXT NOT NULL,
    size_bytes INTEGER NOT NULL,
    uploaded_at REAL NOT NULL,
    PRIMARY KEY (store, name)
) STRICT;

-- Every state a VM has been in: appended by triggers, which cannot be forgotten.
CREATE TABLE history (
    id INTEGER PRIMARY KEY,
    experiment_id INTEGER,
    server_name TEXT NOT NULL COLLATE NOCASE,
    at REAL NOT NULL,
    old_state TEXT,
    new_state TEXT NOT NULL,
    reason TEXT NOT NULL DEFAULT ''
) STRICT;

CREATE TRIGGER vm_added AFTER INSERT ON vms BEGIN
    INSERT INTO history (experiment_id, server_name, at, new_state)
    VALUES ((SELECT id FROM current_experiment), new.server_name, new.state_at, new.state);
END;
CREATE TRIGGER vm_moved AFTER UPDATE OF state ON vms WHEN old.state <> new.state BEGIN
    INSERT INTO history (experiment_id, server_name, at, old_state, new_state, reason)
    VALUES ((SELECT id FROM current_experiment), new.server_name, new.state_at,
            old.state, new.state, new.reason);
END;

-- A handler looks again after a change of its schedule or the experiment, a pause, resume, request
-- or retry.
CREATE TRIGGER schedule_put AFTER INSERT ON schedules BEGIN
    UPDATE vms SET revision = revision + 1, finished_at = NULL WHERE server_name = new.server_name;
END;
CREATE TRIGGER schedule_changed AFTER UPDATE ON schedules BEGIN
    UPDATE vms SET revision = revision + 1, finished_at = NULL WHERE server_name = new.server_name;
END;
CREATE TRIGGER schedule_ended AFTER UPDATE OF generation ON schedules
WHEN old.generation <> new.generation AND old.text IS NOT NULL AND EXISTS (
    SELECT 1 FROM current_experiment WHERE launched_at IS NOT NULL) BEGIN
    INSERT INTO past_schedules (experiment_id, server_name, generation, text)
    VALUES ((SELECT id FROM current_experiment), old.server_name, old.generation, old.text);
END;
CREATE TRIGGER held AFTER INSERT ON holds BEGIN
    UPDATE vms SET revision = revision + 1 WHERE server_name = new.server_name;
END;
CREATE TRIGGER requested AFTER INSERT ON requests BEGIN
    UPDATE vms SET revision = revision + 1 WHERE server_name = new.server_name;
END;
CREATE TRIGGER retried AFTER UPDATE OF retried ON attempts WHEN new.retried BEGIN
    UPDATE vms SET revision = revision + 1, finished_at = NULL WHERE server_name = new.server_name;
END;
CREATE TRIGGER experiment_changed AFTER UPDATE OF start_at, halt ON experiments BEGIN
    UPDATE vms SET revision = revision + 1;
END;

-- One row per group of pool VMs, tried in the order of position: limits, periods, hooks. NULL is no
-- limit, '' no hook. A hook is a shell command line; the keeper runs it, each in its own process
-- group, killed after its time-out.
CREATE TABLE pool_groups (
    position INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE COLLATE NOCASE CHECK (
        length(name) <= 64 AND instr(name, char(0)) = 0
        AND name GLOB '[A-Za-z0-9]*' AND name NOT GLOB '*[^A-Za-z0-9._-]*'),
    max_vm_per_user INTEGER CHECK (max_vm_per_user >= 0),    -- of this group bound to one owner
    max_vm_total INTEGER NOT NULL DEFAULT 8 CHECK (max_vm_total >= 0),  -- the keeper's limit
    min_ready INTEGER NOT NULL DEFAULT 1 CHECK (min_ready >= 0),        -- unbound, kept at hand
    max_spawn_processes INTEGER NOT NULL DEFAULT 2 CHECK (max_spawn_processes >= 1),
    vm_spawn_min_interval_s REAL NOT NULL DEFAULT 1 CHECK (vm_spawn_min_interval_s >= 0),
    vm_health_check_period_s REAL NOT NULL DEFAULT 120 CHECK (vm_health_check_period_s > 0),
    vm_health_check_max_time_s REAL NOT NULL DEFAULT 60 CHECK (vm_health_check_max_time_s > 0),
    vm_max_check_fails INTEGER NOT NULL DEFAULT 2 CHECK (vm_max_check_fails >= 0),
    vm_dirty_terminating_timeout_s REAL CHECK (vm_dirty_terminating_timeout_s >= 0),
    vm_terminating_timeout_s REAL NOT NULL DEFAULT 600 CHECK (vm_terminating_timeout_s > 0),
    reuse_max_count INTEGER CHECK (reuse_max_count >= 1),    -- leases of one VM, then terminated
    reuse_max_age_s REAL CHECK (reuse_max_age_s > 0),        -- since it was spawned
    reuse_max_idle_s REAL CHECK (reuse_max_idle_s > 0),      -- ready without being acquired
    spawn TEXT NOT NULL DEFAULT '',
    "check" TEXT NOT NULL DEFAULT '',          -- '': the agent's ping and an exec through it
    release TEXT NOT NULL DEFAULT '',
    terminate TEXT NOT NULL DEFAULT '',
    list TEXT NOT NULL DEFAULT '',
    spawn_timeout_s REAL NOT NULL DEFAULT 600 CHECK (spawn_timeout_s > 0),
    release_timeout_s REAL NOT NULL DEFAULT 120 CHECK (release_timeout_s > 0),
    terminate_timeout_s REAL NOT NULL DEFAULT 120 CHECK (terminate_timeout_s > 0),
    list_timeout_s REAL NOT NULL DEFAULT 60 CHECK (list_timeout_s > 0),
    release_cleans INTEGER NOT NULL DEFAULT 0 CHECK (release_cleans IN (0, 1)),  -- unbinds the VM
    unique_ip INTEGER NOT NULL DEFAULT 0 CHECK (unique_ip IN (0, 1)),  -- tells its machines apart
    last_spawn_at REAL                         -- the keeper's latest spawn
) STRICT;

-- One row per VM of the pool; state moves as vmrm.POOL_MOVES says. The row exists before its spawn
-- hook runs and until its terminate hook has succeeded, so that no crash can leak a machine.
-- A VM stays bound to the owner and sandbox that acquired it until it is terminated, or until a
-- release hook that cleans has succeeded. While releasing_at is set it waits, in check_health, for
-- the keeper to run its group's release hook, and is given to nobody.
CREATE TABLE pool_vms (
    vm_name TEXT PRIMARY KEY COLLATE NOCASE CHECK (
        length(vm_name) <= 64 AND instr(vm_name, char(0)) = 0
        AND vm_name GLOB '[A-Za-z0-9]*' AND vm_name NOT GLOB '*[^A-Za-z0-9._-]*'),
    vm_ip TEXT NOT NULL DEFAULT '',
    path TEXT NOT NULL DEFAULT '',             -- the agent's address
    address TEXT NOT NULL DEFAULT '',          -- the same in one spelling, by real path
    "group" TEXT NOT NULL COLLATE NOCASE,
    state TEXT NOT NULL CHECK (state IN ('spawning', 'got_ip', 'check_health',
        'check_health_failed', 'ready', 'in_use', 'held', 'terminating')),
    state_at REAL NOT NULL,
    who TEXT NOT NULL DEFAULT '',              -- moved it to this state
    reason TEXT NOT NULL DEFAULT '',           -- and why
    spawned_at REAL NOT NULL,
    last_health_check REAL,                    -- when the latest check ended
    check_fails INTEGER NOT NULL DEFAULT 0 CHECK (check_fails >= 0),        -- in a row
    check_started_at REAL,
    bound_to_user TEXT CHECK (bound_to_user <> ''),
    bound_sandbox TEXT NOT NULL DEFAULT '',
    held_until REAL,                           -- by a person, whether or not a lease goes on
    releasing_at REAL,
    last_release REAL,
    builds_count INTEGER NOT NULL DEFAULT 0 CHECK (builds_count >= 0),
    terminating_at REAL,                       -- the latest try
    terminate_tries INTEGER NOT NULL DEFAULT 0 CHECK (terminate_tries >= 0),
    hook TEXT NOT NULL DEFAULT '' CHECK (hook IN ('', 'spawn', 'check', 'release', 'terminate')),
    hook_process TEXT,                         -- the leader of its session, a process
    CHECK (held_until IS NOT NULL OR state <> 'held'),
    CHECK (check_fails = 0 OR state <> 'ready'),
    CHECK (releasing_at IS NULL OR state NOT IN ('ready', 'in_use', 'held'))
) STRICT;
-- One machine is one VM, whatever names it was given.
CREATE UNIQUE INDEX pool_machines ON pool_vms (address) WHERE address <> '';
-- What acquire asks: a ready VM bound so, or to nobody; how many an owner has; whom to look at.
CREATE INDEX pool_choice ON pool_vms
    ("group", state, bound_to_user, bound_sandbox, last_health_check);
CREATE INDEX pool_bound ON pool_vms (bound_to_user, "group")
    WHERE bound_to_user IS NOT NULL AND state <> 'terminating';

-- One row per VM that is leased: in use, or held. Who has the token may renew and release. The holder
-- is a process, as `Process` writes it, which is dead when another boot of the host or another
-- process of that pid is seen from its own pid namespace; or nobody, and then only the end decides.
CREATE TABLE leases (
    vm_name TEXT PRIMARY KEY COLLATE NOCASE,
    token TEXT NOT NULL,
    holder TEXT,
    acquired_at REAL NOT NULL,
    lease_end_at REAL CHECK (lease_end_at IS NOT NULL OR holder IS NOT NULL),
    task_id TEXT,
    build_id TEXT,
    chroot TEXT
) STRICT, WITHOUT ROWID;

CREATE TRIGGER pool_vm_added_in_use BEFORE INSERT ON pool_vms
WHEN new.state = 'in_use' AND NOT EXISTS (SELECT 1 FROM leases WHERE vm_name = new.vm_name) BEGIN
    SELECT RAISE(ABORT, 'CHECK: a VM in use has a lease');
END;
CREATE TRIGGER pool_vm_taken BEFORE UPDATE OF state ON pool_vms
WHEN new.state = 'in_use' AND NOT EXISTS (SELECT 1 FROM leases WHERE vm_name = new.vm_name) BEGIN
    SELECT RAISE(ABORT, 'CHECK: a VM in use has a lease');
END;
CREATE TRIGGER pool_lease_over AFTER UPDATE OF state ON pool_vms
WHEN old.state IN ('in_use', 'held') AND new.state NOT IN ('in_use', 'held') BEGIN
    DELETE FROM leases WHERE vm_name = new.vm_name;
END;

CREATE VIEW pool_list AS
SELECT p.*, token, holder, acquired_at, lease_end_at, task_id, build_id, chroot
FROM pool_vms AS p LEFT JOIN leases USING (vm_name);

-- The queue: one row per process that waits for VMs, all or none; served by priority, then in order
-- of coming, unless what they want is bound to others or their owner is at its limit. A waiter
-- whose heartbeat is old, or whose process is dead, counts no more.
CREATE TABLE pool_waiters (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    token TEXT NOT NULL UNIQUE,                -- names its wake-up socket, too
    wants TEXT NOT NULL CHECK (json_valid(wants)),  -- per VM, the groups it may come from
    owner TEXT NOT NULL,
    sandbox TEXT NOT NULL DEFAULT '',
    priority INTEGER NOT NULL DEFAULT 0,
    holder TEXT NOT NULL,                      -- who waits
    heartbeat_at REAL NOT NULL
) STRICT;
CREATE INDEX pool_queue ON pool_waiters (priority DESC, id);

-- What was to be remembered about a group (write_vm_pool_info).
CREATE TABLE pool_info (
    "group" TEXT NOT NULL COLLATE NOCASE,
    key TEXT NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY ("group", key)
) STRICT;

-- One row: when the keeper started, since when only newer health checks count; and the boot and the
-- pid namespace in which the pool's processes see each other.
CREATE TABLE pool_server (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    started_at REAL NOT NULL DEFAULT 0,
    boot TEXT NOT NULL,
    namespace INTEGER NOT NULL
) STRICT;

-- Every state a pool VM has been in, and how often each was reached: by triggers, too. new_state
-- is NULL when the VM left the pool. The counts stay when old history is pruned.
CREATE TABLE pool_history (
    id INTEGER PRIMARY KEY,
    vm_name TEXT NOT NULL COLLATE NOCASE,
    "group" TEXT NOT NULL COLLATE NOCASE,
    at REAL NOT NULL,
    old_state TEXT,
    new_state TEXT,
    owner TEXT,
    who TEXT NOT NULL DEFAULT '',
    reason TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE INDEX pool_history_of_vm ON pool_history (vm_name);
CREATE TABLE pool_counts (
    "group" TEXT NOT NULL COLLATE NOCASE,
    state TEXT NOT NULL,
    times INTEGER NOT NULL,
    PRIMARY KEY ("group", state)
) STRICT, WITHOUT ROWID;

CREATE TRIGGER pool_vm_added AFTER INSERT ON pool_vms BEGIN
    INSERT INTO pool_history (vm_name, "group", at, new_state, who, reason)
    VALUES (new.vm_name, new."group", new.state_at, new.state, new.who, new.reason);
    INSERT INTO pool_counts VALUES (new."group", new.state, 1)
    ON CONFLICT DO UPDATE SET times = times + 1;
END;
CREATE TRIGGER pool_vm_moved AFTER UPDATE OF state ON pool_vms WHEN old.state <> new.state BEGIN
    INSERT INTO pool_history (vm_name, "group", at, old_state, new_state, owner, who, reason)
    VALUES (new.vm_name, new."group", new.state_at, old.state, new.state, new.bound_to_user,
            new.who, new.reason);
    INSERT INTO pool_counts VALUES (new."group", new.state, 1)
    ON CONFLICT DO UPDATE SET times = times + 1;
END;
CREATE TRIGGER pool_vm_removed AFTER DELETE ON pool_vms BEGIN
    INSERT INTO pool_history (vm_name, "group", at, old_state, owner, who, reason)
    VALUES (old.vm_name, old."group", old.state_at, old.state, old.bound_to_user, old.who,
            old.reason);
    DELETE FROM leases WHERE vm_name = old.vm_name;
END;

-- What a VM of the pool has used up of what its group allows: from due_at on it is lent no more.
CREATE VIEW pool_worn AS
SELECT vm_name, 0.0 AS due_at,
       printf('it was used %d time%s', builds_count, iif(builds_count = 1, '', 's')) AS reason
FROM pool_vms JOIN pool_groups AS g ON g.name = "group"
WHERE state = 'ready' AND builds_count >= reuse_max_count
UNION ALL
SELECT vm_name, spawned_at + reuse_max_age_s, printf('it is over %g s old', reuse_max_age_s)
FROM pool_vms JOIN pool_groups AS g ON g.name = "group"
WHERE state = 'ready' AND reuse_max_age_s IS NOT NULL;

-- The keeper's rules: what has to be done about a VM, when and why. Of what is due, the first of
-- kill, end, terminate, release, check is done. Due is what due_at has passed of, and also what
-- counts `since` a time still to come: the clock was set back.
CREATE VIEW pool_dues AS
WITH idle AS (
    SELECT p.*, g.*, coalesce(last_release, spawned_at) AS used_at
    FROM pool_vms AS p JOIN pool_groups AS g ON g.name = p."group" WHERE hook = '')
SELECT vm_name, 'kill' AS what, NULL AS since, 0.0 AS due_at, 'its VM is to be terminated' AS reason
FROM pool_vms WHERE state = 'terminating' AND hook NOT IN ('', 'terminate')
UNION ALL
SELECT vm_name, 'terminate', terminating_at,
       coalesce(terminating_at + iif(terminate_tries, vm_terminating_timeout_s, 0), 0), ''
FROM idle WHERE state = 'terminating'
UNION ALL
SELECT vm_name, 'end', NULL, 0, 'its spawn hook was lost' FROM idle WHERE state = 'spawning'
UNION ALL  -- from here on only if somebody would end its machine, which is kept otherwise
SELECT vm_name, 'end', NULL, held_until, 'it was held until now'
FROM idle WHERE state = 'held' AND "terminate" <> ''
UNION ALL
SELECT vm_name, 'end', NULL, 0,
       printf('it failed %d check%s in a row', check_fails, iif(check_fails = 1, '', 's'))
FROM idle
WHERE state = 'check_health_failed' AND check_fails > vm_max_check_fails AND "terminate" <> ''
UNION ALL
SELECT vm_name, 'end', NULL, w.due_at, w.reason
FROM idle JOIN pool_worn AS w USING (vm_name) WHERE "terminate" <> ''
UNION ALL
SELECT vm_name, 'end', NULL, used_at + reuse_max_idle_s,
       printf('nobody acquired it for %g s', reuse_max_idle_s)
FROM idle WHERE state = 'ready' AND reuse_max_idle_s IS NOT NULL AND "terminate" <> ''
UNION ALL
SELECT vm_name, 'end', NULL, used_at + vm_dirty_terminating_timeout_s,
       printf('%s did not acquire it again for %g s', bound_to_user, vm_dirty_terminating_timeout_s)
FROM idle
WHERE state = 'ready' AND bound_to_user IS NOT NULL
  AND vm_dirty_terminating_timeout_s IS NOT NULL AND "terminate" <> ''
UNION ALL  -- until here
SELECT vm_name, 'release', releasing_at,
       releasing_at + iif(state = 'check_health_failed' AND "terminate" = '',
                          vm_health_check_period_s, 0), ''
FROM idle WHERE releasing_at IS NOT NULL AND state <> 'terminating'
UNION ALL
SELECT vm_name, 'check', NULL, 0, '' FROM idle
WHERE state IN ('got_ip', 'check_health') AND releasing_at IS NULL
UNION ALL
SELECT vm_name, 'check', state_at, state_at + vm_health_check_period_s, '' FROM idle
WHERE state = 'check_health_failed' AND releasing_at IS NULL
UNION ALL  -- the agent of a VM in use is its holder's: only a check hook of the group's looks there
SELECT vm_name, 'check', last_health_check,
       iif(coalesce(last_health_check, 0) > coalesce((SELECT started_at FROM pool_server), 0),
           last_health_check + vm_health_check_period_s, 0), ''
FROM idle WHERE state = 'ready' OR (state = 'in_use' AND "check" <> '');

-- Every VM of the pool, and what one who waits may hope for of it: coming (it is, or by itself
-- becomes, one that anybody may be given), returning (to its owner, from a check or release),
-- idle (bound to others and in no use), leaving (its place in the group). One that could not be
-- ended is waited for once more: the hook may fail for the next one, too.
CREATE VIEW pool_prospects AS
SELECT p.*, CASE
    WHEN state = 'terminating' THEN iif(hook = 'terminate' OR terminate_tries < 2, 'leaving', '')
    WHEN check_fails THEN ''
    WHEN state IN ('spawning', 'got_ip', 'check_health', 'ready')
         AND (bound_to_user IS NULL OR (releasing_at IS NOT NULL AND release_cleans)) THEN 'coming'
    WHEN state = 'check_health' AND (hook <> '' OR releasing_at IS NOT NULL) THEN 'returning'
    WHEN state = 'ready' AND hook = '' THEN 'idle'
    ELSE '' END AS prospect
FROM pool_list AS p LEFT JOIN pool_groups AS g ON g.name = p."group" ORDER BY state_at, vm_name;

CREATE VIEW current_experiment AS SELECT * FROM experiments WHERE destroyed_at IS NULL;

-- The experiment's start condition in one row: launched, nobody missing, somebody configured; and
-- whether a VM has something left to do, or, before time 0, is left that could.
CREATE VIEW barrier AS
SELECT e.id, e.start_at,
       e.launched_at IS NOT NULL AND NOT e.start_cleared
       AND EXISTS (SELECT 1 FROM vms WHERE state = 'configured')
       AND NOT EXISTS (
           SELECT 1 FROM vms WHERE state NOT IN ('configured', 'n/a')
           AND NOT (state = 'failed' AND e.on_failure = 'drop')) AS is_open,
       EXISTS (
           SELECT 1 FROM vms WHERE iif(state IN ('n/a', 'failed'),
               state = 'failed' AND e.start_at IS NULL AND e.on_failure = 'wait',
               e.start_at IS NULL OR finished_at IS NULL)) AS has_work
FROM current_experiment AS e;

-- Every attempt, when it began (one that was never sent only ended), and how late that was.
CREATE VIEW attempt_times AS
SELECT *, coalesce(sent_at, ended_at, armed_at) AS "begin",
       round(sent_at - planned_at, 6) AS late_s
FROM attempts;

-- The latest attempt of each entry that has one.
CREATE VIEW latest_attempts AS
SELECT * FROM attempt_times AS a WHERE NOT EXISTS (
    SELECT 1 FROM attempts AS b
    WHERE b.experiment_id = a.experiment_id AND b.server_name = a.server_name
      AND b.generation = a.generation AND b.ordinal = a.ordinal AND b.attempt > a.attempt);

-- The VMs of the experiment that were leased from the pool; vm_name is NULL if that was lost.
CREATE VIEW loans AS
SELECT v.server_name, l.vm_name FROM vms AS v
LEFT JOIN leases AS l ON l.vm_name = v.pool_vm AND l.token = v.pool_token
WHERE v.pool_token <> '';

-- Every entry of every schedule with its latest attempt, if there is one.
CREATE VIEW entry_status AS
SELECT s.server_name, s.generation, CAST(j.key AS INTEGER) + 1 AS ordinal,
       json_extract(j.value, '$.start_time') AS start_time,
       json_extract(j.value, '$.executable') AS executable,
       json_extract(j.value, '$.pause') AS pause,
       coalesce(json_extract(j.value, '$.ignore_failure'), 0) AS ignore_failure,
       coalesce(json_extract(j.value, '$.wait'), 1) AS "wait",
       j.value AS entry,
       a.id AS attempt_id, a.attempt, a.outcome, a.planned_at, a.sent_at, a.ended_at, a.late_s,
       a.exit_code, a.reboot, a.retried, a.error, a.pid
FROM schedules AS s, json_each(s.text) AS j
LEFT JOIN latest_attempts AS a
    ON a.experiment_id = (SELECT id FROM current_experiment)
   AND a.server_name = s.server_name AND a.generation = s.generation
   AND a.ordinal = CAST(j.key AS INTEGER) + 1
WHERE s.text IS NOT NULL;

-- Every schedule that an experiment has or, under former generations, had.
CREATE VIEW run_schedules AS
SELECT (SELECT id FROM current_experiment) AS experiment_id, server_name, generation, text
FROM schedules
UNION ALL SELECT experiment_id, server_name, generation, text FROM past_schedules;

-- Every content that the file store must have, and what names it.
CREATE VIEW named_contents AS
SELECT sha256, printf('file ''%s'' of store ''%s''', name, store) AS named_by FROM files
UNION ALL
SELECT json_extract(f.value, '$.sha256'),
       printf('file ''%s'' of VM ''%s''', json_extract(f.value, '$.filename'), s.server_name)
FROM schedules AS s, json_each(s.text) AS j, json_each(j.value, '$.file') AS f
WHERE s.text IS NOT NULL AND json_extract(f.value, '$.sha256') IS NOT NULL;

-- One line per VM, for people: `status` and the live view print it.
CREATE VIEW vm_status AS
SELECT (SELECT id FROM current_experiment) AS experiment_id,
       v.server_name, v.state, v."current_time", v.reason, v.finished_at, v.skew_s,
       count(e.ordinal) AS entries,
       coalesce(sum(e.outcome = 'done' AND NOT e.reboot), 0) AS done,
       coalesce(sum(e.outcome = 'failed'), 0) AS failed,
       coalesce(sum(e.outcome = 'unknown'), 0) AS unknown,
       coalesce(sum(e.outcome = 'skipped'), 0) AS skipped,
       coalesce(sum(e.outcome = 'running'), 0) AS running,
       v.ordinal, CAST(v.handler AS INTEGER) AS handler_pid, v.path
FROM vms AS v
LEFT JOIN entry_status AS e ON e.server_name = v.server_name AND e.pause IS NULL
GROUP BY v.ordinal;

-- The data model of vmrm, as documentation that runs.
--
-- One database holds one current experiment, its journal and that of the experiments before it.
-- Rows are the truth; every process keeps only caches of them. Times named …_at are UTC seconds
-- since the epoch, as REAL, and always come from the caller, never from SQLite's clock; durations
-- are named …_s, sizes …_bytes. A change that a handler must see raises the VM's revision in the
-- same transaction (triggers below), so that a handler reads one number to know whether to look.

PRAGMA application_id = 1986884205;  -- 'vmrm' in ASCII: a file without it is not ours
PRAGMA user_version = 1;             -- another number is another vmrm: refused, never guessed

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
    start_at REAL,                             -- time 0: written by the barrier, whole seconds
    halt TEXT CHECK (halt IN ('abort', 'stop', 'kill', 'end')),  -- what every handler must do now
    ended_at REAL,                             -- the supervisor's last act
    destroyed_at REAL
) STRICT;
CREATE UNIQUE INDEX one_current_experiment ON experiments (destroyed_at IS NULL)
    WHERE destroyed_at IS NULL;

-- One row per VM of the current experiment, in the order they were added. The ordinal names the
-- VM's wake-up socket and is never used again. state moves as vmrm.VM_MOVES says.
CREATE TABLE vms (
    ordinal INTEGER PRIMARY KEY AUTOINCREMENT,
    server_uuid TEXT NOT NULL UNIQUE CHECK (server_uuid <> ''),
    server_name TEXT NOT NULL UNIQUE COLLATE NOCASE CHECK (
        length(server_name) <= 64
        AND server_name GLOB '[A-Za-z0-9]*' AND server_name NOT GLOB '*[^A-Za-z0-9._-]*'),
    state TEXT NOT NULL DEFAULT 'uninitialized' CHECK (state IN
        ('uninitialized', 'configuring', 'configured', 'failed', 'testing', 'n/a')),
    state_at REAL NOT NULL,
    reason TEXT NOT NULL DEFAULT '',           -- why it failed
    "current_time" TEXT NOT NULL DEFAULT '',   -- the schedule time reached; '' until contacted
    control_ip TEXT NOT NULL DEFAULT '',
    path TEXT NOT NULL DEFAULT '',             -- the agent's address; '' cannot be run
    engine TEXT NOT NULL DEFAULT 'QemuVM',     -- which driver
    launch_dir TEXT NOT NULL DEFAULT '',       -- '' is the driver's own: /var/launch, C:\launch
    agent_timeout_s REAL NOT NULL DEFAULT 300 CHECK (agent_timeout_s > 0),
    set_time INTEGER NOT NULL DEFAULT 1 CHECK (set_time IN (0, 1)),
    skew_s REAL,                               -- guest clock minus host clock, when last measured
    handler_pid INTEGER,                       -- the live handler, or the last one
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
    text TEXT CHECK (text IS NULL OR json_valid(text)),
    vm_resources_ip TEXT NOT NULL DEFAULT '',
    put_at REAL NOT NULL
) STRICT;

-- The journal: one row per attempt of an entry, written by the VM's handler before the program is
-- sent ('armed') and updated as it goes on. Rows outlive the experiment. Exactly one attempt of
-- an entry is open at any time; a failed or unknown one is followed by another only if retried
-- says that somebody, or the entry's `rerun`, asked for it.
CREATE TABLE attempts (
    id INTEGER PRIMARY KEY,
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

-- One row per resume of a VM's schedule, with the experiment time at which it was given (NULL
-- before there is a start time). Effective times are always recomputed from these rows.
CREATE TABLE resumes (
    id INTEGER PRIMARY KEY,
    experiment_id INTEGER NOT NULL,
    server_name TEXT NOT NULL COLLATE NOCASE,
    at REAL NOT NULL,
    experiment_time REAL
) STRICT;

-- One row per request of a command to a live handler (exec, push, pull, …). The client writes it,
-- the handler claims it by one UPDATE and answers in the same row; bulk data travels as files in
-- requests/<id>/. The client deletes both when it has read the answer.
CREATE TABLE requests (
    id TEXT PRIMARY KEY,
    server_name TEXT NOT NULL COLLATE NOCASE,
    operation TEXT NOT NULL,
    arguments TEXT NOT NULL CHECK (json_valid(arguments)),
    client_pid INTEGER NOT NULL,
    client_started INTEGER NOT NULL,           -- clock ticks after boot, /proc/PID/stat field 22
    client_boot TEXT NOT NULL,
    created_at REAL NOT NULL,
    deadline_at REAL NOT NULL,
    claimed_by INTEGER,                        -- the handler's pid
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
        length(name) <= 64 AND name GLOB '[A-Za-z0-9]*' AND name NOT GLOB '*[^A-Za-z0-9._-]*'),
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

-- What makes a handler look again: its schedule, a resume, a request, a retry, the experiment.
CREATE TRIGGER schedule_put AFTER INSERT ON schedules BEGIN
    UPDATE vms SET revision = revision + 1, finished_at = NULL
    WHERE server_name = new.server_name;
END;
CREATE TRIGGER schedule_changed AFTER UPDATE ON schedules BEGIN
    UPDATE vms SET revision = revision + 1, finished_at = NULL
    WHERE server_name = new.server_name;
END;
CREATE TRIGGER schedule_ended AFTER UPDATE OF generation ON schedules
WHEN old.generation <> new.generation AND old.text IS NOT NULL AND EXISTS (
    SELECT 1 FROM current_experiment WHERE launched_at IS NOT NULL) BEGIN
    INSERT INTO past_schedules (experiment_id, server_name, generation, text)
    VALUES ((SELECT id FROM current_experiment), old.server_name, old.generation, old.text);
END;
CREATE TRIGGER resumed AFTER INSERT ON resumes BEGIN
    UPDATE vms SET revision = revision + 1 WHERE server_name = new.server_name;
END;
CREATE TRIGGER requested AFTER INSERT ON requests BEGIN
    UPDATE vms SET revision = revision + 1 WHERE server_name = new.server_name;
END;
CREATE TRIGGER retried AFTER UPDATE OF retried ON attempts WHEN new.retried BEGIN
    UPDATE vms SET revision = revision + 1, finished_at = NULL
    WHERE server_name = new.server_name;
END;
CREATE TRIGGER experiment_changed AFTER UPDATE OF start_at, halt ON experiments BEGIN
    UPDATE vms SET revision = revision + 1;
END;

CREATE VIEW current_experiment AS SELECT * FROM experiments WHERE destroyed_at IS NULL;

-- The experiment's start condition in one row: launched, nobody missing, somebody configured.
CREATE VIEW barrier AS
SELECT e.id, e.start_at,
       e.launched_at IS NOT NULL
       AND EXISTS (SELECT 1 FROM vms WHERE state = 'configured')
       AND NOT EXISTS (
           SELECT 1 FROM vms WHERE state NOT IN ('configured', 'n/a')
           AND NOT (state = 'failed' AND e.on_failure = 'drop')) AS is_open
FROM current_experiment AS e;

-- Every entry of every schedule with its latest attempt, if there is one.
CREATE VIEW entry_status AS
SELECT s.server_name, s.generation, CAST(j.key AS INTEGER) + 1 AS ordinal,
       json_extract(j.value, '$.start_time') AS start_time,
       json_extract(j.value, '$.executable') AS executable,
       json_extract(j.value, '$.pause') AS pause,
       coalesce(json_extract(j.value, '$.ignore_failure'), 0) AS ignore_failure,
       coalesce(json_extract(j.value, '$.wait'), 1) AS "wait",
       j.value AS entry,
       a.id AS attempt_id, a.attempt, a.outcome, a.planned_at, a.sent_at, a.ended_at,
       a.exit_code, a.reboot, a.retried, a.error, a.pid
FROM schedules AS s, json_each(s.text) AS j
LEFT JOIN attempts AS a ON a.id = (
    SELECT b.id FROM attempts AS b
    WHERE b.experiment_id = (SELECT id FROM current_experiment)
      AND b.server_name = s.server_name AND b.generation = s.generation
      AND b.ordinal = CAST(j.key AS INTEGER) + 1
    ORDER BY b.attempt DESC LIMIT 1)
WHERE s.text IS NOT NULL;

-- One line per VM, for people: `status` and the live view print it.
CREATE VIEW vm_status AS
SELECT v.server_name, v.state, v."current_time", v.reason, v.finished_at, v.skew_s,
       count(e.ordinal) AS entries,
       coalesce(sum(e.outcome = 'done' AND NOT e.reboot), 0) AS done,
       coalesce(sum(e.outcome = 'failed'), 0) AS failed,
       coalesce(sum(e.outcome = 'unknown'), 0) AS unknown,
       coalesce(sum(e.outcome = 'skipped'), 0) AS skipped,
       coalesce(sum(e.outcome = 'running'), 0) AS running,
       v.ordinal, v.handler_pid, v.path
FROM vms AS v
LEFT JOIN entry_status AS e ON e.server_name = v.server_name AND e.pause IS NULL
GROUP BY v.ordinal;

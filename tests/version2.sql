-- A database of schema version 2 as vmrm made it: an experiment that was stopped half-way, after
-- another one, with a program left running, and a pool with a lease. @FOLDER@ is where it lay.
PRAGMA application_id = 1986884205;
PRAGMA user_version = 2;
BEGIN TRANSACTION;
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
INSERT INTO "attempts" VALUES(1,1,'vm2',1,1,1,'done',NULL,1.79564157466863226885e+09,1.79564157466926527023e+09,1.79564157467119693751e+09,1.79564157474461865426e+09,'7dd7b526-d12c-581d-a43c-5bab37ec712e',1178,0,0,0,'');
INSERT INTO "attempts" VALUES(2,1,'vm1',1,1,1,'done',NULL,1.79564157475502562521e+09,1.79564157475567030908e+09,1.79564157476290535931e+09,1.79564157482784676547e+09,'8d3da606-7473-55a7-a910-173bc9e87d66',1190,0,0,0,'');
INSERT INTO "attempts" VALUES(3,2,'vm2',2,1,1,'done',NULL,1.79564157699900269512e+09,1.79564157699971890446e+09,1.79564157700272917748e+09,1.79564157703378748896e+09,'7dd7b526-d12c-581d-a43c-5bab37ec712e',1281,0,0,0,'');
INSERT INTO "attempts" VALUES(4,2,'vm1',2,1,1,'done',NULL,1.79564157706850385668e+09,1.79564157706907892228e+09,1.79564157707122921949e+09,1.79564157710035157203e+09,'8d3da606-7473-55a7-a910-173bc9e87d66',1296,0,0,0,'');
INSERT INTO "attempts" VALUES(5,2,'vm1',2,3,1,'failed',1795641579.5,1.79564157711653017996e+09,1.79564157950264215472e+09,1.7956415795050413609e+09,1.79564157953739714623e+09,'8d3da606-7473-55a7-a910-173bc9e87d66',1362,3,0,0,'exit code 3');
INSERT INTO "attempts" VALUES(6,2,'vm1',2,4,1,'running',1795641580.0,1.79564157740177655214e+09,1.79564158000285291677e+09,1.79564158000488519667e+09,NULL,'8d3da606-7473-55a7-a910-173bc9e87d66',1378,NULL,0,0,'');
INSERT INTO "attempts" VALUES(7,2,'vm1',2,2,1,'done',1795641579.0,1795641577.59981,1.79564157900260305397e+09,1.79564157900534749029e+09,1.79564157903469038008e+09,'8d3da606-7473-55a7-a910-173bc9e87d66',1348,0,0,0,'');
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
    halt TEXT CHECK (halt IN ('abort', 'stop', 'kill', 'end')),  -- what every handler must do now
    ended_at REAL,                             -- the supervisor's last act
    destroyed_at REAL
) STRICT;
INSERT INTO "experiments" VALUES(1,1.79564157391265368456e+09,'lab.toml','77e6ef1cd2343f1c690fc25b8fa0a5e4e39a4b96e633a574d24c1ff278ad2c2d',0.0,'abort',1.79564157392710947985e+09,1.79564157392710947985e+09,'start',0,1795641575.0,'end',1.79564157485934138298e+09,1.79564157563736104964e+09);
INSERT INTO "experiments" VALUES(2,1.79564157626026129721e+09,'lab.toml','af19987c93e4dc5bf2ea15bf6626b7f54df3463bf07151c9c096f6f5dbd4217a',0.0,'abort',1.79564157628305482859e+09,1.79564157628305482859e+09,'start',0,1795641578.0,'stop',1.7956415827772512436e+09,NULL);
CREATE TABLE files (
    store TEXT NOT NULL,
    name TEXT NOT NULL COLLATE NOCASE CHECK (
        length(name) <= 64 AND name GLOB '[A-Za-z0-9]*' AND name NOT GLOB '*[^A-Za-z0-9._-]*'),
    sha256 TEXT NOT NULL,
    size_bytes INTEGER NOT NULL,
    uploaded_at REAL NOT NULL,
    PRIMARY KEY (store, name)
) STRICT;
CREATE TABLE history (
    id INTEGER PRIMARY KEY,
    experiment_id INTEGER,
    server_name TEXT NOT NULL COLLATE NOCASE,
    at REAL NOT NULL,
    old_state TEXT,
    new_state TEXT NOT NULL,
    reason TEXT NOT NULL DEFAULT ''
) STRICT;
INSERT INTO "history" VALUES(1,1,'vm1',1.79564157391301035876e+09,NULL,'uninitialized','');
INSERT INTO "history" VALUES(2,1,'vm2',1.79564157391317057608e+09,NULL,'uninitialized','');
INSERT INTO "history" VALUES(3,1,'vm2',1795641574.65783,'uninitialized','configuring','');
INSERT INTO "history" VALUES(4,1,'vm1',1.79564157471987462036e+09,'uninitialized','configuring','');
INSERT INTO "history" VALUES(5,1,'vm2',1.79564157474524617192e+09,'configuring','configured','');
INSERT INTO "history" VALUES(6,1,'vm1',1.79564157482849168778e+09,'configuring','configured','');
INSERT INTO "history" VALUES(7,2,'vm1',1.79564157626059079167e+09,NULL,'uninitialized','');
INSERT INTO "history" VALUES(8,2,'vm2',1.79564157626074171066e+09,NULL,'uninitialized','');
INSERT INTO "history" VALUES(9,2,'vm2',1.79564157699187612526e+09,'uninitialized','configuring','');
INSERT INTO "history" VALUES(10,2,'vm2',1.79564157703438234334e+09,'configuring','configured','');
INSERT INTO "history" VALUES(11,2,'vm1',1.79564157705465197566e+09,'uninitialized','configuring','');
INSERT INTO "history" VALUES(12,2,'vm1',1.79564157710104513169e+09,'configuring','configured','');
CREATE TABLE holds (
    id INTEGER PRIMARY KEY,
    experiment_id INTEGER NOT NULL,
    server_name TEXT NOT NULL COLLATE NOCASE,
    at REAL NOT NULL,
    experiment_time REAL NOT NULL,             -- 0 before time 0; -inf resumes a break at -inf
    duration_s REAL CHECK (duration_s > 0),    -- inf is a break, NULL a resume
    ignored INTEGER NOT NULL DEFAULT 0 CHECK (ignored IN (0, 1))  -- without a break; break in one
) STRICT;
CREATE TABLE past_schedules (
    experiment_id INTEGER NOT NULL,
    server_name TEXT NOT NULL COLLATE NOCASE,
    generation INTEGER NOT NULL,
    text TEXT NOT NULL,
    PRIMARY KEY (experiment_id, server_name, generation)
) STRICT;
INSERT INTO "past_schedules" VALUES(1,'vm1',1,'[{"start_time": -1, "executable": "sh", "arguments": ["-c", "echo first; echo first >> ../../record"]}]');
INSERT INTO "past_schedules" VALUES(1,'vm2',1,'[{"start_time": -1, "executable": "sh", "arguments": ["-c", "echo first; echo first >> ../../record"]}]');
CREATE TABLE pool_counts (
    "group" TEXT NOT NULL COLLATE NOCASE,
    state TEXT NOT NULL,
    times INTEGER NOT NULL,
    PRIMARY KEY ("group", state)
) STRICT, WITHOUT ROWID;
INSERT INTO "pool_counts" VALUES('ci','check_health',3);
INSERT INTO "pool_counts" VALUES('ci','got_ip',3);
INSERT INTO "pool_counts" VALUES('ci','in_use',1);
INSERT INTO "pool_counts" VALUES('ci','ready',3);
CREATE TABLE pool_groups (
    name TEXT PRIMARY KEY COLLATE NOCASE CHECK (
        length(name) <= 64 AND name GLOB '[A-Za-z0-9]*' AND name NOT GLOB '*[^A-Za-z0-9._-]*'),
    position INTEGER NOT NULL,
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
    last_spawn_at REAL                         -- the keeper's latest spawn
) STRICT;
INSERT INTO "pool_groups" VALUES('ci',1,NULL,4,1,2,1.0,120.0,60.0,2,NULL,600.0,NULL,NULL,NULL,'','true','','','',600.0,120.0,120.0,60.0,0,NULL);
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
INSERT INTO "pool_history" VALUES(1,'m1','ci',1.79564158524754929543e+09,NULL,'got_ip',NULL,'root, process 1531','');
INSERT INTO "pool_history" VALUES(2,'m2','ci',1.79564158588235759737e+09,NULL,'got_ip',NULL,'root, process 1548','');
INSERT INTO "pool_history" VALUES(3,'m3','ci',1.79564158655441451079e+09,NULL,'got_ip',NULL,'root, process 1558','');
INSERT INTO "pool_history" VALUES(4,'m1','ci',1.79564160515934872629e+09,'got_ip','check_health',NULL,'root, process 2585','');
INSERT INTO "pool_history" VALUES(5,'m2','ci',1.79564160516117858881e+09,'got_ip','check_health',NULL,'root, process 2585','');
INSERT INTO "pool_history" VALUES(6,'m3','ci',1.79564160516939568521e+09,'got_ip','check_health',NULL,'root, process 2585','');
INSERT INTO "pool_history" VALUES(7,'m1','ci',1.79564160517816925055e+09,'check_health','ready',NULL,'root, process 2585','');
INSERT INTO "pool_history" VALUES(8,'m2','ci',1.7956416051956539154e+09,'check_health','ready',NULL,'root, process 2585','');
INSERT INTO "pool_history" VALUES(9,'m3','ci',1.79564160520201349254e+09,'check_health','ready',NULL,'root, process 2585','');
INSERT INTO "pool_history" VALUES(10,'m3','ci',1.79564160572484278685e+09,'ready','in_use','ann','root, process 2604','');
CREATE TABLE pool_info (
    "group" TEXT NOT NULL COLLATE NOCASE,
    key TEXT NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY ("group", key)
) STRICT;
CREATE TABLE pool_server (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    started_at REAL NOT NULL DEFAULT 0,
    boot TEXT NOT NULL,
    namespace INTEGER NOT NULL
) STRICT;
INSERT INTO "pool_server" VALUES(1,1.79564160512120723719e+09,'95173d5c-986a-4fae-8c30-9187a6e61d45',4026531836);
CREATE TABLE pool_vms (
    vm_name TEXT PRIMARY KEY COLLATE NOCASE CHECK (length(vm_name) <= 64
        AND vm_name GLOB '[A-Za-z0-9]*' AND vm_name NOT GLOB '*[^A-Za-z0-9._-]*'),
    vm_ip TEXT NOT NULL DEFAULT '',
    path TEXT NOT NULL DEFAULT '',             -- the agent's address
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
    token TEXT,
    holder_pid INTEGER,
    holder_started INTEGER,                    -- clock ticks after boot, /proc/PID/stat field 22
    holder_boot TEXT NOT NULL DEFAULT '',
    holder_namespace INTEGER NOT NULL DEFAULT 0,    -- inode of /proc/PID/ns/pid
    holder_seen_at REAL,                       -- when somebody last saw that it lives
    acquired_at REAL,
    lease_end_at REAL,
    task_id TEXT,
    build_id TEXT,
    chroot TEXT,
    held_until REAL,
    releasing_at REAL,
    last_release REAL,
    builds_count INTEGER NOT NULL DEFAULT 0 CHECK (builds_count >= 0),
    terminating_at REAL,                       -- the latest try
    terminate_tries INTEGER NOT NULL DEFAULT 0 CHECK (terminate_tries >= 0),
    hook TEXT NOT NULL DEFAULT '' CHECK (hook IN ('', 'spawn', 'check', 'release', 'terminate')),
    hook_pid INTEGER,                          -- its process group, for a keeper that comes after
    hook_started INTEGER,
    hook_boot TEXT NOT NULL DEFAULT '',
    CHECK (token IS NOT NULL OR state <> 'in_use'),
    CHECK (token IS NULL OR state IN ('in_use', 'held')),
    CHECK (token IS NULL OR holder_pid IS NOT NULL OR lease_end_at IS NOT NULL),
    CHECK (held_until IS NOT NULL OR state <> 'held'),
    CHECK (check_fails = 0 OR state <> 'ready'),
    CHECK (releasing_at IS NULL OR state NOT IN ('ready', 'in_use', 'held'))
) STRICT;
INSERT INTO "pool_vms" VALUES('m1','','/run/qga/m1.sock','ci','ready',1.79564160517816925055e+09,'root, process 2585','',1.79564158524754929543e+09,1.79564160517813229561e+09,0,NULL,NULL,'',NULL,NULL,NULL,'',0,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,0,NULL,0,'',NULL,NULL,'');
INSERT INTO "pool_vms" VALUES('m2','','/run/qga/m2.sock','ci','ready',1.7956416051956539154e+09,'root, process 2585','',1.79564158588235759737e+09,1.79564160519561767581e+09,0,NULL,NULL,'',NULL,NULL,NULL,'',0,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,0,NULL,0,'',NULL,NULL,'');
INSERT INTO "pool_vms" VALUES('m3','','/run/qga/m3.sock','ci','in_use',1.79564160572484278685e+09,'root, process 2604','',1.79564158655441451079e+09,1.79564160520197606089e+09,0,NULL,'ann','s','a20303f029237c89249782ab62ac5ee6',NULL,NULL,'',0,1.79564160572482442858e+09,1.79564160572482442858e+09,2.11100160572482442849e+09,NULL,NULL,NULL,NULL,NULL,NULL,0,NULL,0,'',NULL,NULL,'');
CREATE TABLE pool_waiters (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    token TEXT NOT NULL UNIQUE,                -- names its wake-up socket, too
    wants TEXT NOT NULL CHECK (json_valid(wants)),  -- per VM, the groups it may come from
    owner TEXT NOT NULL,
    sandbox TEXT NOT NULL DEFAULT '',
    priority INTEGER NOT NULL DEFAULT 0,
    holder_pid INTEGER NOT NULL,
    holder_started INTEGER NOT NULL,
    holder_boot TEXT NOT NULL,
    holder_namespace INTEGER NOT NULL,
    queued_at REAL NOT NULL,
    heartbeat_at REAL NOT NULL,
    deadline_at REAL
) STRICT;
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
CREATE TABLE schedules (
    server_name TEXT PRIMARY KEY COLLATE NOCASE,
    generation INTEGER NOT NULL DEFAULT 1,
    text TEXT CHECK (text IS NULL OR json_valid(text)),
    vm_resources_ip TEXT NOT NULL DEFAULT '',
    put_at REAL NOT NULL
) STRICT;
INSERT INTO "schedules" VALUES('vm1',2,'[{"start_time": -1, "executable": "sh", "arguments": ["-c", "echo second; echo second >> ../../record"]}, {"start_time": 1, "executable": "sh", "arguments": ["-c", "echo one >> ../../record"]}, {"start_time": 1.5, "executable": "sh", "arguments": ["-c", "echo failing >> ../../record; exit 3"]}, {"start_time": 2, "executable": "sh", "arguments": ["-c", "echo two >> ../../record; while [ ! -e ../../go ]; do sleep 0.1; done; echo late >> ../../record"]}, {"start_time": 100000, "executable": "sh", "arguments": ["-c", "echo last >> ../../record"]}]','',1.79564157626082611081e+09);
INSERT INTO "schedules" VALUES('vm2',2,'[{"start_time": -1, "executable": "sh", "arguments": ["-c", "echo second; echo second >> ../../record"]}, {"start_time": 100000, "executable": "sh", "arguments": ["-c", "echo last >> ../../record"]}]','',1.79564157626093864441e+09);
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
    pool TEXT NOT NULL DEFAULT '',             -- the group it is leased from: path comes with it
    pool_vm TEXT NOT NULL DEFAULT '',          -- its name there
    pool_token TEXT NOT NULL DEFAULT '',       -- the lease's, one for all VMs of the experiment
    engine TEXT NOT NULL DEFAULT 'QemuVM',     -- which driver
    launch_dir TEXT NOT NULL DEFAULT '',       -- '' is the driver's own: /var/launch, C:\launch
    agent_timeout_s REAL NOT NULL DEFAULT 300 CHECK (agent_timeout_s > 0),
    set_time INTEGER NOT NULL DEFAULT 1 CHECK (set_time IN (0, 1)),
    skew_s REAL,                               -- guest clock minus host clock, when last measured
    handler_pid INTEGER,                       -- the live handler, or the last one
    finished_at REAL,                          -- all finite work of its schedule is done
    revision INTEGER NOT NULL DEFAULT 0
) STRICT;
INSERT INTO "vms" VALUES(3,'2bc57287-6118-5b6f-bda7-4bb4a6d72c4b','vm1','configured',1.79564157710104513169e+09,'','2','','@FOLDER@/agents/1.sock','','','','QemuVM','@FOLDER@/agents/1/launch',300.0,0,-1.623630523681640625e-04,1228,NULL,4);
INSERT INTO "vms" VALUES(4,'e499dcbd-6dd5-53e4-b384-e6a2c1e781cf','vm2','configured',1.79564157703438234334e+09,'','-1','','@FOLDER@/agents/2.sock','','','','QemuVM','@FOLDER@/agents/2/launch',300.0,0,3.337860107421875e-05,1229,NULL,4);
CREATE UNIQUE INDEX one_current_experiment ON experiments (destroyed_at IS NULL)
    WHERE destroyed_at IS NULL;
CREATE UNIQUE INDEX one_open_attempt ON attempts (experiment_id, server_name, generation, ordinal)
    WHERE outcome IN ('armed', 'running');
CREATE INDEX open_requests ON requests (server_name) WHERE answered_at IS NULL;
CREATE TRIGGER vm_added AFTER INSERT ON vms BEGIN
    INSERT INTO history (experiment_id, server_name, at, new_state)
    VALUES ((SELECT id FROM current_experiment), new.server_name, new.state_at, new.state);
END;
CREATE TRIGGER vm_moved AFTER UPDATE OF state ON vms WHEN old.state <> new.state BEGIN
    INSERT INTO history (experiment_id, server_name, at, old_state, new_state, reason)
    VALUES ((SELECT id FROM current_experiment), new.server_name, new.state_at,
            old.state, new.state, new.reason);
END;
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
CREATE TRIGGER held AFTER INSERT ON holds BEGIN
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
CREATE INDEX pool_choice ON pool_vms
    ("group", state, bound_to_user, bound_sandbox, last_health_check);
CREATE INDEX pool_bound ON pool_vms ("group", bound_to_user)
    WHERE bound_to_user IS NOT NULL AND state <> 'terminating';
CREATE INDEX pool_leases ON pool_vms (holder_seen_at) WHERE state = 'in_use';
CREATE INDEX pool_queue ON pool_waiters (priority DESC, id);
CREATE INDEX pool_history_of_vm ON pool_history (vm_name);
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
END;
CREATE VIEW current_experiment AS SELECT * FROM experiments WHERE destroyed_at IS NULL;
CREATE VIEW barrier AS
SELECT e.id, e.start_at,
       e.launched_at IS NOT NULL
       AND EXISTS (SELECT 1 FROM vms WHERE state = 'configured')
       AND NOT EXISTS (
           SELECT 1 FROM vms WHERE state NOT IN ('configured', 'n/a')
           AND NOT (state = 'failed' AND e.on_failure = 'drop')) AS is_open
FROM current_experiment AS e;
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
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('experiments',2);
INSERT INTO "sqlite_sequence" VALUES('vms',4);
COMMIT;

"""Experiment files: every fault is told with its place, all at once, and nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tables
from conftest import Cli

import vmrm
from vmrm import Database, Experiment, UsageError

Write = Callable[..., Path]
VM = '[[vm]]\nname = "web"\npath = "/run/web.sock"\n'


def entry(*lines: str) -> str:
    return "\n".join([VM, "[[vm.schedule]]", *lines])


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes an experiment file and returns its path."""

    def write(text: str | bytes, name: str = "lab.toml") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def faults(path: Path) -> list[str]:
    """Return the faults that reading a file tells, without the indentation."""
    with pytest.raises(UsageError) as caught:
        vmrm.read_experiment(path)
    assert caught.value.code == 2
    head, *lines = str(caught.value).split("\n")
    assert head == f"{path}: {len(lines)} fault{'s' if len(lines) > 1 else ''}"
    assert all(line.startswith("  ") for line in lines)
    return [line.strip() for line in lines]


# === What a file says ============================================================================

FULL = """
[experiment]
start_buffer = 5
on_failure = "drop"

[[vm]]
name = "web"
path = "sockets/web.sock"
uuid = "u-web"
control_ip = "10.0.0.1"
launch_dir = "/opt/launch"
agent_timeout = 30
set_time = false

[[vm.schedule]]
start_time = -10
executable = "setup.sh"
arguments = ["--role", "web server"]
env = { ROLE = "x" }
file = [{ location = "setup.sh", filename = "files/setup.sh", executable = true }]
content = [{ location = "/etc/motd", content = "hello\\n" }]

[[vm.schedule]]
start_time = 2
transfer = [{ location = "/var/log/app", interval = 5, destination = "out" }]

[[vm.schedule]]
start_time = 10
pause = inf

[[vm]]
name = "plain"
use_vm_manager = false
"""


@pytest.fixture
def full(write: Write, tmp_path: Path) -> Path:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "setup.sh").write_text("echo hi\n")
    return write(FULL)


def test_a_file_is_read_with_host_paths_relative_to_itself(
    full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    experiment = vmrm.read_experiment(full)
    web, plain = experiment.vms
    assert web["path"] == str(tmp_path / "sockets" / "web.sock")
    assert (web["server_uuid"], web["control_ip"], web["launch_dir"]) == (
        "u-web",
        "10.0.0.1",
        "/opt/launch",
    )
    assert (web["agent_timeout_s"], web["set_time"], web["state"]) == (30, False, "uninitialized")
    assert (plain["state"], plain["path"]) == ("n/a", "")
    setup, transfer, pause = vmrm.parse_schedule(experiment.schedules["web"])
    assert (setup.executable, setup.arguments) == ("setup.sh", ["--role", "web server"])
    pinned = setup.items("file")[0]["sha256"]
    assert experiment.files == {pinned: tmp_path / "files" / "setup.sh"}
    assert transfer.items("transfer")[0]["destination"] == str(tmp_path / "out")
    assert str(pause) == "10 break"


def test_json_says_the_same_as_toml(full: Path, write: Write) -> None:
    import tomllib

    document = tomllib.loads(FULL)
    document["vm"][0]["schedule"][2]["pause"] = "inf"
    as_json = vmrm.read_experiment(write(json.dumps(document), "lab.json"))
    as_toml = vmrm.read_experiment(full)
    assert as_json.content_hash == as_toml.content_hash
    assert as_json.schedules == as_toml.schedules


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("/run/w.sock", "/run/w.sock"),
        ("unix:/run/w.sock", "/run/w.sock"),
        ("tcp:host:99", "tcp:host:99"),
        ("vsock:3:99", "vsock:3:99"),
    ],
)
def test_an_address_is_kept_or_made_an_absolute_path(write: Write, written: str, read: str) -> None:
    experiment = vmrm.read_experiment(write(f'[[vm]]\nname = "a"\npath = "{written}"\n'))
    assert experiment.vms[0]["path"] == read


def test_count_makes_numbered_vms_with_the_same_schedule(write: Write) -> None:
    text = entry("start_time = 1", 'executable = "a"', 'arguments = ["{n}"]')
    text = text.replace('name = "web"', 'name = "web{n}"\ncount = 3').replace("web.", "web{n}.")
    experiment = vmrm.read_experiment(write(text))
    assert [(vm["server_name"], vm["path"]) for vm in experiment.vms] == [
        ("web1", "/run/web1.sock"),
        ("web2", "/run/web2.sock"),
        ("web3", "/run/web3.sock"),
    ]
    assert len({vm["server_uuid"] for vm in experiment.vms}) == 3
    assert set(experiment.schedules) == {"web1", "web2", "web3"}
    assert '"{n}"' in experiment.schedules["web1"], "programs get their arguments as written"


def test_the_hash_sees_every_change_and_nothing_else(full: Path) -> None:
    def hashed(old: str = "", new: str = "") -> str:
        full.write_text(FULL.replace(old, new, 1))
        return vmrm.read_experiment(full).content_hash

    before = hashed()
    assert hashed("\n[[vm", "\n# a comment\n\n[[vm") == before
    changes = [
        ("start_buffer = 5", "start_buffer = 6"),
        ("web server", "db server"),
        ("start_time = 2", "start_time = 3"),
        ('"plain"', '"plainer"'),
        ("pause = inf", "pause = 5"),
    ]
    assert len({before, *(hashed(*change) for change in changes)}) == len(changes) + 1
    hashed()
    (full.parent / "files" / "setup.sh").write_text("echo other\n")
    assert vmrm.read_experiment(full).content_hash != before


# === What a file must not say ====================================================================

ONE_FAULT: dict[str, tuple[str, str]] = {
    "nothing": ("", "there is no [[vm]]"),
    "no vm": ("[experiment]\nstart_buffer = 1\n", "there is no [[vm]]"),
    "a vm that is a table": ('[vm]\nname = "a"\n', "there is no [[vm]]"),
    "unknown section": (f"[experimant]\n{VM}", "key 'experimant', did you mean 'experiment'?"),
    "unknown setting": (
        f"[experiment]\nstartbuffer = 1\n{VM}",
        "[experiment]: unknown key 'startbuffer', did you mean 'start_buffer'?",
    ),
    "negative buffer": (f"[experiment]\nstart_buffer = -1\n{VM}", "start_buffer is -1, but must"),
    "endless buffer": (f"[experiment]\nstart_buffer = inf\n{VM}", "start_buffer is inf, but must"),
    "unknown policy": (f'[experiment]\non_failure = "x"\n{VM}', "on_failure is 'x', but must be"),
    "policy as a list": (f'[experiment]\non_failure = ["drop"]\n{VM}', "is ['drop'], but must be"),
    "vm without a name": ('[[vm]]\npath = "/x"\n', "vm 1: name is missing"),
    "vm without a path": ('[[vm]]\nname = "a"\n', "vm 'a': path to the guest agent is missing"),
    "vm with a bad name": ('[[vm]]\nname = "a/b"\npath = "/x"\n', "vm 'a/b': VM name 'a/b' is"),
    "vm with a bad address": ('[[vm]]\nname = "a"\npath = "tcp:x"\n', "vm 'a': address 'tcp:x'"),
    "vm with another engine": (f'{VM}engine = "Xen"\n', "vm 'web': unknown engine 'Xen'; one of"),
    "unknown key of a vm": (f"{VM}agent_timout = 3\n", "vm 'web': unknown key 'agent_timout', did"),
    "endless agent time-out": (f"{VM}agent_timeout = inf\n", "agent_timeout is inf, but must"),
    "switch as text": (f'{VM}set_time = "no"\n', "set_time is 'no', but must be true or false"),
    "count without {n}": (f"{VM}count = 2\n", "vm 'web': with count, the name needs {n}"),
    "count of none": (f"{VM}count = 0\n", "vm 'web': count is 0, but must be a whole number"),
    "schedule as text": (f'{VM}schedule = "x"\n', "vm 'web': schedule is 'x', but must be a list"),
    "entry as a number": (f"{VM}schedule = [3]\n", "vm 'web', entry 1: 3 is not a table"),
    "entry at 0": (
        entry("start_time = 0", 'executable = "a"'),
        "vm 'web', entry 1: start_time 0 is the barrier itself",
    ),
    "misspelt entry": (
        entry("start_time = 1", 'executible = "a"'),
        "vm 'web', entry 1: unknown key 'executible', did you mean 'executable'?",
    ),
    "huge number": (
        entry(f"start_time = 1{'0' * 400}", 'executable = "a"'),
        "but must be a number of seconds",
    ),
    "endless time-out": (
        entry("start_time = 1", 'executable = "a"', "timeout = inf"),
        "vm 'web', entry 1: timeout is inf, but must be a positive number",
    ),
    "endless interval": (
        entry("start_time = 1", 'transfer = [{ location = "/a", interval = inf }]'),
        "vm 'web', entry 1, transfer: interval is inf, but must be",
    ),
    "missing host file": (
        entry("start_time = 1", 'file = [{ location = "a", filename = "no/such" }]'),
        "vm 'web', entry 1, file 'no/such': there is no such file",
    ),
    "directory as host file": (
        entry("start_time = 1", 'file = [{ location = "a", filename = "." }]'),
        "vm 'web', entry 1, file '.': there is no such file",
    ),
    "host file with too long a name": (
        entry("start_time = 1", f'file = [{{ location = "a", filename = "{"x" * 300}" }}]'),
        "File name too long",
    ),
    "part of a file missing": (
        entry("start_time = 1", 'file = [{ location = "a" }]'),
        "vm 'web', entry 1, file: filename is missing",
    ),
    "name twice, in another case": (
        f'{VM}[[vm]]\nname = "WEB"\npath = "/other"\n',
        "vm 'WEB': name 'WEB' is already that of vm 'web'",
    ),
    "path twice": (
        f'{VM}[[vm]]\nname = "db"\npath = "unix:/run/web.sock"\n',
        "vm 'db': path '/run/web.sock' is already that of vm 'web'",
    ),
    "uuid twice": (
        f'{VM}uuid = "u"\n[[vm]]\nname = "db"\npath = "/x"\nuuid = "u"\n',
        "vm 'db': uuid 'u' is already that of vm 'web'",
    ),
}


@pytest.mark.parametrize(("text", "said"), ONE_FAULT.values(), ids=ONE_FAULT)
def test_a_fault_is_one_line_with_its_place(write: Write, text: str, said: str) -> None:
    (told,) = faults(write(text))
    assert said in told


def test_all_faults_are_told_at_once_in_the_order_of_the_file(write: Write) -> None:
    text = """
        unknown = 1
        [experiment]
        on_failure = "panic"
        start_buffer = "soon"
        [[vm]]
        name = "web"
        pth = "/x"
        [[vm.schedule]]
        start_time = 0
        executable = "a"
        [[vm.schedule]]
        start_time = "x"
        colour = 1
        [[vm]]
        name = "-bad"
        path = "/y"
        [[vm]]
        name = "db"
        path = "/z"
        [[vm.schedule]]
        start_time = 1
        file = [{ location = "a", filename = "none" }]
    """
    starts = [
        "unknown key 'unknown'",
        "[experiment]: on_failure is 'panic'",
        "[experiment]: start_buffer is 'soon'",
        "vm 'web': unknown key 'pth', did you mean 'path'?",
        "vm 'web', entry 1: start_time 0",
        "vm 'web', entry 2: start_time is 'x'",
        "vm 'web', entry 2: unknown key 'colour'",
        "vm '-bad': VM name '-bad'",
        "vm 'db', entry 1, file 'none'",
    ]
    told = faults(write(text))
    assert len(told) == len(starts)
    assert [line.startswith(start) for line, start in zip(told, starts, strict=True)] == [
        True
    ] * len(starts), told


def test_one_fault_does_not_hide_another_of_the_same_table(write: Write) -> None:
    text = """
        [[vm]]
        name = "a b"
        path = "tcp:host"
        engine = "other"
        [[vm.schedule]]
        start_time = 0
        executable = 5
        [[vm.schedule]]
        start_time = "soon"
        file = [{ location = "x", filename = "none" }, { location = "y" }]
        [[vm]]
        name = "c"
        agent_timeout = -1
    """
    starts = [
        "vm 'a b', entry 1: executable is 5",
        "vm 'a b', entry 1: start_time 0",
        "vm 'a b', entry 2: start_time is 'soon'",
        "vm 'a b', entry 2, file: filename is missing",
        "vm 'a b', entry 2, file 'none'",
        "vm 'a b': VM name 'a b'",
        "vm 'a b': address 'tcp:host'",
        "vm 'a b': unknown engine 'other'",
        "vm 'c': agent_timeout is -1",
        "vm 'c': path to the guest agent is missing",
    ]
    told = faults(write(text))
    assert len(told) == len(starts), told
    assert all(line.startswith(start) for line, start in zip(told, starts, strict=True)), told


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("lab.toml", b"[[vm]\n", "is not TOML"),
        ("lab.toml", b"a = 1\na = 2\n", "is not TOML"),
        ("lab.toml", b"name = '\xff'\n", "is not UTF-8 text (byte 8)"),
        ("lab.json", b"{", "is not JSON"),
        ("lab.json", b'{"vm": [{"agent_timeout": NaN}]}', "is not JSON"),
        ("lab.json", b"[" * 100_000, "is not JSON"),
    ],
)
def test_a_file_that_cannot_be_parsed_is_one_clear_line(
    write: Write, name: str, text: bytes, said: str
) -> None:
    path = write(text, name)
    with pytest.raises(UsageError) as caught:
        vmrm.read_experiment(path)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("document", [[], "x", None, 3, {"vm": {}}, {"vm": None}, {"vm": [None]}])
def test_json_of_another_structure_is_faulty(write: Write, document: Any) -> None:
    assert faults(write(json.dumps(document), "lab.json"))


def test_a_file_that_is_not_there_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read .*none.toml': No such file"):
        vmrm.read_experiment(tmp_path / "none.toml")
    with pytest.raises(UsageError, match="cannot read"):
        vmrm.read_experiment(tmp_path)


# === Loading =====================================================================================


def load(db: Database, path: Path) -> bool:
    return vmrm.load_experiment(db, vmrm.read_experiment(path))


def dump(db: Database) -> list[list[dict[str, Any]]]:
    tables = ("experiments", "vms", "schedules", "files", "history")
    return [db.query(f"SELECT * FROM {table}") for table in tables]  # noqa: S608


def test_loading_writes_everything_and_loading_again_continues(full: Path, tmp_path: Path) -> None:
    with Database(tmp_path / "lab.db") as db:
        assert load(db, full) is True
        assert vmrm.get_vm_states(mapping=vmrm.VMMapping(db=db)) == {
            "web": "uninitialized",
            "plain": "n/a",
        }
        experiment = vmrm.current_experiment(db)
        assert (experiment["start_buffer_s"], experiment["on_failure"]) == (5, "drop")
        pinned = vmrm.parse_schedule(vmrm.ScheduleDb(db=db).get("web") or "")[0].items("file")[0]
        assert vmrm.content_path(db, pinned["sha256"]).read_text() == "echo hi\n"
        before = dump(db)
        assert load(db, full) is False
        assert dump(db) == before


def test_other_content_is_refused_naming_the_ways_out(full: Path, tmp_path: Path) -> None:
    with Database(tmp_path / "lab.db") as db:
        load(db, full)
        before = dump(db)
        full.write_text(FULL.replace("pause = inf", "pause = 5"))
        with pytest.raises(vmrm.Conflict, match="holds another experiment") as caught:
            load(db, full)
        assert caught.value.code == 2
        assert "destroy --yes" in caught.value.hint
        assert "schedule add" in caught.value.hint
        assert dump(db) == before


def test_vms_made_by_hand_are_not_overwritten(full: Path, tmp_path: Path) -> None:
    with Database(tmp_path / "lab.db") as db:
        vmrm.VMMapping(db=db).put("u", "mine")
        with pytest.raises(vmrm.Conflict, match="one made by hand"):
            load(db, full)


def test_after_destroy_another_experiment_can_be_loaded(full: Path, tmp_path: Path) -> None:
    with Database(tmp_path / "lab.db") as db:
        load(db, full)
        vmrm.destroy_experiment(db)
        full.write_text(FULL.replace("pause = inf", "pause = 5"))
        assert load(db, full) is True
        assert tables.generations(db.path) == [2]


def test_a_file_that_changes_while_it_is_loaded_is_refused(full: Path, tmp_path: Path) -> None:
    experiment = vmrm.read_experiment(full)
    (tmp_path / "files" / "setup.sh").write_text("echo changed\n")
    with Database(tmp_path / "lab.db") as db:
        with pytest.raises(UsageError, match="changed while it was being read"):
            vmrm.load_experiment(db, experiment)
        assert vmrm.VMMapping(db=db).get_all() == []
        assert vmrm.ScheduleDb(db=db).list_all() == []


def test_a_load_that_fails_half_way_leaves_nothing(full: Path, tmp_path: Path) -> None:
    """Here the last schedule cannot be written, after VMs and settings were."""
    read = vmrm.read_experiment(full)
    experiment = Experiment(
        read.source, read.settings, read.vms, {**read.schedules, "plain": "not json"}, read.files
    )
    with Database(tmp_path / "lab.db") as db:
        vmrm.current_experiment(db)
        before = dump(db)
        with pytest.raises(Exception, match="json"):
            vmrm.load_experiment(db, experiment)
        assert dump(db) == before


def test_the_command_tells_all_faults_and_makes_no_database(cli: Cli, write: Write) -> None:
    path = write('[[vm]]\nname = "a"\nengin = "x"\n[[vm]]\nname = "A"\n')
    done = cli("load", path)
    assert done.code == 2
    assert done.out == ""
    assert "did you mean 'engine'?" in done.err
    assert "vm 'A': path to the guest agent is missing" in done.err
    assert "Traceback" not in done.err
    assert not cli.db.exists()


def test_the_command_continues_the_same_file_and_refuses_another(cli: Cli, full: Path) -> None:
    assert cli("load", full).code == 0
    assert cli("load", full).code == 0
    full.write_text(FULL.replace("pause = inf", "pause = 5"))
    done = cli("load", full)
    assert done.code == 2
    assert "destroy --yes" in done.err
    assert "Traceback" not in done.err

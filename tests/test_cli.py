"""Words in; text and an exit code out.

Most tests call `main` in this process (`vm`); those that need processes of their own use `cli`.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import get_args

import pytest
import tables
from cli_lab import entry, lab, until
from conftest import Cli, Result
from lab import stand_ins

import vmrm

Vm = Callable[..., Result]
COMMANDS = sorted(vmrm.COMMANDS)
GROUPS = {name: sorted(vmrm.COMMANDS[name]) for name in ("schedule", "store", "pool")}
LINES = [[name] for name in COMMANDS] + [[g, name] for g, names in GROUPS.items() for name in names]
ENTRIES = {
    tuple(line): functools.reduce(lambda found, name: found[name], line, vmrm.COMMANDS)
    for line in LINES
    if line[0] not in GROUPS or len(line) == 2
}


@pytest.fixture
def db(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return where the database of this test will be; nothing is there yet."""
    path = tmp_path / "lab.db"
    monkeypatch.setenv("VMRM_DB", str(path))
    monkeypatch.chdir(tmp_path)
    return path


@pytest.fixture
def vm(db: Path, capsys: pytest.CaptureFixture[str]) -> Vm:
    """Run one command line in this process."""

    def run(*words: str | Path) -> Result:
        capsys.readouterr()
        try:
            code = vmrm.main([str(word) for word in words])
        except SystemExit as end:  # how exec passes the program's own code through
            assert isinstance(end.code, int)
            code = end.code
        out, err = capsys.readouterr()
        return Result(out, err, code)

    return run


@pytest.fixture
def loaded(vm: Vm, tmp_path: Path, children: None) -> Iterator[Vm]:
    """Have two VMs with answering stand-in agents in the database; nothing runs."""
    with stand_ins(tmp_path / "agents", 2):
        assert vm("load", lab(tmp_path, entry(-1, "echo hi"), "")).code == 0
        yield vm


@pytest.fixture
def live(loaded: Vm, cli: Cli) -> Iterator[Cli]:
    """Have both VMs taken care of by live handlers; stopped in the end."""
    assert cli("run", "--stay", "--detach").code == 0
    assert cli("wait", "--timeout", "20").code == 0
    yield cli
    cli("stop", "--kill")


def rows(path: Path) -> list[str]:
    """Return everything that is in a database, as text; an absent one is empty."""
    if not path.exists():
        return []
    return tables.dump(path)


def refused(result: Result, says: str, code: int = 2) -> None:
    """Assert that a command said one clear line, perhaps a hint, and nothing on stdout."""
    assert result.code == code, result
    assert not result.out
    lines = result.err.splitlines()
    assert re.search(says, lines[0]), result.err
    assert lines[0].startswith("error: ")
    assert all(line.startswith(("hint: ", "  ")) for line in lines[1:])
    assert "Traceback" not in result.err


# === words that fire would mistake ===============================================================


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("destroy --yess", "could not consume arg: --yess"),
        ("destroy --yes extra", "follows a switch"),
        ("run lab.toml extra", "could not consume arg: extra"),
        ("destroy --yes=false", "'false' follows a switch"),
        ("destroy --yes=true", "'true' follows a switch"),
        ("destroy yes", "could not consume arg: yes"),
        ("destroy --yes --bogus=1", "could not consume arg: --bogus=1"),
        ("destroy --yes -- extra", "vmrm destroy takes no words after '--'"),
        ("destroy --yes -- --bogus", "vmrm destroy takes no words after '--'"),
        ("destroy --yes=True - upper", "could not consume arg: upper"),
        ("destroy --yes=True _run", "could not consume arg: _run"),
        ("destroy --yes=True __class__", "could not consume arg: __class__"),
        ("store remove vm1 extra", "could not consume arg: extra"),
        ("_db", "no such command: _db"),
        ("_open", "no such command: _open"),
        ("__init__", "no such command: __init__"),
        ("schedule _main", "no such command: _main"),
        ("store _main destroy --yes", "no such command: _main"),
        ("nosuch", "no such command: nosuch"),
        ("schedule nosuch", "no such command: nosuch"),
        ("load", "received no value for the required argument: file"),
        ("exec", "required argument: vm"),
        ("exec vm1", "no program is named"),
        ("exec -- vm1 true", "required argument: vm"),
        ("exec vm1 --", "no program is named"),
        ("pool acquire lab --", "nothing follows --"),
        ("run --f lab.toml", "options are not abbreviated: --f"),
        ("run -f lab.toml", "options are not abbreviated: -f"),
        ("destroy -y", "options are not abbreviated: -y"),
        ("keys", "no such command: keys"),
        ("store clear", "no such command: clear"),
        ("push vm1", "required argument"),
        ("schedule add vm1", "required argument: file"),
        ("store add", "no file is named"),
        ("--db", "--db needs a path"),
        ("status --db=", "--db needs a path"),
        ("wait --timeout nan", "'nan' is not a number of seconds, 0 or more"),
        ("wait --timeout inf", "'inf' is not a number of seconds, 0 or more"),
        ("wait --timeout=-1", "'-1' is not a number of seconds, 0 or more"),
        ("wait --timeout soon", "'soon' is not a number of seconds"),
        ("run --timeout", "is not a number of seconds"),
        ("run --start-buffer=-1e9", "is not a number of seconds, 0 or more"),
        ("run --on-failure never", "unknown on_failure 'never'; one of abort, drop, wait"),
        ("run --detach nosuch.toml", "'nosuch.toml' follows a switch"),
        ("stop --timeout 1x", "'1x' is not a number"),
        ("retry vm1 0", "'0' is not a whole number, 1 or more"),
        ("retry vm1 1.5", "'1.5' is not a whole number"),
        ("retry vm1 1_0", "'1_0' is not a whole number"),
        ("retry vm1 --entry=-1", "'-1' is not a whole number"),
        ("agent x --count 0", "'0' is not a whole number"),
        ("wait --state done", "unknown state 'done'; one of uninitialized, "),
        ("destroy", "this removes the experiment"),
        ("stop", "the experiment is not running"),
        ("retry vm1", "nothing of VM 'vm1' has failed"),
    ],
)
def test_misuse_is_refused_and_changes_nothing(vm: Vm, db: Path, words: str, says: str) -> None:
    vm("load", lab(db.parent))
    before = rows(db)
    refused(vm(*words.split()), says)
    assert rows(db) == before


@pytest.mark.parametrize("name", ["1e3", "True", "None", "1.10", "0x10", "a.b", "1", "false"])
def test_names_stay_text(vm: Vm, db: Path, name: str) -> None:
    lab_file = db.parent / "lab.toml"
    lab_file.write_text(f'[[vm]]\nname = "{name}"\npath = "a.sock"\n')
    assert vm("load", lab_file).code == 0
    assert vm("status").out.startswith(f"{name}\t")
    result = vm("wait", name, "--state", "uninitialized")
    assert result.code == 0, result


@pytest.mark.parametrize("name", ["web#1", "[x]", "{}", "hello, world", "'a'", "1e3", "(1,2)", " "])
def test_words_that_look_like_python_reach_the_command_as_they_are(vm: Vm, name: str) -> None:
    vm("load", lab(Path.cwd()))
    refused(vm("logs", name), re.escape(f"no VM {name!r}"))


def test_a_switch_may_be_negated_and_options_may_stand_anywhere(vm: Vm, db: Path) -> None:
    vm("load", lab(db.parent))
    refused(vm("destroy", "--noyes"), "this removes the experiment")
    assert json.loads(vm("status", "--json").out) == json.loads(vm("--json", "status").out)
    other = db.with_name("other.db")
    refused(vm("status", "--db", other), "no database at")
    refused(vm(f"--db={other}", "status"), "no database at")
    assert not other.exists()


# === help ========================================================================================


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_of_every_command_shows_its_docstring(vm: Vm, flag: str) -> None:
    for line, known in ENTRIES.items():
        result = vm(*line, flag)
        assert (result.code, result.err) == (0, ""), line
        assert (known.function.__doc__ or "").splitlines()[0] in result.out, line
        assert not re.search("INFO|FIRE_METADATA|_fire|_main", result.out), line
        for name, parameter in known.parameters.items():
            heads = {parameter.KEYWORD_ONLY: f"--{name}=", parameter.VAR_KEYWORD: "are accepted."}
            text = result.out.partition(heads.get(parameter.kind, name.upper()))[2]
            assert {**vmrm.WORDS, **known.words}[name] in text, (line, name)


@pytest.mark.parametrize("words", [[], ["--help"], ["--", "--help"]], ids=str)
def test_bare_vmrm_prints_help_and_opens_nothing(vm: Vm, db: Path, words: list[str]) -> None:
    result = vm(*words)
    assert (result.code, result.err) == (0, "")
    for name in COMMANDS:
        assert re.search(rf"^     {name}$", result.out, re.MULTILINE)
    assert not db.exists()


@pytest.mark.parametrize("group", GROUPS)
def test_a_bare_group_prints_its_help(vm: Vm, group: str) -> None:
    result = vm(group)
    assert (result.code, result.err) == (0, "")
    assert all(f"     {name}\n" in result.out for name in GROUPS[group])


@pytest.mark.parametrize("shell", [[], ["fish"]], ids=["bash", "fish"])
def test_completion_names_each_command(vm: Vm, shell: list[str]) -> None:
    result = vm("--", "--completion", *shell)
    assert result.code == 0
    for line in LINES:
        assert re.search(rf"\b{line[-1]}\b", result.out), line
    assert "--self" not in result.out
    assert "_main" not in result.out


WRONG = {
    bool: ("maybe", "follows a switch"),
    float: ("soon", "is not a number of seconds, 0 or more"),
    int: ("1.5", "is not a whole number, 1 or more"),
}


def test_every_parameter_has_a_parser_by_its_type(vm: Vm) -> None:
    found = set()
    for line, known in ENTRIES.items():
        kinds = known.parameters.values()
        words = ["x" for p in kinds if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        for parameter in kinds:
            kind = next(iter(get_args(parameter.annotation)), parameter.annotation)
            found.add(kind)
            if kind not in (str, Path):
                value, says = WRONG.get(kind, ("never", "unknown .* 'never'; one of"))
                refused(vm(*line, f"--{parameter.name}={value}", *words), says)
    assert found == {str, Path, *WRONG, vmrm.OnFailure, vmrm.Late, vmrm.VMState}


# === the database ================================================================================

READING = [
    "status",
    "schedule show vm1",
    "schedule add vm1 lab.toml",
    "store list",
    "store remove x",
    "run",
    "logs vm1",
    "wait",
    "exec vm1 true",
    "push vm1 lab.toml /tmp/",
    "pull vm1 /etc/motd",
    "info vm1",
    "reboot vm1",
    "retry vm1",
    "pause vm1 --duration 1",
    "break vm1",
    "resume",
    "stop",
    "destroy --yes",
    "handle vm1",
    "check",
    "backup copy.db",
    "trace run.json",
    "report run.html",
    "pool group",
    "pool add a lab",
    "pool list",
    "pool info",
    "pool acquire lab",
    "pool renew a",
    "pool release a",
    "pool hold a 1h",
    "pool terminate a",
    "pool remove a",
    "pool log a",
    "pool history",
    "pool metrics",
]


def test_the_list_of_commands_here_is_complete() -> None:
    making = {"load", "demo", "agent", "store"} | {"plan"}  # which makes none
    assert {line.split()[0] for line in READING} | making == set(COMMANDS) | {"schedule"}


@pytest.mark.parametrize("words", READING)
def test_a_command_that_reads_makes_no_database(vm: Vm, db: Path, words: str) -> None:
    lab(db.parent)
    refused(vm(*words.split()), "no database at '.*lab.db'")
    assert sorted(path.name for path in db.parent.iterdir()) == ["lab.toml"]


@pytest.mark.parametrize(
    "content", [b"no database, but quite some text " * 99, b"\0" * 4096], ids=["text", "zeros"]
)
@pytest.mark.parametrize("words", ["status", "load lab.toml", "check"])
def test_a_file_that_is_no_database_is_refused_unchanged(
    vm: Vm, db: Path, words: str, content: bytes
) -> None:
    lab(db.parent)
    db.write_bytes(content)
    refused(vm(*words.split()), "lab.db' is not (usable|a database)", 3)
    assert db.read_bytes() == content


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("CREATE TABLE theirs (x)", "another program's database"),
        ("PRAGMA application_id = 1986884205; PRAGMA user_version = 99", "schema version 99"),
    ],
)
def test_a_database_of_others_is_refused(vm: Vm, db: Path, script: str, says: str) -> None:
    with closing(sqlite3.connect(db)) as other:
        other.executescript(script)
    before = rows(db)
    refused(vm("status"), says, 3)
    refused(vm("load", lab(db.parent)), says, 3)
    assert rows(db) == before


def test_a_database_that_is_a_directory_is_refused(vm: Vm, db: Path) -> None:
    db.mkdir()
    refused(vm("status"), "is not a file")


def test_a_busy_database_gives_75_and_names_the_holder(cli: Cli, tmp_path: Path) -> None:
    path = lab(tmp_path)
    assert cli("load", path).code == 0
    with (tmp_path / "lab.db.d/locks/writer").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = cli("destroy", "--yes", env={"VMRM_TIMEOUT_SCALE": "0.005"})
    refused(result, f"kept busy for 0.3 s by process {os.getpid()}", 75)
    assert cli("status").out.startswith("vm1\t")


# === experiment files ============================================================================


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\x7fELF\x02\x01\x01\x00\xff\xfe", r"is not UTF-8 text \(byte 8\)"),
        (b"name = 'caf\xe9'", "is not UTF-8 text"),
        (b"", "1 fault"),
        (b"[[vm]]\nname = ", "is not TOML"),
        (b"x = " + b"[" * 100_000, "is not TOML"),
        (b"\0\0\0", "is not TOML"),
        (b"experiment = 3\nvm = 4", "2 faults"),
    ],
    ids=["binary", "latin1", "empty", "cut", "deep", "zeros", "types"],
)
@pytest.mark.parametrize("command", ["load", "run"])
def test_an_unusable_experiment_file(
    vm: Vm, db: Path, command: str, content: bytes, says: str
) -> None:
    path = db.parent / "bad.toml"
    path.write_bytes(content)
    refused(vm(command, path), says)
    assert not db.exists()


@pytest.mark.parametrize("command", ["load", "run", "schedule add vm1"])
def test_a_missing_file_and_a_directory(vm: Vm, db: Path, command: str) -> None:
    vm("load", lab(db.parent))
    before = rows(db)
    refused(vm(*command.split(), "nosuch.toml"), "cannot read 'nosuch.toml': No such file")
    refused(vm(*command.split(), db.parent), "cannot read '.*': Is a directory")
    refused(vm(*command.split(), ""), "'' names no file")
    assert rows(db) == before


def test_an_unreadable_file(vm: Vm, db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = lab(db.parent)

    def refuse(self: Path) -> bytes:  # the tests may run as root, whom no mode stops
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    refused(vm("load", path), "cannot read '.*lab.toml': Permission denied")
    assert not db.exists()


FAULTY = """
[experiment]
start_bufer = 1
on_failure = "never"
[[vm]]
name = "web 1"
path = "a.sock"
[[vm]]
name = "db"
[[vm]]
name = "x"
path = "x.sock"
engine = "Hal9000"
agent_timeout = nan
[[vm]]
name = "y"
path = "y.sock"
[[vm.schedule]]
start_time = 0
executable = "true"
[[vm.schedule]]
start_time = 1
executble = "true"
[[vm.schedule]]
start_time = 2
file = [{location = "a", filename = "nosuch"}]
[[vm.schedule]]
start_time = "soon"
[[vm.schedule]]
start_time = 3
executable = "/nosuch"
on_host = true
[[vm]]
name = "Y"
path = "z.sock"
[[vms]]
"""


def test_a_faulty_file_tells_all_faults_at_once_and_changes_nothing(vm: Vm, db: Path) -> None:
    vm("load", lab(db.parent))
    before = rows(db)
    path = db.parent / "faulty.toml"
    path.write_text(FAULTY)
    result = vm("load", path)
    refused(result, "faulty.toml: [0-9]+ faults$")
    for fault in (
        "unknown key 'vms', did you mean 'vm'",
        "unknown key 'start_bufer', did you mean 'start_buffer'",
        "on_failure is 'never', but must be abort, drop or wait",
        "vm 'web 1': VM name 'web 1' is not usable",
        "vm 'db': path to the guest agent is missing",
        "vm 'x': agent_timeout is nan, but must be a positive number of seconds",
        "vm 'y', entry 1: start_time 0 is the barrier",
        "vm 'y', entry 2: unknown key 'executble', did you mean 'executable'",
        "vm 'y', entry 3, file 'nosuch': there is no such file",
        "vm 'y', entry 4: start_time is 'soon', but must be a number",
        "vm 'y', entry 5: this host has no program '/nosuch'",
        "name 'Y' is already that of vm 'y'",
    ):
        assert fault in result.err
    count = int(re.findall("([0-9]+) faults", result.err)[0])
    assert len([line for line in result.err.splitlines() if line.startswith("  ")]) == count
    assert rows(db) == before


def test_json_experiments_are_the_same(vm: Vm, db: Path) -> None:
    item = {"start_time": 1, "executable": "true"}
    document = {"vm": [{"name": "a", "path": "a.sock", "schedule": [item]}]}
    path = db.parent / "lab.json"
    path.write_text(json.dumps(document))
    assert vm("load", path).out == "loaded\t1\nvms\t1\nentries\t1\n"
    path.write_text('{"vm": [{"name": NaN}]}')
    refused(vm("load", path), "is not JSON")


def test_loading_again_continues_and_another_file_is_refused(vm: Vm, db: Path) -> None:
    path = lab(db.parent, entry(1, "true"))
    assert vm("load", path).out == "loaded\t1\nvms\t1\nentries\t1\n"
    before = rows(db)
    assert vm("load", path).out == "loaded\t0\nvms\t1\nentries\t1\n"
    lab(db.parent, entry(2, "true"))
    refused(vm("load", path), "holds another experiment")
    refused(vm("run", path), "holds another experiment")
    assert rows(db) == before
    assert vm("destroy", "--yes").code == 0
    assert vm("load", path).code == 0


def test_run_without_anything_to_run(vm: Vm, db: Path) -> None:
    with vmrm.Database(db) as made:
        vmrm.current_experiment(made)
    refused(vm("run"), "there is no VM to run")
    assert vm("status").out == ""


# === what goes where =============================================================================

LISTINGS = ["status", "schedule show vm1", "store list", "check", "load lab.toml"]


@pytest.mark.parametrize("words", LISTINGS)
def test_json_is_one_document_and_pipes_get_one_line_per_row(vm: Vm, db: Path, words: str) -> None:
    vm("load", lab(db.parent, entry(1, "true"), ""))
    vm("store", "add", "lab.toml")
    document = json.loads(vm(*words.split(), "--json").out)
    plain = vm(*words.split())
    assert (plain.code, plain.err) == (0, "")
    assert len(plain.out.splitlines()) == len(document)
    if isinstance(document, list) and document:
        columns = {line.count("\t") + 1 for line in plain.out.splitlines()}
        assert columns == {len(document[0])}


def test_long_values_are_complete_on_a_pipe(cli: Cli, tmp_path: Path) -> None:
    name = "n" * 64
    script = "x" * 300
    (tmp_path / "lab.toml").write_text(
        f'[[vm]]\nname = "{name}"\npath = "{"p" * 60}.sock"\nuuid = "{uuid.uuid4()}"\n'
        f'[[vm.schedule]]\nstart_time = 1\nexecutable = "{script}"\n'
    )
    assert cli("load", "lab.toml").code == 0
    assert cli("status", env={"COLUMNS": "40"}).out.split("\t")[0] == name
    assert script in cli("schedule", "show", name, env={"COLUMNS": "40"}).out


def test_data_is_never_markup_nor_control(capsys: pytest.CaptureFixture[str]) -> None:
    evil = "[red]x[/red]\x1b[31m\x9b31m\x07\u202e\r\nend"
    screen = vmrm.Screen()
    screen.show([{"vm": evil, "list": [evil]}])
    screen.show({"vm": evil})
    screen.tell(evil)
    screen.error(vmrm.VmrmError(evil, "Look"))
    vmrm.Screen(as_json=True).show([evil])
    out, err = capsys.readouterr()
    for text in (out, err):
        assert "[red]x[/red]" in text
        assert all(c.isprintable() or c in "\t\n" for c in text), ascii(text)
    assert json.loads(out.splitlines()[-2]) == evil


def test_tables_show_brackets_as_they_are() -> None:
    from rich.console import Console

    console = Console(width=80, file=open(os.devnull, "w"), record=True)  # noqa: SIM115, PTH123
    with closing(console.file):
        console.print(vmrm._table([{"vm": "[bold]a[/bold]", "reason": "[0]\x1b[2J"}]))
    text = console.export_text()
    assert "[bold]a[/bold]" in text
    assert r"[0]\u001b[2J" in text


def test_quiet_leaves_results_and_errors(cli: Cli, loaded: Vm) -> None:
    result = cli("run", "--quiet")
    assert result.code == 0
    assert result.err == ""
    assert result.out.startswith("vm1\tconfigured\t1\t1\t")
    assert cli("nosuch", "--quiet").err.startswith("error: ")


def test_a_reader_that_leaves_is_no_disaster(cli: Cli, tmp_path: Path) -> None:
    cli("load", lab(tmp_path))
    read, write = os.pipe()
    os.close(read)
    with open(write, "wb") as pipe:  # noqa: PTH123
        done = subprocess.run(
            cli.command("status"),
            env=cli.environment,
            stdout=pipe,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert b"Traceback" not in done.stderr
    assert b"Exception" not in done.stderr


def test_status_needs_neither_fire_nor_rich(cli: Cli, tmp_path: Path) -> None:
    cli("load", lab(tmp_path))
    script = "import sys, vmrm; vmrm.main(['status', '--json']); "
    script += "print(sorted({'fire', 'rich', 'sqlite_utils', 'asyncio'} & set(sys.modules)))"
    words = [cli.command()[0], "-c", script]
    where = Path(vmrm.__file__).parent
    done = subprocess.run(
        words, env=cli.environment, cwd=where, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


# === exec, push, pull, info, reboot ==============================================================


@pytest.fixture(scope="module", params=["directly", "by a handler"])
def shared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cli]:
    """Have two VMs for several tests, without handlers and with live ones."""
    folder = tmp_path_factory.mktemp("shared")
    cli = Cli(folder / "lab.db", folder)
    with stand_ins(folder / "agents", 2):
        assert cli("load", lab(folder, entry(-1, "echo hi"), "")).code == 0
        if request.param == "directly":
            yield cli
            return
        assert cli("run", "--stay", "--detach").code == 0
        assert cli("wait", "--timeout", "20").code == 0
        yield cli
        cli("stop", "--kill")


@pytest.fixture
def either(shared: Cli, vm: Vm, monkeypatch: pytest.MonkeyPatch) -> Vm:
    """Reach these VMs from this process."""
    monkeypatch.setenv("VMRM_DB", str(shared.db))
    return vm


def test_exec_passes_code_and_bytes_through(either: Vm, shared: Cli) -> None:
    for code in (0, 1, 2, 3, 124, 255):
        assert either("exec", "vm1", "sh", "-c", f"exit {code}") == ("", "", code)
    assert either("exec", "vm1", "sh", "-c", "kill -9 $$").code == 128 + 9
    assert shared("exec", "vm1", "sh", "-c", "exit 7") == ("", "", 7)
    script = r"printf 'a\000\377\r\n\033[1m'; printf 'b\200' >&2"
    done = subprocess.run(
        shared.command("exec", "vm1", "sh", "-c", script),
        env=shared.environment,
        capture_output=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == (b"a\0\xff\r\n\x1b[1m", b"b\x80")


def test_exec_passes_words_on_exactly(either: Vm) -> None:
    words = [
        "-la",
        "--help",
        "--json",
        "--db",
        "x",
        "$HOME",
        "it's",
        'q"',
        "a b",
        "",
        "é",
        "*",
        "-",
    ]
    words += ["--", "1e3", "a\nb", "\\", "#x", "[x]", "True"]
    show = ["sh", "-c", 'printf "%s|" "$@"', "sh"]
    expected = "".join(f"{word}|" for word in words)
    assert either("exec", "vm1", *show, *words).out == expected
    assert either("exec", "vm1", "--", *show, *words).out == expected
    assert either("exec", "--timeout", "5", "vm1", *show, *words).out == expected
    assert either("exec", "--timeout=5", "VM1", *show, "x").out == "x|"


def test_ls_la(either: Vm) -> None:
    direct = either("exec", "vm1", "ls", "-la", "/proc/self/fd/..")
    assert direct.code == 0
    assert direct.out.startswith("total ")
    assert either("exec", "vm1", "--", "ls", "-d", "/etc").out == "/etc\n"


def test_a_program_that_is_not_there(either: Vm) -> None:
    result = either("exec", "vm1", "nosuch-program")
    refused(result, "VM 'vm1': guest-exec failed in the guest.*nosuch-program", 127)
    assert either("exec", "vm2", "echo", "still here").out == "still here\n"


NAMES = ["plain", "with space", 'it\'s "quoted"', "né日本", "$HOME;`id`", "-dash", "a\nb"]


def test_push_and_pull_are_bit_exact(either: Vm, shared: Cli, tmp_path: Path) -> None:
    root, back = shared.folder / "agents/1", tmp_path / "back"
    back.mkdir()
    for name, size in zip(NAMES, (0, 1, 4095, 4096, 4097, 1 << 20, 70_001), strict=True):
        source = tmp_path / f"src-{name}"
        source.write_bytes(os.urandom(size))
        remote = f"{root}/deep/er {name}/{name}"
        assert either("push", "vm1", source, remote) == (f"bytes\t{size}\n", "", 0)
        assert Path(remote).read_bytes() == source.read_bytes()
        assert either("pull", "vm1", remote, back) == (f"bytes\t{size}\n", "", 0)
        assert (back / name).read_bytes() == source.read_bytes()
    assert sorted(path.name for path in back.iterdir()) == sorted(NAMES)
    left = [path for path in root.rglob("*") if ".vmrm-" in path.name]
    assert left == []


def test_push_into_a_directory_over_a_file_and_onto_a_directory(
    either: Vm, shared: Cli, tmp_path: Path
) -> None:
    root = shared.folder / "agents/1"
    source = tmp_path / "tool"
    source.write_text("#!/bin/sh\necho works\n")
    source.chmod(0o755)
    assert either("push", "vm1", source, f"{root}/bin/").code == 0
    assert either("exec", "vm1", root / "bin/tool").out == "works\n"
    (root / "old").write_text("something longer than the new content, much longer indeed")
    assert either("push", "vm1", source, root / "old").code == 0
    assert (root / "old").read_text() == source.read_text()
    refused(either("push", "vm1", source, root / "bin"), "it is a directory", 1)
    refused(either("push", "vm1", source, "/etc/vmrm-test"), "outside of the agent's root", 1)
    refused(either("push", "vm1", source, "relative"), "'relative' is not absolute")
    refused(either("push", "vm1", tmp_path / "nosuch", "/x"), "there is no file")
    refused(either("push", "vm1", tmp_path, "/x"), "is a directory")
    assert [path.name for path in (root / "bin").iterdir()] == ["tool"]


def test_pull_keeps_what_is_there_if_it_fails(either: Vm, shared: Cli, tmp_path: Path) -> None:
    root, mine = shared.folder / "agents/1", tmp_path / "mine"
    (root / "data").write_bytes(b"new")
    mine.write_bytes(b"old")
    refused(either("pull", "vm1", root / "nosuch", mine), "No such file", 1)
    refused(either("pull", "vm1", root, mine), "VM 'vm1'", 1)
    refused(either("pull", "vm1", "data", mine), "not absolute")
    refused(either("pull", "vm1", root / "data", tmp_path / "no/where"), "there is no directory")
    assert mine.read_bytes() == b"old"
    assert either("pull", "vm1", root / "data", mine).code == 0
    assert mine.read_bytes() == b"new"
    assert not list(tmp_path.glob(".vmrm-*"))


def test_info_and_reboot(either: Vm) -> None:
    before = json.loads(either("info", "vm1", "--json").out)
    assert before["health"] == "ok"
    assert set(before) >= {"agent", "os", "host_name", "boot_id", "time", "addresses", "disabled"}
    boot = json.loads(either("reboot", "vm1", "--json").out)["boot"]
    assert boot != before["boot_id"]
    assert json.loads(either("info", "vm1", "--json").out)["boot_id"] == boot


@pytest.mark.parametrize(
    "words", ["exec nosuch true", "info nosuch", "reboot nosuch", "logs nosuch"]
)
def test_an_unknown_vm(loaded: Vm, words: str) -> None:
    refused(loaded(*words.split()), "no VM 'nosuch'")


# === nobody answers ==============================================================================

AT_ONCE = ["exec --timeout=0.2 vm1 true", "info vm1 --timeout=0.2", "reboot vm1 --timeout=0.2"]


@pytest.mark.parametrize("words", AT_ONCE)
def test_no_socket(vm: Vm, db: Path, words: str) -> None:
    vm("load", lab(db.parent))
    result = vm(*words.split())
    refused(result, "VM 'vm1': agent at '.*agents/1.sock' cannot be reached: No such file", 255)


def test_nobody_answers(vm: Vm, db: Path) -> None:
    vm("load", lab(db.parent))
    (db.parent / "agents").mkdir()
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind("agents/1.sock")
        silent.listen()
        result = vm("exec", "--timeout", "0.3", "vm1", "true")
    assert result.code == 255
    assert re.search("VM 'vm1': .*(not answer|no answer|within)", result.err), result.err
    assert "may have run" not in result.err


def test_another_client_holds_the_agent(loaded: Vm, db: Path) -> None:
    held = vmrm.agent_lock(
        str(db.parent / "agents/1.sock"), Path("/else/lab.db"), lambda _: None, 0
    )
    with held:
        result = loaded("exec", "--timeout", "0.3", "vm1", "true")
    refused(result, f"VM 'vm1': .*held by process {os.getpid()} of database '/else/lab.db'", 255)
    assert loaded("exec", "vm1", "true").code == 0


def handler_pid(db: Path, name: str = "vm1") -> int:
    return int(tables.vms(db)[name]["handler_pid"])


def test_a_handler_killed_while_it_serves_gives_may_have_run(live: Cli, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    words = live.command("exec", "vm1", "sh", "-c", f"echo x >> {mark}; sleep 20")
    with subprocess.Popen(words, env=live.environment, stderr=subprocess.PIPE) as client:
        until(mark.exists)
        os.kill(handler_pid(live.db), signal.SIGKILL)
        _, said = client.communicate(timeout=20)
    assert client.returncode == 255
    assert b"error: VM 'vm1': it may have run" in said
    until(lambda: live("exec", "vm1", "true").code == 0)
    assert mark.read_text() == "x\n"


def test_a_request_claimed_by_a_dying_handler_never_runs_later(
    loaded: Vm, cli: Cli, tmp_path: Path
) -> None:
    once = tmp_path / "once"
    dies = {"VMRM_CRASH": "request-claimed:1", "VMRM_CRASH_ONCE": str(once)}
    assert cli("run", "--stay", "--detach", env=dies).code == 0
    assert cli("wait", "--timeout", "20").code == 0
    result = cli("exec", "vm1", "touch", tmp_path / "mark")
    refused(result, "it may have run", 255)
    until(lambda: cli("exec", "vm1", "true").code == 0)
    assert once.exists()
    assert not (tmp_path / "mark").exists()
    assert cli("stop").code == 0
    assert list((tmp_path / "lab.db.d/requests").iterdir()) == []


def test_a_client_killed_while_it_waits_leaves_nothing_that_runs(live: Cli, tmp_path: Path) -> None:
    pid = handler_pid(live.db)

    def asked() -> int:
        return sum(row["claimed_by"] is None for row in tables.requests(live.db))

    os.kill(pid, signal.SIGSTOP)
    try:
        words = live.command("exec", "vm1", "touch", tmp_path / "mark")
        with subprocess.Popen(words, env=live.environment) as client:
            until(asked)
            client.kill()
    finally:
        os.kill(pid, signal.SIGCONT)
    assert live("exec", "vm1", "true").code == 0
    assert not (tmp_path / "mark").exists()
    assert live("check") == ("", "", 0)


def test_a_handler_that_does_not_take_the_request(live: Cli) -> None:
    pid = handler_pid(live.db)
    os.kill(pid, signal.SIGSTOP)
    try:
        result = live("exec", "--timeout", "0.5", "vm1", "true")
    finally:
        os.kill(pid, signal.SIGCONT)
    refused(result, "its handler did not take the request in 0.5 s", 255)
    assert live("check") == ("", "", 0)


# === an experiment ===============================================================================


def test_run_reports_and_continues(loaded: Vm, cli: Cli) -> None:
    first = cli("run", "lab.toml")
    assert first.code == 0, first
    assert [line.split("\t")[:4] for line in first.out.splitlines()] == [
        ["vm1", "configured", "1", "1"],
        ["vm2", "configured", "0", "0"],
    ]
    assert "2 VMs, 1 of 1 entry done" in first.err
    again = json.loads(cli("run", "--json").out)
    assert again["ok"] is True
    assert [row["done"] for row in again["vms"]] == [1, 0]
    shown = json.loads(cli("schedule", "show", "vm1", "--json").out)
    assert [(row["attempt"], row["outcome"]) for row in shown] == [(1, "done")]


def test_a_failing_experiment_exits_1_and_retry_mends_it(
    vm: Vm, cli: Cli, tmp_path: Path, children: None
) -> None:
    script = f"test -e {tmp_path}/fixed || {{ printf '\\033[31mno\\n' >&2; exit 3; }}"
    with stand_ins(tmp_path / "agents", 1):
        path = lab(tmp_path, entry(0.2, script))
        result = cli("run", path)
        assert result.code == 1
        assert re.search(r"vm1, entry 1 \(0.2 sh\): failed: ", result.err)
        document = cli("run", "--json")
        assert document.code == 1
        assert json.loads(document.out)["ok"] is False
        assert "\x1b" not in result.err + cli("logs", "vm1").out
        (tmp_path / "fixed").touch()
        refused(vm("retry", "vm1", "2"), "nothing of VM 'vm1' has failed")
        assert vm("retry", "vm1", "1").code == 0
        assert cli("run").code == 0
        assert '"outcome": "done"' in cli("schedule", "show", "vm1", "--json").out


def test_detach_then_a_second_viewer_and_stop(live: Cli) -> None:
    with subprocess.Popen(
        live.command("run"), env=live.environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    ) as viewer:
        assert viewer.stderr is not None
        assert b"running already" in viewer.stderr.readline()
        refused(live("destroy", "--yes"), "live|run")
        refused(live("run", "--late", "skip"), "running already .*: too late for --late")
        assert live("stop") == ("", "", 0)
        out, _ = viewer.communicate(timeout=20)
    assert viewer.returncode == 0
    assert out.startswith(b"vm1\tconfigured")
    refused(live("stop"), "the experiment is not running")
    assert live("destroy", "--yes").code == 0
    assert live("status").out == ""


def test_a_second_run_of_another_file_is_refused(live: Cli, tmp_path: Path) -> None:
    lab(tmp_path, "", "", "")
    refused(live("run", "lab.toml"), "holds another experiment")


def long_lab(folder: Path) -> Path:
    script = f"echo $$ > {folder}/pid; while :; do sleep 0.1; done"
    return lab(folder, entry(-1, script))


def is_alive(pid: int) -> bool:
    return vmrm.process_started(pid) is not None


@pytest.mark.parametrize("kill", [False, True], ids=["stop", "stop --kill"])
def test_stop_leaves_guest_programs_and_stop_kill_ends_them(
    cli: Cli, tmp_path: Path, children: None, kill: bool
) -> None:
    with stand_ins(tmp_path / "agents", 1):
        assert cli("run", "--detach", long_lab(tmp_path)).code == 2  # switches come last
        assert cli("run", tmp_path / "lab.toml", "--detach").code == 0
        until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip())
        pid = int((tmp_path / "pid").read_text())
        assert cli("stop", *(["--kill"] if kill else [])).code == 0
        if kill:
            until(lambda: not is_alive(pid))
        else:
            assert is_alive(pid)


def test_run_gives_up_at_its_timeout(cli: Cli, tmp_path: Path, children: None) -> None:
    with stand_ins(tmp_path / "agents", 1):
        result = cli("run", long_lab(tmp_path), "--timeout", "1", "--report", "run.html")
        assert result.code == 124
        assert "error: the experiment was stopped at its time-out" in result.err
        assert "was stopped before its work was done" in (tmp_path / "run.html").read_text()
        refused(cli("stop"), "not running")


def test_wait(loaded: Vm, cli: Cli) -> None:
    refused(loaded("wait", "--timeout", "0.1"), "VM 'vm1' is not configured after 0.1 s", 124)
    refused(loaded("wait", "nosuch"), "no VM 'nosuch'")
    assert loaded("wait", "VM1", "--state", "uninitialized") == ("", "", 0)
    with subprocess.Popen(cli.command("wait", "vm1"), env=cli.environment) as waiting:
        assert cli("run").code == 0
        assert waiting.wait(20) == 0


def test_logs_follow_until_the_end(cli: Cli, tmp_path: Path, children: None) -> None:
    script = "echo first; sleep 1; echo last"
    with stand_ins(tmp_path / "agents", 1):
        assert cli("run", lab(tmp_path, entry(0.1, script)), "--detach").code == 0
        followed = cli("logs", "vm1", "--follow")
    assert followed.code == 0
    assert followed.out.index("out] first") < followed.out.index("out] last")
    assert cli("logs", "vm1").out == followed.out


def test_a_log_that_never_was_is_empty(loaded: Vm) -> None:
    assert loaded("logs", "vm1") == ("", "", 0)


def test_entries_added_to_a_running_experiment_run(live: Cli, tmp_path: Path) -> None:
    more = tmp_path / "more.toml"
    more.write_text(
        f'[[schedule]]\nstart_time = 0.1\nexecutable = "touch"\narguments = ["{tmp_path}/mark"]'
    )
    assert live("schedule", "add", "vm1", more) == ("added\t1\n", "", 0)
    until((tmp_path / "mark").exists)
    more.write_text("[[schedule]]\nstart_time = 0\n[[schedule]]\nexecutble = 1\n")
    result = live("schedule", "add", "vm1", more)
    refused(result, "more.toml: [0-9] faults")
    more.write_text("x = 1\n")
    refused(live("schedule", "add", "vm1", more), r"has no \[\[schedule\]\] tables")
    refused(live("schedule", "add", "nosuch", more), "no VM 'nosuch'")
    assert len(live("schedule", "show", "vm1").out.splitlines()) == 2


def test_handle_runs_one_vm_in_the_foreground(loaded: Vm, cli: Cli) -> None:
    with subprocess.Popen(cli.command("handle", "vm1"), env=cli.environment) as handler:
        assert loaded("wait", "vm1", "--timeout", "20").code == 0
        refused(loaded("handle", "vm1"), "VM 'vm1' has a handler already")
        assert cli("exec", "vm1", "echo", "through it").out == "through it\n"
        handler.terminate()
        assert handler.wait(20) == 128 + signal.SIGTERM
    assert cli("run").code == 0
    done = cli("handle", "vm1")
    assert done.code == 0
    assert done.out.startswith("vm1\tconfigured\t-1\t1\t1\t")


def test_destroy_keeps_or_purges(loaded: Vm, cli: Cli, tmp_path: Path) -> None:
    assert cli("run").code == 0
    assert loaded("destroy", "--yes").code == 0
    state = tmp_path / "lab.db.d"
    assert (state / "logs.1/vm1.log").exists()
    assert loaded("load", "lab.toml").code == 0
    assert loaded("destroy", "--yes", "--purge").code == 0
    assert not (state / "logs.2").exists()
    assert (state / "logs.1").exists()


# === store, check, backup, agent =================================================================


def test_the_store(vm: Vm, db: Path) -> None:
    (db.parent / "a.txt").write_text("a")
    (db.parent / "b.bin").write_bytes(b"\0" * 1000)
    assert vm("store", "add", "a.txt", "b.bin") == ("", "", 0)
    listed = vm("store", "list").out.splitlines()
    assert [line.split("\t")[:2] for line in listed] == [["1", "a.txt"], ["1000", "b.bin"]]
    assert [row["name"] for row in json.loads(vm("store", "list", "*.bin", "--json").out)] == [
        "b.bin"
    ]
    refused(vm("store", "remove", "nosuch"), "no stored file matches 'nosuch'")
    assert vm("store", "remove", "*").out.startswith("removed\t")
    assert vm("store", "list").out == ""
    refused(vm("store", "add", "nosuch"), "'nosuch': no such file or directory")
    refused(vm("store", "add", db.parent), "is a directory")


def test_check_finds_damage_and_fixes_only_what_it_can(vm: Vm, db: Path) -> None:
    (db.parent / "a.txt").write_text("a")
    vm("store", "add", "a.txt")
    assert vm("check") == ("", "", 0)
    content = next((db.parent / "lab.db.d/store").iterdir())
    (content.parent / ("0" * 64)).write_bytes(b"nobody's")
    (content.parent / ".new-left").write_bytes(b"cut off")
    result = vm("check")
    assert result.code == 1
    assert len(result.out.splitlines()) == 2
    assert vm("check", "--fix").code == 0
    assert vm("check") == ("", "", 0)
    content.chmod(0o600)
    content.write_bytes(b"b")
    for words in (["check"], ["check", "--fix"], ["check", "--json"]):
        result = vm(*words)
        assert result.code == 1
        assert "file 'a.txt' of store" in result.out
        assert "its content is damaged" in result.out
    content.unlink()
    assert "its content is missing" in vm("check").out


def test_backup_while_in_use(live: Cli, tmp_path: Path) -> None:
    assert live("backup", "copy.db") == ("", "", 0)
    copy = tmp_path / "copy.db"
    assert copy.stat().st_mode & 0o777 == 0o600
    states = [line.split("\t")[:2] for line in live("status", "--db", copy).out.splitlines()]
    assert states == [["vm1", "configured"], ["vm2", "configured"]]
    before = rows(copy)
    refused(live("backup", "copy.db"), "'copy.db' exists already")
    refused(live("backup", tmp_path / "no/where.db"), "no such file or directory")
    assert rows(copy) == before


def test_agent_refuses_what_it_cannot_serve(vm: Vm, db: Path) -> None:
    (db.parent / "taken").write_text("")
    refused(vm("agent", "taken"), "cannot listen at 'taken': something is there already")
    refused(vm("agent", "no/where.sock"), "cannot listen at 'no/where.sock'")
    assert (db.parent / "taken").read_text() == ""


def test_the_demo_explains_itself(cli: Cli, tmp_path: Path) -> None:
    spot = tmp_path / "tmp"
    spot.mkdir()
    result = cli("demo", env={"TMPDIR": str(spot)})
    assert result.code == 0, result.err
    assert "8 of 8 entries done" in result.err
    assert "nothing is left behind" in result.err
    assert [line.split("\t")[0] for line in result.out.splitlines()[:3]] == [
        "server",
        "client1",
        "client2",
    ]
    assert list(spot.iterdir()) == []
    assert not cli.db.exists()

"""Windows guests: what our batch files say to cmd.exe, and whole experiments on a played guest.

`windows_player` plays cmd.exe by its documented rules; where wine is installed, its cmd.exe,
written by other people, runs the very same files.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import Any, BinaryIO, cast

import pytest
import tables
import windows_agent
import windows_player
from hypothesis import given
from hypothesis import strategies as st
from lab import Lab, announced

import drivers
import vmrm
from vmrm import CLAIM_FAILED, PLACE_FAILED, ScheduleEntry

# What cmd.exe, the C run time or both would take for something else.
HARD = [
    "",
    " ",
    "two words",
    "%PATH%",
    "100%",
    "%%",
    "%1",
    "%~dp0",
    "%a:b=c%",
    "^",
    "^^",
    "a^b c^d",
    "&",
    "a & del b",
    "a&&b||c",
    "|",
    "<in >out 2>&1",
    "(a)",
    "!x!",
    '"',
    '""',
    'say "hi there"',
    'a"b & c',
    '"quoted & whole"',
    "\\",
    "\\\\",
    "end\\",
    "C:\\dir with blank\\",
    '\\"',
    '\\\\"',
    'a\\\\b"c\\"d',
    "a,b;c=d",
    "/flag",
    "-x",
    "@at",
    ":label",
    "*?.txt",
    "'single'",
    "`back`",
    "\t",
    "~#{}[]$",
    "ä€😀",
    "2",
    "x" * 3000,
]


SHOW = """import json, os, sys; shown = json.dumps([sys.argv[1:], dict(os.environ)])
open('shown.new', 'w').write(shown); os.rename('shown.new', 'shown')""".replace("\n", "; ")
TOKEN = "u-1.1.1"  # noqa: S105 (a word, no secret)


# === a guest without an agent ====================================================================


class PlayedGuest(vmrm.WindowsGuest):
    """A guest with nothing else to do while a program of ours runs."""

    def finish(self, argv: Sequence[str], more: float = 0.0, lines: str = "") -> vmrm.Steps:
        yield 0
        return self.driver.run(argv)


class Player:
    """cmd.exe on a folder that holds the drive X: the player's, or wine's."""

    is_windows = True

    def __init__(self, root: Path, wine: Path | None) -> None:
        self.root, self.wine = root, wine
        (root / "X").mkdir()
        self.environment = {**os.environ, "WINEDEBUG": "-all", "DISPLAY": ""}
        if wine:
            self.environment["WINEPREFIX"] = str(wine)
            drive = wine / "dosdevices" / "x:"
            drive.unlink(missing_ok=True)
            drive.symlink_to(root / "X")
        self.guest = PlayedGuest(cast(Any, self), "X:\\a launch")

    def place(self, path: str) -> Path:
        """Return the host's path of a guest's."""
        return self.root.joinpath("X", *PureWindowsPath(path).parts[1:])

    # --- what of a driver a WindowsGuest uses

    def run(self, argv: Sequence[str], timeout: float = 0) -> drivers.ExecStatus:
        command = ["wine", *argv]
        if not self.wine or argv[0] == "powershell.exe":
            command = windows_agent.played(self.root, "boot", argv)
        done = subprocess.run(command, capture_output=True, cwd=self.root, env=self.environment)
        return drivers.ExecStatus(True, done.returncode, None, done.stdout, done.stderr)

    def push(self, source: BinaryIO, path: str) -> Generator[int, None, None]:
        yield self.place(path).write_bytes(source.read())

    def delete_file(self, path: str) -> None:
        self.place(path).unlink()

    # --- what a handler does

    def install(self, entry: ScheduleEntry, number: int = 1) -> None:
        """Bring an entry's files and scripts into the guest by our own batch files."""
        place = PureWindowsPath(f"X:\\a launch\\-5\\prog{number}")
        entry.working_dir, entry.ordinal = place, number
        entry.call_arguments_filename = place / "call_arguments.bat"
        entry.reboot_filepath = place / "reboot"
        contents = [
            vmrm.text_content(self.guest.content(item["location"], item["content"]))
            for item in entry.items("content")
        ]
        placed = [(content.sha256, "644") for content in contents]
        self.stage(self.guest.scripts(entry, "a % & title", TOKEN, placed), contents)

    def stage(
        self,
        scripts: Sequence[vmrm.Script] = (),
        contents: Sequence[vmrm.Staged] = (),
        owner: tuple[str, str] = ("7.5", "vm 1"),
        aside: Sequence[str] = (),
    ) -> None:
        steps = self.guest.stage_steps(owner, aside, scripts, contents, lambda *_: None)
        vmrm.run_steps(steps, time.sleep)

    def start(self, entry: ScheduleEntry, attempt: int = 1, token: str = TOKEN) -> int | None:
        """Run an attempt to its end; return its exit code."""
        script = str(entry.call_arguments_filename)
        return self.run(self.guest.command(script, f"attempt.{attempt}", token)).exitcode

    def left(self, name: str, attempt: int = 1, number: int = 1) -> str:
        """Return a file that an attempt left."""
        folder = self.place(f"X:\\a launch\\-5\\prog{number}\\attempt.{attempt}")
        return (folder / name).read_text()


@pytest.fixture(scope="session")
def wine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield a fresh Windows of wine's."""
    if not shutil.which("wine"):
        pytest.skip("wine is not installed")
    prefix = tmp_path_factory.mktemp("wine")
    quiet = {"WINEPREFIX": str(prefix), "WINEDEBUG": "-all", "DISPLAY": ""}
    environment = {**os.environ, **quiet, "WINEDLLOVERRIDES": "mscoree=;mshtml="}
    # A server of our own, or each call starts one; neither it nor what it starts holds our pipes.
    null = subprocess.DEVNULL
    for command in (["wineserver", "-p"], ["wine", "wineboot", "-i"]):
        subprocess.run(command, env=environment, stdin=null, stdout=null, stderr=null, check=True)
    yield prefix
    subprocess.run(["wineserver", "-k"], env=environment)


@pytest.fixture(params=["player", "wine"])
def player(request: pytest.FixtureRequest, tmp_path: Path) -> Player:
    """The same test with both."""
    return Player(tmp_path, request.getfixturevalue("wine") if request.param == "wine" else None)


def batch(text: str, *arguments: str, **options: Any) -> ScheduleEntry:
    """Return an entry that runs a batch file of its own."""
    entry = ScheduleEntry(-5)
    entry.add_content("own.bat", text)
    entry.set_executable("own.bat", list(arguments))
    entry.options = options
    return entry


# === arguments ===================================================================================


def shown(player: Player, entry: ScheduleEntry) -> list[Any]:
    """Run an entry whose program is a Python that shows its words and environment."""
    player.install(entry)
    real = Path(os.path.realpath(getattr(sys, "_base_executable", sys.executable)))
    player.place("X:\\show.exe").symlink_to(real)
    player.start(entry)
    path, deadline = player.place("X:\\a launch\\-5\\prog1\\shown"), time.monotonic() + 60
    while not path.exists():  # wine does not wait for a program of the host's
        assert time.monotonic() < deadline, player.left("err")
        time.sleep(0.02)
    return cast(list[Any], json.loads(path.read_text()))


def test_a_batch_file_gets_words_in_quotes(player: Player) -> None:
    entry = batch("@echo off\necho %~1+%~2+%~3+%4\n", "a,b;c=d", "", "e (f)", "g")
    player.install(entry)
    assert player.start(entry) == 0
    assert player.left("out") == "a,b;c=d++e (f)+g\n"


def test_a_list_of_arguments_and_the_environment_arrive_exactly(player: Player) -> None:
    entry = ScheduleEntry(-5)
    # Wine's chcp needs a console.
    hard = [word for word in HARD if word.isascii() or not player.wine]
    entry.set_executable("X:\\show.exe", ["-c", SHOW, *hard])
    values = {f"V{n}": word for n, word in enumerate(hard) if word and len(word) < 100}
    entry.options = {"env": values}
    words, environment = shown(player, entry)
    assert words == hard
    assert {name: environment.get(name) for name in values} == values


WORDS = st.text(st.sampled_from("ab \\\"%^&|<>()!,;=*?\t'/ä") | st.characters(codec="utf-8"))


@given(st.lists(WORDS, max_size=5), WORDS)
def test_any_list_of_arguments_is_taken_apart_as_it_was(words: list[str], value: str) -> None:
    """By the rules of cmd.exe and CommandLineToArgvW, or is refused as a whole."""
    cmd = windows_player.Cmd(windows_player.Windows(Path("/nowhere")))
    carried = all(ord(char) >= 32 or char == "\t" for word in words for char in word)
    try:
        line = vmrm.batch_command("prog.exe", words)
    except ValueError:
        assert not carried
        return
    assert carried
    ((text, redirects),) = cmd._commands(cmd._expanded(line, ["x.bat"]))
    assert (text.partition('"prog.exe"')[0], redirects) == ("", [])
    assert windows_player.words_of_windows(text.removeprefix('"prog.exe"')) == words
    if "\n" not in value and "\r" not in value:
        line = cmd._expanded(f"set A={vmrm.batch_text(value)}", ["x.bat"])
        assert list(cmd._commands(line)) == [(f"set A={value}", [])]


def test_a_string_is_a_line_of_the_batch_file(player: Player) -> None:
    entry = batch("@echo off\necho [%~1] [%2]\nexit /b 7\n")
    entry.options = {"env": {"WORD": "x y"}}
    entry.arguments = '"a b" %WORD%'
    player.install(entry)
    assert player.start(entry) == 7
    assert player.left("out").split() == ["[a", "b]", "[x]"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"arguments": ["a\nb"]}, "line break"),
        ({"arguments": ["\x1a"]}, "control character"),
        ({"arguments": ["%" * 5000]}, "takes no line of 100"),
        ({"executable": 'a"b'}, "no path of Windows"),
        ({"executable": "a\nb"}, "line break"),
        ({"env": {"A": "x\r"}}, "control character in A"),
        ({"cwd": "a|b"}, "no path of Windows"),
        ({"user": "me"}, "POSIX"),
        ({"content": [{"location": "D:x", "content": ""}]}, "drive but no root"),
        ({"content": [{"location": "a?", "content": ""}]}, "no path of Windows"),
    ],
)
def test_what_cmd_cannot_carry_is_refused(change: dict[str, Any], told: str) -> None:
    entry = ScheduleEntry.from_dict({"start_time": 1, "executable": "a", **change}, 1)
    entry.working_dir = PureWindowsPath("C:\\launch\\1\\a")
    guest = vmrm.WindowsGuest(cast(Any, None))
    with pytest.raises(ValueError, match=told) as caught:
        guest.scripts(entry, "", "", [("0" * 64, "644")] * len(vmrm.entry_files(entry)))
    assert "\n" not in str(caught.value)


# === our batch files =============================================================================


def test_an_attempt_runs_once_and_leaves_output_and_exit_code(player: Player) -> None:
    entry = batch("@echo off\necho hello\necho oops>&2\nexit /b 3\n")
    player.install(entry)
    assert player.start(entry, token="another") == CLAIM_FAILED  # noqa: S106
    assert player.start(entry) == 3
    assert player.start(entry) == CLAIM_FAILED
    assert player.start(entry, 2) == 3
    assert (player.left("out"), player.left("err")) == ("hello\n", "oops\n")
    assert vmrm.parse_exit(player.left("exit", 2)) == (3, False)


def test_a_program_that_ends_cmd_itself_or_asks_for_a_reboot_is_recorded(player: Player) -> None:
    entry = batch("@echo off\necho x>reboot\nexit 10\n")
    player.install(entry)
    assert player.start(entry) == 10
    assert vmrm.parse_exit(player.left("exit")) == (10, True)


def test_files_are_placed_when_the_entry_starts(player: Player) -> None:
    entry = ScheduleEntry(-5)
    entry.add_content("sub dir\\100%.txt", "no\nCR\n")
    entry.add_content("X:\\top.BAT", "@rem one\n@rem two\r\n")
    entry.add_content("X:\\empty", "")
    player.install(entry)
    assert not player.place("X:\\top.BAT").exists()
    player.place("X:\\empty").write_text("old")
    assert player.start(entry) == 0
    folder = player.place("X:\\a launch\\-5\\prog1")
    assert (folder / "sub dir" / "100%.txt").read_bytes() == b"no\nCR\n"
    assert player.place("X:\\top.BAT").read_bytes() == b"@rem one\r\n@rem two\r\n"
    assert player.place("X:\\empty").read_bytes() == b""


def test_a_directory_in_a_files_place_and_a_missing_one_are_failures(player: Player) -> None:
    entry = batch("@echo off\necho ran\n")
    entry.add_content("X:\\folder", "text")
    player.place("X:\\folder").mkdir()
    player.install(entry)
    assert player.start(entry) == PLACE_FAILED
    assert "is a directory" in player.left("err")
    lost = batch("@echo off\necho ran\n", cwd="X:\\no such")
    player.install(lost, 2)
    assert player.start(lost) == PLACE_FAILED
    assert (player.left("out"), player.left("out", number=2)) == ("", "")


def test_a_content_that_arrived_damaged_is_refused(player: Player) -> None:
    content = vmrm.text_content("12345")
    with pytest.raises(vmrm.VMFailed, match="damaged"):
        player.stage([], [content._replace(size=6)])
    player.stage([], [content])
    path = player.place(player.guest.join(player.guest.stage, content.sha256))
    assert path.read_text() == "12345"


def test_a_stage_has_one_owner_and_moves_older_folders_aside(player: Player) -> None:
    player.place("X:\\a launch\\-5\\prog").mkdir(parents=True)
    player.stage()
    player.stage(aside=["-5", "10"])
    (moved,) = player.place("X:\\a launch\\.previous").glob("*/*")
    assert moved.name == "-5"
    with pytest.raises(vmrm.VMFailed, match="used by another VM"):
        player.stage(owner=("7.5", "vm 2"))
    player.stage(owner=("8", "vm 2"))


def test_a_launch_directory_that_needs_quotes_of_another_kind_is_refused() -> None:
    for launch in ("C:\\a&b", "launch", "C:", "C:x", "\\\\host\\share", "C:\\%x%"):
        with pytest.raises(vmrm.VMFailed, match="launch_dir"):
            guest = vmrm.WindowsGuest(cast(Any, None), launch)
            next(guest.stage_steps(("1", ""), [], [], [], lambda *_: None))


# === experiments on a played Windows =============================================================


@contextmanager
def windows(lab: Lab, *schedule: dict[str, Any]) -> Iterator[Path]:
    """Play a Windows guest whose VM has that schedule; yield its drive C."""
    vms = [{"name": "w", "path": "agents/1.sock", "agent_timeout": 20, "schedule": schedule}]
    path = lab.folder / "lab.json"
    path.write_text(json.dumps({"experiment": {"start_buffer": 0}, "vm": vms}))
    (lab.folder / "agents").mkdir()
    command = [sys.executable, str(Path(windows_agent.__file__)), str(lab.folder / "agents")]
    with announced(*command):
        done = lab.run("load", str(path))
        assert done.returncode == 0, done.stderr
        yield lab.guest(1) / "C"


def outcomes(lab: Lab) -> list[tuple[int, str, int | None]]:
    attempts = sorted(tables.attempts(lab.db), key=lambda row: (row["ordinal"], row["attempt"]))
    return [(row["ordinal"], row["outcome"], row["exit_code"]) for row in attempts]


def test_an_experiment_on_windows(tmp_path: Path) -> None:
    reboot_once = "if exist ..\\..\\asked exit /b 0\necho x>..\\..\\asked\nexit /b 10\n"
    # The log is held open while it is fetched.
    log = "import time; f = open('log', 'w'); f.write('x' * 70000); f.flush(); time.sleep(1.2)"
    log += "; f.write('end')"
    lab = Lab(tmp_path)
    schedule: list[dict[str, Any]] = [
        {
            "start_time": -5,
            "executable": "setup.bat",
            "content": [{"location": "setup.bat", "content": f"@echo off\n{reboot_once}"}],
        },
        {"start_time": -4, "executable": "true", "user": "me", "ignore_failure": True},
        {"start_time": 0.1, "executable": "python3", "arguments": ["-c", log]},
        {
            "start_time": 0.2,
            "transfer": [{"location": "C:\\launch\\0.1\\python3\\l*", "interval": 0.3}],
        },
        {"start_time": 0.3, "executable": "sleep.exe", "arguments": ["60"], "timeout": 0.3},
    ]
    with windows(lab, *schedule) as drive:
        assert lab.run("run").returncode == 1
        assert outcomes(lab) == [
            *((1, "done", 10), (1, "done", 0), (2, "failed", None), (3, "done", 0)),
            *((4, "done", None), (5, "failed", None)),
        ]
        errors = [
            row["error"] for row in sorted(tables.attempts(lab.db), key=lambda r: r["ordinal"])
        ]
        assert "user is for POSIX guests" in errors[2]
        assert "timed out" in errors[5]
        copy = lab.folder / "lab.db.d/transfers.1/w/C/launch/0.1/python3/log"
        assert copy.read_text() == "x" * 70000 + "end"
        assert lab.run("push", "w", str(tmp_path / "lab.json"), "C:\\new dir\\lab").returncode == 0
        assert (drive / "new dir" / "lab").read_text() == (tmp_path / "lab.json").read_text()
        assert lab.run("pull", "w", "C:\\new dir\\lab", str(tmp_path)).returncode == 0
        assert (tmp_path / "lab").exists()
        assert lab.run("exec", "w", "nosuch.exe").returncode == 127
        done = lab.run("exec", "w", "cmd.exe", "/c", "exit /b 5")
        assert done.returncode == 5
        facts = json.loads(lab.run("info", "w", "--json").stdout)
        assert (facts["health"], facts["os"]) == ("ok", "Windows, played")


@pytest.mark.parametrize("crash", ["exec-answered", "running-recorded"])
def test_a_program_is_found_again_after_its_handler_died(tmp_path: Path, crash: str) -> None:
    lab = Lab(tmp_path)
    note = "open('../../record', 'a').write('x'); import time; time.sleep(1)"
    with windows(
        lab, {"start_time": -1, "executable": "python3", "arguments": ["-c", note]}
    ) as drive:
        once = {"VMRM_CRASH": crash, "VMRM_CRASH_ONCE": str(tmp_path / "crashed")}
        assert lab.run("run", **once).returncode == 0, lab.logs()
        assert (tmp_path / "crashed").exists()
        assert outcomes(lab) == [(1, "done", 0)]
        assert (drive / "launch" / "record").read_text() == "x"


def test_a_windows_that_cannot_run_programs_yet_is_asked_again(tmp_path: Path) -> None:
    answers, waits = iter(["", "", "77"]), list[float]()

    class Booting(drivers.QemuGuestAgentDriver):
        def connect(self, timeout: float | None = None, retry: bool = True) -> int:
            self.is_windows = True
            return 1

        def boot_id(self) -> str:
            return next(answers)

    with vmrm.Database(tmp_path / "lab.db") as db:
        vmrm.VMMapping(db=db).put("u", "w", path=str(tmp_path / "none.sock"))

        def wait(fd: int, events: int, seconds: float) -> bool:
            waits.append(seconds)
            return False

        vm = vmrm.HandledVM(vmrm.handler_config(db, "w"), wait)
        vm.driver = Booting(vm.config, vm.log)
        vm.connect()
        assert (vm.guest.boot, len(waits)) == ("77", 2)


SHOW_BATCH = "@echo off\n>shown.txt echo [%~1][%~2]\n"


def test_arguments_reach_a_batch_file_exactly_or_are_refused(tmp_path: Path) -> None:
    lab, entry = Lab(tmp_path), {"executable": "show.bat", "ignore_failure": True}
    entry["content"] = [{"location": "show.bat", "content": SHOW_BATCH}]
    words = [["a b", "c:\\dir with blank\\"], ["x", 'say "hi"'], ["plain", "100%"]]
    schedule = [{"start_time": -5 + n, "arguments": w, **entry} for n, w in enumerate(words)]
    with windows(lab, *schedule) as drive:
        lab.run("run")
        shown = {p.parent.parent.name: p.read_text() for p in drive.rglob("shown.txt")}
        assert {at: text.strip() for at, text in shown.items()} == {
            "-5": "[a b][c:\\dir with blank\\]",
            "-3": "[plain][100%]",
        }
        assert [outcome for _, outcome, _ in outcomes(lab)] == ["done", "failed", "done"]
        assert 'cannot be given an argument with "' in str(tables.attempts(lab.db))
        done = lab.run("exec", "w", "C:\\show.bat", 'a" & del b')
        assert (done.returncode, "cannot be given" in done.stderr) == (2, True), done.stderr


@pytest.mark.parametrize("suffix", ["", ".3"])
def test_a_quote_goes_to_a_program_and_to_no_batch_file_of_its_name(suffix: str) -> None:
    assert vmrm.batch_command(f"tool{suffix}", ['a"b']).startswith(f'"tool{suffix}.exe" ')
    assert vmrm.batch_command(f"tool{suffix}", ["a b"]).startswith(f'"tool{suffix}" ')
    with pytest.raises(ValueError, match="cannot be given"):
        vmrm.batch_command("tool.CMD", ['a"b'])

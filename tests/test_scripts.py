"""The scripts that run in the guest, run here: under dash, and where everything is busybox."""

from __future__ import annotations

import contextlib
import functools
import grp
import io
import json
import os
import pwd
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest
from conftest import unavailable
from hypothesis import given
from hypothesis import strategies as st

import drivers
import vmrm
from vmrm import CLAIM_FAILED, PLACE_FAILED, ScheduleEntry

TOKEN = "u-1.1.1"  # noqa: S105 (a word, no secret)
SHOW = "import json, os, sys; print(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]))"
MISSING = 127


def busybox_world() -> list[str]:
    """Return a command that makes busybox the /bin/sh of what it runs, and of nothing else.

    It is bound over the shell in a mount namespace that ends with the process.
    """
    mount, busybox = shutil.which("mount"), shutil.which("busybox")
    bind = f'{mount} --bind {busybox} {Path("/bin/sh").resolve()} && exec "$@"'
    return [str(shutil.which("unshare")), "-m", "/bin/sh", "-c", bind, "sh"]


@functools.cache
def can_mount() -> bool:
    """Return whether this user may mount in a namespace of its own."""
    probe = ["unshare", "-m", "mount", "-t", "tmpfs", "none", tempfile.gettempdir()]
    return bool(shutil.which("unshare")) and not subprocess.run(probe, check=False).returncode


def need_mounts() -> None:
    if not can_mount():
        pytest.skip("no mount namespaces here")


class LocalGuest(vmrm.Guest):
    """vmrm's idea of a `Guest`, whose programs run here and now."""

    def __init__(self, world: Guest, launch: Path | None = None) -> None:
        super().__init__(cast(Any, self), str(launch or world.launch))
        self.world = world

    def finish(self, argv: Sequence[str], more: float = 0.0, lines: str = "") -> vmrm.Steps:
        yield 0
        done = subprocess.run(
            [*self.world.shell, *argv],
            input=lines.encode(),
            capture_output=True,
            env=self.world.environment,
            check=False,
        )
        return drivers.ExecStatus(True, done.returncode, None, done.stdout, done.stderr)

    def push(self, source: BinaryIO, path: str) -> Iterator[int]:
        yield Path(path).write_bytes(source.read())


@dataclass
class Guest:
    """A directory that plays the guest's disk, and the shell that runs what is laid out in it."""

    launch: Path
    shell: list[str]
    path: str

    def install(self, entry: ScheduleEntry, *, title: str = "a test") -> None:
        """Lay out an entry's contents and scripts as a handler does, by the layout script."""
        place = self.launch / "-5" / "prog"
        entry.working_dir = place / "work" if entry.options.get("user") else place
        entry.call_arguments_filename = place / "call_arguments.sh"
        entry.reboot_filepath = entry.working_dir / "reboot"
        contents = [vmrm.text_content(item["content"]) for item in entry.items("content")]
        modes = ["755" if item["executable"] else "644" for item in entry.items("content")]
        placed = [(c.sha256, mode) for c, mode in zip(contents, modes, strict=True)]
        self.stage(self.guest.scripts(entry, title, TOKEN, placed), contents)

    @property
    def guest(self) -> vmrm.Guest:
        return LocalGuest(self)

    def stage(
        self,
        scripts: Sequence[vmrm.Script] = (),
        contents: Sequence[vmrm.Staged] = (),
        owner: tuple[str, str] = ("1-1.0", "uuid1"),
        aside: Sequence[str] = (),
        launch: Path | None = None,
    ) -> None:
        """Stage what entries need, as a handler does."""
        steps = LocalGuest(self, launch).stage_steps(
            owner, aside, scripts, contents, lambda *_: None
        )
        vmrm.run_steps(steps, time.sleep)

    def ask(self, verb: str, *words: str) -> subprocess.CompletedProcess[bytes]:
        """Ask what a verb asks for, as a handler does."""
        return self.sh(self.guest.argv(verb)[2], *words)

    def sh(self, script: str, *words: str) -> subprocess.CompletedProcess[bytes]:
        """Run a script with arguments, as the agent does for a handler."""
        argv = [*self.shell, "/bin/sh", "-c", script, "sh", *words]
        return subprocess.run(argv, capture_output=True, env=self.environment, check=False)

    def start(
        self, entry: ScheduleEntry, attempt: int = 1, token: str = TOKEN, session: bool = True
    ) -> subprocess.Popen[bytes]:
        """Start an attempt; as the leader of a session, as agents do, or not."""
        script = str(entry.call_arguments_filename)
        return subprocess.Popen(
            [*self.shell, "/bin/sh", script, f"attempt.{attempt}", token],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=self.environment,
            cwd="/",
            start_new_session=session,
        )

    def run(self, entry: ScheduleEntry, attempt: int = 1, token: str = TOKEN) -> tuple[int, str]:
        """Run an attempt to its end; return its exit code and what it told the agent."""
        with self.start(entry, attempt, token) as process:
            assert process.stderr is not None
            told = process.stderr.read().decode()
        return process.returncode, told

    def left(self, name: str, attempt: int = 1) -> str:
        """Return a file that an attempt left."""
        return (self.launch / "-5" / "prog" / f"attempt.{attempt}" / name).read_text()

    def found(self, *attempts: int) -> list[vmrm.Found]:
        """Return what the probe says of attempts."""
        done = self.ask("probe", *(f"{self.launch}/-5/prog/attempt.{n}" for n in attempts))
        return [vmrm.parse_found(line) for line in done.stdout.decode().splitlines()]

    @property
    def environment(self) -> dict[str, str]:
        return {"PATH": self.path, "LANG": "C.UTF-8"}


@pytest.fixture
def launch() -> Iterator[Path]:
    """Yield a launch directory that every user may enter, with a name that needs quotes.

    A program that still works in it afterwards was left behind: it is killed, and the test fails.
    """
    with tempfile.TemporaryDirectory(prefix="vmrm test's ") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)
        deadline = time.monotonic() + 2  # what was killed a moment ago may still be dying
        while (left := working_in(folder)) and time.monotonic() < deadline:
            vmrm.time_to_wait(0.02)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert not left


def working_in(folder: str) -> list[int]:
    """Return the processes whose directory lies in a folder; zombies have none."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            if str(link.readlink()).startswith(folder):
                found.append(int(link.parent.name))
    return found


@pytest.fixture(params=["dash", "busybox"])
def guest(request: pytest.FixtureRequest, launch: Path, tmp_path: Path) -> Guest:
    if request.param == "dash":
        if Path("/bin/sh").resolve().name != "dash":
            unavailable("/bin/sh is not dash")
        return Guest(launch, [], os.environ["PATH"])
    if not shutil.which("busybox"):
        unavailable("busybox is not installed")
    need_mounts()
    applets = tmp_path / "applets"
    applets.mkdir()
    subprocess.run(["busybox", "--install", "-s", str(applets)], check=True)
    return Guest(launch, busybox_world(), f"{applets}:{os.environ['PATH']}")


def program(*words: str, **options: object) -> ScheduleEntry:
    """Return an entry that runs a command line word by word."""
    entry = ScheduleEntry(-5)
    entry.set_executable(words[0], list(words[1:]))
    entry.options = dict(options)
    return entry


def shell_program(commands: str, **options: object) -> ScheduleEntry:
    return program("sh", "-c", commands, **options)


def test_the_shell_of_these_tests_is_the_one_they_name(guest: Guest) -> None:
    inode = int(guest.sh("stat -Lc %i /proc/$$/exe").stdout)
    name = "busybox" if guest.shell else "dash"
    assert inode == Path(str(shutil.which(name))).stat().st_ino


# === Arguments ===================================================================================

NASTY = [
    "",
    " ",
    "two words",
    "$HOME",
    "$(id)",
    "`id`",
    "'",
    '"',
    'it\'s "both"',
    ";",
    "; rm -rf x",
    "*",
    "?",
    "[a-z]",
    "~",
    "#",
    "&",
    "|",
    "<>",
    "!",
    "-n",
    "--",
    "\\",
    "\\n",
    "a\nb",
    "\n",
    "trailing\n",
    "\ttab",
    "{braces}",
    "%s",
    "ä€😀",
    "\x01\x7f",
    "-" * 5000,
]


def test_a_list_of_arguments_arrives_exactly(guest: Guest) -> None:
    entry = program(sys.executable, "-c", SHOW, *NASTY)
    guest.install(entry)
    assert guest.run(entry) == (0, "")
    assert json.loads(guest.left("out"))[0] == NASTY


def test_a_string_is_taken_apart_by_the_guests_shell(guest: Guest) -> None:
    entry = ScheduleEntry(-5)
    entry.set_executable("printf", '\'[%s]\' "a  b" $WORD x* ; echo "it\'s"; exit 7')
    entry.options = {"env": {"WORD": "x y"}}
    entry.add_content("x1", "")
    entry.add_content("x2", "")
    guest.install(entry)
    assert guest.run(entry) == (7, "")
    assert guest.left("out") == "[a  b][x][y][x1][x2]it's\n"


def test_the_environment_is_what_the_entry_says(guest: Guest) -> None:
    values = {f"V{number}": value for number, value in enumerate(NASTY)}
    entry = program(sys.executable, "-c", SHOW, env=values)
    guest.install(entry)
    assert guest.run(entry)[0] == 0
    environment = json.loads(guest.left("out"))[2]
    assert {key: environment.get(key) for key in values} == values


@pytest.mark.parametrize("cwd", ["/", "sub dir/x", "it's"])
def test_the_directory_is_what_the_entry_says(guest: Guest, cwd: str) -> None:
    entry = program(sys.executable, "-c", SHOW, cwd=cwd)
    entry.add_content(f"{cwd}/marker" if cwd != "/" else "marker", "")
    guest.install(entry)
    assert guest.run(entry)[0] == 0
    assert json.loads(guest.left("out"))[1] == str(Path(str(entry.working_dir)) / cwd)


def test_without_a_directory_a_program_runs_in_the_entrys_own(guest: Guest) -> None:
    entry = program(sys.executable, "-c", SHOW)
    guest.install(entry)
    guest.run(entry)
    assert json.loads(guest.left("out"))[1] == str(entry.working_dir)


def test_a_missing_directory_is_a_failure_to_place(guest: Guest) -> None:
    entry = program("true", cwd="/no/such")
    guest.install(entry)
    assert guest.run(entry)[0] == PLACE_FAILED
    assert guest.left("exit") == f"{PLACE_FAILED} 0\n"
    assert "/no/such" in guest.left("err")


def test_a_program_runs_as_the_user_of_the_entry(guest: Guest) -> None:
    if os.getuid():
        unavailable("only root can become somebody else")
    show = "import getpass, os, sys; print(os.getuid(), os.getcwd(), *sys.argv[1:], sep='|')"
    python = "/usr/bin/python3" if Path("/usr/bin/python3").exists() else None
    if python is None or guest.shell:
        # The applets of busybox have no su, and no Python of this user's is anybody's.
        entry = shell_program('echo "$(id -u)|$(pwd)|$1|$2"', user="nobody")
        entry.append_arguments(["sh", "it's", "$HOME"])
    else:
        entry = program(python, "-c", show, "it's", "$HOME", user="nobody")
    guest.install(entry)
    assert guest.run(entry) == (0, "")
    uid = pwd.getpwnam("nobody").pw_uid
    assert guest.left("out") == f"{uid}|{entry.working_dir}|it's|$HOME\n"
    assert Path(str(entry.working_dir)).stat().st_uid == uid
    assert Path(str(entry.call_arguments_filename)).stat().st_uid == 0


def test_a_user_who_does_not_exist_is_told_when_laying_out(guest: Guest) -> None:
    with pytest.raises(vmrm.VMFailed, match="nosuchuser"):
        guest.install(program("true", user="nosuchuser"))


# === How it ends =================================================================================


@pytest.mark.parametrize("code", [0, 1, 3, 10, 255])
def test_the_exit_code_is_left_in_a_file_and_given_to_the_agent(guest: Guest, code: int) -> None:
    entry = shell_program(f"echo out; echo err >&2; exit {code}")
    guest.install(entry)
    assert guest.run(entry) == (code, "")
    assert guest.left("exit") == f"{code} 0\n"
    assert (guest.left("out"), guest.left("err")) == ("out\n", "err\n")
    assert vmrm.parse_exit(guest.left("exit")) == (code, False)


def test_a_file_named_reboot_asks_for_one(guest: Guest) -> None:
    entry = shell_program("touch reboot")
    guest.install(entry)
    assert guest.run(entry)[0] == 0
    assert vmrm.parse_exit(guest.left("exit")) == (0, True)


def test_a_program_that_dies_by_a_signal_ends_with_more_than_128(guest: Guest) -> None:
    entry = shell_program("kill -9 $$")
    guest.install(entry)
    assert guest.run(entry)[0] == 128 + signal.SIGKILL
    assert guest.left("exit") == "137 0\n"


def test_a_missing_program_ends_with_127_and_says_so(guest: Guest) -> None:
    entry = program("no-such-program", "x")
    guest.install(entry)
    assert guest.run(entry)[0] == MISSING
    assert guest.left("exit") == f"{MISSING} 0\n"
    assert "no-such-program" in guest.left("err")


def test_an_entry_without_a_program_only_places_its_files(guest: Guest) -> None:
    entry = ScheduleEntry(-5)
    entry.add_content("a.txt", "text")
    guest.install(entry)
    assert guest.run(entry) == (0, "")
    assert guest.left("exit") == "0 0\n"
    assert (Path(str(entry.working_dir)) / "a.txt").read_text() == "text"


# === The claim ===================================================================================


def test_an_attempt_runs_once_however_often_it_is_started(guest: Guest) -> None:
    entry = shell_program("echo ran >> ../count; echo first; exit 3")
    guest.install(entry)
    assert guest.run(entry)[0] == 3
    for _ in range(2):
        code, told = guest.run(entry)
        assert code == CLAIM_FAILED
        assert "attempt.1" in told
    count = Path(str(entry.working_dir)).parent / "count"
    assert count.read_text() == "ran\n"
    assert (guest.left("out"), guest.left("exit")) == ("first\n", "3 0\n")
    assert guest.run(entry, attempt=2)[0] == 3
    assert count.read_text() == "ran\nran\n"


def test_of_many_started_at_once_one_runs(guest: Guest) -> None:
    entry = shell_program("echo ran >> ../count")
    guest.install(entry)
    started = [guest.start(entry) for _ in range(8)]
    codes = []
    for process in started:
        process.communicate()
        codes.append(process.returncode)
    assert sorted(codes) == [0] + [CLAIM_FAILED] * 7
    assert (Path(str(entry.working_dir)).parent / "count").read_text() == "ran\n"


def test_a_foreign_token_is_refused_before_anything_is_touched(guest: Guest) -> None:
    entry = program("touch", "../ran")
    guest.install(entry)
    code, told = guest.run(entry, token="u-2.1.1")  # noqa: S106
    assert code == CLAIM_FAILED
    assert "another VM or experiment" in told
    assert sorted(p.name for p in Path(str(entry.working_dir)).iterdir()) == ["call_arguments.sh"]


def test_no_title_can_leave_its_comment(guest: Guest) -> None:
    entry = program("true")
    guest.install(entry, title="x\ntouch pwned\n\x00\u2028$(touch pwned)")
    assert guest.run(entry) == (0, "")
    assert not [path for path in guest.launch.rglob("*") if path.name == "pwned"]


# === Files in their places =======================================================================


def test_files_are_placed_with_their_modes_wherever_they_belong(guest: Guest) -> None:
    entry = program("run me.sh", "x y")
    entry.add_content("run me.sh", '#!/bin/sh\necho "ran $1"\n', executable=True)
    entry.add_content(f"{guest.launch}/etc/new dir/it's", "Ä\n")
    entry.add_content("*", "star")
    guest.install(entry)
    assert guest.run(entry) == (0, "")
    assert guest.left("out") == "ran x y\n"
    modes = {
        Path(str(entry.working_dir)) / "run me.sh": 0o755,
        guest.launch / "etc" / "new dir" / "it's": 0o644,
        Path(str(entry.working_dir)) / "*": 0o644,
    }
    assert {path: stat.S_IMODE(path.stat().st_mode) for path in modes} == modes
    assert (guest.launch / "etc" / "new dir" / "it's").read_text() == "Ä\n"
    assert not list(guest.launch.rglob(".vmrm-*"))


def test_placing_replaces_a_link_and_not_what_it_points_to(guest: Guest) -> None:
    target = guest.launch / "target"
    target.write_text("precious")
    (guest.launch / "link").symlink_to(target)
    entry = ScheduleEntry(-5)
    entry.add_content(f"{guest.launch}/link", "new")
    guest.install(entry)
    assert guest.run(entry)[0] == 0
    assert target.read_text() == "precious"
    assert (guest.launch / "link").read_text() == "new"
    assert not (guest.launch / "link").is_symlink()


def test_placing_over_a_directory_fails_and_nothing_runs(guest: Guest) -> None:
    (guest.launch / "taken").mkdir()
    entry = shell_program("touch ran")
    entry.add_content(f"{guest.launch}/taken", "x")
    entry.add_content("later", "x")
    guest.install(entry)
    assert guest.run(entry)[0] == PLACE_FAILED
    assert guest.left("exit") == f"{PLACE_FAILED} 0\n"
    assert guest.left("err") == f"{guest.launch}/taken is a directory\n"
    assert list((guest.launch / "taken").iterdir()) == []
    assert not (Path(str(entry.working_dir)) / "ran").exists()
    assert not (Path(str(entry.working_dir)) / "later").exists()


def test_a_second_attempt_places_the_files_again(guest: Guest) -> None:
    entry = shell_program("cat a; echo changed > a")
    entry.add_content("a", "fresh\n")
    guest.install(entry)
    assert guest.run(entry, 1)[0] == 0
    assert guest.run(entry, 2)[0] == 0
    assert guest.left("out", 2) == "fresh\n"


def test_a_content_that_arrived_damaged_is_refused(guest: Guest) -> None:
    stage, size = guest.launch / ".stage", 1 << 13
    content = vmrm.text_content("x" * size)  # too long for a line
    for data in (b"x" * (size - 1) + b"y", b"x" * (size - 1), b"x" * (size + 1), b""):
        damaged = content._replace(source=functools.partial(io.BytesIO, data))
        with pytest.raises(vmrm.VMFailed, match="arrived damaged"):
            guest.stage([], [damaged])
        assert [path.name for path in stage.iterdir()] == ["of.1-1.0"]
    guest.stage([], [content])
    assert {path.name for path in stage.iterdir()} == {"of.1-1.0", content.sha256}


def test_a_content_is_brought_once_and_an_older_experiment_is_moved_aside(guest: Guest) -> None:
    for folder in ("-5", "10", "other"):
        (guest.launch / folder).mkdir()
        (guest.launch / folder / "old").touch()
    content = vmrm.text_content("x" * (1 << 13))
    guest.stage([], [content])
    assert (guest.launch / "-5" / "old").exists()
    nothing = content._replace(source=lambda: io.BytesIO(b""))
    guest.stage([], [nothing], aside=["-5", "10", "77"])
    left = {path.relative_to(guest.launch).parts[-3:] for path in guest.launch.rglob("old")}
    assert {(parts[0] == "other", *parts[-2:]) for parts in left} == {
        (False, "-5", "old"),
        (False, "10", "old"),
        (True, "other", "old"),
    }
    assert {p.relative_to(guest.launch).parts[0] for p in guest.launch.rglob("10/old")} == {
        ".previous"
    }


def test_of_many_scripts_none_is_moved_aside_as_old(guest: Guest) -> None:
    """They come by several programs of the guest, of which the first one moves."""
    (guest.launch / "-5").mkdir()
    (guest.launch / "-5" / "old").touch()
    places = [f"{guest.launch}/-5/prog-{n}/call_arguments.sh" for n in range(70)]
    guest.stage([vmrm.Script(f"it's {path}", path) for path in places], aside=["-5"])
    assert [Path(path).read_text() for path in places] == [f"it's {path}" for path in places]
    assert [p.parent.parent.parent.name for p in guest.launch.rglob("old")] == [".previous"]


def test_what_is_cut_short_is_not_done(guest: Guest) -> None:
    """The lines of a layout come by a pipe, whose writer may die at any byte."""
    entry = shell_program("true")
    guest.install(entry)
    path = Path(str(entry.call_arguments_filename))
    before, sent = path.read_text(), list[str]()

    class Noting(LocalGuest):
        def finish(self, argv: Sequence[str], more: float = 0.0, lines: str = "") -> vmrm.Steps:
            sent.append(lines)
            return (yield from super().finish(argv, more, lines))

    noting = Noting(guest)
    script = vmrm.Script("changed", str(path))
    vmrm.run_steps(noting.stage_steps(("1-1.0", "uuid1"), [], [script], [], print), time.sleep)
    assert path.read_text() == "changed"
    path.write_text(before)
    argv = noting.argv("lay-out", noting.stage, "1-1.0", "uuid1", "old")
    for end in range(1, len(sent[0].rstrip()), 7):
        vmrm.run_steps(LocalGuest(guest).finish(argv, 0, sent[0][:end]), time.sleep)
        assert path.read_text() == before, end


def test_an_agents_user_has_its_home_for_itself_if_its_group_is_its_own(guest: Guest) -> None:
    if os.getuid():
        unavailable("only root can become somebody else")
    home = guest.launch / "home"
    home.mkdir()
    own, shared = pwd.getpwnam("daemon").pw_gid, grp.getgrnam("users").gr_gid
    for group, mode, code in ((own, 0o775, 0), (shared, 0o755, 0), (shared, 0o775, 1)):
        os.chown(home, pwd.getpwnam("daemon").pw_uid, group)
        home.chmod(mode)
        become = [
            str(shutil.which("setpriv")),
            "--reuid",
            "daemon",
            "--regid",
            str(group),
            "--clear-groups",
        ]
        agent = Guest(guest.launch, [*guest.shell, *become], guest.path)
        told = ""
        try:
            agent.stage(launch=home / "launch")
        except vmrm.VMFailed as error:
            told = str(error)
        stage = home / "launch" / ".stage"
        assert (bool(told), stage.exists()) == (code == 1, code == 0), (group, mode, told)
        if stage.exists():
            shutil.rmtree(stage.parent)
        else:
            assert f"{home} " in told
            (home / "launch").rmdir()


def test_a_launch_directory_belongs_to_one_vm_of_an_experiment(guest: Guest) -> None:
    guest.stage(owner=("1-1.0", "uuid1"))
    with pytest.raises(vmrm.VMFailed, match="used by another VM"):
        guest.stage(owner=("1-1.0", "uuid2"))
    guest.stage(owner=("1-1.0", "uuid1"))
    guest.stage(owner=("2-2.0", "uuid2"))  # a later experiment may have it


# === Full disks ==================================================================================

# Mounts a small disk as the launch directory ($1), moves the laid-out files there, runs $4 on it,
# then the attempt; prints its exit code and its `exit` file.
ON_A_SMALL_DISK = (
    """
mkdir "$1.kept" && cp -a "$1/." "$1.kept/" && mount -t tmpfs -o "$2" none "$1" || exit 99
cp -a "$1.kept/." "$1/" && rm -r "$1.kept" && cd "$1" || exit 99
eval "$4"
setsid /bin/sh "$3" attempt.1 """
    + TOKEN
    + """
echo "code $?"
cat ./-5/prog/attempt.1/exit 2>/dev/null
ls -A ./-5/prog/attempt.1 2>/dev/null
true
"""
)
FILL = "cat /dev/zero > filler 2>/dev/null"
USE_UP_INODES = "n=0; while mkdir x$n 2>/dev/null; do n=$((n+1)); done"


@pytest.fixture
def on_dash(launch: Path) -> Guest:
    need_mounts()
    return Guest(launch, ["unshare", "-m"], os.environ["PATH"])


def on_small_disk(guest: Guest, entry: ScheduleEntry, options: str, before: str) -> list[str]:
    guest.install(entry)
    script = str(entry.call_arguments_filename)
    done = guest.sh(ON_A_SMALL_DISK, str(guest.launch), options, script, before)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode().splitlines()


def test_output_that_fills_the_disk_is_lost_and_the_outcome_is_not(on_dash: Guest) -> None:
    entry = shell_program("cat /dev/zero; exit 7")
    code, *left = on_small_disk(on_dash, entry, "size=64k", ":")
    assert code == "code 7"
    assert "out" in left
    assert "exit" not in left or left[0] == "7 0", "half an exit file would be a lie"


def test_a_disk_that_is_full_already_loses_no_outcome(on_dash: Guest) -> None:
    entry = shell_program("echo lost; exit 7")
    code, *left = on_small_disk(on_dash, entry, "size=64k", FILL)
    assert code == "code 7"
    assert "exit" not in left or left[0] == "7 0"


def test_where_no_output_file_can_be_made_the_program_runs_without(on_dash: Guest) -> None:
    entry = shell_program("echo lost; exit 7")
    before = f"{USE_UP_INODES}; rmdir x0"  # room for the claim, and nothing else
    assert on_small_disk(on_dash, entry, "size=1m,nr_inodes=40", before) == ["code 7"]


def test_where_no_claim_can_be_made_nothing_runs(on_dash: Guest) -> None:
    entry = shell_program("touch /ran")
    code, *left = on_small_disk(on_dash, entry, "size=1m,nr_inodes=40", USE_UP_INODES)
    assert (code, left) == (f"code {CLAIM_FAILED}", [])
    assert not Path("/ran").exists()


# === Processes ===================================================================================


def eventually(condition: object, seconds: float = 10) -> None:
    """Wait until a callable returns something true."""
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to be"
        vmrm.time_to_wait(0.02)


def pids(guest: Guest, entry: ScheduleEntry, count: int) -> list[int]:
    """Wait until a program has written down *count* pids; return them."""
    path = Path(str(entry.working_dir)) / "pids"
    eventually(lambda: path.exists() and len(path.read_text().split()) == count)
    return [int(word) for word in path.read_text().split()]


def gone(pid: int) -> bool:
    return vmrm.process_started(pid) is None


FAMILY = "(sleep 1000 & echo $! >> pids; wait) & sleep 1000 & echo $! >> pids; wait"


@pytest.mark.parametrize("session", [True, False])
def test_a_program_has_a_process_group_of_its_own_and_killing_it_leaves_nobody(
    guest: Guest, session: bool
) -> None:
    entry = shell_program(FAMILY)
    guest.install(entry)
    with guest.start(entry, session=session) as process:
        family = pids(guest, entry, 2)
        (found,) = guest.found(1)
        assert found.claimed
        assert found.alive
        assert found.pid == process.pid
        groups = {os.getpgid(pid) for pid in family}
        assert groups == {process.pid}
        assert process.pid != os.getpgid(0)
        assert guest.ask("signal", "KILL", str(process.pid)).returncode == 0
        eventually(lambda: all(gone(pid) for pid in family))
        # Not waited for yet, the script is a zombie: ended all the same.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert guest.found(1) == [vmrm.Found(True, None, False, process.pid, False)]


def test_term_lets_a_program_clean_up(guest: Guest) -> None:
    entry = shell_program("trap 'echo cleaned; exit 5' TERM; echo $$ > pids; sleep 1000 & wait")
    guest.install(entry)
    with guest.start(entry) as process:
        pids(guest, entry, 1)
        guest.ask("signal", "TERM", str(process.pid))
    eventually(lambda: guest.left("out") == "cleaned\n")  # the script itself ends at once


def test_killing_what_is_gone_is_an_error_and_harms_nobody(guest: Guest) -> None:
    entry = program("true")
    guest.install(entry)
    guest.run(entry)
    pid = guest.found(1)[0].pid
    assert guest.ask("signal", "TERM", str(pid)).returncode != 0


def test_the_probe_tells_none_ended_alive_and_gone_apart(guest: Guest) -> None:
    entry = shell_program('[ "$GO" ] || echo $$ > pids; touch reboot; exec sleep "$(cat t)"')
    entry.add_content("t", "0")
    guest.install(entry)
    guest.run(entry, 1)
    entry.data[0]["content"] = "1000"
    guest.install(entry)
    with guest.start(entry, 2) as killed:
        eventually(lambda: guest.found(2)[0].alive)
        os.killpg(killed.pid, signal.SIGKILL)
    with guest.start(entry, 4) as running:
        eventually(lambda: guest.found(4)[0].alive)
        ended, dead, none, alive = guest.found(1, 2, 3, 4)
        os.killpg(running.pid, signal.SIGKILL)
    assert (ended.claimed, ended.exit_code, ended.reboot, ended.alive) == (True, 0, True, False)
    assert dead == vmrm.Found(True, None, False, killed.pid, False)
    assert none == vmrm.Found(claimed=False)
    assert alive == vmrm.Found(True, None, False, running.pid, True)


def test_another_process_with_the_same_pid_is_not_taken_for_the_program(guest: Guest) -> None:
    attempt = guest.launch / "-5" / "prog" / "attempt.1"
    attempt.mkdir(parents=True)
    started = vmrm.process_started(os.getpid())
    assert started is not None
    (attempt / "pid").write_text(f"{os.getpid()} {started}\n")
    assert guest.found(1)[0].alive
    (attempt / "pid").write_text(f"{os.getpid()} {started - 1}\n")
    assert not guest.found(1)[0].alive


def test_a_claim_without_a_trace_is_a_claim(guest: Guest) -> None:
    (guest.launch / "-5" / "prog" / "attempt.1").mkdir(parents=True)
    assert guest.found(1) == [vmrm.Found(claimed=True)]


# === What a guest may answer =====================================================================


@pytest.mark.parametrize(
    "line",
    [
        "",
        "claim",
        "claim::",
        "claim:0 0:1 2:dead",
        "claim:0 0:1 2:alive:",
        "claim:: :gone",
        "claim::-1 5:alive",
        "claim::0 5:alive",
        "claim::1e9 5:alive",
        "claim::99999999999999999999 5:alive",
        "claim::1 x:alive",
        "NONE",
    ],
)
def test_an_answer_that_our_probe_cannot_give_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="unexpected"):
        vmrm.parse_found(line)


@pytest.mark.parametrize("text", ["x", "0", "10000000000 0", "- 0", "0 2", "٣ 0", "0 0:3 4", "\f"])
def test_an_exit_file_that_is_none_of_ours_counts_as_none(text: str) -> None:
    assert vmrm.parse_found(f"claim:{text}:1 2:gone") == vmrm.Found(True, pid=1)


@given(st.text() | st.from_regex(r"claim:[^:]*:[^:]*:(alive|gone)", fullmatch=True))
def test_any_answer_is_read_or_refused(line: str) -> None:
    try:
        found = vmrm.parse_found(line)
    except ValueError:
        return
    assert found.pid is None or 0 < found.pid < 10**10
    assert found.exit_code is None or 0 <= found.exit_code <= 999


def words_of(commands: str) -> Sequence[str]:
    return shlex.split(commands)


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))))
def test_any_list_of_arguments_is_quoted_so_that_a_shell_gives_it_back(
    arguments: list[str],
) -> None:
    entry = program("prog", *arguments)
    last = vmrm.run_commands(entry).split("\n", 2)[2]
    assert words_of(last) == ["exec", "prog", *arguments]

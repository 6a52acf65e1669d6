"""The reference's methods, returns and errors of the two driver classes; addresses; deadlines."""

from __future__ import annotations

import abc
import base64
import inspect
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import SimpleNamespace

import pytest
from agents import HERE, LOG, connected, need, reply, scripted, stand_in
from hypothesis import given
from hypothesis import strategies as st

import drivers

ABSTRACT = {
    "_write": ["filename", "data", "mode"],
    "close": [],
    "connect": [],
    "exec_status": ["pid"],
    "execute": ["path", "arg", "env", "input_data", "capture_output"],
    "file_flush": ["handle"],
    "get_engine": [],
    "get_os": [],
    "get_time": [],
    "network_get_interfaces": [],
    "ping": ["timeout"],
    "read_file": ["filename", "local_destination", "mode"],
    "reboot": [],
    "set_time": [],
    "set_user_password": ["username", "password"],
    "store_captured_output": ["pid", "output"],
    "sync": ["timeout"],
    "write_from_file": ["filename", "local_filename", "mode"],
}
CONCRETE = {
    "_delete_parent_directories": ["directory"],
    "_get_stream": ["stream_name", "pid"],
    "_reset_cache": [],
    "append": ["filename", "content"],
    "connected": ["timeout"],
    "create_directories": ["directory"],
    "create_paths": ["schedule_entry"],
    "deconflict_agent_path": ["path"],
    "delete_file": ["path"],
    "evaluate_process_success": ["pid", "interval"],
    "file_exists": ["path"],
    "get_exitcode": ["pid"],
    "get_files": ["path", "timestamp"],
    "get_stderr": ["pid"],
    "get_stdout": ["pid"],
    "make_file_executable": ["path"],
    "wait_for_exitcode": ["pid", "interval"],
    "write": ["filename", "data", "mode"],
}
QEMU = {
    "_prep_async_exec": ["path", "arg", "env", "input_data", "capture_output"],
    "async_exec": ["path", "arg", "env", "input_data", "capture_output"],
    "file_write_content": ["handle", "content"],
    "file_write_from_file": ["handle", "filename"],
}
DEFAULTS = {
    "arg": None, "env": None, "input_data": None, "capture_output": True, "interval": 1,
    "timestamp": None,
}  # fmt: skip


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[drivers.QemuGuestAgentDriver]:
    """Yield a driver connected to a stand-in agent."""
    with stand_in(tmp_path / "agent") as agent, connected(agent.path, timeout=20) as ready:
        yield ready


@pytest.fixture
def idle() -> drivers.QemuGuestAgentDriver:
    """Return a driver that is not connected."""
    return drivers.QemuGuestAgentDriver({"path": "/nowhere/s"}, LOG)


# --- the reference's interface ---


def test_every_method_of_the_reference_exists_with_its_parameters() -> None:
    for name, names in {**ABSTRACT, **CONCRETE, **QEMU}.items():
        method = getattr(drivers.QemuGuestAgentDriver, name)
        parameters = dict(inspect.signature(method).parameters)
        parameters.pop("self", None)
        assert list(parameters)[: len(names)] == names, name
        # What goes beyond the reference may be left out.
        beyond = list(parameters.values())[len(names) :]
        assert all(p.default is not p.empty for p in beyond), name
        for key in set(names) & set(DEFAULTS):
            assert parameters[key].default == DEFAULTS[key], name


def test_the_abstract_methods_are_those_of_the_reference() -> None:
    assert drivers.AbstractDriver.__abstractmethods__ == frozenset(ABSTRACT)
    assert issubclass(drivers.AbstractDriver, abc.ABC)
    with pytest.raises(TypeError):
        drivers.AbstractDriver({"path": "/s"}, LOG)  # type: ignore[abstract]
    assert all(hasattr(drivers.AbstractDriver, name) for name in CONCRETE)


def test_the_documented_defaults(idle: drivers.QemuGuestAgentDriver) -> None:
    assert inspect.signature(idle.sync).parameters["timeout"].default == 5
    assert inspect.signature(idle.ping).parameters["timeout"].default == 10
    assert inspect.signature(idle.connected).parameters["timeout"].default == 10
    assert inspect.signature(idle.read_file).parameters["mode"].default == "rb"
    assert inspect.signature(idle.write_from_file).parameters["mode"].default == "w"
    message = "`execute` returned `None` indicating an error has occurred."
    assert message == drivers.AbstractDriver._EXEC_ERROR_MSG


def test_the_attributes_of_the_reference(idle: drivers.QemuGuestAgentDriver) -> None:
    assert idle.log is LOG
    assert idle.driver is None
    assert isinstance(idle.lock, threading.Condition)
    assert (idle.target_os, idle.used_agent_paths, idle.output_cache) == ("", set(), {})
    assert drivers.QemuGuestAgentDriver.get_engine() == "QemuVM"


@pytest.mark.parametrize("config", [{}, {"path": ""}, {"path": None, "name": "web"}])
def test_a_config_without_path_is_refused(config: dict[str, object]) -> None:
    with pytest.raises(FileNotFoundError):
        drivers.QemuGuestAgentDriver(config, LOG)


def test_without_a_connection_every_call_says_so(idle: drivers.QemuGuestAgentDriver) -> None:
    assert not idle.connected_now
    assert idle.ping() is False
    assert idle.health() == "no-answer"
    calls = (idle.sync, idle.get_os, idle.get_time, idle.set_time, idle.reboot, idle.connected)
    for call in calls:
        with pytest.raises(drivers.StateError) as caught:
            call()
        assert isinstance(caught.value, EnvironmentError)
    idle.close()


@pytest.mark.parametrize(
    ("osinfo", "name"),
    [
        ({"id": "debian", "name": "Debian", "pretty-name": "Debian 12"}, "Debian 12"),
        ({"kernel-release": "6.1.0", "id": ""}, "6.1.0"),
        ({}, "unknown"),
    ],
)
def test_a_system_is_called_by_the_best_that_is_known(osinfo: dict[str, str], name: str) -> None:
    with scripted(lambda request: reply(request, osinfo), timeout=5) as (driver, _):
        assert driver.get_os() == name


# --- programs ---


def test_exit_codes_and_output_are_told_again_and_again(
    driver: drivers.QemuGuestAgentDriver,
) -> None:
    pid = driver.execute("sh", ["-c", "echo out; echo err >&2; exit 3"])
    assert pid is not None
    assert driver.wait_for_exitcode(pid) == 3
    for _ in range(2):
        assert driver.get_exitcode(pid) == 3
        assert driver.get_stdout(pid) == "out\n"
        assert driver.get_stderr(pid) == "err\n"
        assert driver.evaluate_process_success(pid) is False
    assert driver.output_cache[pid] == {
        "exited": True, "exitcode": 3,
        "stdout": "out\n", "stdout_trunc": False, "stderr": "err\n", "stderr_trunc": False,
    }  # fmt: skip
    driver._reset_cache()
    assert driver.output_cache == {}


def test_a_running_program_has_neither_exit_code_nor_output(
    driver: drivers.QemuGuestAgentDriver,
) -> None:
    pid = driver.async_exec("sleep", "30")
    assert pid is not None
    assert driver.get_exitcode(pid) is None
    assert driver.get_stdout(pid) is None
    assert driver.output_cache[pid] == {"exited": False}
    assert driver.exec_status(pid) == {"exited": False}
    driver.execute("kill", [str(pid)])
    assert driver.wait_for_exitcode(pid) == 128 + 15


def test_exec_status_is_the_agents_reply(driver: drivers.QemuGuestAgentDriver) -> None:
    pid = driver.execute("echo", "one argument")
    assert pid is not None
    deadline = drivers.Deadline(10)
    while not (status := driver.exec_status(pid))["exited"]:
        assert not deadline.expired
    assert (status["exitcode"], status["out-data"]) == (0, "b25lIGFyZ3VtZW50Cg==")
    assert driver.get_stdout(pid) == "one argument\n"
    with pytest.raises(OSError, match="guest-exec-status"):
        driver.exec_status(pid)


def test_arguments_of_a_wrong_type_are_refused(driver: drivers.QemuGuestAgentDriver) -> None:
    with pytest.raises(TypeError):
        driver.execute("true", 5)  # type: ignore[arg-type]


def test_a_pid_that_comes_round_has_no_old_result() -> None:
    status = {"exited": True, "exitcode": 0}
    exits = iter([{"exited": True, "exitcode": 1}, status])

    def script(request: dict[str, object]) -> bytes:
        return reply(request, {"pid": 7} if request["execute"] == "guest-exec" else next(exits))

    with scripted(script) as (driver, _):
        for expected in (1, 0):
            pid = driver.execute("true")
            assert pid == 7
            assert driver.wait_for_exitcode(pid) == expected


def test_threads_may_share_a_driver(driver: drivers.QemuGuestAgentDriver) -> None:
    codes: dict[int, int] = {}

    def work(number: int) -> None:
        codes[number] = driver.run(["sh", "-c", f"exit {number}"]).exitcode or 0

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert codes == {number: number for number in range(1, 9)}


# --- files of the guest ---

NASTY = [
    "a b",
    "$HOME",
    "`id`",
    "a;b",
    "quo'te",
    'dou"ble',
    "new\nline",
    "back\\slash",
    "-n",
    "\u00e4",
]


@pytest.mark.parametrize("name", NASTY)
def test_any_name_is_taken_literally(
    driver: drivers.QemuGuestAgentDriver, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "x" / name / name
    assert driver.file_exists(str(path)) is False
    assert driver.write(str(path), "text") is True
    assert driver.file_exists(str(path)) is True
    assert driver.get_files(str(tmp_path / "x")) == [str(path)]
    assert driver.make_file_executable(str(path)) is True
    assert os.access(path, os.X_OK)
    assert driver.delete_file(str(path)) is True
    assert not path.exists()
    assert driver.delete_file(str(path)) is False
    driver._delete_parent_directories(PurePosixPath(path.parent))
    assert not (tmp_path / "x").exists()
    assert (tmp_path / "agent").exists()


def test_wildcards_find_one_match(driver: drivers.QemuGuestAgentDriver, tmp_path: Path) -> None:
    (tmp_path / "two words").mkdir()
    (tmp_path / "two words" / "file1.log").touch()
    assert driver.file_exists(f"{tmp_path}/two words/*.log") is True
    assert driver.file_exists(f"{tmp_path}/two*/file?.l[ao]g") is True
    assert driver.file_exists(f"{tmp_path}/two words/*.txt") is False
    assert driver.file_exists(f"{tmp_path}/$(touch {tmp_path}/hacked)*") is False
    assert not (tmp_path / "hacked").exists()
    (tmp_path / "li[t]*eral").touch()
    assert driver.file_exists(f"{tmp_path}/li[t]*eral") is True


def test_directories_files_and_modes(driver: drivers.QemuGuestAgentDriver, tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b" / "c"
    assert driver.create_directories(str(deep)) is True
    assert driver.create_directories(str(deep)) is True
    assert driver.write(str(deep / "f"), "one\n") is True
    assert driver.append(str(deep / "f"), "zw\u00f6lf\n") is True
    assert (deep / "f").read_text() == "one\nzw\u00f6lf\n"
    assert driver.create_directories(str(deep / "f" / "g")) is False
    assert driver.write(str(deep / "f" / "g"), "x") is False
    assert driver.append(str(deep), "x") is False
    assert driver.make_file_executable(str(deep / "none")) is False
    assert driver.delete_file(str(deep)) is False  # a directory is no file
    assert driver._delete_parent_directories(PurePosixPath(deep)) is False
    assert deep.exists()


def test_files_are_listed_by_time(driver: drivers.QemuGuestAgentDriver, tmp_path: Path) -> None:
    folder = tmp_path / "d" / "e"
    folder.mkdir(parents=True)
    old, new = tmp_path / "d" / "old", folder / "new"
    for path, when in ((old, 1_000_000_000), (new, 1_600_000_000)):
        path.touch()
        os.utime(path, (when, when))
    listed = driver.get_files(str(tmp_path / "d"))
    assert listed is not None
    assert sorted(listed) == sorted([str(old), str(new)])
    assert driver.get_files(str(old)) == [str(old)]
    assert driver.get_files(str(tmp_path / "d"), 1_500_000_000) == [str(new)]
    assert driver.get_files(str(tmp_path / "d"), "2010-01-01 00:00:00") == [str(new)]
    assert driver.get_files(str(tmp_path / "d"), time.time()) == []
    assert driver.get_files(str(tmp_path / "none")) is None
    assert driver.get_files(str(tmp_path / "d"), "not a date") is None


def test_local_files_go_and_come(driver: drivers.QemuGuestAgentDriver, tmp_path: Path) -> None:
    content = os.urandom(150_000)
    (tmp_path / "local").write_bytes(content)
    guest = str(tmp_path / "guest")
    assert driver.write_from_file(guest, tmp_path / "local") is True
    assert driver.write_from_file(guest, str(tmp_path / "local"), mode="a") is True
    assert driver.read_file(guest, tmp_path / "back") is True
    assert (tmp_path / "back").read_bytes() == content * 2
    assert driver.write_from_file(str(tmp_path / "no" / "f"), tmp_path / "local") is False
    with pytest.raises(FileNotFoundError):
        driver.write_from_file(guest, tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        driver.read_file(guest, tmp_path / "none" / "f")
    with pytest.raises(ValueError, match="mode"):
        driver.read_file(guest, tmp_path / "back", mode="w")


def test_content_goes_through_an_open_handle(
    driver: drivers.QemuGuestAgentDriver, tmp_path: Path
) -> None:
    (tmp_path / "local").write_bytes(b"two")
    handle = driver.open(str(tmp_path / "f"), "w")
    assert driver.file_write_content(handle, "\u00f6ne") is True
    assert driver.file_write_from_file(handle, tmp_path / "local") is True
    driver.file_flush(handle)
    assert (tmp_path / "f").read_text() == "\u00f6netwo"
    driver.close_handle(handle)
    assert driver.file_write_content(handle, "x") is False
    assert driver.file_write_from_file(handle, tmp_path / "local") is False
    with pytest.raises(OSError, match="guest-file-flush"):
        driver.file_flush(handle)
    with pytest.raises(FileNotFoundError):
        driver.file_write_from_file(handle, tmp_path / "none")


def test_a_busybox_guest_understands_the_scripts(tmp_path: Path) -> None:
    busybox = need("busybox")
    (tmp_path / "bin").mkdir()
    subprocess.run([busybox, "--install", "-s", str(tmp_path / "bin")], check=True)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "f 1").touch()
    target = str(tmp_path / "d" / "f 1")
    for script, words, code in (
        (drivers._EXISTS[0], [f"{tmp_path}/d/f*"], 0),
        (drivers._EXISTS[0], [f"{tmp_path}/d/g*"], 1),
        (drivers._FIND[0], [str(tmp_path / "d"), "@1000"], 0),
        (drivers._FIND[0], [str(tmp_path / "d"), "@1000.5", "@1000"], 0),
        (drivers._FIND[0], [str(tmp_path / "none"), ""], 2),
        (drivers._DELETE[0], [target], 0),
        (drivers._DELETE[0], [target], 1),
        (drivers._PRUNE[0], [str(tmp_path / "d")], 0),
    ):
        command = [str(tmp_path / "bin" / "sh"), "-c", script, "sh", *words]
        done = subprocess.run(
            command, capture_output=True, env={"PATH": str(tmp_path / "bin")}, check=False
        )
        assert done.returncode == code, (script, done.stderr)
        if script is drivers._FIND[0] and code == 0:
            assert done.stdout == target.encode() + b"\0"


def test_a_windows_script_carries_any_word_unchanged() -> None:
    words = ["C:\\it's", "$x", '"']
    program, *options, encoded = drivers.powershell("exit 0", *words)
    assert (program, options[-1]) == ("powershell.exe", "-EncodedCommand")
    script = base64.b64decode(encoded).decode("utf-16-le")
    assert script == "$w = @('C:\\it''s', '$x', '\"'); exit 0"


# --- places of an entry ---


def entry(executable: str | None, start_time: float) -> SimpleNamespace:
    return SimpleNamespace(executable=executable, start_time=start_time)


@pytest.mark.parametrize(
    ("executable", "start_time", "place"),
    [
        ("setup.sh", -10, "/var/launch/-10/setup.sh"),
        ("/usr/bin/my tool", 1.0, "/var/launch/1/my_tool"),
        ("../..", 0.5, "/var/launch/0.5/files"),
        (None, math.inf, "/var/launch/inf/files"),
        ("", -math.inf, "/var/launch/-inf/files"),
        ("C:\\x\\y.bat", 1e20, "/var/launch/100000000000000000000/y.bat"),
        ("-x", 2, "/var/launch/2/x"),
        ("\u00e4" * 100, 2, "/var/launch/2/" + "_" * 64),
    ],
)
def test_an_entry_gets_its_places(
    idle: drivers.QemuGuestAgentDriver, executable: str | None, start_time: float, place: str
) -> None:
    it = entry(executable, start_time)
    idle.create_paths(it)
    assert it.working_dir == place
    assert it.call_arguments_filename == f"{place}/call_arguments.sh"
    assert it.reboot_filepath == f"{place}/reboot"


def test_places_on_windows_and_elsewhere() -> None:
    driver = drivers.QemuGuestAgentDriver({"path": "/s"}, LOG)
    driver.is_windows = True
    it = entry("setup.bat", -1)
    driver.create_paths(it)
    assert it.working_dir == "C:\\launch\\-1\\setup.bat"
    assert it.call_arguments_filename == "C:\\launch\\-1\\setup.bat\\call_arguments.bat"
    assert isinstance(driver.deconflict_agent_path("C:\\X"), PureWindowsPath)
    driver = drivers.QemuGuestAgentDriver({"path": "/s", "launch_dir": "/opt/go"}, LOG)
    driver.create_paths(it)
    assert it.working_dir == "/opt/go/-1/setup.bat"


def test_paths_are_given_out_once_in_a_fixed_order(idle: drivers.QemuGuestAgentDriver) -> None:
    given_out = [
        str(idle.deconflict_agent_path(path)) for path in ("/a/x", "/a/X", "/a/x-2", "/a/x")
    ]
    assert given_out == ["/a/x", "/a/X-2", "/a/x-2-2", "/a/x-3"]


# --- addresses and deadlines ---


@pytest.mark.parametrize(
    ("text", "family", "target"),
    [
        ("/run/a.sock", socket.AF_UNIX, "/run/a.sock"),
        ("unix:/run/a:b", socket.AF_UNIX, "/run/a:b"),
        ("unix:rel", socket.AF_UNIX, "rel"),
        ("./rel:x", socket.AF_UNIX, "./rel:x"),
        ("tcp:host:1", socket.AF_INET, ("host", 1)),
        ("tcp:[::1]:65535", socket.AF_INET, ("::1", 65535)),
        ("vsock:3:1024", socket.AF_VSOCK, (3, 1024)),
    ],
)
def test_addresses_are_read(text: str, family: int, target: object) -> None:
    address = drivers.parse_address(text)
    assert (address.family, address.target) == (family, target)
    assert drivers.parse_address(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        "", "unix:", "tcp:", "tcp:host", "tcp:host:0", "tcp:host:65536", "tcp:::1:5", "tcp:a b:5",
        "tcp:[]:5", "vsock:3", "vsock:x:1", "vsock:-1:1", "vsock:3:4294967295", "http:x", "/a\0b",
        "tcp:host:\u0661", "udp:1:2",
    ],
)  # fmt: skip
def test_bad_addresses_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="address"):
        drivers.parse_address(text)


@given(st.text(max_size=40))
def test_any_text_is_an_address_that_reads_back_or_a_value_error(text: str) -> None:
    try:
        address = drivers.parse_address(text)
    except ValueError:
        return
    assert drivers.parse_address(str(address)) == address


def test_a_deadline_counts_down(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(drivers.time, "monotonic", lambda: now)
    deadline, never = drivers.Deadline(5), drivers.Deadline(None)
    now = 103.0
    assert (deadline.remaining(), deadline.expired) == (2.0, False)
    assert (never.remaining(), never.expired) == (math.inf, False)
    now = 106.0
    assert (deadline.remaining(), deadline.expired) == (0.0, True)


def test_the_module_needs_the_standard_library_alone() -> None:
    code = "import sys, drivers; print(*{n.partition('.')[0] for n in sys.modules})"
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True)
    others = set(done.stdout.split()) - set(sys.stdlib_module_names) - {"__main__", "drivers"}
    assert {name for name in others if not name.startswith("_sysconfigdata")} == set()

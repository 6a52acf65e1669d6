"""Every name of the reference exists with its parameters, and does what is documented there."""

from __future__ import annotations

import enum
import inspect
import logging
import math
import os
import queue
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import drivers
import vmrm

# Each signature as the reference prints it, without self. Where a default is documented, it must
# be ours too; `db="prod"` alone is not: db is the database's path here.
CLASSES: dict[str, tuple[str, dict[str, str]]] = {
    "ExperimentStart": (
        "hostname='', port=50051, db",
        {
            "__del__": "",
            "add_start_time": "",
            "clear_start_time": "",
            "close": "",
            "get_launch_time": "",
            "get_start_time": "",
            "get_time_since_start": "",
            "get_time_to_start": "",
            "set_launch_time": "",
        },
    ),
    "ScheduleDb": (
        "cache_name='schedules', log=None",
        {
            "batch_put": "sched_list, broadcast=False",
            "close": "",
            "destroy_all": "",
            "destroy_one": "server_name",
            "get": "server_name",
            "list_all": "pattern=None",
            "put": "server_name, text, vm_resources_ip, broadcast=True",
        },
    ),
    "ScheduleEntry": (
        "start_time, ignore_failure=False",
        {
            "__str__": "",
            "add_content": "location, content, executable=False",
            "add_file": "location, filename, executable=False",
            "add_file_transfer": "location, interval=30, destination=None",
            "add_pause": "duration",
            "append_arguments": "arguments",
            "set_executable": "path, arguments=None",
        },
    ),
    "ScheduleEvent": (
        "event_type, data",
        {"__lt__": "other", "get_data": "", "get_type": ""},
    ),
    "ScheduleUpdater": (
        "config, priority_queue, condition, vm_resource_store, schedule_db, repository_db, log, "
        "log_filename, load_balance_factor, interval_time=5",
        {
            "_run": "",
            "enqueue_event": "priority, event",
            "get_schedule": "name",
            "get_start_time": "",
            "run": "",
            "stop_thread": "",
        },
    ),
    "VMMapping": (
        "hostname='', port=50051, db",
        {
            "__del__": "",
            "batch_put": "server_list",
            "close": "",
            "destroy_all": "",
            "destroy_one": "server_uuid",
            "get": "server_uuid=None",
            "get_all": "filter_time=None, filter_state=None, project_dict=None, length=False",
            "get_count_vm_not_ready": "",
            "prepare_put": "entry",
            "put": "server_uuid, server_name, state='uninitialized', current_time='', "
            "server_address=''",
            "set_vm_state_by_uuid": "uuid, state",
            "set_vm_time_by_uuid": "uuid, time",
        },
    ),
    "VMResourceHandler": (
        "config, check_interval=10",
        {
            "_check_driver": "obj",
            "_import_drivers": "",
            "_print_stream": "output, stream, stream_name",
            "_run": "",
            "_run_vm_resource": "schedule_entry, queue=None",
            "_transfer_data": "name, location, interval=None, destination=None",
            "check_for_reboot": "reboot_filepath",
            "connect_to_driver": "",
            "get_events": "",
            "import_driver": "",
            "load_files_in_target": "schedule_entry",
            "log_json": "content",
            "preload_files": "",
            "print_output": "schedule_entry, pid",
            "reboot": "",
            "run": "",
            "run_vm_resource": "schedule_entry, queue=None",
            "set_current_time": "cur_time",
            "set_state": "state",
            "stop": "exitcode",
            "transfer_data": "name, location, interval=None, destination=None",
        },
    ),
    "VmManager": (
        "opts, logger=None",
        {
            "set_logger": "logger",
            "add_vm_to_pool": "vm_ip, vm_name, group",
            "lookup_vms_by_ip": "vm_ip",
            "mark_vm_check_failed": "vm_name",
            "mark_server_start": "",
            "can_user_acquire_more_vm": "username, group",
            "get_ready_vms": "group",
            "acquire_vm": "groups, ownername, sandbox, pid, task_id=None, build_id=None, "
            "chroot=None",
            "release_vm": "vm_name",
            "start_vm_termination": "vm_name, allowed_pre_state=None",
            "remove_vm_from_pool": "vm_name",
            "_load_multi_safe": "vm_name_list",
            "get_all_vm_in_group": "group",
            "get_all_vm": "",
            "get_vm_by_name": "vm_name",
            "get_vm_by_task_id": "task_id",
            "get_vm_by_group_and_state_list": "group, state_list",
            "info": "",
            "write_vm_pool_info": "group, key, value",
            "read_vm_pool_info": "group, key",
        },
    ),
    "VmResourceStore": (
        "store='vm_resources', decompress=False",
        {
            "add_file": "path, force=True",
            "add_file_from_content": "content, filename, force=True",
            "remove_file": "pattern",
            "list_contents": "pattern",
            "list_distinct_contents": "pattern",
            "check_path": "filename",
            "get_path": "filename",
            "get_file": "filename",
            "get_file_size": "filename",
            "get_file_hash": "filename",
            "get_file_upload_date": "filename",
        },
    ),
}
EXECUTE = "path, arg=None, env=None, input_data=None, capture_output=True"
DRIVER = {
    "_delete_parent_directories": "directory",
    "_get_stream": "stream_name, pid",
    "_reset_cache": "",
    "_write": "filename, data, mode='w'",
    "append": "filename, content",
    "close": "",
    "connect": "",
    "connected": "timeout=10",
    "create_directories": "directory",
    "create_paths": "schedule_entry",
    "deconflict_agent_path": "path",
    "delete_file": "path",
    "evaluate_process_success": "pid, interval=1",
    "exec_status": "pid",
    "execute": EXECUTE,
    "file_exists": "path",
    "file_flush": "handle",
    "get_engine": "",
    "get_exitcode": "pid",
    "get_files": "path, timestamp=None",
    "get_os": "",
    "get_stderr": "pid",
    "get_stdout": "pid",
    "get_time": "",
    "make_file_executable": "path",
    "network_get_interfaces": "",
    "ping": "timeout=10",
    "read_file": "filename, local_destination, mode='rb'",
    "reboot": "",
    "set_time": "",
    "set_user_password": "username, password",
    "store_captured_output": "pid, output",
    "sync": "timeout=5",
    "wait_for_exitcode": "pid, interval=1",
    "write": "filename, data, mode='w'",
    "write_from_file": "filename, local_filename, mode='w'",
}
QGA = {
    "_prep_async_exec": EXECUTE,
    "async_exec": EXECUTE,
    "file_write_content": "handle, content",
    "file_write_from_file": "handle, filename",
}
ABSTRACT = (
    "_write close connect exec_status execute file_flush get_engine get_os get_time "
    "network_get_interfaces ping read_file reboot set_time set_user_password "
    "store_captured_output sync write_from_file"
)
FUNCTIONS = {
    "add_experiment_start_time": "start=None",
    "add_vm": "server_uuid, server_name, control_ip, use_vm_manager=True, mapping=None, log=None",
    "add_vm_resource_file": "filename, store=None, log=None",
    "destroy_all": "mapping=None, schedule=None, start=None, log=None, "
    "ignore_grpc_connection_errors=False",
    "get_experiment_launch_time": "start=None",
    "get_experiment_start_time": "start=None",
    "get_experiment_time_since_start": "start=None",
    "get_experiment_time_to_start": "start=None",
    "get_vm_states": "filter_state=None, mapping=None, log=None",
    "get_vm_times": "filter_time=None, mapping=None, log=None",
    "set_experiment_launch_time": "start=None",
    "vm_resource_list": "store=None, log=None",
    "get_vm_count_not_ready": "mapping=None, log=None",
    "set_vm_state": "vm_uuid, new_state, mapping=None, log=None",
    "set_vm_time": "vm_uuid, new_time, mapping=None, log=None",
}
SIGNATURES = [
    *((getattr(vmrm, name), words) for name, (words, _) in CLASSES.items()),
    *(
        (getattr(getattr(vmrm, name), method), words)
        for name, (_, methods) in CLASSES.items()
        for method, words in methods.items()
    ),
    *((getattr(vmrm, name), words) for name, words in FUNCTIONS.items()),
    (drivers.AbstractDriver, "config, log"),
    (drivers.QemuGuestAgentDriver, "config, log"),
    *((getattr(drivers.AbstractDriver, name), words) for name, words in DRIVER.items()),
    *(
        (getattr(drivers.QemuGuestAgentDriver, name), words)
        for name, words in (DRIVER | QGA).items()
    ),
]


def parameters(words: str) -> dict[str, Any]:
    """Return documented parameters in order, each with its default (empty: none documented)."""
    scope: dict[str, Any] = {}
    exec(f"def documented({words.replace(', db', ', db=None')}): pass", scope)  # noqa: S102
    found = inspect.signature(scope["documented"]).parameters
    return {name: parameter.default for name, parameter in found.items()}


def faults(item: Any, words: str) -> Iterator[str]:
    """Yield how a signature differs; ours may go on with parameters that can be left out."""
    ours = {k: p for k, p in inspect.signature(item).parameters.items() if k != "self"}
    wanted = parameters(words)
    if list(ours)[: len(wanted)] != list(wanted):
        yield f"it takes {list(ours)}"
        return
    for name, parameter in ours.items():
        if name not in wanted:
            if parameter.default is parameter.empty:
                yield f"{name} cannot be left out"
        elif parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
            yield f"{name} is {parameter.kind}"
        elif wanted[name] is not parameter.empty and parameter.default != wanted[name]:
            yield f"{name} is {parameter.default!r} by default"


def test_every_signature_takes_what_the_reference_says() -> None:
    assert len(SIGNATURES) > 150
    found = [(item, fault) for item, words in SIGNATURES for fault in faults(item, words)]
    assert not found


def test_the_kinds_of_classes_are_those_of_the_reference() -> None:
    assert issubclass(vmrm.ScheduleUpdater, threading.Thread)
    assert issubclass(drivers.QemuGuestAgentDriver, drivers.AbstractDriver)
    assert inspect.isabstract(drivers.AbstractDriver)
    assert not inspect.isabstract(drivers.QemuGuestAgentDriver)
    assert drivers.AbstractDriver.__abstractmethods__ == set(ABSTRACT.split())
    assert issubclass(vmrm.ScheduleDbTimeoutError, Exception)


def test_the_event_types_have_the_documented_values() -> None:
    assert issubclass(vmrm.ScheduleEventType, enum.Enum)
    assert {member.name: member.value for member in vmrm.ScheduleEventType} == {
        "EXPERIMENT_START_TIME_SET": 0,
        "EMPTY_SCHEDULE": 1,
        "NEW_ITEM": 2,
        "TRANSFER": 3,
        "EXIT": 4,
        "PAUSE": 5,
        "RESUME": 6,
        "UNKNOWN": 7,
    }


# === The functions, as a script uses them: on the default database ===============================


@pytest.fixture
def default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a database of this test's own the default one."""
    path = tmp_path / "default" / "vmrm.db"
    monkeypatch.setenv("VMRM_DB", str(path))
    return path


def test_a_script_needs_no_more_than_the_functions(default: Path) -> None:
    vmrm.add_vm("u-1", "web", "10.0.0.1")
    vmrm.add_vm("u-2", "plain", "10.0.0.2", use_vm_manager=False)
    assert vmrm.get_vm_states() == {"web": "uninitialized", "plain": "n/a"}
    assert vmrm.get_vm_states(filter_state="n/a") == {"plain": "n/a"}
    assert vmrm.get_vm_times() == {"web": "", "plain": ""}
    assert vmrm.get_vm_count_not_ready() == 1
    launched = vmrm.set_experiment_launch_time()
    assert launched == vmrm.get_experiment_launch_time()
    vmrm.set_vm_state("u-1", "configuring")
    vmrm.set_vm_time("u-1", "-10")
    assert vmrm.get_vm_times(filter_time=-10) == {"web": "-10"}
    assert vmrm.get_experiment_start_time() is None
    vmrm.set_vm_state("u-1", "configured")
    start = vmrm.get_experiment_start_time()
    assert isinstance(start, datetime)
    assert start.tzinfo is UTC
    assert start.microsecond == 0
    assert vmrm.add_experiment_start_time() == start
    assert vmrm.get_experiment_time_to_start() == int((start - launched).total_seconds())
    assert vmrm.get_experiment_time_since_start() is None
    assert vmrm.get_vm_count_not_ready() == 0
    assert default.exists()


def test_destroy_all_clears_vms_schedules_and_times(default: Path) -> None:
    vmrm.add_vm("u-1", "web", "")
    with vmrm.ScheduleDb() as schedules:
        schedules.put("web", "[]", "10.0.0.1")
    vmrm.set_experiment_launch_time()
    vmrm.add_experiment_start_time()
    vmrm.destroy_all()
    assert vmrm.get_vm_states() == {}
    assert vmrm.get_experiment_launch_time() is None
    assert vmrm.get_experiment_start_time() is None
    with vmrm.ScheduleDb() as schedules:
        assert schedules.list_all() == []


def test_files_are_added_and_listed_by_name(default: Path, tmp_path: Path) -> None:
    assert vmrm.vm_resource_list() == []
    (tmp_path / "setup.sh").write_text("echo hi\n")
    vmrm.add_vm_resource_file(str(tmp_path / "setup.sh"))
    vmrm.add_vm_resource_file(str(tmp_path / "setup.sh"))
    assert vmrm.vm_resource_list() == ["setup.sh"]
    with pytest.raises(FileNotFoundError):
        vmrm.add_vm_resource_file(str(tmp_path / "none"))


def test_a_given_object_is_used_instead_of_the_default(default: Path, tmp_path: Path) -> None:
    with vmrm.Database(tmp_path / "own.db") as own:
        mapping, start = vmrm.VMMapping(db=own), vmrm.ExperimentStart(db=own)
        log = logging.getLogger("test")
        vmrm.add_vm("u-1", "web", "", True, mapping, log)
        assert vmrm.get_vm_states(None, mapping, log) == {"web": "uninitialized"}
        vmrm.set_vm_state("u-1", "configuring", mapping, log)
        vmrm.set_vm_time("u-1", "-1", mapping, log)
        vmrm.set_experiment_launch_time(start)
        vmrm.destroy_all(mapping, vmrm.ScheduleDb(db=own), start, log, True)
        assert vmrm.get_experiment_launch_time(start) is None
    assert not default.exists()


@pytest.fixture
def unusable(tmp_path: Path) -> Path:
    path = tmp_path / "notes.txt"
    path.write_text("no database " * 100)
    return path


def test_a_database_that_cannot_be_opened_is_the_documented_error(unusable: Path) -> None:
    mapping = vmrm.VMMapping(db=unusable)
    with pytest.raises(RuntimeError, match=r"notes\.txt"):
        vmrm.set_vm_state("u", "failed", mapping)
    with pytest.raises(RuntimeError, match=r"notes\.txt"):
        vmrm.set_vm_time("u", "1", mapping)
    for path in (unusable, Path("/proc/nowhere/lab.db")):
        mapping = vmrm.VMMapping(db=path)
        with pytest.raises(ConnectionError, match=path.name):
            vmrm.destroy_all(mapping)
        vmrm.destroy_all(mapping, ignore_grpc_connection_errors=True)


def test_states_that_do_not_exist_and_moves_that_may_not_be_are_value_errors(
    default: Path,
) -> None:
    vmrm.add_vm("u", "web", "")
    for state in ("ready", "configured"):
        with pytest.raises(ValueError, match=f"'{state}'"):
            vmrm.set_vm_state("u", state)


# === The classes =================================================================================


@pytest.mark.parametrize("cls", [vmrm.VMMapping, vmrm.ExperimentStart])
def test_host_and_port_are_accepted_and_db_is_the_database(
    cls: Callable[..., Any], tmp_path: Path
) -> None:
    for made in (cls("localhost", 50051, tmp_path / "a.db"), cls(db=str(tmp_path / "a.db"))):
        assert made.db.path == tmp_path / "a.db"
        assert made.db.value("SELECT count(*) FROM vms") == 0
        made.close()
        made.close()


def test_the_reference_wants_a_uuid_and_a_name(default: Path) -> None:
    with vmrm.VMMapping() as mapping:
        for entry in ({"server_uuid": "u"}, {"server_name": "web"}, {}):
            with pytest.raises(ValueError, match="a VM needs a server_"):
                mapping.prepare_put(entry)
        with pytest.raises(ValueError, match="server_uuid is required"):
            mapping.get()
        prepared = mapping.prepare_put({"server_uuid": "u", "server_name": "web"})
        mapping.batch_put([prepared])
        assert mapping.get("u")["state"] == "uninitialized"


@pytest.mark.parametrize("name", [None, 5, "", b"schedules"])
def test_a_cache_name_that_is_none_is_a_runtime_error(name: Any) -> None:
    with pytest.raises(RuntimeError, match="cache_name"):
        vmrm.ScheduleDb(name)


def test_an_entry_refuses_what_the_reference_says() -> None:
    with pytest.raises(ValueError, match="start_time 0"):
        vmrm.ScheduleEntry(0)
    entry = vmrm.ScheduleEntry(5)
    with pytest.raises(RuntimeError, match="not a string"):
        entry.set_executable(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="neither a string nor a list"):
        entry.append_arguments(5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not positive"):
        entry.add_pause(0)
    entry.add_pause(math.inf)
    assert (entry.executable, entry.arguments, entry.ignore_failure) == (None, None, False)
    assert isinstance(entry.data, list)


def test_an_event_gives_back_what_it_was_made_of_and_never_decides_an_order() -> None:
    event = vmrm.ScheduleEvent(vmrm.ScheduleEventType.NEW_ITEM, "data")
    other = vmrm.ScheduleEvent(vmrm.ScheduleEventType.EXIT, None)
    assert (event.get_type(), event.get_data()) == (vmrm.ScheduleEventType.NEW_ITEM, "data")
    assert event < other
    assert other < event
    assert event < 5


# === ScheduleUpdater =============================================================================

Events = "queue.PriorityQueue[tuple[float, vmrm.ScheduleEvent]]"


@pytest.fixture
def schedules(tmp_path: Path) -> Iterator[vmrm.ScheduleDb]:
    with vmrm.ScheduleDb(db=tmp_path / "lab.db") as opened:
        yield opened


@pytest.fixture
def updater(schedules: vmrm.ScheduleDb) -> vmrm.ScheduleUpdater:
    log = logging.getLogger("test")
    events: Events = queue.PriorityQueue()
    return vmrm.ScheduleUpdater(
        {"vm_name": "web"}, events, threading.Condition(), None, schedules, None, log, None, 1.0,
        interval_time=0.02,
    )  # fmt: skip


def news(updater: vmrm.ScheduleUpdater) -> list[tuple[float, str]]:
    """Look once; return what that put on the queue: priority and type."""
    updater._run()
    found = []
    while not updater.priority_queue.empty():
        priority, event = updater.priority_queue.get_nowait()
        found.append((priority, event.get_type().name))
    return found


SCHEDULE = """[{"start_time": -5, "executable": "a"}, {"start_time": 7, "pause": 5},
{"start_time": 8, "transfer": [{"location": "/x"}]}, {"start_time": 9, "resume": true}]"""


def test_an_updater_tells_everything_once(
    updater: vmrm.ScheduleUpdater, schedules: vmrm.ScheduleDb
) -> None:
    assert news(updater) == [(-math.inf, "EMPTY_SCHEDULE")]
    assert news(updater) == []
    schedules.put("web", SCHEDULE, "")
    assert news(updater) == [(-5, "NEW_ITEM"), (7, "PAUSE"), (8, "TRANSFER"), (9, "RESUME")]
    assert updater.get_start_time() is None
    start = vmrm.ExperimentStart(db=schedules.db).add_start_time()
    assert updater.get_start_time() == start.timestamp()
    assert news(updater) == [(0, "EXPERIMENT_START_TIME_SET")]
    schedules.put("web", SCHEDULE, "")
    assert news(updater) == []
    longer = SCHEDULE[:-1] + ', {"start_time": 20, "executable": "b"}]'
    schedules.put("web", longer, "")
    assert news(updater) == [(20, "NEW_ITEM")]
    assert news(updater) == []


def test_an_updater_gives_a_vms_entries_or_a_runtime_error(
    updater: vmrm.ScheduleUpdater, schedules: vmrm.ScheduleDb
) -> None:
    assert updater.get_schedule("web") == []
    schedules.put("web", SCHEDULE, "")
    entries = updater.get_schedule("web")
    assert [entry.start_time for entry in entries] == [-5, 7, 8, 9]
    assert all(isinstance(entry, vmrm.ScheduleEntry) for entry in entries)
    schedules.db.write("""UPDATE schedules SET text = '[{"start_time": 0}]'""")
    with pytest.raises(RuntimeError, match="the schedule of VM 'web' cannot be read"):
        updater.get_schedule("web")


def test_an_updater_as_a_thread_notifies_who_waits_and_stops_when_told(
    updater: vmrm.ScheduleUpdater, schedules: vmrm.ScheduleDb
) -> None:
    """The schedule's database was used by this thread before, as in any script."""
    schedules.put("web", SCHEDULE, "")
    with updater.condition:
        updater.start()
        assert updater.condition.wait(20)
    found = [updater.priority_queue.get(timeout=20)[0] for _ in range(4)]
    assert found == [-5, 7, 8, 9]
    updater.stop_thread()
    updater.join(20)
    assert not updater.is_alive()
    assert schedules.get("web") == SCHEDULE, "and it is still of use here"


# === Drivers =====================================================================================


def test_a_driver_without_a_path_is_file_not_found() -> None:
    log = logging.getLogger("test")
    for config in ({}, {"path": ""}):
        with pytest.raises(FileNotFoundError):
            drivers.QemuGuestAgentDriver(config, log)
    with pytest.raises(TypeError, match="abstract"):
        drivers.AbstractDriver({"path": "/x"}, log)  # type: ignore[abstract]


def test_an_agent_that_is_not_there_is_an_os_error(tmp_path: Path) -> None:
    config = {"path": str(tmp_path / "none.sock"), "name": "web"}
    driver = drivers.QemuGuestAgentDriver(config, logging.getLogger("test"))
    with pytest.raises(OSError, match=r"none\.sock"):
        driver.connect(timeout=0.1)
    assert driver.ping(timeout=0.1) is False
    driver.close()


@pytest.mark.parametrize("name", sorted(ABSTRACT.split()))
def test_what_a_driver_must_bring_itself_is_not_implemented(name: str, tmp_path: Path) -> None:
    config = {"path": str(tmp_path / "none.sock")}
    driver = drivers.QemuGuestAgentDriver(config, logging.getLogger("test"))
    method = getattr(drivers.AbstractDriver, name)
    needed = [p for p in inspect.signature(method).parameters.values() if p.default is p.empty]
    given = [driver if p.name == "self" else "x" for p in needed]
    with pytest.raises(NotImplementedError):
        method(*given)


def test_the_engine_of_the_guest_agents_driver_is_qemu() -> None:
    assert drivers.QemuGuestAgentDriver.get_engine() == "QemuVM"


# === The handler, without an agent ===============================================================


@pytest.fixture
def handler(tmp_path: Path) -> Iterator[vmrm.VMResourceHandler]:
    with vmrm.Database(tmp_path / "lab.db") as db:
        vmrm.VMMapping(db=db).put("u", "web", path=str(tmp_path / "none.sock"))
        config = {**vmrm.handler_config(db, "web"), "agent_timeout": 0.1}
        yield vmrm.VMResourceHandler(config)


def test_a_handler_finds_the_driver_of_its_engine(handler: vmrm.VMResourceHandler) -> None:
    assert handler._import_drivers() >= {drivers.QemuGuestAgentDriver}
    assert handler.import_driver() is drivers.QemuGuestAgentDriver
    assert handler._check_driver(drivers.QemuGuestAgentDriver)
    for other in (drivers.AbstractDriver, object, 5, None):
        assert not handler._check_driver(other)


def test_a_handler_that_reaches_no_agent_says_so(handler: vmrm.VMResourceHandler) -> None:
    assert handler.connect_to_driver() is False


def test_a_handler_records_state_and_time_and_stops_with_a_code(
    handler: vmrm.VMResourceHandler,
) -> None:
    handler.set_state("configuring")
    handler.set_current_time(-10)
    row = handler.mapping.get("u")
    assert (row["state"], row["current_time"]) == ("configuring", "-10")
    with pytest.raises(ValueError, match="cannot move"):
        handler.set_state("n/a")
    with pytest.raises(SystemExit) as caught:
        handler.stop(3)
    assert caught.value.code == 3


def test_a_handler_takes_events_off_its_queue_in_order(handler: vmrm.VMResourceHandler) -> None:
    for at in (5, -3, 5, 1):
        event = vmrm.ScheduleEvent(vmrm.ScheduleEventType.NEW_ITEM, at)
        handler.updater.enqueue_event(at, event)
    assert [event.get_data() for event in handler.get_events()] == [-3, 1, 5, 5]
    assert handler.get_events() == []


@pytest.mark.parametrize("location", ["relative/path", "", "~"])
def test_a_transfer_of_a_path_that_is_not_absolute_is_a_runtime_error(
    handler: vmrm.VMResourceHandler, location: str
) -> None:
    with pytest.raises(RuntimeError, match="absolute"):
        handler.transfer_data("x", location)


def test_a_pool_does_what_the_reference_says(default: Path) -> None:
    pool = vmrm.VmManager({"build_groups": {0: {"max_vm_per_user": 1}, 1: {}}})
    logger = logging.getLogger("mine")
    pool.set_logger(logger)
    assert pool.log is logger
    assert pool.vm_groups == [0, 1]
    vm = pool.add_vm_to_pool("192.0.2.1", "vm-a", 0)
    assert isinstance(vm, vmrm.VmDescriptor)
    assert (vm.vm_ip, vm.vm_name, vm.group, vm.state) == ("192.0.2.1", "vm-a", 0, "got_ip")
    with pytest.raises(vmrm.VmError):
        pool.add_vm_to_pool("192.0.2.1", "vm-a", 0)
    assert pool.get_vm_by_name("vm-a") == vm
    assert pool.lookup_vms_by_ip("192.0.2.1") == [vm]
    assert pool.lookup_vms_by_ip("192.0.2.2") == []
    assert pool.get_all_vm() == pool.get_all_vm_in_group(0) == [vm]
    assert pool._load_multi_safe(["vm-b", "vm-a"]) == [vm]
    assert pool.get_vm_by_group_and_state_list(None, [vmrm.VmStates.GOT_IP]) == [vm]
    assert pool.get_vm_by_group_and_state_list(1, [vmrm.VmStates.GOT_IP]) == []
    pool.mark_vm_check_failed("vm-a")
    assert pool.get_vm_by_name("vm-a").check_fails == 1
    assert pool.get_ready_vms(0) == []
    with pytest.raises(vmrm.NoVmAvailable):
        pool.acquire_vm([0, 1], "ann", "sandbox", os.getpid())
    pool.mark_server_start()
    with pool.db.transaction():
        vmrm.move_pool_vm(pool.db, "vm-a", vmrm.VmStates.CHECK_HEALTH)
    pool.mark_vm_checked("vm-a")
    assert [vm.vm_name for vm in pool.get_ready_vms(0)] == ["vm-a"]
    assert pool.can_user_acquire_more_vm("ann", 0) is True
    taken = pool.acquire_vm([1, 0], "ann", "sandbox", os.getpid(), 17, 18, "fedora-42")
    assert (taken.vm_name, taken.state) == ("vm-a", vmrm.VmState.IN_USE)
    assert pool.can_user_acquire_more_vm("ann", 0) is False
    assert pool.get_vm_by_task_id(17) == taken
    assert pool.get_vm_by_task_id(99) is None
    assert "vm-a" in pool.info()
    assert pool.release_vm("vm-a") is True
    with pytest.raises(vmrm.VmError):
        pool.remove_vm_from_pool("vm-a")
    with pytest.raises(vmrm.VmError):
        pool.start_vm_termination("vm-a", allowed_pre_state=vmrm.VmStates.IN_USE)
    pool.start_vm_termination("vm-a", allowed_pre_state=vmrm.VmStates.READY)
    pool.remove_vm_from_pool("vm-a")
    assert pool.get_all_vm() == []
    assert pool.read_vm_pool_info(0, "spawned") is None
    pool.write_vm_pool_info(0, "spawned", 5)
    assert pool.read_vm_pool_info(0, "spawned") == "5"
    pool.close()

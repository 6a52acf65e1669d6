"""What one guest or one file can do to the host: every listing, output and archive has bounds.

The hostile guest is an agent like any other; the programs that our scripts call there lie.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from agents import connected, drivers, stand_in
from hostile import Asked, hostile
from lab import ROOT, Lab
from lab import stand_ins as lab_agents

import vmrm

MIB = 1 << 20


@pytest.fixture
def replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Make a program, as agents started from now on see it, do what a script of ours does."""

    def replace(name: str, script: str) -> None:
        folder = tmp_path / "bin"
        folder.mkdir()
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    return replace


@pytest.fixture
def lying_find(replaced: Callable[[str, str], None]) -> Callable[[str], None]:
    """Make `find` print what a Python program prints."""
    head = f"#!{sys.executable}\nimport sys, os\nout = sys.stdout.buffer\n"
    return lambda program: replaced("find", f"{head}{program}\n")


def transfer(**more: Any) -> list[dict[str, Any]]:
    """Return a schedule that fetches the root, of which nothing but the hostile list is read."""
    return [{"start_time": 0.1, "transfer": [{"location": "/", **more}]}]


@contextmanager
def lab_of(folder: Path, schedule: list[dict[str, Any]]) -> Iterator[Lab]:
    """Yield a lab of one VM with a schedule, loaded."""
    lab = Lab(folder)
    with lab_agents(folder / "agents", 1):
        loaded = lab.run("load", str(lab.write(lambda guest: schedule)))
        assert loaded.returncode == 0, loaded.stderr
        yield lab


def log_of(lab: Lab) -> str:
    """Return the VM's log."""
    return (lab.folder / "lab.db.d" / "logs.1" / "vm1.log").read_text()


def copies(lab: Lab) -> Path:
    """Return where the VM's files arrive."""
    return lab.folder / "lab.db.d" / "transfers.1" / "vm1"


# === Listings ====================================================================================


def test_a_name_of_megabytes_is_cut_wherever_it_is_told(
    tmp_path: Path, lying_find: Callable[[str], None]
) -> None:
    lying_find('out.write(b"f 644 5 1 9 /" + b"A\\x1b" * (5 << 20) + b"\\0")')
    with lab_of(tmp_path, transfer()) as lab:
        done = lab.run("run")
        assert done.returncode == 1
        (row,) = json.loads(lab.run("schedule", "show", "vm1", "--json").stdout)
        assert row["outcome"] == "failed"
        assert "over 4096 bytes" in row["error"]  # the reason is not what was cut
        assert len(row["error"]) <= 1000
        page = tmp_path / "page.html"
        assert lab.run("report", str(page)).returncode == 0
        told = done.stdout + done.stderr + lab.run("logs", "vm1").stdout
        assert len(told) < 20_000
        assert page.stat().st_size < 200_000
        assert len(log_of(lab)) < 20_000


def test_a_name_of_megabytes_that_the_agent_answers_is_cut() -> None:
    error = drivers.AgentError("GenericError", "no\x1b[2J" + "x" * (10 << 20), "guest-exec")
    assert len(str(error)) <= 1000
    assert str(error).endswith("…")
    assert "\x1b" not in str(error)


def test_what_a_guest_tells_of_itself_is_cut(tmp_path: Path) -> None:
    long = "n\x1b" * 20_000  # longer ones are refused as a whole
    address = {"ip-address": long, "ip-address-type": "ipv4", "prefix": 24}
    interface = {"name": "eth0", "ip-addresses": [address] * 3}
    lab = Lab(tmp_path)
    with stand_in(tmp_path / "agent") as honest, hostile(honest.path, tmp_path / "h") as guest:
        guest.rules["guest-get-host-name"] = lambda asked: [asked.line({"host-name": long})]
        guest.rules["guest-network-get-interfaces"] = lambda asked: [asked.line([interface])]
        with vmrm.Database(lab.db) as db:
            vmrm.VMMapping(db=db).put("u", "vm", path=str(guest.path))
        told = lab.run("info", "vm")
    assert told.returncode == 0, told.stderr
    assert "host_name\tn" in told.stdout or "host_name\tunknown" in told.stdout
    assert len(told.stdout) < 10_000
    assert "\x1b" not in told.stdout


@pytest.mark.parametrize(
    ("text", "limit", "told"),
    [
        ("as it is: ü€😀", 100, "as it is: ü€😀"),
        ("a\n\t b\r\n", 100, "a b"),
        (b"a\xff\0\x9b31m", 100, "a�\\u0000�31m"),
        ("\x1b\x9b\u202e\ud800", 100, "\\u001b\\u009b\\u202e\\ud800"),
        ("x" * 101, 100, "x" * 99 + "…"),
        (" " * 5000 + "x", 100, "…"),
        ("\x1b" * 100, 100, "\\u001b" * 16 + "\\u0…"),
    ],
)
def test_text_of_a_guest_is_one_printable_line(text: str, limit: int, told: str) -> None:
    assert drivers.printable(text, limit) == told


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ('out.write(b"".join(b"d 755 0 1 9 /many/%d\\0" % n for n in range(300_000)))', "too many"),
        ('out.write(b"\\0" * 12_000_000 + b"d 755 0 1 9 /many/1\\0")', "too many"),
        ('out.write(b"d 755 0 1 9 " + b"/d" * 1500 + b"\\0")', "128 directories deep"),
        ('out.write(b"d 755 0 1 9 /" + b"d" * 5000 + b"\\0")', "over 4096 bytes"),
        ('out.write(b"x" * (17 << 20))', "too many"),
    ],
)
def test_a_listing_is_bounded_in_count_length_and_depth(
    tmp_path: Path, lying_find: Callable[[str], None], program: str, why: str
) -> None:
    lying_find(program)
    words = [sys.executable, "-c", ONE_TRANSFER, str(tmp_path)]
    with stand_in(tmp_path / "agent"):
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert why in told["error"]
    assert len(told["error"]) < 1000
    assert told["peak_mib"] < 500
    made = [path for path in (tmp_path / "out").rglob("*") if path.is_dir()]
    assert len(made) <= 1  # that of the VM at most


# One transfer of a handler without schedule, and what its process needed for it.
ONE_TRANSFER = """
import json, pathlib, re, sys
import vmrm
folder = pathlib.Path(sys.argv[1])
with vmrm.Database(folder / "lab.db") as db:
    vmrm.VMMapping(db=db).put("u", "vm", path=str(folder / "agent" / "agent.sock"))
    handler = vmrm.VMResourceHandler(vmrm.handler_config(db, "vm"))
    assert handler.connect_to_driver()
    try:
        handler.transfer_data("one", "/", destination=str(folder / "out"))
        error = ""
    except RuntimeError as fault:
        error = str(fault)
    handler.driver.close()
# Not by getrusage, whose peak counts that of the process that started this one.
kib = re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]
peak = int(kib) / 1024
print(json.dumps({"error": error, "peak_mib": peak}))
"""


def test_new_bad_names_at_every_pass_do_not_fill_the_log(
    tmp_path: Path, lying_find: Callable[[str], None]
) -> None:
    lying_find(
        f"open({str(tmp_path / 'passes')!r}, 'a').write('x')\n"
        'out.write(b"".join(b"f 644 0 1 9 /%s/../b\\0" % os.urandom(8).hex().encode()'
        " for n in range(3000)))"
    )
    with lab_of(tmp_path, transfer(interval=0.1)) as lab:
        with lab.start("run", "--stay") as run:
            wait_until((tmp_path / "passes").exists)
            wait_until(lambda: (tmp_path / "passes").stat().st_size > 4)
            assert lab.run("stop").returncode == 0
            run.communicate(timeout=60)
        faults = [line for line in log_of(lab).splitlines() if "leads out" in line]
        assert 10 < len(faults) <= 100
        assert log_of(lab).count("no more faults") == 1
        assert len(log_of(lab)) < 50_000


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until something is so."""
    deadline = vmrm.CLOCK.monotonic() + seconds
    while not condition():
        assert vmrm.CLOCK.monotonic() < deadline
        drivers.plain_wait(-1, 0, 0.02)


def test_a_handler_leaves_in_the_middle_of_a_long_listing(
    tmp_path: Path, lying_find: Callable[[str], None]
) -> None:
    lying_find('out.write(b"".join(b"d 755 0 1 9 /a/b/c/d/%d\\0" % n for n in range(100_000)))')
    with lab_of(tmp_path, transfer()) as lab:
        with lab.start("run") as run:
            made = copies(lab) / "a" / "b" / "c" / "d"
            wait_until(made.exists)
            with vmrm.Database(lab.db) as db:
                vmrm.halt_experiment(db, vmrm.Halt.STOP)
            run.communicate(timeout=60)
        assert "leaving: told to stop" in log_of(lab)  # it had not to be killed
        assert sum(1 for _ in os.scandir(made)) < 90_000
        assert lab.run("destroy", "--yes", "--purge").returncode == 0


def test_a_tree_of_any_depth_is_purged(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    lab = Lab(tmp_path)
    # What is left here would break the cleaning up of later runs.
    request.addfinalizer(lambda: subprocess.run(["rm", "-rf", f"{lab.db}.d"], check=True))
    lab.write(lambda guest: transfer())
    assert lab.run("load", str(tmp_path / "lab.json")).returncode == 0
    top = copies(lab)
    top.mkdir(parents=True)
    folder = os.open(top, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("d", dir_fd=folder)
        below = os.open("d", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = below
    with os.fdopen(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=folder), "w") as file:
        file.write("x")
    os.symlink("/etc", "link", dir_fd=folder)
    os.close(folder)
    done = lab.run("destroy", "--yes", "--purge")
    assert (done.returncode, done.stderr) == (0, "")
    assert not [path for path in (tmp_path / "lab.db.d").iterdir() if "transfers" in path.name]
    assert Path("/etc/passwd").exists()


# === Output ======================================================================================


def handled(lab: Lab, limit: int) -> None:
    """Take the VM of a lab through its negative time with another bound of its output."""
    call = f"import sys, vmrm; vmrm.MAX_OUTPUT_BYTES = {limit}; sys.exit(vmrm.main(sys.argv[1:]))"
    words = [sys.executable, "-c", call, "--db", str(lab.db), "handle", "vm1"]
    environment = os.environ | {"VMRM_TIMEOUT_SCALE": "0.2"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr


def prints(words: str) -> list[dict[str, Any]]:
    """Return a schedule of one program, a line of sh."""
    return [{"start_time": -1, "executable": "sh", "arguments": ["-c", words]}]


def sizes(lab: Lab) -> dict[str, int]:
    """Return the bytes of each log and output of the VM."""
    logs = lab.folder / "lab.db.d" / "logs.1"
    paths = [*logs.glob("vm1.*"), *(logs / "vm1").iterdir()]
    return {path.name: path.stat().st_size for path in paths}


@pytest.mark.parametrize(
    "words",
    [
        "head -c 1500000 /dev/zero | tr '\\0' '\\n'",  # 46 bytes of the log for each
        "head -c 1500000 /dev/zero",  # 6 for each
        "yes '{}' | head -c 1500000",  # in both logs
    ],
)
def test_what_is_logged_of_an_output_is_bounded_as_the_output_is(
    tmp_path: Path, words: str
) -> None:
    with lab_of(tmp_path, prints(words)) as lab:
        handled(lab, 2 * MIB)
        found = sizes(lab)
        assert found["1.1.out"] == 1_500_000  # all of it is here
        # One piece of 128 KiB may come on top, at 46 times its size.
        assert 2 * MIB < found["vm1.log"] + found.get("vm1.json", 0) < 9 * MIB
        assert log_of(lab).count("is longer than is logged") == 1
        (row,) = json.loads(lab.run("schedule", "show", "vm1", "--json").stdout)
        assert (row["outcome"], row["error"]) == ("done", "")


def test_an_output_of_the_largest_size_is_kept_and_told_to_be_cut(tmp_path: Path) -> None:
    with lab_of(tmp_path, prints("head -c 3000000 /dev/zero | tr '\\0' x")) as lab:
        handled(lab, 2 * MIB)
        found = sizes(lab)
        assert found["1.1.out"] == 2 * MIB
        assert found["vm1.log"] < 3 * MIB
        (row,) = json.loads(lab.run("schedule", "show", "vm1", "--json").stdout)
        assert (row["outcome"], row["exit_code"]) == ("done", 0)
        assert "it wrote over 2097152 bytes" in row["error"]


def test_the_json_log_is_json_whatever_a_program_prints(tmp_path: Path) -> None:
    good = ['{"x": 1e999}', '{"a":"\\u001b", "b":[1.50, 1E2]}', '\t{"tab": 1}\t', '{"c1": "\x9b"}']
    bad = ['{"x": NaN}', '{"x": [-Infinity]}', '{"x": {"y": Infinity}}', "{x: 1}", '{"a": 1}, {}']
    output = tmp_path / "output"
    output.write_text("\n".join([*bad, *good]) + "\n")
    with lab_of(tmp_path, prints(f"cat {output}")) as lab:
        handled(lab, MIB)
        lines = (lab.folder / "lab.db.d" / "logs.1" / "vm1.json").read_text().splitlines()
        assert ["\x9b" in line or "NaN" in line or "Infinity" in line for line in lines] == [
            False for _ in good
        ]
        assert [json.loads(line)["output"] for line in lines] == [json.loads(line) for line in good]
        assert '"b":[1.50, 1E2]' in lines[1]  # numbers as they were written


# === The handler's loop ==========================================================================


def shown(lab: Lab) -> list[dict[str, Any]]:
    """Return the VM's entries."""
    return list(json.loads(lab.run("schedule", "show", "vm1", "--json").stdout))


def test_what_is_due_starts_while_others_are_laid_out(
    tmp_path: Path, replaced: Callable[[str, str], None]
) -> None:
    """The guest's part of laying out waits here for the entry that is due meanwhile."""
    replaced(
        "readlink",
        f"""#!/bin/sh
PATH=${{PATH#*:}}; cd {tmp_path}
if mv armed waiting 2>/dev/null; then
    echo begin >> order
    n=0; while [ ! -e released ] && [ $n -lt 600 ]; do sleep 0.1; n=$((n + 1)); done
    echo end >> order
fi
cd "$OLDPWD"; exec readlink "$@"
""",
    )
    due = f"cd {tmp_path}; echo due >> order; touch released"
    with lab_of(tmp_path, timed(due, 6)) as lab:
        later = tmp_path / "later.json"
        later.write_text(json.dumps(timed("true", 7)))
        with lab.start("run", VMRM_TIMEOUT_SCALE="1") as run:
            wait_until(lambda: shown(lab)[0]["planned"] is not None)
            (tmp_path / "armed").touch()
            assert lab.run("schedule", "add", "vm1", str(later)).returncode == 0
            run.communicate(timeout=120)
        assert sorted((tmp_path / "order").read_text().split()) == ["begin", "due", "end"]
        assert "trouble with the agent" not in log_of(lab)  # nobody waited for it in vain
        assert [row["outcome"] for row in shown(lab)] == ["done", "done"]


def timed(words: str, at: float) -> list[dict[str, Any]]:
    """Return a schedule of one program at a time."""
    return [prints(words)[0] | {"start_time": at}]


def test_a_command_is_carried_out_while_a_transfer_looks_at_unchanged_files(
    tmp_path: Path, lying_find: Callable[[str], None]
) -> None:
    path = tmp_path / "agents" / "1" / "data"
    lying_find(
        f"at = int(os.stat({str(path)!r}).st_mtime)\n"
        "out.write(b'd 755 0 1 9 /begun\\0')\n"
        f"out.write((b'f 644 1 %d %d ' % (at, at + 100) + {os.fsencode(path)!r} + b'\\0') * 80_000)"
    )
    with lab_of(tmp_path, transfer()) as lab:
        path.write_text("x")
        with lab.start("run") as run:
            wait_until((copies(lab) / "begun").exists)
            assert lab.run("exec", "vm1", "true").returncode == 0
            assert shown(lab)[0]["outcome"] == "running"
            run.communicate(timeout=120)
        assert run.returncode == 0


# === What is cut, noticed, kept ==================================================================


def test_output_that_the_agent_has_cut_is_told_whatever_its_flag_says(tmp_path: Path) -> None:
    def contrary(asked: Asked) -> Iterator[bytes]:
        truth = asked.truth()
        if "out-data" in truth:
            truth["out-truncated"] = False  # as agents before 10.2 say of what they have cut
        yield asked.line(truth)

    size = 17 * MIB
    lab = Lab(tmp_path)
    with stand_in(tmp_path / "agent") as honest, hostile(honest.path, tmp_path / "h") as guest:
        guest.rules["guest-exec-status"] = contrary
        with vmrm.Database(lab.db) as db:
            vmrm.VMMapping(db=db).put("u", "vm", path=str(guest.path))
        done = lab.run("exec", "vm", "head", "-c", str(size), "/dev/zero")
        assert done.returncode == 0, done.stderr
        assert len(done.stdout) == size or "16 MiB" in done.stderr
        assert len(done.stdout) >= 16 * MIB
        with connected(guest.path) as driver:
            cut = driver.run(["head", "-c", str(size), "/dev/zero"])
            whole = driver.run(["head", "-c", str(MIB), "/dev/zero"])
        assert (cut.out_truncated, len(cut.out)) == (True, 16 * MIB)
        assert (whole.out_truncated, len(whole.out)) == (False, MIB)


def test_a_file_that_changes_to_equal_size_within_the_second_of_its_copy_is_noticed(
    tmp_path: Path,
) -> None:
    """The program changes each of five files when its copy is there, and sets its time back.

    Five, for a host that rests two seconds at the wrong instant makes a file an old one.
    """
    data, out = tmp_path / "agents" / "1" / "data", tmp_path / "out"
    copied = out / "vm1" / str(data)[1:]
    words = f"""
        for n in 1 2 3 4 5; do
            echo one > {data}/$n
            until [ -e {copied}/$n ]; do touch {data}/$n; sleep 0.05; done
            echo two > {data}/$n; touch -r {copied}/$n {data}/$n
        done"""
    watching = [{"location": str(data), "interval": 0.2, "destination": str(out)}]
    schedule = [{"start_time": 0.1, "transfer": watching}, *timed(words, 0.2)]
    with lab_of(tmp_path, schedule) as lab:
        data.mkdir()
        done = lab.run("run")
        assert done.returncode == 0, done.stderr
    assert "two\n" in [(copied / str(n)).read_text() for n in range(1, 6)]


def test_a_transfer_keeps_free_space_on_the_hosts_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m,mode=700", "vmrm-test", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    data = tmp_path / "agents" / "1" / "data"
    schedule = [
        {
            "start_time": 0.1,
            "transfer": [{"location": str(data), "destination": str(disk)}],
        }
    ]
    try:
        with lab_of(tmp_path, schedule) as lab:
            data.mkdir()
            (data / "small").write_bytes(bytes(MIB))
            (data / "large").write_bytes(bytes(14 * MIB + 600_000))  # it would just fit
            assert lab.run("run").returncode == 1
            (row,) = shown(lab)
            assert "large" in row["error"]
            assert "no space on the host" in row["error"]
            kept = [path for path in disk.rglob("*") if path.is_file()]
            assert [(path.name, path.stat().st_size) for path in kept] == [("small", MIB)]
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_copies_are_never_writable_by_others_even_under_umask_0(tmp_path: Path) -> None:
    data, out = tmp_path / "agents" / "1" / "data", tmp_path / "out"
    locations = [{"location": str(data), "destination": str(out)}, {"location": str(data)}]
    with lab_of(tmp_path, [{"start_time": 0.1, "transfer": locations}]) as lab:
        (data / "below").mkdir(parents=True)
        (data / "below" / "file").write_text("x")
        (data / "below" / "file").chmod(0o666)
        (data / "below").chmod(0o777)
        old = os.umask(0)
        try:
            done = lab.run("run")
        finally:
            os.umask(old)
        assert done.returncode == 0, done.stderr
    made = [out, *out.rglob("*")]
    assert len(made) > 4
    for path in made:
        assert not stat.S_IMODE(path.stat().st_mode) & 0o022, path
    private = [tmp_path / "lab.db", tmp_path / "lab.db.d", *(tmp_path / "lab.db.d").iterdir()]
    for path in private:
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path

"""Real micro virtual machines for the tests: a builder, a runner and a bare agent client.

One guest is QEMU with Debian's cloud kernel and an initramfs of busybox, the real ``qemu-ga`` and
the few modules it needs; a small ext4 disk at ``/var`` survives a reboot. It answers after a few
seconds without hardware virtualisation, in about 160 MiB.

    with Guest("web", tmp_path) as guest:
        guest.wait_agent()
        ...                                  # guest.agent_path is the agent's socket

Kernel and initramfs are built once into ``tests/.cache`` (or ``$VMRM_TEST_CACHE``), under a lock,
so parallel and repeated runs share them; ``python tests/guests.py`` does only that. Nothing here
imports ``drivers``: a test that doubts the driver asks the guest through ``RawAgent``.
"""

from __future__ import annotations

import base64
import fcntl
import gzip
import hashlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

BUSYBOX = Path("/bin/busybox")
QEMU_GA = Path("/usr/sbin/qemu-ga")
KERNEL_PACKAGE = "linux-image-cloud-amd64"
TOOLS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "cpio": "cpio",
    "mkfs.ext4": "e2fsprogs",
    "ldd": "libc-bin",
    "setpriv": "util-linux",
    "dpkg-deb": "dpkg",
    "apt-get": "apt",
}
# Each module stands after those it needs. A kernel that has one built in does without the file.
MODULES = [
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_console",
    "virtio_blk",
    "crc32c_generic",
    "crc16",
    "mbcache",
    "jbd2",
    "ext4",
]
PORT = "org.qemu.guest_agent.0"
BOOT_TIMEOUT_S = 120.0
DISK_BYTES = 64 << 20

INIT = f"""\
#!/bin/busybox sh
# The kernel hands name=value words of its command line on as environment.
/bin/busybox mount -t proc proc /proc
/bin/busybox --install -s
export PATH=/sbin:/bin:/usr/sbin:/usr/bin HOME=/root
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/virtio-ports
mount -t devpts pts /dev/pts
mount -t tmpfs -o mode=755 run /run
mount -t tmpfs -o mode=1777 tmp /tmp
mkdir /run/qga
chown tester:tester /home/tester
hostname "$guest_name"
ip link set lo up
while read -r module; do insmod "/modules/$module"; done < /modules/order
if [ -b /dev/vda ]; then mount -t ext4 /dev/vda /var; fi
mkdir -p /var/tmp /var/log
chmod 1777 /var/tmp
# The driver learns a port's name from the host a moment after the port itself.
tries=0
until grep -qx {PORT} /sys/class/virtio-ports/*/name 2>/dev/null; do
    tries=$((tries + 1))
    [ $tries -le 200 ] || break
    usleep 20000
done
for port in /sys/class/virtio-ports/*; do
    ln -s "../${{port##*/}}" "/dev/virtio-ports/$(cat "$port/name")"
done
while :; do
    # Not quoted: these are words.
    /usr/sbin/qemu-ga -m virtio-serial -p /dev/virtio-ports/{PORT} -t /run/qga $agent_words
    usleep 200000
done
"""

# qemu-ga runs "shutdown -h -P|-H|-r +0 MESSAGE" (QEMU 7.2, qga/commands-posix.c).
SHUTDOWN = """\
#!/bin/sh
verb=poweroff
for word in "$@"; do
    case $word in
        -r) verb=reboot ;;
        -H) verb=halt ;;
        -P) verb=poweroff ;;
    esac
done
sync
# A program that still has files open there keeps it mounted; the journal brings it back.
umount /var 2>/dev/null
exec $verb -f
"""

ETC = {
    "passwd": "root:x:0:0:root:/root:/bin/sh\ntester:x:1000:1000:tester:/home/tester:/bin/sh\n",
    "group": "root:x:0:\ntester:x:1000:\n",
    "shadow": "root:!:19000:0:99999:7:::\ntester:!:19000:0:99999:7:::\n",
    "shells": "/bin/sh\n",
    "os-release": 'ID=vmrm-guest\nNAME=guest\nPRETTY_NAME="vmrm test guest"\nVERSION_ID=1\n',
    "hosts": "127.0.0.1 localhost\n",
}


class GuestsUnavailableError(Exception):
    """This machine cannot run micro VMs; the text says what is missing."""


class GuestError(Exception):
    """A guest, its agent or its QEMU did not do what it was asked to."""


# === Building ==================================================================================


@dataclass(frozen=True)
class Image:
    """What a guest boots."""

    kernel: Path
    initramfs: Path


def require_guests() -> None:
    """Skip the calling test where micro VMs cannot run; fail it instead if ``CI=true``."""
    import pytest  # the builder runs before pytest is installed

    try:
        image()
    except GuestsUnavailableError as error:
        refuse = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        refuse(f"no micro VMs: {error}")


def image() -> Image:
    """Return the kernel and initramfs, building what the cache does not hold.

    Raises:
        GuestsUnavailableError: a program is missing, or the kernel package cannot be had.
    """
    _check_tools()
    cache = Path(os.environ.get("VMRM_TEST_CACHE") or Path(__file__).parent / ".cache")
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kernel = cache / "kernel"
        if not kernel.exists():
            _fetch_kernel(kernel)
        initramfs = cache / f"initramfs-{_recipe(kernel)}.gz"
        if not initramfs.exists():
            _build_initramfs(initramfs, kernel)
    return Image(kernel / "vmlinuz", initramfs)


def _check_tools() -> None:
    missing = [f"{tool} ({package})" for tool, package in TOOLS.items() if not _which(tool)]
    if not QEMU_GA.exists():
        missing.append(f"{QEMU_GA} (qemu-guest-agent)")
    if missing:
        raise GuestsUnavailableError(f"not installed: {', '.join(missing)}")
    # A dynamic busybox would need its libraries, which Debian's plain package has.
    if not BUSYBOX.exists() or not _is_static(BUSYBOX):
        raise GuestsUnavailableError(f"{BUSYBOX} is missing or not static (busybox-static)")


def _which(tool: str) -> str | None:
    """Look into the administrator's folders too, which a plain user's PATH lacks."""
    return shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _is_static(program: Path) -> bool:
    return subprocess.run(["ldd", program], capture_output=True, check=False).returncode != 0


def _fetch_kernel(target: Path) -> None:
    """Take vmlinuz and our modules out of the kernel package, which is not installed."""
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        folder = Path(name)
        folder.chmod(0o755)
        depends = _tool(["apt-cache", "depends", KERNEL_PACKAGE])
        packages = [w for w in depends.split() if w.startswith("linux-image-") and "cloud" in w]
        if len(packages) < 2:
            raise GuestsUnavailableError(f"package {KERNEL_PACKAGE!r} is not known to apt")
        _tool(["apt-get", "download", "-qq", packages[1]], cwd=folder)
        _tool(["dpkg-deb", "-x", *map(str, folder.glob("*.deb")), "unpacked"], cwd=folder)
        _pick_kernel(folder / "unpacked", folder / "kernel")
        (folder / "kernel").rename(target)


def _pick_kernel(unpacked: Path, target: Path) -> None:
    target.mkdir()
    shutil.copy(next((unpacked / "boot").glob("vmlinuz-*")), target / "vmlinuz")
    tree = next((unpacked / "lib" / "modules").iterdir())
    built_in = {Path(line).stem for line in (tree / "modules.builtin").read_text().split()}
    order = [name for name in MODULES if name not in built_in]
    for name in order:
        found = next(tree.rglob(f"{name}.ko"), None)
        if found is None:
            raise GuestsUnavailableError(f"kernel {tree.name!r} has no module {name!r}")
        shutil.copy(found, target)
    (target / "order").write_text("".join(f"{name}.ko\n" for name in order))


def _recipe(kernel: Path) -> str:
    """Name everything that an initramfs is made of in one short digest."""
    digest = hashlib.sha256(f"{INIT}{SHUTDOWN}{ETC}".encode())
    for path in (BUSYBOX, QEMU_GA, kernel / "vmlinuz", kernel / "order"):
        status = path.stat()
        digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:12]


def _build_initramfs(target: Path, kernel: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        root = Path(name) / "root"
        _fill_root(root, kernel)
        names = sorted(str(path.relative_to(root)) for path in root.rglob("*"))
        archive = subprocess.run(
            ["cpio", "-o", "-0", "-H", "newc", "-R", "0:0", "--quiet"],
            cwd=root,
            input="\0".join(names).encode(),
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
        part = Path(name) / "initramfs.gz"
        part.write_bytes(gzip.compress(archive, compresslevel=1))
        part.rename(target)


def _fill_root(root: Path, kernel: Path) -> None:
    folders = "bin sbin usr/bin usr/sbin proc sys dev run tmp var etc root home/tester modules"
    for folder in folders.split():
        (root / folder).mkdir(parents=True)
    for path in (BUSYBOX, QEMU_GA, *_libraries(QEMU_GA)):
        (root / path.relative_to("/")).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / path.relative_to("/"))
    for path in (kernel / "order", *kernel.glob("*.ko")):
        shutil.copy(path, root / "modules")
    for name, text in ETC.items():
        (root / "etc" / name).write_text(text)
    for name, text in {"init": INIT, "sbin/shutdown": SHUTDOWN}.items():
        (root / name).write_text(text)
        (root / name).chmod(0o755)


def _libraries(program: Path) -> list[Path]:
    """List the shared libraries of *program* and its loader, as ldd prints them."""
    words = _tool(["ldd", str(program)]).split()
    return [Path(word) for word in words if word.startswith("/")]


def _tool(command: Sequence[str], cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise GuestsUnavailableError(f"{' '.join(command)!r} failed: {done.stderr.strip()}")
    return done.stdout


# === A bare agent client =======================================================================


class Finished(NamedTuple):
    """A program that ended in a guest."""

    code: int
    out: bytes
    err: bytes


class RawAgent:
    """One synchronised connection to a guest agent, with nothing but the bare protocol.

    Parameters:
        path: the agent's UNIX socket.
        timeout: seconds that the first answer, and each later one, may take.

    Raises:
        OSError: no such socket, or no answer in time (``TimeoutError``).
        GuestError: an answer that is none.
    """

    def __init__(self, path: Path, timeout: float = 30.0) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(timeout)
        self._received = b""
        try:
            self.socket.connect(str(path))
            self._sync()
        except BaseException:
            self.socket.close()
            raise

    def __enter__(self) -> RawAgent:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def call(self, command: str, **arguments: object) -> Any:
        """Run *command* and return what it returned; ``_`` in argument names means ``-``."""
        self.send(command, **arguments)
        return self.reply()

    def send(self, command: str, **arguments: object) -> None:
        """Send *command* and do not wait for the answer, which may never come."""
        members = {name.replace("_", "-"): value for name, value in arguments.items()}
        self.socket.sendall(json.dumps({"execute": command, "arguments": members}).encode())

    def reply(self) -> Any:
        """Wait for one answer."""
        answer = json.loads(self._take(b"\n"))
        if "return" not in answer:
            raise GuestError(f"agent answered {answer.get('error')!r}")
        return answer["return"]

    def run(self, *words: str, timeout: float = 60.0) -> Finished:
        """Run a program to its end, at most *timeout* seconds."""
        pid = self.call("guest-exec", path=words[0], arg=words[1:], capture_output=True)["pid"]
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            status = self.call("guest-exec-status", pid=pid)
            if status["exited"]:
                out, err = (base64.b64decode(status.get(f"{s}-data", "")) for s in ("out", "err"))
                return Finished(status.get("exitcode", -1), out, err)
            time.sleep(0.02)  # the agent has nothing to wait on
        raise GuestError(f"program {words!r} did not end within {timeout} s")

    def boot_id(self) -> str:
        """Return the guest kernel's id of this boot."""
        return self.run("/bin/cat", "/proc/sys/kernel/random/boot_id").out.decode().strip()

    def _sync(self) -> None:
        """Pass over whatever an earlier client left, up to the answer to an id of our own."""
        number = random.getrandbits(63)
        self.socket.sendall(b"\xff")
        self.send("guest-sync-delimited", id=number)
        self._take(b"\xff")
        while (found := self.reply()) != number:
            if not isinstance(found, int):
                raise GuestError(f"agent answered a sync with {found!r}")
            self._take(b"\xff")

    def _take(self, end: bytes) -> bytes:
        """Return the bytes before *end*, and drop both."""
        while end not in self._received:
            piece = self.socket.recv(1 << 20)
            if not piece:
                raise GuestError("agent closed the connection")
            self._received += piece
        head, _, self._received = self._received.partition(end)
        return head


# === Running ===================================================================================


def accelerator() -> str:
    """Return QEMU's ``-accel``: software emulation unless ``VMRM_TEST_KVM=1`` asks for KVM.

    A host that is a virtual machine itself may offer a KVM that does not work, so it is not
    guessed. 32 MiB of translated code are enough and keep a guest small on the host.
    """
    return "kvm" if os.environ.get("VMRM_TEST_KVM") == "1" else "tcg,tb-size=32"


class Guest:
    """One micro VM. As a context manager it is started and, at the end, killed.

    Parameters:
        name: the guest's host name.
        directory: where sockets, disk and logs go; made if missing.
        memory: MiB.
        disk: give it a disk at ``/var`` that keeps its content over reboots and restarts.
        accel: QEMU's ``-accel``; None takes `accelerator`.
        agent_words: further words of qemu-ga's command line, such as ``-b guest-exec``; no blanks.
    """

    def __init__(
        self,
        name: str,
        directory: Path,
        *,
        memory: int = 160,
        disk: bool = True,
        accel: str | None = None,
        agent_words: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.directory = directory
        self.memory = memory
        self.accel = accel or accelerator()
        self.agent_words = agent_words
        #: the agent's UNIX socket on this host
        self.agent_path = directory / "agent.sock"
        #: QEMU's own control socket
        self.qmp_path = directory / "qmp.sock"
        #: what the guest wrote on its serial line
        self.console = directory / "console.log"
        #: what QEMU itself said
        self.log = directory / "qemu.log"
        self.disk = directory / "var.img" if disk else None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Guest:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """QEMU. Raises GuestError if it was never started or was stopped."""
        if self._process is None:
            raise GuestError(f"guest {self.name!r} is not started")
        return self._process

    @property
    def pid(self) -> int:
        """The process id of QEMU."""
        return self.process.pid

    def start(self) -> None:
        """Start QEMU and return when its sockets exist; the guest goes on booting.

        Call it from a thread that outlives the guest: Linux ties QEMU's life to that thread.
        """
        if self._process is not None:
            raise GuestError(f"guest {self.name!r} is started already")
        booted = image()
        self.directory.mkdir(parents=True, exist_ok=True)
        if self.disk and not self.disk.exists():
            _make_disk(self.disk)
        # A socket file of an earlier start would look like this one's.
        for path in (self.agent_path, self.qmp_path):
            path.unlink(missing_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(booted), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            self.qmp("query-status")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Cut the power: QEMU is killed and gone on return. The disk stays."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        self._process = None

    def qmp(self, command: str, /, timeout: float = 30.0, **arguments: object) -> Any:
        """Run one QMP *command*, each on a connection of its own, and return its result.

        Parameters:
            timeout: seconds for connection and answers together, roughly.

        Raises:
            GuestError: QEMU answered with an error, is gone, or did not answer.
        """
        with self._connect(self.qmp_path, timeout) as connection, connection.makefile("rwb") as io:
            io.readline()  # the greeting
            for name, members in (("qmp_capabilities", {}), (command, arguments)):
                io.write(json.dumps({"execute": name, "arguments": members}).encode())
                io.flush()
                result = self._qmp_result(name, io)
        return result

    def wait_agent(self, timeout: float = BOOT_TIMEOUT_S) -> None:
        """Return when the agent answers; raise GuestError with the console's end after *timeout* s.

        Each try is a fresh connection: one made too early may stay mute (danobi/vmtest#17).
        """
        self._wait(lambda _: True, timeout)

    def wait_reboot(self, boot_id: str, timeout: float = BOOT_TIMEOUT_S) -> str:
        """Wait until an agent of another boot than *boot_id* answers, and return that boot's id."""
        self._wait(lambda agent: agent.boot_id() != boot_id, timeout)
        with self.agent() as agent:
            return agent.boot_id()

    def reboot(self, timeout: float = BOOT_TIMEOUT_S) -> str:
        """Reboot through the agent, within *timeout* seconds; return the new boot's id."""
        with self.agent() as agent:
            before = agent.boot_id()
            agent.send("guest-shutdown", mode="reboot")
            # A client that leaves at once may take its request along.
            self._poll(lambda: not self.port_open(), timeout)
        return self.wait_reboot(before, timeout)

    def kill_agent(self, timeout: float = BOOT_TIMEOUT_S) -> None:
        """Kill the agent as a crash would; return when its successor answers, in *timeout* s."""
        with self.agent() as agent:
            before = _agent_pid(agent)
            # Not before the answer to this very call is out.
            script = f"usleep 200000; kill -9 {before}"
            agent.call("guest-exec", path="/bin/sh", arg=["-c", script])
        self._wait(lambda agent: _agent_pid(agent) != before, timeout)

    def port_open(self) -> bool:
        """Ask QEMU whether a program in the guest has the agent's port open."""
        ports = {port["label"]: port["frontend-open"] for port in self.qmp("query-chardev")}
        return bool(ports["agent"])

    def agent(self, timeout: float = 30.0) -> RawAgent:
        """Open a bare connection to the agent; *timeout* is in seconds, for each answer."""
        return RawAgent(self.agent_path, timeout)

    # --- inside -------------------------------------------------------------------------------

    def _wait(self, ready: Callable[[RawAgent], bool], timeout: float) -> None:
        """Ask *ready* on one fresh connection after the other until it says so."""

        def attempt() -> bool:
            try:
                with self.agent(timeout=2.0) as agent:
                    return ready(agent)
            except (OSError, GuestError, ValueError):
                return False  # nobody there yet, or the guest went down under us

        self._poll(attempt, timeout)

    def _poll(self, ready: Callable[[], bool], timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if ready():
                return
            self._rest(0.1)
        console = self.console.read_text(errors="replace")[-2000:]
        raise GuestError(f"guest {self.name!r} not ready within {timeout} s; console:\n{console}")

    def _connect(self, path: Path, timeout: float) -> socket.socket:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(timeout)
            try:
                connection.connect(str(path))
                return connection
            except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
                connection.close()
            self._rest(0.02)
        raise GuestError(f"guest {self.name!r} does not listen at {str(path)!r}")

    def _rest(self, seconds: float) -> None:
        """Let *seconds* pass, but not if QEMU is gone."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return
        raise GuestError(f"qemu of {self.name!r} ended with {code}: {self.log.read_text()}")

    def _qmp_result(self, name: str, replies: Any) -> Any:
        for line in replies:
            reply = json.loads(line)
            if "return" in reply:
                return reply["return"]
            if "error" in reply:
                raise GuestError(f"qmp {name!r} failed: {reply['error'].get('desc')}")
        raise GuestError(f"qemu of {self.name!r} closed its control socket during {name!r}")

    def _command(self, booted: Image) -> list[str]:
        words = ["setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64"]
        words += ["-name", self.name, "-nodefaults", "-no-user-config", "-display", "none"]
        words += ["-machine", "q35"]  # boots a tenth sooner than the older default
        words += ["-accel", self.accel, "-m", str(self.memory), "-serial", _file(self.console)]
        words += ["-kernel", str(booted.kernel), "-initrd", str(booted.initramfs)]
        words += ["-append", self._kernel_words()]
        words += ["-qmp", f"unix:{_escaped(self.qmp_path)},server=on,wait=off"]
        words += [
            "-chardev",
            f"socket,id=agent,path={_escaped(self.agent_path)},server=on,wait=off",
        ]
        # QEMU reports an opened port only for a port with an id (VSERPORT_CHANGE).
        words += ["-device", "virtio-serial-pci"]
        words += ["-device", f"virtserialport,id=port,chardev=agent,name={PORT}"]
        if self.disk:
            words += [
                "-drive",
                f"if=none,id=var,format=raw,cache=unsafe,file={_escaped(self.disk)}",
            ]
            words += ["-device", "virtio-blk-pci,drive=var"]
        return words

    def _kernel_words(self) -> str:
        agent_words = " ".join(self.agent_words)
        return f'console=ttyS0 quiet panic=-1 guest_name={self.name} agent_words="{agent_words}"'


@contextmanager
def guests(count: int, directory: Path, **options: Any) -> Iterator[list[Guest]]:
    """Boot *count* guests at once, named guest1, guest2, …; yield them when all agents answer.

    Parameters:
        directory: each guest gets a folder in it.
        options: as for `Guest`.
    """
    names = [f"guest{number}" for number in range(1, count + 1)]
    with ExitStack() as stack:
        group = [stack.enter_context(Guest(n, directory / n, **options)) for n in names]
        for guest in group:
            guest.wait_agent()
        yield group


def _agent_pid(agent: RawAgent) -> int:
    return int(agent.run("/bin/pidof", "qemu-ga").out)


def _make_disk(path: Path) -> None:
    with path.open("wb") as disk:
        disk.truncate(DISK_BYTES)
    mkfs = _which("mkfs.ext4") or "mkfs.ext4"
    # Tables written now are not written by a kernel thread while the guest is being tested.
    _tool([mkfs, "-q", "-F", "-m", "0", "-E", "lazy_itable_init=0", str(path)])


def _escaped(path: Path) -> str:
    """Write *path* for QEMU's option lists, where a comma is doubled."""
    return str(path).replace(",", ",,")


def _file(path: Path) -> str:
    return f"file:{_escaped(path)}"


if __name__ == "__main__":
    try:
        image()
    except GuestsUnavailableError as missing:
        sys.exit(f"no micro VMs: {missing}")

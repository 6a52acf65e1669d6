"""The file store: contents once under their SHA-256, names over them, archives from anybody."""

from __future__ import annotations

import bz2
import contextlib
import errno
import gzip
import hashlib
import io
import json
import lzma
import os
import signal
import stat
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import vmrm
from vmrm import Database, VmResourceStore

ROOT = Path(vmrm.__file__).parent


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    with Database(tmp_path / "lab.db") as database:
        yield database


@pytest.fixture
def store(db: Database) -> VmResourceStore:
    return VmResourceStore(db=db)


@pytest.fixture
def unpacking(db: Database) -> VmResourceStore:
    return VmResourceStore(decompress=True, db=db)


def contents(db: Database) -> set[str]:
    """Return the names of the files in the store's directory."""
    return {path.name for path in db.directory("store").iterdir()}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def unnamed(db: Database) -> list[str]:
    """Return what `check` says that nothing names in the store."""
    told = "store: nothing names "
    return [line.removeprefix(told) for line in vmrm.check(db) if line.startswith(told)]


@contextlib.contextmanager
def coming(db: Database, pipe: Path, *, force: bool) -> Iterator[Future[None]]:
    """Have somebody add a file, of which the rest, of 128 KiB, comes at the end of the block."""
    os.mkfifo(pipe)

    def add() -> None:
        with VmResourceStore(db=db.path) as store:
            store.add_file(pipe, force=force)

    with ThreadPoolExecutor(1) as pool:
        added = pool.submit(add)
        with pipe.open("wb", buffering=0) as end:
            end.write(bytes(1 << 17))  # more than a pipe takes before anybody reads
            yield added


# === Adding and asking ===========================================================================


@pytest.mark.parametrize("data", [b"", b"x", b"\0\xff" * 4096, b"a" * ((1 << 20) + 1)])
def test_a_file_comes_back_bit_by_bit(store: VmResourceStore, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.bin").write_bytes(data)
    before = datetime.now(UTC) - timedelta(seconds=1)
    store.add_file(tmp_path / "a.bin")
    with store.get_file("a.bin") as opened:
        assert opened.read() == data
    assert Path(store.get_path("a.bin")).read_bytes() == data
    assert store.get_file_size("a.bin") == len(data)
    assert store.get_file_hash("a.bin") == sha256(data)
    uploaded = store.get_file_upload_date("a.bin")
    assert uploaded is not None
    assert before <= uploaded <= datetime.now(UTC)
    assert store.list_contents() == [(len(data), "a.bin", uploaded)]


def test_text_is_stored_as_utf_8(store: VmResourceStore) -> None:
    store.add_file_from_content("häß\n", "a.txt")
    assert Path(store.get_path("a.txt")).read_bytes() == "häß\n".encode()


def test_an_unknown_name_has_no_content_and_says_so_as_documented(store: VmResourceStore) -> None:
    assert store.check_path("none") is False
    assert store.get_file_hash("none") == ""
    assert store.get_file_upload_date("none") is None
    for ask in (store.get_path, store.get_file, store.get_file_size):
        with pytest.raises(FileNotFoundError) as caught:
            ask("none")
        assert caught.value.filename == "none"


def test_a_missing_host_file_is_file_not_found(store: VmResourceStore, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        store.add_file(tmp_path / "none")
    with pytest.raises(ValueError, match="is a directory"):
        store.add_file(tmp_path)
    assert contents(store.db) == set()


@pytest.mark.parametrize("name", ["", ".hidden", "-rf", "a b", "a/b", "..", "ä", "x" * 65, "a\n"])
def test_a_name_that_is_no_plain_name_is_refused(store: VmResourceStore, name: str) -> None:
    with pytest.raises(ValueError, match=r"file name .* is not usable"):
        store.add_file_from_content("x", name)
    with pytest.raises(ValueError, match=r"store name .* is not usable"):
        VmResourceStore(name, db=store.db)
    assert contents(store.db) == set()


def test_a_file_is_replaced_unless_that_is_not_wanted(store: VmResourceStore) -> None:
    store.add_file_from_content("old", "a.txt")
    store.add_file_from_content("new", "A.TXT")
    assert store.list_distinct_contents() == ["a.txt"]
    assert store.get_file_hash("a.txt") == sha256(b"new")
    with pytest.raises(FileExistsError):
        store.add_file_from_content("newer", "a.txt", force=False)
    assert store.get_file_hash("a.txt") == sha256(b"new")


def test_of_two_who_must_not_replace_one_wins(
    store: VmResourceStore, db: Database, tmp_path: Path
) -> None:
    """The one comes while the other has looked and not written yet."""
    with coming(db, tmp_path / "a.txt", force=False) as added:
        store.add_file_from_content("first", "a.txt", force=False)
    with pytest.raises(FileExistsError):
        added.result()
    assert store.get_file_hash("a.txt") == sha256(b"first")


def test_equal_contents_are_kept_once_and_stores_do_not_share_names(
    store: VmResourceStore, db: Database
) -> None:
    store.add_file_from_content("same", "a")
    store.add_file_from_content("same", "b")
    other = VmResourceStore("other", db=db)
    other.add_file_from_content("same", "c")
    assert contents(db) == {sha256(b"same")}
    assert store.list_distinct_contents() == ["a", "b"]
    assert other.list_distinct_contents() == ["c"]
    assert not store.check_path("c")


def test_listing_takes_a_shell_pattern(store: VmResourceStore) -> None:
    for name in ("b.sh", "a.sh", "a.txt"):
        store.add_file_from_content(name, name)
    assert store.list_distinct_contents() == ["a.sh", "a.txt", "b.sh"]
    assert store.list_distinct_contents("*.sh") == ["a.sh", "b.sh"]
    assert [name for _, name, _ in store.list_contents("a.*")] == ["a.sh", "a.txt"]
    assert store.list_contents("nothing*") == []


# === Removing ====================================================================================


def test_removing_takes_the_contents_that_nobody_names_any_more(
    store: VmResourceStore, db: Database
) -> None:
    for name, data in (("a1", "one"), ("a2", "two"), ("b", "two")):
        store.add_file_from_content(data, name)
    assert store.remove_file("a*") == 2
    assert store.list_distinct_contents() == ["b"]
    assert contents(db) == {sha256(b"two")}
    assert store.remove_file("a*") == 0
    assert store.remove_file("*") == 1
    assert contents(db) == set()


def test_a_content_that_a_schedule_pins_outlives_its_name(
    store: VmResourceStore, db: Database
) -> None:
    store.add_file_from_content("pinned", "a")
    file = {"location": "a", "filename": "a", "sha256": sha256(b"pinned")}
    text = json.dumps([{"start_time": 1, "file": [file]}])
    vmrm.ScheduleDb(db=db).put("web", text)
    store.remove_file("a")
    assert contents(db) == {sha256(b"pinned")}
    assert unnamed(db) == []
    vmrm.ScheduleDb(db=db).destroy_all()
    assert unnamed(db) == [sha256(b"pinned")]


def test_a_lost_content_is_file_not_found(store: VmResourceStore) -> None:
    store.add_file_from_content("x", "a")
    Path(store.get_path("a")).unlink()
    with pytest.raises(FileNotFoundError, match="lost its content"):
        store.get_path("a")


# === Crashes and full disks ======================================================================

ADDING = """
import sys, vmrm
with vmrm.VmResourceStore(db=sys.argv[1]) as store:
    store.add_file_from_content("new content", "a.txt")
"""


@pytest.mark.parametrize("label", ["store-before-rename", "store-before-rows"])
def test_a_crash_while_adding_leaves_no_row_without_its_content(
    store: VmResourceStore, db: Database, label: str
) -> None:
    store.add_file_from_content("old content", "a.txt")
    done = subprocess.run(
        [sys.executable, "-c", ADDING, db.path],
        env=os.environ | {"VMRM_CRASH": label, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, "it did not get to the crash point"
    assert Path(store.get_path("a.txt")).read_text() == "old content"
    left = contents(db) - {sha256(b"old content")}
    assert len(left) == 1, "the crash left a file, which nothing names"
    if label == "store-before-rows":
        assert unnamed(db) == [sha256(b"new content")]
    store.add_file_from_content("new content", "a.txt")
    assert Path(store.get_path("a.txt")).read_text() == "new content"
    store.remove_file("*")
    assert {name for name in contents(db) if not name.startswith(".new-")} == set()


def test_a_full_disk_adds_nothing_and_leaves_nothing(
    store: VmResourceStore, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store.add_file_from_content("x", "a")
    assert contents(db) == set()
    assert not store.check_path("a")


def test_a_file_that_cannot_be_read_adds_nothing(store: VmResourceStore, db: Database) -> None:
    with pytest.raises(OSError, match="Input/output error"):
        store.add_file("/proc/self/mem")
    assert store.list_distinct_contents() == []
    assert contents(db) == set()


def test_an_archive_that_breaks_off_adds_nothing(
    unpacking: VmResourceStore, db: Database, tmp_path: Path
) -> None:
    path = tar(tmp_path / "a.tar", ("good", b"good", {}), ("bad", bytes(4096), {}))
    os.truncate(path, 2048)
    with pytest.raises(ValueError, match="cannot be unpacked"):
        unpacking.add_file(path)
    assert unpacking.list_distinct_contents() == []
    assert unnamed(db) == [sha256(b"good")], "check --fix removes it"


# === Archives ====================================================================================


def tar(path: Path, *members: tuple[str, bytes, dict[str, object]]) -> Path:
    """Write a tar archive of *members*: name, data, changes to the header."""
    with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz") as archive:
        for name, data, changes in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in changes.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(data))
    return path


def zipped(path: Path, *members: tuple[str, bytes, int]) -> Path:
    """Write a zip archive of *members*: name, data, UNIX mode."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data, mode in members:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, data, zipfile.ZIP_DEFLATED)
    return path


def test_archives_are_replaced_by_the_files_in_them(
    unpacking: VmResourceStore, tmp_path: Path
) -> None:
    folder = {"type": tarfile.DIRTYPE}
    unpacking.add_file(
        tar(tmp_path / "t.tar.gz", ("d", b"", folder), ("d/a.sh", b"A", {}), ("b", b"B", {}))
    )
    unpacking.add_file(zipped(tmp_path / "z.zip", ("e/", b"", 0o40755), ("e/c.sh", b"C", 0)))
    assert unpacking.list_distinct_contents() == ["a.sh", "b", "c.sh"]
    assert unpacking.get_file_hash("a.sh") == sha256(b"A")
    assert unpacking.get_file_hash("c.sh") == sha256(b"C")


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)],
)
def test_compressed_files_are_replaced_by_their_content(
    unpacking: VmResourceStore,
    tmp_path: Path,
    suffix: str,
    compress: Callable[[bytes], bytes],
) -> None:
    (tmp_path / f"disk.img{suffix}").write_bytes(compress(b"data" * 9999))
    unpacking.add_file(tmp_path / f"disk.img{suffix}")
    assert unpacking.get_file_hash("disk.img") == sha256(b"data" * 9999)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_an_image_that_begins_with_zeros_is_not_taken_for_an_empty_archive(
    unpacking: VmResourceStore, tmp_path: Path, suffix: str
) -> None:
    image = bytes(1024) + b"superblock" + bytes(99_999)
    data = gzip.compress(image) if suffix else image
    (tmp_path / f"ext4.img{suffix}").write_bytes(data)
    unpacking.add_file(tmp_path / f"ext4.img{suffix}")
    assert unpacking.get_file_hash("ext4.img") == sha256(image)


def test_other_files_stay_as_they_are_and_so_does_everything_without_decompress(
    store: VmResourceStore, unpacking: VmResourceStore, tmp_path: Path
) -> None:
    (tmp_path / "plain.txt").write_bytes(b"text")
    unpacking.add_file(tmp_path / "plain.txt")
    store.add_file(tar(tmp_path / "t.tar", ("a", b"A", {})))
    assert store.list_distinct_contents() == ["plain.txt", "t.tar"]


HOSTILE: dict[str, tuple[str, bytes, dict[str, object]]] = {
    "parent": ("../../etc/passwd", b"x", {}),
    "parent inside": ("a/../../b", b"x", {}),
    "absolute": ("/etc/passwd", b"x", {}),
    "symlink": ("link", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
    "hard link": ("link", b"", {"type": tarfile.LNKTYPE, "linkname": "good"}),
    "device": ("sda", b"", {"type": tarfile.BLKTYPE, "devmajor": 8, "devminor": 0}),
    "fifo": ("pipe", b"", {"type": tarfile.FIFOTYPE}),
    "dot": (".", b"x", {}),
    "hidden": ("d/.bashrc", b"x", {}),
    "option": ("--checkpoint-action=exec", b"x", {}),
    "newline": ("a\nb", b"x", {}),
    "duplicate": ("other/good", b"x", {}),
    "duplicate in another case": ("GOOD", b"x", {}),
}


@pytest.mark.parametrize("member", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_tar_is_refused_as_a_whole(
    unpacking: VmResourceStore,
    tmp_path: Path,
    member: tuple[str, bytes, dict[str, object]],
) -> None:
    path = tar(tmp_path / "t.tar", ("good", b"good", {}), member)
    with pytest.raises(ValueError, match=r"not a plain file|not usable|two files"):
        unpacking.add_file(path)
    assert unpacking.list_distinct_contents() == []
    assert contents(unpacking.db) <= {sha256(b"good")}


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("../evil", 0),
        ("/evil", 0),
        ("a/../../evil", 0),
        ("link", stat.S_IFLNK | 0o777),
        ("pipe", stat.S_IFIFO | 0o600),
        ("good", 0o644),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_hostile_zip_is_refused_as_a_whole(
    unpacking: VmResourceStore, tmp_path: Path, name: str, mode: int
) -> None:
    path = zipped(tmp_path / "z.zip", ("good", b"good", 0o100644), (name, b"/etc/passwd", mode))
    with pytest.raises(ValueError, match=r"not a plain file|two files"):
        unpacking.add_file(path)
    assert unpacking.list_distinct_contents() == []


def tar_bomb(path: Path) -> Path:
    return tar(path / "b.tar.gz", ("a", bytes(5_000_000), {}), ("b", bytes(6_000_000), {}))


def zip_bomb(path: Path) -> Path:
    return zipped(path / "b.zip", ("a", bytes(5_000_000), 0), ("b", bytes(6_000_000), 0))


def gzip_bomb(path: Path) -> Path:
    (path / "b.gz").write_bytes(gzip.compress(bytes(11_000_000)))
    return path / "b.gz"


@pytest.mark.parametrize("bomb", [tar_bomb, zip_bomb, gzip_bomb])
def test_a_bomb_is_refused_when_the_limit_is_passed(
    unpacking: VmResourceStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bomb: Callable[[Path], Path],
) -> None:
    monkeypatch.setattr(vmrm, "MAX_UNPACKED_BYTES", 10_000_000)
    path = bomb(tmp_path)
    assert path.stat().st_size < 100_000
    with pytest.raises(ValueError, match="unpacks to over 10000000 bytes"):
        unpacking.add_file(path)
    assert unpacking.list_distinct_contents() == []
    kept = sum(
        (unpacking.db.state_dir / "store" / name).stat().st_size for name in contents(unpacking.db)
    )
    assert kept <= 10_000_000


def cut_gzip() -> bytes:
    return gzip.compress(os.urandom(900))[:-20]


def cut_tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("a")
        info.size = 5000
        archive.addfile(info, io.BytesIO(bytes(5000)))
    return buffer.getvalue()[:2000]


def whole_tar(damaged: bool = False) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("a", "b", "c"):
            info = tarfile.TarInfo(name)
            info.size = 512
            archive.addfile(info, io.BytesIO(os.urandom(512)))
    data = bytearray(buffer.getvalue())
    data[1024 + 148] ^= damaged  # in the checksum
    return bytes(data)


def whole_zip(method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("a", b"content")
    return buffer.getvalue()


def negative_tar() -> bytes:
    """A member whose size is -1024 would lead a reader back to where it came from."""
    header = bytearray(tarfile.TarInfo("a").tobuf())
    header[124:136] = b"\xff" * 4 + (-1024).to_bytes(8, signed=True)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) * 3 + bytes(1024)


def encrypted_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a", b"secret")
    data = bytearray(buffer.getvalue())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    return bytes(data)


DAMAGED: dict[str, tuple[str, Callable[[], bytes]]] = {
    "gzip cut short": ("a.gz", cut_gzip),
    "no gzip": ("a.gz", lambda: b"hello"),
    "bzip2 damaged": ("a.bz2", lambda: bz2.compress(b"x" * 999)[:-9] + bytes(9)),
    "no xz": ("a.xz", lambda: b"hello"),
    "tar cut short": ("a.tar", cut_tar),
    "tar cut short in a header": ("a.tar", lambda: whole_tar()[:1700]),
    "tar cut short between members": ("a.tar", lambda: whole_tar()[:1024]),
    "tar damaged in its second header": ("a.tar", lambda: whole_tar(damaged=True)),
    "tar.gz cut short": ("a.tar.gz", lambda: gzip.compress(whole_tar())[:60]),
    "tgz cut short in its first header": ("a.tgz", lambda: gzip.compress(whole_tar()[:300])),
    "no tar": ("a.TAR", lambda: b"hello"),
    "tar of nothing": ("a.tar", lambda: bytes(10240)),
    "tar of another name cut short": ("a", lambda: gzip.compress(whole_tar())[:900]),
    "zip cut short": ("a.zip", lambda: whole_zip()[:-30]),
    "zip of another name cut short": ("a.jar", lambda: whole_zip()[:-30]),
    "no zip": ("a.zip", lambda: b"hello"),
    "zip of a method that unpacks at once": ("a.zip", lambda: whole_zip(zipfile.ZIP_BZIP2)),
    "zip encrypted": ("a.zip", encrypted_zip),
}


@pytest.mark.parametrize(("name", "make"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_archive_is_a_value_error_that_names_it(
    unpacking: VmResourceStore, tmp_path: Path, name: str, make: Callable[[], bytes]
) -> None:
    (tmp_path / name).write_bytes(make())
    with pytest.raises(ValueError, match=f"archive '{name}'"):
        unpacking.add_file(tmp_path / name)
    assert unpacking.list_distinct_contents() == []


def test_a_tar_that_leads_back_to_its_own_header_is_never_followed(
    unpacking: VmResourceStore, tmp_path: Path
) -> None:
    """Later Pythons do not take it for an archive at all."""
    (tmp_path / "a.tar").write_bytes(negative_tar())
    with pytest.raises(ValueError, match=r"archive 'a.tar'(: 'a' is not a plain file| is empty)"):
        unpacking.add_file(tmp_path / "a.tar")
    assert unpacking.list_distinct_contents() == []


def long_name(kind: bytes, size: int, tail: bytes = b"") -> bytes:
    """Return a tar.gz of little size in which a header says that a name of `size` bytes comes."""
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = kind, size
    member = tarfile.TarInfo("a").tobuf()
    packer = zlib.compressobj(1, wbits=31)
    parts = [packer.compress(header.tobuf(format=tarfile.GNU_FORMAT) + tail)]
    parts += [packer.compress(b"A" * (1 << 20)) for _ in range(size >> 20)]
    return b"".join([*parts, packer.compress(member + bytes(1024)), packer.flush()])


def measured(*words: str | Path) -> tuple[int, str, float]:
    """Run vmrm; return its exit code, what it printed, and the MiB that it needed."""
    # Not by getrusage, whose peak counts that of the process that started this one.
    call = r"""import re, sys, vmrm
code = vmrm.main(sys.argv[1:])
kib = re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]
print("peak", int(kib) >> 10)
sys.exit(code)"""
    command = [sys.executable, "-c", call, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    told, _, peak = done.stdout.rpartition("peak ")
    return done.returncode, told + done.stderr, float(peak)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_name_of_any_length_in_an_archive_costs_nothing(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "a.tar.gz"
    path.write_bytes(long_name(kind, 64 << 20))
    assert path.stat().st_size < 1 << 20
    code, told, peak_mib = measured("--db", tmp_path / "l.db", "store", "add", path, "--unpack")
    assert code == 2
    assert "archive 'a.tar.gz' cannot be unpacked: a member has over 262144 bytes" in told
    assert len(told) < 1000
    assert peak_mib < 200


def test_a_long_name_that_is_allowed_is_cut_in_the_message(
    unpacking: VmResourceStore, tmp_path: Path
) -> None:
    unpacking_tar = tar(tmp_path / "a.tar", ("good", b"good", {}), ("d/" + "x" * 9000, b"", {}))
    for path in (unpacking_tar, zipped(tmp_path / "a.zip", ("../" + "x" * 9000, b"", 0))):
        with pytest.raises(ValueError, match="xxx") as refused:
            unpacking.add_file(path)
        assert len(str(refused.value)) < 500
    assert unpacking.list_distinct_contents() == []


def test_members_without_number_are_refused(
    unpacking: VmResourceStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vmrm, "MAX_MEMBERS", 20)
    names = [f"f{number}" for number in range(21)]
    unpacking.add_file(tar(tmp_path / "t.tar", *((name, b"x", {}) for name in names[:20])))
    assert len(unpacking.list_contents()) == 20
    for path in (
        tar(tmp_path / "u.tar", *((f"u{name}", b"x", {}) for name in names)),
        zipped(tmp_path / "u.zip", *((f"u{name}", b"x", 0) for name in names)),
    ):
        with pytest.raises(ValueError, match="holds over 20 files"):
            unpacking.add_file(path)
    assert len(unpacking.list_contents()) == 20


@pytest.mark.parametrize("words", [["--unpack"], []])
def test_a_disk_is_not_filled_to_the_last_and_exit_code_75_says_so(
    tmp_path: Path, words: list[str]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m,mode=700", "vmrm-test", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        path = tmp_path / "zeros.gz"
        zeros = bytes(100 << 20)
        path.write_bytes(gzip.compress(zeros, 1) if words else zeros[: 20 << 20])
        code, told, _ = measured("--db", disk / "lab.db", "store", "add", path, *words)
        assert code == 75
        assert "no space on the host" in told
        with vmrm.Database(disk / "lab.db") as db:
            assert contents(db) == set()
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_content_being_added_is_not_removed_as_unused(
    store: VmResourceStore, db: Database, tmp_path: Path
) -> None:
    store.add_file_from_content("old", "old")
    (db.directory("store") / sha256(b"left")).write_bytes(b"left")
    with coming(db, tmp_path / "new", force=True) as added:
        assert store.remove_file("old") == 1
        assert vmrm.check(db, fix=True)
        assert len(contents(db)) == 3, "nothing may be removed while contents come"
    added.result()
    with store.get_file("new") as file:
        assert file.read() == bytes(1 << 17)
    assert vmrm.check(db, fix=True)
    assert vmrm.check(db) == []
    assert contents(db) == {store.get_file_hash("new")}

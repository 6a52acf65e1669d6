"""Programs of a Windows guest, played below a folder of this host; standard library only.

Just enough to run vmrm's own scripts and a test's: cmd.exe with batch files of plain lines (no
blocks, no pipes, no && and ||, no call, no delayed expansion, one form of `for`), taskkill, and
what vmrm asks of PowerShell, each by a name. File names are not case-blind. X.exe is the host's
program X. What is not played is an error that says so, never a guess.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath, PureWindowsPath


def words_of_windows(text: str) -> list[str]:
    """Return the words of a Windows command line, as CommandLineToArgvW takes it apart."""
    words: list[str] = []
    word, quoted, begun = "", False, False
    for match in re.finditer(r'(\\*)"|\\+|[ \t]|[^\\" \t]+', text):
        part = match[0]
        if part.endswith('"'):
            word += "\\" * (len(match[1]) // 2)
            begun = True
            if len(match[1]) % 2:
                word += '"'
            else:
                quoted = not quoted
        elif part in (" ", "\t") and not quoted:
            if begun:
                words.append(word)
            word, begun = "", False
        else:
            word, begun = word + part, True
    return [*words, word] if begun else words


class _NotPlayed(Exception):
    """Something that not played."""


class _BatchEnd(Exception):
    """The end of a batch file, or of cmd.exe itself."""

    def __init__(self, code: int, of_all: bool = False) -> None:
        super().__init__(code)
        self.code, self.of_all = code, of_all


# Imported, not run as a script, so that it is compiled once.
_PLAY = (
    f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); "
    "import windows_player; sys.exit(windows_player.play(*sys.argv[1:]))"
)


class Windows:
    """A Windows guest's programs, played below a folder of this host."""

    def __init__(self, root: Path, boot: str = "") -> None:
        self.root, self.boot = root, boot

    def host(self, path: str | PurePath, cwd: str | PurePath = "") -> str:
        """Return the host's path of a guest's. Raises OSError for one without a drive."""
        place = PureWindowsPath(cwd, path)
        if not place.is_absolute() or len(place.drive) != 2:
            raise OSError(errno.ENOENT, "The system cannot find the path specified")
        return str(self.root.joinpath(place.drive[0].upper(), *place.parts[1:]))

    def argv(self, boot: str, path: str, *words: str) -> list[str]:
        """Return the host's words that play a guest's program."""
        name = PureWindowsPath(path).name.lower().removesuffix(".exe")
        if name in ("cmd", "icacls", "powershell", "taskkill"):
            # The agent joins what it is given to one string, by the rules of the C run time.
            tail = subprocess.list2cmdline(words)
            return [sys.executable, "-IS", "-c", _PLAY, str(self.root), boot, name, tail]
        return [self.program(path, "C:\\"), *words]

    def program(self, name: str, cwd: str | PurePath) -> str:
        """Return the host's path of a program, for a batch file that of the file itself."""
        place = PureWindowsPath(name)
        for suffix in ("", ".exe", ".bat", ".cmd"):
            with contextlib.suppress(OSError):
                found = self.host(f"{name}{suffix}", cwd)
                if Path(found).is_file():
                    return found
        on_host = None if len(place.parts) > 1 else shutil.which(name.removesuffix(".exe"))
        if on_host is None:
            raise OSError(errno.ENOENT, "The system cannot find the file specified")
        return on_host

    def play(self, name: str, tail: str) -> int:
        """Play cmd, icacls, powershell or taskkill with its command line; return the exit code."""
        if name == "cmd":
            return Cmd(self).run(tail)
        words = words_of_windows(tail)
        if name == "icacls":  # it is used for one thing
            Path(self.host(words[0])).chmod(0o700)
            return 0
        if name == "taskkill":
            try:
                for word in filter(str.isdigit, words):
                    os.killpg(int(word), signal.SIGKILL)
            except ProcessLookupError:
                return 128
            return 0
        return int(getattr(self, f"ps_{words[0]}".replace("-", "_"))(*words[1:]) or 0)

    def _matches(self, path: str) -> Sequence[Path]:
        place = Path(self.host(path))
        pattern = str(place.relative_to(self.root))
        return [place] if place.exists() else sorted(self.root.glob(pattern))

    def ps_exists(self, path: str) -> int:
        return int(not self._matches(path))

    def ps_mkdir(self, path: str) -> None:
        Path(self.host(path)).mkdir(parents=True, exist_ok=True)

    def ps_delete(self, path: str) -> None:
        Path(self.host(path)).unlink()

    def ps_boot(self) -> None:
        print(self.boot)

    def ps_list(self, path: str) -> None:
        for top in self._matches(path):
            for place in [top, *(item for item in top.rglob("*") if not item.is_symlink())]:
                drive, *parts = place.relative_to(self.root).parts
                kind, facts = "d" if place.is_dir() else "f", place.stat()
                times = f"{facts.st_mtime // 1:.0f} {time.time() // 1:.0f}"
                shown = PureWindowsPath(f"{drive}:\\", *parts)
                line = f"{kind} 600 {facts.st_size * (kind == 'f')} {times} {shown}\0"
                sys.stdout.buffer.write(os.fsencode(line))

    def ps_facts(self, path: str) -> int:
        found = Path(self.host(path))
        if found.exists():
            kind = "d" if found.is_dir() else "-"
            print(f"{kind}rw------- 1 0 0 {found.stat().st_size} ")
        return int(not found.exists())

    def ps_receive(self, path: str, _size: str, token: str) -> None:
        self.ps_mkdir(str(PureWindowsPath(path).parent))
        print(f"{path}.vmrm-{token}")

    def ps_discard(self, path: str, token: str) -> None:
        self.ps_delete(f"{path}.vmrm-{token}")

    def ps_hash(self, path: str, size: str) -> int:
        data = Path(self.host(path)).read_bytes()[: int(size)]
        print(hashlib.sha256(data).hexdigest())
        return int(len(data) < int(size))

    def ps_deliver(self, source: str, target: str, _mode: str) -> int:
        if Path(self.host(target)).is_dir():
            Path(self.host(source)).unlink()
            print("it is a directory", file=sys.stderr)
            return 1
        Path(self.host(source)).replace(self.host(target))
        return 0

    def ps_copy(self, source: str, target: str) -> None:
        shutil.copyfile(self.host(source), self.host(target))

    def ps_lay_out(self, stage: str, experiment: str, vm: str, old: str, *aside: str) -> int:
        here = Path(self.host(stage))
        here.mkdir(parents=True, exist_ok=True)
        here.parent.chmod(0o700)
        (here / f"new.{old}").write_text(vm)
        with contextlib.suppress(FileExistsError):
            (here / f"of.{experiment}").hardlink_to(here / f"new.{old}")
        (here / f"new.{old}").unlink()
        if (here / f"of.{experiment}").read_text() != vm:
            print("this launch directory is used by another VM", file=sys.stderr)
            return 1
        for name in aside:
            if (here.parent / name).exists():
                before = here.parent / ".previous" / old
                before.mkdir(parents=True, exist_ok=True)
                (here.parent / name).rename(before / name)
        told = here / f"lines.{old}"
        for line in told.read_text().splitlines() if told.exists() else ():
            verb, content, word = line.split("\t")
            part = here / f"{content}.part"
            if verb == "script":
                place = Path(self.host(word))
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(here / content, place)
            elif part.stat().st_size != int(word):
                print(f"{content} arrived damaged", file=sys.stderr)
                return 1
            else:
                part.rename(here / content)
        for place in here.iterdir():
            print(place.stat().st_size, place.name)
        return 0

    def ps_forbid(self, *directories: str) -> None:
        for here in directories:
            with contextlib.suppress(FileExistsError):
                Path(self.host(here)).mkdir()
                Path(self.host(here), "exit").write_text("125 0")

    def ps_signal(self, _name: str, pid: str) -> int:
        self.play("taskkill", f"/T /F /PID {pid}")
        return 1

    def ps_has_program(self, program: str) -> int:
        with contextlib.suppress(OSError):
            return int(not Path(self.host(program)).exists())
        return 1

    def ps_probe(self, *directories: str) -> None:
        running: dict[int, str] = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, ValueError):
                words = (folder / "cmdline").read_text().rstrip("\0").split("\0")
                if words[3:5] == [_PLAY, str(self.root)] and words[6] == "cmd":
                    running[int(folder.name)] = words[7]
        for here in map(PureWindowsPath, directories):
            folder = Path(self.host(here))
            code = folder / "exit"
            script = re.escape(str(here.parent / "call_arguments.bat"))
            number = re.escape(here.name.removeprefix("attempt."))
            pattern = f'{script}"? (attempt[.])?{number} '
            pids = [pid for pid, line in running.items() if re.search(pattern, line)]
            told = [
                "claim",
                code.read_text().strip() if code.exists() else "",
                str(pids[0]) if pids else "",
                "alive" if pids else "gone",
            ]
            print(":".join(told) if folder.is_dir() else "none")


class Cmd:
    """cmd.exe, as far as the comment of this section says."""

    _WORD = r'(?:"[^"]*"|[^\s"]+)'
    _IF = re.compile(
        rf"if\s+(not\s+)?(?:exist\s+({_WORD})|errorlevel\s+(\d+)|({_WORD}?)==({_WORD}))\s+(.*)",
        re.IGNORECASE | re.DOTALL,
    )
    _FOR = re.compile(r'for %([A-Z]) in \((?:"([^"]+)"|\*)\) do (.*)', re.DOTALL)
    _REDIRECT = re.compile(r'(>>|>|<)[ ]*(?:&([12])|"([^"]*)"|([^\s&|<>"]+))')

    def __init__(self, windows: Windows) -> None:
        self.windows = windows
        self.code = 0  # ERRORLEVEL
        self.cwd = PureWindowsPath("C:\\")
        with contextlib.suppress(ValueError):  # the agent's own is outside of all drives
            drive, *parts = Path.cwd().relative_to(windows.root).parts
            self.cwd = PureWindowsPath(f"{drive}:\\", *parts)

    def run(self, tail: str) -> int:
        """Do what the words after `cmd.exe` say; return the exit code."""
        match = re.fullmatch(r"(?:/d |/e:on |/v:off )*/c (.*)", tail, re.DOTALL | re.IGNORECASE)
        if match is None:
            raise _NotPlayed(f"cmd.exe {tail}")
        line = match[1]
        if line.startswith('"') and not self._is_program(line):
            head, _, rest = line[1:].rpartition('"')
            line = head + rest
        try:
            self._line(self._expanded(line, None))
        except _BatchEnd as end:
            return end.code
        return self.code

    def _is_program(self, line: str) -> bool:
        """Whether the quotes of a line are those of its program's name, and so to be kept."""
        name = line.split('"')[1]
        if line.count('"') != 2 or " " not in name or re.search(r"[&<>()@^|]", name):
            return False
        with contextlib.suppress(OSError):
            return bool(self.windows.program(name, self.cwd))
        return False

    def _file(self, path: str, tail: str) -> None:
        """Run a batch file; set the exit code."""
        words = [path, *re.findall(self._WORD, tail)]
        lines = Path(path).read_bytes().decode().replace("\r\n", "\n").split("\n")
        labels = {line[1:].split()[0].lower(): n for n, line in enumerate(lines) if line[:1] == ":"}
        at = 0
        while at < len(lines):
            line, at = lines[at], at + 1
            try:
                if line[:1] != ":":
                    self._line(self._expanded(line, words))
            except _BatchEnd as end:
                if end.of_all:
                    raise
                self.code = end.code
                return
            except KeyError as label:  # goto
                at = labels[str(label.args[0])]

    def _expanded(self, line: str, words: Sequence[str] | None) -> str:
        """Return a line with its variables replaced; *words* are a batch file's."""

        def value(match: re.Match[str]) -> str:
            double, strip, number, name = match.groups()
            if number and words is not None:
                word = words[int(number)] if int(number) < len(words) else ""
                return word.strip('"') if strip else word
            if double and words is not None:
                return "%"
            if name and ":" in name:
                raise _NotPlayed(f"%{name}%")
            known = {key.lower(): text for key, text in os.environ.items()}
            known["errorlevel"] = str(self.code)
            if name:
                return known.get(name.lower(), "" if words is not None else match[0])
            return "" if words is not None else match[0]

        return re.sub(r"%(?:(%)|(~?)([0-9])|([^%]+)%)?", value, line)

    def _line(self, line: str) -> None:
        line = line.lstrip(" \t@")
        if match := self._IF.fullmatch(line):
            negated, path, level, left, right, rest = match.groups()
            if path:
                holds = self._exists(path.strip('"'))
            else:
                holds = self.code >= int(level) if level else left == right
            if holds != bool(negated):
                self._line(rest)
        elif match := self._FOR.fullmatch(line):
            letter, name, rest = match.groups()
            folder = Path(self.windows.host(self.cwd))
            for place in (
                [folder / name] if name else filter(Path.is_file, sorted(folder.iterdir()))
            ):
                line = rest.replace(f"%~z{letter}", str(place.stat().st_size))
                self._line(line.replace(f"%{letter}", place.name))
        else:
            for text, redirects in self._commands(line):
                with self._redirected(redirects):
                    self._command(text)

    def _exists(self, path: str) -> bool:
        place = Path(self.windows.host(path.removesuffix("*"), self.cwd))
        return place.is_dir() if path.endswith("*") else place.exists()

    def _commands(self, line: str) -> Iterator[tuple[str, list[tuple[int, str, str]]]]:
        """Yield the commands of a line, each with its redirections (descriptor, how, where)."""
        text, quoted, at = "", False, 0
        redirects: list[tuple[int, str, str]] = []
        while at < len(line):
            char = line[at]
            if char == '"':
                quoted = not quoted
            elif char == "^" and not quoted:
                at += 1
                char = line[at : at + 1]
            elif char in "<>" and not quoted:
                match = self._REDIRECT.match(line, at)
                if match is None:
                    raise _NotPlayed(line)
                how, copied, *named = match.groups()
                fd = 0 if how == "<" else 1
                if re.search(r"(^|\s)[0-9]$", text):
                    text, fd = text[:-1], int(text[-1])
                redirects.append((fd, how, f"&{copied}" if copied else named[0] or named[1]))
                at = match.end()
                continue
            elif char in "&|" and not quoted:
                if char == "|" or line[at : at + 2] == "&&":
                    raise _NotPlayed(line)
                yield text, redirects
                text, redirects, char = "", [], ""
            text, at = text + char, at + 1
        yield text, redirects

    @contextlib.contextmanager
    def _redirected(self, redirects: Sequence[tuple[int, str, str]]) -> Iterator[None]:
        saved = {fd: os.dup(fd) for fd, _, _ in redirects}
        flags = {"<": os.O_RDONLY, ">": os.O_WRONLY | os.O_CREAT | os.O_TRUNC}
        flags[">>"] = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        try:
            for fd, how, target in redirects:
                if target[0] == "&":
                    os.dup2(int(target[1]), fd)
                    continue
                null = target.lower() == "nul"
                path = os.devnull if null else self.windows.host(target, self.cwd)
                opened = os.open(path, flags[how], 0o666)
                os.dup2(opened, fd)
                os.close(opened)
            yield
        finally:
            for fd, old in saved.items():
                os.dup2(old, fd)
                os.close(old)

    def _command(self, text: str) -> None:
        match = re.match(r'\s*(?:"([^"]*)"|([^\s"=,;]+))(.*)', text, re.DOTALL)
        if match is None:
            return
        name, tail = match[1] or match[2], match[3]
        builtin = getattr(self, f"_do_{name.lower()}", None) if match[1] is None else None
        if builtin is None:
            self._start(name, tail)
            return
        words = [word.strip('"') for word in re.findall(self._WORD, tail)]
        try:
            builtin(tail, *(word for word in words if word.lower() not in ("/y", "/b", "/d")))
        except OSError as error:
            self.code = 1
            os.write(2, f"{error.strerror}\r\n".encode())

    def _start(self, name: str, tail: str) -> None:
        if name.lower() in ("cmd", "cmd.exe"):
            words = self.windows.argv(self.windows.boot, "cmd.exe")
            argv = [*words[:-1], tail.strip()]
        else:
            try:
                found = self.windows.program(name, self.cwd)
            except OSError:
                os.write(2, f"'{name}' is not recognized as a program or batch file\r\n".encode())
                self.code = 9009
                return
            if found.lower().endswith((".bat", ".cmd")):  # which never returns
                self._file(found, tail)
                raise _BatchEnd(self.code)
            argv = [found, *words_of_windows(tail)]
        code = subprocess.run(argv, cwd=self.windows.host(self.cwd), check=False).returncode
        self.code = code if code >= 0 else 1

    def _do_echo(self, tail: str, *_: str) -> None:
        if tail.strip().lower() not in ("off", "on"):
            os.write(1, f"{tail[1:]}\r\n".encode())

    def _do_rem(self, tail: str, *_: str) -> None:
        pass

    _do_setlocal = _do_chcp = _do_rem

    def _do_set(self, tail: str, *words: str) -> None:
        tail = tail[1:]
        reads = tail.lower().startswith("/p ")
        tail = tail[3:] if reads else tail
        if tail.startswith('"'):
            tail = tail[1:].rpartition('"')[0]
        name, _, value = tail.partition("=")
        if reads:
            value = os.read(0, 1024).decode().splitlines()[0]
        os.environ.pop(name, None)
        if value:
            os.environ[name] = value

    def _do_cd(self, tail: str, path: str) -> None:
        place = self.cwd.parent if path == ".." else PureWindowsPath(self.cwd, path)
        if not Path(self.windows.host(place)).is_dir():
            raise FileNotFoundError(errno.ENOENT, "The system cannot find the path specified")
        self.cwd = place

    def _do_mkdir(self, tail: str, path: str) -> None:
        Path(self.windows.host(path, self.cwd)).mkdir(parents=True)

    def _do_goto(self, tail: str, label: str) -> None:
        raise KeyError(label.lower().lstrip(":"))

    def _do_exit(self, tail: str, code: str = "") -> None:
        raise _BatchEnd(int(code or self.code), "/b" not in tail.lower())

    def _do_copy(self, tail: str, source: str, target: str) -> None:
        shutil.copyfile(*(self.windows.host(path, self.cwd) for path in (source, target)))
        self.code = 0

    def _do_move(self, tail: str, source: str, target: str) -> None:
        old, new = (Path(self.windows.host(path, self.cwd)) for path in (source, target))
        old.replace(new / old.name if new.is_dir() else new)
        self.code = 0

    def _do_ren(self, tail: str, source: str, target: str) -> None:
        old = Path(self.windows.host(source, self.cwd))
        os.link(old, old.with_name(target))  # which replaces nothing
        old.unlink()

    def _do_del(self, tail: str, path: str) -> None:
        Path(self.windows.host(path, self.cwd)).unlink()

    def _do_type(self, tail: str, path: str) -> None:
        os.write(1, b"" if path == "nul" else Path(self.windows.host(path, self.cwd)).read_bytes())


def play(root: str, boot: str, name: str, tail: str) -> int:
    """Be a program of a Windows guest; return its exit code."""
    try:
        return Windows(Path(root), boot).play(name, tail)
    except (OSError, _NotPlayed) as error:
        kind = "not played" if isinstance(error, _NotPlayed) else "error"
        print(f"{kind}: {error}", file=sys.stderr)
        return 1

"""A disk that fails on demand: it stands in for `os` in `privgrad.files`, through which every write of a run goes.

Each operation below `root` is done on real files, is one numbered fault point, and is followed in a model of what a power cut
would leave: contents that were flushed, and names whose directory was flushed, survive; of all else anything may survive.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KILLS = ("kill", "kill, power cut", "kill, torn power cut")
ERRORS: dict[str, tuple[str, ...]] = {
    "mkdir": ("ENOSPC", "EDQUOT", "EROFS for good"),
    "open": ("ENOSPC", "EDQUOT", "EROFS for good", "EMFILE"),
    "open directory": ("EIO", "EMFILE", "EACCES"),
    "write": ("ENOSPC", "ENOSPC for good", "EDQUOT", "EIO", "ENOSPC in the middle", "a short write"),
    "pread": ("EIO",),
    "ftruncate": ("EIO", "EROFS for good"),
    "fsync": ("EIO", "EIO, power cut", "ENOSPC", "EDQUOT, power cut"),
    "fsync directory": ("EIO", "EIO, power cut", "EINVAL"),
    "replace": ("ENOSPC", "EIO", "EIO though done", "EROFS for good"),
    "unlink": ("EIO", "EROFS for good"),
    "close": ("EIO", "ENOSPC"),
}
"""What can go wrong with an operation, apart from the process's death before it."""


class Killed(BaseException):
    """The process is dead: nothing that it still tries to do has any effect."""


@dataclass(frozen=True)
class Point:
    """One operation of a run: its number in the life of the process, what it does, and the file that it is done to."""

    number: int
    operation: str
    name: str


@dataclass(frozen=True)
class Fault:
    """What happens at the operation of a number: an error, or the death of the process before it is done."""

    number: int
    kind: str

    @property
    def power_cut(self) -> bool:
        return "power cut" in self.kind


@dataclass(frozen=True)
class Death:
    """The process dies before the operation of this name on the file of this name, done for the n-th time (from 0)."""

    operation: str
    name: str
    occurrence: int = 0


@dataclass
class _File:
    """content: what every process sees. safe: what is on the disk. pending: writes and truncations that are not yet."""

    content: bytearray = field(default_factory=bytearray)
    safe: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)

    def change(self, at: int, data: bytes | None) -> None:
        _apply(self.content, at, data)
        self.pending.append((at, data))

    def flush(self) -> None:
        for at, data in self.pending:
            _apply(self.safe, at, data)
        self.pending.clear()

    def torn(self, chance: random.Random) -> bytes:
        """Any part of what was not flushed, in order, with the last write cut off at any byte, or its bytes not there yet."""
        left = bytearray(self.safe)
        for at, data in self.pending[: chance.randint(0, len(self.pending))]:
            _apply(left, at, data)
        kept = chance.randint(min(len(self.safe), len(left)), len(left)) if self.pending else len(left)
        del left[kept:]
        if self.pending and chance.random() < 0.25:
            left[len(self.safe) :] = bytes(max(0, len(left) - len(self.safe)))
        return bytes(left)


def _apply(content: bytearray, at: int, data: bytes | None) -> None:
    if data is None:
        del content[at:]
        return
    content.extend(bytes(max(0, at - len(content))))
    content[at : at + len(data)] = data


class Disk:
    """The operations of `os` that `privgrad.files` uses. Others are not there, so that none can be used unseen."""

    def __init__(self, root: Path, seed: int = 0) -> None:
        self.root = root
        self.trace: list[Point] = []
        self.fault: Fault | Death | None = None
        self._dead = False
        self._chance = random.Random(seed)
        self._files: dict[Path, _File] = {}
        self._folders: set[Path] = {root}
        self._safe_files: dict[Path, _File] = {}
        self._safe_folders: set[Path] = {root}
        self._names: list[tuple[Path, Any]] = []
        """Changes of names that no flush of their directory has made safe: (directory, what to do to the safe names)."""
        self._handles: dict[int, _File | Path] = {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("O_", "SEEK_")):
            return getattr(os, name)
        raise AttributeError(f"privgrad.files uses os.{name}, which the tests of faults do not know: add it to Disk")

    # The life of a process, and of the machine.

    def start_life(self, fault: Fault | Death | None = None) -> None:
        """A new process, in which `fault` happens."""
        self.trace, self.fault, self._dead = [], fault, False

    def end_life(self) -> None:
        """The process is gone; and the power, where the fault says so."""
        for descriptor in list(self._handles):
            os.close(descriptor)
        self._handles.clear()
        if isinstance(self.fault, Fault) and self.fault.power_cut and self.trace[self.fault.number :]:
            self.cut_power(torn="torn" in self.fault.kind)

    def cut_power(self, *, torn: bool = False) -> None:
        """Only what was flushed is left; torn: and any part of the rest."""
        for change in self._surviving_changes() if torn else []:
            change()
        self._names.clear()
        present = {path: file for path, file in self._safe_files.items() if self._reachable(path.parent)}
        folders = {folder for folder in self._safe_folders if self._reachable(folder)}
        shutil.rmtree(self.root)
        for folder in sorted(folders):
            folder.mkdir()
        self._files, self._folders = {}, folders
        for path, file in present.items():
            content = file.torn(self._chance) if torn else bytes(file.safe)
            self._files[path] = _File(bytearray(content), bytearray(content))
            path.write_bytes(content)
        self._safe_files, self._safe_folders = dict(self._files), set(folders)

    def _surviving_changes(self) -> list[Any]:
        """Of each directory's changes the first few, in their order."""
        counts = {folder: sum(1 for at, _ in self._names if at == folder) for folder, _ in self._names}
        kept = {folder: self._chance.randint(0, count) for folder, count in counts.items()}
        survivors = []
        for folder, change in self._names:
            if kept[folder] > 0:
                kept[folder] -= 1
                survivors.append(change)
        return survivors

    def _reachable(self, folder: Path) -> bool:
        return folder == self.root or (folder in self._safe_folders and self._reachable(folder.parent))

    @property
    def open_files(self) -> int:
        """Descriptors that were opened and not closed."""
        return len(self._handles)

    def check_nothing_else_wrote(self) -> None:
        """What lies on the real disk is what went through here, to the byte."""
        real = {path: path.read_bytes() for path in self.root.rglob("*") if path.is_file()}
        assert real.keys() == self._files.keys()
        for path, content in real.items():
            assert content == bytes(self._files[path].content), f"{path.name} was written around the layer"

    # Operations.

    def _reach(self, operation: str, path: Path) -> str | None:
        """One fault point. The kind of error that the operation must give (done by the caller where it is not plain)."""
        if self._dead:
            raise Killed
        number, name = len(self.trace), path.name
        self.trace.append(Point(number, operation, name))
        fault = self.fault
        if isinstance(fault, Death):
            same = [point for point in self.trace if (point.operation, point.name) == (fault.operation, fault.name)]
            self._dead = len(same) > fault.occurrence
        elif fault is not None:
            self._dead = fault.kind in KILLS and number == fault.number
        if self._dead:
            raise Killed
        if not isinstance(fault, Fault) or number < fault.number:
            return None
        if fault.kind.endswith("for good") and operation in (
            "mkdir",
            "open",
            "write",
            "replace",
            "unlink",
            "ftruncate",
        ):
            self._fail(fault.kind)
        return fault.kind if number == fault.number else None

    def _fail(self, kind: str | None) -> None:
        if kind is not None:
            number = getattr(errno, kind.split()[0].strip(","))
            raise OSError(number, os.strerror(number))

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        path = Path(path)
        if path.is_dir():
            self._fail(self._reach("open directory", path))
            descriptor = os.open(path, flags)
            self._handles[descriptor] = path
            return descriptor
        self._fail(self._reach("open", path))
        new = not path.exists()
        descriptor = os.open(path, flags, mode)
        if new:
            made = self._files[path] = _File()
            self._names.append((path.parent, lambda: self._safe_files.__setitem__(path, made)))
        elif flags & os.O_TRUNC:
            self._files[path].change(0, None)
        self._handles[descriptor] = self._files[path]
        return descriptor

    def _path_of(self, descriptor: int) -> Path:
        handle = self._handles[descriptor]
        if isinstance(handle, Path):
            return handle
        return next((path for path, file in self._files.items() if file is handle), Path("removed"))

    def write(self, descriptor: int, data: bytes) -> int:
        kind = self._reach("write", self._path_of(descriptor))
        size = len(data)
        if kind in ("a short write", "ENOSPC in the middle"):
            size = self._chance.randint(0 if kind.startswith("ENOSPC") else 1, max(1, size - 1))
        elif kind is not None:
            self._fail(kind)
        done = os.write(descriptor, bytes(data[:size]))
        at = os.lseek(descriptor, 0, os.SEEK_CUR) - done
        handle = self._handles[descriptor]
        assert isinstance(handle, _File)
        handle.change(at, bytes(data[:done]))
        if kind == "ENOSPC in the middle":
            self._fail(kind)
        return done

    def fsync(self, descriptor: int) -> None:
        handle = self._handles[descriptor]
        if isinstance(handle, Path):
            self._fail(self._reach("fsync directory", handle))
            for change in [change for folder, change in self._names if folder == handle]:
                change()
            self._names = [(folder, change) for folder, change in self._names if folder != handle]
            return
        kind = self._reach("fsync", self._path_of(descriptor))
        if kind is not None:
            handle.pending.clear()  # as Linux does: they are taken for clean, and are not on the disk
            self._fail(kind)
        handle.flush()

    def ftruncate(self, descriptor: int, size: int) -> None:
        self._fail(self._reach("ftruncate", self._path_of(descriptor)))
        os.ftruncate(descriptor, size)
        handle = self._handles[descriptor]
        assert isinstance(handle, _File)
        handle.change(size, None)

    def replace(self, source: Path, target: Path) -> None:
        source, target = Path(source), Path(target)
        kind = self._reach("replace", target)
        if kind != "EIO though done":
            self._fail(kind)
        os.replace(source, target)
        self._files[target] = self._files.pop(source)

        def rename() -> None:
            if source in self._safe_files:
                self._safe_files[target] = self._safe_files.pop(source)

        self._names.append((target.parent, rename))
        self._fail(kind)

    def unlink(self, path: Path) -> None:
        path = Path(path)
        self._fail(self._reach("unlink", path))
        os.unlink(path)
        self._files.pop(path)
        self._names.append((path.parent, lambda: self._safe_files.pop(path, None)))

    def mkdir(self, path: Path) -> None:
        path = Path(path)
        self._fail(self._reach("mkdir", path))
        os.mkdir(path)
        self._folders.add(path)
        self._names.append((path.parent, lambda: self._safe_folders.add(path)))

    def close(self, descriptor: int) -> None:
        if self._dead:
            raise Killed
        kind = self._reach("close", self._path_of(descriptor))
        os.close(descriptor)
        del self._handles[descriptor]
        self._fail(kind)

    def pread(self, descriptor: int, size: int, at: int) -> bytes:
        self._fail(self._reach("pread", self._path_of(descriptor)))
        return os.pread(descriptor, size, at)

    def lseek(self, descriptor: int, at: int, how: int) -> int:
        return os.lseek(descriptor, at, how)

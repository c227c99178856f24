"""The few ways in which a run writes: a line appended and flushed, or a file replaced whole. Nothing is ever half written.

Every write of a run goes through the functions of `os` that are called here and nowhere else, so that tests can make each of
them fail (docs/guarantees/crash_safety.md).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import weakref
from pathlib import Path
from typing import Any

from privgrad.errors import PrivgradError

_DIRECTORIES_CANNOT_BE_FLUSHED = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES, errno.EPERM, errno.EBADF}
_TAIL = 2**16


def canonical_json(data: object) -> str:
    """One line of JSON with sorted keys and no spaces: equal data give equal text, which is what is hashed."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest(data: object) -> str:
    """SHA-256 (hex) of the canonical JSON of `data`."""
    return hashlib.sha256(canonical_json(data).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes.

    Raises:
        PrivgradError: a file that cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise PrivgradError(f"{path} cannot be read: {reason(error)}") from error


def reason(error: OSError) -> str:
    """What the operating system says, in its own words."""
    return error.strerror or str(error)


def sync_directory(directory: Path) -> None:
    """Make a rename or a new file in `directory` survive a power cut (where the file system can)."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _DIRECTORIES_CANNOT_BE_FLUSHED:
            raise


def make_directory(directory: Path) -> None:
    """Make `directory` and its parents where they are missing, each so that it survives a power cut."""
    if directory.exists():
        sync_directory(directory.parent)  # whoever made it may have died before this
        return
    make_directory(directory.parent)
    with contextlib.suppress(FileExistsError):  # another process was faster
        os.mkdir(directory)
    sync_directory(directory.parent)


def write_atomically(path: Path, content: bytes | str, *, secret: bool = False) -> None:
    """Replace `path` by `content` so that a reader, or a crash at any moment, sees the old file or the new one.

    What a crash leaves of an unfinished write (`.NAME.tmp`) is replaced by the next one. One process at a time. secret: only its
    owner can read it.

    Raises:
        PrivgradError: a path that cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        if secret:  # what a crash left may be open to all
            remove(temporary)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600 if secret else 0o666)
        try:
            _write(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise PrivgradError(f"{path} cannot be written: {reason(error)}") from error


def remove(path: Path) -> None:
    """Remove a file, so that it stays removed; one that is not there is fine.

    Raises:
        PrivgradError: a file that cannot be removed.
    """
    try:
        os.unlink(path)
        sync_directory(path.parent)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise PrivgradError(f"{path} cannot be removed: {reason(error)}") from error


class AppendFile:
    """A file that grows at its end and is open in one process at a time.

    Guarantee: `append` returns only after its bytes were flushed to the disk.

    Raises (here and in all methods):
        OSError: the file cannot be opened, written or flushed.
        PrivgradError: another process holds it.
    """

    def __init__(self, path: Path, *, create: bool = False) -> None:
        self._flushed = False
        self._descriptor: int | None = None
        self._descriptor = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o666)
        _opened.add(self)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if create:
                sync_directory(path.parent)
        except BlockingIOError:
            self.close()
            raise PrivgradError(
                f"{path.parent} is in use by another privgrad process; wait for it or choose another directory"
            ) from None
        except BaseException:
            self.close()
            raise

    @property
    def closed(self) -> bool:
        """True after `close`."""
        return self._descriptor is None

    def append(self, data: bytes) -> None:
        """Write `data` at the end and flush it to the disk, with everything before it.

        An earlier process may have died before its flush, or seen it fail; after a failure the system may take pages for flushed
        that are not. So the first call writes the last ones once more.
        """
        descriptor = self._open()
        if not self._flushed:
            end = os.lseek(descriptor, 0, os.SEEK_END)
            start = os.lseek(descriptor, max(0, end - _TAIL), os.SEEK_SET)
            data = os.pread(descriptor, end - start, start) + data
        _write(descriptor, data)
        os.fsync(descriptor)
        self._flushed = True

    def cut(self, size: int) -> None:
        """Keep the first `size` bytes only."""
        os.ftruncate(self._open(), size)
        os.lseek(self._open(), size, os.SEEK_SET)
        os.fsync(self._open())

    def close(self) -> None:
        """Give the file and its lock back. Nothing is lost if that fails: all of it was flushed."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):  # in words: a child just forked holds the file too, until it first runs
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        self.let_go()

    def let_go(self) -> None:
        """Close the file in this process only: the lock stays with the process that this one was forked from."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def __del__(self) -> None:
        self.close()

    def _open(self) -> int:
        if self._descriptor is None:
            raise OSError(errno.EBADF, "the file is closed")
        return self._descriptor


_opened: weakref.WeakSet[AppendFile] = weakref.WeakSet()


def _close_in_child() -> None:
    """A data-loading worker that outlives its killed parent must not keep the run locked, nor write to its ledger."""
    for file in list(_opened):
        file.let_go()


os.register_at_fork(after_in_child=_close_in_child)


def is_locked(path: Path) -> bool:
    """True where a living process has `path` open as an `AppendFile`."""
    try:
        with path.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def append_line(path: Path, line: str) -> None:
    """Add one line to a file that is made where it is missing, and flush it to the disk.

    Raises:
        PrivgradError: a path that cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            _write(descriptor, (line + "\n").encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        sync_directory(path.parent)
    except OSError as error:
        raise PrivgradError(f"{path} cannot be written: {reason(error)}") from error


def _write(descriptor: int, data: bytes) -> None:
    """All of `data`: a write may take only a part, as on a disk that is nearly full."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        PrivgradError: a missing file, or one that does not hold a JSON object.
    """
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise PrivgradError(f"{path} cannot be read: {reason(error)}") from error
    except (ValueError, RecursionError) as error:
        raise PrivgradError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise PrivgradError(f"{path} holds a {type(data).__name__}; expected a JSON object")
    return data

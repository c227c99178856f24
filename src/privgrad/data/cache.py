"""Decoded images on the disk, so that they are decoded once. As private as their source: only the owner can read them."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import sys
import time
import zlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import PIL
from numpy.typing import NDArray

from privgrad.data.edges import check_memory
from privgrad.errors import PrivgradError
from privgrad.files import canonical_json, digest

_FORMAT = 1
"""Of the cached files and of what decoding does: an entry of another format is made again."""
_LONGEST_HEADER = 4096
_STALE_SECONDS = 24 * 3600


class Cache:
    """One directory of decoded images. Nothing is written before `commit`, so that refused data leaves nothing behind."""

    def __init__(self, setting: str) -> None:
        """setting: data.cache, which is "auto" ($PRIVGRAD_CACHE or ~/.cache/privgrad), "none", or a directory."""
        self._setting = setting
        self._waiting: list[tuple[Entry, NDArray[numpy.uint8]]] = []

    @cached_property
    def directory(self) -> Path | None:
        """Where the images are kept, or None. Looked at when there are images, not before."""
        if self._setting == "none":
            return None
        given = os.environ.get("PRIVGRAD_CACHE") if self._setting == "auto" else self._setting
        try:
            return _private(Path(given).expanduser() if given else Path.home() / ".cache" / "privgrad")
        except RuntimeError as error:  # no home directory
            raise PrivgradError(
                f"the cache cannot be found: {error}; give data.cache = 'none', or a directory"
            ) from error

    def entry(self, key: dict[str, Any], files: Iterable[Path]) -> Entry:
        """The place of one split's images. key: what they are; files: what they were read from, in order."""
        return Entry(self, key, () if self.directory is None else files)

    def keep(self, entry: Entry, pixels: NDArray[numpy.uint8]) -> None:
        """Write the images at the next `commit`."""
        if self.directory is not None:
            self._waiting.append((entry, pixels))

    def commit(self) -> None:
        """Write what is waiting, and say so. A cache that cannot be written is no reason not to train."""
        waiting, self._waiting = self._waiting, []
        if not waiting or self.directory is None:
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            for entry, pixels in waiting:
                entry.write(pixels)
        except OSError as error:
            print(
                f"privgrad: no decoded copy of the images is kept: {error.filename or self.directory}: {error.strerror or error}",
                file=sys.stderr,
            )
            return
        print(
            f"privgrad: a decoded copy of the private images is kept in {self.directory} (only you can read it); "
            "data.cache = 'none' keeps none",
            file=sys.stderr,
        )


class Entry:
    """One file of a cache: a line of JSON, then the pixels. It is good only for the files it was made from, as they were."""

    def __init__(self, cache: Cache, key: dict[str, Any], files: Iterable[Path]) -> None:
        self._cache = cache
        # Taken before they are read: what changes from now on does not fit it. (Another Pillow may decode a little differently.)
        self._stamp = digest([_FORMAT, PIL.__version__, [_stamp(path) for path in files]])
        self._name = digest(key)[:32]

    @property
    def path(self) -> Path:
        """The file."""
        assert self._cache.directory is not None
        return self._cache.directory / f"{self._name}.pixels"

    def load(self, count: int) -> NDArray[numpy.uint8] | None:
        """The images, or None where there are none, or they are damaged, or of other files."""
        if self._cache.directory is None:
            return None
        try:
            with self.path.open("rb") as stream:
                header = json.loads(stream.readline(_LONGEST_HEADER))
                shape = tuple(header["shape"])
                if header["stamp"] != self._stamp or len(shape) != 4 or shape[0] != count:
                    return None
                size = os.fstat(stream.fileno()).st_size - stream.tell()
                if size != int(numpy.prod(shape, dtype=object)):
                    return None
                check_memory(str(self.path), size)
                pixels = numpy.fromfile(stream, dtype=numpy.uint8).reshape(shape)
                return pixels if self._checksum(pixels) == header["crc"] else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def _checksum(self, pixels: NDArray[numpy.uint8]) -> int:
        """Of the pixels and of what they are said to be."""
        return zlib.crc32(pixels.data, zlib.crc32(canonical_json([self._stamp, list(pixels.shape)]).encode()))

    def keep(self, pixels: NDArray[numpy.uint8]) -> None:
        """Write the images when the whole data set was found to be good."""
        self._cache.keep(self, pixels)

    def write(self, pixels: NDArray[numpy.uint8]) -> None:
        """Replace the file, or leave it as it was."""
        pixels = numpy.ascontiguousarray(pixels)
        header = {"stamp": self._stamp, "shape": list(pixels.shape), "crc": self._checksum(pixels)}
        _remove_stale(self.path.parent, self._name)
        temporary = self.path.with_name(f".{self._name}.{os.getpid()}.tmp")
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(canonical_json(header).encode() + b"\n")
                stream.write(pixels.data)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(self.path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _private(directory: Path) -> Path:
    """The directory, absolute, and closed to others where it is there already."""
    directory = directory.absolute()
    try:
        found = directory.stat()
    except OSError:  # not there yet, or not for us: `commit` says so
        return directory
    if not stat.S_ISDIR(found.st_mode):
        raise PrivgradError(f"the cache {directory} is no directory; choose another with data.cache, or 'none'")
    if found.st_mode & 0o077:
        raise PrivgradError(
            f"the cache {directory} is open to other users, and decoded private images would be kept in it; "
            f"run chmod 700 {directory}, or choose another with data.cache, or 'none'"
        )
    return directory


def _stamp(path: Path) -> list[Any]:
    """What changes when a file changes."""
    try:
        found = path.stat()
    except OSError as error:
        raise PrivgradError(f"{path} cannot be read: {error.strerror or error}") from error
    # (Archives and copies bring times of modification along; those of the change itself they cannot.)
    return [str(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _remove_stale(directory: Path, name: str) -> None:
    """Remove what a crash left half written, a day later: it is private too."""
    for path in directory.glob(f".{name}.*.tmp"):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < time.time() - _STALE_SECONDS:
                path.unlink()

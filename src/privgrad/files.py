"""The few ways in which privgrad writes files: appended and flushed, or replaced whole. Nothing is ever half written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from privgrad.errors import PrivgradError


def canonical_json(data: object) -> str:
    """One line of JSON with sorted keys and no spaces: equal data give equal text, which is what is hashed."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest(data: object) -> str:
    """SHA-256 (hex) of the canonical JSON of `data`."""
    return hashlib.sha256(canonical_json(data).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync_directory(directory: Path) -> None:
    """Make a rename or a new file in `directory` survive a power cut (where the platform can)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replace `path` by `content` so that a reader, or a crash at any moment, sees the old file or the new one."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise PrivgradError(f"{path} cannot be written: {error.strerror or error}") from error
    sync_directory(path.parent)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        PrivgradError: a missing file, or one that does not hold a JSON object.
    """
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise PrivgradError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise PrivgradError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise PrivgradError(f"{path} holds a {type(data).__name__}; expected a JSON object")
    return data

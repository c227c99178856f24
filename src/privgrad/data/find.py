"""Where the data is: from the name in a configuration to the files of each split."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from privgrad.errors import PrivgradError, nearest

FILE_KINDS = (".parquet", ".csv", ".npz")
_MOST_NAMES = 20
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})$")


@dataclass(frozen=True)
class Files:
    """One split: a file, the shards of one file in order, or a folder of class folders."""

    paths: tuple[Path, ...]

    @property
    def first(self) -> Path:
        """The file, the first shard, or the folder."""
        return self.paths[0]

    @property
    def is_folder(self) -> bool:
        """True for a folder of class folders."""
        return self.first.is_dir()

    @property
    def kind(self) -> str:
        """The extension, in lower case."""
        return self.first.suffix.lower()

    def __str__(self) -> str:
        return str(self.first) if len(self.paths) == 1 else f"{self.first} (one of {len(self.paths)} shards)"


def data_directory() -> Path:
    """$PRIVGRAD_DATA, or data/ in the current directory."""
    return expanded("$PRIVGRAD_DATA", Path(os.environ.get("PRIVGRAD_DATA") or "data"))


def locate(key: str, source: str, *, beside: Path | None = None, embedded: Collection[str] = ()) -> Path:
    """The absolute path that a name in the configuration means.

    Looked up in $PRIVGRAD_DATA (but not what begins with "./" or "../"), then beside the configuration file, then as given; an
    absolute path, or one that begins with "~", only as given. embedded: names to hint at where nothing is found.
    """
    given = Path(source)
    if source.startswith("~"):
        places = [expanded(key, given)]
    else:
        explicit = given.is_absolute() or source.split("/", 1)[0] in (".", "..")
        places = [] if explicit else [data_directory() / given]
        if beside is not None and not given.is_absolute():
            places.append(beside / given)
        places.append(given)
    for place in places:
        if _exists(key, place):
            return place.resolve()
    there = _entries(data_directory())
    known = [*embedded, *(there if len(there) <= _MOST_NAMES else difflib.get_close_matches(source, there, n=1))]
    looked = ", ".join(dict.fromkeys(str(place) for place in places))
    what = f"neither an embedded data set ({', '.join(embedded)}) nor" if embedded else "not"
    hint = f"; {nearest(source, known)}" if known else ""
    raise PrivgradError(f"{key} is {source!r}, {what} a file or directory (looked for {looked}){hint}")


def split_files(path: Path) -> tuple[Files, Files | None]:
    """The training files of a source, and its test files where it holds both.

    A file or a folder of class folders is one split. A directory with train.* (or train/) may hold test.* (or test/) as well.
    Shards are named as by Hugging Face, train-00000-of-00002.parquet.
    """
    if not path.is_dir():
        return Files((_regular(path),)), None
    train = _named_split(path, "train")
    if train is not None:
        return train, _named_split(path, "test")
    if any(entry.is_dir() for entry in _visible(path)):
        return Files((path,)), None
    files = [entry.name for entry in _visible(path) if entry.suffix.lower() in FILE_KINDS]
    if files:
        raise PrivgradError(
            f"{path} holds {', '.join(files[:5])} but no train.* file; name the file itself as data.source"
        )
    raise PrivgradError(
        f"{path} holds nothing to read; expected train.* and test.* ({', '.join(FILE_KINDS)}), or folders of images by class"
    )


def one_split(path: Path) -> Files:
    """The files of a test split that is named by itself."""
    train, test = split_files(path)
    if test is not None:
        raise PrivgradError(f"data.test_source is {path}, which holds two splits; name the file itself")
    return train


def _named_split(directory: Path, name: str) -> Files | None:
    whole: list[Path] = []
    shards: dict[tuple[int, int], Path] = {}
    for entry in _visible(directory):
        if entry.name == name and entry.is_dir():
            # A folder of images called "train" is a class (of vehicles), not a split.
            if any(inside.is_dir() for inside in _visible(entry)):
                whole.append(entry)
        elif entry.suffix.lower() in FILE_KINDS:
            shard = _SHARD.search(entry.stem)
            if entry.stem == name:
                whole.append(_regular(entry))
            elif shard and entry.stem[: shard.start()] == name and entry.suffix.lower() == ".parquet":
                shards[int(shard[1]), int(shard[2])] = _regular(entry)
    if len(whole) + bool(shards) > 1:
        names = ", ".join(path.name for path in [*whole, *shards.values()][:3])
        raise PrivgradError(f"{directory} holds the {name} split more than once ({names}); leave one of them")
    if shards:
        (total, *others) = {total for _, total in shards}
        if others or sorted(number for number, _ in shards) != list(range(total)):
            raise PrivgradError(f"{directory} holds {len(shards)} of {total} shards of the {name} split; expected all")
        return Files(tuple(shards[key] for key in sorted(shards)))
    return Files((whole[0],)) if whole else None


def _regular(path: Path) -> Path:
    if path.suffix.lower() not in FILE_KINDS:
        raise PrivgradError(
            f"{path} has an extension that is not read; expected {', '.join(FILE_KINDS)}, or a directory of images"
        )
    if not path.is_file():
        raise PrivgradError(f"{path} is no ordinary file; expected one")
    return path


def _visible(directory: Path) -> list[Path]:
    try:
        return sorted(entry for entry in directory.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise PrivgradError(f"{directory} cannot be read: {error.strerror or error}") from error


def _entries(directory: Path) -> list[str]:
    try:
        return [entry.name for entry in _visible(directory)] if directory.is_dir() else []
    except (OSError, PrivgradError):
        return []


def _exists(key: str, path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise PrivgradError(f"{key} is {str(path)!r}, which cannot be read: {error.strerror or error}") from error


def expanded(key: str, path: Path) -> Path:
    """A path with the user's home in the place of "~"."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise PrivgradError(f"{key} is {str(path)!r}: {error}") from error

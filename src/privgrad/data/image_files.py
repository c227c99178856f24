"""Where images come from: a parquet file in the Hugging Face layout, or a folder of class folders."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy
import pyarrow
from pyarrow import compute

from privgrad.data.cache import Cache
from privgrad.data.columns import ParquetColumns, first_true, plain, read_keys
from privgrad.data.edges import quoted
from privgrad.data.find import Files
from privgrad.data.images import SUFFIXES, Blob, read_pixels, scaling
from privgrad.data.part import Part, agree, checked_labels
from privgrad.data.settings import Classes, ImageSettings
from privgrad.errors import PrivgradError

_COLUMNS = ("image", "img")


def open_parquet_images(
    files: Files, settings: ImageSettings, stated: Classes | None, key: str | None, cache: Cache
) -> Part:
    """A parquet file with a column of images (struct<bytes, path>) and one of whole-number labels.

    stated: the classes, where the file's `huggingface` metadata does not name them.
    """
    columns = ParquetColumns(files)
    column = _image_column(columns, settings)
    columns.require("data.images.label", settings.label)
    classes = agree(str(files), "data.images.classes", columns.class_names(settings.label), stated)
    labels = plain(columns.read([settings.label]).column(0))
    if not pyarrow.types.is_integer(labels.type):
        raise PrivgradError(
            f"{files}: the label column {settings.label!r} is a column of {labels.type}; expected whole numbers from 0"
        )
    row = first_true(compute.is_null(labels).to_numpy(zero_copy_only=False))
    if row is not None:
        raise PrivgradError(f"{columns.where(row)}: label {settings.label!r} is missing; leave the record out")

    def blobs() -> Iterator[Blob]:
        row = 0
        for batch in columns.blobs(column):
            for value in batch:
                yield _blob(columns, row, value)
                row += 1

    settings = dataclasses.replace(settings, column=column)
    return Part(
        where=str(files),
        labels=checked_labels(labels.to_numpy(zero_copy_only=False), classes, columns.where),
        classes=classes,
        inputs=lambda: read_pixels(blobs, len(labels), settings, files.first, files.paths, cache),
        scaling=scaling(settings),
        keys=None if key is None else read_keys(columns, key),
    )


def open_folder(files: Files, settings: ImageSettings, stated: Classes | None, key: str | None, cache: Cache) -> Part:
    """A folder with one folder of images per class.

    stated: the classes, where their order matters or some have no folder.
    """
    root = files.first
    if key is not None:
        raise PrivgradError(
            f"key is {key!r}, and {root} is a folder of images, which has no columns; put them in a parquet file"
        )
    folders = _class_folders(root)
    found = tuple(folders)
    named = isinstance(stated, tuple) and set(found) <= set(stated)
    classes = stated if named and stated is not None else agree(str(root), "data.images.classes", found, stated)
    names = classes if isinstance(classes, tuple) else found
    paths = [path for name in names for path in folders.get(name, [])]
    labels = [code for code, name in enumerate(names) for _ in folders.get(name, [])]

    def blobs() -> Iterator[Blob]:
        for path in paths:
            try:
                data = path.read_bytes()
            except OSError as error:
                raise PrivgradError(f"{path} cannot be read: {error.strerror or error}") from error
            yield Blob(data, path.__str__)

    return Part(
        where=str(root),
        labels=checked_labels(numpy.array(labels, dtype=numpy.int64), classes, lambda row: str(paths[row])),
        classes=classes,
        inputs=lambda: read_pixels(blobs, len(paths), settings, root, paths, cache),
        scaling=scaling(settings),
        by_name=True,
    )


def _image_column(columns: ParquetColumns, settings: ImageSettings) -> str:
    if settings.column is not None:
        columns.require("data.images.column", settings.column)
        names = [settings.column]
    else:
        names = [name for name in _COLUMNS if name in columns.names]
    if len(names) != 1:
        what = "both 'image' and 'img'" if names else "no column 'image' or 'img'"
        raise PrivgradError(
            f"{columns.files} has {what}; name the column of images as data.images.column, or describe a table in [data.table]; "
            f"it has {columns.listed}"
        )
    columns.require("data.images.column", names[0])
    kind = columns.schema.field(names[0]).type
    inner = kind.field("bytes").type if pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else None
    if inner is None or not (pyarrow.types.is_binary(inner) or pyarrow.types.is_large_binary(inner)):
        raise PrivgradError(
            f"{columns.files}: column {names[0]!r} is a column of {kind}; expected images, struct<bytes, path>"
        )
    return names[0]


def _blob(columns: ParquetColumns, row: int, value: dict[str, object] | None) -> Blob:
    value = value or {}
    path, data = value.get("path"), value.get("bytes")

    def where() -> str:
        return columns.where(row) + (f" ({path if str(path).isprintable() else quoted(path)})" if path else "")

    if not isinstance(data, bytes) or not data:
        raise PrivgradError(f"{where()}: the image has no bytes; expected the image file itself in the column")
    return Blob(data, where)


def _class_folders(root: Path) -> dict[str, list[Path]]:
    """The image files of each class folder, both sorted by name; hidden ones are left out."""
    folders: dict[str, list[Path]] = {}
    try:
        for entry in sorted(root.iterdir()):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders[entry.name] = sorted(path for path in entry.iterdir() if not path.name.startswith("."))
            elif entry.suffix.lower() in SUFFIXES:
                raise PrivgradError(f"{entry} is in no class folder; expected {root.name}/CLASS/{entry.name}")
        places: dict[tuple[int, int], Path] = {}
        for paths in folders.values():
            for path in paths:
                if path.suffix.lower() not in SUFFIXES or not path.is_file():
                    raise PrivgradError(
                        f"{path} is no image file ({', '.join(SUFFIXES)}); take it out of the class folder"
                    )
                found = path.stat()
                twin = places.setdefault((found.st_dev, found.st_ino), path)
                if twin != path:
                    raise PrivgradError(f"{path} and {twin} are one file, and would count as two records; take one out")
    except OSError as error:
        raise PrivgradError(f"{error.filename or root} cannot be read: {error.strerror or error}") from error
    if len(folders) < 2:
        raise PrivgradError(f"{root} holds {len(folders)} class folder(s); expected one for each class, two or more")
    return folders

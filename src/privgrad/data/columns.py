"""Columns of a parquet or CSV file, read by name as Arrow tables."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray
from pyarrow import compute

from privgrad.data.edges import quoted, reading
from privgrad.data.find import Files
from privgrad.errors import PrivgradError

_BLOCK = 16 * 2**20
"""Bytes of CSV parsed at a time: the longest row that can be read."""


class Columns:
    """The columns of one split. Rows are numbered from 1, header lines not counted."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self.schema: pyarrow.Schema = pyarrow.schema([])

    @property
    def names(self) -> list[str]:
        """The names of all columns."""
        return list(self.schema.names)

    def read(self, names: list[str]) -> pyarrow.Table:
        """Some columns, whole, in the order of `names`."""
        raise NotImplementedError

    def where(self, row: int) -> str:
        """The place of a row (counted from 0) in words."""
        return f"{self.files.first}, row {row + 1}"

    @property
    def listed(self) -> str:
        """The names of the columns, for an error text."""
        return _listed(self.names)

    def require(self, key: str, name: str) -> None:
        """Refuse a column that is not there, or is there twice."""
        count = self.names.count(name)
        if count == 0:
            raise PrivgradError(f"{key} is {name!r}, and {self.files} has no such column; it has {self.listed}")
        if count > 1:
            raise PrivgradError(f"{self.files} has {count} columns called {name!r}; give each a name of its own")


class ParquetColumns(Columns):
    """A parquet file, or the shards of one."""

    def __init__(self, files: Files) -> None:
        super().__init__(files)
        self._open: list[pyarrow.parquet.ParquetFile] = []
        for path in files.paths:
            _check_not_empty(path)
            with reading(str(path)):
                self._open.append(pyarrow.parquet.ParquetFile(path, page_checksum_verification=True))
                schema = self._open[-1].schema_arrow
                _ = schema.names  # that are no text are found here
            if len(self._open) > 1 and not schema.equals(self.schema):
                raise PrivgradError(
                    f"{path} has other columns than {files.first}; shards of one split must have the same"
                )
            self.schema = schema
        with reading(str(files)):
            self._counts = [int(file.metadata.num_rows) for file in self._open]
        if min(self._counts) < 0:
            raise PrivgradError(f"{files} cannot be read: it claims a negative number of rows")

    def read(self, names: list[str]) -> pyarrow.Table:
        tables = []
        for path, file, count in zip(self.files.paths, self._open, self._counts, strict=True):
            with reading(str(path)):
                table = file.read(columns=names, use_threads=False).select(names)
                table.validate(full=True)
            if table.num_rows != count:
                raise PrivgradError(f"{path} claims {count} rows and holds {table.num_rows}; the file is damaged")
            tables.append(table)
        return pyarrow.concat_tables(tables)

    def blobs(self, name: str, rows: int = 500) -> Iterator[list[dict[str, Any] | None]]:
        """A column of Hugging Face images, some rows at a time: {"bytes": ..., "path": ...} each."""
        for path, file in zip(self.files.paths, self._open, strict=True):
            batches = file.iter_batches(batch_size=rows, columns=[name], use_threads=False)
            while True:
                with reading(str(path)):
                    batch = next(batches, None)
                    if batch is not None:
                        batch.validate(full=True)
                        values = batch.column(0).to_pylist()
                if batch is None:
                    break
                yield values

    def where(self, row: int) -> str:
        for path, count in zip(self.files.paths, self._counts, strict=True):
            if row < count:
                return f"{path}, row {row + 1}"
            row -= count
        return str(self.files)

    def class_names(self, label: str) -> tuple[str, ...] | None:
        """The names of a ClassLabel column in the `huggingface` metadata, where there is one."""
        found = {_class_names(path, file, label) for path, file in zip(self.files.paths, self._open, strict=True)}
        if len(found) > 1:
            raise PrivgradError(f"{self.files}: the shards name different classes for {label!r}; write them again")
        return found.pop()


class CsvColumns(Columns):
    """A CSV file: commas, UTF-8, a line of names first. Every value is read as text; an empty one is null."""

    def __init__(self, files: Files) -> None:
        super().__init__(files)
        _check_not_empty(files.first)
        _check_text(files.first)
        with self._reading(), pyarrow.csv.open_csv(files.first, **self._options()) as stream:
            self.schema = stream.schema
            _ = self.schema.names

    def read(self, names: list[str]) -> pyarrow.Table:
        convert = pyarrow.csv.ConvertOptions(
            include_columns=names,
            column_types=dict.fromkeys(names, pyarrow.string()),
            strings_can_be_null=True,
            null_values=[""],
        )
        with self._reading():
            return pyarrow.csv.read_csv(self.files.first, convert_options=convert, **self._options())

    @staticmethod
    def _options() -> dict[str, Any]:
        return {
            "read_options": pyarrow.csv.ReadOptions(use_threads=False, block_size=_BLOCK),
            "parse_options": pyarrow.csv.ParseOptions(newlines_in_values=True),
        }

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """As `reading`, with rows counted as everywhere else."""
        try:
            with reading(str(self.files.first)):
                yield
        except PrivgradError as error:
            text = re.sub(r"(Expected \d+ columns, got \d+).*", r"\1", str(error))  # the record itself follows
            raise PrivgradError(re.sub(r"Row #(\d+)", lambda found: f"row {int(found[1]) - 1}", text)) from None


def open_columns(files: Files) -> Columns:
    """The columns of a parquet or CSV file."""
    return ParquetColumns(files) if files.kind == ".parquet" else CsvColumns(files)


def texts(column: pyarrow.ChunkedArray) -> pyarrow.Array | None:
    """A column as text without spaces around it, or None where it is of a kind that has no text.

    Truth values become "true" and "false"; whole numbers their digits.
    """
    column = plain(column)
    kind = column.type
    if pyarrow.types.is_null(kind):
        return pyarrow.nulls(len(column), pyarrow.string())
    if pyarrow.types.is_boolean(kind) or pyarrow.types.is_integer(kind):
        return column.cast(pyarrow.string())
    if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
        return compute.utf8_trim(column, characters=" \t")
    return None


def plain(column: pyarrow.ChunkedArray) -> pyarrow.Array:
    """One array instead of chunks, values instead of dictionary codes."""
    if pyarrow.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if getattr(pyarrow.types, "is_string_view", lambda kind: False)(column.type):
        column = column.cast(pyarrow.string())
    return column.combine_chunks() if isinstance(column, pyarrow.ChunkedArray) else column


def first_true(mask: NDArray[numpy.bool_]) -> int | None:
    """The first row where the mask holds."""
    return int(mask.argmax()) if mask.any() else None


def read_keys(columns: Columns, key: str) -> NDArray[Any]:
    """The values of the column that says which unit a record belongs to."""
    columns.require("key", key)
    column = plain(columns.read([key]).column(0))
    if pyarrow.types.is_nested(column.type):
        raise PrivgradError(
            f"key {key!r} of {columns.files} is a column of {column.type}; expected one value per record"
        )
    missing = compute.is_null(column, nan_is_null=True).to_numpy(zero_copy_only=False)
    trimmed = texts(column)
    column = column if trimmed is None else trimmed
    row = first_true(missing | _empty(trimmed))
    if row is not None:
        raise PrivgradError(f"{columns.where(row)}: key {key!r} is missing; every record must belong to a unit")
    with reading(f"key {key!r} of {columns.files}"):
        keys: NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return keys


def _class_names(path: Path, file: pyarrow.parquet.ParquetFile, label: str) -> tuple[str, ...] | None:
    text = (file.schema_arrow.metadata or {}).get(b"huggingface")
    if text is None:
        return None
    try:
        feature = json.loads(text)["info"]["features"].get(label)
        names = feature.get("names") if isinstance(feature, dict) else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PrivgradError(f"{path} has 'huggingface' metadata that cannot be read; write the file again") from error
    if names is None:
        return None
    good = isinstance(names, list) and all(isinstance(name, str) for name in names) and len(set(names)) == len(names)
    if not good or len(names) < 2:
        raise PrivgradError(f"{path}: the metadata of {label!r} has no list of at least two different class names")
    return tuple(names)


def _check_not_empty(path: Path) -> None:
    with reading(str(path)):
        size = path.stat().st_size
    if size == 0:
        raise PrivgradError(f"{path} is empty; expected at least one record")


def _check_text(path: Path) -> None:
    """Refuse what the CSV parser would take for something else: UTF-16, binary files, a quotation mark that is never closed."""
    quotes = 0
    with reading(str(path)), path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            if b"\0" in block:
                raise PrivgradError(f"{path} is no UTF-8 text (it holds zero bytes; UTF-16?); save it as CSV in UTF-8")
            quotes += block.count(b'"')
    if quotes % 2:
        raise PrivgradError(
            f"{path} has a quotation mark that is not closed ({quotes} in all); the records after it would be lost"
        )


def _empty(column: pyarrow.Array | None) -> Any:
    if column is None:
        return False
    return compute.equal(compute.binary_length(column), 0).fill_null(False).to_numpy(zero_copy_only=False)


def _listed(names: list[str]) -> str:
    shown = ", ".join(quoted(name) for name in names[:20])
    return shown + (f" and {len(names) - 20} more" if len(names) > 20 else "") if names else "none"

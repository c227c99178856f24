"""Tables: columns of numbers and categories as features, by a schema whose bounds and values are stated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import pyarrow
import torch
from numpy.typing import NDArray
from pyarrow import compute
from torch import Tensor

from privgrad.data.columns import Columns, first_true, open_columns, plain, read_keys, texts
from privgrad.data.edges import check_memory, quoted, reading
from privgrad.data.find import Files
from privgrad.data.part import Part
from privgrad.data.settings import Categorical, Column, Numeric, TableSettings, Value
from privgrad.errors import PrivgradError

_NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"

Floats = NDArray[numpy.float64]
Mask = NDArray[numpy.bool_]


def open_table(files: Files, settings: TableSettings, key: str | None) -> Part:
    """A table with its target read; features follow."""
    columns = open_columns(files)
    columns.require("data.table.target", settings.target)
    for name, _ in settings.columns:
        columns.require("data.table.columns", name)
    target = columns.read([settings.target]).column(0)
    codes = _codes(columns, "target", settings.target, target, settings.classes)
    row = first_true(codes < 0)
    if row is not None:
        value = plain(target)[row].as_py()
        expected = quoted(list(settings.classes))
        raise PrivgradError(
            f"{columns.where(row)}: target {settings.target!r} is {_said(value)}; expected one of {expected}"
        )
    return Part(
        where=str(files),
        labels=torch.from_numpy(codes),
        classes=tuple(str(value) for value in settings.classes),
        inputs=lambda: features(columns, settings),
        scaling=_scaling(settings),
        keys=None if key is None else read_keys(columns, key),
    )


def features(columns: Columns, settings: TableSettings) -> Tensor:
    """The features of every record, float32 [n, features], in the order of the schema.

    A number is clamped to its bounds and scaled to [-1, 1]; a category is one-hot.
    """
    table = columns.read([name for name, _ in settings.columns])
    widths = [len(column.values) if isinstance(column, Categorical) else 1 for _, column in settings.columns]
    check_memory(str(columns.files), 4 * table.num_rows * sum(widths))
    out = numpy.zeros((table.num_rows, sum(widths)), dtype=numpy.float32)
    start = 0
    for (name, column), width, values in zip(settings.columns, widths, table.columns, strict=True):
        encode: Callable[..., Mask] = _numeric if isinstance(column, Numeric) else _one_hot
        bad = encode(columns, name, values, column, out[:, start : start + width])
        row = first_true(bad) if settings.missing == "refuse" else None
        if row is not None:
            value = _said(plain(values)[row].as_py())
            raise PrivgradError(
                f"{columns.where(row)}: column {name!r} is {value}; expected {_expected(column)} "
                "(mend it, or count such as 0: data.table.missing = 'zero')"
            )
        start += width
    return torch.from_numpy(out)


def _numeric(
    columns: Columns, name: str, values: pyarrow.ChunkedArray, column: Numeric, out: NDArray[numpy.float32]
) -> Mask:
    numbers = _numbers(columns, name, values)
    good = numpy.isfinite(numbers)
    clamped = numpy.clip(numbers[good], column.low, column.high)
    low, high = float(column.low), float(column.high)
    out[good, 0] = 2 * ((clamped - low) / (high - low)) - 1
    return ~good


def _one_hot(
    columns: Columns, name: str, values: pyarrow.ChunkedArray, column: Categorical, out: NDArray[numpy.float32]
) -> Mask:
    codes = _codes(columns, "column", name, values, column.values)
    good = codes >= 0
    out[numpy.flatnonzero(good), codes[good]] = 1
    return ~good


def _codes(
    columns: Columns, what: str, name: str, column: pyarrow.ChunkedArray, values: tuple[Value, ...]
) -> NDArray[numpy.int64]:
    """The place of each value among `values`, int64 [n]; -1 for what is not among them."""
    if isinstance(values[0], bool):
        found = _texts(columns, what, name, column)
        found = compute.utf8_lower(found)
        wanted = pyarrow.array([str(value).lower() for value in values])
    elif isinstance(values[0], str):
        found = _texts(columns, what, name, column)
        wanted = pyarrow.array(values, pyarrow.string())
    else:
        found = pyarrow.array(_numbers(columns, name, column) + 0.0)  # -0 is 0
        wanted = pyarrow.array([float(value) for value in values])
    codes: NDArray[Any] = compute.index_in(found, value_set=wanted).fill_null(-1).to_numpy(zero_copy_only=False)
    return codes.astype(numpy.int64)


def _texts(columns: Columns, what: str, name: str, column: pyarrow.ChunkedArray) -> pyarrow.Array:
    found = texts(column)
    if found is None:
        raise PrivgradError(
            f"{columns.files}: {what} {name!r} is a column of {column.type}; expected texts (or state its values as numbers)"
        )
    return found.cast(pyarrow.string())


def _numbers(columns: Columns, name: str, column: pyarrow.ChunkedArray) -> Floats:
    """A column as numbers, float64 [n]; nan for what is missing or no number."""
    values = plain(column)
    kind = values.type
    types = pyarrow.types
    with reading(f"{columns.files}: column {name!r}"):
        if types.is_string(kind) or types.is_large_string(kind):
            values = compute.utf8_trim(values, characters=" \t")
            good = compute.match_substring_regex(values, _NUMBER)
            values = compute.if_else(good, values, pyarrow.scalar(None, kind))
        elif types.is_boolean(kind):
            values = values.cast(pyarrow.uint8())
        elif not (types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind) or types.is_null(kind)):
            raise PrivgradError(f"{columns.files}: column {name!r} is a column of {kind}; expected numbers")
        numbers = values.cast(pyarrow.float64(), safe=False).fill_null(float("nan"))
        return numpy.asarray(numbers.to_numpy(zero_copy_only=False), dtype=numpy.float64)


def _expected(column: Column) -> str:
    return "a number" if isinstance(column, Numeric) else f"one of {quoted(list(column.values))}"


def _said(value: object) -> str:
    return "missing" if value is None or value == "" else quoted(value)


def _scaling(settings: TableSettings) -> str:
    """What is done to the columns, in words for the certificate."""
    numeric = sum(isinstance(column, Numeric) for _, column in settings.columns)
    categorical = len(settings.columns) - numeric
    words = []
    if numeric:
        words.append(f"{numeric} numeric column(s) clamped to stated bounds and scaled to [-1, 1]")
    if categorical:
        words.append(f"{categorical} categorical column(s) one-hot")
    missing = "refused" if settings.missing == "refuse" else "counted as 0"
    return f"{', '.join(words)}, missing values {missing}"

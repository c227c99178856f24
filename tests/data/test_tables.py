"""Tables: what pandas writes is read as it is, encoded by the stated schema, and refused where it does not fit it."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import hypothesis
import numpy
import pandas
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from privgrad.data.columns import CsvColumns
from privgrad.data.find import Files
from privgrad.data.settings import Categorical, Column, Numeric, TableSettings
from privgrad.data.source import Source, load
from privgrad.data.tables import features
from privgrad.errors import PrivgradError
from tests.data.files import TABLE, encoded, people, settings


def write(root: Path, kind: str, train: pandas.DataFrame, test: pandas.DataFrame | None = None) -> Path:
    """Two splits by pandas."""
    for name, frame in (("train", train), ("test", people(8, seed=1) if test is None else test)):
        if kind == "csv":
            frame.to_csv(root / f"{name}.csv", index=False)
        else:
            frame.to_parquet(root / f"{name}.parquet")
    return root


def all_of(source: Source) -> tuple[torch.Tensor, torch.Tensor]:
    return source.train.take(torch.arange(source.size))  # type: ignore[attr-defined]


def refusal(root: Path, **data: Any) -> str:
    with pytest.raises(PrivgradError) as error:
        load(settings(root, **{"table": TABLE, **data}))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_what_pandas_writes_is_encoded_by_the_schema(tmp_path: Path, kind: str) -> None:
    frame = people(50)
    source = load(settings(write(tmp_path, kind, frame), table=TABLE))
    inputs, labels = all_of(source)
    numpy.testing.assert_allclose(inputs.numpy(), encoded(frame), atol=1e-6)
    assert labels.tolist() == (frame["diagnosis"] == "malignant").astype(int).tolist()
    assert (source.size, source.input_shape, source.classes) == (50, (4,), 2)
    assert len(source.test) == 8  # type: ignore[arg-type]
    assert source.keys is None
    assert source.name == tmp_path.name
    assert source.scaling == (
        "2 numeric column(s) clamped to stated bounds and scaled to [-1, 1], 1 categorical column(s) one-hot, "
        "missing values refused"
    )


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_numbers_outside_the_bounds_are_clamped(tmp_path: Path, kind: str) -> None:
    frame = people(4).assign(age=[-5.0, 0.0, 120.0, 1e300], height=[100.0, 220.0, 160.0, -1e300])
    inputs, _ = all_of(load(settings(write(tmp_path, kind, frame), table=TABLE)))
    assert inputs[:, 0].tolist() == [-1, -1, 1, 1]
    assert inputs[:, 3].tolist() == [-1, 1, 0, -1]


def test_a_column_that_is_not_named_is_not_read(tmp_path: Path) -> None:
    frame = people().assign(note="x")
    path = write(tmp_path, "csv", frame) / "train.csv"
    path.write_bytes(path.read_bytes().replace(b",x,", b",\xff,"))
    assert load(settings(tmp_path, table=TABLE)).size == 12


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("age", math.nan, "row 3: column 'age' is missing; expected a number"),
        ("height", math.nan, "row 3: column 'height' is missing; expected a number"),
        ("age", "abc", "row 3: column 'age' is 'abc'; expected a number"),
        ("age", "inf", "row 3: column 'age' is 'inf'; expected a number"),
        ("age", "1e999", "row 3: column 'age' is '1e999'; expected a number"),
        ("age", "0x10", "row 3: column 'age' is '0x10'; expected a number"),
        ("age", "1_0", "row 3: column 'age' is '1_0'; expected a number"),
        ("age", "٣", "row 3: column 'age' is '٣'; expected a number"),
        ("sex", None, "row 3: column 'sex' is missing; expected one of ['f', 'm']"),
        ("sex", "x", "row 3: column 'sex' is 'x'; expected one of ['f', 'm']"),
        ("sex", "F", "row 3: column 'sex' is 'F'; expected one of ['f', 'm']"),
    ],
)
def test_missing_and_unknown_values_are_refused_or_count_as_zero(
    tmp_path: Path, kind: str, column: str, value: object, said: str
) -> None:
    frame = people()
    values = frame[column].astype(object if isinstance(value, str | None) else float).to_list()
    values[2] = value
    frame[column] = pandas.Series([str(v) for v in values] if isinstance(value, str) else values)
    write(tmp_path, kind, frame)
    message = refusal(tmp_path)
    assert said in message
    assert "data.table.missing = 'zero'" in message
    source = load(settings(tmp_path, table={**TABLE, "missing": "zero"}))
    inputs, _ = all_of(source)
    expected = encoded(people())
    expected[2, {"age": [0], "sex": [1, 2], "height": [3]}[column]] = 0
    numpy.testing.assert_allclose(inputs.numpy(), expected, atol=1e-6)
    assert source.scaling.endswith("missing values counted as 0")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("value", [None, "maybe", "Benign"])
@pytest.mark.parametrize("missing", ["refuse", "zero"])
def test_an_unknown_target_is_always_refused(tmp_path: Path, kind: str, value: str | None, missing: str) -> None:
    frame = people()
    frame.loc[4, "diagnosis"] = value
    message = refusal(write(tmp_path, kind, frame), table={**TABLE, "missing": missing})
    shown = "missing" if value is None else repr(value)
    assert f"row 5: target 'diagnosis' is {shown}; expected one of ['benign', 'malignant']" in message


@pytest.mark.parametrize(
    ("values", "classes"),
    [
        (["no", "yes"], ["no", "yes"]),
        ([" no", "yes "], ["no", "yes"]),
        ([0, 1], [0, 1]),
        ([0, 1], ["0", "1"]),
        ([3.5, -1.0], [3.5, -1]),
        ([False, True], [False, True]),
        (["false", "TRUE"], [False, True]),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_target_may_be_texts_numbers_or_truth_values(
    tmp_path: Path, kind: str, values: list[Any], classes: list[Any]
) -> None:
    train = people(10).assign(diagnosis=[values[number % 2] for number in range(10)])
    source = load(settings(write(tmp_path, kind, train, train), table={**TABLE, "classes": classes}))
    assert all_of(source)[1].tolist() == [0, 1] * 5


def test_classes_are_those_stated_even_if_some_do_not_occur(tmp_path: Path) -> None:
    table = {**TABLE, "classes": ["unheard of", "benign", "malignant", "never"]}
    source = load(settings(write(tmp_path, "csv", people()), table=table))
    assert source.classes == 4
    assert set(all_of(source)[1].tolist()) == {1, 2}


@pytest.mark.parametrize(
    "values",
    [
        pyarrow.array([20.0] * 12, pyarrow.float16()),
        pyarrow.array([20] * 12, pyarrow.uint64()),
        pyarrow.array([20] * 12, pyarrow.decimal128(9, 3)),
        pyarrow.array([20] * 12, pyarrow.decimal256(50, 3)),
        pyarrow.array(["20"] * 12).dictionary_encode(),
        pyarrow.array(["20"] * 12, pyarrow.large_string()),
        pyarrow.array(["20 "] * 12, pyarrow.string_view()),
        pyarrow.array([" +2.0e1\t"] * 12),
    ],
    ids=lambda values: str(values.type),
)
def test_parquet_numbers_of_every_type_are_read(tmp_path: Path, values: pyarrow.Array) -> None:
    write(tmp_path, "parquet", people())
    table = pyarrow.parquet.read_table(tmp_path / "train.parquet")
    pyarrow.parquet.write_table(table.set_column(1, "age", values), tmp_path / "train.parquet")
    inputs, _ = all_of(load(settings(tmp_path, table=TABLE)))
    numpy.testing.assert_allclose(inputs[:, 0].numpy(), 20 / 60 - 1, atol=1e-6)


@pytest.mark.parametrize(
    "values",
    [
        pyarrow.array([[1]] * 12),
        pyarrow.array([{"a": 1}] * 12),
        pyarrow.array([b"1"] * 12),
        pyarrow.array([0] * 12, pyarrow.timestamp("s")),
        pyarrow.array([0] * 12, pyarrow.duration("s")),
    ],
    ids=lambda values: str(values.type),
)
def test_parquet_columns_that_are_no_numbers_are_refused_with_their_type(tmp_path: Path, values: pyarrow.Array) -> None:
    write(tmp_path, "parquet", people())
    table = pyarrow.parquet.read_table(tmp_path / "train.parquet")
    for place, name in ((1, "age"), (2, "sex")):
        pyarrow.parquet.write_table(table.set_column(place, name, values), tmp_path / "train.parquet")
        assert f"column {name!r} is a column of {str(values.type).split('<')[0].split('[')[0]}" in refusal(tmp_path)


def test_a_parquet_column_of_nulls_is_missing(tmp_path: Path) -> None:
    write(tmp_path, "parquet", people())
    table = pyarrow.parquet.read_table(tmp_path / "train.parquet")
    pyarrow.parquet.write_table(table.set_column(1, "age", pyarrow.nulls(12)), tmp_path / "train.parquet")
    assert "row 1: column 'age' is missing" in refusal(tmp_path)


def test_a_page_whose_checksum_does_not_fit_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "parquet", people())
    path = tmp_path / "train.parquet"
    table = pyarrow.parquet.read_table(path)
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False, "column_encoding": "PLAIN"}
    pyarrow.parquet.write_table(table, path, write_page_checksum=True, **options)
    value = table["height"][3].as_py()
    data = path.read_bytes()
    assert data.count(struct.pack("<d", value)) == 1
    path.write_bytes(data.replace(struct.pack("<d", value), struct.pack("<d", value + 1)))
    assert "CRC checksum verification failed" in refusal(tmp_path)


# CSV as programs and people write it.


def rewritten(root: Path, **replaced: Any) -> Path:
    write(root, "csv", people())
    path = root / "train.csv"
    path.write_bytes(replaced["by"](path.read_bytes()))
    return root


@pytest.mark.parametrize(
    "by",
    [
        lambda data: b"\xef\xbb\xbf" + data,
        lambda data: data.replace(b"\n", b"\r\n"),
        lambda data: data.rstrip(b"\n"),
        lambda data: data + b"\n\n",
        lambda data: data.replace(b",f,", b", f ,"),
    ],
    ids=["byte order mark", "CRLF", "no last newline", "empty lines", "spaces"],
)
def test_harmless_differences_in_csv_are_read_over(tmp_path: Path, by: Any) -> None:
    inputs, _ = all_of(load(settings(rewritten(tmp_path, by=by), table=TABLE)))
    numpy.testing.assert_allclose(inputs.numpy(), encoded(people()), atol=1e-6)


@pytest.mark.parametrize(
    ("by", "said"),
    [
        (lambda data: b"", "train.csv is empty"),
        (lambda data: data.split(b"\n")[0] + b"\n", "holds no records"),
        (lambda data: data.decode().encode("utf-16"), "is no UTF-8 text"),
        (lambda data: data.decode().encode("utf-16-le"), "is no UTF-8 text"),
        (lambda data: data.replace(b"benign", b"b\xe9nign", 1), "invalid UTF8"),
        (lambda data: data + b"\x00", "is no UTF-8 text"),
        (lambda data: data.replace(b"note", b"sex", 1), "2 columns called 'sex'"),
        (lambda data: data.replace(b"age", b"aeg"), "no such column; it has 'customer', 'aeg', 'sex'"),
        (lambda data: data.replace(b",", b";"), "no such column; it has 'customer;age;sex;"),
        (lambda data: data + b"c1,2\n", "row 13: Expected 6 columns, got 2"),
        (lambda data: data + b'c1,2,f,170,"x,benign\nc1,2,f,170,x,benign\n', "a quotation mark that is not closed"),
        (lambda data: data[:-20] + b'"', "a quotation mark that is not closed"),
    ],
)
def test_damaged_csv_is_refused(tmp_path: Path, by: Any, said: str) -> None:
    assert said in refusal(rewritten(tmp_path, by=by))


def test_a_quoted_newline_in_a_number_is_no_number(tmp_path: Path) -> None:
    """Found by fuzzing: trimmed like a space it made an unclosed quotation mark look whole."""
    message = refusal(rewritten(tmp_path, by=lambda data: data + b'c1,"2\n",f,170,x,benign\n'))
    assert r"row 13: column 'age' is '2\n'; expected a number" in message


# The encoding itself.

quick = hypothesis.settings(deadline=None, max_examples=60)
bounds = st.tuples(st.floats(-1e12, 1e12), st.floats(-1e12, 1e12)).filter(lambda pair: pair[0] < pair[1])


def encode(tmp: Path, column: Column, cells: list[str], missing: str = "zero") -> numpy.ndarray:
    path = tmp / "cells.csv"
    pandas.DataFrame({"x": cells, "y": "a"}).to_csv(path, index=False)
    table = TableSettings("y", ("a", "b"), (("x", column),), missing)
    return features(CsvColumns(Files((path,))), table).numpy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("property")


@quick
@given(bounds=bounds, values=st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=20))
def test_every_number_lands_in_its_place_between_minus_one_and_one(
    folder: Path, bounds: tuple[float, float], values: list[float]
) -> None:
    low, high = bounds
    out = encode(folder, Numeric(low, high), [repr(value) for value in values])[:, 0]
    assert (numpy.abs(out) <= 1).all()
    for value, found in zip(values, out, strict=True):
        if not math.isfinite(value):
            assert found == 0
        elif value <= low or value >= high:
            assert found == (-1 if value <= low else 1)
        else:
            assert found == pytest.approx(2 * (value - low) / (high - low) - 1, abs=1e-6)


@quick
@given(bounds=bounds, values=st.lists(st.floats(-1e13, 1e13), min_size=2, max_size=20))
def test_the_encoding_keeps_the_order(folder: Path, bounds: tuple[float, float], values: list[float]) -> None:
    out = encode(folder, Numeric(*bounds), [repr(value) for value in sorted(values)])[:, 0]
    assert (numpy.diff(out) >= 0).all()


words = st.text(
    st.characters(codec="utf-8", exclude_characters='\x00\r\n"', exclude_categories=("Cs",)), min_size=1, max_size=5
)
known = words.filter(lambda word: word == word.strip(" \t"))


@quick
@given(values=st.lists(known, min_size=1, max_size=5, unique=True), cells=st.lists(words, min_size=1, max_size=20))
def test_a_category_is_one_hot_and_an_unknown_one_is_nothing(folder: Path, values: list[str], cells: list[str]) -> None:
    cells = [*cells, *values]
    out = encode(folder, Categorical(tuple(values)), cells)
    assert out.shape == (len(cells), len(values))
    for cell, row in zip(cells, out, strict=True):
        expected = [float(cell.strip(" \t") == value) for value in values]
        assert row.tolist() == expected


@quick
@given(
    cells=st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\x00\r"), max_size=8), min_size=1, max_size=20
    )
)
def test_a_text_is_a_number_where_python_says_so(folder: Path, cells: list[str]) -> None:
    """Any text whatever, through pandas' quoting: read as Python's float reads it, or counted as missing."""
    out = encode(folder, Numeric(-1000, 1000), cells)[:, 0]
    for cell, found in zip(cells, out, strict=True):
        text = cell.strip(" \t")
        try:
            value = float(text) if text.isascii() and text == text.strip() and "_" not in text else math.nan
        except ValueError:
            value = math.nan
        wanted = min(max(value / 1000, -1), 1) if math.isfinite(value) else 0
        assert found == pytest.approx(wanted, abs=1e-6)

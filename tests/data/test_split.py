"""A share of one file as test split: fixed, about as large as asked for, and blind to what other records hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pandas
import pytest
import torch

from privgrad.data.part import Part
from privgrad.data.source import Source, load, training_size
from privgrad.data.split import split
from privgrad.errors import PrivgradError, RefusedError
from privgrad.privacy.adjacency import Adjacency
from tests.data.files import TABLE, encoded, people, pictures, settings, write_folder


def loaded(path: Path, frame: pandas.DataFrame, share: float = 0.25, **more: Any) -> Source:
    frame.to_csv(path, index=False)
    return load(settings(path, table=TABLE, test_share=share), **more)


def features(frame: pandas.DataFrame) -> set[tuple[float, ...]]:
    return {tuple(row) for row in encoded(frame).tolist()}


def rows(source: Source) -> tuple[list[Any], list[Any]]:
    return tuple([tuple(row) for row in part.inputs.tolist()] for part in (source.train, source.test))  # type: ignore[attr-defined, return-value]


def test_every_record_is_on_one_side_and_the_sizes_are_about_right(tmp_path: Path) -> None:
    frame = people(2000)
    source = loaded(tmp_path / "d.csv", frame)
    train, test = rows(source)
    assert len(train) == source.size == training_size(settings(tmp_path / "d.csv", table=TABLE, test_share=0.25))
    assert len(train) + len(test) == 2000
    assert abs(len(test) - 500) < 100  # five standard deviations
    numpy.testing.assert_allclose(sorted(train + test), sorted(map(tuple, encoded(frame).tolist())), atol=1e-6)


def test_the_split_is_the_same_every_time_and_everywhere(tmp_path: Path) -> None:
    once = rows(loaded(tmp_path / "a.csv", people(100)))
    assert rows(loaded(tmp_path / "b.csv", people(100))) == once
    part = people(40)
    part["age"] = range(40)
    source = loaded(tmp_path / "c.csv", part)
    found = sorted(round((row[0] + 1) * 60) for row in rows(source)[1])
    assert found == [0, 7, 12, 15, 16, 20, 28, 31, 33, 34, 35, 37], (
        "a change would mix training and test records of old runs"
    )


def test_what_a_record_holds_moves_neither_it_nor_another(tmp_path: Path) -> None:
    frame = people(60)
    frame["age"] = range(60)
    before = [round((row[0] + 1) * 60) for row in rows(loaded(tmp_path / "a.csv", frame))[1]]
    changed = frame.assign(sex="m", height=111.0, diagnosis="benign")
    after = [round((row[0] + 1) * 60) for row in rows(loaded(tmp_path / "b.csv", changed))[1]]
    assert before == after


def test_no_unit_is_on_both_sides_and_the_others_do_not_move_when_one_is_gone(tmp_path: Path) -> None:
    frame = people(300)
    frame["customer"] = [f"c{number}" for number in numpy.random.default_rng(1).integers(0, 60, 300)]
    frame["height"] = [100 + int(name[1:]) for name in frame["customer"]]  # the unit, seen in the features

    def units(part: Any) -> set[int]:
        return {round(value * 60 + 60) for value in part.inputs[:, 3].tolist()}

    source = loaded(tmp_path / "a.csv", frame, key="customer")
    train, test = units(source.train), units(source.test)
    assert not train & test
    assert len(train | test) == frame["customer"].nunique()
    assert source.users == len(train)
    assert source.keys is not None
    assert len(source.keys) == source.size
    assert sorted(set(source.keys.tolist())) == list(range(len(train)))
    by_key = {}
    for unit, key in zip(source.train.inputs[:, 3].tolist(), source.keys.tolist(), strict=True):  # type: ignore[attr-defined]
        assert by_key.setdefault(unit, key) == key
    assert len(set(by_key.values())) == len(by_key)
    gone = frame[frame["customer"] != "c7"]
    again = loaded(tmp_path / "b.csv", gone, key="customer")
    assert (units(again.train), units(again.test)) == (train - {7}, test - {7})


def test_add_remove_is_refused_and_replace_one_by_units(tmp_path: Path) -> None:
    frame = people(40)
    with pytest.raises(RefusedError, match="a record less would move the others to the other side; give a test file"):
        loaded(tmp_path / "d.csv", frame, adjacency=Adjacency.ADD_REMOVE)
    with pytest.raises(RefusedError, match="change the size of the training split"):
        loaded(tmp_path / "d.csv", frame, adjacency=Adjacency.REPLACE_ONE, key="customer")
    assert loaded(tmp_path / "d.csv", frame, adjacency=Adjacency.REPLACE_ONE).size
    assert loaded(tmp_path / "d.csv", frame, key="customer").size
    (tmp_path / "t.csv").write_bytes((tmp_path / "d.csv").read_bytes())
    given = settings(tmp_path / "d.csv", table=TABLE, test_source=str(tmp_path / "t.csv"))
    assert load(given, Adjacency.ADD_REMOVE).size == 40


@pytest.mark.parametrize(
    ("protected", "tested"),
    [
        (["a", "b"] * 6, ["b "] + ["x"] * 11),
        ([1, 2] * 6, [3] * 11 + [2]),
        ([1, 2] * 6, [3.5] * 11 + [2.0]),
        ([1, 2] * 6, ["x"] * 11 + ["2"]),
        ([1.0, 2.5] * 6, [1] * 12),
        (["sNaN", "b"] * 6, ["sNaN"] * 12),
    ],
)
@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_a_unit_that_is_protected_is_not_evaluated(
    tmp_path: Path, form: str, protected: list[Any], tested: list[Any]
) -> None:
    """Its other records in a test file would be shown by the accuracy, without noise."""
    paths = {}
    for name, keys in (("train", protected), ("test", tested), ("others", ["z"] * 12), ("unnamed", None)):
        paths[name] = tmp_path / f"{name}.{form}"
        frame = people(12).assign(customer=keys)
        frame = frame.drop(columns="customer") if keys is None else frame
        getattr(frame, f"to_{form}")(paths[name], index=False)

    def opened(test: str, key: str | None) -> Source:
        given = {"table": TABLE, "test_source": str(paths[test])}
        return load(settings(paths["train"], **given), Adjacency.ZERO_OUT, key=key)

    with pytest.raises(RefusedError, match="accuracy on the test split leaves un-noised"):
        opened("test", "customer")
    assert opened("others", "customer").users == 2
    assert opened("test", None).keys is None, "records are protected: each is another"
    with pytest.raises(PrivgradError, match="has no such column"):
        opened("unnamed", "customer")


def test_a_side_without_records_is_refused(tmp_path: Path) -> None:
    for share in (1e-9, 1 - 1e-9):
        with pytest.raises(PrivgradError, match="expected at least one of each"):
            loaded(tmp_path / "d.csv", people(5), share)


def test_the_inputs_are_read_once_for_both_sides() -> None:
    reads = []

    def read() -> torch.Tensor:
        reads.append(1)
        return torch.arange(40.0)[:, None]

    train, test = split(Part("here", torch.zeros(40, dtype=torch.int64), 2, read, "as given"), 0.5)
    found = torch.cat([train.inputs(), test.inputs()]).flatten().tolist()
    assert sorted(found) == list(range(40))
    assert len(reads) == 1


def test_keys_of_every_kind_are_understood(tmp_path: Path) -> None:
    frame = people(12)
    kinds = {
        "text": ["a", "a ", " a", "b"] * 3,
        "number": [1, 1, 1, 2] * 3,
        "truth": [True, True, True, False] * 3,
        "day": pandas.to_datetime(["2001-01-01"] * 3 + ["2002-01-01"]).to_list() * 3,
        "part": [0.5, 0.5, 0.5, 0.25] * 3,
        "kind": pandas.Categorical(["x", "x", "x", "y"] * 3),
    }
    frame.assign(**kinds).to_parquet(tmp_path / "train.parquet")
    strangers = {
        "text": "c",
        "number": 3,
        "truth": "no",
        "day": pandas.Timestamp("2003-01-01"),
        "part": 1.5,
        "kind": "z",
    }
    frame.assign(**strangers).to_parquet(tmp_path / "test.parquet")
    for key in kinds:
        source = load(settings(tmp_path, table=TABLE), key=key)
        assert source.keys is not None
        assert source.users == 2, key
        first = source.keys[0]
        assert (source.keys == first).tolist() == [True, True, True, False] * 3


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("value", [None, "", "  ", float("nan")])
def test_a_record_without_a_key_is_refused(tmp_path: Path, kind: str, value: Any) -> None:
    frame = people(12)
    frame["customer"] = frame["customer"].astype(object)
    frame.loc[6, "customer"] = value
    for name in ("train", "test"):
        getattr(frame, f"to_{kind}")(tmp_path / f"{name}.{kind}", **({"index": False} if kind == "csv" else {}))
    with pytest.raises(PrivgradError, match="row 7: key 'customer' is missing; every record must belong to a unit"):
        load(settings(tmp_path, table=TABLE), key="customer")


def test_a_key_that_is_no_single_value_or_not_there_is_refused(tmp_path: Path) -> None:
    frame = people(12).assign(customer=[[1]] * 12)
    for name in ("train", "test"):
        frame.to_parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(PrivgradError, match="expected one value per record"):
        load(settings(tmp_path, table=TABLE), key="customer")
    with pytest.raises(PrivgradError, match=r"key is 'custommer', and .* it has 'customer', 'age'"):
        load(settings(tmp_path, table=TABLE), key="custommer")


def test_images_in_the_order_of_their_names_are_not_split_under_replace_one(tmp_path: Path) -> None:
    """A record that is replaced by one of another class has another number, and all between them move by one."""
    labels = [0, 1] * 20
    folder = write_folder(tmp_path / "images", pictures(40), labels)
    given = settings(folder, test_share=0.25)
    with pytest.raises(RefusedError, match="follows from class and file name"):
        load(given, Adjacency.REPLACE_ONE)
    assert load(given).by_name

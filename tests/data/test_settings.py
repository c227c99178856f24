"""[data]: what is not known, or cannot be, is refused with the key and what was expected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from privgrad.cli.config import assign, complete
from privgrad.data.settings import Categorical, DataSettings, ImageSettings, Numeric, read_settings
from privgrad.errors import PrivgradError
from tests.data.files import TABLE


def table(**changes: Any) -> dict[str, Any]:
    return {"table": {**TABLE, **changes}}


def column(value: Any) -> dict[str, Any]:
    return table(columns={"age": value})


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"sauce": "digits"}, "data.sauce is an unknown key; did you mean 'source'?"),
        ({"images": {"sice": [1, 1]}}, "data.images.sice is an unknown key; did you mean 'size'?"),
        ({"images": {"augment": "flip"}}, "data.images.augment is 'flip'; expected a list, such as ['flip']"),
        ({"npz": {"input": "x"}}, "data.npz.input is an unknown key; did you mean 'inputs'?"),
        (table(clases=[]), "data.table.clases is an unknown key; did you mean 'classes'?"),
        (
            column({"kind": "numeric", "low": 0, "heigh": 1}),
            "data.table.columns.age.heigh is an unknown key; did you mean 'high'?",
        ),
        (
            column({"kind": "numerik", "low": 0, "high": 1}),
            "data.table.columns.age.kind is 'numerik'; did you mean 'numeric'?",
        ),
        (column({"low": 0, "high": 1}), "data.table.columns.age.kind is None; known: categorical, numeric"),
        (
            column({"kind": "numeric", "low": 0}),
            "data.table.columns.age has no 'high'; a numeric column needs low and high",
        ),
        (column({"kind": "categorical"}), "data.table.columns.age has no 'values'"),
        (
            column({"kind": "numeric", "low": 1, "high": 1}),
            "data.table.columns.age has low = 1 and high = 1; expected low below high",
        ),
        (column([5, 3]), "data.table.columns.age has low = 5 and high = 3"),
        (column([-1e308, 1e308]), "data.table.columns.age has low = -1e+308"),
        (column([float("nan"), 1]), "data.table.columns.age.low is nan; expected a finite number"),
        (column([0, 10**400]), "data.table.columns.age.high is 1000"),
        (column(["0", 1]), "expected [low, high], a list of texts, or {"),
        (column([0, 1, 2]), "expected [low, high], a list of texts, or {"),
        (column([True, False]), "expected [low, high], a list of texts, or {"),
        (column([]), "expected [low, high], a list of texts, or {"),
        (column(3), "data.table.columns.age is 3; expected [low, high]"),
        (column({"kind": "categorical", "values": []}), "expected a list of at least 1 value(s)"),
        (column({"kind": "categorical", "values": "fm"}), "data.table.columns.age.values is 'fm'; expected a list"),
        (column({"kind": "categorical", "values": ["f", "f"]}), "a value is there twice"),
        (column({"kind": "categorical", "values": [1, 1.0]}), "a value is there twice"),
        (column({"kind": "categorical", "values": [2**53, 2**53 + 1]}), "a value is there twice"),
        (column({"kind": "categorical", "values": ["f", 1]}), "expected texts only, numbers only, or true and false"),
        (column({"kind": "categorical", "values": [1, True]}), "expected texts only, numbers only, or true and false"),
        (column({"kind": "categorical", "values": [["f"]]}), "expected texts only"),
        (column({"kind": "categorical", "values": [" f"]}), "without spaces around them"),
        (column({"kind": "categorical", "values": [""]}), "not empty"),
        (column({"kind": "categorical", "values": [float("inf")]}), "expected a finite number"),
        (table(classes=["one"]), "data.table.classes is ['one']; expected a list of at least 2 value(s)"),
        (table(classes=3), "data.table.classes is 3; expected a list of at least 2"),
        (table(target=""), "data.table.target is ''"),
        (table(target=3), "data.table.target is 3"),
        (table(columns={}), "data.table.columns is empty"),
        (table(columns=["age"]), "data.table.columns is ['age']; expected a table"),
        (table(missing="skip"), "data.table.missing is 'skip'; known: refuse, zero"),
        (table(target="age"), "data.table.columns has 'age', which is the target"),
        ({"table": {"target": "x"}}, "data.table has no 'classes'; a table needs target, classes and columns"),
        ({"table": 3}, "data.table is 3; expected a table"),
        ({"images": {"size": 32}}, "data.images.size is 32; expected [height, width] in pixels"),
        ({"images": {"size": [32]}}, "data.images.size is (32,); expected [height, width]"),
        ({"images": {"size": [32, 0]}}, "data.images.size is 0; expected a whole number of at least 1"),
        ({"images": {"size": [32, 9000]}}, "data.images.size is 9000; expected a finite number at most 8192"),
        ({"images": {"size": [32.0, 32]}}, "data.images.size is 32.0; expected a whole number"),
        ({"images": {"mode": "grey"}}, "data.images.mode is 'grey'; did you mean 'gray'?"),
        ({"images": {"std": 0}}, "data.images.std is 0; expected a finite number above 0"),
        ({"images": {"std": [0.5, "x"]}}, "data.images.std is 'x'; expected a finite number above 0"),
        ({"images": {"mean": []}}, "data.images.mean is []; expected a number, or one per channel"),
        ({"images": {"mean": float("nan")}}, "data.images.mean is nan; expected a finite number"),
        ({"images": {"mean": {}}}, "data.images.mean is {}; expected a finite number"),
        ({"images": {"classes": 1}}, "data.images.classes is 1; expected a whole number of at least 2"),
        ({"images": {"classes": [1, 2]}}, "expected the number of classes, or their names as texts"),
        ({"images": {"classes": True}}, "data.images.classes is True; expected a whole number"),
        ({"images": {"label": 3}}, "data.images.label is 3; expected a text"),
        ({"images": {"column": ""}}, "data.images.column is ''; expected a text"),
        ({"npz": {"classes": 0.5}}, "data.npz.classes is 0.5; expected a whole number"),
        ({"npz": {"inputs": []}}, "data.npz.inputs is ()"),
        ({"source": ""}, "data.source is ''; expected a text that is not empty"),
        ({"source": 3}, "data.source is 3; expected a text"),
        ({"cache": False}, "data.cache is False; expected a text"),
        ({"test_source": 3}, "data.test_source is 3; expected a text"),
        ({"test_share": 0}, "data.test_share is 0; expected a finite number above 0 and below 1"),
        ({"test_share": 1}, "data.test_share is 1; expected a finite number above 0 and below 1"),
        ({"test_share": "20%"}, "data.test_share is '20%'; expected a finite number"),
        ({"test_share": 0.1, "test_source": "x"}, "both data.test_source and data.test_share are given; leave one out"),
    ],
)
def test_what_cannot_be_is_refused(data: dict[str, Any], said: str) -> None:
    with pytest.raises(PrivgradError) as error:
        complete({"data": data})
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_short_forms_mean_the_long_ones() -> None:
    short = {**TABLE, "columns": {"age": [0, 120], "sex": ["f", "m"]}}
    long = {
        **TABLE,
        "columns": {
            "age": {"kind": "numeric", "low": 0, "high": 120},
            "sex": {"kind": "categorical", "values": ["f", "m"]},
        },
    }
    read = read_settings({"table": short})
    assert read == read_settings({"table": long})
    assert read.table is not None
    assert read.table.columns == (("age", Numeric(0, 120)), ("sex", Categorical(("f", "m"))))


def test_what_is_not_given_has_its_default() -> None:
    assert read_settings({}) == DataSettings() == read_settings(complete({})["data"])
    found = read_settings(complete({"data": {"images": {"size": [32, 32]}}})["data"])
    assert found.images == ImageSettings(size=(32, 32))


def test_settings_can_be_set_on_the_command_line() -> None:
    given: dict[str, Any] = {}
    for setting in (
        "data.images.size=[32, 32]",
        "data.test_share=0.2",
        "data.table.target=y",
        "data.table.classes=['a', 'b']",
        "data.table.columns.x=[0, 1]",
        "data.table.columns.z.kind=categorical",
        "data.table.columns.z.values=[1, 2, 3]",
    ):
        assert assign(given, setting) is None
    found = read_settings(complete(given)["data"])
    assert found.images.size == (32, 32)
    assert found.table is not None
    assert found.table.columns == (("x", Numeric(0, 1)), ("z", Categorical((1, 2, 3))))


def test_every_default_of_the_readers_is_in_the_documentation() -> None:
    import tomllib

    from privgrad.cli.config import DEFAULTS

    text = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
    blocks = [tomllib.loads(block.split("```")[0]) for block in text.split("```toml")[1:]]
    documented: dict[str, Any] = blocks[0]["data"]
    default = DEFAULTS["data"]
    for key in ("source", "test", "cache"):
        assert documented[key] == default[key]
    for section in ("images", "npz"):
        assert documented[section] == {key: value for key, value in default[section].items() if value is not None}
    for block in blocks[1:]:
        complete(block)

"""Where data is looked for, and which files are which split."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from privgrad.data.find import locate
from privgrad.data.source import load, located
from privgrad.errors import PrivgradError
from tests.data.files import TABLE, people, pictures, settings, write_folder


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """$PRIVGRAD_DATA, the directory of a configuration file, and the current directory, each with a things.csv of its own."""
    found = {name: tmp_path / name for name in ("data", "config", "here")}
    for path in found.values():
        path.mkdir()
        (path / "things.csv").write_text("x")
    monkeypatch.chdir(found["here"])
    monkeypatch.setenv("PRIVGRAD_DATA", str(found["data"]))
    return found


def test_a_name_is_looked_up_in_the_data_directory_then_beside_the_configuration_then_here(
    places: dict[str, Path],
) -> None:
    for name in ("data", "config", "here"):
        assert locate("data.source", "things.csv", beside=places["config"]) == places[name] / "things.csv"
        (places[name] / "things.csv").unlink()
    with pytest.raises(PrivgradError) as error:
        locate("data.source", "things.csv", beside=places["config"], embedded=["digits"])
    assert str(error.value) == (
        "data.source is 'things.csv', neither an embedded data set (digits) nor a file or directory (looked for "
        f"{places['data']}/things.csv, {places['config']}/things.csv, things.csv); known: digits"
    )


def test_what_begins_with_a_dot_or_a_slash_is_not_looked_up_in_the_data_directory(places: dict[str, Path]) -> None:
    assert locate("k", "./things.csv") == places["here"] / "things.csv"
    assert locate("k", "../here/things.csv") == places["here"] / "things.csv"
    assert locate("k", "./things.csv", beside=places["config"]) == places["config"] / "things.csv"
    absolute = places["here"] / "things.csv"
    assert locate("k", str(absolute), beside=places["config"]) == absolute


def test_the_data_directory_is_data_by_default_and_home_is_understood(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PRIVGRAD_DATA")
    (places["here"] / "data").mkdir()
    shutil.copy("things.csv", "data/things.csv")
    assert locate("k", "things.csv") == places["here"] / "data" / "things.csv"
    monkeypatch.setenv("HOME", str(places["config"]))
    assert locate("k", "~/things.csv") == places["config"] / "things.csv"
    monkeypatch.setenv("PRIVGRAD_DATA", "~")
    assert locate("k", "things.csv") == places["config"] / "things.csv"


def test_a_wrong_name_gets_the_nearest_one(places: dict[str, Path]) -> None:
    (places["data"] / "mnist").mkdir()
    with pytest.raises(PrivgradError, match="did you mean 'mnist'"):
        locate("data.source", "mnits", embedded=["digits"])
    for number in range(50):
        (places["data"] / f"set{number}").mkdir()
    with pytest.raises(PrivgradError, match=r"known: digits$"):
        locate("data.source", "qqqqq", embedded=["digits"])
    with pytest.raises(PrivgradError, match="did you mean 'mnist'"):
        locate("data.source", "mnits", embedded=["digits"])


@pytest.mark.parametrize("name", ["a\0b", "n" * 5000, "no/such/place", "things.csv/inside", "~nobody-of-that-name/x"])
def test_impossible_names_are_refused_in_words(places: dict[str, Path], name: str) -> None:
    with pytest.raises(PrivgradError) as error:
        locate("data.source", name)
    assert "data.source is" in str(error.value)


def test_an_embedded_name_is_never_a_path(places: dict[str, Path]) -> None:
    (places["data"] / "digits").mkdir()
    assert load("digits").size == 1437
    data = {"source": "digits", "test_source": None, "cache": "auto"}
    assert located(data, None) == data
    (places["here"] / "digits").mkdir()
    assert located({**data, "source": "./digits"}, None)["source"] == str(places["here"] / "digits")


def test_located_settings_mean_the_same_from_everywhere(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = located({"source": "things.csv", "test_source": "./things.csv", "cache": "kept"}, places["config"])
    assert found == {
        "source": str(places["data"] / "things.csv"),
        "test_source": str(places["config"] / "things.csv"),
        "cache": str(places["here"] / "kept"),
    }
    monkeypatch.chdir("/")
    monkeypatch.delenv("PRIVGRAD_DATA")
    assert located(found, None) == found


# Splits.


def table(root: Path, **data: Any) -> Any:
    return settings(root, table=TABLE, **data)


def refusal(wanted: Any, **load_arguments: Any) -> str:
    with pytest.raises(PrivgradError) as error:
        load(wanted, **load_arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_train_and_test_may_be_files_of_different_kinds(tmp_path: Path) -> None:
    people().to_csv(tmp_path / "train.csv", index=False)
    people(5).to_parquet(tmp_path / "test.parquet")
    (tmp_path / "README.md").write_text("read me")
    source = load(table(tmp_path))
    assert (source.size, len(source.test)) == (12, 5)  # type: ignore[arg-type]


def test_a_file_needs_a_test_file_or_a_share_and_only_one_of_them(tmp_path: Path) -> None:
    people(40).to_csv(tmp_path / "all.csv", index=False)
    people(5).to_csv(tmp_path / "new.csv", index=False)
    path = tmp_path / "all.csv"
    assert "has no test split beside it; give data.test_source = 'PATH' or data.test_share = 0.2" in refusal(
        table(path)
    )
    assert load(table(path, test_source=str(tmp_path / "new.csv"))).size == 40
    share = load(table(path, test_share=0.3))
    assert share.size + len(share.test) == 40  # type: ignore[arg-type]
    with pytest.raises(PrivgradError, match=r"both data.test_source and data.test_share are given"):
        table(path, test_source="new.csv", test_share=0.3)
    people().to_csv(tmp_path / "train.csv", index=False)
    people().to_csv(tmp_path / "test.csv", index=False)
    for more in ({"test_share": 0.3}, {"test_source": str(path)}):
        assert "holds a test split of its own; leave out data.test_source" in refusal(table(tmp_path, **more))
    assert "holds two splits; name the file itself" in refusal(table(path, test_source=str(tmp_path)))
    assert load(table(tmp_path / "train.csv", test_source=str(path))).name == tmp_path.name


def test_directories_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    assert "holds nothing to read; expected train.* and test.*" in refusal(table(tmp_path))
    people().to_csv(tmp_path / "people.csv", index=False)
    assert "holds people.csv but no train.* file; name the file itself" in refusal(table(tmp_path))
    people().to_csv(tmp_path / "train.csv", index=False)
    assert "has no test split beside it" in refusal(table(tmp_path))
    people().to_parquet(tmp_path / "train.parquet")
    assert "holds the train split more than once (train.csv, train.parquet)" in refusal(table(tmp_path))


@pytest.mark.parametrize(
    "name", ["data.txt", "data", "data.csv.gz", "data.tsv", "data.arrow", "data.pkl", "train.json"]
)
def test_an_unknown_extension_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("x")
    assert "has an extension that is not read; expected .parquet, .csv, .npz" in refusal(table(tmp_path / name))


def test_extensions_may_be_in_capitals(tmp_path: Path) -> None:
    people(40).to_csv(tmp_path / "ALL.CSV", index=False)
    assert load(table(tmp_path / "ALL.CSV", test_share=0.5)).classes == 2


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "data.csv")
    assert "is no ordinary file" in refusal(table(tmp_path / "data.csv", test_share=0.5))


@pytest.mark.parametrize("kind", ["parquet", "csv", "npz"])
@pytest.mark.parametrize("content", [b"", b"\0", b"PAR1", b"garbage" * 99, b"PAR1" + bytes(99) + b"PAR1"])
def test_empty_and_corrupt_files_are_refused(tmp_path: Path, kind: str, content: bytes) -> None:
    path = tmp_path / f"data.{kind}"
    path.write_bytes(content)
    message = refusal(
        settings(path, test_share=0.5, **({"npz": {"classes": 2}} if kind == "npz" else {"table": TABLE}))
    )
    assert str(path) in message


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data.csv"
    people().to_csv(path, index=False)

    def closed(*arguments: object, **more: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", closed)
    assert refusal(table(path, test_share=0.5)) == f"{path} cannot be read: Permission denied"


def test_a_table_needs_its_schema_and_other_kinds_none(tmp_path: Path) -> None:
    people().to_csv(tmp_path / "data.csv", index=False)
    message = refusal(settings(tmp_path / "data.csv", test_share=0.5))
    assert "is a table; say in [data.table] what its target, classes and columns are" in message
    assert "[data.npz] is given" in refusal(table(tmp_path / "data.csv", test_share=0.5, npz={"classes": 2}))
    assert "[data.images] is given" in refusal(table(tmp_path / "data.csv", test_share=0.5, images={"mean": 0.1}))
    write_folder(tmp_path / "folder", pictures(4), [0, 1, 0, 1])
    assert "[data.table] is given" in refusal(table(tmp_path / "folder", test_share=0.5))
    assert "[data.images] is given, and digits is read without it" in refusal(settings("digits", images={"mean": 0.1}))
    assert "data.test_share is 0.5, and 'digits' is an embedded data set" in refusal(settings("digits", test_share=0.5))
    assert "key is 'user', and 'digits' is an embedded data set" in refusal(settings("digits"), key="user")

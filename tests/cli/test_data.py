"""Own data on the command line: found by name or path, found again by a resume, refused in one line with nothing written."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from privgrad.cli import run as privgrad
from privgrad.data import images
from privgrad.data.settings import read_settings
from privgrad.data.source import load, located
from tests.cli.test_commands import Said, refusal, say
from tests.data.files import TABLE, image_bytes, people, pictures, write_folder, write_images

SMALL = [
    *("--model", "logistic_regression"),
    *("--set", "plan.noise.multiplier=1.0"),
    *("--set", "plan.steps=2"),
    *("--set", "plan.sampling.expected_batch_size=4"),
    *("--set", "training.evaluations=1"),
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory, without anybody's data or cache."""
    monkeypatch.delenv("PRIVGRAD_DATA", raising=False)
    monkeypatch.setenv("PRIVGRAD_CACHE", str(tmp_path / "cache"))
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return here


def table_config(root: Path, **data: Any) -> Path:
    """A configuration file with its table beside it."""
    root.mkdir(exist_ok=True)
    people(40).to_csv(root / "people.csv", index=False)
    path = root / "config.toml"
    path.write_text(tomli_w.dumps({"data": {"source": "people.csv", "test_share": 0.3, "table": TABLE, **data}}))
    return path


def trained(*arguments: object) -> Said:
    said = say("train", *SMALL, *arguments, "--json")
    assert said.code == 0, said.err
    return said


def test_a_table_beside_its_configuration(tmp_path: Path) -> None:
    config = table_config(tmp_path / "project")
    said = trained(config, "--out", tmp_path / "run")
    assert 0 <= said.json["test_accuracy"] <= 1
    stored = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert stored["data"]["source"] == str(tmp_path / "project" / "people.csv")
    assert "people; 2 numeric column(s) clamped" in (tmp_path / "run" / "certificate.md").read_text()
    assert str(tmp_path) not in (tmp_path / "run" / "certificate.md").read_text(), "a certificate is public"


def test_images_by_a_name_in_the_data_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, some in (("train", pictures(16)[:8]), ("test", pictures(16)[8:])):
        write_folder(tmp_path / "data" / "pets" / name, some, [0, 1] * 4)
    monkeypatch.setenv("PRIVGRAD_DATA", str(tmp_path / "data"))
    said = trained("--data", "pets")
    assert Path(said.json["run"]).name.startswith("pets-")
    assert "a decoded copy of the private images is kept in" in said.err


def test_what_is_named_on_the_command_line_is_not_looked_for_beside_the_configuration(
    tmp_path: Path, elsewhere: Path
) -> None:
    config = table_config(tmp_path / "project")
    people(25).to_csv(elsewhere / "people.csv", index=False)
    trained(config, "--data", "people.csv", "--out", tmp_path / "run")
    stored = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert stored["data"]["source"] == str(elsewhere / "people.csv")


def test_a_resume_finds_the_data_from_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = table_config(tmp_path / "project", test_source="new.csv")
    text = config.read_text().replace("test_share = 0.3\n", "")
    config.write_text(text)
    people(9).to_csv(tmp_path / "project" / "new.csv", index=False)
    run = tmp_path / "run"
    monkeypatch.chdir(tmp_path / "project")
    first = trained("config.toml", "--out", run, "--set", "data.cache=kept")
    stored = tomllib.loads((run / "config.toml").read_text())["data"]
    assert (stored["test_source"], stored["cache"]) == (f"{tmp_path}/project/new.csv", f"{tmp_path}/project/kept")
    monkeypatch.chdir("/")
    assert say("train", "--resume", "--out", run, "--json").json == first.json
    # With the settings again, the name in the file means the same as the stored path.
    again = say(
        "train", config, *SMALL, "--resume", "--out", run, "--set", f"data.cache={tmp_path}/project/kept", "--json"
    )
    assert again.code == 0, again.err
    people(9).to_csv(tmp_path / "other.csv", index=False)
    changed = [
        *SMALL,
        "--set",
        f"data.cache={tmp_path}/project/kept",
        "--set",
        f"data.test_source={tmp_path}/other.csv",
    ]
    assert "data.test_source was " in refusal("train", config, *changed, "--resume", "--out", run)
    (tmp_path / "project" / "people.csv").unlink()
    message = refusal("train", "--resume", "--out", run)
    assert f"data.source is '{tmp_path}/project/people.csv', neither an embedded data set (digits) nor" in message


def test_a_configuration_with_images_is_priced_without_decoding_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs: list[bytes | None] = [image_bytes(image) for image in pictures(20)]
    for name in ("train", "test"):
        write_images(tmp_path / "pets" / f"{name}.parquet", blobs, [0, 1] * 10, names=["a", "b"])
    config = tmp_path / "config.toml"
    config.write_text('[data]\nsource = "pets"\n[plan]\nsampling = { kind = "poisson", expected_batch_size = 5 }')

    def decode(*arguments: object) -> None:
        raise AssertionError("an image was decoded")

    monkeypatch.setattr(images, "decode", decode)
    said = say("epsilon", config, "--noise-multiplier", "1", "--json")
    assert said.code == 0, said.err
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ["--data", "nowhere"],
            "data.source is 'nowhere', neither an embedded data set (digits) nor a file or directory",
        ),
        (["--data", "nowhere"], "(looked for data/nowhere, nowhere)"),
        (["--data", ""], "data.source is ''; expected a text"),
        (["--data", "empty"], "holds nothing to read"),
        (["--data", "people.txt"], "has an extension that is not read"),
        (["--data", "people.csv"], "has no test split beside it; give data.test_source"),
        (["--data", "people.csv", "--set", "data.test_share=0.5"], "say in [data.table] what its target"),
        (["--data", "people.csv", "--set", "data.table.target=x"], "data.table has no 'classes'"),
        (["--set", "data.test_share=0.5"], "data.test_share is 0.5, and 'digits' is an embedded data set"),
        (["--set", "data.images.mode=grey"], "data.images.mode is 'grey'; did you mean 'gray'?"),
        (["--set", "data.images=3"], "data.images is 3; expected a table"),
        (["--set", "data.table=[]"], "data.table is []; expected a table"),
        (["--set", "data.test=private"], "data.test is 'private'"),
        (["config.toml", "--set", "data.test_share=1e-9"], "expected at least one of each"),
        (["config.toml", "--set", "privacy.adjacency=add_remove"], "data.test_share splits by row number"),
        (["config.toml", "--set", "privacy.adjacency=adremove"], "adjacency is 'adremove'; did you mean 'add_remove'?"),
        (["config.toml", "--set", "data.table.columns.wealth=[0, 1]"], "has no such column; it has 'customer', 'age'"),
        (["config.toml", "--set", "data.table.columns.note=[0, 1]"], "row 1: column 'note' is 'said"),
        (
            ["--data", "people.csv", "--set", "data.test_source=nowhere.csv"],
            "data.test_source is 'nowhere.csv', not a file or directory",
        ),
    ],
)
def test_refusals_are_one_line_and_leave_nothing(elsewhere: Path, settings: list[str], said: str) -> None:
    table_config(elsewhere)
    (elsewhere / "empty").mkdir()
    (elsewhere / "people.txt").write_text("x")
    before = sorted(elsewhere.rglob("*"))
    assert said in refusal("train", *settings)
    assert sorted(elsewhere.rglob("*")) == before
    assert not (elsewhere.parent / "cache").exists()


def test_the_help_names_the_data_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert privgrad(["train", "--help"]) == 0
    assert "$PRIVGRAD_DATA" in capsys.readouterr().out


def test_users_are_protected_by_their_column(tmp_path: Path) -> None:
    """The plan counts users, also where it is only accounted; without the column nothing is written."""
    config = table_config(tmp_path / "project")
    protect = ["--set", "plan.protects.kind=user", "--set", "plan.protects.key=customer"]
    trained(config, *protect, "--out", tmp_path / "run")
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    table = people(40)
    side = load(
        read_settings({"source": str(tmp_path / "project" / "people.csv"), "test_share": 0.3, "table": TABLE}),
        key="customer",
    )
    assert plan["protects"] == {"kind": "user", "key": "customer", "max_records": 16}
    assert plan["sampling"]["dataset_size"] == side.users < side.size
    assert side.users <= table["customer"].nunique()
    certificate = (tmp_path / "run" / "certificate.md").read_text()
    assert "for each user of the training data" in certificate
    assert "all records with one value of 'customer'" in certificate
    assert say("verify", tmp_path / "run").code == 0
    numbers = [*SMALL[2:4], *SMALL[4:6], *SMALL[6:8]]
    assert say("epsilon", config, *protect, *numbers, "--json").json["epsilon"] == pytest.approx(
        json.loads((tmp_path / "run" / "certificate.json").read_text())["epsilon"]
    )
    said = refusal("train", config, *SMALL, *protect[:2], "--set", "plan.protects.key=client", "--out", tmp_path / "no")
    assert "client" in said
    assert "customer" in said, "the columns that there are"
    assert not (tmp_path / "no").exists()


def test_shuffled_batches_of_a_folder_are_refused_under_replace_one(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images", pictures(40), [0, 1] * 20)
    other = write_folder(tmp_path / "other", pictures(60)[40:], [0, 1] * 10)
    given = ("train", "--data", folder, "--set", f"data.test_source={other}", "--set", "plan.sampling.kind=shuffled")
    more = ("--set", "plan.sampling.batch_size=10", "--set", "plan.steps=1", "--out", tmp_path / "run")
    refused = say(*given, "--set", "privacy.adjacency=replace_one", *more)
    assert refused.code == 2
    assert "shuffled batches of a folder" in refused.err
    assert say(*given, *more).code == 0


def test_a_home_directory_is_understood_where_images_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory called "~" under the current one would hold private images."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert located({"source": "digits", "test_source": None, "cache": "~/kept"}, None)["cache"] == str(
        tmp_path / "home" / "kept"
    )

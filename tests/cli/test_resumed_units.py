"""Who counts as one unit is read from the data by config.toml, and promised by plan.json: they must say the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.test_commands import refusal, say


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of users that was stopped."""
    lines = [f"{row % 7 / 7},{row % 3 / 3},{row % 2},{row // 20},{row // 5}" for row in range(200)]
    (tmp_path / "people.csv").write_text("\n".join(["a,b,y,household,person", *lines]) + "\n")
    (tmp_path / "plan.toml").write_text(
        """
        data.source = "people.csv"
        data.test_source = "other.csv"
        data.table.target = "y"
        data.table.classes = ["0", "1"]
        data.table.columns.a = { kind = "numeric", low = 0, high = 1 }
        data.table.columns.b = { kind = "numeric", low = 0, high = 1 }
        model.name = "logistic_regression"
        plan.protects = { kind = "user", key = "household" }
        plan.sampling = { kind = "poisson", expected_batch_size = 2 }
        plan.noise = { kind = "gaussian", multiplier = 3.0 }
        plan.steps = 4
        """
    )
    (tmp_path / "other.csv").write_text("a,b,y,household,person\n0.5,0.5,1,99,99\n0.1,0.5,0,99,99\n")
    directory = tmp_path / "run"
    said = say("train", tmp_path / "plan.toml", "--out", directory)
    assert said.code == 0, said.err
    for name in ("certificate.json", "certificate.md", "certificate.html", "model.safetensors"):
        (directory / name).unlink()
    return directory


@pytest.mark.parametrize(
    ("before", "after", "name"),
    [
        ('key = "household"', 'key = "person"', "plan.protects"),
        ('adjacency = "zero_out"', 'adjacency = "add_remove"', "privacy.adjacency"),
    ],
)
def test_an_edited_configuration_does_not_change_whom_a_run_protects(
    run: Path, before: str, after: str, name: str
) -> None:
    text = (run / "config.toml").read_text()
    assert before in text
    (run / "config.toml").write_text(text.replace(before, after))
    assert f"config.toml and plan.json of the run differ in {name}" in refusal("train", "--resume", "--out", run)
    (run / "config.toml").write_text(text)
    assert say("train", "--resume", "--out", run).code == 0


def test_the_private_file_is_no_test_split(run: Path) -> None:
    said = refusal(
        "train", run.parent / "plan.toml", "--set", "data.test_source=people.csv", "--out", run.parent / "new"
    )
    assert "data.test_source is" in said
    assert "the private data themselves" in said

"""Plans side by side: the grid is trained once, whatever is killed, and the figures are those of its runs."""

from __future__ import annotations

import csv
import json
import statistics
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from privgrad.cli import compare as compare_module
from privgrad.cli.config import read_config
from privgrad.files import file_digest
from privgrad.report.comparison import Cell, rows_of
from privgrad.training.run import Run
from tests.cli.test_commands import refusal, say

BASE = "[plan]\nsteps = 2\nnoise = { kind = 'gaussian', multiplier = 2.0 }\n[training]\nevaluations = 1\n"


@pytest.fixture
def plans(tmp_path: Path) -> Path:
    folder = tmp_path / "plans"
    folder.mkdir()
    (folder / "_base.toml").write_text(BASE)
    (folder / "slow.toml").write_text(
        'include = "_base.toml"\n[model]\nname = "logistic_regression"\n[optimizer]\nlr = 0.1'
    )
    (folder / "fast.toml").write_text('include = "_base.toml"\n[model]\nname = "logistic_regression"')
    return folder


def test_a_comparison_of_two_plans_with_two_seeds(plans: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = say("compare", plans, "--seeds", "2", "--out", out, "--json")
    assert said.code == 0, said.err
    rows = {row["plan"]: row for row in said.json["rows"]}
    assert rows.keys() == {"fast", "slow"}
    for plan, row in rows.items():
        runs = [Run(out / plan / f"seed-{seed}") for seed in (0, 1)]
        certificates = [json.loads(run.certificate.read_text()) for run in runs]
        reached = [certificate["evaluation"]["metrics"]["test_accuracy"] for certificate in certificates]
        assert row["mean"] == pytest.approx(statistics.fmean(reached))
        assert row["spread"] == pytest.approx(statistics.stdev(reached))
        assert row["epsilon"] == max(certificate["epsilon"] for certificate in certificates)
        assert row["seeds"] == 2
        assert row["seconds"] > 0
        assert all(run.verify().mismatches == [] for run in runs)
    lines = list(csv.DictReader((out / "results.csv").open()))
    assert [(line["plan"], line["seed"]) for line in lines] == [
        ("fast", "0"),
        ("slow", "0"),
        ("fast", "1"),
        ("slow", "1"),
    ]
    drawn = ElementTree.parse(out / "results.svg").getroot()
    assert drawn.tag.endswith("svg")
    assert json.loads((out / "results.json").read_text()) == said.json["rows"]


def test_a_killed_comparison_goes_on_without_repeating_a_finished_cell(
    plans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    trained: list[Path | None] = []
    original = compare_module.run_training

    def twice(config, directory, *, resume):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(directory)
        return original(config, directory, resume=resume)

    monkeypatch.setattr(compare_module, "run_training", twice)
    assert say("compare", plans, "--seeds", "2", "--out", out).code == 130
    monkeypatch.setattr(compare_module, "run_training", original)
    before = {path: (file_digest(path), path.stat().st_mtime_ns) for path in out.rglob("seed-0/*") if path.is_file()}
    assert before
    said = say("compare", plans, "--seeds", "2", "--out", out, "--resume", "--json")
    assert said.code == 0, said.err
    assert said.err.count("finished before") == 2
    assert [row["seeds"] for row in said.json["rows"]] == [2, 2]
    assert {path: (file_digest(path), path.stat().st_mtime_ns) for path in before} == before
    again = say("compare", plans, "--seeds", "2", "--out", out, "--resume", "--json")
    assert again.json["rows"] == said.json["rows"]
    assert again.err.count("finished before") == 4


def test_the_time_of_a_training_that_was_stopped_after_its_last_step_is_not_known(plans: Path, tmp_path: Path) -> None:
    """What is left to do then says nothing about how long the steps took."""
    out = tmp_path / "out"
    say("compare", plans, "--seeds", "2", "--out", out)
    known = json.loads((out / "fast" / "seed-1" / "result.json").read_text())["seconds"]
    for lost in ("fast/seed-0", "slow/seed-0", "slow/seed-1"):
        (out / lost / "result.json").unlink()
    said = say("compare", plans, "--seeds", "2", "--out", out, "--resume", "--json")
    assert said.code == 0, said.err
    assert {row["plan"]: row["seconds"] for row in said.json["rows"]} == {"fast": known, "slow": None}
    assert say("compare", plans, "--seeds", "2", "--out", out, "--resume").code == 0


def test_a_budget_is_for_plans_that_do_not_say_their_own(plans: Path, tmp_path: Path) -> None:
    (plans / "free.toml").write_text('[model]\nname = "logistic_regression"\n[plan]\nsteps = 2\n')
    (plans / "own.toml").write_text(
        '[model]\nname = "logistic_regression"\n[plan]\nsteps = 2\n[privacy]\nepsilon = 5.0\naccountant = "rdp"'
    )
    said = say("compare", plans, "--seeds", "1", "--epsilon", "2", "--out", tmp_path / "out", "--json")
    epsilons = {row["plan"]: row["epsilon"] for row in said.json["rows"]}
    assert 1.9 < epsilons["free"] <= 2.0
    assert 4.9 < epsilons["own"] <= 5.0
    assert epsilons["fast"] == epsilons["slow"]
    assert epsilons["fast"] not in (epsilons["free"], epsilons["own"])


def test_what_cannot_be_compared_is_refused_before_anything_is_trained(plans: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no configuration" in refusal("compare", empty, "--out", out)
    assert "cannot be read" in refusal("compare", tmp_path / "none.toml", "--out", out)
    assert "two configurations are called 'fast'" in refusal("compare", plans, plans / "fast.toml", "--out", out)
    (tmp_path / "results.csv.toml").write_text(BASE)
    assert "rename results.csv.toml" in refusal("compare", tmp_path / "results.csv.toml", "--out", out)
    assert "no comparison to resume" in refusal("compare", plans, "--resume", "--out", out)
    assert "--seeds" in refusal("compare", plans, "--seeds", "0", "--out", out)
    assert "--epsilon" in refusal("compare", plans, "--epsilon", "nan", "--out", out)
    (plans / "bad.toml").write_text("[plan]\nstep = 3")
    assert "did you mean 'steps'" in refusal("compare", plans, "--out", out)
    assert not out.exists()


def test_a_comparison_is_not_mixed_with_another_one(plans: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert say("compare", plans / "fast.toml", "--seeds", "1", "--out", out).code == 0
    assert "already holds a comparison" in refusal("compare", plans / "fast.toml", "--out", out)
    (plans / "fast.toml").write_text('include = "_base.toml"\n[model]\nname = "mlp"')
    assert "is not the one" in refusal("compare", plans / "fast.toml", "--resume", "--out", out)
    said = say("compare", plans / "slow.toml", "--seeds", "1", "--resume", "--out", out, "--json")
    assert {row["plan"] for row in said.json["rows"]} == {"slow", "fast"}, "what was trained before is in the table"


def test_an_error_says_which_training_it_is_of(plans: Path, tmp_path: Path) -> None:
    (plans / "broken.toml").write_text('include = "_base.toml"\n[model]\nname = "no.such:model"')
    said = say("compare", plans / "broken.toml", "--seeds", "1", "--out", tmp_path / "out")
    assert said.code == 2
    assert "privgrad: broken, seed 0: model.name" in said.err


def test_a_plan_without_noise_is_compared_and_its_epsilon_is_null(plans: Path, tmp_path: Path) -> None:
    """JSON knows no infinity; a comparison that ran for hours must not end in a traceback for it."""
    out = tmp_path / "out"
    arguments = ("compare", plans / "fast.toml", "--seeds", "1", "--out", out, "--json")
    for more in ((), ("--resume",)):
        said = say(*arguments, "--set", "plan.noise.multiplier=0.0", *more)
        assert said.code == 0, said.err
        assert said.json["rows"][0]["epsilon"] is None
    assert "Infinity" not in (out / "results.json").read_text() + (out / "fast" / "seed-0" / "result.json").read_text()


def test_rows_are_means_over_seeds() -> None:
    cells = [Cell("a", seed, 1.0 + seed, 1e-5, 10, reached, 4.0) for seed, reached in enumerate((0.5, 0.7, None))]
    (row,) = rows_of([*cells])
    assert (row.mean, row.spread) == (pytest.approx(0.6), pytest.approx(statistics.stdev([0.5, 0.7])))
    assert (row.seeds, row.epsilon, row.seconds) == (3, 3.0, 4.0)
    (alone,) = rows_of(cells[:1])
    assert (alone.mean, alone.spread) == (0.5, None)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("include = 3", "include is 3"),
        ('include = "none.toml"', "none.toml cannot be read"),
        ('include = "two.toml"', "three.toml cannot be read"),
        ('include = "one.toml"', "includes itself"),
        ('include = "four.toml"', "includes itself"),
        ('include = "loop.toml"', "loop.toml cannot be read"),
        ('include = "a\\u0000b"', "not valid TOML"),
    ],
)
def test_an_include_that_cannot_be_read_is_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "loop.toml").symlink_to(tmp_path / "loop.toml")
    (tmp_path / "two.toml").write_text('include = "three.toml"')
    (tmp_path / "four.toml").write_text('include = "one.toml"')
    (tmp_path / "one.toml").write_text(text)
    assert says in refusal("train", tmp_path / "one.toml", "--out", tmp_path / "run")


def test_an_includes_tables_lie_under_the_files_own(tmp_path: Path) -> None:
    from privgrad.cli.config import read_config

    (tmp_path / "base.toml").write_text(
        "[plan]\nsteps = 2\nnoise = { kind = 'gaussian', multiplier = 2.0 }\nsampling = { kind = 'poisson', rate = 0.1 }"
    )
    (tmp_path / "between.toml").write_text('include = "base.toml"\n[plan]\nsteps = 5')
    (tmp_path / "own.toml").write_text(
        'include = "between.toml"\n[plan]\nsteps = 3\nnoise = { side_share = 0.1 }\nsampling = { kind = "full_batch" }'
    )
    assert read_config(tmp_path / "own.toml") == {
        "plan": {
            "steps": 3,
            "noise": {"kind": "gaussian", "multiplier": 2.0, "side_share": 0.1},
            "sampling": {"kind": "full_batch"},
        }
    }


def test_fewer_seeds_than_before_do_not_hide_what_was_trained(plans: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert say("compare", plans / "fast.toml", "--seeds", "2", "--out", out).code == 0
    said = say("compare", plans / "fast.toml", "--seeds", "1", "--resume", "--out", out, "--json")
    assert (said.json["trainings"], said.json["rows"][0]["seeds"]) == (2, 2)
    (out / "fast" / "seed-1" / "result.json").write_text("{}")
    assert "is not the result of a training" in say("compare", plans / "fast.toml", "--resume", "--out", out).err


def test_a_plan_with_a_mistake_can_be_mended_before_anything_of_it_was_charged(plans: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (plans / "slow.toml").write_text('include = "_base.toml"\n[model]\nname = "mlpp"')
    assert "slow, seed 0: model.name is 'mlpp'" in say("compare", plans, "--seeds", "1", "--out", out).err
    (plans / "slow.toml").write_text('include = "_base.toml"\n[model]\nname = "logistic_regression"')
    (plans / "._fast.toml").write_bytes(b"\x00\x05\x16\x07\xff")
    said = say("compare", plans, "--seeds", "1", "--resume", "--out", out, "--json")
    assert said.code == 0, said.err
    assert {row["plan"] for row in said.json["rows"]} == {"slow", "fast"}


def test_a_training_that_stopped_before_its_first_step_is_begun_again(plans: Path, tmp_path: Path) -> None:
    """Two Ctrl-C in the first step leave an empty ledger."""
    out = tmp_path / "out"
    assert say("compare", plans / "fast.toml", "--seeds", "1", "--out", out).code == 0
    empty = Run(out / "fast" / "seed-1")
    empty.directory.mkdir()
    empty.ledger.write_text("")
    said = say("compare", plans / "fast.toml", "--seeds", "2", "--resume", "--out", out, "--json")
    assert said.code == 0, said.err
    assert said.json["trainings"] == 2


def test_trainings_with_a_seed_have_each_noise_of_its_own(plans: Path, tmp_path: Path) -> None:
    """With one seed for all, the difference of two releases would be that of two sums, without any noise."""
    out = tmp_path / "out"
    said = say("compare", plans, "--seeds", "2", "--out", out, "--set", "plan.noise.insecure_seed=7", "--json")
    assert said.code == 0, said.err
    seeds = {read_config(file)["plan"]["noise"]["insecure_seed"] for file in out.glob("*/seed-*/config.toml")}
    assert len(seeds) == 4
    again = tmp_path / "again"
    assert say("compare", plans, "--seeds", "2", "--out", again, "--set", "plan.noise.insecure_seed=7").code == 0
    for run in ("fast/seed-0", "slow/seed-1"):
        assert file_digest(out / run / "model.safetensors") == file_digest(again / run / "model.safetensors")


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("epsilon", 0.01, "its certificate says something else"),
        ("epsilon", "0.1", "its certificate says something else"),
        ("test_accuracy", "high", "test_accuracy is 'high'"),
    ],
)
def test_a_result_that_was_edited_is_not_believed(
    plans: Path, tmp_path: Path, key: str, value: object, says: str
) -> None:
    out = tmp_path / "out"
    assert say("compare", plans / "fast.toml", "--seeds", "1", "--out", out).code == 0
    file = out / "fast" / "seed-0" / "result.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    said = say("compare", plans / "fast.toml", "--seeds", "1", "--out", out, "--resume")
    assert said.code == 2
    assert says in said.err
    (out / "comparison.json").unlink()
    assert "comparison.json, which says of which plans, is gone" in refusal(
        "compare", plans / "fast.toml", "--seeds", "1", "--out", out
    )

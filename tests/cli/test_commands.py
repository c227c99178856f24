"""The commands, as a person or a script uses them: exit codes, one JSON object, one line where something is wrong."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from privgrad.cli import run as privgrad
from privgrad.cli.config import DEFAULTS, complete, read_config
from privgrad.files import file_digest
from privgrad.privacy.ledger import read_ledger
from privgrad.training.batches import SampledBatch
from privgrad.training.checkpoint import load_tree
from privgrad.training.private import Private

STEPS = 3
SMALL = [
    *("--model", "logistic_regression"),
    *("--set", "plan.noise.multiplier=1.0"),
    *("--set", f"plan.steps={STEPS}"),
    *("--set", "training.evaluations=1"),
]
EPSILON_NUMBERS = ["--sampling-rate", "0.01", "--noise-multiplier", "1", "--steps", "10000", "--delta", "1e-5"]


@dataclass(frozen=True)
class Said:
    """What a command said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The last line of standard output."""
        return json.loads(self.out.splitlines()[-1])


def say(*arguments: object) -> Said:
    """Run a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = privgrad([str(argument) for argument in arguments])
    return Said(code, out.getvalue(), err.getvalue())


def refusal(*arguments: object) -> str:
    """The one line with which a command refuses."""
    said = say(*arguments)
    assert said.code == 2, said
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("privgrad: ")
    return line.removeprefix("privgrad: ")


@pytest.fixture(autouse=True)
def signals_are_caught() -> Iterator[None]:
    """A signal that a run does not take fails its test, and does not end the whole session."""

    def untaken(number: int, frame: object) -> None:
        raise AssertionError(f"signal {number} was not taken by the run")

    before = {number: signal.signal(number, untaken) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run at a given noise, for reading only."""
    directory = tmp_path_factory.mktemp("runs") / "small"
    said = say("train", *SMALL, "--out", directory)
    assert said.code == 0, said
    return directory


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Said, Path]:
    """`privgrad train --json` with the default budget, and few steps."""
    directory = tmp_path_factory.mktemp("runs") / "calibrated"
    short = ["--set", "plan.steps=20", "--set", "training.evaluations=2"]
    return say("train", "--json", *short, "--out", directory), directory


# Help and usage.


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], *([name, "--help"] for name in ("train", "epsilon", "calibrate", "verify"))]
)
def test_help_exits_with_0(arguments: list[str]) -> None:
    said = say(*arguments)
    assert said.code == 0
    assert "Usage: privgrad" in said.out
    assert said.err == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trane"], "trane"),
        (["train", "--epsilonn", "3"], "--epsilon"),
        (["train", "--epsilon", "three"], "'--epsilon'"),
        (["train", "one.toml", "two.toml"], "two.toml"),
        (["train", "--out"], "--out"),
        (["verify"], "RUN"),
        (["epsilon", "--steps", "1.5"], "'--steps'"),
    ],
)
def test_bad_usage_is_one_line_that_points_to_the_help(arguments: list[str], says: str) -> None:
    line = refusal(*arguments)
    assert says.lower() in line.lower()
    assert "privgrad --help" in line


# epsilon.


@pytest.mark.parametrize(("accountant", "expected"), [("pld", 6.188), ("rdp", 6.713)])
def test_epsilon_of_the_reference_row(accountant: str, expected: float) -> None:
    said = say("epsilon", *EPSILON_NUMBERS, "--accountant", accountant, "--json")
    assert said.code == 0
    assert said.err == ""
    (line,) = said.out.splitlines()
    found = json.loads(line)
    assert found.keys() >= {"epsilon", "delta", "accountant"}
    assert found["epsilon"] == pytest.approx(expected, abs=0.01)
    assert (found["delta"], found["accountant"], found["steps"], found["noise_multiplier"]) == (
        1e-5,
        accountant,
        10000,
        1,
    )


def test_epsilon_for_people_is_rounded_upwards() -> None:
    numbers = ["--sampling-rate", "1", "--noise-multiplier", "20", "--steps", "1"]
    exact = say("epsilon", *numbers, "--json").json["epsilon"]
    said = say("epsilon", *numbers)
    found = re.fullmatch(r"epsilon = (\d+\.\d{3}) at delta = 1e-05 \(1 steps, pld, zero_out\)\n", said.out)
    assert found is not None
    assert exact <= float(found[1]) <= exact + 0.001


def test_epsilon_without_noise_is_null_and_infinite() -> None:
    numbers = ["--sampling-rate", "0.1", "--noise-multiplier", "0", "--steps", "10"]
    assert say("epsilon", *numbers, "--json").json["epsilon"] is None
    assert say("epsilon", *numbers).out.startswith("epsilon = infinity")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give a configuration file, or --sampling-rate and --steps"),
        (["--sampling-rate", "0.1"], "--steps"),
        (["--sampling-rate", "0.1", "--steps", "10"], "--noise-multiplier is missing"),
        (["--set", "plan.steps=3"], "--set changes a configuration"),
        *(
            (["--sampling-rate", rate, "--steps", "10", "--noise-multiplier", "1"], "sampling.rate is")
            for rate in ("0", "1.5", "-1", "nan", "inf")
        ),
        *(
            (["--sampling-rate", "0.1", "--steps", "10", "--noise-multiplier", noise], "noise.multiplier is")
            for noise in ("-1", "nan", "inf")
        ),
        *(
            (["--sampling-rate", "0.1", "--steps", "10", "--noise-multiplier", "1", "--delta", delta], "delta is")
            for delta in ("0", "1", "-1", "nan", "inf")
        ),
        *(
            (["--sampling-rate", "0.1", "--steps", steps, "--noise-multiplier", "1"], "steps is")
            for steps in ("0", "-1")
        ),
        ([*EPSILON_NUMBERS, "--accountant", "plt"], "did you mean 'pld'?"),
        ([*EPSILON_NUMBERS, "--adjacency", "replace"], "did you mean 'replace_one'?"),
        ([*EPSILON_NUMBERS, "--adjacency", "replace_one", "--accountant", "rdp"], "use accountant = 'pld'"),
    ],
)
def test_epsilon_refuses_numbers_that_make_no_sense(arguments: list[str], says: str) -> None:
    assert says in refusal("epsilon", *arguments)


@pytest.mark.parametrize(
    ("rate", "noise"),
    [
        ("0.01", "1e-300"),
        pytest.param(
            *("0.01", "1e300"),
        ),
    ],
)
def test_epsilon_of_extreme_numbers_is_a_number_or_a_refusal_and_nothing_else(
    caplog: pytest.LogCaptureFixture, rate: str, noise: str
) -> None:
    said = say("epsilon", "--sampling-rate", rate, "--noise-multiplier", noise, "--steps", "10")
    assert said.code in (0, 2)
    assert len(said.out.splitlines() + said.err.splitlines()) == 1
    assert caplog.records == []


def test_epsilon_of_a_configuration_that_names_the_size_reads_no_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(name: str) -> None:
        raise AssertionError("the data was read")

    monkeypatch.setattr("privgrad.cli.build.load", forbidden)
    (tmp_path / "config.toml").write_text(
        "[plan]\nsteps = 1\nsampling = { expected_batch_size = 50, dataset_size = 50 }\nnoise = { multiplier = 20.0 }\n"
    )
    by_file = say("epsilon", tmp_path / "config.toml", "--json")
    by_numbers = say("epsilon", "--sampling-rate", "1", "--noise-multiplier", "20", "--steps", "1", "--json")
    assert by_file.code == 0
    assert by_file.json == by_numbers.json


def test_epsilon_of_a_configuration_takes_settings_and_options(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[plan.sampling]\nrate = 1.0\ndivisor = 10.0\n[plan]\nsteps = 4\n")
    found = say(
        *("epsilon", tmp_path / "config.toml", "--noise-multiplier", "20", "--delta", "1e-6"),
        *("--set", "plan.steps=2", "--json"),
    ).json
    assert (found["steps"], found["delta"], found["noise_multiplier"]) == (2, 1e-6, 20.0)


def test_epsilon_refuses_a_configuration_and_numbers_together(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("")
    assert "both a configuration and plain numbers" in refusal("epsilon", tmp_path / "config.toml", "--steps", "3")


def test_epsilon_of_a_runs_own_configuration_is_what_the_run_certified(small: Path) -> None:
    certificate = json.loads((small / "certificate.json").read_text())
    assert say("epsilon", small / "config.toml", "--json").json["epsilon"] == certificate["epsilon"]


# calibrate.


def test_calibrate_keeps_the_budget_and_epsilon_agrees() -> None:
    numbers = ["--sampling-rate", "1", "--steps", "3"]
    said = say("calibrate", *numbers, "--epsilon", "2", "--json")
    assert said.code == 0
    (line,) = said.out.splitlines()
    found = json.loads(line)
    assert found.keys() >= {"noise_multiplier", "epsilon", "delta", "accountant"}
    assert 1.99 < found["epsilon"] <= 2
    again = say("epsilon", *numbers, "--noise-multiplier", found["noise_multiplier"], "--json")
    assert again.json["epsilon"] == found["epsilon"]


def test_calibrate_says_multiplier_and_epsilon_in_words() -> None:
    said = say("calibrate", "--sampling-rate", "1", "--steps", "1", "--epsilon", "2", "--accountant", "rdp")
    assert said.code == 0
    assert re.fullmatch(r"noise multiplier = [\d.]+ \(epsilon = [\d.]+ at delta = 1e-05\)\n", said.out)


@pytest.mark.parametrize("epsilon", ["0", "-1", "nan", "inf"])
def test_calibrate_refuses_a_budget_out_of_range(epsilon: str) -> None:
    line = refusal("calibrate", "--sampling-rate", "0.1", "--steps", "3", "--epsilon", epsilon)
    assert "epsilon is" in line
    assert "expected a finite number at least 1e-06 and at most 10000" in line


def test_calibrate_refuses_a_configuration_that_gives_the_noise(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[plan.noise]\nmultiplier = 1.0\n")
    assert "nothing to calibrate" in refusal("calibrate", tmp_path / "config.toml")


# train.


def test_train_json_is_one_object_on_the_last_line(calibrated: tuple[Said, Path]) -> None:
    said, directory = calibrated
    assert said.code == 0
    (line,) = said.out.splitlines()
    found = json.loads(line)
    assert found.keys() == {"epsilon", "delta", "test_accuracy", "steps", "noise_multiplier", "run"}
    assert 2.9 < found["epsilon"] <= 3
    assert (found["delta"], found["steps"], found["run"]) == (1e-5, 20, str(directory))
    assert 0 <= found["test_accuracy"] <= 1


def test_train_learns_something(calibrated: tuple[Said, Path]) -> None:
    assert calibrated[0].json["test_accuracy"] > 0.2, "one class in ten is guessed"


def test_progress_goes_to_standard_error(calibrated: tuple[Said, Path]) -> None:
    lines = calibrated[0].err.splitlines()
    assert any(line.startswith("step 10/20  epsilon ") for line in lines)
    assert any(line.startswith("step 20/20  epsilon ") for line in lines)


def test_what_train_says_is_what_certificate_and_verify_say(calibrated: tuple[Said, Path]) -> None:
    said, directory = calibrated
    certificate = json.loads((directory / "certificate.json").read_text())
    assert said.json["epsilon"] == certificate["epsilon"]
    assert said.json["test_accuracy"] == certificate["evaluation"]["metrics"]["test_accuracy"]
    assert said.json["noise_multiplier"] == certificate["noise"]["multiplier"]
    verified = say("verify", directory, "--json")
    assert (verified.code, verified.json["ok"], verified.json["epsilon"]) == (0, True, said.json["epsilon"])


def test_train_in_words_tells_epsilon_certificate_and_how_to_check(tmp_path: Path) -> None:
    said = say("train", *SMALL, "--out", tmp_path / "run")
    assert said.code == 0
    first, certificate, check = said.out.splitlines()
    assert re.match(r"epsilon = [\d.]+ at delta = 1e-05, test accuracy [\d.]+%", first)
    assert Path(certificate.split()[-1]).is_file()
    assert check.split() == ["check", "it:", "privgrad", "verify", str(tmp_path / "run")]


def test_a_run_from_the_command_line_leaves_every_file_of_the_design(small: Path) -> None:
    assert {path.relative_to(small).as_posix() for path in small.rglob("*") if path.is_file()} == {
        "config.toml",
        "plan.json",
        "ledger.jsonl",
        "model.safetensors",
        "checkpoint/latest.safetensors",
        "metrics.jsonl",
        "certificate.json",
        "certificate.md",
        "certificate.html",
    }


def test_without_out_a_new_directory_is_made_under_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = [say("train", *SMALL, "--json").json["run"] for _ in range(2)]
    assert len(set(made)) == 2
    assert all(Path(directory).parent == Path("runs") for directory in made)
    assert all((tmp_path / directory / "certificate.json").is_file() for directory in made)


def test_the_configuration_of_a_run_fed_back_gives_the_same_configuration(small: Path, tmp_path: Path) -> None:
    assert say("train", small / "config.toml", "--out", tmp_path / "again").code == 0
    written = [(directory / "config.toml").read_text() for directory in (small, tmp_path / "again")]
    assert written[0] == written[1]
    assert complete(read_config(small / "config.toml")) == complete(tomllib.loads(written[1]))
    assert file_digest(small / "plan.json") == file_digest(tmp_path / "again" / "plan.json")


def test_the_configuration_of_a_run_holds_what_was_asked_for(small: Path) -> None:
    config = read_config(small / "config.toml")
    assert config["model"]["name"] == "logistic_regression"
    assert config["plan"]["steps"] == STEPS
    assert config["plan"]["noise"] == {"kind": "gaussian", "multiplier": 1.0}
    assert config["plan"]["sampling"] == DEFAULTS["plan"]["sampling"]


def test_options_go_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(
        "[model]\nname = 'mlp'\n[privacy]\ndelta = 1e-3\n[plan]\nsteps = 9\nnoise = { multiplier = 0.0 }\n"
    )
    options = ["--model", "logistic_regression", "--delta", "1e-6", "--set", "plan.steps=1"]
    found = say("train", tmp_path / "config.toml", *options, "--out", tmp_path / "run", "--json").json
    assert (found["steps"], found["delta"]) == (1, 1e-6)
    assert set(load_file(tmp_path / "run" / "model.safetensors")) == {"linear.weight", "linear.bias"}


def test_a_seeded_run_is_reproducible_and_says_what_that_costs(tmp_path: Path) -> None:
    seed = ["--set", "plan.noise.insecure_seed=918273645"]
    for name in ("one", "other"):
        assert say("train", *SMALL, *seed, "--out", tmp_path / name).code == 0
    one, other = (tmp_path / name / "model.safetensors" for name in ("one", "other"))
    assert file_digest(one) == file_digest(other)
    for path in (tmp_path / "one").rglob("*"):
        if path.is_file() and path.name != "config.toml":
            assert b"918273645" not in path.read_bytes(), path.name
    assert (tmp_path / "one" / "config.toml").stat().st_mode & 0o077 == 0
    assert "seed of the noise stays secret" in (tmp_path / "one" / "certificate.md").read_text()


def test_without_noise_there_is_no_guarantee_and_everything_says_so(tmp_path: Path) -> None:
    said = say("train", *SMALL, "--set", "plan.noise.multiplier=0", "--out", tmp_path, "--json")
    assert said.code == 0
    assert said.json["epsilon"] is None
    assert said.json["noise_multiplier"] == 0
    certificate = json.loads((tmp_path / "certificate.json").read_text())
    assert (certificate["guarantee"], certificate["epsilon"]) == (False, None)
    for name in ("certificate.md", "certificate.html"):
        assert "NO GUARANTEE" in (tmp_path / name).read_text()
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["epsilon"] is None
    verified = say("verify", tmp_path, "--json")
    assert (verified.code, verified.json["ok"], verified.json["epsilon"]) == (0, True, None)
    assert "epsilon = infinity" in say("verify", tmp_path).out


def test_a_delta_that_is_not_below_one_over_n_is_warned_of_in_words(tmp_path: Path) -> None:
    said = say("train", *SMALL, "--set", "plan.noise.multiplier=0", "--delta", "0.001", "--out", tmp_path / "large")
    assert said.code == 0
    (warning,) = [line for line in said.err.splitlines() if "warning" in line]
    assert "delta = 0.001 is not below 1/n = 0.0007" in warning
    assert "choose a smaller delta" in warning


def test_a_small_delta_is_not_warned_of(calibrated: tuple[Said, Path]) -> None:
    assert "warning" not in calibrated[0].err


def test_an_optimizer_with_a_schedule_is_taken_from_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(
        "[optimizer]\nname = 'ADAM'\nlr = 0.01\nbetas = [0.8, 0.9]\n"
        "[optimizer.schedule]\nname = 'CosineAnnealingLR'\nT_max = 3\n"
        "[training]\naveraging = 'none'\n"
    )
    assert say("train", tmp_path / "config.toml", *SMALL, "--out", tmp_path / "run").code == 0
    saved = load_tree(tmp_path / "run" / "checkpoint" / "latest.safetensors")
    (group,) = saved["optimizer"]["param_groups"]
    assert list(group["betas"]) == [0.8, 0.9]
    assert group["initial_lr"] == 0.01
    assert group["lr"] == pytest.approx(0.0, abs=1e-12)
    assert saved["average"] is None


@pytest.mark.parametrize("setting", ["optimizer.name=LBFGS", "optimizer.name=Muon", "optimizer.rate=1"])
def test_an_optimizer_that_cannot_be_used_is_refused(tmp_path: Path, setting: str) -> None:
    assert refusal("train", *SMALL, "--set", setting, "--out", tmp_path / "run")


@pytest.mark.parametrize("setting", ["optimizer.schedule.name=ReduceLROnPlateau", "optimizer.name=SparseAdam"])
def test_an_optimizer_or_schedule_that_cannot_step_is_refused(tmp_path: Path, setting: str) -> None:
    assert refusal("train", *SMALL, "--set", setting, "--out", tmp_path / "run")


def test_a_learning_rate_that_is_no_number_is_refused(tmp_path: Path) -> None:
    refusal("train", *SMALL, "--set", "optimizer.lr=nan", "--out", tmp_path / "run")


# Where a run goes.


def test_an_out_below_a_regular_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = refusal("train", *SMALL, "--out", tmp_path / "file" / "run")
    assert "file/run cannot be made: Not a directory" in line


def test_an_out_that_is_a_regular_file_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert "cannot be made" in refusal("train", *SMALL, "--out", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_out_that_holds_a_run_is_refused_and_left_alone(small: Path) -> None:
    before = {path: file_digest(path) for path in small.rglob("*") if path.is_file()}
    line = refusal("train", *SMALL, "--set", "plan.steps=1", "--out", small)
    assert "already holds a run" in line
    assert "--resume" in line
    assert {path: file_digest(path) for path in small.rglob("*") if path.is_file()} == before


def test_a_refused_training_does_not_use_up_its_directory(tmp_path: Path) -> None:
    assert "LBFGS" in refusal("train", *SMALL, "--set", "optimizer.name=LBFGS", "--out", tmp_path / "run")
    assert say("train", *SMALL, "--out", tmp_path / "run").code == 0


# Stop and resume.


class Own(nn.Module):
    """A user's own model."""

    def __init__(self, input_shape: Sequence[int], classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(input_shape[-1] * input_shape[-2], classes)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.linear(inputs.flatten(1))


STOPPING = [
    *("--model", "tests.cli.test_commands:Own"),
    *SMALL[2:],
    *("--set", "plan.noise.insecure_seed=5"),
]


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that Ctrl-C stopped after its first step."""
    step = Private.step

    def interrupted(self: Private, batch: SampledBatch) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Private, "step", interrupted)
        said = say("train", *STOPPING, "--out", tmp_path / "stopped", "--json")
    assert said.code == 130
    assert said.out == ""
    line = said.err.splitlines()[-1]
    assert f"stopped after step 1 of {STEPS}, nothing is lost" in line
    assert f"privgrad train --resume --out {tmp_path / 'stopped'}" in line
    return tmp_path / "stopped"


def test_the_line_of_an_interrupted_run_resumes_it(stopped: Path, tmp_path: Path) -> None:
    assert say("verify", stopped, "--json").json["finished"] is False
    said = say("train", "--resume", "--out", stopped, "--json")
    assert said.code == 0
    assert said.json["steps"] == STEPS
    assert say("verify", stopped, "--json").json["finished"] is True
    assert say("train", *STOPPING, "--out", tmp_path / "whole").code == 0
    assert file_digest(tmp_path / "whole" / "model.safetensors") == file_digest(stopped / "model.safetensors")


def test_resuming_with_the_same_configuration_is_allowed(stopped: Path) -> None:
    assert say("train", stopped / "config.toml", "--resume", "--out", stopped).code == 0


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ("optimizer.lr=0.7", "optimizer.lr was 1.2 and is 0.7"),
        ("plan.steps=4", "plan.steps was {steps} and is 4"),
        ("plan.noise.multiplier=2.0", "plan.noise.multiplier was {multiplier} and is 2.0"),
        ("privacy.delta=1e-6", "privacy.delta was 1e-05 and is 1e-06"),
        ("model.name=mlp", "model.name was '{model}' and is 'mlp'"),
        ("training.seed=1", "training.seed was 0 and is 1"),
    ],
)
def test_resuming_with_another_configuration_names_the_key_that_differs(stopped: Path, setting: str, key: str) -> None:
    line = refusal("train", stopped / "config.toml", "--resume", "--out", stopped, "--set", setting)
    config = tomllib.loads((stopped / "config.toml").read_text())
    before, model = config["plan"], config["model"]["name"]
    key = key.format(steps=before["steps"], multiplier=before["noise"]["multiplier"], model=model)
    assert line.startswith(f"the settings differ from those of the run in {stopped}: {key};")


def test_resuming_a_finished_run_says_so_and_changes_nothing(small: Path) -> None:
    before = {path: (file_digest(path), path.stat().st_mtime_ns) for path in small.rglob("*") if path.is_file()}
    again = say("train", "--resume", "--out", small, "--json")
    assert again.code == 0
    assert f"the run in {small} was finished already; nothing was changed" in again.err
    certificate = json.loads((small / "certificate.json").read_text())
    assert again.json["test_accuracy"] == certificate["evaluation"]["metrics"]["test_accuracy"]
    assert again.json["epsilon"] == pytest.approx(certificate["epsilon"], rel=1e-9)
    assert again.json["steps"] == certificate["steps"]["charged"]
    assert {p: (file_digest(p), p.stat().st_mtime_ns) for p in small.rglob("*") if p.is_file()} == before


def test_a_directory_that_holds_no_run_is_said_to_be_none(tmp_path: Path) -> None:
    assert "is not a run" in refusal("verify", tmp_path)


def test_what_is_printed_can_be_typed_from_a_checkout(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "check it:    privgrad verify" in say("train", "--resume", "--out", small).out
    monkeypatch.setenv("PRIVGRAD_COMMAND", "./privgrad")
    assert "check it:    ./privgrad verify" in say("train", "--resume", "--out", small).out
    assert "Try: ./privgrad --help" in refusal("train", "--nonsense")


def test_a_key_of_another_section_is_pointed_to() -> None:
    assert "did you mean privacy.epsilon?" in refusal("train", "--set", "plan.epsilon=2")


def test_resuming_without_out_is_refused() -> None:
    assert "--out" in refusal("train", "--resume")


@pytest.mark.parametrize("kind", ["nothing", "an empty directory", "a file"])
def test_resuming_nothing_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "run"
    if kind == "an empty directory":
        path.mkdir()
    if kind == "a file":
        path.write_text("")
    assert "holds no run to resume; start one without --resume" in refusal("train", "--resume", "--out", path)
    assert path.exists() == (kind != "nothing")


def test_resuming_without_its_configuration_is_refused(stopped: Path) -> None:
    (stopped / "config.toml").unlink()
    assert "config.toml cannot be read" in refusal("train", "--resume", "--out", stopped)


def test_resuming_from_a_damaged_checkpoint_is_refused(stopped: Path) -> None:
    path = stopped / "checkpoint" / "latest.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "is damaged" in refusal("train", "--resume", "--out", stopped)


def test_resuming_on_a_changed_ledger_is_refused(stopped: Path) -> None:
    path = stopped / "ledger.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"step":1', b'"step":2'))
    assert "does not fit the chain" in refusal("train", "--resume", "--out", stopped)


# Real processes.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_a_process_stopped_in_the_middle_leaves_a_run_that_verifies(tmp_path: Path, number: signal.Signals) -> None:
    """At least every step whose weights can be on the disk is in the ledger, whatever was killed and when."""
    directory = tmp_path / "run"
    endless = ["--model", "logistic_regression", "--set", "plan.noise.multiplier=1.0", "--set", "plan.steps=1000000"]
    program = [sys.executable, "-c", "from privgrad.cli import main; main()"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*program, "train", *endless, "--set", "training.evaluations=1", "--out", str(directory)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        ledger = directory / "ledger.jsonl"
        deadline = time.monotonic() + 100
        while not (ledger.exists() and ledger.read_bytes().count(b"\n") > 5):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "no step was taken"
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert out == ""
    assert "Traceback" not in err
    if number is signal.SIGINT:
        assert process.returncode == 130
        assert "nothing is lost" in err.splitlines()[-1]
    else:
        assert process.returncode == -signal.SIGKILL

    charged = read_ledger(ledger).count
    applied = load_tree(directory / "checkpoint" / "latest.safetensors")["applied"]
    assert charged >= 5
    assert applied == charged if number is signal.SIGINT else applied <= charged
    verified = say("verify", directory, "--json")
    assert (verified.code, verified.json["ok"], verified.json["finished"]) == (0, True, False)
    assert verified.json["steps"] == charged


def test_the_tests_model_is_found_where_the_command_line_looks_for_it() -> None:
    """Otherwise the tests of stopping would fail for another reason than they say."""
    assert Own((1, 8, 8), 10)(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("optimizer.schedule={name='OneCycleLR',max_lr=1.0,total_steps=2}", "OneCycleLR fails at step"),
        ("optimizer.schedule={name='StepLR',step_size=0}", "StepLR fails at step 1"),
        ("optimizer.schedule={name='ExponentialLR',gamma=nan}", "learning rate nan"),
        ("optimizer.schedule={name='StepLR',step_size=3,last_epoch=5}", "cannot be made"),
        ("optimizer.momentum=nan", "out of range"),
        ("optimizer.weight_decay=inf", "out of range"),
        ("plan.epochs=1e308", "too many steps to count"),
        ("run.device=meta", "cannot be used"),
    ],
)
def test_what_would_fail_after_a_charge_is_refused_before(tmp_path: Path, setting: str, says: str) -> None:
    more = [] if "epochs" in setting else ["--set", "plan.steps=6"]
    given = ["train", "--set", setting, *more, "--set", "plan.noise.multiplier=1", "--out", tmp_path / "run"]
    assert says in refusal(*given)
    assert not (tmp_path / "run").exists()


def test_no_number_of_private_records_is_told_under_add_remove(tmp_path: Path) -> None:
    given = ["train", "--set", "plan.noise.multiplier=1", "--set", "plan.steps=1", "--set", "privacy.delta=0.01"]
    counted = say(*given, "--out", tmp_path / "a")
    assert "1/n = 0.0007" in counted.err
    stated = [
        "--set",
        "plan.sampling.rate=0.05",
        "--set",
        "plan.sampling.divisor=50",
        "--set",
        "privacy.adjacency=add_remove",
    ]
    assert "1/n = 0.001:" in say(*given, *stated, "--out", tmp_path / "b").err


def test_an_empty_name_of_a_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unset variable of the shell: the run would fill the current directory."""
    monkeypatch.chdir(tmp_path)
    assert "no name of a directory" in refusal("train", "--out", "")
    assert list(tmp_path.iterdir()) == []

"""Whole runs: what a run directory holds, and that no stop, crash or resume makes epsilon too small or the weights others."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import TensorDataset

import privgrad as pg
from privgrad.files import file_digest
from privgrad.mechanism.plan import Plan
from privgrad.mechanism.randomness import SeededSource
from privgrad.mechanism.step import StepRunner
from privgrad.privacy.ledger import read_ledger
from privgrad.training import run as run_module
from privgrad.training import trainer as trainer_module
from privgrad.training.averaging import ExponentialAverage
from privgrad.training.checkpoint import load_tree
from privgrad.training.evaluation import DeclaredSplit, accuracy
from privgrad.training.run import Run
from privgrad.training.stops import InterruptedRunError
from privgrad.training.trainer import Trainer

STEPS = 6
SEED = 918273645546372819
"""Long enough that it stands in a file by intention only."""
LOSS = pg.supervised(F.cross_entropy)
RUN_FILES = {
    "plan.json",
    "ledger.jsonl",
    "model.safetensors",
    "checkpoint/latest.safetensors",
    "metrics.jsonl",
    "certificate.json",
    "certificate.md",
    "certificate.html",
}


def records(seed: int = 0) -> TensorDataset:
    inputs = torch.randn(24, 3, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(inputs, (inputs[:, 0] > 0).long())


def plan(**changes: Any) -> Plan:
    """Every test uses this mechanism, so that the accountant computes it once."""
    values: dict[str, Any] = {
        "sampling": pg.PoissonSampling(rate=0.5, divisor=12.0),
        "steps": STEPS,
        "noise": pg.GaussianNoise(multiplier=1.0, insecure_seed=SEED),
    }
    return Plan(**(values | changes))


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def with_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Dropout(), nn.Linear(8, 2))


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.5)


def momentum(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, nesterov=True)


def adam(model: nn.Module) -> Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.1, amsgrad=True)


def build(
    directory: Path,
    *,
    optimizer: Callable[[nn.Module], Optimizer] = sgd,
    model: Callable[[], nn.Module] = network,
    cosine: bool = False,
    data: TensorDataset | None = None,
    **options: Any,
) -> Trainer:
    """A quiet trainer from a fixed initialisation. `options` go to Trainer."""
    torch.manual_seed(0)
    net = model()
    chosen = optimizer(net)
    schedule = CosineAnnealingLR(chosen, T_max=STEPS) if cosine else None
    defaults: dict[str, Any] = {"plan": plan(), "loss_fn": LOSS, "evaluations": 1, "quiet": True}
    return Trainer(net, chosen, data or records(), directory=directory, schedule=schedule, **(defaults | options))


def end(trainer: Trainer) -> None:
    """What the end of its process does for a trainer: the lock on the directory is gone."""
    trainer.private.ledger.close()


def on_step(trainer: Trainer, number: int, action: Callable[[], None]) -> None:
    """Do something in the optimizer's step of charged step `number`: its line is in the ledger, the weights are the old ones."""

    def watch(*_: Any) -> None:
        if trainer.private.ledger.count == number:
            action()

    trainer.optimizer.register_step_pre_hook(watch)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


class CrashError(Exception):
    """Nothing in privgrad knows it: the process is as good as dead."""


def crash() -> None:
    raise CrashError


def interrupted(directory: Path, number: int, **options: Any) -> None:
    """A run that is stopped by Ctrl-C in step `number`."""
    trainer = build(directory, **options)
    on_step(trainer, number, interrupt)
    with pytest.raises(InterruptedRunError):
        trainer.fit()
    end(trainer)


def crashed(directory: Path, number: int, **options: Any) -> None:
    """A run that dies in step `number`, after the ledger's line and before the weights moved."""
    trainer = build(directory, **options)
    on_step(trainer, number, crash)
    with pytest.raises(CrashError):
        trainer.fit()
    end(trainer)


def finished(directory: Path, **options: Any) -> Trainer:
    trainer = build(directory, **options)
    trainer.fit()
    end(trainer)
    return trainer


def steps_of(directory: Path) -> dict[str, int]:
    return json.loads((directory / "certificate.json").read_text())["steps"]


def files(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(first, second) for first, second in pairs)


@pytest.fixture
def saved_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint after each step, however fast the machine is."""
    monkeypatch.setattr(trainer_module, "_CHECKPOINT_SHARE", 1e12)


@pytest.fixture
def saved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint after the first step, and then only where the run stops."""
    monkeypatch.setattr(trainer_module, "_CHECKPOINT_SHARE", 0.0)


@pytest.fixture(autouse=True)
def user_generator() -> Iterator[None]:
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


@pytest.fixture(autouse=True)
def signals_are_caught() -> Iterator[None]:
    """A signal that a run does not take fails its test, and does not end the whole session."""

    def untaken(number: int, frame: object) -> None:
        raise AssertionError(f"signal {number} was not taken by the run")

    before = {number: signal.signal(number, untaken) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# What a run leaves.


def test_a_run_leaves_every_file_of_the_design_and_no_other(tmp_path: Path) -> None:
    finished(tmp_path / "run", test=pg.DeclaredSplit(records(1)))
    assert files(tmp_path / "run") == RUN_FILES


def test_a_result_says_what_the_certificate_says(tmp_path: Path) -> None:
    result = build(tmp_path, test=pg.DeclaredSplit(records(1))).fit()
    certificate = json.loads((tmp_path / "certificate.json").read_text())
    assert result.epsilon == certificate["epsilon"] == Run(tmp_path).verify().epsilon
    assert (result.delta, result.steps, result.noise_multiplier) == (1e-5, STEPS, 1.0)
    assert result.test_accuracy == certificate["evaluation"]["metrics"]["test_accuracy"]
    assert result.run == tmp_path


def test_metrics_hold_step_epsilon_and_accuracy_and_nothing_else(tmp_path: Path) -> None:
    finished(tmp_path, test=pg.DeclaredSplit(records(1)), evaluations=3)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all(line.keys() == {"step", "epsilon", "test_accuracy"} for line in lines)
    assert [line["epsilon"] for line in lines] == sorted(line["epsilon"] for line in lines)


def test_without_a_declared_split_nothing_is_measured(tmp_path: Path) -> None:
    result = build(tmp_path).fit()
    assert result.test_accuracy is None
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line).keys() == {"step", "epsilon"}
    assert json.loads((tmp_path / "certificate.json").read_text())["evaluation"] is None


def test_the_certificate_holds_these_keys_and_no_other(tmp_path: Path) -> None:
    finished(tmp_path, test=pg.DeclaredSplit(records(1)))
    certificate = json.loads((tmp_path / "certificate.json").read_text())
    assert certificate.keys() == {
        "format",
        "created",
        "guarantee",
        "epsilon",
        "delta",
        "unit",
        "adjacency",
        "attack_success",
        "setting",
        "covers",
        "mechanism",
        "noise",
        "accounting",
        "steps",
        "data",
        "evaluation",
        "disclosed",
        "not_covered",
        "ledger",
        "plan",
        "plan_digest",
        "model_sha256",
        "software",
        "digest",
    }
    assert certificate["disclosed"] == []
    assert certificate["evaluation"].keys() == {"split", "declared", "metrics"}
    assert certificate["evaluation"]["metrics"].keys() == {"test_accuracy"}
    assert certificate["mechanism"].keys() == {"sampling", "clipping", "noise"}


def test_the_checkpoint_holds_these_keys_and_no_other(tmp_path: Path) -> None:
    trainer = finished(tmp_path, optimizer=momentum, cosine=True, averaging=ExponentialAverage(0.9))
    saved = load_tree(tmp_path / "checkpoint" / "latest.safetensors")
    names = set(dict(trainer.model.named_parameters()))
    assert saved.keys() == {
        "model",
        "optimizer",
        "schedule",
        "plan",
        "stages",
        "random",
        "average",
        "applied",
        "ledger",
    }
    assert saved["model"].keys() == names
    assert saved["average"].keys() == names
    assert saved["stages"] == {"clipping": {}, "noise": {}}
    assert saved["ledger"].keys() == {"steps", "head"}
    assert saved["optimizer"].keys() == {"state", "param_groups"}
    assert all(state.keys() == {"momentum_buffer"} for state in saved["optimizer"]["state"].values())


def test_private_data_reach_the_run_directory_through_releases_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the clipped sums set to 0, other records and other batch sizes give the same files to the byte."""
    computed = StepRunner.clipped_sum

    def without_data(self: StepRunner, *batch: Any) -> Any:
        sums = computed(self, *batch)
        for value in sums.values.values():
            value.zero_()
        return sums

    monkeypatch.setattr(StepRunner, "clipped_sum", without_data)
    options: dict[str, Any] = {
        "test": pg.DeclaredSplit(records(1)),
        "optimizer": momentum,
        "averaging": ExponentialAverage(0.9),
        "evaluations": 3,
    }
    for name, seed, drawn in (("one", 2, 5), ("other", 3, 19)):
        monkeypatch.setattr(pg.PoissonSampling, "draw", lambda *_, drawn=drawn: torch.arange(drawn))
        finished(tmp_path / name, data=records(seed), **options)
    certificates = [json.loads((tmp_path / name / "certificate.json").read_text()) for name in ("one", "other")]
    changing = {key for key in certificates[0] if certificates[0][key] != certificates[1][key]}
    assert changing <= {"created", "digest"}
    for name in RUN_FILES - {"certificate.json"}:
        texts = [
            (tmp_path / run / name)
            .read_bytes()
            .replace(certificate["digest"].encode(), b"")
            .replace(certificate["created"].encode(), b"")
            for run, certificate in zip(("one", "other"), certificates, strict=True)
        ]
        assert texts[0] == texts[1], name


def test_the_seed_of_the_noise_stands_in_no_file(tmp_path: Path) -> None:
    finished(tmp_path, test=pg.DeclaredSplit(records(1)), optimizer=adam, averaging=ExponentialAverage(0.9))
    forms = [str(SEED).encode(), f"{SEED:x}".encode(), SEED.to_bytes(8, "little"), SEED.to_bytes(8, "big")]
    for name in files(tmp_path):
        content = (tmp_path / name).read_bytes()
        assert not [form for form in forms if form in content], name
    assert json.loads((tmp_path / "plan.json").read_text())["noise"]["insecure_seed"] == "secret"


def test_the_final_model_holds_the_averaged_weights(tmp_path: Path) -> None:
    trainer = finished(tmp_path, averaging=ExponentialAverage(0.5))
    saved = load_tree(tmp_path / "checkpoint" / "latest.safetensors")
    from safetensors.torch import load_file

    released = load_file(tmp_path / "model.safetensors")
    for name, value in released.items():
        assert torch.equal(value, saved["average"][name])
        assert torch.equal(value, trainer.model.state_dict()[name])
    assert not torch.equal(saved["average"]["0.weight"], saved["model"]["0.weight"])


# Seeds.


def test_a_seeded_run_is_reproducible_to_the_bit(tmp_path: Path) -> None:
    for name in ("one", "other"):
        finished(tmp_path / name, optimizer=adam)
    assert file_digest(tmp_path / "one" / "model.safetensors") == file_digest(tmp_path / "other" / "model.safetensors")


def test_two_runs_without_a_seed_differ(tmp_path: Path) -> None:
    secure = plan(noise=pg.GaussianNoise(multiplier=1.0))
    one, other = (finished(tmp_path / name, plan=secure) for name in ("one", "other"))
    assert not same_weights(one.model, other.model)


# Stops.


def from_loss(trainer: Trainer, number: int) -> None:
    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        if trainer.private.ledger.count + 1 == number and not done:
            done.append(number)
            interrupt()
        return LOSS(model, batch)

    done: list[int] = []
    trainer.private.runner.loss_fn = loss_fn


@pytest.mark.parametrize("place", [from_loss, lambda trainer, number: on_step(trainer, number, interrupt)])
def test_an_interrupted_run_stops_after_its_step_and_finishes_when_resumed(
    tmp_path: Path, saved_once: None, place: Callable[[Trainer, int], None]
) -> None:
    trainer = build(tmp_path)
    place(trainer, 4)
    with pytest.raises(InterruptedRunError, match=r"after step 4 of 6.*--resume"):
        trainer.fit()
    end(trainer)
    saved = load_tree(tmp_path / "checkpoint" / "latest.safetensors")
    assert saved["applied"] == 4
    assert saved["ledger"]["steps"] == read_ledger(tmp_path / "ledger.jsonl").count == 4
    unfinished = Run(tmp_path).verify()
    assert (unfinished.finished, unfinished.steps, unfinished.mismatches) == (False, 4, [])

    result = build(tmp_path, resume=True).fit()
    assert result.steps == STEPS
    assert steps_of(tmp_path) == {"planned": STEPS, "charged": STEPS, "applied": STEPS}
    assert Run(tmp_path).verify().mismatches == []


def test_a_polite_kill_stops_like_an_interrupt(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    on_step(trainer, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(InterruptedRunError, match="after step 2"):
        trainer.fit()
    end(trainer)


def test_a_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    on_step(trainer, 2, lambda: (interrupt(), interrupt())[0])
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    end(trainer)
    assert read_ledger(tmp_path / "ledger.jsonl").count == 2


def test_an_interrupt_in_the_last_step_finishes_the_run(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    on_step(trainer, STEPS, interrupt)
    assert trainer.fit().steps == STEPS
    assert files(tmp_path) == RUN_FILES


def test_the_users_signal_handlers_come_back(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    finished(tmp_path / "whole")
    interrupted(tmp_path / "stopped", 1)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("optimizer", [sgd, momentum, adam])
@pytest.mark.parametrize("averaging", [None, ExponentialAverage(0.9)])
@pytest.mark.parametrize("cosine", [False, True])
def test_a_resumed_run_gives_the_weights_of_one_that_was_never_stopped(
    tmp_path: Path, optimizer: Callable[[nn.Module], Optimizer], averaging: ExponentialAverage | None, cosine: bool
) -> None:
    options: dict[str, Any] = {"optimizer": optimizer, "averaging": averaging, "cosine": cosine}
    whole = finished(tmp_path / "whole", **options)
    interrupted(tmp_path / "stopped", 2, **options)
    interrupted(tmp_path / "stopped", 4, resume=True, **options)
    resumed = finished(tmp_path / "stopped", resume=True, **options)
    assert same_weights(whole.model, resumed.model)
    assert file_digest(tmp_path / "whole" / "model.safetensors") == file_digest(
        tmp_path / "stopped" / "model.safetensors"
    )
    if cosine:
        assert resumed.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"]


def test_a_resumed_run_goes_on_with_the_same_dropout(tmp_path: Path) -> None:
    whole = finished(tmp_path / "whole", model=with_dropout)
    interrupted(tmp_path / "stopped", 3, model=with_dropout)
    resumed = finished(tmp_path / "stopped", resume=True, model=with_dropout)
    assert same_weights(whole.model, resumed.model)


@pytest.mark.parametrize("stopped", [True, False])
def test_a_run_can_be_resumed_while_its_first_trainer_still_lives(tmp_path: Path, stopped: bool) -> None:
    """As in a notebook, where the interrupted trainer is still a variable."""
    first = build(tmp_path)
    try:
        if stopped:
            on_step(first, 3, interrupt)
            with pytest.raises(InterruptedRunError):
                first.fit()
        else:
            first.fit()
        assert finished(tmp_path, resume=True).private.ledger.count == STEPS
    finally:
        end(first)


def test_fitting_an_interrupted_trainer_again_says_to_resume(tmp_path: Path) -> None:
    """As in a notebook, where the cell is run once more."""
    trainer = build(tmp_path)
    on_step(trainer, 2, interrupt)
    with pytest.raises(InterruptedRunError):
        trainer.fit()
    with pytest.raises(pg.PrivgradError) as caught:
        trainer.fit()
    assert "disk" not in str(caught.value)
    assert "resume" in str(caught.value)


def test_a_step_that_failed_on_its_data_does_not_let_training_go_on(tmp_path: Path) -> None:
    """Which steps fail may depend on the records in them: going on leaves such batches out, and nothing says so."""
    running = build(tmp_path).private

    def failing(model: nn.Module, batch: Any) -> Tensor:
        raise CrashError

    batches = running.batches()
    running.runner.loss_fn = failing
    with pytest.raises(CrashError):
        running.step(next(batches))
    running.runner.loss_fn = LOSS
    with contextlib.suppress(pg.PrivgradError):
        running.step(next(batches))
        assert running.ledger.count == 2, "the failed step is charged, or training does not go on"


# Crashes.


def test_a_step_lost_in_a_crash_stays_charged(tmp_path: Path, saved_every_step: None) -> None:
    crashed(tmp_path, 4)
    assert read_ledger(tmp_path / "ledger.jsonl").count == 4
    assert load_tree(tmp_path / "checkpoint" / "latest.safetensors")["applied"] == 3

    finished(tmp_path, resume=True)
    assert read_ledger(tmp_path / "ledger.jsonl").count == STEPS
    assert steps_of(tmp_path) == {"planned": STEPS, "charged": STEPS, "applied": STEPS - 1}
    for name in ("certificate.md", "certificate.html"):
        words = (tmp_path / name).read_text()
        assert f"{STEPS} charged to the ledger" in words
        assert f"{STEPS - 1} applied to the model" in words
    assert Run(tmp_path).verify().mismatches == []


def test_all_steps_since_the_last_checkpoint_are_lost_and_stay_charged(tmp_path: Path, saved_once: None) -> None:
    crashed(tmp_path, 4)
    assert load_tree(tmp_path / "checkpoint" / "latest.safetensors")["applied"] == 1
    finished(tmp_path, resume=True)
    assert steps_of(tmp_path) == {"planned": STEPS, "charged": STEPS, "applied": 1 + STEPS - 4}
    assert Run(tmp_path).verify().mismatches == []


def test_steps_before_one_that_cannot_be_charged_are_kept(tmp_path: Path, saved_once: None) -> None:
    """A record that cannot be read ends the run between two steps: resumed, it gives the weights of one that could."""
    trainer = build(tmp_path / "failed", optimizer=adam)

    def unreadable(model: nn.Module, batch: Any) -> Tensor:
        if trainer.private.ledger.count == 4:
            raise CrashError
        return LOSS(model, batch)

    trainer.private.runner.loss_fn = unreadable
    with pytest.raises(CrashError):
        trainer.fit()
    end(trainer)
    resumed = finished(tmp_path / "failed", optimizer=adam, resume=True)
    assert steps_of(tmp_path / "failed") == {"planned": STEPS, "charged": STEPS, "applied": STEPS}
    assert same_weights(resumed.model, finished(tmp_path / "whole", optimizer=adam).model)


def test_the_cost_of_a_crashed_run_is_that_of_every_charged_step(tmp_path: Path, saved_every_step: None) -> None:
    for number in (1, 2, 3):
        crashed(tmp_path, number, resume=number > 1)
    result = build(tmp_path, resume=True).fit()
    assert result.epsilon == plan().epsilon()
    assert steps_of(tmp_path)["applied"] == STEPS - 3


def test_a_crash_in_the_last_step_leaves_nothing_to_run_and_is_certified(
    tmp_path: Path, saved_every_step: None
) -> None:
    crashed(tmp_path, STEPS)
    finished(tmp_path, resume=True)
    assert steps_of(tmp_path) == {"planned": STEPS, "charged": STEPS, "applied": STEPS - 1}


def test_a_lost_step_does_not_give_its_noise_to_another_one(
    tmp_path: Path, saved_every_step: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seeded noise is indexed by the charge, so that the same noise is never added to two different sums."""
    asked: dict[str, list[int]] = defaultdict(list)
    original = SeededSource.at

    def watched(self: SeededSource, step: int) -> SeededSource:
        asked[self._purpose].append(step)
        return original(self, step)

    monkeypatch.setattr(SeededSource, "at", watched)
    crashed(tmp_path, 3)
    assert asked["noise"] == [1, 2, 3]
    finished(tmp_path, resume=True)
    assert asked["noise"] == [1, 2, 3, 4, 5, 6]
    assert asked["sampling"] == [1, 2, 3, 4, 5, 6]


def test_a_crash_while_the_certificate_is_made_is_healed_by_resuming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "make_certificate", lambda *_, **__: crash())
        trainer = build(tmp_path)
        with pytest.raises(CrashError):
            trainer.fit()
        end(trainer)
    assert Run(tmp_path).verify().mismatches, "a model without its certificate does not pass"
    before = file_digest(tmp_path / "model.safetensors")
    finished(tmp_path, resume=True)
    assert file_digest(tmp_path / "model.safetensors") == before
    assert Run(tmp_path).verify().mismatches == []


def test_resuming_a_finished_run_charges_nothing_and_changes_no_weight(tmp_path: Path) -> None:
    finished(tmp_path, averaging=ExponentialAverage(0.9))
    before = file_digest(tmp_path / "model.safetensors"), file_digest(tmp_path / "ledger.jsonl")
    finished(tmp_path, averaging=ExponentialAverage(0.9), resume=True)
    assert (file_digest(tmp_path / "model.safetensors"), file_digest(tmp_path / "ledger.jsonl")) == before
    assert Run(tmp_path).verify().mismatches == []


def test_a_torn_last_line_of_the_ledger_is_no_step(tmp_path: Path) -> None:
    interrupted(tmp_path, 3)
    with (tmp_path / "ledger.jsonl").open("ab") as stream:
        stream.write(b'{"event":{"event":{"kind":"gauss')
    finished(tmp_path, resume=True)
    assert steps_of(tmp_path) == {"planned": STEPS, "charged": STEPS, "applied": STEPS}


# Refusals.


def test_a_ledger_that_lost_its_tail_is_not_resumed(tmp_path: Path) -> None:
    interrupted(tmp_path, 3)
    ledger = tmp_path / "ledger.jsonl"
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(pg.VerificationError, match="lost its tail"):
        build(tmp_path, resume=True)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"steps": STEPS + 1}, "steps"),
        ({"clipping": pg.FlatClipping(max_norm=2.0)}, "clipping"),
        ({"noise": pg.GaussianNoise(multiplier=0.5, insecure_seed=SEED)}, "noise"),
        ({"noise": pg.GaussianNoise(multiplier=1.0)}, "noise"),
        ({"sampling": pg.PoissonSampling(rate=0.25, divisor=12.0)}, "sampling"),
        ({"delta": 1e-6}, "delta"),
        ({"adjacency": "add_remove"}, "adjacency"),
    ],
)
def test_resuming_with_another_plan_is_refused_and_says_what_differs(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    interrupted(tmp_path, 1)
    with pytest.raises(pg.PrivgradError, match=rf"differs .*: {named}[.a-z_]* was .* and is .*;"):
        build(tmp_path, plan=plan(**changes), resume=True)


def test_resuming_with_a_data_set_of_another_size_is_refused(tmp_path: Path) -> None:
    by_size = plan(sampling=pg.PoissonSampling(expected_batch_size=12))
    interrupted(tmp_path, 1, plan=by_size)
    fewer = TensorDataset(*(tensor[:20] for tensor in records().tensors))
    with pytest.raises(pg.PrivgradError, match="sampling"):
        build(tmp_path, plan=by_size, data=fewer, resume=True)


def test_resuming_where_there_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(pg.PrivgradError, match="no run to resume"):
        build(tmp_path, resume=True)


def test_a_new_run_in_a_directory_that_holds_one_is_refused_and_leaves_it_alone(tmp_path: Path) -> None:
    finished(tmp_path)
    before = {name: file_digest(tmp_path / name) for name in files(tmp_path)}
    with pytest.raises(pg.PrivgradError, match="already holds a run"):
        build(tmp_path, plan=plan(steps=2))
    assert {name: file_digest(tmp_path / name) for name in files(tmp_path)} == before


@pytest.mark.parametrize(("resume", "message"), [(True, "in use by another"), (False, "already holds a run")])
def test_two_trainers_on_one_directory_at_once_are_refused(tmp_path: Path, resume: bool, message: str) -> None:
    first = build(tmp_path)
    with pytest.raises(pg.PrivgradError, match=message):
        build(tmp_path, resume=resume)
    assert first.fit().steps == STEPS
    assert Run(tmp_path).verify().mismatches == []


def test_a_refused_trainer_leaves_no_run_behind(tmp_path: Path) -> None:
    with pytest.raises(pg.RefusedError, match="LBFGS"):
        build(tmp_path, optimizer=lambda model: torch.optim.LBFGS(model.parameters()))
    assert finished(tmp_path).private.ledger.count == STEPS


def test_resuming_with_another_model_is_refused_in_words(tmp_path: Path) -> None:
    interrupted(tmp_path, 1)
    with pytest.raises(pg.PrivgradError):
        build(tmp_path, model=with_dropout, resume=True)


def test_resuming_from_a_damaged_checkpoint_is_refused_in_words(tmp_path: Path) -> None:
    interrupted(tmp_path, 1)
    path = tmp_path / "checkpoint" / "latest.safetensors"
    raw = path.read_bytes()
    assert raw.count(b"applied") == 1
    path.write_bytes(raw.replace(b"applied", b"applief"))
    with pytest.raises(pg.PrivgradError, match="damaged"):
        build(tmp_path, resume=True)


def test_a_batch_norm_layer_frozen_by_eval_stays_frozen(tmp_path: Path) -> None:
    def frozen() -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        model[1].eval()
        return model

    trainer = finished(tmp_path, model=frozen)
    assert not trainer.model[1].training
    assert int(trainer.model[1].num_batches_tracked) == 0


def test_training_goes_on_in_train_mode_after_an_evaluation(tmp_path: Path) -> None:
    seen: list[bool] = []

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        seen.append(model.training)
        return LOSS(model, batch)

    finished(tmp_path, loss_fn=loss_fn, test=pg.DeclaredSplit(records(1)), evaluations=STEPS)
    assert len(seen) >= STEPS
    assert all(seen)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"averaging": "ema"}, "averaging is 'ema'"),
        ({"test": records()}, "test is a TensorDataset; expected DeclaredSplit"),
        ({"test": DeclaredSplit(TensorDataset(torch.zeros(4, 3)))}, "not \\(input, class\\) pairs"),
        ({"test": DeclaredSplit(TensorDataset(torch.zeros(4, 3), torch.zeros(4, 1)))}, "accuracy is of one class"),
    ],
)
def test_what_could_not_be_evaluated_is_refused_before_anything_is_charged(
    tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(pg.PrivgradError, match=says):
        build(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_answers_that_are_no_classes_have_no_accuracy() -> None:
    """[n] beside [n, 1] would be compared n times n: an accuracy of 5400 %."""
    split = DeclaredSplit(TensorDataset(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)))
    with pytest.raises(pg.PrivgradError, match="logits \\[rows, classes\\]"):
        accuracy(nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (2, 2))), split)

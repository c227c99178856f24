"""A loop of the user's own, epoch by epoch, stopped and gone on with: nothing is lost, nothing is silent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import privgrad as pg
from privgrad.mechanism.plan import Plan
from privgrad.training.private import Private

COUNT, STEPS = 12, 6


def plan(**stages: Any) -> Plan:
    return Plan(
        sampling=pg.PoissonSampling(rate=0.5, divisor=6.0),
        steps=STEPS,
        noise=pg.GaussianNoise(multiplier=1.0, insecure_seed=3),
        **stages,
    )


MEMORIES = {
    "quantiles": {"thresholds": pg.QuantileThresholds()},
    "mixing": {"mixing": pg.ModelMix(width_ratio=0.3, momentum=0.2)},
    "mask": {"compression": pg.RandomSparsification(final_ratio=0.5)},
}


class Training:
    """Model, optimizer and what drives them, with a ledger in a file."""

    def __init__(self, path: Path, used: Plan, *, resume: bool = False) -> None:
        torch.manual_seed(0)
        inputs = torch.randn(COUNT, 3)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        ledger = pg.Ledger.resume(used.terms(), path) if resume else pg.Ledger(used.terms(), path)
        data = TensorDataset(inputs, (inputs[:, 0] > 0).long())
        self.private = pg.make_private(
            self.model, self.optimizer, data, used, pg.supervised(F.cross_entropy), ledger=ledger
        )

    def run(self, steps: int) -> list[Tensor]:
        """The weights after the next `steps` steps."""
        for batch in self.private.batches(steps):
            self.private.step(batch)
        return [value.detach().clone() for value in self.model.parameters()]

    def stop(self, path: Path) -> None:
        torch.save([part.state_dict() for part in (self.model, self.optimizer, self.private)], path)
        self.private.ledger.close()

    def go_on(self, path: Path) -> Training:
        for part, state in zip(
            (self.model, self.optimizer, self.private), torch.load(path, weights_only=True), strict=True
        ):
            part.load_state_dict(state)
        return self


def stopped_after_three(tmp_path: Path, used: Plan) -> tuple[list[Tensor], Training]:
    """What an uninterrupted training gives, and one on the ledger of another that was stopped, as yet without its checkpoint."""
    straight = Training(tmp_path / "straight", used).run(STEPS)
    first = Training(tmp_path / "ledger", used)
    first.run(3)
    first.stop(tmp_path / "checkpoint")
    return straight, Training(tmp_path / "ledger", used, resume=True)


@pytest.mark.parametrize("stages", MEMORIES.values(), ids=MEMORIES)
def test_a_training_that_was_stopped_ends_as_if_it_had_not_been(tmp_path: Path, stages: dict[str, Any]) -> None:
    straight, second = stopped_after_three(tmp_path, plan(**stages))
    second.go_on(tmp_path / "checkpoint")
    assert all(torch.equal(one, other) for one, other in zip(second.run(3), straight, strict=True))
    assert second.private.ledger.count == STEPS
    second.private.ledger.close()


@pytest.mark.parametrize("stages", MEMORIES.values(), ids=MEMORIES)
def test_without_its_state_a_training_ends_elsewhere(tmp_path: Path, stages: dict[str, Any]) -> None:
    """(The test above is one of memory.)"""
    straight, second = stopped_after_three(tmp_path, plan(**stages))
    fresh = second.private.runner.states
    second.go_on(tmp_path / "checkpoint").private.runner.states = fresh
    assert not all(torch.equal(one, other) for one, other in zip(second.run(3), straight, strict=True))


def test_an_epoch_at_a_time_is_the_same_training(tmp_path: Path) -> None:
    straight = Training(tmp_path / "straight", plan()).run(STEPS)
    parts = Training(tmp_path / "parts", plan())
    for _ in range(3):
        weights = parts.run(2)
    assert all(torch.equal(one, other) for one, other in zip(weights, straight, strict=True))


def test_more_steps_than_are_left_are_those_that_are_left(tmp_path: Path) -> None:
    training = Training(tmp_path / "ledger", plan())
    training.run(4)
    training.run(4)
    assert training.private.ledger.count == STEPS


def test_batches_asked_for_after_the_last_are_refused_in_words() -> None:
    """`for epoch in range(...): for batch in private.batches()` would train in the first epoch alone, and say nothing."""
    running = in_memory(plan())
    for batch in running.batches():
        running.step(batch)
    with pytest.raises(pg.PrivgradError, match=r"all 6 steps of the plan, of every epoch.*batches\(steps\)"):
        running.batches()


def test_a_finished_training_that_is_resumed_has_no_batches(tmp_path: Path) -> None:
    first = Training(tmp_path / "ledger", plan())
    first.run(STEPS)
    first.private.ledger.close()
    assert list(Training(tmp_path / "ledger", plan(), resume=True).private.batches()) == []


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, "3"])
def test_a_number_of_steps_that_is_none_is_refused(steps: Any) -> None:
    with pytest.raises(pg.PrivgradError, match=r"batches\(steps\)"):
        in_memory(plan()).batches(steps)


def in_memory(used: Plan) -> Private:
    model = nn.Linear(3, 2)
    data = TensorDataset(torch.randn(COUNT, 3), torch.zeros(COUNT, dtype=torch.long))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return pg.make_private(model, optimizer, data, used, pg.supervised(F.cross_entropy))


# Refused


def test_a_state_that_has_seen_more_than_the_ledger_is_refused(tmp_path: Path) -> None:
    first = Training(tmp_path / "ledger", plan())
    first.run(2)
    with pytest.raises(pg.VerificationError, match="holds 0 steps, and this state has seen 2"):
        Training(tmp_path / "other", plan()).private.load_state_dict(first.private.state_dict())


def test_a_state_of_a_ledger_with_another_history_is_refused(tmp_path: Path) -> None:
    quantiles = plan(**MEMORIES["quantiles"])
    one, other = Training(tmp_path / "one", quantiles), in_memory(plan())
    saved = other.state_dict()
    with pytest.raises(pg.PrivgradError, match="another plan"):
        one.private.load_state_dict(saved)
    with pytest.raises(pg.VerificationError, match="another or longer one"):
        Training(tmp_path / "two", plan()).private.load_state_dict(
            {**saved, "ledger": {"steps": 0, "head": one.private.ledger.head}}
        )


NUMBERS = {"plan": "", "stages": {"thresholds": {"logarithms": 1.0}}, "ledger": {"steps": 0, "head": ""}}
NEGATIVE = {"plan": "", "stages": {}, "ledger": {"steps": -1, "head": ""}}
HALVES = [{}, {"stages": {}}, {"plan": "", "stages": 3, "ledger": {}}, {"stages": {}, "ledger": {}}]


@pytest.mark.parametrize("saved", [*HALVES, NUMBERS, NEGATIVE, []])
def test_what_is_no_state_is_refused(saved: Any) -> None:
    with pytest.raises(pg.PrivgradError, match=r"expected what state_dict\(\) gave"):
        in_memory(plan()).load_state_dict(saved)

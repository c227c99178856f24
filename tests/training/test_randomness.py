"""Dropout and augmentation: secret, fresh in every step, and without a trace in the process's own generators."""

from __future__ import annotations

import random
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import privgrad as pg


class Jittered(Dataset[tuple[Tensor, Tensor]]):
    """Each read draws from torch's, numpy's and Python's generators."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float, float]] = []

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        drawn = (float(torch.rand(())), float(numpy.random.rand()), random.random())
        self.seen.append(drawn)
        return torch.full((6,), drawn[0]), torch.tensor(index % 2)


class Watched(nn.Module):
    """A linear layer behind dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.linear(nn.functional.dropout(inputs, 0.5, self.training))
        return outputs


def trained(seed: int | None, steps: int = 3, workers: int = 0) -> tuple[Jittered, Tensor, list[Any]]:
    """A short training from one torch seed: its data set, its weights, and the generators' states after each step."""
    torch.manual_seed(0)
    numpy.random.seed(0)
    random.seed(0)
    model, data = Watched(), Jittered()
    plan = pg.Plan(
        sampling=pg.FullBatch(divisor=20.0),
        steps=steps,
        clipping=pg.FlatClipping(max_norm=1e3),
        noise=pg.GaussianNoise(multiplier=0.0, insecure_seed=seed),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = pg.supervised(nn.functional.cross_entropy)
    private = pg.make_private(
        model, optimizer, data, plan, loss, workers=workers, probe=(torch.randn(4, 6), torch.ones(4).long())
    )
    data.seen.clear()
    states = []
    for batch in private.batches():
        private.step(batch)
        states.append((torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist(), random.getstate()))  # type: ignore[index, union-attr]
    return data, model.linear.weight.detach().clone(), states


@pytest.mark.parametrize("seed", [None, 3])
def test_no_state_follows_the_size_of_private_batches(seed: int | None) -> None:
    _, _, states = trained(seed)
    assert states[0] == states[1] == states[2]


def test_what_a_known_torch_seed_would_give_is_not_what_is_drawn() -> None:
    one, first, _ = trained(None)
    other, second, _ = trained(None)
    assert one.seen[0] != other.seen[0]
    assert not torch.equal(first, second)


def test_every_step_draws_anew() -> None:
    data, _, _ = trained(None, steps=4)
    assert len({torch_drawn for torch_drawn, _, _ in data.seen}) == len(data.seen)


def test_a_seeded_plan_is_reproducible() -> None:
    one, first, _ = trained(5)
    other, second, _ = trained(5)
    assert one.seen == other.seen
    assert torch.equal(first, second)


def test_workers_draw_from_a_secret_seed_too() -> None:
    _, first, _ = trained(None, steps=2, workers=1)
    _, second, _ = trained(None, steps=2, workers=1)
    assert not torch.equal(first, second)


class OwnGenerator(nn.Module):
    """Draws signs from a generator of its own, in a container, whose seed everybody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)
        self.held = {"generator": torch.Generator().manual_seed(0)}

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.layer(inputs)
        signs = 2 * (torch.rand(outputs.shape, generator=self.held["generator"]) < 0.5).to(outputs) - 1
        return (outputs * signs).sum(1)


def test_a_generator_that_the_model_holds_tells_nothing_and_is_told_nothing() -> None:
    """From a known seed, a record more would change the signs of all that come after it, in this and all later steps."""
    weights = []
    for _ in range(2):
        torch.manual_seed(0)
        model = OwnGenerator()
        before = model.held["generator"].get_state()
        plan = pg.Plan(
            sampling=pg.FullBatch(divisor=1.0),
            steps=2,
            clipping=pg.FlatClipping(max_norm=1e3),
            noise=pg.GaussianNoise(multiplier=0.0),
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        data = torch.utils.data.TensorDataset(torch.randn(9, 4))
        private = pg.make_private(model, optimizer, data, plan, lambda model, batch: model(batch[0]))
        for batch in private.batches():
            private.step(batch)
            assert torch.equal(model.held["generator"].get_state(), before)
        weights.append(model.layer.weight.detach().clone())
    assert not torch.equal(*weights)

"""Dropout and augmentation: secret, fresh in every step, and without a trace in the process's own generators."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import privgrad as pg
from tests.helpers import full_batch_plan


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


def noisy(model: nn.Module, batch: Any, generator: torch.Generator | None = None) -> Tensor:
    drawn = 3 * torch.randn(batch[0].shape, generator=generator)
    losses: Tensor = model(batch[0] + drawn).square().sum(1)
    return losses


def known() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class Task:
    """A loss as a method, and one that can be called."""

    def __init__(self) -> None:
        self.kept = {"of": [known()]}

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return noisy(model, batch, self.kept["of"][0])

    __call__ = loss


GLOBAL = known()


def by_closure() -> Callable[..., Tensor]:
    task = Task()
    return lambda model, batch: noisy(model, batch, task.kept["of"][0])


def by_default(model: nn.Module, batch: Any, generator: torch.Generator = known()) -> Tensor:
    return noisy(model, batch, generator)


def by_global(model: nn.Module, batch: Any) -> Tensor:
    return noisy(model, batch, GLOBAL)


def by_global_of_another(model: nn.Module, batch: Any) -> Tensor:
    return by_global(model, batch)


HELD: list[Callable[[], Callable[..., Tensor]]] = [
    lambda: functools.partial(noisy, generator=known()),
    lambda: Task().loss,
    Task,
    by_closure,
    lambda: by_default,
    lambda: by_global,
    lambda: by_global_of_another,
]


def one_step(
    loss: Callable[..., Tensor], data: Dataset[Any] | None = None, workers: int = 0, seed: Any = None
) -> Tensor:
    torch.manual_seed(0)
    model = nn.Linear(4, 2, bias=False)
    noise = pg.GaussianNoise(multiplier=0.0, insecure_seed=seed)
    plan = full_batch_plan(9, clipping=pg.FlatClipping(max_norm=1e3), noise=noise)
    dataset = torch.utils.data.TensorDataset(torch.ones(9, 4)) if data is None else data
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    private = pg.make_private(model, optimizer, dataset, plan, loss, workers=workers)
    private.backward(next(private.batches()))
    assert model.weight.grad is not None
    return model.weight.grad.clone()


@pytest.mark.parametrize("make", HELD)
def test_a_generator_is_found_wherever_the_loss_has_it(make: Callable[[], Callable[..., Tensor]]) -> None:
    assert not torch.equal(one_step(make()), one_step(make()))
    torch.testing.assert_close(one_step(make(), seed=3), one_step(make(), seed=3))


class Augmenting(Dataset[Any]):
    """Reads with a generator of its own."""

    def __init__(self, kind: str) -> None:
        self.torch = known()
        self.others = {
            "numpy": numpy.random.default_rng(0),
            "old": numpy.random.RandomState(0),
            "python": random.Random(0),
        }
        self.kind = kind

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> tuple[Tensor]:
        if self.kind == "torch":
            return (torch.rand(4, generator=self.torch),)
        if self.kind == "python":
            return (torch.tensor([self.others["python"].random() for _ in range(4)]),)
        drawn = self.others[self.kind].uniform(size=4)
        return (torch.from_numpy(drawn).float(),)


def plain(model: nn.Module, batch: Any) -> Tensor:
    losses: Tensor = model(batch[0]).square().sum(1)
    return losses


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["torch", "numpy", "old", "python"])
def test_a_generator_of_the_data_set_is_seeded_secretly(kind: str, workers: int) -> None:
    one, other = Augmenting(kind), Augmenting(kind)
    assert not torch.equal(one_step(plain, one, workers), one_step(plain, other, workers))
    again = [one_step(plain, Augmenting(kind), workers, seed=3) for _ in range(2)]
    assert torch.equal(*again)
    if kind == "numpy":  # what it drew, it does not tell
        assert one.others["numpy"].random() == numpy.random.default_rng(0).random()


@pytest.mark.parametrize("rng", [numpy.random.default_rng(0), numpy.random.RandomState(0), random.Random(0)])
def test_other_generators_are_refused_in_a_model(rng: Any) -> None:
    """One draw would serve all rows of a chunk."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return (
            plain(model, batch) * (1 if rng.random() < 0.97 else -1) if hasattr(rng, "random") else plain(model, batch)
        )

    with pytest.raises(pg.RefusedError, match=r"loss_fn\(rng\) is a .*; draw with torch's functions"):
        one_step(loss)


def test_a_seed_in_the_forward_pass_is_refused() -> None:
    def seeding(model: nn.Module, batch: Any) -> Tensor:
        torch.manual_seed(0)
        return noisy(model, batch)

    def making(model: nn.Module, batch: Any) -> Tensor:
        return noisy(model, batch, known())

    with pytest.raises(pg.RefusedError, match="seeds torch's generator in its forward pass"):
        one_step(seeding)
    with pytest.raises(pg.RefusedError, match=r"makes a torch.Generator in its forward pass"):
        one_step(making)


def test_probing_leaves_generators_as_they_were() -> None:
    before = GLOBAL.get_state()
    one_step(by_global_of_another)
    assert torch.equal(GLOBAL.get_state(), before)

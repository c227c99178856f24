"""Streamed units: one ordinary backward pass each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import privgrad as pg
from privgrad.gradients.contract import Fold, Identity, Request, Sums, trainable
from privgrad.gradients.streamed import StreamedEngine
from tests.gradients.compare import Recording, agrees
from tests.gradients.operators import CASES, squares
from tests.helpers import as_vector

cross_entropy = pg.supervised(F.cross_entropy)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", ["flat", "tensor"])
@pytest.mark.parametrize("name", ["linear, tied", "conv2d", "lstm", "embedding, tied to the output"])
def test_rows_as_units_are_a_loop(name: str, kind: str) -> None:
    case = CASES[name]
    agrees(StreamedEngine(), case.make().double(), squares, case.batch(torch.float64), kind=kind)


def test_folds_sum_with_their_factors() -> None:
    fold = Fold(torch.tensor([0, 0, 2, 2, 2]), 3, torch.rand(5))
    model, batch = nn.Linear(6, 3).double(), (torch.randn(5, 6).double(),)
    expected = agrees_by_unit(model, batch, fold)
    sums, rule = accumulate(StreamedEngine(), model, squares, batch, fold)
    torch.testing.assert_close(sums, expected.sum(0))
    torch.testing.assert_close(rule.norms[:2, 0], expected.norm(dim=1))


def agrees_by_unit(model: nn.Module, batch: tuple[Tensor, ...], fold: Fold) -> Tensor:
    """[units with rows, parameters]: gradients of the scaled sums, each by an ordinary backward pass."""
    units = []
    for unit in fold.index.unique().tolist():
        own = fold.index == unit
        total = (squares(model, (batch[0][own],)) * fold.scale[own]).sum()  # type: ignore[index]
        units.append(torch.cat([g.flatten() for g in torch.autograd.grad(total, list(model.parameters()))]))
    return torch.stack(units)


def accumulate(
    engine: StreamedEngine, model: nn.Module, loss_fn: object, batch: tuple[Tensor, ...], fold: Fold
) -> tuple[Tensor, Recording]:
    shapes = {name: p.shape for name, p in trainable(model).items()}
    wide = next(model.parameters()).dtype
    sink, rule = Sums(shapes, torch.device("cpu"), wide), Recording(torch.ones(fold.units, 1, dtype=wide))
    engine.accumulate(model, loss_fn, Request(batch, fold, Identity(shapes), [tuple(shapes)], rule, sink))  # type: ignore[arg-type]
    return as_vector(sink), rule


def norm_net() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double().train()


def test_a_group_is_one_batch_of_its_own() -> None:
    """BatchNorm in train mode: each group sees its own statistics, in whatever order its rows stand, and leaves none behind."""
    model = norm_net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs, targets = torch.randn(9, 5).double(), torch.randint(3, (9,))
    index = torch.tensor([2, 0, 2, 0, 0, 2, 2, 0, 0])
    sums, rule = accumulate(StreamedEngine(mean=True), model, cross_entropy, (inputs, targets), Fold(index, 4))
    expected, norms = torch.zeros_like(sums), []
    for group in (0, 2):
        own = index == group
        loss = F.cross_entropy(model(inputs[own]), targets[own])
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        expected += gradient
        norms.append(gradient.norm())
        model.load_state_dict(before)
    torch.testing.assert_close(sums, expected)
    torch.testing.assert_close(rule.norms[:2, 0], torch.stack(norms))
    assert len(rule.calls) == 2, "an empty group is not asked for"
    accumulate(StreamedEngine(mean=True), model, cross_entropy, (inputs, targets), Fold(index, 4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


class Remembering(nn.Module):
    """Shifts its output by what the last batch left in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.register_buffer("last", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        output = self.linear(x)
        shifted = output + self.last * output
        self.last = output.detach().mean(0)
        return shifted


def test_a_group_says_nothing_to_the_next() -> None:
    """Buffers that a forward pass writes or replaces are as they were for every group."""
    model = Remembering()
    batch = (torch.randn(6, 5), torch.randint(3, (6,)))
    alone = accumulate(
        StreamedEngine(mean=True), model, cross_entropy, (batch[0][3:], batch[1][3:]), Fold(torch.zeros(3).long(), 1)
    )[1]
    fold = Fold(torch.tensor([0, 0, 0, 1, 1, 1]), 2)
    both = accumulate(StreamedEngine(mean=True), model, cross_entropy, batch, fold)[1]
    torch.testing.assert_close(both.norms[1], alone.norms[0])
    assert (model.last == 0).all()


def test_a_forward_pass_that_changes_weights_is_refused() -> None:
    model = nn.Embedding(11, 6, max_norm=0.1)
    with pytest.raises(pg.RefusedError, match="changes its own parameters"):
        accumulate(StreamedEngine(), model, squares, (torch.zeros(5, 4).long(),), Fold.identity(5))


def test_a_group_whose_gradient_is_not_finite_contributes_zero() -> None:
    model = nn.Linear(5, 3)
    inputs, targets = torch.randn(6, 5), torch.randint(3, (6,))
    inputs[4] = float("nan")
    fold = Fold(torch.tensor([0, 0, 0, 1, 1, 1]), 2)
    sums, _ = accumulate(StreamedEngine(), model, cross_entropy, (inputs, targets), fold)
    alone, _ = accumulate(StreamedEngine(), model, cross_entropy, (inputs[:3], targets[:3]), Fold(fold.index[:3], 1))
    torch.testing.assert_close(sums, alone)

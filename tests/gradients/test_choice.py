"""Which engine runs a model, and in which way, rests on the model, on shapes and on public numbers: on no private row.

One row that chose for all others would change what each of them contributes.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import privgrad as pg
from privgrad.gradients.contract import Fold
from privgrad.gradients.onepass import OnePassEngine
from privgrad.gradients.streamed import StreamedEngine
from privgrad.gradients.vmap import VmapEngine
from privgrad.mechanism.sparsification import RandomSparsification
from tests.gradients.compare import agrees
from tests.gradients.operators import Around, squares
from tests.helpers import as_vector, full_batch_plan, rows, runner

pytestmark = pytest.mark.filterwarnings("ignore:the one-pass engine does not cover")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Beside(nn.Module):
    """vmap swaps the modules' parameters, and this one is used from a table. A row of negative numbers has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 1, bias=False)
        self.table = {"b": self.b.weight}
        with torch.no_grad():
            self.a.weight.copy_(torch.eye(4))
            self.b.weight.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.vmap(lambda z: F.linear(z, self.table["b"]))(F.relu(self.a(x)))


class Settling(nn.Module):
    """Goes on until it stands still; for graphs, which cannot ask, for two rounds."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def row(self, x: Tensor) -> Tensor:
        drive, gain = self.linear(x), x[0].detach().clamp(0, 0.9)
        now, before, rounds = torch.zeros_like(drive), torch.ones_like(drive), 0
        while rounds < 2 if torch.compiler.is_compiling() else rounds < 50 and (now - before).abs().max() > 1e-3:
            before, now, rounds = now, torch.tanh(gain * now + drive), rounds + 1
        return now

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.row(row) for row in x])


def summed(model: nn.Module, inputs: Tensor) -> Tensor:
    step = runner(full_batch_plan(len(inputs)), model, squares)
    return as_vector(step.clipped_sum(*rows(inputs)))


@pytest.mark.parametrize(("make", "first"), [(Beside, -0.5), (Settling, 0.0)])
def test_the_first_row_does_not_choose_for_the_others(make: type[nn.Module], first: float) -> None:
    model, others = make(), torch.full((40, 4), 0.1)
    others[:, 0] = 0.9
    one = torch.full((1, 4), first)
    moved = summed(model, torch.cat([one, others])) - summed(model, others)
    assert float(moved.norm()) <= 1 + 1e-5


def test_vmap_says_what_it_would_miss_whatever_the_rows_are() -> None:
    for value in (0.5, -0.5):
        step = runner(full_batch_plan(3), Beside(), squares, engine=VmapEngine())
        with pytest.raises(pg.PrivgradError, match=r"b\.weight outside of the module"):
            step.clipped_sum(*rows(torch.full((3, 4), value)))


def test_a_way_for_graphs_that_made_up_rows_cannot_try_is_not_taken() -> None:
    """Rows of which nothing is known may be refused by the model; then the slower engine is the safe one."""

    def positive(m: nn.Module, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and bool((x < 0).any()):
            raise ValueError("no negative numbers")
        return m.linear(x)

    with pytest.warns(UserWarning, match="does not cover this model"):
        agrees(OnePassEngine(), Around(positive, linear=nn.Linear(4, 4)), squares, (torch.rand(3, 4),))


class Hooked(nn.Module):
    """A gradient is cut on its way back: by a hook on a tensor, a module or a parameter."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.a, self.b = kind, nn.Linear(3, 4), nn.Linear(4, 1)
        if kind == "module":
            self.b.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0].clamp(-1e-3, 1e-3),))
        if kind == "module before":
            self.b.register_full_backward_pre_hook(lambda module, outputs: (outputs[0] * 1e-3,))
        if kind == "parameter":
            self.a.weight.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        if self.kind == "tensor" or (self.kind == "tensor if any" and h.requires_grad):
            h.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
        return self.b(h)


HOOKS = ["tensor", "tensor if any", "module", "module before", "parameter"]


@pytest.mark.parametrize("kind", HOOKS)
def test_backward_hooks_have_their_effect(kind: str) -> None:
    with pytest.warns(UserWarning, match="hook"):
        agrees(OnePassEngine(), Hooked(kind), squares, (torch.randn(5, 3),), kind="tensor")


def test_vmap_does_not_pass_by_the_hook_of_a_parameter() -> None:
    step = runner(full_batch_plan(3), Hooked("parameter"), squares, engine=VmapEngine())
    with pytest.raises(pg.PrivgradError, match=r"backward hook of a\.weight"):
        step.clipped_sum(*rows(torch.randn(3, 3)))


@pytest.mark.parametrize("kind", [None, *HOOKS])
def test_groups_go_the_same_way_however_many_rows_there_are(kind: str | None) -> None:
    """One pass or group by group is a matter of the expected size of a group."""
    model: Any = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 3)) if kind is None else Hooked(kind)
    width = 6 if kind is None else 3
    ways = []
    for count in (4, 600):
        plan = full_batch_plan(4, groups=pg.RandomGroups(4))
        step = runner(plan, model, squares, apart=True)
        step.clipped_sum(*rows(torch.randn(count, width)))
        ways.append(list(step.engine._worth_it.values()))  # type: ignore[attr-defined]
    assert ways[0] == ways[1] == [kind is None]


def test_groups_of_a_convolution_may_have_layers_masked() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 4, 2))
    compression = RandomSparsification(0.5, ramp=False, structure="layers")
    plan = full_batch_plan(6, steps=8, groups=pg.RandomGroups(2), compression=compression)
    step = runner(plan, model, squares, apart=True)
    for _ in range(8):
        step.release(*rows(torch.randn(6, 1, 4, 4)))


def test_nothing_is_said_of_models_without_hooks() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agrees(OnePassEngine(), Hooked("none"), squares, (torch.randn(5, 3),), kind="tensor")
        agrees(StreamedEngine(), Hooked("none"), squares, (torch.randn(5, 3),), kind="tensor", fold=Fold.identity(5))

"""Code that decides by a number of the row it sees (`if mask.all():`): rows that decide alike go through together."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from privgrad.gradients.contract import Fold, Identity, Request, Sums, trainable
from privgrad.gradients.onepass import OnePassEngine
from tests.gradients.compare import blocks_of, close, folded
from tests.gradients.operators import Around, squares
from tests.helpers import as_vector, full_batch_plan, loop_gradients, rows, runner


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def signs(m: nn.Module, x: Tensor) -> Tensor:
    return m.one(x) if x.sum() > 0 else m.other(x).sin()


def nested(m: nn.Module, x: Tensor) -> Tensor:
    hidden = m.one(x) if x[..., 0].sum() > 0 else m.other(x)
    return hidden.tanh() if x[..., 1].mean() > 0 else m.other(hidden)


def depth(m: nn.Module, x: Tensor) -> Tensor:
    """As often as the row says: 0, 1 or 2 times."""
    for _ in range(int((x > 0.5).sum().clamp(max=2))):
        x = m.one(x).tanh()
    return m.other(x)


def item(m: nn.Module, x: Tensor) -> Tensor:
    return m.one(x) * (1 + (x.max() > 1).item()) + m.other(x)


def parameter(m: nn.Module, x: Tensor) -> Tensor:
    """A decision on what the weights make of the row."""
    hidden = m.one(x)
    return hidden if hidden.mean() > 0 else m.other(hidden)


WAYS = {"sign": signs, "nested": nested, "depth": depth, "item": item, "parameter": parameter}


def model(way: Callable[[nn.Module, Tensor], Tensor]) -> nn.Module:
    return Around(way, one=nn.Linear(6, 6), other=nn.Linear(6, 6))


class Clip:
    """Weights that follow the norm, whoever's it is."""

    def __init__(self, separable: bool) -> None:
        self.separable = separable
        self.norms: list[Tensor] = []

    def __call__(self, norms: Tensor, blocks: Sequence[int]) -> Tensor:
        self.norms.append(norms.clone())
        return norms.clamp(min=2.0).reciprocal()


def agrees(engine: OnePassEngine, module: nn.Module, inputs: Tensor, fold: Fold, kind: str = "tensor") -> None:
    shapes = {name: p.shape for name, p in trainable(module).items()}
    expected = folded(loop_gradients(module, squares, (inputs,)), fold)
    rule, sink = Clip(separable=kind == "tensor"), Sums(shapes, torch.device("cpu"), torch.float32)
    blocks = blocks_of(list(shapes), kind)
    engine.accumulate(module, squares, Request((inputs,), fold, Identity(shapes), blocks, rule, sink))
    for block in blocks:
        norms = torch.cat([expected[name].flatten(1) for name in block], 1).norm(dim=1)
        for name in block:
            total = torch.einsum("u,u...->...", norms.clamp(min=2.0).reciprocal(), expected[name])
            assert torch.allclose(sink.values[name], total, rtol=1e-4, atol=1e-5), name
    found = torch.cat([norms.flatten() for norms in rule.norms])
    wanted = torch.cat([torch.cat([expected[n].flatten(1) for n in b], 1).norm(dim=1) for b in blocks])
    there = wanted > 0  # units without rows, and weights that a row's way leaves out, may be asked for or not
    close(found[found > 0].sort().values, wanted[there].sort().values, 1e-4, "norms")


@pytest.mark.parametrize("kind", ["flat", "tensor"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_every_row_goes_its_own_way_without_a_slower_engine(way: Callable[..., Tensor], kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agrees(OnePassEngine(), model(way), torch.randn(12, 6), Fold.identity(12), kind)


@pytest.mark.parametrize("scale", [None, torch.rand(12)])
def test_units_whose_rows_go_together(scale: Tensor | None) -> None:
    index = torch.tensor([0, 0, 0, 1, 1, 2, 4, 4, 4, 4, 5, 5])  # unit 3 has no rows
    inputs = torch.randn(12, 6).abs() * torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, 1.0])[index][:, None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agrees(OnePassEngine(), model(signs), inputs, Fold(index, 6, scale))


def test_a_unit_whose_rows_part_is_left_to_a_slower_engine() -> None:
    """(It takes a unit's rows together; as with a mask, the shorter way is the same sum.)"""

    def shorter(m: nn.Module, x: Tensor) -> Tensor:
        there = x[..., :1] > 0
        return m.one(x if there.all() else torch.where(there, x, x / 2)).tanh()

    index = torch.arange(6).repeat_interleave(2)
    with pytest.warns(UserWarning, match="different ways for different rows"):
        agrees(OnePassEngine(), model(shorter), torch.randn(12, 6), Fold(index, 6))


def test_a_way_of_its_own_for_every_row_is_left_to_a_slower_engine() -> None:
    everyone = model(lambda m, x: m.one(x) * float(x.sum()))
    engine = OnePassEngine()
    with pytest.warns(UserWarning, match="different ways for different rows"):
        agrees(engine, everyone, torch.randn(12, 6), Fold.identity(12))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agrees(engine, everyone, torch.randn(12, 6), Fold.identity(12))


def test_one_pass_where_all_rows_agree_and_one_for_each_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    once = OnePassEngine._one_pass

    def counted(self: OnePassEngine, *args: Any) -> Any:
        collected = once(self, *args)
        passes.append(len(args[-1].fold.index))
        return collected

    engine, inputs = OnePassEngine(), torch.randn(12, 6).abs()
    agrees(engine, model(signs), inputs, Fold.identity(12))
    monkeypatch.setattr(OnePassEngine, "_one_pass", counted)
    agrees(engine, model(signs), inputs, Fold.identity(12))
    assert passes == [12]
    inputs[4:] *= -1
    agrees(engine, model(signs), inputs, Fold.identity(12))
    assert sorted(passes) == [4, 8, 12]


def test_rows_that_say_nothing_comparable() -> None:
    """NaN is not equal to itself, and every such row goes alone; its gradient contributes nothing."""
    inputs = torch.randn(5, 6)
    inputs[1] = inputs[3] = torch.nan
    found = runner(full_batch_plan(5), model(lambda m, x: m.one(x) * float((x > 0).sum() / x.sum().sign())), squares)
    there = as_vector(found.clipped_sum(*rows(inputs)))
    assert torch.isfinite(there).all()
    assert torch.allclose(there, as_vector(found.clipped_sum(*rows(inputs[[0, 2, 4]]))), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_record_moves_the_sum_by_its_bound_whichever_way_it_goes(way: Callable[..., Tensor]) -> None:
    module, inputs = model(way), 10 * torch.randn(13, 6)
    whole = as_vector(runner(full_batch_plan(13), module, squares).clipped_sum(*rows(inputs)))
    for left_out in range(13):
        others = torch.cat([inputs[:left_out], inputs[left_out + 1 :]])
        without = as_vector(runner(full_batch_plan(13), module, squares).clipped_sum(*rows(others)))
        assert (whole - without).norm() <= 1 + 1e-4

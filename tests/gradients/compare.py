"""An engine against a loop of ordinary batch-of-one backward passes: norms, and sums under weights that the test chooses."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from privgrad.gradients.contract import Encoding, Engine, Fold, Identity, LossFn, Request, Sums, Tree, trainable
from privgrad.gradients.onepass import OnePassEngine
from tests.helpers import loop_gradients

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


class Recording:
    """A rule that keeps the norms it was given, checks that each (unit, block) comes once, and answers with given weights."""

    def __init__(self, weights: Tensor, *, separable: bool = False) -> None:
        self.separable = separable
        self.weights = weights
        self.norms = torch.full_like(weights, -1.0)
        self.calls: list[tuple[int, ...]] = []
        self._first = dict.fromkeys(range(weights.shape[1]), 0)

    def __call__(self, norms: Tensor, blocks: Sequence[int]) -> Tensor:
        self.calls.append(tuple(blocks))
        chosen = torch.empty_like(norms)
        for place, column in enumerate(blocks):
            first = self._first[column]
            part = slice(first, first + len(norms))
            assert (self.norms[part, column] == -1.0).all(), "a unit and block was asked for twice"
            self.norms[part, column] = norms[:, place].to(self.norms)
            chosen[:, place] = self.weights[part, column].to(norms)
            self._first[column] = part.stop
        return torch.where(norms.isfinite(), chosen, torch.zeros_like(norms))


def blocks_of(names: Sequence[str], kind: str) -> list[tuple[str, ...]]:
    """All in one block, each for itself, or blocks that span modules and leave their parameters apart."""
    if kind == "flat":
        return [tuple(names)]
    if kind == "tensor":
        return [(name,) for name in names]
    count = min(3, len(names))
    return [tuple(names[start::count]) for start in range(count)]


def folded(gradients: dict[str, Tensor], fold: Fold) -> dict[str, Tensor]:
    """Row gradients to unit gradients, straightforwardly."""
    units = {}
    for name, gradient in gradients.items():
        total = gradient.new_zeros(fold.units, *gradient.shape[1:])
        for row, unit in enumerate(fold.index.tolist()):
            total[unit] += gradient[row] * (1.0 if fold.scale is None else fold.scale[row].to(gradient))
        units[name] = total
    return units


def agrees(
    engine: Engine,
    model: nn.Module,
    loss_fn: LossFn,
    batch: Tree,
    *,
    kind: str = "flat",
    separable: bool = False,
    fold: Fold | None = None,
    tolerance: float | None = None,
    reference: Callable[..., dict[str, Tensor]] = loop_gradients,
    encoded: Callable[[dict[str, torch.Size]], Encoding] = Identity,
) -> Recording:
    """Assert that norms and weighted sums agree, relative to the largest of each. encoded: makes an encoding from shapes."""
    rows = len(batch[0])
    fold = Fold.identity(rows) if fold is None else fold
    shapes = {name: p.shape for name, p in trainable(model).items()}
    encoding = encoded(shapes)
    expected = encoding.encode(folded(reference(model, loss_fn, batch), fold))
    dtype = next(iter(expected.values())).dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    blocks = blocks_of(list(expected), kind)
    weights = 0.1 + torch.rand(fold.units, len(blocks), dtype=wide)
    rule = Recording(weights, separable=separable)
    sink = Sums(encoding.slots(), torch.device("cpu"), wide)
    engine.accumulate(model, loss_fn, Request(batch, fold, encoding, blocks, rule, sink))

    limit = tolerance or TOLERANCE[dtype]
    wanted = torch.stack(
        [
            torch.cat([expected[name].reshape(fold.units, -1) for name in block], 1).double().norm(dim=1)
            for block in blocks
        ],
        1,
    )
    close(rule.norms, wanted, limit, "norms")
    for column, block in enumerate(blocks):
        for name in block:
            total = torch.einsum("u,u...->...", weights[:, column].double(), expected[name].double())
            scale = weights[:, column].double() @ expected[name].double().reshape(fold.units, -1).norm(dim=1)
            error = (sink.values[name].double() - total).norm()
            assert error <= limit * scale + 1e-12, f"{name}: error {error:.3g} of {scale:.3g}"
    assert all(parameter.grad is None for parameter in model.parameters())
    return rule


def close(given: Tensor, wanted: Tensor, limit: float, what: str) -> None:
    """Relative to each value, with a floor far below all of them: a gradient of zero is only zero to rounding."""
    error = (given.double() - wanted.double()).abs()
    allowed = limit * (wanted.double() + 1e-3 * wanted.double().max())
    assert (error <= allowed + 1e-12).all(), f"{what}: {given} instead of {wanted}"


def covered(engine: OnePassEngine | None = None, /, *args: Any, **kwargs: Any) -> Recording:
    """`agrees`, and the model did not fall back: it would agree whatever the rules do."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return agrees(engine or OnePassEngine(), *args, **kwargs)


def accumulate(
    engine: OnePassEngine, model: nn.Module, loss_fn: Any, batch: tuple[Tensor, ...], rule: Recording
) -> Sums:
    """One step's sums under a rule, with nothing to compare them to."""
    shapes = {name: p.shape for name, p in trainable(model).items()}
    sink = Sums(shapes, torch.device("cpu"), torch.float32)
    blocks = [tuple(shapes)] if rule.weights.shape[1] == 1 else [(name,) for name in shapes]
    engine.accumulate(
        model, loss_fn, Request(batch, Fold.identity(len(batch[0])), Identity(shapes), blocks, rule, sink)
    )
    return sink

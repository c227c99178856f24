"""What a plan's step would do to public data: signal against noise, before any private record is touched.

Everything here is a function of public rows, the plan and the initial weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from privgrad.errors import PrivgradError
from privgrad.gradients.contract import (
    Engine,
    Fold,
    Identity,
    LossFn,
    Request,
    Sums,
    Tree,
    accumulation_dtype,
    trainable,
)
from privgrad.mechanism.clipping import FlatClipping, NormsOnly
from privgrad.mechanism.plan import Plan
from privgrad.mechanism.sparsification import RandomSparsification
from privgrad.mechanism.states import Consumer
from privgrad.mechanism.step import StepRunner
from privgrad.privacy.ledger import Ledger

RATIOS = (0.0, 0.3, 0.6, 0.9)
"""Shares of masked coordinates that are tried."""
FACTORS = (1 / 16, 1 / 4, 1.0, 4.0, 16.0)
"""Multiples of the plan's clipping norm that are tried."""
MEASURED = 512
"""So many public rows are measured: more would change the figures little, and take longer."""
_UNCLIPPED = 1e20


@dataclass(frozen=True)
class Effect:
    """The mean step of a plan on public data: lengths, all of the MEAN gradient (the noised sum over the divisor).

    signal: of the clipped mean along the mean gradient. length: of the clipped mean. floor: the length that chance alone gives to
    the mean of so few public rows. sampling: of the deviation of a batch from the mean. noise: of the noise. signal and length
    are estimates without the bias that a finite number of rows has.
    """

    signal: float
    length: float
    floor: float
    sampling: float
    noise: float

    @property
    def resolved(self) -> bool:
        """False: the clipped mean cannot be told from chance, as with random labels."""
        return self.length >= self.floor

    @property
    def progress(self) -> float:
        """signal^2 over the mean squared length of the noised step: what its best learning rate can gain, up to a constant.

        (The descent lemma: rate * signal * |g| - rate^2 smoothness / 2 * squared length, at the best rate.)
        """
        squared = self.length**2 + self.sampling**2 + self.noise**2
        return self.signal**2 / squared if squared > 0 else 0.0

    @property
    def noise_over_signal(self) -> float:
        """Above 1: noise dominates. At least so much where the clipped mean is not resolved."""
        if self.noise == 0:
            return 0.0
        length = max(self.length, self.floor)
        return self.noise / length if length > 0 else math.inf


@dataclass(frozen=True)
class Outlook:
    """What public data say of a plan at some weights.

    norms: the 10 %, 50 % and 90 % quantile of units' gradient norms. mean: the length of the mean gradient. deviation: the root
    mean squared distance of a unit's gradient from it. step: the plan's, without a mask. by_factor: with its clipping norms times
    FACTORS. by_ratio: with RATIOS of its coordinates masked; empty where the plan compresses in another way.
    """

    norms: tuple[float, float, float]
    mean: float
    deviation: float
    step: Effect
    by_factor: Mapping[float, Effect]
    by_ratio: Mapping[float, Effect]


def outlook(plan: Plan, model: nn.Module, loss_fn: LossFn, public: Tree, engine: Engine) -> Outlook:
    """Measure a calibrated plan at the model's weights, on the first MEASURED public rows (a tree of tensors, at least four)."""
    public = pytree.tree_map(lambda leaf: leaf[:MEASURED], public)
    halves = _halves(public)
    mask = RandomSparsification() if plan.compression is None else plan.compression
    masked = isinstance(mask, RandomSparsification)
    plan = dataclasses.replace(plan, compression=None) if masked else plan
    free = dataclasses.replace(plan, clipping=FlatClipping(max_norm=_UNCLIPPED), thresholds=None, compression=None)
    free = dataclasses.replace(free, mixing=None)

    def means(variant: Plan) -> _Means:
        return _means(variant, model, loss_fn, public, halves, engine)

    gradient = means(free)
    own = _effect(means(plan), gradient, plan)
    by_factor, by_ratio = {1.0: own}, {0.0: own} if masked else {}
    for factor in FACTORS:
        if factor != 1.0:
            changed = dataclasses.replace(plan, clipping=scaled(plan.clipping, factor))
            by_factor[factor] = _effect(means(changed), gradient, plan)
    for ratio in RATIOS:
        if ratio > 0 and isinstance(mask, RandomSparsification):
            constant = dataclasses.replace(mask, final_ratio=ratio, ramp=False)
            changed = dataclasses.replace(plan, compression=constant)
            by_ratio[ratio] = _effect(means(changed), gradient, plan)
    return Outlook(
        norms=_norms(plan, model, loss_fn, public, engine),
        mean=math.sqrt(max(0.0, _inner(*gradient.halves))),
        deviation=math.sqrt(gradient.variance),
        step=own,
        by_factor=dict(sorted(by_factor.items())),
        by_ratio=by_ratio,
    )


def public_steps(
    plan: Plan, model: nn.Module, optimizer: Optimizer, loss_fn: LossFn, public: Tree, engine: Engine, steps: int
) -> None:
    """Move the model by so many steps of the plan on public data, without noise: a stand-in for its weights later on."""
    plan = dataclasses.replace(_public_groups(plan, 256), compression=None, mixing=None)
    rows = _count(public)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        drawn = torch.randperm(rows, generator=generator)[:256]
        batch = pytree.tree_map(lambda leaf, drawn=drawn: leaf[drawn], public)
        means, _ = _mean(plan, model, loss_fn, public, batch, engine)
        first = 0
        for parameter in trainable(model).values():
            part = means[first : first + parameter.numel()]
            parameter.grad = part.view(parameter.shape).to(parameter.dtype)
            first += parameter.numel()
        optimizer.step()


def scaled(clipping: Any, factor: float) -> Any:
    """The clipping rule with all its norms times `factor`."""
    norm = clipping.max_norm
    changed = norm * factor if isinstance(norm, int | float) else type(norm)(one * factor for one in norm)
    return dataclasses.replace(clipping, max_norm=changed)


@dataclass(frozen=True)
class _Means:
    """The mean vectors of the two halves of the public rows (so many units each), and the length of the plan's noise."""

    halves: tuple[Tensor, Tensor]
    units: int
    noise: float

    @property
    def variance(self) -> float:
        """The mean squared distance of one unit's vector from the mean: independent halves differ by 2 / units of it."""
        first, second = self.halves
        return float((first - second).square().sum()) * self.units / 2


def _effect(means: _Means, gradient: _Means, plan: Plan) -> Effect:
    (first, second), (one, other) = means.halves, gradient.halves
    length = math.sqrt(max(0.0, _inner(first, second)))
    mean = math.sqrt(max(0.0, _inner(one, other)))
    along = (_inner(first, other) + _inner(second, one)) / 2
    return Effect(
        signal=max(0.0, along / mean) if mean > 0 else 0.0,
        length=length,
        floor=math.sqrt(means.variance / means.units),
        sampling=math.sqrt(means.variance / plan.divisor),
        noise=means.noise,
    )


def _inner(left: Tensor, right: Tensor) -> float:
    return float(torch.dot(left.double(), right.double()))


def _halves(public: Tree) -> tuple[Tree, Tree]:
    rows = _count(public)
    if rows < 4:
        raise PrivgradError(f"there are {rows} public records; expected at least 4 to tell signal from chance")
    half = rows // 2
    return tuple(pytree.tree_map(lambda leaf, first=first: leaf[first : first + half], public) for first in (0, half))


def _count(public: Tree) -> int:
    return len(next(leaf for leaf in pytree.tree_leaves(public) if isinstance(leaf, Tensor)))


def _public_groups(plan: Plan, rows: int) -> Plan:
    """The plan with as many groups as give so many public rows groups of the private ones' expected size."""
    if plan.groups is None:
        return plan
    count = max(1, round(rows * plan.groups.count / (plan.sampling.normaliser or rows)))
    groups: Any = plan.groups
    return dataclasses.replace(plan, groups=dataclasses.replace(groups, count=count))


def _means(
    plan: Plan, model: nn.Module, loss_fn: LossFn, public: Tree, halves: tuple[Tree, Tree], engine: Engine
) -> _Means:
    sized = _public_groups(plan, _count(halves[0]))
    (first, noise), (second, _) = (_mean(sized, model, loss_fn, public, half, engine) for half in halves)
    units = _count(halves[0]) if sized.groups is None else sized.groups.count
    return _Means((first, second), units, noise / plan.divisor)


def _mean(
    plan: Plan, model: nn.Module, loss_fn: LossFn, public: Tree, rows: Tree, engine: Engine
) -> tuple[Tensor, float]:
    """The flat mean of what public rows give to the plan's clipped sum, and the length of the noise on that SUM."""
    given: Any = plan.noise
    noise = dataclasses.replace(given, insecure_seed=0)  # of groups; nothing is noised
    plan = dataclasses.replace(plan, noise=noise)
    runner = StepRunner(plan, model, loss_fn, engine, Ledger(plan.terms()), public)
    count = _count(rows)
    sums = runner.clipped_sum(rows, Fold.identity(count))
    scales = noise.scales(sums)
    parts = [part for part in sums.parts if part.consumer is Consumer.UPDATE]
    sizes = {part.name: sum(sums.values[slot].numel() for slot in part.slots) for part in parts}
    length = math.sqrt(sum(scales[part.name] ** 2 * sizes[part.name] for part in parts))
    shapes = {name: parameter.shape for name, parameter in trainable(model).items()}
    values = {slot: sums.values[slot] for part in parts for slot in part.slots}
    if plan.compression is not None:
        values = dict(plan.compression.encoding(runner.states["compression"], shapes).decode(values))
    flat = torch.cat([values[name].flatten() for name in shapes])
    return flat / (count if plan.groups is None else plan.groups.count), length


def _norms(plan: Plan, model: nn.Module, loss_fn: LossFn, public: Tree, engine: Engine) -> tuple[float, float, float]:
    rows = _count(public)
    fold = Fold.identity(rows)
    sized = _public_groups(plan, rows)
    if sized.groups is not None:
        engine = sized.groups.engine(lambda: False, plan.sampling.normaliser)
        generator = torch.Generator().manual_seed(0)
        fold = Fold(torch.randint(sized.groups.count, (rows,), generator=generator), sized.groups.count)
    shapes = {name: parameter.shape for name, parameter in trainable(model).items()}
    found = NormsOnly()
    sink = Sums(shapes, next(model.parameters()).device, accumulation_dtype(model))
    engine.accumulate(model, loss_fn, Request(public, fold, Identity(shapes), [tuple(shapes)], found, sink))
    norms = torch.cat(found.norms).flatten().double()
    norms = norms[norms.isfinite()]
    if not len(norms):
        raise PrivgradError(
            "no public record has a finite gradient at these weights; look at the data's scale and the rate"
        )
    low, middle, high = torch.quantile(norms, norms.new_tensor([0.1, 0.5, 0.9])).tolist()
    return low, middle, high

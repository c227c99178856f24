"""One private step: the stages in the order in which data passes them.

sample --groups--> fold --engine, encoding, clipping--> ClippedSum --ledger, noise--> NoisedSum --mixing or decoding--> Release
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from privgrad.errors import PrivgradError, RefusedError
from privgrad.gradients.contract import (
    Encoding,
    Engine,
    Fold,
    Identity,
    Joined,
    LossFn,
    Request,
    Sums,
    Tree,
    accumulation_dtype,
    trainable,
)
from privgrad.gradients.memory import keep_pages
from privgrad.gradients.precision import check_precision
from privgrad.gradients.written import unit_gradients
from privgrad.mechanism.clipping import ClippingRule, NormsOnly
from privgrad.mechanism.disclosure import ClippingWatch
from privgrad.mechanism.noise import SECRET
from privgrad.mechanism.plan import Plan
from privgrad.mechanism.randomness import Source, source
from privgrad.mechanism.stage import Block, ChargedStatistics, PublicView, Stage, State
from privgrad.mechanism.states import ClippedSum, Consumer, NoisedSum, Part, Release
from privgrad.mechanism.statistics import NEEDS_STATISTICS
from privgrad.privacy.ledger import Ledger
from privgrad.privacy.sensitivity import Bound

_STAGES = ("groups", "compression", "clipping", "thresholds", "noise", "mixing", "statistics")
_SIDE_SLOT = "thresholds/side"
_STATISTICS_SLOT = "statistics/side"
_SMALLEST_NORM = 1e-16
"""Single precision squares numbers up to 1.8e19 (a unit beyond contributes nothing). C over such a number keeps all its digits
from C = 3e-19 on; below, rounding made contributions of up to 1.8 C."""
_LARGEST_NORM = 1e25
"""Ten million million contributions of such a norm add up to a number of single precision. Beyond 3e38 there are none: whether a
sum is finite, and so whether a step is released, would say how many records there are."""

Reduce = Callable[[Tensor], None]
"""Sums a tensor over all workers, in place (torch.distributed.all_reduce): each worker then holds the whole sum.

Only without noise, until the workers of a step share its noise and its sample."""


@dataclass
class StepRunner:
    """Runs a plan's steps on a model. Holds what the stages remember; moves no weights itself.

    Guarantee: `release` charges the plan's own event before it draws noise, and refuses to release anything whose joint
    noise multiplier, taken from what was really added, is below the one that is charged.
    """

    plan: Plan
    model: nn.Module
    loss_fn: LossFn
    engine: Engine
    ledger: Ledger
    public: Any = None
    reduce: Reduce | None = None
    apart: Callable[[], bool] = lambda: False
    """Of groups: whether a row's loss is known to depend on that row alone, with the model as it is now."""
    states: dict[str, State] = field(default_factory=dict)
    disclosed: dict[str, float] = field(default_factory=dict, init=False)
    """Without noise, and only what the plan's `disclose` names: of the last step."""

    def __post_init__(self) -> None:
        self._parameters = trainable(self.model)
        if not self._parameters:
            raise PrivgradError("the model has no trainable parameter; unfreeze at least one (requires_grad = True)")
        for name, parameter in self._parameters.items():
            if name in (_SIDE_SLOT, _STATISTICS_SLOT):
                raise PrivgradError(f"a parameter is called {name!r}, which is the name of a side release; rename it")
            if parameter.is_complex():
                raise PrivgradError(
                    f"the parameter {name!r} is complex, and sums and noise are real; hold its real and imaginary part as one "
                    "real parameter, and use torch.view_as_complex of it (or freeze it: requires_grad = False)"
                )
        keep_pages()
        self._shapes = {name: parameter.shape for name, parameter in self._parameters.items()}
        self._stages: dict[str, Stage] = {
            name: getattr(self.plan, name) for name in _STAGES if getattr(self.plan, name) is not None
        }
        self.plan.check_public(self.public is not None)
        if self.plan.statistics is None and any(getattr(m, NEEDS_STATISTICS, False) for m in self.model.modules()):
            raise PrivgradError(
                "the model has layers that take their statistics from the plan (PublicBatchNorm, PrivateBatchNorm), which gives "
                "none; add plan.statistics = { kind = 'public_batch' } (free) or { kind = 'private' } (charged)"
            )
        self.states = {name: stage.init(self._shapes) for name, stage in self._stages.items()} | self.states
        if self.plan.groups is not None:
            self.engine = self.plan.groups.engine(self.apart, self.plan.sampling.normaliser)
        seed = self.plan.noise.insecure_seed
        if seed == SECRET:
            raise PrivgradError("the plan was stored without its seed; give noise.insecure_seed again to run it")
        if self.reduce is not None and self.plan.noise.multiplier:
            raise RefusedError(
                "reduce is refused with noise: each of n workers would draw its own, and together they would release the sum n "
                "times, charged once; train in one process"
            )
        self._seed = seed
        self._noise = self.source("noise")
        self._grouping = self.source("groups")
        self._mixing = self.source("mixing")
        self._event = self.plan.step_event()

    def source(self, purpose: str) -> Source:
        """A source of its own for one purpose, of the quality that the plan asks for."""
        return source(self._seed, purpose, self.plan.digest())

    def release(self, batch: Tree, fold: Fold, rate: float | None = None) -> Release:
        """One step: batch (rows first, on the model's device) to what may be seen. rate: the learning rate, for mixing."""
        if self.ledger.count >= self.plan.steps:
            raise PrivgradError(
                f"all {self.plan.steps} steps of the plan are charged; a longer training is another plan"
            )
        if trainable(self.model).keys() != self._parameters.keys():
            raise PrivgradError(
                "the set of trainable parameters changed during training (requires_grad); it is fixed when training starts"
            )
        if self.plan.mixing is not None and not (rate is not None and 0 < rate < math.inf):
            raise PrivgradError(
                f"the learning rate is {rate}; mixing needs one above 0, of which the width of its noise is a multiple"
            )
        sums = self.clipped_sum(batch, fold)
        if self.reduce is not None:
            for value in sums.values.values():
                self.reduce(value)
        receipt = self.ledger.charge(self.plan.step_event(self.ledger.count + 1))
        noised = self.plan.noise.add(sums, receipt, self._noise)
        self._check(noised)
        release = self._last_stage(noised, rate)
        if self._watch is not None:
            seen = self._watch.values(fold.units)
            self.disclosed = {name: seen[name] for name in self.plan.disclose if name in seen}
        self.states = {name: stage.update(self.states[name], release) for name, stage in self._stages.items()}
        return release

    def clipped_sum(self, batch: Tree, fold: Fold) -> ClippedSum:
        """PRIVATE. Refresh the stages, then clip and sum the batch. An empty batch gives zeros."""
        device = next(iter(self._parameters.values())).device
        check_precision(device)
        self.refresh()
        plan = self.plan
        step = self.ledger.count + 1
        grouped = plan.groups is not None
        if plan.groups is not None:
            fold = plan.groups.assign(fold, self._grouping.at(step))
        encoding = self._encode()
        slots = dict(encoding.slots())
        blocks = plan.clipping.partition(slots)
        _check_partition(blocks, slots)

        thresholds = torch.tensor([block.max_norm for block in blocks], dtype=torch.float64)
        if plan.thresholds is not None:
            thresholds = plan.thresholds.values(self.states["thresholds"], thresholds)
        _check_smallest(thresholds)
        parts = [
            Part(block.name, block.slots, Bound.ball(float(threshold)))
            for block, threshold in zip(blocks, thresholds, strict=True)
        ]
        caps = [block.max_coordinate for block in blocks]
        joined = None
        if getattr(plan.compression, "joined", False):
            joined, slots = _joined(thresholds, caps), dict(self._shapes)
            parts = [Part("gradient", tuple(slots), Bound.ball(joined.radius))]
        side_bound = None if plan.thresholds is None else plan.thresholds.side_bound(thresholds)
        if side_bound is not None:
            parts.append(Part(_SIDE_SLOT, (_SIDE_SLOT,), side_bound, Consumer.THRESHOLDS))
            slots[_SIDE_SLOT] = torch.Size([len(blocks)])
        charged = plan.statistics if isinstance(plan.statistics, ChargedStatistics) else None
        measured = 0 if charged is None else charged.side_size(self.states["statistics"], step)
        if charged is not None and measured:
            parts.append(Part(_STATISTICS_SLOT, (_STATISTICS_SLOT,), charged.side_bound(), Consumer.STATISTICS))
            slots[_STATISTICS_SLOT] = torch.Size([measured])
        _check_largest(parts)

        sink = Sums(slots, device, accumulation_dtype(self.model))
        side = None
        if plan.thresholds is not None and side_bound is not None:
            side = (plan.thresholds, self.states["thresholds"], sink.at(_SIDE_SLOT))
        watch = ClippingWatch() if plan.disclose else None
        rule = ClippingRule(plan.clipping, thresholds, side, watch)
        request = Request(batch, fold, encoding, [block.slots for block in blocks], rule, sink, caps, joined)
        if len(fold.index):
            self.engine.accumulate(self.model, self.loss_fn, request)
            if charged is not None and measured:
                state = self.states["statistics"]
                charged.add_side(state, self.model, self.loss_fn, batch, fold, sink, _STATISTICS_SLOT, grouped=grouped)
        self._encoding = encoding if joined is None else Identity(self._shapes)
        self._watch = watch
        return ClippedSum(parts, sink.values, grouped)

    def refresh(self) -> None:
        """Let every stage look at what is public before the step."""
        view = self._view()
        for name, stage in self._stages.items():
            self.states = {**self.states, name: stage.refresh(self.states[name], view)}
        if self.plan.statistics is not None:
            self.plan.statistics.install(self.model, self.states["statistics"])

    def finalize(self) -> None:
        """Give the model the statistics that belong to its weights of now. The next step is as it would be without this."""
        if self.plan.statistics is not None:
            found = self.plan.statistics.final(self.states["statistics"], self._view())
            self.plan.statistics.install(self.model, found)

    def _view(self) -> PublicView:
        step = self.ledger.count
        mixed = hashlib.sha256(f"{self._event!r}:{self.plan.steps}:{step}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(mixed[:8], "little", signed=True))
        return PublicView(
            self.model,
            self.loss_fn,
            self.public,
            step,
            self.plan.steps,
            max(1, self.plan.sampling.steps_in(1.0)),
            self._shapes,
            generator,
            lambda rows: self._public_norms(rows, generator),
            lambda rows: self._public_gradients(rows, generator),
        )

    def _encode(self) -> Encoding:
        if self.plan.compression is None:
            return Identity(self._shapes)
        return self.plan.compression.encoding(self.states["compression"], self._shapes)

    def _public_norms(self, rows: Tree, generator: torch.Generator) -> Tensor:
        """[units, blocks] of public rows."""
        rows, fold = self._public_units(rows, generator)
        encoding = self._encode()
        slots = dict(encoding.slots())
        blocks = [block.slots for block in self.plan.clipping.partition(slots)]
        found = NormsOnly()
        sink = Sums(slots, next(iter(self._parameters.values())).device, accumulation_dtype(self.model))
        with _refusing_public_rows():
            self.engine.accumulate(self.model, self.loss_fn, Request(rows, fold, encoding, blocks, found, sink))
        return torch.cat(found.norms)

    def _public_gradients(self, rows: Tree, generator: torch.Generator) -> Mapping[str, Tensor]:
        """{parameter: [units, *shape]} of public rows."""
        rows, fold = self._public_units(rows, generator)
        with _refusing_public_rows():
            return unit_gradients(self.engine, self.model, self.loss_fn, rows, fold)

    def _public_units(self, rows: Tree, generator: torch.Generator) -> tuple[Tree, Fold]:
        """Public rows on the model's device, as the plan's kind of units. Groups have the expected size of the private ones."""
        device = next(iter(self._parameters.values())).device
        rows = pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, rows)
        count = len(next(leaf for leaf in pytree.tree_leaves(rows) if isinstance(leaf, Tensor)))
        if self.plan.groups is None:
            return rows, Fold.identity(count)
        of_private = self.plan.sampling.normaliser or count
        groups = max(1, round(count * self.plan.groups.count / of_private))
        return rows, Fold(torch.randint(groups, (count,), generator=generator), groups)

    def _check(self, noised: NoisedSum) -> None:
        """What was added must be what was charged."""
        claimed = self.plan.noise.multiplier or 0.0
        if noised.multiplier() < claimed * (1 - 1e-9):
            raise PrivgradError(
                f"the noise that was added has a joint multiplier of {noised.multiplier():.6g} and the plan claims "
                f"{claimed:.6g}; nothing was released"
            )

    def _last_stage(self, noised: NoisedSum, rate: float | None) -> Release:
        decoded = self._encoding.decode(noised.of(Consumer.UPDATE))
        mean = {
            name: value.div_(self.plan.divisor) for name, value in decoded.items()
        }  # in place: the sum is done with
        side: dict[Consumer, Mapping[str, Tensor]] = {
            consumer: noised.of(consumer) for consumer in Consumer if consumer is not Consumer.UPDATE
        }
        if self.plan.mixing is None:
            return Release(noised.receipt, self.plan.divisor, update=mean, side=side)
        assert rate is not None
        weights = {name: parameter.detach() for name, parameter in self._parameters.items()}
        source = self._mixing.at(noised.receipt.step)
        mixed, state = self.plan.mixing.mix(self.states["mixing"], weights, mean, rate, source)
        self.states = {**self.states, "mixing": state}
        return Release(noised.receipt, self.plan.divisor, weights=mixed, side=side)


@contextmanager
def _refusing_public_rows() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PrivgradError(
            f"model and loss cannot take the public rows: {reason}; expected rows of the private data's shapes, types and classes"
        ) from error


def _joined(thresholds: Tensor, caps: list[float | None]) -> Joined:
    """The set in which units lie that are put together again: the sum of orthogonal blocks, made sure of by scaling."""
    if len(set(caps)) > 1:
        raise PrivgradError(
            "compression.joined needs one bound on coordinates for all blocks, and the clipping gives several"
        )
    return Joined(math.hypot(*thresholds.tolist()), caps[0])


def _check_partition(blocks: list[Block] | Any, slots: Mapping[str, torch.Size]) -> None:
    """Every slot must be clipped exactly once: one that is in no block would enter the sum unbounded."""
    covered = [slot for block in blocks for slot in block.slots]
    if sorted(covered) != sorted(slots):
        missing = sorted(set(slots) - set(covered))
        raise PrivgradError(
            f"the clipping blocks must cover every parameter exactly once; missing: {missing or 'none'}, "
            f"named twice or unknown: {sorted({slot for slot in covered if covered.count(slot) > 1 or slot not in slots})}"
        )


def _check_smallest(thresholds: Tensor) -> None:
    if not (thresholds >= _SMALLEST_NORM).all():
        raise PrivgradError(
            f"a clipping norm is {float(thresholds.min()):g}, and gradients are numbers of single precision, which cannot be "
            f"clipped to less than {_SMALLEST_NORM:g}; take a larger clipping.max_norm and, for the same steps, a learning "
            "rate that is smaller by the same factor"
        )


def _check_largest(parts: list[Part]) -> None:
    for part in parts:
        if not part.bound.radius <= _LARGEST_NORM:
            raise PrivgradError(
                f"the contributions to {part.name!r} are clipped to {part.bound.radius:g}, and sums are numbers of single "
                f"precision; take a norm (clipping.max_norm, thresholds.limit, statistics.max_norm) of at most {_LARGEST_NORM:g}"
            )

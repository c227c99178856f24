"""The step audit of any plan: a worst neighbouring pair is built from the plan's own stages, and its release is attacked.

The pair: a canary that pulls every coordinate of every block far beyond its clipping norm, beside records that do not matter
(where groups are clipped: records that pull their group the other way). What the worlds differ by, and the noise on it, is
read off the step's own clipped sums once, beforehand; a trial's score is the log-likelihood ratio of its release under them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from privgrad.audit.gaussian import gdp_epsilon, mu_lower_bound
from privgrad.audit.step import StepAudit, claimed_mu, linear_loss
from privgrad.errors import PrivgradError, RefusedError, check_count
from privgrad.gradients.contract import Fold
from privgrad.gradients.onepass import OnePassEngine
from privgrad.mechanism.groups import RandomGroups
from privgrad.mechanism.layerwise import LayerwiseClipping
from privgrad.mechanism.mixing import CALIBRATE, ModelMix
from privgrad.mechanism.plan import Plan
from privgrad.mechanism.sampling import FullBatch
from privgrad.mechanism.sparsification import RandomSparsification
from privgrad.mechanism.states import Consumer, Release
from privgrad.mechanism.step import StepRunner
from privgrad.mechanism.thresholds import PublicThresholds
from privgrad.nn.public_norm import PrivateBatchNorm, PublicBatchNorm
from privgrad.privacy.adjacency import Adjacency
from privgrad.privacy.ledger import Ledger
from privgrad.training.progress import ProgressDisplay, Silent

SIZES: Mapping[str, int] = {"first.weight": 12, "first.bias": 4, "last.weight": 16}
"""The tensors of the model that is attacked, where the plan does not ask for certain ones, and how many coordinates each has."""
_SIDE_BY_SIDE = 100
"""So many canaries are audited in one step, each in coordinates of its own, where units do not meet before the noise."""
_PULL, _AGAINST, _MOST_COORDINATES, _MOST_GROUPS = 1e4, -5.0, 4096, 2
_NORMALIZATION: Mapping[str, type[nn.Module]] = {"public_batch": PublicBatchNorm, "private": PrivateBatchNorm}
"""By the kind of plan.statistics: the layer that takes them."""


class Tensors(nn.Module):
    """Parameters with the given (dotted) names and sizes, all zero. Row i's loss is <w, x_i>: its gradient is x_i.

    norm: a layer through which the inputs go first.
    """

    def __init__(self, sizes: Mapping[str, int], norm: nn.Module | None = None) -> None:
        super().__init__()
        for name, size in sizes.items():
            *path, last = name.split(".")
            owner: nn.Module = self
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = getattr(owner, part)
            owner.register_parameter(last, nn.Parameter(torch.zeros(size, 1)))
        self.norm_before = norm

    def forward(self, inputs: Tensor) -> Tensor:
        """[rows, all coordinates] to [rows]."""
        inputs = inputs if self.norm_before is None else self.norm_before(inputs)
        parameters = list(self.parameters())
        parts = inputs.split([len(parameter) for parameter in parameters], dim=1)
        # Tensor by tensor, as a network has them: the engine that is attacked is the one for networks.
        return torch.cat([part @ each for part, each in zip(parts, parameters, strict=True)], dim=1).sum(1)


@dataclass(frozen=True)
class WorstPair:
    """A plan's step at full batch, and the rows of two neighbouring data sets. of: [coordinates], which canary's each one is."""

    plan: Plan
    model: nn.Module
    inside: Tensor
    outside: Tensor
    public: tuple[Tensor] | None
    canaries: int
    of: Tensor


def worst_pair(plan: Plan, sizes: Mapping[str, int] | None = None) -> WorstPair:
    """The pair for a plan. sizes: the model's tensors, where the plan names them; None: three of ours.

    Random masks are drawn once, at the ratio that they reach in the end, and kept; more than two groups are two (what one
    record can move does not depend on their number).

    Raises:
        RefusedError: a kind of normalization statistics for which no worst pair is known.
    """
    forced = dataclasses.replace(plan, sampling=FullBatch(divisor=plan.divisor))
    if isinstance(plan.compression, RandomSparsification):
        forced = dataclasses.replace(forced, compression=dataclasses.replace(plan.compression, ramp=False))
    if isinstance(plan.groups, RandomGroups):
        groups = dataclasses.replace(plan.groups, count=min(plan.groups.count, _MOST_GROUPS))
        forced = dataclasses.replace(forced, groups=groups, sampling=FullBatch(divisor=float(_MOST_GROUPS)))
    if isinstance(plan.mixing, ModelMix) and plan.mixing.width_ratio != CALIBRATE:
        # On the sum the uniform is as wide as it was, whatever the divisor.
        mixing = dataclasses.replace(plan.mixing, width_ratio=plan.mixing.width_ratio * plan.divisor / forced.divisor)
        forced = dataclasses.replace(forced, mixing=mixing)
    meet = (
        plan.groups is not None
        or plan.statistics is not None
        or not isinstance(plan.thresholds, PublicThresholds | None)
    )
    apart = not meet and isinstance(plan.compression, RandomSparsification | None)
    canaries = _SIDE_BY_SIDE if apart else 1
    needed = float(getattr(plan.clipping, "p", 1.0))
    if isinstance(plan.compression, RandomSparsification):
        needed /= 1 - plan.compression.final_ratio
    chosen = _enlarged(SIZES if sizes is None else sizes, needed)
    if sum(chosen.values()) * canaries > 8 * _MOST_COORDINATES:
        canaries = max(1, 8 * _MOST_COORDINATES // sum(chosen.values()))
    of = torch.cat([torch.arange(canaries).repeat_interleave(size) for size in chosen.values()])
    pulls = _PULL * (of == torch.arange(canaries)[:, None]).to(torch.float32)
    if plan.mixing is not None:
        pulls *= _pulled(plan, chosen, canaries, math.ceil(needed))
    dimension = len(of)
    others = _others(plan, dimension)
    weight = len(others) if plan.groups is not None else 1
    outside = torch.cat([-weight * pulls, others]) if plan.adjacency is Adjacency.REPLACE_ONE else others
    public = torch.randn(64, dimension, generator=torch.Generator().manual_seed(1))
    shown = (public,) if _works_with_public(plan) else None
    model = Tensors({name: size * canaries for name, size in chosen.items()}, _norm(plan, dimension))
    return WorstPair(forced, model, torch.cat([weight * pulls, others]), outside, shown, canaries, of)


def audit_plan(
    plan: Plan,
    *,
    sizes: Mapping[str, int] | None = None,
    trials: int = 5000,
    confidence: float = 1 - 1e-6,
    progress: ProgressDisplay | None = None,
) -> StepAudit:
    """Attack one step of any plan of Gaussian noise, with its worst pair.

    sizes: see `worst_pair`. trials: in each of the two worlds.

    Guarantee (of the audit): `mu_lower` exceeds the true mu with a chance of at most 1 - confidence.

    Raises:
        PrivgradError: a plan without noise, which claims nothing.
        RefusedError: a plan with mixing (`audit.mixing.audit_mixing`), or see `worst_pair`.
    """
    check_count("trials", trials)
    if plan.mixing is not None:
        raise RefusedError(
            "mixing releases weights and is no Gaussian mechanism; attack it with audit.mixing.audit_mixing"
        )
    claimed = claimed_mu(plan)
    pair = worst_pair(plan, sizes)
    display = Silent() if progress is None else progress
    forced = dataclasses.replace(pair.plan, steps=2 * trials)
    # The model's rows do not see one another: groups go the way of those that do not, and with local steps the other one.
    runner = Held(
        forced, pair.model, linear_loss, OnePassEngine(), Ledger(forced.terms()), pair.public, apart=lambda: True
    )
    likelihood = _Likelihood.of(runner, pair)
    rounds = -(-trials // int(likelihood.through.sum()))
    start = runner.states
    found: dict[str, list[Tensor]] = {"inside": [], "outside": []}
    display.start(0, 2 * rounds)
    try:
        for world, rows in (("inside", pair.inside), ("outside", pair.outside)):
            fold = Fold.identity(len(rows))
            for _ in range(rounds):
                runner.states = start
                found[world].append(likelihood.scores(runner, runner.release((rows,), fold)))
                display.step(len(found["inside"]) + len(found["outside"]), "")
    finally:
        display.stop()
    inside, outside = (torch.cat(found[world])[:trials].tolist() for world in ("inside", "outside"))
    lower = mu_lower_bound(inside, outside, 0.0, confidence)
    tight = mu_lower_bound(inside, outside, 0.0, 0.95)
    epsilons = gdp_epsilon(claimed, plan.delta), gdp_epsilon(lower, plan.delta)
    return StepAudit(
        claimed, lower, tight, *epsilons, confidence, len(inside), plan.delta, inside=inside, outside=outside
    )


class Held(StepRunner):
    """A step runner whose stages look at public things once: every trial has the same masks, bases and statistics."""

    _looked = False

    def refresh(self) -> None:
        if not self._looked:
            super().refresh()
            self._looked = True


@dataclass(frozen=True)
class _Likelihood:
    """direction: {slot: what the worlds differ by, over the variance}. owners: {slot: [coordinates] of which canary}.

    middle, length: [canaries], of the projection.
    """

    direction: Mapping[str, Tensor]
    owners: Mapping[str, Tensor]
    middle: Tensor
    length: Tensor

    @property
    def through(self) -> Tensor:
        """[canaries]: whom no mask keeps from any block."""
        return self.length > 0.999 * self.length.max()

    @staticmethod
    def of(runner: Held, pair: WorstPair) -> _Likelihood:
        """From the clipped sums of the two worlds, before any noise, and the noise that the plan puts on them."""
        inside = runner.clipped_sum((pair.inside,), Fold.identity(len(pair.inside)))
        outside = runner.clipped_sum((pair.outside,), Fold.identity(len(pair.outside)))
        noise: Any = runner.plan.noise
        scales = noise.scales(inside)
        by_slot = {slot: scales[part.name] for part in inside.parts for slot in part.slots}
        moved = {slot: (inside.values[slot] - outside.values[slot]).to(torch.float64) for slot in by_slot}
        direction = {slot: moved[slot] / by_slot[slot] ** 2 for slot in by_slot}
        owners = _owners(runner, pair, inside.values)

        def along(values: Mapping[str, Tensor]) -> Tensor:
            return _projected(direction, owners, values, pair.canaries)

        length = along(moved).sqrt()
        if not bool((length > 0).any()):
            raise PrivgradError("the worst pair that was tried does not move this plan's step at all: nothing to audit")
        return _Likelihood(direction, owners, (along(inside.values) + along(outside.values)) / 2, length)

    def scores(self, runner: Held, release: Release) -> Tensor:
        """[canaries that the step lets through]: N(+-mu / 2, 1), by the world, where the step is as it claims."""
        found = _projected(self.direction, self.owners, _seen(runner, release), len(self.length))
        return ((found - self.middle) / self.length)[self.through]


def _projected(
    direction: Mapping[str, Tensor], owners: Mapping[str, Tensor], values: Mapping[str, Tensor], canaries: int
) -> Tensor:
    """[canaries]: <direction, values> over the coordinates of each."""
    total = torch.zeros(canaries, dtype=torch.float64)
    for slot, towards in direction.items():
        total.index_add_(0, owners[slot], (towards * values[slot]).flatten())
    return total


def _seen(runner: Held, release: Release) -> dict[str, Tensor]:
    """{slot: noised sum}: the release in the form that noise was added in."""
    assert release.update is not None
    update = {name: value.mul(release.divisor)[None] for name, value in release.update.items()}
    found = {slot: value[0] for slot, value in runner._encoding.encode(update).items()}
    for consumer, values in (release.side or {}).items():
        if consumer is not Consumer.UPDATE:
            found |= values
    return found


def _owners(runner: Held, pair: WorstPair, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{slot: [coordinates] of which canary}."""
    if pair.canaries == 1:
        return {slot: torch.zeros(value.numel(), dtype=torch.int64) for slot, value in values.items()}
    ids: dict[str, Tensor] = {}
    for name, part in _split(runner, pair.of):
        ids[name] = part.to(torch.float64)[None]
    return {slot: value[0].flatten().to(torch.int64) for slot, value in runner._encode().encode(ids).items()}


def _split(runner: Held, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
    start = 0
    for name, parameter in runner.model.named_parameters():
        yield name, flat[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()


def _others(plan: Plan, dimension: int) -> Tensor:
    """The other records. Groups need some that pull the other way; statistics some that would show if theirs were shared."""
    if plan.groups is not None:
        return torch.full((24 * min(plan.groups.count, _MOST_GROUPS), dimension), _AGAINST)
    return 0.5 + torch.randn(3, dimension, generator=torch.Generator().manual_seed(0))


def _pulled(plan: Plan, sizes: Mapping[str, int], canaries: int, needed: int) -> Tensor:
    """[coordinates]: beside a uniform a shift shows best in as few as the bound on each allows, and one in every block.

    A mask of whole layers may leave any of them: then all are pulled.
    """
    wanted = [max(1, min(size, needed)) for size in sizes.values()]
    by_layers = isinstance(plan.compression, RandomSparsification) and plan.compression.structure == "layers"
    if not isinstance(plan.clipping, LayerwiseClipping) and not by_layers:
        for place in range(1, len(wanted)):
            wanted[place] = max(0, min(wanted[place], needed - sum(wanted[:place])))
    parts = [(torch.arange(size) < count).repeat(canaries) for size, count in zip(sizes.values(), wanted, strict=True)]
    return torch.cat(parts).to(torch.float32)


def _enlarged(sizes: Mapping[str, int], coordinates: float) -> Mapping[str, int]:
    """The same tensors, with at least so many coordinates in all (where that many can be afforded)."""
    wanted = min(coordinates, _MOST_COORDINATES)
    factor = max(1, math.ceil(wanted / sum(sizes.values())))
    return {name: factor * size for name, size in sizes.items()}


def _norm(plan: Plan, dimension: int) -> nn.Module | None:
    if plan.statistics is None:
        return None
    kind = str(getattr(plan.statistics, "kind", type(plan.statistics).__name__))
    if kind not in _NORMALIZATION:
        raise RefusedError(
            f"no worst pair is known for plan.statistics of kind {kind!r}; leave it out of the plan to audit the rest"
        )
    return _NORMALIZATION[kind](dimension, affine=False)


def _works_with_public(plan: Plan) -> bool:
    stages = (plan.compression, plan.thresholds, plan.statistics)
    return any(getattr(stage, "needs_public", False) for stage in stages)

"""The single-step audit: the very step function of a plan, run many times on a worst neighbouring pair.

The canary's coin is forced (q = 1), so that the inner mechanism is attacked; the sampler is tested on its own. What is
falsified is the claimed EVENT of one step, not the epsilon of a training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from privgrad.audit.gaussian import gdp_epsilon, mu_lower_bound
from privgrad.errors import PrivgradError
from privgrad.gradients.contract import Fold, Tree
from privgrad.gradients.onepass import OnePassEngine
from privgrad.mechanism.plan import Plan
from privgrad.mechanism.sampling import FullBatch
from privgrad.mechanism.step import StepRunner
from privgrad.privacy.adjacency import Adjacency
from privgrad.privacy.ledger import Ledger
from privgrad.privacy.sensitivity import replacement_factor


class Direction(nn.Module):
    """One weight vector; with `linear_loss` each row's gradient is that row's vector, whatever the weights are."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dimension))

    def forward(self, inputs: Tensor) -> Tensor:
        """[rows, dimension] to [rows]."""
        return inputs @ self.weight


class Directions(nn.Module):
    """Several weight vectors, one after the other: as `Direction`, with a tensor for each block."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.parts = nn.ParameterList(torch.zeros(size) for size in sizes)

    def forward(self, inputs: Tensor) -> Tensor:
        """[rows, sum of sizes] to [rows]."""
        return inputs @ torch.cat(list(self.parts))


def linear_loss(model: nn.Module, batch: Tree) -> Tensor:
    """loss_i = <w, x_i>."""
    losses: Tensor = model(batch[0])
    return losses


@dataclass(frozen=True)
class StepAudit:
    """What an audit claims and finds. mu is that of one unsampled step; epsilon at the plan's delta, on the GDP curve.

    mu_lower: at `confidence`, for the assertion that it stays below the claim. mu_lower_95: at 95 %, for how tight the attack is.
    """

    mu_claimed: float
    mu_lower: float
    mu_lower_95: float
    epsilon_claimed: float
    epsilon_lower: float
    confidence: float
    trials: int
    delta: float
    inside: Sequence[float] = field(default=(), repr=False, compare=False)
    outside: Sequence[float] = field(default=(), repr=False, compare=False)
    """Scores of the two worlds, the threshold at 0 and the noise's standard deviation 1, where they are kept."""

    @property
    def epsilon_lower_95(self) -> float:
        """At 95 %."""
        return gdp_epsilon(self.mu_lower_95, self.delta)

    def at(self, confidence: float) -> float:
        """The lower bound on mu at another confidence, from scores that were kept."""
        return mu_lower_bound(self.inside, self.outside, 0.0, confidence)

    @property
    def holds(self) -> bool:
        """True where the attack shows no more than the plan claims."""
        return self.mu_lower <= self.mu_claimed


def claimed_mu(plan: Plan) -> float:
    """mu of one step without sampling: distance between neighbours over noise."""
    multiplier = plan.noise.multiplier
    if not multiplier:
        raise PrivgradError("the plan has no noise, so there is no claim to audit")
    moved = replacement_factor(grouped=plan.groups is not None) if plan.adjacency is Adjacency.REPLACE_ONE else 1.0
    return moved / multiplier


def audit_step(
    plan: Plan,
    inside: Tensor,
    outside: Tensor,
    direction: Tensor,
    midpoint: float,
    *,
    model: nn.Module | None = None,
    side: Tensor | None = None,
    public: Tree = None,
    trials: int = 5000,
    confidence: float = 1 - 1e-6,
) -> StepAudit:
    """Attack one step of `plan`.

    inside, outside: [rows, dimension] gradients of all records in the two neighbouring worlds (q is forced to 1).
    direction: [dimension] vector on which the noised SUM is projected, best the worlds' difference over each part's variance.
    midpoint: the projection half way between the two worlds: the threshold of the guesses, fixed beforehand.
    model: `Directions` where the plan clips several tensors; None is one. side: as direction, for side releases (of thresholds,
    then of statistics).
    public: the public batch, for plans that work with some.
    Every trial starts from the same state, whatever the releases before it.

    Guarantee (of the audit): `mu_lower` exceeds the true mu with a chance of at most 1 - confidence.
    """
    sampling = FullBatch(divisor=plan.divisor)
    forced = dataclasses.replace(plan, sampling=sampling, steps=2 * trials)
    model = Direction(inside.shape[1]) if model is None else model
    runner = StepRunner(forced, model, linear_loss, OnePassEngine(), Ledger(forced.terms()), public)
    start = runner.states
    scores: dict[str, list[float]] = {}
    for world, gradients in (("inside", inside), ("outside", outside)):
        fold = Fold.identity(len(gradients))
        scores[world] = []
        for _ in range(trials):
            runner.states = start
            release = runner.release((gradients,), fold)
            if release.update is None:
                raise PrivgradError("this audit needs plans that release updates; mixing has an audit of its own")
            update = torch.cat([value.flatten() for value in release.update.values()])
            score = float(update @ direction) * forced.divisor
            if side is not None and release.side is not None:
                noised = torch.cat([sums.flatten() for parts in release.side.values() for sums in parts.values()])
                score += float(noised @ side.to(noised))
            scores[world].append(score)
    lower = mu_lower_bound(scores["inside"], scores["outside"], midpoint, confidence)
    claimed = claimed_mu(plan)
    tight = mu_lower_bound(scores["inside"], scores["outside"], midpoint, 0.95)
    epsilons = gdp_epsilon(claimed, plan.delta), gdp_epsilon(lower, plan.delta)
    return StepAudit(claimed, lower, tight, *epsilons, confidence, trials, plan.delta)

"""Advice on a plan, from public data and theory alone: what each number should be, and the figures that say so.

It costs no privacy and proves none. Estimates are of public data: the private data's gradients may differ.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from privgrad.errors import PrivgradError
from privgrad.gradients.contract import Engine, LossFn, Tree, trainable
from privgrad.mechanism.plan import Plan
from privgrad.mechanism.sampling import PoissonSampling
from privgrad.privacy.calibration import LARGEST_TARGET, SMALLEST_TARGET
from privgrad.training.outlook import Effect, Outlook, outlook, public_steps, scaled

_NEARLY = 0.95
"""What gives this share of the best progress is as good: estimates are no better."""
_WALK = (1.0, 3.0)
"""How far the noise of a whole training may move the weights, over their initial norm: where three tuned plans stood."""
_KEPT_BY_MIXING = 2 / 3
"""A mixed step starts half way between the last two weights: of each step two thirds stay, in the long run."""


@dataclass(frozen=True)
class Advice:
    """One suggestion. suggested: a number, numbers by name, or None where there is nothing to suggest."""

    topic: str
    suggested: Any
    reason: str


@dataclass(frozen=True)
class Advised:
    """start: at the initial weights. later: after `later_steps` noise-free steps on public data, or None."""

    start: Outlook
    later: Outlook | None
    later_steps: int
    noise_dominates: bool
    advice: tuple[Advice, ...]


def advise(
    plan: Plan,
    model: nn.Module,
    optimizer: Optimizer,
    loss_fn: LossFn,
    public: Tree,
    engine: Engine,
    *,
    steps: int = 30,
) -> Advised:
    """Advice on a calibrated plan. Moves the model by `steps` noise-free steps of the plan on public data; 0 for none.

    public: public rows (a tree of tensors) on the model's device, as the loss takes them.

    Guarantee: a function of the plan, the model and public rows; it sees no private record and charges nothing.
    """
    plan.check_public(True)
    if plan.noise.multiplier is None:
        raise PrivgradError(
            "the plan has no noise multiplier; calibrate it to an epsilon, of which advice is a function"
        )
    weights = math.sqrt(sum(float(p.detach().double().square().sum()) for p in trainable(model).values()))
    start = outlook(plan, model, loss_fn, public, engine)
    later = None
    if steps:
        public_steps(plan, model, optimizer, loss_fn, public, engine, steps)
        later = outlook(plan, model, loss_fn, public, engine)
    last = start if later is None else later
    dominates = last.step.noise_over_signal > 1
    items = [
        _sparsification(plan, last, dominates),
        _clipping(plan, start, later),
        _learning_rate(plan, start.step, optimizer, weights),
        _batch_size(plan, last),
    ]
    if plan.mixing is not None:
        items.append(_mixing(plan, start.step, optimizer, weights, model))
    return Advised(start, later, steps if later is not None else 0, dominates, tuple(items))


def _sparsification(plan: Plan, seen: Outlook, dominates: bool) -> Advice:
    topic = "sparsification"
    if not seen.by_ratio:
        return Advice(topic, None, "the plan compresses gradients in another way, so that no mask was tried.")
    whole = seen.by_ratio[0.0]
    if not dominates:
        suggested = 0.0 if whole.resolved else None
        return Advice(topic, suggested, f"{_noise(whole)}, and a mask helps only where noise dominates.")
    if whole.resolved:
        share = {ratio: _share(effect, whole) for ratio, effect in seen.by_ratio.items()}
        ratio = max(ratio for ratio in share if share[ratio] >= _NEARLY)
        figures = ", ".join(f"{share[ratio]:.0%} at r = {ratio:g}" for ratio in share if ratio)
        found = f"a step keeps of its progress, at its best learning rate: {figures}"
    else:
        norm, low = _largest(plan), seen.norms[0]
        ratio = max(ratio for ratio in seen.by_ratio if ratio == 0 or low * math.sqrt(1 - ratio) >= norm)
        still = "are still" if ratio else "would no longer be"
        found = f"most gradients (norms above {low:.2g}) {still} clipped to {norm:.2g} then, which is what makes up for the mask"
    worth = "a mask can pay" if ratio else "a mask could pay, and every one that was tried loses too much"
    return Advice(topic, ratio, f"r = {ratio:g}: {_noise(whole)}, so that {worth}; {found}.")


def _clipping(plan: Plan, start: Outlook, later: Outlook | None) -> Advice:
    norm = plan.clipping.max_norm  # type: ignore[attr-defined]
    suggested: dict[str, Any] = {}
    words = []
    for name, seen in (("start", start), ("later", later)):
        if seen is None:
            continue
        low, middle, high = seen.norms
        factor = _factor(seen) if seen.step.resolved else min(1.0, middle / _largest(plan))
        suggested[name] = scaled(plan.clipping, factor).max_norm
        if not seen.step.resolved:
            what = "is enough: a larger one adds noise and little gradient"
        elif factor == 1:
            what = "is as good as any that was tried"
        else:
            gain = _share(seen.by_factor[factor], seen.step)
            what = f"makes {gain:.2g} times the progress of {_shown(norm)}"
        words.append(
            f"{name}, C = {_shown(suggested[name])} {what} (gradient norms {low:.2g} to {high:.2g}, median {middle:.2g}, "
            f"sampling noise {seen.deviation:.2g})"
        )
    seen = start if later is None else later
    theory = "large gradients want a large C; convergence is proven for C above the sampling noise (arXiv:2210.03843, 3.1, 3.2)"
    if seen.step.resolved and seen.step.length > 0:
        cosine = min(1.0, seen.step.signal / seen.step.length)
        theory += f"; at C = {_shown(norm)} the clipped mean has a cosine of {cosine:.2f} with the mean gradient"
    return Advice("clipping", suggested, f"{'; '.join(words)}; {theory}.")


def _factor(seen: Outlook) -> float:
    """The multiple of the plan's norms with the most progress; of those that are nearly as good the one nearest to the plan's."""
    best = max(effect.progress for effect in seen.by_factor.values())
    near = [factor for factor, effect in seen.by_factor.items() if effect.progress >= _NEARLY * best]
    return min(near, key=lambda factor: abs(math.log(factor)))


def _largest(plan: Plan) -> float:
    norm = plan.clipping.max_norm  # type: ignore[attr-defined]
    return float(norm) if isinstance(norm, int | float) else max(norm)


def _learning_rate(plan: Plan, step: Effect, optimizer: Optimizer, weights: float) -> Advice:
    topic = "learning_rate"
    group = optimizer.param_groups[0]
    if not isinstance(optimizer, torch.optim.SGD):
        name = type(optimizer).__name__
        return Advice(
            topic, None, f"{name} scales its steps by itself, so that noise and rate are not tied by a formula."
        )
    if step.noise == 0:
        return Advice(topic, None, "the plan has no noise, so that privacy sets no limit to the rate.")
    if weights == 0:
        return Advice(topic, None, "the initial weights are all 0, and the rule measures the noise against them.")
    kept = _KEPT_BY_MIXING if plan.mixing is not None else 1.0
    walk = _rate(group) * kept * step.noise * math.sqrt(plan.steps)
    low, high = (float(group["lr"]) * share * weights / walk if walk > 0 else math.inf for share in _WALK)
    where = "below" if group["lr"] < low else "above" if group["lr"] > high else "inside"
    momentum = f" with momentum {group['momentum']:g}" if group.get("momentum") else ""
    return Advice(
        topic,
        {"low": low, "high": high},
        f"{group['lr']:g}{momentum} is {where} {low:.2g} to {high:.2g}: over {plan.steps} steps the noise alone moves the "
        f"weights by {walk:.2g}, {walk / weights:.2g} times their initial norm, and three tuned plans stood at {_WALK[0]:g} "
        f"to {_WALK[1]:g} times.",
    )


def _batch_size(plan: Plan, seen: Outlook) -> Advice:
    topic, step = "batch_size", seen.step
    size = plan.sampling.normaliser
    against = f"a step's noise is {step.noise:.2g} and the sampling noise of its batch {step.sampling:.2g}"
    if plan.groups is not None:
        records = (size or 0.0) / plan.groups.count
        return Advice(
            topic, None, f"{against}; a group has {records:g} records: more and smaller groups mean less noise."
        )
    dominates = step.noise > step.sampling
    larger = f"{against}: {'noise' if dominates else 'sampling'} is the larger one"
    sampling = plan.sampling
    if type(sampling) is not PoissonSampling or sampling.dataset_size is None or sampling.expected_batch_size is None:
        return Advice(
            topic, None, f"{larger}; how a larger batch changes the noise is worked out for batches of stated size."
        )
    expected, spent = sampling.expected_batch_size, plan.epsilon()
    if 2 * expected > sampling.dataset_size or not SMALLEST_TARGET <= spent <= LARGEST_TARGET:
        return Advice(topic, expected, f"{larger}; twice the batch at the same epsilon cannot be had.")
    twice = dataclasses.replace(plan, sampling=dataclasses.replace(sampling, expected_batch_size=2 * expected))
    multiplier, now = twice.calibrate(spent).noise.multiplier or 0.0, plan.noise.multiplier or 0.0
    return Advice(
        topic,
        2 * expected if dominates else expected,
        f"{larger}; {2 * expected:g} in as many steps at the same epsilon has {multiplier / now / 2:.2g} times the noise, for "
        "twice the computation.",
    )


def _mixing(plan: Plan, step: Effect, optimizer: Optimizer, weights: float, model: nn.Module) -> Advice:
    """The width ratio (tau / rate) at which the uniform is as large as the Gaussian, and that at which it drowns the weights."""
    assert plan.mixing is not None
    coordinates = sum(parameter.numel() for parameter in trainable(model).values())
    low = math.sqrt(12 / coordinates) * step.noise
    walked = _rate(optimizer.param_groups[0]) * _KEPT_BY_MIXING * math.sqrt(plan.steps)
    high = math.sqrt(12 / coordinates) * _WALK[1] * weights / walked if walked > 0 else math.inf
    width = plan.mixing.width_ratio
    what = "the width follows from epsilon"
    if width != "calibrate":
        where = "below" if width < low else "above" if width > high else "inside"
        what = f"{width:g} is {where} the range"
    if low > high:
        what = "there is no width that helps and is harmless at this rate"
    return Advice(
        "mixing",
        {"low": low, "high": high},
        f"{what}: below {low:.2g} the uniform noise is smaller than the Gaussian and hides little; above {high:.2g} it moves the "
        f"weights in {plan.steps} steps by more than {_WALK[1]:g} times their initial norm of {weights:.2g}.",
    )


def _rate(group: dict[str, Any]) -> float:
    return float(group["lr"]) / (1 - float(group.get("momentum") or 0.0))


def _share(effect: Effect, of: Effect) -> float:
    return effect.progress / of.progress if of.progress > 0 else 1.0


def _noise(step: Effect) -> str:
    least = "" if step.resolved else "at least "
    return f"a step's noise is {least}{step.noise_over_signal:.2g} times the clipped mean gradient"


def _shown(norm: Any) -> str:
    return f"{norm:.3g}" if isinstance(norm, int | float) else ", ".join(f"{one:.3g}" for one in norm)

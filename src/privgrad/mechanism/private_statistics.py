"""Statistics of normalization layers from private records: a charged side release of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from privgrad.errors import PrivgradError, check_count, check_number
from privgrad.gradients.contract import Fold, Identity, LossFn, Request, Sink, Tree, add_weighted
from privgrad.gradients.moments import Watched, unit_moments
from privgrad.mechanism.clipping import ClippingRule, FlatClipping
from privgrad.mechanism.stage import PublicView, Stage, State
from privgrad.mechanism.states import Consumer, Release
from privgrad.mechanism.statistics import in_eval_mode, statistics_of, taking_layers
from privgrad.privacy.sensitivity import Bound

_LARGEST_FACTOR = 10.0
"""One release moves a variance by no more than this, either way: noise may not throw a layer off."""
_MEAN, _VARIANCE = "running_mean", "running_var"


@dataclass(frozen=True)
class PrivateStatistics(Stage):
    """Mean and variance of every channel from noised moments of the private records (the table of arXiv:2006.10919's variants).

    For `nn.PrivateBatchNorm`, in training and at inference; for BatchNorm where groups are clipped, whose training uses the
    group's own statistics, at inference. Until the first release every mean is 0 and every variance 1.

    In a step that releases, the network runs once more, forwards, in eval mode and with the RELEASED statistics mu, sigma^2 in
    all its layers. A unit's vector holds, for each of the K channels of all layers, the means of u and of u^2 - 1 over its
    positions, with u = (x - mu) / sigma, divided by sqrt(K); it is clipped to max_norm. So one norm serves all layers, and wide
    networks as narrow ones: u has no unit, moments near 0 once statistics fit, and the squared norm is a mean over channels
    (about 3 for normal features without positions, less for images).

    max_norm: of a unit's vector; too small biases and slows the estimate, and costs no privacy. every: so many steps apart,
    beginning with the first. decay: of the moving average of moments; the n-th release weighs at least 3 / (n + 2), so that the
    start is soon forgotten. floor: of the variance. A deeper layer's statistics settle after those before it.

    Guarantee: a unit's vector lies in the ball of radius max_norm, and depends on the unit, the weights and earlier releases
    only: one more part of the step's Gaussian. `noise.side_share` says what of the budget it gets in steps that release; in the
    others the gradient gets all of it. What is installed is post-processing of releases.
    """

    kind: ClassVar[str] = "private"

    max_norm: float = 0.5
    every: int = 1
    decay: float = 0.99
    floor: float = 1e-3

    def __post_init__(self) -> None:
        check_number("statistics.max_norm", self.max_norm, above=0)
        check_count("statistics.every", self.every)
        check_number("statistics.decay", self.decay, at_least=0, below=1)
        check_number("statistics.floor", self.floor, above=0)

    def refresh(self, state: State, view: PublicView) -> State:
        return state if state else self._start(view.model)

    def final(self, state: State, view: PublicView) -> State:
        return self.refresh(state, view)

    def install(self, model: nn.Module, state: State) -> None:
        for name, value in statistics_of(taking_layers(model)):
            value.copy_(state[name])

    def side_bound(self) -> Bound:
        return Bound.ball(self.max_norm)

    def side_size(self, state: State, step: int) -> int:
        return 0 if (step - 1) % self.every else 2 * _channels(state)

    def add_side(
        self,
        state: State,
        model: nn.Module,
        loss_fn: LossFn,
        batch: Tree,
        fold: Fold,
        sink: Sink,
        slot: str,
        *,
        grouped: bool,
    ) -> None:
        taking = taking_layers(model)
        layers = [_watched(taking[name.removesuffix(f".{_MEAN}")], name, state) for name in _means(state)]
        rule = ClippingRule(FlatClipping(self.max_norm), torch.tensor([self.max_norm], dtype=torch.float64))
        scale = 1 / math.sqrt(_channels(state))
        with in_eval_mode(model):
            for moments in unit_moments(model, loss_fn, batch, fold, layers, together=grouped):
                units = Fold.identity(len(moments))
                add_weighted(Request(None, units, Identity({}), [(slot,)], rule, sink), {slot: moments * scale})

    def update(self, state: State, release: Release) -> State:
        noised = (release.side or {}).get(Consumer.STATISTICS)
        if not noised:
            return state
        (total,) = noised.values()
        found = total * (math.sqrt(_channels(state)) / release.divisor)
        releases = int(state["releases"])
        keep = min(self.decay, releases / (releases + 3))
        updated: dict[str, Tensor] = {"releases": torch.tensor(releases + 1)}
        names = _means(state)
        for name, part in zip(names, torch.split(found, [2 * len(state[name]) for name in names]), strict=True):
            mean, variance = state[name], state[_variance(name)]
            # A moving average of the moments of u, in which what is known already has 0 and 1.
            first, second = ((1 - keep) * moment.to(mean) for moment in part.chunk(2))
            factor = (1 + second - first.square()).clamp(1 / _LARGEST_FACTOR, _LARGEST_FACTOR)
            updated[name] = mean + variance.sqrt() * first
            updated[_variance(name)] = (variance * factor).clamp(min=self.floor)
        return updated

    def _start(self, model: nn.Module) -> State:
        layers = taking_layers(model)
        if not layers:
            raise PrivgradError(
                "plan.statistics is given, and the model has no layer that takes statistics; leave it out, or use "
                "nn.convert(model, to='private_statistics') where the model has BatchNorm"
            )
        state: dict[str, Tensor] = {"releases": torch.tensor(0)}
        for name, value in statistics_of(layers):
            start = torch.zeros_like if name.endswith(_MEAN) else torch.ones_like
            state[name] = start(value, dtype=torch.promote_types(value.dtype, torch.float32))
        return state

    @property
    def words(self) -> str:
        when = "in every step" if self.every == 1 else f"every {self.every} steps"
        return (
            "normalization layers take their statistics from noised first and second moments of their inputs on the private "
            f"{{unit}}s (each contribution scaled down to an l2 norm of at most {self.max_norm:g} over all layers); they are "
            f"part of the release, and of its noise multiplier, {when}"
        )


def _means(state: State) -> list[str]:
    """The names of all means, in the order of the vector."""
    return [name for name in state if name.endswith(_MEAN)]


def _variance(mean: str) -> str:
    return mean.removesuffix(_MEAN) + _VARIANCE


def _channels(state: State) -> int:
    """K: of all layers together."""
    return sum(len(state[name]) for name in _means(state))


def _watched(layer: Any, name: str, state: State) -> Watched:
    device = layer.running_mean.device
    return Watched(layer, state[name].to(device), state[_variance(name)].to(device).sqrt())

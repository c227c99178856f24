"""Where normalization layers take their statistics from: a public batch, sent through the network at the same weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from privgrad.errors import PrivgradError, check_count, check_number
from privgrad.gradients.contract import LossFn
from privgrad.mechanism.stage import PublicView, Stage, State

NEEDS_STATISTICS = "needs_statistics"
"""An attribute of layers (true) that take `running_mean` and `running_var` from a statistics stage."""


@dataclass(frozen=True)
class PublicStatistics(Stage):
    """Mean and variance of every channel over a fixed PUBLIC batch, at the weights of the step (arXiv:2006.10919, repaired).

    For `nn.PublicBatchNorm` layers in training and at inference; for BatchNorm where groups are clipped, whose training uses the
    group's own statistics, at inference. rows: the first so many public records. every: so many steps apart; the final weights
    always get statistics of their own. floor: of the variance: a channel dead on public data would blow private ones up.

    Guarantee: costs no privacy. The statistics are a function of public data and released weights, so that a record's
    gradient depends on itself, the weights and public data only.
    """

    kind: ClassVar[str] = "public_batch"
    needs_public: ClassVar[bool] = True

    rows: int = 128
    every: int = 1
    floor: float = 1e-3

    def __post_init__(self) -> None:
        check_count("statistics.rows", self.rows, at_least=2)
        check_count("statistics.every", self.every)
        check_number("statistics.floor", self.floor, above=0)

    def refresh(self, state: State, view: PublicView) -> State:
        if state and view.step % self.every:
            return state
        return self.final(state, view)

    def final(self, state: State, view: PublicView) -> State:
        return self.measured(view.model, view.loss_fn, view.public)

    def measured(self, model: nn.Module, loss_fn: LossFn, public: Any) -> State:
        """The statistics of the first `rows` of a public batch at the model's weights of now, which the model then has."""
        device = next(model.parameters()).device
        batch = pytree.tree_map(lambda leaf: leaf[: self.rows].to(device) if isinstance(leaf, Tensor) else leaf, public)
        layers = taking_layers(model)
        if not layers:
            raise PrivgradError(
                "plan.statistics is given, and the model has no layer that takes statistics; leave it out, or use "
                "nn.convert(model, to='public_batch') where the model has BatchNorm"
            )
        with torch.no_grad(), in_eval_mode(model), _measuring(layers, self.floor):
            loss_fn(model, batch)
        return {name: value.clone() for name, value in statistics_of(layers)}

    def install(self, model: nn.Module, state: State) -> None:
        for name, value in statistics_of(taking_layers(model)):
            value.copy_(state[name])

    @property
    def words(self) -> str:
        return f"normalization layers take their statistics from {self.rows} public records, at the weights of the step"


def taking_layers(model: nn.Module) -> Mapping[str, Any]:
    """The layers that a statistics stage serves, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if getattr(module, NEEDS_STATISTICS, False)
        or (isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None)
    }


def statistics_of(layers: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The statistics of layers, by name."""
    for name, layer in layers.items():
        yield f"{name}.running_mean", layer.running_mean
        yield f"{name}.running_var", layer.running_var


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside, every module is in eval mode; afterwards each is in its own again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _measuring(layers: Mapping[str, Any], floor: float) -> Iterator[None]:
    """Inside, a layer's input first becomes its statistics, so that later layers see what they will see in training."""

    def measure(name: str) -> Any:
        def before(layer: Any, inputs: tuple[Tensor, ...]) -> None:
            (values,) = inputs
            others = [dimension for dimension in range(values.dim()) if dimension != 1]
            variance, mean = torch.var_mean(values.to(layer.running_mean.dtype), others, correction=0)
            if not bool((mean.isfinite() & variance.isfinite()).all()):
                raise PrivgradError(f"the public batch gives {name} statistics that are not finite")
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(variance.clamp(min=floor))

        return before

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_pre_hook(measure(name)).remove)
        yield

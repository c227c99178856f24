"""Averages of the weights over training: post-processing of releases, so they cost no privacy and remove noise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from privgrad.errors import check_number
from privgrad.gradients.contract import trainable


@dataclass(frozen=True)
class ExponentialAverage:
    """a <- d a + (1 - d) w after each step, with d = min(decay, (1 + k) / (10 + k)) in step k, so that the start is forgotten.

    Guarantee: a function of released weights only.
    """

    kind: ClassVar[str] = "ema"

    decay: float = 0.95

    def __post_init__(self) -> None:
        check_number("training.averaging.decay", self.decay, at_least=0, below=1)


class AveragedWeights:
    """The running average of a model's trainable parameters."""

    def __init__(self, model: nn.Module, rule: ExponentialAverage) -> None:
        self._model = model
        self._rule = rule
        self.values = {name: parameter.detach().clone() for name, parameter in trainable(model).items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after applied step `step` (from 1)."""
        decay = min(self._rule.decay, (1 + step) / (10 + step))
        for name, parameter in trainable(self._model).items():
            self.values[name].lerp_(parameter, 1 - decay)

    def restore(self, values: dict[str, Tensor]) -> None:
        """Go on from a checkpoint."""
        for name, value in values.items():
            self.values[name].copy_(value)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model holds the averaged weights inside, its own again afterwards."""
        own = {name: parameter.detach().clone() for name, parameter in trainable(self._model).items()}
        self.copy_to_model()
        try:
            yield
        finally:
            _copy(self._model, own)

    def copy_to_model(self) -> None:
        """Make the averaged weights the model's."""
        _copy(self._model, self.values)


@torch.no_grad()
def _copy(model: nn.Module, values: dict[str, Tensor]) -> None:
    for name, parameter in trainable(model).items():
        parameter.copy_(values[name])

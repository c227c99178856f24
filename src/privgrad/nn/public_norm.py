"""BatchNorm's arithmetic with statistics that are given, so that no record of a batch sees another."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm


class FrozenBatchNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias for each channel, with given statistics, also in train mode.

    Inputs [rows, channels, ...] of any number of further dimensions. The affine weights are trained, the statistics are not.

    Guarantee: a row's output depends on that row, the weights and the given statistics only. Whether those are public (from
    pretraining on public data) is the user's word.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5, *, affine: bool = True) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    @classmethod
    def of(cls, layer: _BatchNorm) -> FrozenBatchNorm:
        """In the place of a BatchNorm layer: with its weights, and its statistics where it has some."""
        norm = cls(layer.num_features, layer.eps, affine=layer.affine)
        norm.weight, norm.bias = layer.weight, layer.bias
        like = layer.weight if layer.running_mean is None else layer.running_mean
        if like is not None:
            norm.running_mean, norm.running_var = norm.running_mean.to(like), norm.running_var.to(like)
        if layer.running_mean is not None and layer.running_var is not None:
            norm.running_mean.copy_(layer.running_mean)
            norm.running_var.copy_(layer.running_var)
        return norm.train(layer.training)

    def forward(self, inputs: Tensor) -> Tensor:
        """[rows, channels, ...] to the same shape."""
        mean, variance = self.running_mean, self.running_var
        return functional.batch_norm(inputs, mean, variance, self.weight, self.bias, False, 0.0, self.eps)

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"{self.num_features}, eps={self.eps:g}, affine={self.weight is not None}"


class PublicBatchNorm(FrozenBatchNorm):
    """As `FrozenBatchNorm`, with the statistics of a public batch at the weights of the step (arXiv:2006.10919, repaired).

    The plan's `statistics = public_batch` measures them before each step and at the end; a plan without it is refused. The
    paper's code normalises over public and private rows together, which couples private rows; this layer cannot. Give the
    layer before it no bias: the mean takes it away.
    """

    needs_statistics: ClassVar[bool] = True


class PrivateBatchNorm(FrozenBatchNorm):
    """As `FrozenBatchNorm`, with statistics that the plan's steps release: noised moments of private records, charged.

    The plan's `statistics = private` measures them; a plan without statistics is refused. What the layer had is forgotten when
    training starts: mean 0 and variance 1 until the first release.
    """

    needs_statistics: ClassVar[bool] = True


def without_statistics(model: nn.Module) -> list[str]:
    """BatchNorm layers in train mode that keep running statistics and have none yet: at inference they would do nothing."""
    return [
        name or "the model itself"
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        and module.training
        and module.running_mean is not None
        and not bool(module.running_mean.any())
    ]

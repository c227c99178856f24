"""Matrix products by whichever of torch's two CPU libraries has the faster kernel for this processor.

torch multiplies float32 matrices by MKL, which leaves half of the registers of an AVX-512 processor unused unless Intel made it;
oneDNN, which torch brings along for convolutions, uses all of them. The choice rests on the processor and on shapes, never on a
clock: the same training gives the same numbers again. `torch.backends.mkldnn.enabled = False` turns it off.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_LARGE = 2**25
"""Multiplications from which a product of a new shape is faster, although oneDNN first compiles a kernel for it (measured)."""
_LARGE_EACH = 2**22
"""The same for products whose shape comes again for every unit of every step."""
_NARROW = 16
"""A matrix with fewer rows or columns is near enough to a vector that memory decides, not registers."""

Product = Callable[..., Tensor]


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear for inputs [n, d] and weight [p, d], with gradients."""
    if _chosen((*inputs.shape, len(weight)), _LARGE, inputs, weight) is None:
        return F.linear(inputs, weight, bias)
    result: Tensor = _Linear.apply(inputs, weight, bias)  # type: ignore[no-untyped-call]
    return result


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left [m, k] times right [k, n] to `total` [m, n]. No gradient."""
    multiply = _chosen((*left.shape, right.shape[1]), _LARGE, left, right, total)
    if multiply is None:
        total.addmm_(left, right)
    else:
        total += multiply(left, right.T)


def products(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """left [units, m, k] times right [units, k, n] into `out` [units, m, n], which is returned. No gradient."""
    multiply = _chosen((*left.shape[1:], right.shape[2]), _LARGE_EACH, left, right, out)
    if multiply is None:
        return torch.bmm(left, right, out=out)
    for one, other, place in zip(left, right, out, strict=True):
        place.copy_(multiply(one, other.T))
    return out


@cache
def _onednn() -> Product | None:
    """oneDNN's x [m, k], w [n, k], bias [n] -> x w^T + bias, where it is there, right, and faster; else None."""
    backends = torch.backends
    if not (backends.mkldnn.is_available() and backends.mkl.is_available()):  # type: ignore[no-untyped-call]
        return None
    if backends.cpu.get_cpu_capability() != "AVX512" or "GenuineIntel" in _processor():
        return None

    def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
        return result

    # No public name: so whether it still does what it did is looked at, on integers, which leave nothing to rounding.
    left = torch.arange(12.0).view(3, 4)
    right, bias = torch.arange(20.0).view(4, 5), torch.arange(5.0)
    try:
        same = torch.equal(linear(left, right.T, bias), left @ right + bias)
    except (AttributeError, RuntimeError):
        return None
    return linear if same else None


def _processor() -> str:
    """What the system says of the processor, its maker included."""
    about = Path("/proc/cpuinfo")
    return about.read_text(errors="replace") if about.exists() else platform.processor()


def _chosen(sizes: Sequence[int], least: int, *tensors: Tensor) -> Product | None:
    """oneDNN's product for float32 tensors on a CPU, outside of autocast, where it is worth it. sizes: m, k and n."""
    if math.prod(sizes) < least or min(sizes) < _NARROW or torch.is_autocast_enabled("cpu"):
        return None
    if not torch.backends.mkldnn.enabled:
        return None
    if any(tensor.dtype != torch.float32 or tensor.device.type != "cpu" for tensor in tensors):
        return None
    return _onednn()


class _Linear(torch.autograd.Function):
    """By oneDNN, as are its gradients, which have gradients in turn."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs if ctx.needs_input_grad[1] else None, weight)
        multiply = _onednn()
        assert multiply is not None
        return multiply(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        inputs, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (
            linear(gradient, weight.T) if wanted[0] else None,
            linear(gradient.T, inputs.T) if wanted[1] else None,
            gradient.sum(0) if wanted[2] else None,
        )

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
_MULTIPLE = 32
"""Rows and positions, which differ from batch to batch, go in multiples of so many: oneDNN keeps half a MiB for each shape."""
_NARROW = 16
"""A matrix with fewer rows or columns is near enough to a vector that memory decides, not registers."""
_INNER = 128
"""So many numbers of an inner product are added up in single precision: a norm that cancels is the last digits of a few."""

Product = Callable[..., Tensor]


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear for inputs [n, d] and weight [p, d], with gradients."""
    # oneDNN reads a bias as it lies in memory, whatever its strides say.
    readable = bias is None or (bias.shape == weight.shape[:1] and bias.dtype == weight.dtype and bias.is_contiguous())
    if not readable or _chosen((*inputs.shape, len(weight)), _LARGE, inputs, weight) is None:
        return F.linear(inputs, weight, bias)
    result: Tensor = _Linear.apply(inputs, weight, bias)  # type: ignore[no-untyped-call]
    return result


def weighted_product(left: Tensor, weights: Tensor, right: Tensor, total: Tensor | None = None) -> Tensor:
    """left^T diag(weights) right of left [n, p], weights [n], right [n, d]; added to `total` [p, d] if given. No gradient."""
    multiply = _chosen((left.shape[1], *right.shape), _LARGE, left, right)
    whole = len(left) // _MULTIPLE * _MULTIPLE
    if multiply is None or not whole:
        left, right = _weighted(left, weights, right)
        return left.T @ right if total is None else total.addmm_(left.T, right)
    # oneDNN would copy a left matrix whose rows do not lie side by side: the copy is made here, and is the one that is weighted.
    copy = left[:whole].T.clone(memory_format=torch.contiguous_format).mul_(weights[:whole])
    result = multiply(copy, _plain(right[:whole].T))
    if whole < len(left):
        left, right = _weighted(left[whole:], weights[whole:], right[whole:])
        result.addmm_(left.T, right)
    return result if total is None else total.add_(result)


def _weighted(left: Tensor, weights: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The smaller of two matrices [n, ...] with its rows weighted."""
    weights = weights.view(-1, 1)
    return (left * weights, right) if left.shape[1] <= right.shape[1] else (left, right * weights)


def batched_product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """left [units, m, k] times right [units, k, n], into `out` [units, m, n] where it is given. No gradient."""
    if out is None:
        out = left.new_empty(*left.shape[:2], right.shape[2])
    multiply = _chosen((*left.shape[1:], right.shape[2]), _LARGE_EACH, left, right, out)
    count = right.shape[1]
    whole = count // _MULTIPLE * _MULTIPLE
    if multiply is None or not whole:
        return torch.bmm(left, right, out=out)
    for one, other, place in zip(left, right, out, strict=True):
        place.copy_(multiply(one[:, :whole], _plain(other[:whole].T)))
        if whole < count:
            place.addmm_(one[:, whole:], other[whole:])
    return out


def gram(one: Tensor, other: Tensor) -> Tensor:
    """[units, T, S], in double precision, of [units, T, n] and [units, S, n]: inner products over n, by slices of `_INNER`."""
    slices = zip(torch.split(one, _INNER, 2), torch.split(other, _INNER, 2), strict=True)
    first, *others = (torch.bmm(left, right.transpose(1, 2)) for left, right in slices)
    total = first.double()
    for product in others:
        total += product
    return total


def added(places: Tensor, rows: Tensor, count: int) -> Tensor:
    """[count, d] in double precision, of rows [..., d]: a million in single precision, in order, lose a tenth of their sum."""
    total = torch.zeros(count, rows.shape[-1], device=rows.device, dtype=torch.float64)
    return total.index_add_(0, places.flatten(), rows.flatten(0, -2).double())


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

    # No public name: so whether it still does what it did is looked at, on small integers, which leave nothing to rounding.
    numbers = torch.arange(32 * 48 + 48 * 64 + 64, dtype=torch.float32, device="cpu") % 13
    left, right, bias = numbers[: 32 * 48].view(32, 48), numbers[32 * 48 : -64].view(48, 64), numbers[-64:]
    try:
        same = torch.equal(linear(left, right.T, bias), left @ right + bias)
    except (AttributeError, RuntimeError):
        return None
    return linear if same else None


def _processor() -> str:
    """What the system says of the processor, its maker included."""
    try:
        return Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return platform.processor()


def _chosen(sizes: Sequence[int], least: int, *tensors: Tensor) -> Product | None:
    """oneDNN's product for float32 tensors on a CPU, outside of autocast, where it is worth it. sizes: m, k and n."""
    if math.prod(sizes) < least or min(sizes) < _NARROW or torch.is_autocast_enabled("cpu"):
        return None
    if not torch.backends.mkldnn.enabled:
        return None
    if any(tensor.dtype != torch.float32 or tensor.device.type != "cpu" for tensor in tensors):
        return None
    return _onednn()


def _plain(matrix: Tensor) -> Tensor:
    """A matrix whose rows or columns lie one after the other: oneDNN refuses windows that overlap."""
    return matrix if matrix.is_contiguous() or matrix.T.is_contiguous() else matrix.contiguous()


class _Linear(torch.autograd.Function):
    """By oneDNN, as are its gradients, which have gradients in turn."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs if ctx.needs_input_grad[1] else None, weight)
        multiply = _onednn()
        assert multiply is not None
        missing = -len(inputs) % _MULTIPLE
        padded = F.pad(inputs, (0, 0, 0, missing)) if missing else inputs
        output = multiply(padded, _plain(weight), bias)
        return output.resize_(len(inputs), len(weight)) if missing else output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        inputs, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (
            linear(gradient, weight.T) if wanted[0] else None,
            linear(gradient.T, inputs.T) if wanted[1] else None,
            gradient.sum(0) if wanted[2] else None,
        )

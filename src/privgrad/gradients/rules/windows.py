"""The windows that a convolution's output positions see, and inner products between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Geometry:
    """What a convolution is apart from its tensors. images: how many of them make one unit."""

    shape: torch.Size
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    images: int

    @property
    def dims(self) -> int:
        """Spatial dimensions."""
        return len(self.stride)


def pixels(inputs: Tensor, geometry: Geometry) -> int:
    """How many pixels, padding included, one unit has."""
    return geometry.images * math.prod(_padded(inputs, geometry))


def operations(inputs: Tensor, geometry: Geometry) -> int:
    """Multiplications that `gram` takes for one unit."""
    return min(_by_pixels(inputs, geometry), _by_windows(inputs, geometry))


def gram(inputs: Tensor, geometry: Geometry) -> Tensor:
    """[units, T, T]: inner products between the windows of a unit's T output positions. Without groups.

    Windows that overlap share products: the Gram matrix of the pixels is formed once, and summed along its diagonals.
    Where strides leave little overlap, the windows are copied out.
    """
    units, sides = len(inputs) // geometry.images, [side for side in reversed(geometry.padding) for _ in range(2)]
    if _by_windows(inputs, geometry) < _by_pixels(inputs, geometry):
        padded, sizes = F.pad(inputs, sides), _padded(inputs, geometry)
        copied = _windows(padded, geometry).view(units, geometry.images, -1, math.prod(_positions(sizes, geometry)))
        columns = copied.transpose(1, 2).flatten(2)
        return torch.bmm(columns.transpose(1, 2), columns)
    points = inputs.reshape(units, geometry.images, inputs.shape[1], -1).transpose(1, 2).flatten(2)
    each = (geometry.images, *inputs.shape[2:])
    # Products with the zeros of the padding are zeros: they are put around the products of what is there.
    sums = F.pad(torch.bmm(points.transpose(1, 2), points).view(units, *each, *each), [*sides, 0, 0, *sides])
    for dim, positions in enumerate(_positions(_padded(inputs, geometry), geometry)):
        sums = _along_diagonals(sums, dim, positions, geometry)
    return sums.flatten(2 + geometry.dims).flatten(1, 1 + geometry.dims)


def _along_diagonals(sums: Tensor, dim: int, positions: int, geometry: Geometry) -> Tensor:
    """Sum over the kernel's offsets in one dimension, which shift both windows alike."""
    stride, dilation = geometry.stride[dim], geometry.dilation[dim]
    one, other = 2 + dim, 3 + dim + geometry.dims
    total = None
    for offset in range(0, dilation * geometry.shape[2 + dim], dilation):
        part = slice(offset, offset + stride * (positions - 1) + 1, stride)
        shifted = sums[(slice(None),) * one + (part,)][(slice(None),) * other + (part,)]
        total = shifted if total is None else total + shifted
    assert total is not None
    return total


def _padded(inputs: Tensor, geometry: Geometry) -> list[int]:
    """The size in each dimension, padding included."""
    return [size + 2 * padding for size, padding in zip(inputs.shape[2:], geometry.padding, strict=True)]


def _positions(sizes: Sequence[int], geometry: Geometry) -> list[int]:
    """Output positions in each dimension."""
    each = zip(sizes, geometry.shape[2:], geometry.stride, geometry.dilation, strict=True)
    return [(size - dilation * (kernel - 1) - 1) // stride + 1 for size, kernel, stride, dilation in each]


def _windows(padded: Tensor, geometry: Geometry) -> Tensor:
    """[images, c * kernel, positions]. A strided view, copied once: several times faster than F.unfold, in any dimension."""
    each = zip(geometry.shape[2:], geometry.stride, geometry.dilation, strict=True)
    windows = padded
    for dim, (kernel, stride, dilation) in enumerate(each, start=2):
        windows = windows.unfold(dim, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    dims = geometry.dims
    order = [0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims)]
    return windows.permute(order).reshape(len(padded), padded.shape[1] * math.prod(geometry.shape[2:]), -1)


def _by_pixels(inputs: Tensor, geometry: Geometry) -> int:
    return (geometry.images * math.prod(inputs.shape[2:])) ** 2 * inputs.shape[1]


def _by_windows(inputs: Tensor, geometry: Geometry) -> int:
    positions = geometry.images * math.prod(_positions(_padded(inputs, geometry), geometry))
    return positions**2 * math.prod(geometry.shape[1:])

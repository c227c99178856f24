"""Convolutions of 1 to 3 dimensions, and transposed ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from privgrad.gradients.catching import Rule, Scope, is_batched
from privgrad.gradients.collector import Weight
from privgrad.gradients.terms import Folding, Outer, Rows, Term, select, wide

_FEW_POSITIONS = 128
_MANY_NUMBERS = 100_000
"""From so many weights on, and up to so many output positions, Gram matrices beat the gradients themselves (measured on CPUs)."""


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


@dataclass
class Convolution:
    """A convolution's weight gradients, from inputs [units * images, c, ...] and output gradients [units * images, p, ...]."""

    inputs: Tensor
    gradient: Tensor
    geometry: Geometry

    def dense(self) -> Tensor:
        """One call with as many groups as images: the groups of the weight gradient are the images' gradients."""
        images, shape = len(self.inputs), self.geometry.shape
        inputs = self.inputs.reshape(1, -1, *self.inputs.shape[2:])
        gradient = self.gradient.reshape(1, -1, *self.gradient.shape[2:])
        weight = inputs.new_empty(1).expand(images * shape[0], *shape[1:])
        rows = _weight_gradient(inputs, gradient, weight, self.geometry, images * self.geometry.groups)
        rows = rows.view(-1, self.geometry.images, *shape)
        return rows.squeeze(1) if self.geometry.images == 1 else rows.sum(1)

    def squares(self) -> Tensor:
        return self._product().squares()

    def weighted_sum(self, weights: Tensor, dropped: Tensor | None) -> Tensor:
        images = self.geometry.images
        dropped = None if dropped is None else dropped.repeat_interleave(images)
        inputs, gradient = select(self.inputs, dropped), select(self.gradient, dropped)
        factor = weights.to(gradient).repeat_interleave(images).view(-1, *[1] * (gradient.dim() - 1))
        weight = inputs.new_empty(1).expand(self.geometry.shape)
        return _weight_gradient(inputs, gradient * factor, weight, self.geometry, self.geometry.groups)

    def folded(self, folding: Folding) -> Term:
        if folding.each is None:
            return Rows(folding.sum(self.dense()))
        return replace(self, geometry=replace(self.geometry, images=self.geometry.images * folding.each))

    def kept(self) -> Term:
        positions = self.geometry.images * math.prod(self.gradient.shape[2:])
        if self.geometry.groups == 1 and positions <= _FEW_POSITIONS and math.prod(self.geometry.shape) > _MANY_NUMBERS:
            return self
        return Rows(self.dense())

    def _product(self) -> Outer:
        """The same as outer products of output gradients and the windows that they saw."""
        windows = _windows(self.inputs, self.geometry)
        left = self.gradient.flatten(2)
        if self.geometry.images > 1:
            images = self.geometry.images
            windows, left = (t.reshape(-1, images, *t.shape[1:]).transpose(1, 2).flatten(2) for t in (windows, left))
        return Outer(left.transpose(1, 2), windows.transpose(1, 2))


def _weight_gradient(inputs: Tensor, gradient: Tensor, weight: Tensor, geometry: Geometry, groups: int) -> Tensor:
    result: Tensor = torch.ops.aten.convolution_backward(
        gradient,
        inputs,
        weight,
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        False,
        [0] * geometry.dims,
        groups,
        [False, True, False],
    )[1]
    return result


def _windows(inputs: Tensor, geometry: Geometry) -> Tensor:
    """[images, c * kernel, positions]. A strided view, copied once: several times faster than F.unfold, in any dimension."""
    sides = [side for side in reversed(geometry.padding) for _ in range(2)]
    windows = F.pad(inputs, sides)
    for dim, (kernel, stride, dilation) in enumerate(
        zip(geometry.shape[2:], geometry.stride, geometry.dilation, strict=True), start=2
    ):
        windows = windows.unfold(dim, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    dims = geometry.dims
    order = [0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims)]
    return windows.permute(order).reshape(len(inputs), inputs.shape[1] * math.prod(geometry.shape[2:]), -1)


def _convolution(dims: int, operator: Callable[..., Tensor]) -> Rule:
    def convolution(
        scope: Scope,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        if not is_batched(input) or is_batched(weight) or is_batched(bias):
            return NotImplemented
        stride, dilation = _each(stride, dims), _each(dilation, dims)
        if isinstance(padding, str):
            input, padding = _padded(input, weight, padding, dilation, dims)
        padding = _each(padding, dims)

        def on_rows(rows: int, inputs: Tensor) -> Tensor:
            images = inputs.flatten(0, -dims - 2)
            output = operator(images, scope.value(weight), _value(scope, bias), stride, padding, dilation, groups)
            geometry = Geometry(weight.shape, stride, padding, dilation, groups, len(images) // rows)
            caught = _caught(scope, output, images, weight, bias, geometry, rows, transposed=False)
            return caught.view(*inputs.shape[: -dims - 1], *caught.shape[1:])

        return scope.on_rows(on_rows, input)

    return convolution


def _transposed(dims: int, operator: Callable[..., Tensor]) -> Rule:
    def transposed_convolution(
        scope: Scope,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Any:
        if not is_batched(input) or is_batched(weight) or is_batched(bias):
            return NotImplemented
        stride, padding, dilation = _each(stride, dims), _each(padding, dims), _each(dilation, dims)

        def on_rows(rows: int, inputs: Tensor) -> Tensor:
            images = inputs.flatten(0, -dims - 2)
            output = operator(
                images, scope.value(weight), _value(scope, bias), stride, padding, output_padding, groups, dilation
            )
            geometry = Geometry(weight.shape, stride, padding, dilation, groups, len(images) // rows)
            caught = _caught(scope, output, images, weight, bias, geometry, rows, transposed=True)
            return caught.view(*inputs.shape[: -dims - 1], *caught.shape[1:])

        return scope.on_rows(on_rows, input)

    return transposed_convolution


def _caught(
    scope: Scope,
    output: Tensor,
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    rows: int,
    *,
    transposed: bool,
) -> Tensor:
    owner = scope.weight(weight)
    bias_owner = None if bias is None else scope.weight(bias)

    def terms(gradient: Tensor, *saved: Tensor) -> Iterator[tuple[Weight, Term]]:
        spread = scope.scaled(gradient, rows)
        if owner is not None:
            gradients, inputs = spread.flatten(0, 1), wide(saved[0])
            # A transposed convolution is a convolution backwards: what goes in and what comes out change places.
            if transposed:
                gradients, inputs = inputs, gradients
            yield owner, Convolution(inputs, gradients, geometry)
        if bias_owner is not None:
            yield bias_owner, Rows(spread.transpose(1, 2).flatten(2).sum(2))

    saved = (images.to(output.dtype),) if owner is not None else ()
    return scope.catch(output, [owner, bias_owner], terms, *saved)


def _value(scope: Scope, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else scope.value(tensor)


def _each(value: Any, dims: int) -> list[int]:
    """One number per dimension."""
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values


def _padded(
    inputs: Tensor, weight: Tensor, padding: str, dilation: Sequence[int], dims: int
) -> tuple[Tensor, list[int]]:
    """The input as padding="same" or "valid" want it, which may be uneven."""
    if padding != "same":
        return inputs, [0] * dims
    totals = [step * (kernel - 1) for step, kernel in zip(dilation, weight.shape[2:], strict=True)]
    sides = [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    return F.pad(inputs, sides), [0] * dims


RULES: Mapping[Any, Rule] = {
    F.conv1d: _convolution(1, F.conv1d),
    F.conv2d: _convolution(2, F.conv2d),
    F.conv3d: _convolution(3, F.conv3d),
    F.conv_transpose1d: _transposed(1, F.conv_transpose1d),
    F.conv_transpose2d: _transposed(2, F.conv_transpose2d),
    F.conv_transpose3d: _transposed(3, F.conv_transpose3d),
}

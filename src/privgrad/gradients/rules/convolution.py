"""Convolutions of 1 to 3 dimensions, and transposed ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from privgrad.gradients.batched import is_batched
from privgrad.gradients.catching import Rule, Scope
from privgrad.gradients.collector import Weight
from privgrad.gradients.folding import Folding
from privgrad.gradients.norms import TRUSTED, hidden, select, upwards, wide
from privgrad.gradients.precision import exact_convolutions
from privgrad.gradients.products import batched_product, gram
from privgrad.gradients.rows import Rows, Take, Turned, turned
from privgrad.gradients.rules import windows
from privgrad.gradients.rules.windows import Geometry
from privgrad.gradients.terms import Share, Term

_IMAGES_AT_ONCE = 32
_NUMBERS_AT_ONCE = 600_000
"""How many images, and weight gradients in numbers, one grouped convolution may have (measured on CPUs)."""

_HALF, _LANES = 8, 16
"""oneDNN's fast kernels have so many channels in a register, or half: what is missing is filled up here, or by slower kernels."""

_MANY_WEIGHTS = 100_000
_SHARE = 0.35
"""From so many weights on, a Gram matrix of so many operations at most is cheaper than the gradients (measured on CPUs)."""


@dataclass
class Convolution:
    """A convolution's weight gradients, from inputs [units * images, c, ...] and output gradients [units * images, p, ...]."""

    inputs: Tensor
    gradient: Tensor
    geometry: Geometry

    def dense(self) -> Tensor:
        return self._multiplied_out(lambda units, shape, like: like.new_empty(units, *shape)).dense()

    def masked(self, mask: Tensor, take: Take) -> Rows | Turned:
        return self._multiplied_out(take, mask)

    def _multiplied_out(self, take: Take, mask: Tensor | None = None) -> Rows | Turned:
        reverse = self._reverse()
        if reverse is None:
            return _of_each(self.inputs, self.gradient, self.geometry, mask, take, self._filled())
        mask = None if mask is None else turned(mask, self.geometry.dims)
        backwards = _of_each(self.gradient, self.inputs, reverse, mask, take, reverse.shape[0])
        return Turned(backwards.gradient, backwards.known)

    def _filled(self) -> int:
        """Rows with those of zeros that make the fast kernels take them."""
        geometry, (rows, channels) = self.geometry, self.geometry.shape[:2]
        if geometry.groups > 1 or channels % _LANES or self.inputs.is_cuda or math.prod(geometry.shape[2:]) == 1:
            return rows
        return _HALF if rows <= _HALF else -(-rows // _LANES) * _LANES

    def _reverse(self) -> Geometry | None:
        """For few rows, with which oneDNN is slow: the geometry in which input and output gradient have changed places.

        Row o, channel i at offset k is the sum over t of gradient[o, t] inputs[i, t + k - p], and that over s of inputs[i, s]
        gradient[o, s + k' - p'] with k' = K - 1 - k and p' = K - 1 - p: the same, backwards (K - 1 times the dilation).
        """
        geometry, (rows, channels, *kernel) = self.geometry, self.geometry.shape
        if 2 * rows >= channels or rows % _HALF == 0 or geometry.groups > 1 or self.inputs.is_cuda:
            return None
        # Backwards each row costs the same; filled up, all rows together do, and the more so the smaller the image is.
        full, pixels = rows / self._filled(), math.prod(self.gradient.shape[2:])
        if math.prod(kernel) == 1 or (channels % _LANES == 0 and full**3 * pixels > channels):
            return None
        spans = [step * (size - 1) for step, size in zip(geometry.dilation, kernel, strict=True)]
        padding = [span - pad for span, pad in zip(spans, geometry.padding, strict=True)]
        if max(geometry.stride) > 1 or min(padding) < 0:
            return None
        return replace(geometry, shape=torch.Size([channels, rows, *kernel]), padding=padding)

    def squares(self) -> Tensor:
        """By the Gram matrices of output gradients and of the windows that they saw, a few units at a time."""
        if self.geometry.groups > 1:
            return Rows(self.dense()).squares()
        images = self.geometry.images
        some = images * max(1, _NUMBERS_AT_ONCE // windows.pixels(self.inputs, self.geometry) ** 2)
        parts = [self._part(first, first + some)._gram_squares() for first in range(0, len(self.inputs), some)]
        return torch.cat(parts)

    def _gram_squares(self) -> Tensor:
        left, right = self._positions(self.gradient), windows.gram(self.inputs, self.geometry)
        rows_gram = gram(left.transpose(1, 2), left.transpose(1, 2))
        squares: Tensor = torch.linalg.vecdot(rows_gram.flatten(1), right.double().flatten(1)).to(left.dtype)
        # Nothing cancels between a position's window and itself: its length is the diagonal.
        rows, columns = left.square().sum(1), right.diagonal(dim1=1, dim2=2).clamp(min=0)
        longest = (rows * columns).sqrt().sum(1)
        images, (channels, *window) = self.geometry.images, self.geometry.shape
        rows, columns = rows + hidden(channels, left.dtype), columns + hidden(math.prod(window), left.dtype)
        summed = left.shape[2]
        rounded = upwards(squares, (rows * columns).sqrt().sum(1), summed=summed, by_gram=True)
        for unit in (squares < TRUSTED * longest.square()).nonzero().flatten().tolist():
            again = Rows(self._part(unit * images, (unit + 1) * images).dense()).squares()
            rounded[unit] = upwards(again[0], longest[unit], summed=2 * summed)
        return rounded

    def _part(self, first: int, last: int) -> Convolution:
        return replace(self, inputs=self.inputs[first:last], gradient=self.gradient[first:last])

    def weighted_sum(self, weights: Tensor, dropped: Tensor | None) -> Tensor:
        images = self.geometry.images
        dropped = None if dropped is None else dropped.repeat_interleave(images)
        inputs, gradient = select(self.inputs, dropped), select(self.gradient, dropped)
        factor = weights.to(gradient).repeat_interleave(images).view(-1, *[1] * (gradient.dim() - 1))
        weight = inputs.new_empty(1).expand(self.geometry.shape)
        with exact_convolutions() if inputs.is_cuda else nullcontext():
            return _weight_gradient(inputs, gradient * factor, weight, self.geometry, self.geometry.groups)

    def cut(self, rows: Tensor) -> Term:
        if self.geometry.groups > 1:
            return Rows(self.dense()).cut(rows)
        gradient = self.gradient.index_select(1, rows.to(self.gradient.device))
        shape = torch.Size([len(rows), *self.geometry.shape[1:]])
        return replace(self, gradient=gradient, geometry=replace(self.geometry, shape=shape))

    def folded(self, folding: Folding) -> Term:
        if folding.each is None:
            return Rows(folding.sum(self.dense()))
        return replace(self, geometry=replace(self.geometry, images=self.geometry.images * folding.each))

    def kept(self, take: Take) -> Share:
        """Gram matrices where gradients are too large for the cache, and would take about as many operations."""
        geometry, weights = self.geometry, math.prod(self.geometry.shape)
        positions = geometry.images * math.prod(self.gradient.shape[2:])
        operations = windows.operations(self.inputs, geometry) + positions**2 * self.gradient.shape[1]
        if geometry.groups == 1 and weights > _MANY_WEIGHTS and operations < _SHARE * positions * weights:
            return self
        return self._multiplied_out(take)

    def _positions(self, images: Tensor) -> Tensor:
        """[units, channels, images per unit * positions]."""
        if self.geometry.images == 1:
            return images.flatten(2)
        units = images.reshape(-1, self.geometry.images, *images.shape[1:]).transpose(1, 2)
        return units.flatten(2)


def _of_each(
    inputs: Tensor, gradient: Tensor, geometry: Geometry, mask: Tensor | None, take: Take, filled: int
) -> Rows:
    """Calls with as many groups as images: the groups of the weight gradient are the images' gradients.

    A few images at a time: oneDNN lays the result out anew, and beyond the cache that costs more than the gradients.
    filled: rows to compute, of which all beyond the geometry's are zeros, and are left out again.
    """
    images, shape = len(inputs), geometry.shape
    more = filled - shape[0]
    whole = replace(geometry, shape=torch.Size([filled, *shape[1:]]))
    some = max(1, min(_IMAGES_AT_ONCE, _NUMBERS_AT_ONCE // max(1, math.prod(whole.shape))))
    rows = take(images, shape, inputs) if more or images > some else None
    squares = []
    for first in range(0, images, some):
        given = gradient[first : first + some]
        given = F.pad(given, (*[0, 0] * geometry.dims, 0, more)) if more else given
        part = _each_gradient(inputs[first : first + some], given, whole)[:, : shape[0]]
        if mask is not None:
            part.mul_(mask)
        if rows is None:
            rows = part
        else:
            rows[first : first + some] = part
            part = rows[first : first + some]
        squares.append(Rows(part).squares())
    assert rows is not None
    if geometry.images > 1:
        return Rows(rows.view(-1, geometry.images, *shape).sum(1))
    return Rows(rows, torch.cat(squares))


def _each_gradient(inputs: Tensor, gradient: Tensor, geometry: Geometry) -> Tensor:
    """[images, *shape]: every image's own weight gradient."""
    images, shape = len(inputs), geometry.shape
    if geometry.groups == 1 and math.prod(shape[2:]) == 1 and not any(geometry.padding):
        # A product of what went in, and what came back, at the same places.
        every = [slice(None, None, step) for step in (1, 1, *geometry.stride)]
        seen = inputs[tuple(every)]
        return batched_product(gradient.flatten(2), seen.flatten(2).transpose(1, 2)).view(images, *shape)
    return _weight_gradient(
        inputs.reshape(1, -1, *inputs.shape[2:]),
        gradient.reshape(1, -1, *gradient.shape[2:]),
        inputs.new_empty(1).expand(images * shape[0], *shape[1:]),
        geometry,
        images * geometry.groups,
    ).view(images, *shape)


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

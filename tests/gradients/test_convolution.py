"""Weight gradients of convolutions, image by image, in whichever way they are computed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from privgrad.gradients.rules.convolution import Convolution
from privgrad.gradients.rules.windows import Geometry

FORWARD = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Tensor, Tensor, Geometry]:
    """Inputs [3, channels, ...], output gradients [3, rows, ...], and what the convolution is."""
    dims = draw(st.integers(1, 3))
    rows, channels = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    each: Any = st.lists(st.integers(1, 3), min_size=dims, max_size=dims)
    kernel, dilation = draw(each), draw(each)
    stride = draw(each) if draw(st.booleans()) else [1] * dims
    padding = [draw(st.integers(0, size)) for size in kernel]
    inputs = torch.randn(3, channels, *(7 + place for place in range(dims)), dtype=torch.float64)
    geometry = Geometry(torch.Size([rows, channels, *kernel]), stride, padding, dilation, 1, 1)
    gradient = torch.randn_like(_forward(inputs, inputs.new_zeros(geometry.shape), geometry))
    return inputs, gradient, geometry


def _forward(inputs: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    return FORWARD[geometry.dims](inputs, weight, None, geometry.stride, geometry.padding, geometry.dilation)


@given(convolutions())
@settings(max_examples=150, deadline=None)
def test_gradients_are_those_of_one_image_after_the_other(drawn: tuple[Tensor, Tensor, Geometry]) -> None:
    inputs, gradient, geometry = drawn
    expected = []
    for image, given_gradient in zip(inputs.split(1), gradient.split(1), strict=True):
        weight = inputs.new_zeros(geometry.shape, requires_grad=True)
        expected += torch.autograd.grad(_forward(image, weight, geometry), weight, given_gradient)
    torch.testing.assert_close(Convolution(inputs, gradient, geometry).dense(), torch.stack(expected))


@pytest.mark.parametrize(("channels", "rows"), [(32, 32), (32, 5), (16, 5), (64, 3), (16, 20), (20, 5)])
@pytest.mark.parametrize("images", [1, 3])
def test_large_images_have_the_gradients_of_small_ones(channels: int, rows: int, images: int) -> None:
    """A few at a time, by kernels for full registers."""
    inputs, gradient = torch.randn(3, channels, 32, 32), torch.randn(3, rows, 32, 32)
    geometry = Geometry(torch.Size([rows, channels, 3, 3]), [1, 1], [1, 1], [1, 1], 1, images)
    windows = F.unfold(inputs.double(), 3, padding=1)
    expected = torch.einsum("npt,nct->npc", gradient.double().flatten(2), windows)
    expected = expected.view(-1, images, *geometry.shape).sum(1)
    share = Convolution(inputs, gradient, geometry)._multiplied_out(_new)
    torch.testing.assert_close(share.dense().double(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(share.squares().double(), expected.flatten(1).square().sum(1), rtol=1e-4, atol=0)


@given(convolutions(), st.booleans(), st.sampled_from([1, 3]))
@settings(max_examples=150, deadline=None)
def test_what_waits_for_the_weights_has_the_norms_and_sums_of_the_gradients(
    drawn: tuple[Tensor, Tensor, Geometry], some: bool, images: int
) -> None:
    """Whatever its order in memory. some: only of the coordinates in a mask. images: of each unit."""
    inputs, gradient, geometry = drawn
    mask = (torch.rand(geometry.shape) < 0.5).double() if some else torch.ones(geometry.shape, dtype=torch.float64)
    term = Convolution(inputs, gradient, replace(geometry, images=images))
    share = term.masked(mask, _new) if some else term.kept(_new)
    expected = Convolution(inputs, gradient, geometry).dense().unflatten(0, (-1, images)).sum(1) * mask
    torch.testing.assert_close(share.dense() * mask, expected)
    torch.testing.assert_close(share.squares(), expected.flatten(1).square().sum(1), rtol=1e-9, atol=1e-12)
    weights = torch.rand(len(expected), dtype=torch.float64)
    torch.testing.assert_close(share.weighted_sum(weights, None) * mask, torch.tensordot(weights, expected, 1))
    dropped = torch.ones(len(expected), dtype=torch.bool)
    assert not share.weighted_sum(weights, dropped).any()


def _new(units: int, shape: torch.Size, like: Tensor) -> Tensor:
    return like.new_empty(units, *shape)


@pytest.mark.parametrize(
    ("channels", "rows", "reversed_", "filled"),
    [(16, 1, True, 8), (16, 7, False, 8), (16, 8, False, 8), (16, 9, False, 16), (16, 17, False, 32), (20, 7, True, 7)],
)
def test_few_rows_are_computed_backwards_or_filled_up(channels: int, rows: int, reversed_: bool, filled: int) -> None:
    """Where a kernel for several rows at a time would be mostly empty, and where a faster one takes a full register."""
    geometry = Geometry(torch.Size([rows, channels, 3, 3]), [1, 1], [1, 1], [1, 1], 1, 1)
    term = Convolution(torch.randn(2, channels, 5, 5), torch.randn(2, rows, 5, 5), geometry)
    assert (term._reverse() is not None) is reversed_
    assert term._filled() == filled

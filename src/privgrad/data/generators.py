"""Public images that need no data set: drawn from random processes with the statistics of natural images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy
from numpy.typing import NDArray

Images = NDArray[numpy.uint8]

_LEAVES = 100
_SMALLEST = 0.04
"""Radius of the smallest leaf, as a share of the longer side."""


def dead_leaves(count: int, shape: Sequence[int], seed: int = 0) -> Images:
    """[count, channels, height, width]: discs of random place, color and size (density 1 / r^3), each over those before it.

    Edges and a spectrum that is the same at all scales, as in photographs (Lee, Mumford and Huang 2001).
    """
    channels, height, width = shape
    chance = numpy.random.default_rng(seed)
    side = max(height, width)
    rows, columns = numpy.arange(height)[:, None], numpy.arange(width)[None, :]
    images = numpy.empty((count, height, width, channels), numpy.uint8)
    images[:] = chance.integers(0, 256, (count, 1, 1, channels), dtype=numpy.uint8)
    for _ in range(_LEAVES):
        radius = side * _SMALLEST / numpy.sqrt(1 - chance.uniform(0, 1 - 4 * _SMALLEST**2, (count, 1, 1)))
        above = chance.uniform(0, height, (count, 1, 1))
        left = chance.uniform(0, width, (count, 1, 1))
        color = chance.integers(0, 256, (count, channels), dtype=numpy.uint8)
        inside = (rows - above) ** 2 + (columns - left) ** 2 <= radius**2
        images[inside] = color[numpy.nonzero(inside)[0]]
    return numpy.ascontiguousarray(images.transpose(0, 3, 1, 2))


def coloured_noise(count: int, shape: Sequence[int], seed: int = 0) -> Images:
    """[count, channels, height, width]: Gaussian noise with an amplitude of 1 / frequency, each image stretched to 0..255.

    The power spectrum of photographs, without their edges. Channels share half of their variance.
    """
    channels, height, width = shape
    chance = numpy.random.default_rng(seed)
    frequency = numpy.hypot(numpy.fft.fftfreq(height)[:, None], numpy.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = numpy.inf  # no mean
    white = chance.normal(size=(count, channels, height, width)) + chance.normal(size=(count, 1, height, width))
    noise = numpy.fft.irfft2(numpy.fft.rfft2(white) / frequency, s=(height, width))
    low, high = noise.min((1, 2, 3), keepdims=True), noise.max((1, 2, 3), keepdims=True)
    scaled = (noise - low) / numpy.maximum(high - low, 1e-12)
    pixels: Images = (255 * scaled).round().astype(numpy.uint8)
    return pixels


GENERATORS: dict[str, Callable[[int, Sequence[int], int], Images]] = {
    "dead_leaves": dead_leaves,
    "coloured_noise": coloured_noise,
}
"""By their names as public.source."""

"""The scattering transform of images: fixed wavelet features, which see no data and so cost no privacy.

Second order, L orientations, scales 1..2^J (Bruna and Mallat, arXiv:1203.1513). Filters and boundary are those of kymatio's
`Scattering2D` (arXiv:1812.11214), with which it agrees to float precision; the low-pass, which is separable, is two small
matrix products here, and orientations go through the Fourier transform together.
"""

from __future__ import annotations

import math
from itertools import product

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional

from privgrad.errors import PrivgradError, check_count


class Scattering(nn.Module):
    """[rows, channels, height, width] to [rows, channels * (1 + J L + L^2 J (J-1) / 2), height / 2^J, width / 2^J].

    scale: J. orientations: L. Channels of the output: for each input channel the low-pass, then first order, then second order.
    Without parameters and without state.
    """

    def __init__(self, height: int, width: int, scale: int = 2, orientations: int = 8) -> None:
        super().__init__()
        check_count("scattering.scale", scale)
        check_count("scattering.orientations", orientations)
        if min(height, width) < 2**scale:
            raise PrivgradError(
                f"images of {height} x {width} pixels are too small for scattering at scale {scale}; "
                f"expected at least {2**scale} x {2**scale}"
            )
        self.scale, self.orientations, self.shape = scale, orientations, (height, width)
        step = 2**scale
        self._padded = [((side + step) // step + 1) * step for side in (height, width)]
        for resolution in range(scale):
            for axis, side in enumerate(self._padded):
                self._buffer(f"low_{resolution}_{axis}", _low_pass(side, scale, resolution))
        for j in range(scale):
            bank = numpy.stack(
                [_morlet(self._padded[0], self._padded[1], j, k, orientations) for k in range(orientations)]
            )
            for resolution in range(j + 1):
                factor = 2**resolution
                self._buffer(f"band_{j}_{resolution}", _periodised(_periodised(bank, factor, -1), factor, -2))

    @property
    def channels(self) -> int:
        """Output channels for each input channel."""
        first = self.scale * self.orientations
        return 1 + first + self.orientations**2 * self.scale * (self.scale - 1) // 2

    def forward(self, images: Tensor) -> Tensor:
        """See the class. Any float dtype comes out as float32."""
        rows, channels, height, width = images.shape
        if (height, width) != self.shape:
            raise PrivgradError(f"images of {height} x {width} pixels; this scattering is for {self.shape}")
        flat = self._pad(images.reshape(rows * channels, 1, height, width).to(torch.float32)).squeeze(1)
        spectrum = torch.fft.fft2(flat)
        orders: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([self._smooth(flat[:, None], 0)], [], [])
        for j in range(self.scale):
            first = self._band(spectrum[:, None], j, 0)  # [images, L, ...]
            orders[1].append(self._smooth(first, j))
            spectra = torch.fft.fft2(first)
            # kymatio's order: for each path of order one, all paths of order two that follow it.
            second = [self._smooth(self._band(spectra[:, :, None], k, j), k) for k in range(j + 1, self.scale)]
            if second:
                orders[2].append(torch.cat(second, dim=2).flatten(1, 2))
        features = torch.cat([part for order in orders for part in order], dim=1)
        return features.reshape(rows, channels * self.channels, *features.shape[-2:])

    def _buffer(self, name: str, value: numpy.ndarray) -> None:
        self.register_buffer(name, torch.from_numpy(value.astype(numpy.float32)), persistent=False)

    def _pad(self, images: Tensor) -> Tensor:
        (height, width), (rows, columns) = self.shape, self._padded
        top, left = (rows - height) // 2, (columns - width) // 2
        return functional.pad(images, (left, columns - width - left, top, rows - height - top), mode="reflect")

    def _band(self, spectrum: Tensor, j: int, resolution: int) -> Tensor:
        """Modulus of the band-pass at scale j and all orientations, at resolution j."""
        bank: Tensor = self.get_buffer(f"band_{j}_{resolution}")
        real, imaginary = torch.view_as_real(torch.fft.ifft2(_filtered(spectrum, bank, 2 ** (j - resolution)))).unbind(
            -1
        )
        return torch.addcmul(real.square(), imaginary, imaginary).sqrt_()

    def _smooth(self, values: Tensor, resolution: int) -> Tensor:
        rows, columns = (self.get_buffer(f"low_{resolution}_{axis}") for axis in (0, 1))
        smooth: Tensor = rows @ (values @ columns.T)
        return smooth[..., 1:-1, 1:-1]  # without the padding


def _filtered(spectrum: Tensor, bank: Tensor, factor: int) -> Tensor:
    """The spectrum of every factor-th sample of the filtered signal: the mean over aliases, block by block."""
    rows, columns = (side // factor for side in spectrum.shape[-2:])
    total: Tensor | None = None
    for row, column in product(range(factor), repeat=2):
        block = (..., slice(row * rows, (row + 1) * rows), slice(column * columns, (column + 1) * columns))
        part = spectrum[block] * bank[block]
        total = part if total is None else total.add_(part)
    assert total is not None
    return total.div_(factor * factor) if factor > 1 else total


def _periodised(filters: numpy.ndarray, factor: int, axis: int) -> numpy.ndarray:
    """Filters in Fourier space for signals that were subsampled by `factor` along one axis: aliases are added."""
    if factor == 1:
        return filters
    filters = numpy.moveaxis(filters, axis, -1).copy()
    side = filters.shape[-1]
    short = side // factor
    filters[..., short // 2 : short // 2 + side - short] = 0  # lies between the two new half bands, in neither
    return numpy.moveaxis(filters.reshape(*filters.shape[:-1], factor, short).sum(axis=-2), -1, axis)


def _gabor(rows: int, columns: int, sigma: float, angle: float, frequency: float, slant: float) -> numpy.ndarray:
    """A periodised Gabor filter [rows, columns] in space."""
    cosine, sine = math.cos(angle), math.sin(angle)
    rotation = numpy.array([[cosine, -sine], [sine, cosine]])
    curvature = rotation @ numpy.diag([1.0, slant * slant]) @ rotation.T / (2 * sigma * sigma)
    filters = numpy.zeros((rows, columns), dtype=complex)
    for shift_x, shift_y in product(range(-2, 3), repeat=2):
        x, y = numpy.mgrid[shift_x * rows : (shift_x + 1) * rows, shift_y * columns : (shift_y + 1) * columns]
        decay = curvature[0, 0] * x * x + (curvature[0, 1] + curvature[1, 0]) * x * y + curvature[1, 1] * y * y
        filters += numpy.exp(-decay + 1j * frequency * (x * cosine + y * sine))
    return filters * slant / (2 * math.pi * sigma * sigma)


def _morlet(rows: int, columns: int, j: int, orientation: int, orientations: int) -> numpy.ndarray:
    """The band-pass filter of scale j and one orientation, in Fourier space (it is real there)."""
    sigma, frequency, slant = 0.8 * 2**j, 0.75 * math.pi / 2**j, 4 / orientations
    angle = (orientations // 2 - 1 - orientation) * math.pi / orientations
    wave = _gabor(rows, columns, sigma, angle, frequency, slant)
    envelope = _gabor(rows, columns, sigma, angle, 0.0, slant)
    zero_mean = wave - wave.sum() / envelope.sum() * envelope
    return numpy.fft.fft2(zero_mean).real


def _low_pass(side: int, scale: int, resolution: int) -> numpy.ndarray:
    """[side / 2^scale, side / 2^resolution]: a Gaussian of width 0.8 * 2^(scale-1), then subsampling."""
    sigma = 0.8 * 2 ** (scale - 1)
    places = numpy.arange(side)
    gaussian = sum(numpy.exp(-((places + shift * side) ** 2) / (2 * sigma * sigma)) for shift in range(-2, 3))
    window = numpy.fft.fft(gaussian / (math.sqrt(2 * math.pi) * sigma)).real
    window = _periodised(window, 2**resolution, -1)
    short, factor = side // 2**resolution, 2 ** (scale - resolution)
    spectra = numpy.fft.fft(numpy.eye(short), axis=0) * window[:, None]
    folded = spectra.reshape(factor, short // factor, short).mean(axis=0)
    return numpy.fft.ifft(folded, axis=0).real

"""How near a reconstruction is to the original: MSE, PSNR and SSIM."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from torch import Tensor

from privgrad.errors import PrivgradError, check_number

_SIGMA, _TRUNCATE = 1.5, 3.5
"""The window of SSIM: a Gaussian of 1.5 pixels, 11 pixels wide."""


@dataclass(frozen=True)
class Similarity:
    """mse: of pixels. psnr: 10 log10(range^2 / mse), dB, infinite for equal images. ssim: 1 for equal images, 0 for unrelated"""

    mse: float
    psnr: float
    ssim: float


def similarity(found: Tensor, original: Tensor, value_range: float) -> Similarity:
    """The similarity of two images [channels, height, width]. value_range: largest less smallest possible pixel."""
    if found.shape != original.shape or original.dim() != 3:
        raise PrivgradError(
            f"the images have the shapes {list(found.shape)} and {list(original.shape)}; expected the same, [channels, height, "
            "width]"
        )
    check_number("value_range", value_range, above=0)
    ours, theirs = (image.detach().cpu().double().numpy() for image in (found, original))
    mse = float(((ours - theirs) ** 2).mean())
    psnr = math.inf if mse == 0 else 10 * math.log10(value_range**2 / mse)
    return Similarity(
        mse, psnr, float(numpy.mean([_ssim(a, b, value_range) for a, b in zip(ours, theirs, strict=True)]))
    )


def _ssim(ours: NDArray[numpy.float64], theirs: NDArray[numpy.float64], value_range: float) -> float:
    """Of one channel: the mean over all windows (Wang, Bovik, Sheikh and Simoncelli 2004, equation 13)."""

    def local(values: NDArray[numpy.float64]) -> NDArray[numpy.float64]:
        mean: NDArray[numpy.float64] = gaussian_filter(values, _SIGMA, truncate=_TRUNCATE)
        return mean

    steady_mean, steady_variance = (0.01 * value_range) ** 2, (0.03 * value_range) ** 2
    mean_a, mean_b = local(ours), local(theirs)
    variances = local(ours * ours) - mean_a**2 + local(theirs * theirs) - mean_b**2
    covariance = local(ours * theirs) - mean_a * mean_b
    alike = (2 * mean_a * mean_b + steady_mean) * (2 * covariance + steady_variance)
    return float((alike / ((mean_a**2 + mean_b**2 + steady_mean) * (variances + steady_variance))).mean())

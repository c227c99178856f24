"""Renyi differential privacy of subsampled Gaussian plus uniform noise: the accountant of ModelMix (arXiv:2210.03843).

Units: R = 1, the largest l2 norm of a record's shift v; every |v_j| <= c = 1 / sqrt(p). Noise per coordinate: N(0, s^2) plus a
uniform of width W, of density p(o) = [Phi((o + W/2)/s) - Phi((o - W/2)/s)] / W, symmetric and log-concave. For whole orders k let

    A_k(x) = E r^k = 1 + E phi(r),   phi(r) = r^k - 1 - k (r - 1) >= 0,   r = p(o - x) / p(o),   o ~ p (so that E r = 1).

The noise is a product, so that log A_k(v) = sum_j log A_k(v_j) <= sup_{0 < x <= c} log A_k(x) / x^2 =: a_k, for sum_j v_j^2 <= 1.
Poisson sampling expands into sum_k binom(a, k) (1 - q)^(a - k) q^k A_k (arXiv:1908.10530); the other direction of the
divergence is smaller by theorem 5 there, because o -> v - o exchanges the two unsampled densities.

Every number below is an upper bound:
- Integrals of phi(r) p (`_log_moments`): the midpoint rule plus its error, at most h^3 / 24 sup |(phi p)''| in a cell of width
  h. With t = log r, d = t' and e = (log p)': |d| <= x / s^2, |d'| <= 1 / s^2, -1 / s^2 <= e' <= 0 (log p is concave, and log p +
  o^2 / (2 s^2) convex), and |(phi p)''| <= p [k (k-1) r^k d^2 + |phi'| r (d^2 + 1 / s^2 + 2 |d e|) + phi (e^2 + 1 / s^2)].
- Tails: to the left r < 1 and phi <= k - 1; to the right r^k p falls at least like an exponential (`_right_tail`). Between the
  edges of a wide uniform |r - 1| is below 1e-17, and nothing is left of phi.
- The supremum (`moments`): A_k rises with x (the likelihood ratio of a log-concave shift family is monotone), so that on [x', x]
  log A_k / x^2 <= log A_k(x) / x'^2. For small x a bound by the Fisher information, made uniform (`_near_zero`).
- The uniform is post-processing of the Gaussian, so a_k <= k (k - 1) / (2 s^2) always.
- Rounding: a relative 1e-8 is added, far above what double precision loses here.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy
from numpy.typing import NDArray
from scipy.special import gammaln, log_ndtr, logsumexp, ndtr

Array = NDArray[numpy.float64]

ORDERS = tuple(range(2, 65))
"""Renyi orders, all whole: the expansion over the sample needs every moment below."""

_CELLS = (0.015, 0.05)
"""Of the grid of integration, in units of s: near the largest shift, where the supremum usually is, and elsewhere."""
_MARGIN = 9.0
"""So many s from an edge the uniform looks flat, and so many beyond it nothing is left."""
NARROWEST, WIDEST = 1e-3, 1e5
"""In units of s: a narrower uniform counts as none, a wider one as a part of it."""
_SMALLEST_SHIFT = 0.015
"""In units of s: where all shifts are smaller, the bound for small shifts is close to the supremum, and serves alone."""
FINE, ROUGH = 2e-4, 5e-3
"""What the supremum may be overstated by (relative), where the ratio falls fast enough below the largest shift."""
_COARSE_TOLERANCE, _FEW = 0.015, 4
"""The same where it does not: for orders whose bound for small shifts is too large at the first few steps down."""
_GROWTH, _LONGEST = {FINE: 1.02, ROUGH: 1.05}, {FINE: 0.006, ROUGH: 0.02}
"""Of the strides between shifts, which begin with half the tolerance."""
_LARGEST_EXPONENT = 600.0
_ROUNDING = 1e-8


@lru_cache(maxsize=64)
def moments(multiplier: float, width: float, cap: float, tolerance: float = FINE) -> Array:
    """a_k for k = 2, 3, ..., max(ORDERS): log A_k(v) <= a_k for every v with an l2 norm of 1 and coordinates of at most `cap`.

    multiplier: s. width: W. cap: c = 1 / sqrt(p), at most 1. All in units of the l2 bound. tolerance: FINE or ROUGH.
    """
    s, orders = multiplier, numpy.array(ORDERS)
    gaussian = orders * (orders - 1) / (2 * s * s)
    if width < NARROWEST * s:
        return _rounded(gaussian, gaussian)
    # A wide uniform is one of a whole part of its width, moved at random: post-processing.
    width /= math.ceil(width / (WIDEST * s))
    if cap < _SMALLEST_SHIFT * s:
        return _rounded(_near_zero(s, width, cap, orders), gaussian)
    logs = _log_moments(s, width, cap, orders, _CELLS[0] / 5)
    target = numpy.minimum(logs / cap**2, gaussian) * (1 + tolerance)
    # As much as possible is left to the bound for small shifts: where it is below the target. Where that is too little, as with a
    # narrow uniform, whose ratio hardly depends on the shift, the target gives way a little. (The smallest step counts anyway.)
    steps = min(cap, s) / 2.0 ** numpy.arange(1, 12)
    small = numpy.array([_near_zero(s, width, float(step), orders) for step in steps])
    enough = small <= target
    enough |= ~enough[:_FEW].any(0) & (small <= target * (1 + _COARSE_TOLERANCE))
    chosen = numpy.where(enough.any(0), enough.argmax(0), len(steps) - 1)
    target = numpy.maximum(target, small[chosen, numpy.arange(len(orders))])
    # From the largest shift downwards: log A_k rises with x, so that down to sqrt(log A_k(x) / target) the ratio is below it.
    following, visits = numpy.sqrt(logs / target), numpy.zeros(len(orders))
    while True:
        active = (following > steps[chosen]) & (target < gaussian)
        if not active.any():
            return _rounded(target, gaussian)
        x = float(following[active].max())
        due = active & (following >= 0.99 * x)
        logs[due] = _log_moments(s, width, x, orders[due], _CELLS[int(x < max(0.9 * cap, 0.2 * s))])
        # Each visit goes further than the one before, so that it comes to an end: where it must, the target gives way.
        stride = numpy.minimum(tolerance / 2 * _GROWTH[tolerance] ** visits[due], _LONGEST[tolerance])
        target[due] = numpy.maximum(target[due], logs[due] / (x * (1 - stride)) ** 2)
        following[due] = numpy.sqrt(logs[due] / target[due])
        visits[due] += 1


def _rounded(bounds: Array, gaussian: Array) -> Array:
    result: Array = numpy.minimum(bounds * (1 + _ROUNDING), gaussian)
    return result


@lru_cache(maxsize=64)
def rdp(rate: float, multiplier: float, width: float, cap: float, tolerance: float = FINE) -> Array:
    """RDP at `ORDERS` of one step: Poisson sampling with `rate` of noise as in `moments`."""
    # sum_k chance_k A_k = 1 + sum_{k > 1} chance_k (A_k - 1): beside the 1 a small excess would be lost in rounding.
    bounds = moments(multiplier, width, cap, tolerance)
    with numpy.errstate(divide="ignore"):  # where nothing moves, the excess is 0
        excess = bounds + numpy.log(-numpy.expm1(-bounds))
    found = []
    for order in ORDERS:
        k = numpy.arange(2, order + 1)
        chances = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1) + k * math.log(rate)
        if rate < 1:
            chances += (order - k) * math.log1p(-rate)
        else:
            chances[:-1] = -numpy.inf
        found.append(numpy.logaddexp(0.0, logsumexp(chances + excess[: len(k)])) / (order - 1) * (1 + _ROUNDING))
    return numpy.array(found)


def _log_density(o: Array, s: float, width: float) -> Array:
    """log p(o), from the side on which the two tails are small."""
    o = numpy.abs(o)
    near, far = log_ndtr((width / 2 - o) / s), log_ndtr((-width / 2 - o) / s)
    result: Array = near + numpy.log1p(-numpy.exp(far - near)) - math.log(width)
    return result


def _slope(o: Array, s: float, width: float, log_density: Array) -> Array:
    """(log p)'(o)."""
    low = -0.5 * ((o + width / 2) / s) ** 2 - log_density
    high = -0.5 * ((o - width / 2) / s) ** 2 - log_density
    result: Array = (numpy.exp(low) - numpy.exp(high)) / (s * width * math.sqrt(2 * math.pi))
    return result


def _cells(pieces: list[tuple[float, float]], width: float) -> tuple[Array, Array]:
    """Midpoints and widths of cells that cover the pieces."""
    middles, widths = [], []
    for low, high in pieces:
        count = math.ceil((high - low) / width)
        step = (high - low) / count
        middles.append(low + step * (numpy.arange(count) + 0.5))
        widths.append(numpy.full(count, step))
    return numpy.concatenate(middles), numpy.concatenate(widths)


def _log_moments(s: float, width: float, x: float, orders: Array, cell: float) -> Array:
    """Upper bounds of log A_k(x); the plain Gaussian's where the numbers would be too large. cell: in units of s."""
    gaussian: Array = orders * (orders - 1) * x**2 / (2 * s * s)
    computed = orders * x * (orders * x + (_MARGIN + 3) * s) / s**2 <= _LARGEST_EXPONENT
    if not computed.any():
        return gaussian
    k = orders[computed].astype(float)[:, None]
    half = width / 2
    left, right = -half - _MARGIN * s, half + float(k[-1, 0]) * x + (_MARGIN + 3) * s
    flat = (-half + x + _MARGIN * s, half - _MARGIN * s)
    cell *= math.sqrt(min(1.0, x / (0.3 * s)))  # the error is relative to x s, and the moment to x^2
    o, h = _cells([(left, flat[0]), (flat[1], right)] if flat[0] < flat[1] else [(left, right)], cell * s)
    centred = _log_density(o, s, width)
    shifted = _log_density(o - x, s, width)
    t, e = shifted - centred, numpy.abs(_slope(o, s, width, centred)) + h / (2 * s**2)
    d = numpy.abs(_slope(o - x, s, width, shifted) - _slope(o, s, width, centred))
    d = numpy.minimum(d + h / (2 * s**2), x / s**2)
    # Within a cell log r moves by at most h d / 2, and log p by at most h e / 2.
    p, r, moved = numpy.exp(centred), numpy.exp(t), numpy.exp((k * d + e) * h / 2)
    power = numpy.exp(k * t)
    phi = numpy.expm1(k * t) - k * numpy.expm1(t)
    derivative = k * r * (numpy.abs(numpy.expm1((k - 1) * t)) + power / r * numpy.expm1((k - 1) * d * h / 2))
    bends = k * (k - 1) * power * d**2 + derivative * (d**2 + 1 / s**2 + 2 * d * e)
    bends += (phi + derivative * d * h / 2) * (e**2 + 1 / s**2)
    total = phi @ (p * h) + (moved * bends) @ (p * h**3 / 24)
    total += (k[:, 0] - 1) * ndtr((left + half) / s) + k[:, 0] ** 2 * 1e-30
    total += _right_tail(s, width, x, right, k[:, 0])
    result: Array = gaussian.copy()
    result[computed] = numpy.minimum(numpy.log1p(total), gaussian[computed])
    return result


def _right_tail(s: float, width: float, x: float, right: float, orders: Array) -> Array:
    """The integral of f = r^k p beyond `right`: at most f(right) / lambda, where (log f)' <= -lambda.

    With y = o - W/2 > 0, -y / s^2 - 1 / y <= (log p)'(o) <= -y / s^2: the mean of W/2 - u given o is at most s^2 / y.
    """
    y, at = right - width / 2, numpy.array([right])
    fall = (y - orders * x) / s**2 - (orders - 1) / y
    ends = orders * float(_log_density(at - x, s, width)[0]) - (orders - 1) * float(_log_density(at, s, width)[0])
    result: Array = numpy.where(fall > 0, numpy.exp(ends) / numpy.maximum(fall, 1e-300), numpy.inf)
    return result


def _near_zero(s: float, width: float, largest: float, orders: Array) -> Array:
    """A bound of log A_k(x) / x^2 for all 0 < x <= largest.

    phi(r) = k (k-1) (r - 1)^2 integral_0^1 (1 - u) (1 + u (r - 1))^(k-2) du <= k (k-1) / 2 (r - 1)^2 g, by the chord of a convex
    function, with g = (2 + max(1, r)^(k-2)) / 3, and (r - 1)^2 p <= x integral_0^x p'(o - t)^2 / p(o) dt (Cauchy-Schwarz), so
    that the bound is the largest over t of the mean of (p'(o - t) / p(o))^2 g, with g at the largest shift. Suprema over
    cells of o and t by monotonicity: p falls with |o|, and the two bumps of p' with the distance from their edges.
    """
    half = width / 2
    right = half + float(orders[-1]) * largest + (_MARGIN + 3) * s
    flat = (-half + _MARGIN * s, half - _MARGIN * s)
    left = -half - _MARGIN * s
    o, h = _cells([(left, flat[0]), (flat[1], right)] if flat[0] < flat[1] else [(left, right)], _CELLS[0] / 4 * s)
    low, high = o - h / 2, o + h / 2
    smallest = _log_density(numpy.maximum(numpy.abs(low), numpy.abs(high)), s, width)
    count = math.ceil(largest / (_CELLS[0] / 4 * s))
    squares = numpy.empty((count, len(o)))
    for number in range(count):
        least, most = largest * number / count, largest * (number + 1) / count
        # Either the larger of the two bumps, or their difference in the middle and its largest change: |u phi(u)| < 0.242.
        middle, reach = o - (least + most) / 2, (h + most - least) / 2
        apart = [middle - edge for edge in (-half, half)]
        nearest = numpy.maximum(numpy.minimum(*numpy.abs(apart)) - reach, 0.0)
        bumps = [numpy.exp(-0.5 * (distance / s) ** 2) for distance in apart]
        change = 2 * 0.242 * math.sqrt(2 * math.pi) * reach / s
        logs = numpy.minimum(-0.5 * (nearest / s) ** 2, numpy.log(numpy.abs(bumps[0] - bumps[1]) + change))
        squares[number] = numpy.exp(2 * logs - smallest) * h
    # r rises with o, and is below 1 left of 0; at one o the largest r of all shifts is that of the one that comes nearest to 0.
    growth = _log_density(numpy.maximum(high - largest, 0.0), s, width) - _log_density(high, s, width)
    growth = numpy.where(high <= 0, 0.0, numpy.maximum(growth, 0.0))
    with numpy.errstate(over="ignore", invalid="ignore"):  # too large is no bound: infinite
        growth = (2 + numpy.exp((orders - 2)[None, :] * growth[:, None])) / 3
        whole = (squares @ growth).max(0) / (s * width) ** 2 / (2 * math.pi)
    whole = numpy.nan_to_num(whole, nan=numpy.inf, posinf=numpy.inf)
    # What is left out: between the edges, and beyond the margins, the integrand is below e^(-MARGIN^2 / 2) of its peak.
    whole += (width + 2 * s) / s * math.exp(-(_MARGIN**2) / 2) / (s * width)
    result: Array = orders * (orders - 1) / 2 * whole
    return result

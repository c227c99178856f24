"""The smallest noise multiplier, or the smallest width of mixing, that keeps a budget."""

from __future__ import annotations

import math
from collections.abc import Callable

from privgrad.errors import PrivgradError, check_number
from privgrad.privacy.accounting import Precision
from privgrad.privacy.mixed import NARROWEST, WIDEST

TOLERANCE = 1e-3
"""The multiplier is at most this much (relative) above the smallest one that keeps the budget."""
SMALLEST_TARGET, LARGEST_TARGET = 1e-6, 1e4
"""A smaller budget is below what the accountants resolve; a larger one protects nobody."""
_LARGEST = 1e7


def calibrate(spent: Callable[[float, Precision], float], target: float) -> float:
    """The smallest z (within TOLERANCE) with spent(z, FINE) <= target, for a `spent` that falls in z.

    A bisection on the coarse grid comes close; the fine grid has the last word: what is returned was itself accounted
    on the fine grid and found within the target.

    Guarantee: spent(result, FINE) <= target, always.

    Raises:
        PrivgradError: a target that is no number in [10^-6, 10^4], or that no noise can reach at this delta.
    """
    check_number("epsilon", target, at_least=SMALLEST_TARGET, at_most=LARGEST_TARGET)
    near = _search(lambda z: spent(z, Precision.COARSE) <= target, start=1.0)
    # The coarse grid overstates. Aim once more, at where it says what the fine grid would say is the target.
    exact = spent(near, Precision.FINE)
    if exact > 0:
        overstated = spent(near, Precision.COARSE) / exact
        near = _search(lambda z: spent(z, Precision.COARSE) <= target * overstated, start=near, stride=1.1)
    return _search(lambda z: spent(z, Precision.FINE) <= target, start=near, stride=1 + TOLERANCE)


def calibrate_width(spent: Callable[[float], float], target: float) -> float:
    """The smallest width of mixing's uniform (within TOLERANCE), in units of the Gaussian's standard deviation s.

    spent: epsilon of a width, with everything else fixed. It falls from a width to its whole multiples (a wider interval is
    post-processing), and in between as far as the numbers show; nothing here rests on that.

    Guarantee: spent(result) <= target, always: the result was itself accounted for.

    Raises:
        PrivgradError: a target below what the widest uniform gives, or that the Gaussian keeps by itself.
    """
    check_number("epsilon", target, at_least=SMALLEST_TARGET, at_most=LARGEST_TARGET)
    low, high = NARROWEST, 0.999 * WIDEST  # rounding must not lift it above
    least, most = spent(high), spent(low)
    if least > target:
        raise PrivgradError(
            f"no width of mixing reaches epsilon = {target:g}: the widest gives {least:.4g}; raise noise.multiplier or epsilon, "
            "or take fewer steps"
        )
    if most <= target:
        raise PrivgradError(
            f"the noise alone has epsilon = {most:.4g}, which is within {target:g}; lower noise.multiplier, or leave out mixing"
        )
    while high / low > 1 + TOLERANCE:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if spent(middle) <= target else (middle, high)
    return high


def _search(holds: Callable[[float], bool], start: float, stride: float = 2.0) -> float:
    """The smallest z, within TOLERANCE, for which `holds`."""
    low, high = _bracket(holds, start, stride)
    while high / low > 1 + TOLERANCE * 1.001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _bracket(holds: Callable[[float], bool], start: float, stride: float) -> tuple[float, float]:
    """(low, high) with holds(high) and not holds(low), searched outwards from `start` in strides that square."""
    z, found = start, holds(start)
    while True:
        following = z / stride if found else z * stride
        if following > _LARGEST:
            raise PrivgradError(
                f"no noise multiplier up to {_LARGEST:g} reaches the target epsilon at this delta; "
                "raise epsilon or delta, or take fewer steps"
            )
        if following < 1 / _LARGEST:
            raise PrivgradError("the target epsilon is so large that no noise is needed; lower epsilon")
        now = holds(following)
        if now != found:
            return (following, z) if found else (z, following)
        z, stride = following, min(stride * stride, 16.0)

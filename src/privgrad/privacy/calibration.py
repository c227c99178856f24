"""The smallest noise multiplier, or the smallest width of mixing, that keeps a budget."""

from __future__ import annotations

import math
from collections.abc import Callable

from scipy.optimize import brentq

from privgrad.errors import PrivgradError, check_number
from privgrad.privacy.accounting import Precision
from privgrad.privacy.mixed import NARROWEST, WIDEST

TOLERANCE = 1e-3
"""The multiplier is at most this much (relative) above the smallest one that keeps the budget."""
SMALLEST_TARGET, LARGEST_TARGET = 1e-6, 1e4
"""A smaller budget is below what the accountants resolve; a larger one protects nobody."""
_LARGEST = 1e7
_STEEP = 50.0
"""In the place of the logarithms of 0 and infinity."""


def calibrate(spent: Callable[[float, Precision], float], target: float) -> float:
    """The smallest z (within TOLERANCE) with spent(z, FINE) <= target, for a `spent` that falls in z.

    The rough grid finds about where; the fine grid has the last word: what is returned was itself accounted on the fine grid
    and found within the target.

    Guarantee: spent(result, FINE) <= target, always.

    Raises:
        PrivgradError: a target that is no number in [10^-6, 10^4], or that no noise can reach at this delta.
    """
    check_number("epsilon", target, at_least=SMALLEST_TARGET, at_most=LARGEST_TARGET)

    near = _root(spent, target, *_bracket(lambda z: spent(z, Precision.ROUGH) <= target, 1.0, 2.0))
    return _smallest(lambda z: spent(z, Precision.FINE) <= target, _aimed(spent, target, near))


def calibrate_width(spent: Callable[[float, Precision], float], target: float) -> float:
    """The smallest width of mixing's uniform (within TOLERANCE), in units of the Gaussian's standard deviation s.

    spent: epsilon of a width, with everything else fixed. It falls from a width to its whole multiples (a wider interval is
    post-processing), and in between as far as the numbers show; nothing here rests on that.

    Guarantee: spent(result, FINE) <= target, always: the result was itself accounted for.

    Raises:
        PrivgradError: a target below what the widest uniform gives, or that the Gaussian keeps by itself.
    """
    check_number("epsilon", target, at_least=SMALLEST_TARGET, at_most=LARGEST_TARGET)
    low, high = NARROWEST, 0.999 * WIDEST  # rounding must not lift it above
    least, most = spent(high, Precision.FINE), spent(low, Precision.FINE)
    if least > target:
        raise PrivgradError(
            f"no width of mixing reaches epsilon = {target:g}: the widest gives {least:.4g}; raise noise.multiplier or epsilon, "
            "or take fewer steps"
        )
    if most <= target:
        raise PrivgradError(
            f"the noise alone has epsilon = {most:.4g}, which is within {target:g}; lower noise.multiplier, or leave out mixing"
        )
    near = _aimed(spent, target, _root(spent, target, low, high))
    return min(_smallest(lambda width: width >= high or spent(width, Precision.FINE) <= target, near), high)


def _root(spent: Callable[[float, Precision], float], target: float, low: float, high: float) -> float:
    """About where the rough numbers fall to the target, between low and high: a guess."""

    def above(log_z: float) -> float:
        found = spent(math.exp(log_z), Precision.ROUGH)
        return math.log(found / target) if 0 < found < math.inf else math.copysign(_STEEP, found - target)

    try:
        return math.exp(float(brentq(above, math.log(low), math.log(high), xtol=TOLERANCE / 20)))
    except ValueError:  # both ends on one side: the rough numbers are not quite the fine ones
        return high


def _aimed(spent: Callable[[float, Precision], float], target: float, near: float) -> float:
    """A better guess: the rough numbers overstate, and here is where they say what the fine ones would say is the target."""
    exact, rough = spent(near, Precision.FINE), spent(near, Precision.ROUGH)
    if not (0 < exact < math.inf and 0 < rough < math.inf):
        return near
    aim = target * rough / exact
    low, high = _bracket(lambda z: spent(z, Precision.ROUGH) <= aim, near, 1.01)
    return _root(spent, aim, low, high) * (1 + TOLERANCE / 4)


def _smallest(holds: Callable[[float], bool], start: float) -> float:
    """The smallest z, within TOLERANCE, for which `holds`, searched outwards from `start`."""
    low, high = _bracket(holds, start, 1 + TOLERANCE)
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

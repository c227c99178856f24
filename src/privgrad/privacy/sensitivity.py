"""The one place where C becomes C or 2C.

A unit (an example, a user, a group) contributes one vector to a sum. The vector lies in a set with a known radius
(largest distance from 0, which is what an absent unit contributes) and a known diameter (largest distance between two
points of the set). What one record can move is then

- individual clipping: the record IS the unit. Present against absent moves the sum by at most the radius; one record
  against another by at most the diameter.
- clipping of groups: the group's vector stays in the sum whatever one record does, and moves from one point of the set
  to another: at most the diameter, for every adjacency (docs of Batch Clipping, arXiv:2307.11939; it rests on groups
  that are drawn independently of the other records).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Bound:
    """Radius and diameter (l2) of the set in which every unit's contribution lies."""

    radius: float
    diameter: float

    @staticmethod
    def ball(max_norm: float) -> Bound:
        """Vectors clipped to l2 norm C: radius C, diameter 2C."""
        return Bound(max_norm, 2 * max_norm)

    @staticmethod
    def box(*widths: float) -> Bound:
        """Vectors with coordinate l in [0, width_l] (norms): radius and diameter are both the box's diagonal."""
        diagonal = math.sqrt(sum(width * width for width in widths))
        return Bound(diagonal, diagonal)


def presence_distance(bound: Bound, *, grouped: bool) -> float:
    """R: how far one present record can move the sum from where its absence leaves it. The noise multiplier is s / R."""
    return bound.diameter if grouped else bound.radius


def replacement_factor(*, grouped: bool) -> float:
    """How much further than R a replaced record can move the sum: 2 for individual clipping, 1 for groups.

    Individual: the diameter is at most twice the radius. Groups: R is the diameter already.
    """
    return 1.0 if grouped else 2.0


def joint_multiplier(distances_and_scales: Iterable[tuple[float, float]]) -> float:
    """z of several Gaussian releases of one sample: 1/z^2 = sum (R_p / s_p)^2, by whitening (arXiv:2307.11939).

    Parts that nobody can move (R = 0) cost nothing; a part that can be moved and carries no noise makes z = 0.
    """
    ratios = []
    for distance, scale in distances_and_scales:
        if distance == 0.0:
            continue
        if scale == 0.0:
            return 0.0
        ratios.append(distance / scale)
    together = math.hypot(*ratios)
    return math.inf if together == 0.0 else 1.0 / together

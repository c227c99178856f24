"""The picture of an audit: what the attacker saw in the two worlds, and how far the claim is from what was shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from privgrad.report.picture import ACCENT, INK, SOFT, bare, new_figure, svg

_OUT = "#c8761a"


@dataclass(frozen=True)
class Picture:
    """inside, outside: the attacker's scores with the canary (or the member) in and out. claimed: None where nothing is.

    labels: what the two are called. words: of the score.
    """

    title: str
    inside: Sequence[float]
    outside: Sequence[float]
    claimed: float | None
    shown: float
    confidence: float
    delta: float
    labels: tuple[str, str] = ("canary in", "canary out")
    words: str = "what the attacker measures"


def to_svg(picture: Picture) -> str:
    """One SVG: two histograms above, claimed and shown epsilon below."""
    figure = new_figure(8, 4.8)
    above, below = figure.subplots(2, 1, height_ratios=(3, 1.2))
    edges = _edges([*picture.inside, *picture.outside])
    for scores, colour, label in zip(
        (picture.outside, picture.inside), (_OUT, ACCENT), picture.labels[::-1], strict=True
    ):
        above.hist(_within(scores, edges), bins=edges, color=colour, alpha=0.55, label=f"{label} ({len(scores):,})")
    above.set_xlabel(picture.words)
    above.set_yticks([])
    above.legend(frameon=False, fontsize=9)
    above.set_title(picture.title, loc="left", fontsize=11, color=INK)

    claimed = picture.claimed if picture.claimed is not None and math.isfinite(picture.claimed) else None
    rows = [(f"shown, {_percent(picture.confidence)} sure", picture.shown, ACCENT)]
    if claimed is not None:
        rows.append(("claimed", claimed, SOFT))
    for place, (_, value, colour) in enumerate(rows):
        below.barh(place, value, height=0.6, color=colour)
        below.annotate(f" {value:.2f}", (value, place), va="center", color=INK, fontsize=9)
    below.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    below.set_xlim(0, 1.15 * max(1e-3, *(value for _, value, _ in rows)))
    below.set_xlabel(f"ε at δ = {picture.delta!r}; an attack can refute a claim, and never prove it")
    for axes in (above, below):
        bare(axes)
    return svg(figure)


def _percent(confidence: float) -> str:
    return f"{100 * confidence:.6g} %"


def _edges(scores: Sequence[float]) -> list[float]:
    """Sixty bins over the scores without their outermost thousandths, which would leave the rest a line."""
    ordered = sorted(scores)
    cut = len(ordered) // 1000
    low, high = ordered[cut], ordered[-1 - cut]
    width = (high - low or 1.0) / 60
    return [low + number * width for number in range(61)]


def _within(scores: Sequence[float], edges: Sequence[float]) -> list[float]:
    return [min(max(score, edges[0]), edges[-1]) for score in scores]

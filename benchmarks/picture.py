"""The picture of step times: docs/speed.svg, written by `benchmarks.page`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from privgrad.report.picture import ACCENT, SOFT, bare, new_figure, svg

_LONGEST = 4.0
"""Plain steps."""


def draw(cells: Mapping[tuple[str, str], Mapping[str, Any]], models: Mapping[str, str], file: Path) -> None:
    """A panel for each model {key: title}, a bar for each engine; what is longer than _LONGEST is cut, and says so."""
    shown: dict[str, tuple[str, str]] = {
        "privgrad-flat": ("privgrad, flat", ACCENT),
        "privgrad-layerwise": ("privgrad, layerwise", ACCENT),
        "privgrad-group": ("privgrad, groups", ACCENT),
        "opacus-ghost": ("Opacus, ghost", "#c8761a"),
        "opacus-hooks": ("Opacus, hooks", "#c8761a"),
    }
    figure = new_figure(11, 2.6)
    panels = figure.subplots(1, len(models), sharey=True)
    for axes, (model, name) in zip(panels, models.items(), strict=True):
        present = [engine for engine in shown if (model, engine) in cells]
        for place, engine in enumerate(reversed(present)):
            ratio = cells[model, engine]["time_ratio"]
            axes.barh(place, ratio, color=shown[engine][1], height=0.65)
            if ratio <= _LONGEST:
                label = axes.annotate(f" {ratio:.2f}", (ratio, place), va="center", fontsize=8)
                label.set_bbox({"facecolor": "w", "edgecolor": "none", "pad": 0.2})
            else:
                axes.annotate(
                    f"{ratio:.0f} → ", (1.35 * _LONGEST, place), va="center", ha="right", fontsize=8, color="w"
                )
        axes.axvline(1.0, color=SOFT, linewidth=1, linestyle=":")
        axes.set_yticks(range(len(present)), [shown[engine][0] for engine in reversed(present)], fontsize=8)
        axes.set_xlim(0, 1.35 * min(_LONGEST, max(cells[model, engine]["time_ratio"] for engine in present)))
        axes.set_title(f"{name} [{cells[model, 'plain']['batch']}]", fontsize=9, loc="left")
        axes.tick_params(labelsize=8)
        bare(axes)
    figure.supxlabel("step time, in plain steps", fontsize=9)
    file.write_text(svg(figure))

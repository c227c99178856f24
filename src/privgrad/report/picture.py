"""What the pictures have in common: colours, axes without a frame, and how they become text."""

from __future__ import annotations

import io
from typing import Any

INK, SOFT, ACCENT = "#1c2024", "#88919c", "#123f7a"


def new_figure(width: float, height: float) -> Any:
    """A figure of so many inches that can be written as SVG, on any machine."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def bare(axes: Any) -> None:
    """Leave of the frame what carries the numbers."""
    axes.tick_params(length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def svg(figure: Any) -> str:
    """The figure as one SVG, the same for the same picture."""
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context({"svg.hashsalt": "privgrad"}):  # without it names inside differ from one time to the next
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()

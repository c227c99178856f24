"""Several plans side by side: rows, a CSV, a picture."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from privgrad.privacy.certificate import round_up
from privgrad.report.picture import ACCENT, INK, SOFT, bare, new_figure, svg


@dataclass(frozen=True)
class Cell:
    """One training: a plan with one seed. test_accuracy: at the last step, or None without a test split.

    seconds: wall time, or None where it is not known: the training was stopped after its last step.
    """

    plan: str
    seed: int
    epsilon: float
    delta: float
    steps: int
    test_accuracy: float | None
    seconds: float | None


@dataclass(frozen=True)
class Row:
    """One plan over its seeds. spread: the standard deviation over seeds (None for one). epsilon: the largest over seeds.

    seconds: the mean of those that are known.
    """

    plan: str
    mean: float | None
    spread: float | None
    seeds: int
    epsilon: float
    delta: float
    steps: int
    seconds: float | None


def rows_of(cells: Sequence[Cell]) -> list[Row]:
    """A row for each plan, in the order in which plans first appear."""
    rows: list[Row] = []
    for plan in dict.fromkeys(cell.plan for cell in cells):
        mine = [cell for cell in cells if cell.plan == plan]
        reached = [cell.test_accuracy for cell in mine if cell.test_accuracy is not None]
        times = [cell.seconds for cell in mine if cell.seconds is not None]
        rows.append(
            Row(
                plan=plan,
                mean=statistics.fmean(reached) if reached else None,
                spread=statistics.stdev(reached) if len(reached) > 1 else None,
                seeds=len(mine),
                epsilon=max(cell.epsilon for cell in mine),
                delta=max(cell.delta for cell in mine),
                steps=max(cell.steps for cell in mine),
                seconds=statistics.fmean(times) if times else None,
            )
        )
    return rows


def to_csv(cells: Sequence[Cell]) -> str:
    """One line for each training."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(Cell.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(cell) for cell in cells)
    return out.getvalue()


def to_svg(rows: Sequence[Row], cells: Sequence[Cell], title: str) -> str:
    """A picture: a dot for each training, a bar for each mean, the best plan on top."""
    shown = sorted((row for row in rows if row.mean is not None), key=lambda row: row.mean or 0.0)
    figure = new_figure(8, 1.4 + 0.5 * max(1, len(shown)))
    axes = figure.add_subplot()
    for place, row in enumerate(shown):
        found = [100 * cell.test_accuracy for cell in cells if cell.plan == row.plan and cell.test_accuracy is not None]
        mean = 100 * (row.mean or 0.0)
        axes.plot(found, [place] * len(found), "o", color=SOFT, markersize=5, zorder=2)
        axes.plot([mean, mean], [place - 0.28, place + 0.28], color=ACCENT, linewidth=3, zorder=3)
        axes.annotate(f"{mean:.1f}", (mean, place + 0.3), ha="center", va="bottom", color=ACCENT, fontsize=9)
    own = len({row.delta for row in rows}) > 1
    words = [_shown(row.epsilon) + (f", δ = {row.delta!r}" if own else "") for row in shown]
    axes.set_yticks(
        range(len(shown)), [f"{_plain(row.plan)}\nε = {text}" for row, text in zip(shown, words, strict=True)]
    )
    axes.set_ylim(-0.6, max(1, len(shown)) - 0.2)
    axes.margins(x=0.12)
    axes.set_xlabel("test accuracy, %  (a dot for each seed, a bar for the mean)")
    axes.set_title(_plain(title), loc="left", fontsize=11, color=INK)
    axes.grid(axis="x", color="#e4e6e8", zorder=0)
    bare(axes)
    return svg(figure)


def _shown(epsilon: float) -> str:
    # Upwards, as every epsilon that people read.
    return "∞" if math.isinf(epsilon) else round_up(epsilon, 2)


def _plain(name: str) -> str:
    """A name as it is: no formula between dollars, nothing that XML cannot hold."""
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in name).replace("$", r"\$")

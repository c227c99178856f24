"""Accuracy against steps of every training of a comparison: `python experiments/curves.py COMPARISON_DIR OUT_DIR`.

Reads metrics.jsonl of each run, writes curves.json and curves.svg.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot


def read(comparison: Path) -> dict[str, list[list[tuple[int, float]]]]:
    """{plan: for each seed [(step, test accuracy)]}."""
    curves: dict[str, list[list[tuple[int, float]]]] = {}
    for metrics in sorted(comparison.glob("*/seed-*/metrics.jsonl")):
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
        curve = [(row["step"], row["test_accuracy"]) for row in rows]
        curves.setdefault(metrics.parents[1].name, []).append(curve)
    return curves


def main() -> None:
    """Write both files."""
    curves, out = read(Path(sys.argv[1])), Path(sys.argv[2])
    (out / "curves.json").write_text(json.dumps(curves, indent=1) + "\n")
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for number, (plan, seeds) in enumerate(curves.items()):
        for seed, curve in enumerate(seeds):
            label = plan.replace("_", " ") if seed == 0 else None
            axes.plot(*zip(*curve, strict=True), color=f"C{number}", marker=".", label=label)
    axes.axhline(0.1, color="gray", linewidth=0.8, linestyle=":")
    axes.set(xlabel="step", ylabel="test accuracy")
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(out / "curves.svg")


if __name__ == "__main__":
    main()

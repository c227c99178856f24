"""Normalization's gain with and without noise: `PRIVGRAD_DATA=DIR python -m experiments.normalization [--seeds 3] [--only NAME]`.

Runs `privgrad compare` on this folder once for each epsilon, and once without noise; what is finished is not repeated. Writes
results/results.json, one row for each plan and epsilon, and results/normalization.svg.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

from privgrad.cli import run

HERE = Path(__file__).parent
EPSILONS = (1.0, 3.0, 8.0, None)
"""None: no noise at all, and otherwise the same mechanism."""
NETWORKS = {"mlp": "MLP", "lenet5": "LeNet-5"}


def compared(epsilon: float | None, seeds: int, only: str, runs: Path) -> list[dict[str, Any]]:
    """The rows of one comparison."""
    out = runs / ("no-noise" if epsilon is None else f"epsilon-{epsilon:g}")
    plans = [str(path) for path in sorted(HERE.glob("*.toml")) if not path.name.startswith("_") and only in path.stem]
    budget = ["--set", "plan.noise.multiplier=0.0"] if epsilon is None else ["--epsilon", str(epsilon)]
    resume = ["--resume"] if (out / "comparison.json").exists() else []
    code = run(["compare", *plans, "--seeds", str(seeds), "--out", str(out), *budget, *resume])
    if code:
        raise SystemExit(code)
    rows: list[dict[str, Any]] = json.loads((out / "results.json").read_text())
    return [{**row, "target_epsilon": epsilon} for row in rows]


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """A panel for each network: accuracy against epsilon, with one standard deviation over seeds."""
    figure, panels = pyplot.subplots(1, len(NETWORKS), figsize=(9.5, 3.8), sharey=True)
    for axes, (network, title) in zip(panels, NETWORKS.items(), strict=True):
        names = [row["plan"] for row in rows if row["plan"].startswith(network)]
        for plan in dict.fromkeys(names):
            mine = sorted((row for row in rows if row["plan"] == plan), key=_order)
            means = [100 * row["mean"] for row in mine]
            spreads = [100 * (row["spread"] or 0.0) for row in mine]
            axes.errorbar(
                [_order(row) for row in mine], means, spreads, marker=".", capsize=2, label=_words(plan, network)
            )
        axes.set_xticks(range(len(EPSILONS)), ["no noise" if e is None else f"ε = {e:g}" for e in EPSILONS])
        axes.set_title(title)
        axes.spines[["top", "right"]].set_visible(False)
        if names:
            axes.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("test accuracy, %")
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def _order(row: dict[str, Any]) -> int:
    return EPSILONS.index(row["target_epsilon"])


def _words(plan: str, network: str) -> str:
    return plan.removeprefix(f"{network}_").replace("_", " ")


def main() -> None:
    """Run everything, write both files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="plans whose name contains this")
    parser.add_argument("--runs", type=Path, default=Path("runs/normalization"))
    parser.add_argument("--out", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    rows = [row for epsilon in EPSILONS for row in compared(epsilon, arguments.seeds, arguments.only, arguments.runs)]
    arguments.out.mkdir(exist_ok=True)
    (arguments.out / "results.json").write_text("[" + ",\n ".join(json.dumps(row) for row in rows) + "]\n")
    draw(rows, arguments.out / "normalization.svg")


if __name__ == "__main__":
    main()

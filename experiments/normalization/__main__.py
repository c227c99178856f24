"""Normalization's gain with and without noise: `PRIVGRAD_DATA=DIR python -m experiments.normalization [--seeds 3] [--only NAME]`.

Runs `privgrad compare` on the plans of each network once for each epsilon, and once without noise; what is finished is not
repeated. Writes results/results.json, one row for each plan and epsilon, and results/normalization.svg, and prints the table.
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
NETWORKS = {"mlp": "MLP, MNIST", "lenet5": "LeNet-5, MNIST", "resnet20": "ResNet-20, CIFAR-10 (16 x 16)"}
MOST_SEEDS = {"resnet20": 2}
"""Where a training is slow, at most so many."""


def compared(network: str, epsilon: float | None, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one comparison."""
    out = arguments.runs / ("no-noise" if epsilon is None else f"epsilon-{epsilon:g}")
    plans = [str(path) for path in sorted(HERE.glob(f"{network}_*.toml")) if arguments.only in path.stem]
    if not plans:
        return []
    budget = ["--set", "plan.noise.multiplier=0.0"] if epsilon is None else ["--epsilon", str(epsilon)]
    resume = ["--resume"] if (out / "comparison.json").exists() else []
    seeds = min(arguments.seeds, MOST_SEEDS.get(network, arguments.seeds))
    code = run(["compare", *plans, "--seeds", str(seeds), "--out", str(out), *budget, *resume])
    if code:
        raise SystemExit(code)
    rows: list[dict[str, Any]] = json.loads((out / "results.json").read_text())
    return [{**row, "target_epsilon": epsilon} for row in rows]


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """A panel for each network: accuracy against epsilon, with one standard deviation over seeds."""
    figure, panels = pyplot.subplots(1, len(NETWORKS), figsize=(13.5, 5.2))
    for axes, (network, title) in zip(panels, NETWORKS.items(), strict=True):
        for plan in _plans(rows, network):
            mine = sorted((row for row in rows if row["plan"] == plan), key=_order)
            means = [100 * row["mean"] for row in mine]
            spreads = [100 * (row["spread"] or 0.0) for row in mine]
            axes.errorbar(
                [_order(row) for row in mine], means, spreads, marker=".", capsize=2, label=_words(plan, network)
            )
        axes.set_xticks(range(len(EPSILONS)), [_budget(epsilon) for epsilon in EPSILONS])
        axes.set_title(title)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2)
    panels[0].set_ylabel("test accuracy, %")
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as the README's table."""
    lines = [
        f"| test accuracy, % | seeds | {' | '.join(map(_budget, EPSILONS))} |",
        f"|---|{'---|' * (len(EPSILONS) + 1)}",
    ]
    for network, title in NETWORKS.items():
        for plan in _plans(rows, network):
            mine = sorted((row for row in rows if row["plan"] == plan), key=_order)
            seeds = " to ".join(str(count) for count in sorted({row["seeds"] for row in mine}))
            cells = " | ".join(_cell(row) for row in mine)
            lines.append(f"| {title.split(',')[0]}, {_words(plan, network)} | {seeds} | {cells} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    spread = "" if row["spread"] is None else f" ± {100 * row['spread']:.1f}"
    return f"{100 * row['mean']:.1f}{spread}"


def _plans(rows: list[dict[str, Any]], network: str) -> list[str]:
    return sorted({row["plan"] for row in rows if row["plan"].startswith(network)})


def _order(row: dict[str, Any]) -> int:
    return EPSILONS.index(row["target_epsilon"])


def _budget(epsilon: float | None) -> str:
    return "no noise" if epsilon is None else f"ε = {epsilon:g}"


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
    rows = [row for epsilon in EPSILONS for network in NETWORKS for row in compared(network, epsilon, arguments)]
    arguments.out.mkdir(exist_ok=True)
    (arguments.out / "results.json").write_text("[" + ",\n ".join(json.dumps(row) for row in rows) + "]\n")
    draw(rows, arguments.out / "normalization.svg")
    print(table(rows))


if __name__ == "__main__":
    main()

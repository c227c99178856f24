"""Normalization's gain with and without noise: `PRIVGRAD_DATA=DIR python -m experiments.normalization [--seeds 3] [--only NAME]`.

Runs `privgrad compare` on the plans of each network once for each epsilon, and once without noise; what is finished is not
repeated. Then writes results/results.json, a row for each plan and epsilon, of everything that is finished in --runs, and
results/normalization.svg, and prints the table. Rows of plans that --runs does not have stay as they were. A second seed
for one network alone: --seeds 2 --only resnet20.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

from privgrad.cli import run
from privgrad.cli.output import plain
from privgrad.report.comparison import Cell, rows_of

HERE = Path(__file__).parent
EPSILONS = (1.0, 3.0, 8.0, None)
"""None: no noise at all, and otherwise the same mechanism."""
NETWORKS = {
    "mlp": "MLP, MNIST",
    "lenet5": "LeNet-5, MNIST",
    "resnet20": "ResNet-20, CIFAR-10 (16 x 16)",
    "resnet18": "ResNet-18, CIFAR-10 (16 x 16)",
}
COLORS = {
    "none": "#1c2024",
    "group": "#d1495b",
    "layer": "#edae49",
    "public_dead_leaves": "#00798c",
    "public_fashion_mnist": "#66a182",
    "batch_clipping_test_batch": "#8d6bb8",
}
"""What the picture shows. Batch Clipping with dead leaves lies 20 points lower and would flatten all else: it is in the table."""


def train(network: str, epsilon: float | None, arguments: argparse.Namespace) -> None:
    """One comparison: what of it is not there yet."""
    out = _directory(arguments.runs, epsilon)
    plans = [str(path) for path in _files(network) if arguments.only in path.stem]
    if not plans:
        return
    budget = ["--set", "plan.noise.multiplier=0.0"] if epsilon is None else ["--epsilon", str(epsilon)]
    resume = ["--resume"] if (out / "comparison.json").exists() else []
    code = run(["compare", *plans, "--seeds", str(arguments.seeds), "--out", str(out), *budget, *resume])
    if code:
        raise SystemExit(code)


def collected(runs: Path) -> list[dict[str, Any]]:
    """A row for each plan and epsilon, of all trainings that are finished, however many seeds a plan has."""
    found: list[dict[str, Any]] = []
    for epsilon in EPSILONS:
        files = [
            file
            for network in NETWORKS
            for plan in _files(network)
            for file in sorted((_directory(runs, epsilon) / plan.stem).glob("seed-*/result.json"))
        ]
        cells = [json.loads(file.read_text()) for file in files]
        rows = rows_of(
            [Cell(**{**cell, "epsilon": math.inf if cell["epsilon"] is None else cell["epsilon"]}) for cell in cells]
        )
        found += [{**plain(asdict(row)), "target_epsilon": epsilon} for row in rows]
    return found


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The new rows, and the old ones of plans and epsilons that have none: nobody trains all of this in one go."""
    trained = {(row["plan"], row["target_epsilon"]) for row in new}
    rows = new + [row for row in old if (row["plan"], row["target_epsilon"]) not in trained]
    return sorted(rows, key=lambda row: (_order(row), list(NETWORKS).index(row["plan"].split("_")[0]), row["plan"]))


def _directory(runs: Path, epsilon: float | None) -> Path:
    return runs / ("no-noise" if epsilon is None else f"epsilon-{epsilon:g}")


def _files(network: str) -> list[Path]:
    return sorted(HERE.glob(f"{network}_*.toml"))


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """A panel for each network: accuracy against epsilon, with one standard deviation over seeds."""
    figure, panels = pyplot.subplots(1, len(NETWORKS), figsize=(4.5 * len(NETWORKS), 5.2))
    for axes, (network, title) in zip(panels, NETWORKS.items(), strict=True):
        for name, color in COLORS.items():
            mine = sorted((row for row in rows if row["plan"] == f"{network}_{name}"), key=_order)
            if not mine:
                continue
            means = [100 * row["mean"] for row in mine]
            spreads = [100 * (row["spread"] or 0.0) for row in mine]
            places = [_order(row) for row in mine]
            label = name.replace("_", " ")
            axes.errorbar(places, means, spreads, marker=".", capsize=2, color=color, label=label)
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
            mine = {_order(row): row for row in rows if row["plan"] == plan}
            counts = [mine[place]["seeds"] if place in mine else 0 for place in range(len(EPSILONS))]
            seeds = str(counts[0]) if len(set(counts)) == 1 else ", ".join(map(str, counts))
            cells = " | ".join(_cell(mine[place]) if place in mine else "" for place in range(len(EPSILONS)))
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
    parser.add_argument("--collect", action="store_true", help="train nothing, only put together what is finished")
    parser.add_argument("--runs", type=Path, default=Path("runs/normalization"))
    parser.add_argument("--out", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    if not arguments.collect:
        for epsilon in EPSILONS:
            for network in NETWORKS:
                train(network, epsilon, arguments)
    file = arguments.out / "results.json"
    rows = merged(json.loads(file.read_text()) if file.exists() else [], collected(arguments.runs))
    arguments.out.mkdir(exist_ok=True)
    file.write_text("[" + ",\n ".join(json.dumps(row) for row in rows) + "]\n")
    draw(rows, arguments.out / "normalization.svg")
    print(table(rows))


if __name__ == "__main__":
    main()

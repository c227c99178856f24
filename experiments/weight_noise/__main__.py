"""Accuracy against noise on the weights: `PRIVGRAD_DATA=DIR python -m experiments.weight_noise [OUT]`.

Trains without privacy, adds Gaussian noise to every weight, measures. Writes results.json and weight_noise.svg, in five minutes.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import torch
import torch.nn.functional as F
from matplotlib import pyplot
from torch import Tensor, nn

import privgrad as pg
from privgrad.data.source import load
from privgrad.mechanism.statistics import PublicStatistics
from privgrad.nn.models import MODELS

NETWORKS = ("mlp", "lenet5")
NORMALIZATIONS = ("none", "group", "layer", "public_batch", "batch")
LEVELS = {
    "relative": (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.4, 2.0),
    "absolute": (0.0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3),
}
"""Standard deviations: as multiples of the root mean square of each tensor; and the same for all weights, as DP-SGD adds it."""
SEEDS = (0, 1, 2)
DRAWS = 3
"""Noises for each training and level."""
STEPS, BATCH, RATE = 300, 128, 0.1
TESTED = 2000
LOSS = pg.supervised(F.cross_entropy)


def statistics_of(public: tuple[Tensor, Tensor], model: nn.Module) -> None:
    """Give PublicBatchNorm layers the statistics of the public batch at the model's weights of now."""
    PublicStatistics(rows=len(public[0])).measured(model, LOSS, public)


def recalibrated(model: nn.Module, inputs: Tensor) -> None:
    """Give BatchNorm layers the statistics of training inputs at the model's weights of now."""
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.reset_running_stats()
            layer.momentum = None
    model.train()
    with torch.no_grad():
        model(inputs)


def trained(network: str, normalization: str, seed: int, data: tuple[Tensor, Tensor], public: Any) -> nn.Module:
    """Plain SGD with momentum, no privacy."""
    torch.manual_seed(seed)
    model = MODELS[network](input_shape=(1, 28, 28), classes=10, normalization=normalization)
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        rows = torch.randint(len(data[0]), (BATCH,))
        if normalization == "public_batch":
            statistics_of(public, model)
        optimizer.zero_grad()
        LOSS(model, (data[0][rows], data[1][rows])).mean().backward()
        optimizer.step()
        schedule.step()
    return model


def noised(model: nn.Module, clean: dict[str, Tensor], kind: str, level: float, seed: int) -> None:
    """Put the clean weights plus noise into the model."""
    generator = torch.Generator().manual_seed(seed)
    model.load_state_dict(clean)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = level * (float(parameter.square().mean().sqrt()) if kind == "relative" else 1.0)
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def accuracy(model: nn.Module, test: tuple[Tensor, Tensor]) -> float:
    """In eval mode."""
    model.eval()
    with torch.no_grad():
        return float((model(test[0]).argmax(1) == test[1]).double().mean())


def curves(
    model: nn.Module, normalization: str, kind: str, train: Any, test: Any, public: Any
) -> dict[str, list[float]]:
    """{name of the curve: accuracy at each level, the mean over draws}. The model's weights are afterwards what they were."""
    clean = {name: value.clone() for name, value in model.state_dict().items()}
    found: dict[str, list[float]] = {}
    for level in LEVELS[kind]:
        reached: dict[str, list[float]] = {}
        for number in range(DRAWS if level else 1):
            noised(model, clean, kind, level, number)
            if normalization == "public_batch":
                statistics_of(public, model)
            reached.setdefault(normalization, []).append(accuracy(model, test))
            if normalization == "batch":
                recalibrated(model, train[0][:1000])
                reached.setdefault("batch_recalibrated", []).append(accuracy(model, test))
        for name, values in reached.items():
            found.setdefault(name, []).append(statistics.fmean(values))
    model.load_state_dict(clean)
    return found


def measured() -> list[dict[str, Any]]:
    """A row for each network, kind of noise and curve: accuracies [seeds][levels]."""
    mnist = load("mnist")
    train = mnist.train.take(torch.arange(20_000))  # type: ignore[attr-defined]
    test = mnist.test.take(torch.arange(TESTED))  # type: ignore[attr-defined]
    public = load("fashion_mnist").train.take(torch.arange(128))  # type: ignore[attr-defined]
    rows = []
    for network in NETWORKS:
        for normalization in NORMALIZATIONS:
            models = [trained(network, normalization, seed, train, public) for seed in SEEDS]
            for kind, levels in LEVELS.items():
                seeds = [curves(model, normalization, kind, train, test, public) for model in models]
                for name in seeds[0]:
                    accuracies = [[round(value, 4) for value in one[name]] for one in seeds]
                    row = {"network": network, "normalization": name, "noise": kind, "levels": levels}
                    rows.append({**row, "accuracies": accuracies})
                    means = [f"{statistics.fmean(values):.3f}" for values in zip(*accuracies, strict=True)]
                    print(network, name, kind, *means, file=sys.stderr)
    return rows


WORDS = {
    "mlp": "MLP",
    "lenet5": "LeNet-5",
    "relative": "noise / root mean square of each tensor",
    "absolute": "noise, the same on all weights",
}


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """A panel for each network and kind of noise: the mean over seeds, and all seeds as a band."""
    figure, grid = pyplot.subplots(len(LEVELS), len(NETWORKS), figsize=(9.5, 7), sharey=True)
    for line, kind in enumerate(LEVELS):
        for column, network in enumerate(NETWORKS):
            shown = [row for row in rows if (row["network"], row["noise"]) == (network, kind)]
            _panel(grid[line][column], shown)
            grid[line][column].set(title=WORDS[network], xlabel=WORDS[kind], ylim=(0, 100))
        grid[line][0].set_ylabel("test accuracy, %")
    grid[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def _panel(axes: Any, rows: list[dict[str, Any]]) -> None:
    for number, row in enumerate(rows):
        per_level = [[100 * value for value in values] for values in zip(*row["accuracies"], strict=True)]
        low, high = [min(values) for values in per_level], [max(values) for values in per_level]
        means = [statistics.fmean(values) for values in per_level]
        words = row["normalization"].replace("_", " ")
        axes.plot(row["levels"], means, color=f"C{number}", marker=".", label=words)
        axes.fill_between(row["levels"], low, high, color=f"C{number}", alpha=0.15, lw=0)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Write both files."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    rows = measured()
    (out / "results.json").write_text("[" + ",\n ".join(json.dumps(row) for row in rows) + "]\n")
    draw(rows, out / "weight_noise.svg")


if __name__ == "__main__":
    main()

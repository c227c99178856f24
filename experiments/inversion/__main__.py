"""What two attacks rebuild of an image from one released gradient: `PRIVGRAD_DATA=DIR python -m experiments.inversion [OUT]`.

Writes results.json and inversion.svg. About five minutes on one slow core.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import torch
import torch.nn.functional as F
from matplotlib import pyplot
from torch import Tensor, nn

import privgrad as pg
from privgrad.audit.inversion import (
    Observed,
    Reconstruction,
    deep_leakage,
    inferred_label,
    inverting_gradients,
    observe,
)
from privgrad.audit.similarity import similarity
from privgrad.data.source import load

RATIOS = (0.0, 0.3, 0.6, 0.9)
MULTIPLIERS = (0.0, 0.01, 1.0)
"""z: none; noise about as long as the clipped gradient itself, far below any privacy; noise of a private training."""
IMAGES = (0, 1, 2, 3, 4)
"""The first images of Fashion-MNIST's test split. The first one is shown."""
BOX = (-1.0, 1.0)
LOSS = pg.supervised(F.cross_entropy)

Attack = Callable[..., Reconstruction]


def attack_for(name: str, multiplier: float) -> Attack:
    """The attacker knows how much noise there is, and takes the stronger prior against it."""
    if name == "dlg":
        return partial(deep_leakage, iterations=2000 if multiplier == 0 else 300)
    iterations, variation = (3000, 0.01) if multiplier == 0 else (1000, 0.1)
    return partial(inverting_gradients, iterations=iterations, variation=variation, box=BOX)


class LeNet(nn.Module):
    """The network of DLG's code: strides in place of pooling, sigmoid in place of ReLU, large weights; for 28 x 28 pixels."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, stride in ((1, 2), (12, 2), (12, 1)):
            layers += [nn.Conv2d(before, 12, 5, padding=2, stride=stride), nn.Sigmoid()]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(588, 10))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        """[rows, 1, 28, 28] to logits [rows, 10]."""
        logits: Tensor = self.layers(inputs)
        return logits


def released(model: nn.Module, ratio: float, multiplier: float, image: Tensor, label: Tensor) -> Observed:
    """The gradient of one image as a step of the plan releases it: masked, clipped to 1, noised."""
    plan = pg.Plan(
        sampling=pg.PoissonSampling(rate=1.0, divisor=1.0),
        steps=1,
        compression=pg.RandomSparsification(final_ratio=ratio, ramp=False),
        clipping=pg.FlatClipping(max_norm=1.0),
        noise=pg.GaussianNoise(multiplier=multiplier, insecure_seed=0),
    )
    return observe(plan, model, LOSS, image, label, classes=10)


def measured() -> tuple[list[dict[str, Any]], Tensor, dict[tuple[str, float, float], Tensor]]:
    """A row for each attack, ratio and noise; the image that is shown; what was found of it."""
    torch.manual_seed(0)
    model = LeNet().double()
    images, labels = load("fashion_mnist").test.take(torch.tensor(IMAGES))  # type: ignore[attr-defined]
    images = images.double()
    rows, shown = [], {}
    for multiplier in MULTIPLIERS:
        for ratio in RATIOS:
            seen = [
                released(model, ratio, multiplier, images[i : i + 1], labels[i : i + 1]) for i in range(len(IMAGES))
            ]
            read = [inferred_label(one) == int(label) for one, label in zip(seen, labels, strict=True)]
            for name in ("dlg", "inverting_gradients"):
                found = [
                    attack_for(name, multiplier)(one, label=int(label)).inputs.clamp(*BOX)
                    for one, label in zip(seen, labels, strict=True)
                ]
                figures = [similarity(f, image, BOX[1] - BOX[0]) for f, image in zip(found, images, strict=True)]
                rows.append(
                    {
                        "attack": name,
                        "ratio": ratio,
                        "multiplier": multiplier,
                        "kept_coordinates": len(seen[0].released),
                        "labels_read": sum(read),
                        **{key: statistics.fmean(asdict(s)[key] for s in figures) for key in ("mse", "psnr", "ssim")},
                        "images": [asdict(s) for s in figures],
                    }
                )
                shown[name, multiplier, ratio] = found[0]
                print(*[f"{key} = {value}" for key, value in rows[-1].items() if key != "images"], file=sys.stderr)
    return rows, images[0], shown


NAMES = {"dlg": "DLG", "inverting_gradients": "Inverting\nGradients"}


def draw(
    rows: list[dict[str, Any]], original: Tensor, shown: dict[tuple[str, float, float], Tensor], file: Path
) -> None:
    """A column for each ratio, a row for each attack and noise, figures of the shown image under each."""
    lines = [(name, multiplier) for name in NAMES for multiplier in MULTIPLIERS]
    figure, grid = pyplot.subplots(
        len(lines), 2 + len(RATIOS), figsize=(9.4, 10.6), gridspec_kw={"hspace": 0.5, "wspace": 0.12}
    )
    for line, (name, multiplier) in enumerate(lines):
        words, first, *others = grid[line]
        noise = "no noise" if multiplier == 0 else f"z = {multiplier:g}"
        words.set_axis_off()
        words.text(0.95, 0.5, f"{NAMES[name]}\n{noise}", ha="right", va="center", transform=words.transAxes)
        _picture(first, original)
        for axes, ratio in zip(others, RATIOS, strict=True):
            row = next(r for r in rows if (r["attack"], r["multiplier"], r["ratio"]) == (name, multiplier, ratio))
            mine = row["images"][0]
            _picture(axes, shown[name, multiplier, ratio])
            axes.set_xlabel(
                f"MSE {mine['mse']:.1e}\nPSNR {mine['psnr']:.0f} dB, SSIM {mine['ssim']:.2f}", fontsize=7.5, labelpad=2
            )
        if line == 0:
            for axes, title in zip(grid[0][1:], ["original", *(f"r = {ratio:g}" for ratio in RATIOS)], strict=True):
                axes.set_title(title, fontsize=10)
    figure.savefig(file, bbox_inches="tight", metadata={"Date": None})


def _picture(axes: Any, image: Tensor) -> None:
    axes.imshow(image[0].numpy(), cmap="gray", vmin=BOX[0], vmax=BOX[1], interpolation="none")
    axes.set_xticks([])
    axes.set_yticks([])


def main() -> None:
    """Write both files."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    rows, original, shown = measured()
    lines = ",\n ".join(json.dumps({key: _rounded(value) for key, value in row.items()}) for row in rows)
    (out / "results.json").write_text(f"[{lines}]\n")
    draw(rows, original, shown, out / "inversion.svg")


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [{key: _rounded(number) for key, number in figures.items()} for figures in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()

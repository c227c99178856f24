"""What holds BatchNorm under Batch Clipping back without noise: `PRIVGRAD_DATA=DIR python -m experiments.normalization.cause`.

Trains without noise at several rates and norms, and looks at the SAME weights with statistics of four kinds at inference. Writes
results/batch_clipping_cause.json; what is trained is not trained again.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import privgrad as pg
from privgrad.cli import run
from privgrad.cli.build import build_data, build_public
from privgrad.mechanism.statistics import PublicStatistics
from privgrad.nn.models import build_model
from privgrad.training.batches import taker
from privgrad.training.evaluation import DeclaredSplit, accuracy

HERE = Path(__file__).parent
NETWORKS = ("mlp", "lenet5")
SETTINGS = ((0.1, 0.06), (0.1, 0.25), (0.1, 1.0), (0.1, 4.0), (1.0, 0.006), (1.0, 0.1), (1.0, 0.4))
"""max_norm and learning rate. What is chosen at epsilon 3 comes first; (1.0, 0.006) has its product."""
ROWS = 128
LOSS = pg.supervised(nn.functional.cross_entropy)


def trained(network: str, max_norm: float, rate: float, runs: Path) -> Path:
    """The run of one training without noise, which is made where it is not there."""
    out = runs / f"{network}-{max_norm:g}-{rate:g}"
    if (out / "model.safetensors").exists():
        return out
    settings = ("plan.noise.multiplier=0.0", f"plan.clipping.max_norm={max_norm}", f"optimizer.lr={rate}")
    flags = [word for setting in settings for word in ("--set", setting)]
    code = run(["train", str(HERE / f"{network}_batch_clipping_dead_leaves.toml"), *flags, "--out", str(out)])
    if code:
        raise SystemExit(code)
    return out


def looked_at(directory: Path) -> dict[str, float]:
    """Test accuracy of one run's weights, for each kind of statistics."""
    config: dict[str, Any] = tomllib.loads((directory / "config.toml").read_text())
    config["public"].setdefault("source", None)
    source = build_data(config)
    model = build_model(config["model"]["name"], source.input_shape, source.classes, config["model"]["arguments"])
    model.load_state_dict(load_file(directory / "model.safetensors"))
    fashion = build_public({**config, "public": {**config["public"], "source": "fashion_mnist/test.parquet"}}, source)
    batches = {
        "dead leaves": build_public(config, source),
        "Fashion-MNIST": fashion,
        "training images": source.train,
    }
    split = DeclaredSplit(source.test)
    found = {}
    for name, data in batches.items():
        calibrate(model, data)
        found[name] = accuracy(model, split)
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            layer.running_mean = layer.running_var = None
    found["test batch"] = accuracy(model, split)
    return found


def calibrate(model: nn.Module, data: Any) -> None:
    """Give BatchNorm layers the statistics of the first records, at the weights of now, as plan.statistics does."""
    take = taker(data)
    assert take is not None
    PublicStatistics(rows=ROWS).measured(model, LOSS, take(torch.arange(ROWS)))


def main() -> None:
    """Train, look, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/normalization-cause"))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "batch_clipping_cause.json")
    arguments = parser.parse_args()
    rows = []
    for network in NETWORKS:
        for max_norm, rate in SETTINGS:
            seen = looked_at(trained(network, max_norm, rate, arguments.runs))
            rows.append({"network": network, "max_norm": max_norm, "lr": rate, "test_accuracy": seen})
            print(rows[-1], flush=True)
    words = "64 groups of 16, 120 steps, no noise, seed 0; statistics at inference of 128 records, or of each test batch of 1,024"
    content = {"command": "python -m experiments.normalization.cause", "what": words, "runs": rows}
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()

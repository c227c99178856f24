"""ModelMix as its published scripts run it (arXiv:2210.03843), for comparison: NO GUARANTEE, and the certificate says so.

    PYTHONPATH=src python experiments/modelmix/published/recipe.py --out DIR [--set section.key=value ...]

What no proof covers: momentum and weight decay on mixed weights, parameters of normalization that are not mixed, no bound on
coordinates. (The scripts also draw each batch in 15 parts, so that a record may enter several times; here it is drawn once.)
The noise and the mixing below are this file's own: no plan offers them.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

import privgrad as pg
from privgrad.cli.build import build_data, build_plan, units_in
from privgrad.cli.config import assign, complete, read_config, resolved
from privgrad.mechanism.randomness import Source
from privgrad.mechanism.stage import Stage
from privgrad.mechanism.states import ClippedSum, NoisedSum
from privgrad.nn.models import build_model
from privgrad.privacy.ledger import Receipt

NOISE, WIDTH = 0.335, 0.15
"""Of the Gaussian, over the clipping norm; of the uniform, over the learning rate."""


@dataclass(frozen=True)
class UnaccountedNoise(Stage):
    """Gaussian noise for which nothing is claimed: to the ledger every step is one without any."""

    kind: ClassVar[str] = "unaccounted"
    multiplier: float = 0.0
    insecure_seed: None = None

    def add(self, sums: ClippedSum, receipt: Receipt, source: Source) -> NoisedSum:
        (part,) = sums.parts
        drawn = source.at(receipt.step)
        for value in sums.values.values():
            value.add_(
                drawn.normal_(torch.empty_like(value).flatten()).view_as(value), alpha=NOISE * sums.distance(part)
            )
        return NoisedSum(sums, {part.name: 0.0}, receipt)

    words: ClassVar[str] = "noise as in the published scripts of ModelMix, for which nothing is claimed"


class PublishedSGD(torch.optim.SGD):
    """SGD that starts from a uniform point between the last two weights; not for groups with mixed=False."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weights in group["params"] if group["mixed"] else ():
                state = self.state[weights]
                now = weights.clone()
                gap = state.get("before", now) - now
                length = gap.abs().clamp(min=WIDTH * group["lr"])
                weights.add_(gap / 2 + (torch.rand_like(gap) - 0.5) * length)
                state["before"] = now
        super().step()


def main(arguments: list[str] | None = None) -> float | None:
    """Train it; the test accuracy."""
    parser = argparse.ArgumentParser(description="ModelMix as published. NO GUARANTEE.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="section.key=value")
    asked = parser.parse_args(arguments)
    given = read_config(Path(__file__).with_suffix(".toml"))
    for setting in asked.settings:
        assign(given, setting)
    config = resolved(complete(given), None)
    source = build_data(config)
    torch.manual_seed(config["training"]["seed"])
    model = build_model(config["model"]["name"], source.input_shape, source.classes, config["model"]["arguments"])
    normalizing = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.GroupNorm)
        for parameter in module.parameters()
    }
    groups = [
        {"params": [p for p in model.parameters() if (id(p) in normalizing) is not mixed], "mixed": mixed}
        for mixed in (True, False)
    ]
    options = {key: value for key, value in config["optimizer"].items() if key != "name"}
    trainer = pg.Trainer(
        model,
        PublishedSGD([group for group in groups if group["params"]], **options),
        source.train,
        replace(build_plan(config, units_in(source)), noise=UnaccountedNoise()),
        pg.supervised(torch.nn.functional.cross_entropy),
        directory=asked.out,
        test=pg.DeclaredSplit(source.test, config["data"]["test"]),
        data_name=f"{source.name}; {source.scaling}",
        evaluations=config["training"]["evaluations"],
    )
    return trainer.fit().test_accuracy


if __name__ == "__main__":
    main()

"""Total noise at equal epsilon, mixing against the plain Gaussian: `python experiments/modelmix/noise.py [OUT]`. Trains nothing.

For each setting the plain Gaussian's multiplier (by PLD, and by RDP, which is what mixing is accounted by), and for several
Gaussian shares and p the uniform's width that reaches the same epsilon. Total: the standard deviation, in one coordinate, of all
noise on the clipped sum, in units of max_norm. Writes noise.json.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

from privgrad.errors import PrivgradError
from privgrad.mechanism.clipping import CoordinateClipping
from privgrad.mechanism.mixing import ModelMix
from privgrad.mechanism.noise import GaussianNoise
from privgrad.mechanism.plan import Plan
from privgrad.mechanism.sampling import PoissonSampling
from privgrad.privacy.accounting import Accountant

SETTINGS = {
    "features, epsilon 1": (50_000, 512, 160, 1.0),
    "features, epsilon 0.4": (50_000, 512, 160, 0.4),
    "ResNet-20, epsilon 8": (50_000, 512, 200, 8.0),
}
"""(images, expected batch size, steps, epsilon)."""
SHARES = (0.75, 0.9)
"""Of the plain Gaussian's multiplier, that mixing keeps as its Gaussian part."""
CUTS = (100.0,)
"""p: coordinates are cut to max_norm / sqrt(p)."""


def plan_of(images: int, batch: int, steps: int) -> Plan:
    """DP-SGD with that sampling."""
    return Plan(sampling=PoissonSampling(expected_batch_size=batch, dataset_size=images), steps=steps)


def mixed(plain: Plan, multiplier: float, p: float, epsilon: float) -> dict[str, Any]:
    """The same steps with mixing, calibrated by its width."""
    plan = Plan(
        sampling=plain.sampling,
        steps=plain.steps,
        clipping=CoordinateClipping(max_norm=1.0, p=p),
        noise=GaussianNoise(multiplier=multiplier),
        mixing=ModelMix(width_ratio="calibrate"),
    )
    try:
        done = plan.calibrate(epsilon)
    except PrivgradError as error:
        return {"multiplier": multiplier, "p": p, "refused": str(error)}
    assert isinstance(done.mixing, ModelMix)
    assert not isinstance(done.mixing.width_ratio, str)
    width = done.mixing.width_ratio * done.divisor
    total = math.sqrt(multiplier**2 + width**2 / 12)
    return {"multiplier": multiplier, "p": p, "width": width, "total": total, "epsilon": done.epsilon()}


def rows() -> list[dict[str, Any]]:
    """One for each setting, share and p."""
    found = []
    for name, (images, batch, steps, epsilon) in SETTINGS.items():
        plain = plan_of(images, batch, steps).calibrate(epsilon)
        alone = plain.noise.multiplier or 0.0
        by_rdp = dataclasses.replace(plain, accountant=Accountant.RDP).calibrate(epsilon).noise.multiplier
        known = {"setting": name, "gaussian_alone": alone, "gaussian_alone_by_rdp": by_rdp}
        for p in CUTS:
            for share in SHARES:
                row = mixed(plain, share * alone, p, epsilon)
                ratio = {"ratio": row["total"] / alone} if "total" in row else {}
                found.append({**known, "share": share, **row, **ratio})
                print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    """Write the file."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results"
    (out / "noise.json").write_text(json.dumps(rows(), indent=1) + "\n")


if __name__ == "__main__":
    main()

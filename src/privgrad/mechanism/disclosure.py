"""Un-noised quantities that a user may ask for by name. The guarantee does not cover them, and the certificate says so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from privgrad.errors import PrivgradError, nearest

DISCLOSURES = {
    "training_loss": "the mean loss over the training records, at each evaluation",
    "training_accuracy": "the share of the training records that the model classifies rightly, at each evaluation",
    "batch_size": "how many {unit}s took part in a step",
    "clipped_share": "the share of the {unit}s' contributions that clipping scaled down in a step",
    "gradient_norm": "the mean norm of the {unit}s' contributions to a step before clipping",
}
"""What can be disclosed, in the words of the certificate."""


def check_disclosures(names: Iterable[str]) -> tuple[str, ...]:
    """The names, each of which must be known."""
    if isinstance(names, str | Mapping) or not isinstance(names, Iterable):
        raise PrivgradError(f"disclose is {names!r}; expected a list of names: {', '.join(DISCLOSURES)}")
    given = tuple(names)
    for name in given:
        if not isinstance(name, str) or name not in DISCLOSURES:
            raise PrivgradError(f"disclose names {name!r}; {nearest(str(name), DISCLOSURES)}")
    if len(set(given)) < len(given):
        raise PrivgradError(f"disclose names something twice: {', '.join(given)}")
    return given


@dataclass
class ClippingWatch:
    """PRIVATE. What clipping saw in one step, kept only where the plan discloses it."""

    norms: float = 0.0
    clipped: int = 0
    count: int = 0

    def add(self, norms: Tensor, weights: Tensor) -> None:
        """norms, weights: [units, blocks], as a rule sees them."""
        finite = norms.isfinite()
        self.norms += float(norms[finite].sum())
        self.clipped += int((weights < 1).sum())
        self.count += norms.numel()

    def values(self, units: int) -> dict[str, float]:
        """What a step can disclose, by name. A step without units has no norms: 0."""
        count = max(1, self.count)
        return {
            "batch_size": float(units),
            "clipped_share": self.clipped / count,
            "gradient_norm": self.norms / count,
        }

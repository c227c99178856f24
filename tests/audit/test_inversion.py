"""A gradient that is released as it is gives its record away; one that is released with noise does not."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import privgrad as pg
from privgrad.audit.inversion import (
    Observed,
    deep_leakage,
    inferred_label,
    inverting_gradients,
    observe,
    total_variation,
)
from privgrad.audit.similarity import similarity
from privgrad.data.source import digits
from privgrad.errors import PrivgradError
from privgrad.mechanism.sparsification import Kept
from tests.helpers import full_batch_plan

LOSS = pg.supervised(F.cross_entropy)


def network() -> nn.Module:
    """A smooth network: its gradient can be followed to the record."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.Sigmoid(), nn.Flatten(), nn.Linear(512, 10)]
    model = nn.Sequential(*layers).double()
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return model


def record(row: int) -> tuple[Tensor, Tensor]:
    images, labels = digits().train[row : row + 1]
    return images.double(), labels


def observed(row: int = 0, multiplier: float = 0.0, **stages: object) -> Observed:
    stages = {"clipping": pg.FlatClipping(max_norm=0.1), **stages}
    images, labels = record(row)
    return observe(full_batch_plan(1, multiplier=multiplier, seed=0, **stages), network(), LOSS, images, labels, 10)


@pytest.mark.parametrize("label", [True, False], ids=["known label", "soft label"])
def test_a_released_gradient_gives_its_record_away_and_a_noised_one_does_not(label: bool) -> None:
    (image,), (truth,) = record(0)
    spread = float(image.max() - image.min())
    known = int(truth) if label else None
    found = deep_leakage(observed(), label=known, iterations=300)
    assert similarity(found.inputs, image, spread).mse < 1e-4
    assert found.label == int(truth)
    hidden = deep_leakage(observed(multiplier=1.0), label=known, iterations=50)
    assert similarity(hidden.inputs.clamp(image.min(), image.max()), image, spread).mse > image.var() / 2


def test_direction_and_smoothness_are_enough_for_an_outline() -> None:
    (image,), (truth,) = record(0)
    box, spread = (float(image.min()), float(image.max())), float(image.max() - image.min())
    found = inverting_gradients(observed(), label=int(truth), iterations=500, variation=1e-3, box=box)
    hidden = inverting_gradients(observed(multiplier=1.0), label=int(truth), iterations=100, box=box)
    assert similarity(found.inputs, image, spread).ssim > 0.8
    assert similarity(hidden.inputs, image, spread).ssim < 0.4
    assert box[0] <= found.inputs.min()
    assert found.inputs.max() <= box[1]


CLIPPINGS = {
    "flat": pg.FlatClipping(max_norm=0.1),
    "not clipped": pg.FlatClipping(max_norm=1e3),
    "layerwise": pg.LayerwiseClipping(max_norm=0.1),
    "automatic": pg.AutomaticClipping(max_norm=0.1),
    "l2_linf": pg.CoordinateClipping(max_norm=0.1, p=100.0),
}


@pytest.mark.parametrize("structure", ["none", "elements", "rows"])
@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_the_attacker_does_to_a_record_what_the_mechanism_does(clipping: str, structure: str) -> None:
    stages: dict[str, object] = {"clipping": CLIPPINGS[clipping]}
    if structure != "none":
        stages["compression"] = pg.RandomSparsification(final_ratio=0.6, ramp=False, structure=structure)
    seen = observed(**stages)
    torch.testing.assert_close(seen.expected(*record(0)).detach(), seen.released, rtol=1e-6, atol=1e-9)


def test_only_kept_coordinates_are_compared() -> None:
    seen = observed(compression=pg.RandomSparsification(final_ratio=0.9, ramp=False), multiplier=1.0)
    assert isinstance(seen.encoding, Kept)
    every = sum(value.numel() for value in seen.update.values())
    assert len(seen.released) == sum(shape.numel() for shape in seen.encoding.slots().values())
    assert every // 10 <= len(seen.released) <= every // 10 + len(seen.update)
    assert int(torch.cat([value.flatten() for value in seen.update.values()]).count_nonzero()) == len(seen.released)


def test_the_label_is_read_from_the_last_layer() -> None:
    for row in range(10):
        assert inferred_label(observed(row)) == int(record(row)[1])


def test_figures_of_equal_and_of_constant_images() -> None:
    image = torch.rand(3, 12, 9, generator=torch.Generator().manual_seed(0))
    same = similarity(image, image, 1.0)
    assert (same.mse, same.psnr) == (0.0, float("inf"))
    assert same.ssim == pytest.approx(1.0)
    dark, light = torch.full((1, 8, 8), 0.2), torch.full((1, 8, 8), 0.6)
    apart = similarity(dark, light, 1.0)
    assert apart.mse == pytest.approx(0.16)
    assert apart.psnr == pytest.approx(7.9588, abs=1e-3)
    assert apart.ssim == pytest.approx((2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4))
    other = torch.rand(3, 12, 9, generator=torch.Generator().manual_seed(1))
    assert abs(similarity(image, other, 1.0).ssim) < 0.2


def test_total_variation() -> None:
    assert float(total_variation(torch.ones(1, 1, 4, 4))) == 0.0
    assert float(total_variation(torch.arange(4.0).repeat(4, 1)[None, None])) == pytest.approx(1.0)


def test_what_cannot_be_attacked_is_refused_in_words() -> None:
    with pytest.raises(PrivgradError, match=r"leave out plan\.groups"):
        observed(groups=pg.RandomGroups(1))
    with pytest.raises(PrivgradError, match=r"leave out plan\.thresholds"):
        observed(thresholds=pg.QuantileThresholds())
    seen = observed()
    with pytest.raises(PrivgradError, match="needs images"):
        inverting_gradients(dataclasses.replace(seen, shape=(64,)))
    with pytest.raises(PrivgradError, match="at least three"):
        inferred_label(dataclasses.replace(seen, classes=2))
    with pytest.raises(PrivgradError, match="label is 10"):
        deep_leakage(seen, label=10)
    with pytest.raises(PrivgradError, match="expected the same"):
        similarity(torch.zeros(1, 8, 8), torch.zeros(1, 8, 7), 1.0)

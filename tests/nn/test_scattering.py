"""The scattering transform: the same numbers as kymatio, in float precision."""

from __future__ import annotations

import pytest
import torch

from privgrad.errors import PrivgradError
from privgrad.nn.scattering import Scattering


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 28, 28), (3, 32, 32), (2, 16, 24)])
@pytest.mark.parametrize("scale", [1, 2, 3])
def test_it_agrees_with_kymatio(channels: int, height: int, width: int, scale: int) -> None:
    frontend = pytest.importorskip("kymatio.scattering2d.frontend.torch_frontend")
    torch.manual_seed(0)
    images = torch.rand(3, channels, height, width)
    theirs = frontend.ScatteringTorch2D(J=scale, shape=(height, width), L=8)(images)
    ours = Scattering(height, width, scale)(images)
    expected = theirs.reshape(3, -1, *theirs.shape[-2:])
    assert ours.shape == expected.shape
    assert torch.allclose(ours, expected, atol=5e-5)


def test_its_shape_is_what_it_says() -> None:
    scattering = Scattering(32, 32)
    assert scattering.channels == 81
    assert scattering(torch.zeros(2, 3, 32, 32)).shape == (2, 243, 8, 8)
    assert list(scattering.parameters()) == []
    assert scattering.state_dict() == {}


def test_each_image_and_each_channel_is_transformed_by_itself() -> None:
    torch.manual_seed(0)
    scattering, images = Scattering(16, 16), torch.rand(3, 2, 16, 16)
    whole = scattering(images)
    alone = scattering(images[1:2, 1:2])
    assert torch.allclose(whole[1:2, 81:], alone, atol=1e-6)


def test_a_flat_image_has_its_value_in_the_low_pass_and_nothing_elsewhere() -> None:
    features = Scattering(32, 32)(torch.full((1, 1, 32, 32), 0.7))
    assert torch.allclose(features[:, 0], torch.tensor(0.7), atol=1e-4)
    assert features[:, 1:].abs().max() < 1e-4


def test_a_shift_by_its_step_moves_the_features_by_one() -> None:
    image = torch.zeros(1, 1, 32, 32)
    image[0, 0, 12:18, 11:16] = torch.rand(6, 5, generator=torch.Generator().manual_seed(0))
    scattering = Scattering(32, 32)
    here, there = scattering(image), scattering(image.roll((4, 0), (2, 3)))
    assert torch.allclose(here[..., 2:6, :], there[..., 3:7, :], atol=1e-3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Scattering(2, 32),
        lambda: Scattering(32, 32, scale=0),
        lambda: Scattering(32, 32, orientations=0),
        lambda: Scattering(32, 32)(torch.zeros(1, 1, 28, 28)),
    ],
)
def test_what_does_not_fit_is_refused_in_words(make: object) -> None:
    with pytest.raises(PrivgradError):
        make()  # type: ignore[operator]

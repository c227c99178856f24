"""Scattering features: those of each image alone, computed once, made again where the file or the images changed."""

from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from torch.nn import functional

from privgrad.data import features
from privgrad.data.features import image_shape, with_features
from privgrad.data.records import Records
from privgrad.data.settings import FeatureSettings, read_settings
from privgrad.data.source import Source, generated, load
from privgrad.errors import PrivgradError
from privgrad.nn.scattering import Scattering
from tests.data.files import image_bytes, pictures, write_images

PLAIN = FeatureSettings(groups=0)


def images(count: int = 5, seed: int = 0) -> Records:
    pixels = numpy.random.default_rng(seed).integers(0, 256, (count, 1, 12, 16), dtype=numpy.uint8)
    return Records(torch.from_numpy(pixels), torch.arange(count) % 3)


def test_they_are_the_scattering_of_each_image() -> None:
    records = images()
    made = with_features(records, PLAIN, None, "here")
    expected = Scattering(12, 16)(records.inputs.to(torch.float32) / 255)
    inputs, labels = made.take(torch.tensor([3, 1]))
    assert inputs.dtype == torch.float32
    assert torch.allclose(inputs, expected[[3, 1]], atol=2e-3)
    assert labels.tolist() == [0, 1]


def test_groups_are_normalised_by_the_images_own_statistics() -> None:
    records = images()
    made, plain = (with_features(records, chosen, None, "here") for chosen in (FeatureSettings(groups=27), PLAIN))
    expected = functional.group_norm(plain.inputs.to(torch.float32), 27)
    assert torch.allclose(made.inputs.to(torch.float32), expected, atol=0.05)
    other = with_features(Records(records.inputs[:2], records.labels[:2]), FeatureSettings(groups=27), None, "here")
    assert torch.equal(made.inputs[:2], other.inputs), "another image has nothing to do with it"


def test_they_are_computed_once_and_only_for_these_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    original = features._fill
    monkeypatch.setattr(features, "_fill", lambda *arguments: (computed.append(1), original(*arguments))[1])
    first = with_features(images(), PLAIN, tmp_path, "here")
    again = with_features(images(), PLAIN, tmp_path, "here")
    expected = first.inputs.clone()  # the file under it is damaged below
    assert torch.equal(expected, again.inputs)
    assert len(computed) == 1
    with_features(images(seed=1), PLAIN, tmp_path, "here")
    with_features(images(), FeatureSettings(scale=1, groups=0), tmp_path, "here")
    assert len(computed) == 3
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, "as private as the images"
        path.write_bytes(path.read_bytes()[:-7])
    assert torch.equal(with_features(images(), PLAIN, tmp_path, "here").inputs, expected)
    assert len(computed) == 4


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(features, "_fill", stop)
    with pytest.raises(KeyboardInterrupt):
        with_features(images(), PLAIN, tmp_path, "here")
    assert list(tmp_path.iterdir()) == []


def test_a_source_with_features(tmp_path: Path) -> None:
    for name in ("train", "test"):
        write_images(
            tmp_path / "set" / f"{name}.parquet", [image_bytes(p) for p in pictures(6, (16, 16, 3))], [0, 1] * 3
        )
    data = {"source": str(tmp_path / "set"), "cache": str(tmp_path / "cache"), "images": {"classes": 2}}
    source = load(read_settings({**data, "features": {"kind": "scattering"}}))
    assert source.input_shape == (243, 4, 4)
    assert "scattering features (J = 2)" in source.scaling
    inputs, _ = source.test.take(torch.arange(6))  # type: ignore[attr-defined]
    assert inputs.shape == (6, 243, 4, 4)
    assert inputs.isfinite().all()


@pytest.mark.parametrize(
    ("records", "settings", "says"),
    [
        (Records(torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)), PLAIN, "holds no images"),
        (images(), FeatureSettings(groups=10), "does not divide"),
        (Records(torch.zeros(1, 1, 3, 3, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)), PLAIN, "too small"),
    ],
)
def test_what_has_no_features_is_refused(records: Records, settings: FeatureSettings, says: str) -> None:
    with pytest.raises(PrivgradError, match=says):
        with_features(records, settings, None, "here")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"kind": "wavelets"}, "scattering"),
        ({"scales": 2}, "did you mean"),
        ({"scale": 0}, "scale"),
        ({"groups": -1}, "groups"),
    ],
)
def test_settings_that_mean_nothing_are_refused(given: dict[str, object], says: str) -> None:
    with pytest.raises(PrivgradError, match=says):
        read_settings({"source": "x", "features": given})


def test_mirrored_features_are_those_of_the_mirror_image(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pixels = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)
    labels = torch.zeros(3, dtype=torch.int64)
    settings = FeatureSettings(groups=9, mirror=True)
    found = with_features(Records(pixels, labels), settings, None, "x").inputs
    mirrored = with_features(Records(pixels.flip(-1), labels), settings, None, "x").inputs
    torch.testing.assert_close(found, mirrored)
    one = with_features(Records(pixels, labels), FeatureSettings(groups=9), None, "x").inputs
    assert not torch.allclose(found, one)


def test_gray_in_color_has_no_color_difference() -> None:
    gray = torch.randint(256, (2, 1, 16, 16), dtype=torch.uint8).expand(2, 3, 16, 16)
    records = Records(gray, torch.zeros(2, dtype=torch.int64))
    found = with_features(records, FeatureSettings(groups=0, color="ycbcr"), None, "x").inputs
    brightness = with_features(records, FeatureSettings(groups=0), None, "x").inputs[:, :81]
    torch.testing.assert_close(found[:, :81], brightness, atol=1e-3, rtol=1e-3)
    assert found[:, 81:].abs().max() < 1e-3


def test_color_of_gray_images_and_other_colors_are_refused() -> None:
    records = Records(torch.zeros(2, 1, 16, 16, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(PrivgradError, match="are gray"):
        with_features(records, FeatureSettings(color="ycbcr"), None, "x")
    with pytest.raises(PrivgradError, match=r"data\.features\.color is 'hsv'"):
        FeatureSettings(color="hsv")
    with pytest.raises(PrivgradError, match="expected true or false"):
        FeatureSettings(mirror=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(12, 16), (14, 13)])
def test_generated_images_get_the_features_of_the_private_ones(tmp_path: Path, size: tuple[int, int]) -> None:
    height, width = size
    chosen = FeatureSettings(groups=27)
    pixels = torch.zeros(2, 3, height, width, dtype=torch.uint8)
    private = with_features(Records(pixels, torch.zeros(2, dtype=torch.int64)), chosen, None, "here")
    shape = (3 * 81, *private.inputs.shape[2:])
    assert image_shape(shape, chosen)[0] == 3
    settings = read_settings({"source": "x", "features": {"kind": "scattering", "groups": 27}})
    source = Source("x", private, private, 2, shape, 10, "")
    made = generated(settings, "dead_leaves", source, 4, seed=0)
    inputs, labels = made.take(torch.arange(4))
    assert inputs.shape == (4, *shape)
    assert float(inputs.std()) > 0.1
    assert len(labels) == 4
    with pytest.raises(PrivgradError, match="makes images"):
        generated(settings, "dead_leaves", replace(source, input_shape=(7,)), 4, seed=0)

"""`privgrad advise`: figures and suggestions from public data alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest

from tests.cli.test_commands import Said, refusal, say

CONFIG = """
[data]
source = "private.npz"
test_share = 0.2
cache = "none"
npz = {{ classes = 3 }}
[public]
source = "{public}"
[model]
name = "mlp"
arguments = {{ hidden = [16] }}
[plan]
steps = 50
sampling = {{ kind = "poisson", expected_batch_size = {batch} }}
clipping = {{ kind = "flat", max_norm = 0.5 }}
noise = {{ multiplier = {multiplier} }}
[training]
averaging = "none"
"""


def write(file: Path, seed: int, rows: int = 600) -> None:
    """Gray images of 8 x 8 whose brighter third says the class."""
    chance = numpy.random.default_rng(seed)
    y = chance.integers(0, 3, rows)
    x = chance.integers(0, 100, (rows, 9, 8), dtype=numpy.uint8)
    for label in range(3):
        x[y == label, 3 * label : 3 * label + 3] += 120
    numpy.savez(file, x=x, y=y)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "private.npz", seed=0)
    write(tmp_path / "public.npz", seed=1)
    return tmp_path


def advised(folder: Path, *more: str, public: str = "public.npz", batch: int = 100, multiplier: float = 1.0) -> Said:
    (folder / "config.toml").write_text(CONFIG.format(public=public, batch=batch, multiplier=multiplier))
    said = say("advise", folder / "config.toml", *more)
    assert said.code == 0, said.err
    return said


def figures(folder: Path, *more: str, **numbers: Any) -> dict[str, Any]:
    return advised(folder, *more, "--json", **numbers).json


def test_advice_is_a_function_of_public_data(folder: Path) -> None:
    """Bit for bit: every private record is replaced, and nothing changes."""
    before = advised(folder, "--json").out.splitlines()[-1]
    write(folder / "private.npz", seed=2)
    assert advised(folder, "--json").out.splitlines()[-1] == before
    write(folder / "public.npz", seed=3)
    assert advised(folder, "--json").out.splitlines()[-1] != before


def test_keys_are_stable(folder: Path) -> None:
    found = figures(folder)
    assert list(found) == [
        *("public", "noise_multiplier", "noise_dominates", "start", "later", "later_steps", "advice"),
    ]
    assert found["public"] == {"source": "public.npz", "rows": 512, "labels": "given"}
    assert found["later_steps"] == 30
    assert list(found["advice"]) == ["sparsification", "clipping", "learning_rate", "batch_size"]
    for item in found["advice"].values():
        assert list(item) == ["suggested", "reason"]
        assert item["reason"]
    for point in ("start", "later"):
        assert list(found[point]) == [
            *("gradient_norms", "mean_gradient", "gradient_deviation", "step", "by_clipping_factor", "by_ratio"),
        ]
        norms = found[point]["gradient_norms"]
        assert 0 < norms["q10"] < norms["q50"] < norms["q90"]
    assert "modelmix" not in json.dumps(found)


def test_the_documentation_names_every_key(folder: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "advice.md").read_text()

    def keys(node: Any) -> set[str]:
        if isinstance(node, dict):
            return set(node).union(*map(keys, node.values()))
        return set().union(*map(keys, node)) if isinstance(node, list) else set()

    assert {key for key in keys(figures(folder)) if f"`{key}`" not in page} == set()


def test_noise_is_what_the_plan_adds(folder: Path) -> None:
    """z C sqrt(d) over the expected batch size; a mask takes its share of d."""
    found = figures(folder, multiplier=2.0)
    dimension = 72 * 16 + 16 + 16 * 3 + 3
    assert found["start"]["step"]["noise"] == pytest.approx(2.0 * 0.5 * dimension**0.5 / 100, rel=1e-6)
    masked = next(one for one in found["start"]["by_ratio"] if one["ratio"] == 0.9)
    assert masked["noise"] == pytest.approx(found["start"]["step"]["noise"] * 0.1**0.5, rel=0.02)
    four = next(one for one in found["start"]["by_clipping_factor"] if one["factor"] == 4)
    assert four["noise"] == pytest.approx(4 * found["start"]["step"]["noise"], rel=1e-6)


def test_noise_dominates_where_there_is_much_and_not_where_there_is_little(folder: Path) -> None:
    loud, quiet = figures(folder, multiplier=20.0), figures(folder, multiplier=0.02)
    assert loud["noise_dominates"]
    assert not quiet["noise_dominates"]
    assert quiet["advice"]["sparsification"]["suggested"] == 0.0
    assert loud["advice"]["learning_rate"]["suggested"]["high"] < 1.2
    ratio = loud["start"]["step"]["noise_over_clipped_mean"] / quiet["start"]["step"]["noise_over_clipped_mean"]
    assert ratio == pytest.approx(1000, rel=1e-6)
    assert loud["advice"]["batch_size"]["suggested"] == 200


def test_without_noise_a_larger_clipping_norm_is_advised(folder: Path) -> None:
    """Where there is no noise, clipping only bends the gradient; with much, only what is clipped adds little noise."""
    quiet = figures(folder, "--set", "plan.clipping.max_norm=0.01", multiplier=1e-6)
    loud = figures(folder, "--set", "plan.clipping.max_norm=50.0", multiplier=20.0)
    assert quiet["advice"]["clipping"]["suggested"]["later"] >= 0.01
    assert loud["advice"]["clipping"]["suggested"]["start"] < 50.0


def test_random_labels_give_no_signal_and_the_advice_says_so(folder: Path) -> None:
    found = figures(folder, public="dead_leaves")
    assert found["public"]["labels"] == "random"
    assert found["later"] is None
    assert not found["start"]["step"]["resolved"]
    assert "no signal" in advised(folder, public="dead_leaves").out


def test_mixing_gets_a_range_of_widths(folder: Path) -> None:
    found = figures(folder, "--set", "plan.mixing={kind='modelmix'}")
    width = found["advice"]["mixing"]["suggested"]
    assert width["low"] > 0
    assert width["high"] > 0


@pytest.mark.parametrize(
    "settings",
    [
        ["plan.groups={kind='random', count=10}"],
        ["plan.clipping.kind=layerwise", "plan.thresholds={kind='quantile'}"],
        ["plan.compression={kind='random_sparsification', structure='rows'}"],
        ["plan.statistics={kind='public_batch'}", "model.arguments={normalization='public_batch'}"],
        ["optimizer.name=adam", "optimizer.lr=0.01"],
    ],
    ids=lambda settings: settings[0].split("=")[0],
)
def test_every_kind_of_plan_gets_advice(folder: Path, settings: list[str]) -> None:
    found = figures(folder, *[word for setting in settings for word in ("--set", setting)])
    assert found["start"]["step"]["noise"] > 0
    assert all(item["reason"] for item in found["advice"].values())


def test_without_public_data_advice_is_refused_with_the_remedy(folder: Path) -> None:
    text = CONFIG.format(public="x", batch=100, multiplier=1.0).replace('[public]\nsource = "x"\n', "")
    (folder / "config.toml").write_text(text)
    assert "[public] source = 'dead_leaves'" in refusal("advise", folder / "config.toml")


def test_public_data_that_are_the_private_ones_are_refused(folder: Path) -> None:
    (folder / "config.toml").write_text(CONFIG.format(public="private.npz", batch=100, multiplier=1.0))
    assert "share records" in refusal("advise", folder / "config.toml")
    (folder / "config.toml").write_text(CONFIG.format(public="public.npz", batch=100, multiplier=1.0))
    assert "--steps is -1" in refusal("advise", folder / "config.toml", "--steps", "-1")

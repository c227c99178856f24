"""Units of which only some coordinates count: engines agree with a loop, whatever the form of the gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import privgrad as pg
from privgrad.gradients.contract import Fold, Request, Sums, trainable
from privgrad.gradients.onepass import OnePassEngine
from privgrad.gradients.terms import Lookup, MaskedLookup, MaskedProduct, Outer
from privgrad.mechanism.sparsification import Kept
from tests.gradients.compare import Recording, covered
from tests.gradients.networks import NETWORKS
from tests.gradients.operators import CASES, Around, squares


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def some(shapes: dict[str, torch.Size]) -> Kept:
    """Half of each parameter's coordinates, at random; all of a scalar, and the last of two."""
    places = {}
    for name, shape in shapes.items():
        count = shape.numel()
        places[name] = torch.randperm(count)[: max(1, count // 2)].sort().values if count != 2 else torch.tensor([1])
    return Kept(shapes, places, by_rows=False)


@pytest.mark.parametrize("kind", ["flat", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_operators_agree_with_a_loop(name: str, dtype: torch.dtype, kind: str) -> None:
    case = CASES[name]
    covered(
        None, case.make().to(dtype), squares, case.batch(dtype), kind=kind, separable=kind == "tensor", encoded=some
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_agree_with_a_loop(name: str) -> None:
    make, batch = NETWORKS[name]
    covered(
        None,
        make().double(),
        pg.supervised(nn.functional.cross_entropy),
        batch(),
        kind="spanning",
        separable=True,
        encoded=some,
    )


FOLDS = {
    "of one size": Fold(torch.tensor([0, 0, 1, 1, 2, 2]), 3, torch.tensor([0.5, 0.1, 1.0, 0.3, 0.7, 0.9])),
    "of several sizes": Fold(torch.tensor([0, 0, 0, 1, 2, 2]), 3),
    "with an empty one": Fold(torch.tensor([0, 1, 2, 3, 4, 5]), 7),
    "very unequal": Fold(torch.tensor([0, 1, 2, 5, 5, 5]), 6),
}


@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("net", ["one position", "positions", "convolution", "table"])
def test_units_of_several_rows_agree_with_a_loop(net: str, fold: str) -> None:
    networks: dict[str, tuple[nn.Module, Tensor]] = {
        "one position": (nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(6, 7)),
        "positions": (nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(6, 4, 7)),
        "convolution": (nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 3, 2)), torch.randn(6, 2, 5, 5)),
        "table": (nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3)), torch.randint(9, (6, 5))),
    }
    model, inputs = networks[net]
    covered(None, model, squares, (inputs,), fold=FOLDS[fold], kind="tensor", encoded=some)


@pytest.mark.parametrize("layout", ["bfloat16", "channels last", "transposed", "scalar"])
def test_parameters_of_any_type_and_layout(layout: str) -> None:
    convolution, linear = nn.Conv2d(3, 4, 3), nn.Linear(6, 5)
    if layout == "bfloat16":
        covered(None, linear.bfloat16(), squares, (torch.randn(5, 6).bfloat16(),), encoded=some, tolerance=2e-2)
    elif layout == "channels last":
        convolution.to(memory_format=torch.channels_last)
        covered(None, convolution, squares, (torch.randn(5, 3, 6, 6),), encoded=some)
    elif layout == "transposed":
        linear.weight = nn.Parameter(torch.randn(6, 5).T)
        covered(None, linear, squares, (torch.randn(5, 6),), encoded=some)
    else:
        model = Around(lambda m, x: m.linear(x) * m.scale, linear=linear, scale=())
        covered(None, model, squares, (torch.randn(5, 6),), encoded=some)


def test_one_position_is_never_multiplied_out_and_a_table_never_made_for_each_unit() -> None:
    """2 GiB for the layer and 8 GiB for the table otherwise."""
    model = nn.Sequential(nn.Embedding(50_000, 64), nn.Flatten(), nn.Linear(128, 4096))
    shapes = {name: p.shape for name, p in trainable(model).items()}
    encoding = some(shapes)
    rule = Recording(torch.ones(640, 1))
    sink = Sums(encoding.slots(), torch.device("cpu"), torch.float32)
    batch = (torch.randint(50_000, (640, 2)),)
    engine = OnePassEngine(memory=2**40)
    with pytest.MonkeyPatch.context() as patch:
        for form in (Outer, Lookup, MaskedProduct, MaskedLookup):
            patch.setattr(form, "dense", lambda self: pytest.fail("multiplied out"))
        patch.setattr(Outer, "_multiplied_out", lambda self, take: pytest.fail("multiplied out"))
        engine.accumulate(model, squares, Request(batch, Fold.identity(640), encoding, [tuple(shapes)], rule, sink))
    assert bool((rule.norms > 0).all())


def test_a_mask_that_leaves_the_smallest_numbers_does_not_lose_them() -> None:
    """The kept coordinate is 1e-24 of the vector's length: its square is not a number that float32 has."""
    left, right = torch.tensor([[1e12, 1e-12]]), torch.tensor([[1.0, 0.0]])
    mask = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    found = MaskedProduct(left, right, mask).squares().sqrt()
    assert float(found) >= 1e-12
    assert torch.equal(MaskedProduct(left, right, mask).dense(), torch.tensor([[[0.0, 0.0], [1e-12, 0.0]]]))
    zeros = MaskedProduct(torch.zeros(1, 2), right, mask).squares()
    assert float(zeros.sqrt()) < 1e-10


def test_a_unit_that_is_not_finite_is_left_out() -> None:
    """Wherever its infinity stands, masked or not."""
    left = torch.tensor([[math.inf, 1.0], [1.0, 1.0], [1.0, math.nan]])
    product = MaskedProduct(left, torch.ones(3, 2), torch.tensor([[0.0, 1.0], [1.0, 1.0]]))
    finite = product.squares().isfinite()
    assert finite.tolist() == [False, True, False]
    weights = finite.float()
    assert torch.equal(product.weighted_sum(weights, ~finite), torch.tensor([[0.0, 1.0], [1.0, 1.0]]))

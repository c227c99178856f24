"""Mean gradients of groups: the same by one pass as group by group, and by one pass only where that is sound and pays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import privgrad as pg
from privgrad.gradients.contract import Fold, Identity, Request, Sums, trainable
from privgrad.gradients.grouped import MeanEngine
from privgrad.gradients.streamed import StreamedEngine
from privgrad.mechanism.sparsification import Kept
from tests.gradients.compare import Recording
from tests.helpers import as_vector

cross_entropy = pg.supervised(nn.functional.cross_entropy)

INDEX = torch.tensor([2, 0, 2, 4, 0, 2, 2, 0, 4, 2, 0])


def run(
    engine: MeanEngine | StreamedEngine,
    model: nn.Module,
    inputs: Tensor,
    *,
    index: Tensor = INDEX,
    scale: Tensor | None = None,
    tensors: bool = False,
) -> tuple[Tensor, Recording]:
    """Sums and what the rule was asked, with a block per tensor or one for all. Of six groups three have rows."""
    shapes = {name: parameter.shape for name, parameter in trainable(model).items()}
    blocks = [(name,) for name in shapes] if tensors else [tuple(shapes)]
    wide = next(model.parameters()).dtype
    rule = Recording(torch.linspace(0.3, 1.0, 3 * len(blocks), dtype=wide).view(3, -1), separable=tensors)
    sink = Sums(shapes, torch.device("cpu"), wide)
    targets = torch.arange(len(inputs)) % 3
    request = Request((inputs, targets), Fold(index, 6, scale), Identity(shapes), blocks, rule, sink)
    engine.accumulate(model, cross_entropy, request)
    return as_vector(sink), rule


def linear() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 3)).double()


def asked_once(rule: Recording) -> bool:
    """One pass asks for a block of all groups together; group by group it is asked for three times."""
    return sum(map(len, rule.calls)) == rule.weights.shape[1]


@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_one_pass_gives_what_group_by_group_gives(tensors: bool, scaled: bool) -> None:
    model, inputs = linear(), torch.randn(11, 5, dtype=torch.float64)
    scale = torch.rand(11, dtype=torch.float64) + 0.1 if scaled else None
    found, rule = run(MeanEngine(lambda: True, 2), model, inputs, scale=scale, tensors=tensors)
    expected, _ = run(MeanEngine(lambda: False, 2), model, inputs, scale=scale, tensors=tensors)
    assert asked_once(rule)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_the_mean_is_over_examples_however_many_views_they_have() -> None:
    """Two views of each example, half a factor each, are the example."""
    model, inputs = linear(), torch.randn(4, 5, dtype=torch.float64)
    index, twice = INDEX[:4], torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    shapes = {name: parameter.shape for name, parameter in trainable(model).items()}
    sums = []
    for rows, scale in ((torch.arange(4), None), (twice, torch.full((8,), 0.5, dtype=torch.float64))):
        sink = Sums(shapes, torch.device("cpu"), torch.float64)
        rule = Recording(torch.ones(3, 1, dtype=torch.float64))
        batch = (inputs[rows], rows % 3)
        request = Request(batch, Fold(index[rows], 6, scale), Identity(shapes), [tuple(shapes)], rule, sink)
        StreamedEngine(mean=True).accumulate(model, cross_entropy, request)
        sums.append(as_vector(sink))
    torch.testing.assert_close(*sums)


def test_groups_that_differ_much_in_size_are_still_right() -> None:
    """Padding them all to the largest would take more than it saves."""
    model, inputs = linear(), torch.randn(40, 5, dtype=torch.float64)
    index = torch.tensor([0] * 36 + [1, 2, 2, 2])
    found, _ = run(MeanEngine(lambda: True, 2), model, inputs, index=index)
    expected, _ = run(MeanEngine(lambda: False, 2), model, inputs, index=index)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_what_would_be_multiplied_out_goes_group_by_group() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 6, 6)), nn.Conv2d(1, 8, 3), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(8, 3)
    )
    _, rule = run(MeanEngine(lambda: True, 2), model.double(), torch.randn(11, 36, dtype=torch.float64))
    assert not asked_once(rule)


def test_rows_that_see_one_another_go_group_by_group() -> None:
    """The answer is asked for at every step: train and eval modes may change."""
    model = nn.Sequential(nn.Linear(5, 40), nn.BatchNorm1d(40), nn.Linear(40, 40), nn.Linear(40, 3)).double()
    engine = MeanEngine(lambda: not model.training, 2)
    inputs = torch.randn(11, 5, dtype=torch.float64)
    model.eval()
    _, rule = run(engine, model, inputs)
    assert asked_once(rule)
    model.train()
    found, rule = run(engine, model, inputs)
    assert not asked_once(rule)
    expected, _ = run(StreamedEngine(mean=True), model, inputs)
    torch.testing.assert_close(found, expected)


def test_masks_that_come_later_are_weighed_anew() -> None:
    """A product of several rows is multiplied out where only some coordinates count: then one pass is not worth it."""
    model, engine = linear(), MeanEngine(lambda: True, 2)
    _, whole = run(engine, model, torch.randn(11, 5, dtype=torch.float64))
    shapes = {name: parameter.shape for name, parameter in trainable(model).items()}
    encoding = Kept(shapes, {name: torch.arange(shape.numel() // 2) for name, shape in shapes.items()}, by_rows=False)
    rule = Recording(torch.ones(3, 1, dtype=torch.float64))
    sink = Sums(encoding.slots(), torch.device("cpu"), torch.float64)
    batch = torch.randn(11, 5, dtype=torch.float64), torch.arange(11) % 3
    engine.accumulate(model, cross_entropy, Request(batch, Fold(INDEX, 6), encoding, [tuple(shapes)], rule, sink))
    assert asked_once(whole)
    assert not asked_once(rule)

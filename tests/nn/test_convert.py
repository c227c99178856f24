"""convert puts GroupNorm in the place of every BatchNorm, keeps the weights, and says what it did."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import privgrad as pg
from privgrad.nn import SyntheticProbe, convert, find_coupling
from privgrad.nn.convert import Report

CROSS_ENTROPY = pg.supervised(F.cross_entropy)


@pytest.mark.parametrize(
    ("channels", "groups"),
    [
        (1, 1),
        (2, 1),
        (3, 1),
        (4, 1),
        (6, 1),
        (7, 1),
        (8, 2),
        (12, 3),
        (16, 4),
        (64, 16),
        (96, 24),
        (128, 32),
        (512, 32),
        (127, 1),
        (200, 25),
    ],
)
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_groups_have_at_least_four_channels_and_are_at_most_32(kind: type[Any], channels: int, groups: int) -> None:
    norm = convert(nn.Sequential(kind(channels))).model[0]
    assert type(norm) is nn.GroupNorm
    assert (norm.num_groups, norm.num_channels) == (groups, channels)


def test_batch_norm_1d_becomes_layer_norm_over_the_features() -> None:
    inputs = torch.randn(5, 12)
    norm = convert(nn.Sequential(nn.BatchNorm1d(12))).model[0]
    torch.testing.assert_close(norm(inputs), F.layer_norm(inputs, (12,)))


def test_few_features_are_warned_of() -> None:
    assert "erases" in convert(nn.Sequential(nn.BatchNorm1d(2))).words
    assert "erases" not in convert(nn.Sequential(nn.BatchNorm1d(8))).words
    assert "erases" not in convert(nn.Sequential(nn.BatchNorm2d(2))).words


def test_everything_that_a_layer_has_in_common_moves_over() -> None:
    model = nn.Sequential(nn.BatchNorm2d(8, eps=1e-3, dtype=torch.float64))
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(8.0))
        model[0].bias.fill_(3.0)
    model[0].bias.requires_grad_(False)
    model[0].eval()
    weight, bias = model[0].weight, model[0].bias
    optimizer = torch.optim.SGD([weight], lr=0.1)
    norm = convert(model).model[0]
    assert norm.weight is weight
    assert norm.bias is bias
    assert optimizer.param_groups[0]["params"][0] is model[0].weight
    assert norm.eps == 1e-3
    assert not norm.training
    assert [name for name, _ in model.named_buffers()] == []
    assert norm(torch.randn(2, 8, 3, 3, dtype=torch.float64)).dtype == torch.float64


def test_a_layer_without_weights_stays_without() -> None:
    norm = convert(nn.Sequential(nn.BatchNorm2d(8, affine=False))).model[0]
    assert norm.weight is None
    assert norm.bias is None
    assert norm.training


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 1), self.norm)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.norm(self.block(inputs))


def test_a_shared_layer_stays_shared() -> None:
    model = Shared()
    report = convert(model)
    assert model.norm is model.block[1]
    assert type(model.norm) is nn.GroupNorm
    assert len(report.changed) == 1
    assert model(torch.randn(2, 8, 3, 3)).shape == (2, 8, 3, 3)


def test_the_report_names_every_layer() -> None:
    model = nn.Sequential(
        OrderedDict(
            first=nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(True)), norm=nn.BatchNorm2d(64)
        )
    )
    report = convert(model)
    assert str(report) == report.words
    assert report.words.splitlines() == [
        "first.1: BatchNorm2d(64) became GroupNorm of 16 group(s) of 4 channel(s)",
        "norm: BatchNorm2d(64) became GroupNorm of 16 group(s) of 4 channel(s)",
    ]
    assert report.model is model
    model(torch.randn(2, 3, 8, 8)).sum().backward()  # in-place activations go on working


def test_a_model_that_is_a_batch_norm_itself_is_returned_anew() -> None:
    layer = nn.BatchNorm2d(8)
    report = convert(layer)
    assert type(report.model) is nn.GroupNorm
    assert report.words.startswith("the model itself: BatchNorm2d(8) became GroupNorm")


def test_a_model_without_batch_norm_is_left_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.GroupNorm(1, 3))
    assert convert(model) == Report(model, (), ())
    assert "nothing was replaced" in convert(model).words


class WithActivation(nn.BatchNorm2d):
    """A subclass that does more than normalise."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs).relu()


def test_a_subclass_is_left_and_named() -> None:
    model = nn.Sequential(WithActivation(8), nn.BatchNorm2d(8))
    report = convert(model)
    assert type(model[0]) is WithActivation
    assert type(model[1]) is nn.GroupNorm
    assert "0 (WithActivation) was left" in report.words


def test_a_lazy_layer_is_converted_once_it_knows_its_channels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LazyBatchNorm2d(), nn.BatchNorm2d(8))
    with pytest.raises(pg.PrivgradError, match=r"1 \(LazyBatchNorm2d\) does not know its channels yet"):
        convert(model)
    assert type(model[2]) is nn.BatchNorm2d, "nothing is replaced where something cannot be"
    model(torch.zeros(2, 3, 4, 4))
    convert(model)
    assert type(model[1]) is nn.GroupNorm


def test_an_unknown_target_is_refused_with_the_known_ones() -> None:
    with pytest.raises(pg.PrivgradError, match="'groop' is unknown; did you mean 'group'"):
        convert(nn.Linear(3, 3), to="groop")
    with pytest.raises(pg.PrivgradError, match="'batch' is unknown; did you mean 'test_batch'"):
        convert(nn.Linear(3, 3), to="batch")


def test_a_converted_model_passes_the_detector() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(True), nn.Flatten(), nn.Linear(288, 16), nn.BatchNorm1d(16)
    )
    probe = SyntheticProbe.like((torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.long)))
    assert find_coupling(model, CROSS_ENTROPY, probe)
    pg.nn.convert(model, to="group")
    assert find_coupling(model, CROSS_ENTROPY, probe) == []

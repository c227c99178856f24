"""The reference models: sizes as in the papers, shapes, and what a step does to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import privgrad as pg
from privgrad.nn.models import MODELS, build_model
from privgrad.nn.resnet import StandardizedConv2d

CIFAR, MNIST = (3, 32, 32), (1, 28, 28)


@pytest.mark.parametrize(
    ("name", "shape", "parameters"),
    [
        ("dp_cnn", CIFAR, 550_570),
        ("dp_cnn_small", MNIST, 26_010),
        ("lenet5", MNIST, 61_706),
        ("resnet20", CIFAR, 272_474),
        ("resnet18", CIFAR, 11_173_962),
        ("wrn_16_4", CIFAR, 2_753_818),
    ],
)
def test_sizes_are_those_of_the_literature(name: str, shape: tuple[int, ...], parameters: int) -> None:
    model = build_model(name, shape, 10, {})
    assert sum(p.numel() for p in model.parameters()) == parameters


def _plain_convolutions(model: nn.Module, images: torch.Tensor, layers: str) -> torch.Tensor:
    """A network written out again, in the notation of the papers: "C2p1" a convolution of stride 2, padding 1; "M2s1" and "A2s2"
    max and average pooling of two by two, with a stride; "L" a linear layer; "t" tanh. Weights in the order of the model's."""
    weights, hidden = iter(model.parameters()), images
    for layer in layers.split():
        kind, numbers = layer[0], [int(sign) for sign in layer[1:] if sign.isdigit()]
        if kind == "C":
            hidden = F.conv2d(hidden, next(weights), next(weights), stride=numbers[0], padding=numbers[1])
        elif kind == "M":
            hidden = F.max_pool2d(hidden, numbers[0], stride=numbers[1])
        elif kind == "A":
            hidden = F.avg_pool2d(hidden, numbers[0], stride=numbers[1])
        elif kind == "L":
            hidden = F.linear(hidden.flatten(1), next(weights), next(weights))
        else:
            hidden = torch.tanh(hidden)
    assert next(weights, None) is None
    return hidden


@pytest.mark.parametrize(
    ("name", "arguments", "shape", "layers"),
    [
        ("dp_cnn", {}, CIFAR, 3 * "C1p1 t C1p1 t M2s2 " + "L t L"),
        ("dp_cnn", {"pooling": "average"}, CIFAR, 3 * "C1p1 t C1p1 t A2s2 " + "L t L"),
        ("dp_cnn_small", {}, MNIST, "C2p2 t M2s1 C2p0 t M2s1 L t L"),
        ("lenet5", {}, MNIST, "C1p2 t A2s2 C1p0 t A2s2 L t L t L"),
        ("feature_cnn", {}, (81, 8, 8), "C1p1 t A2s2 C1p1 t L"),
    ],
)
def test_networks_are_those_of_the_papers(
    name: str, arguments: dict[str, object], shape: tuple[int, ...], layers: str
) -> None:
    # A count of parameters does not see pooling: dp_cnn pooled by average for months, and lost six points of accuracy.
    torch.manual_seed(0)
    model, images = build_model(name, shape, 10, arguments), torch.randn(2, *shape)
    with torch.no_grad():
        assert torch.allclose(model(images), _plain_convolutions(model, images, layers), atol=1e-6)


def _plain_resnet(model: nn.Module, images: torch.Tensor, blocks: Sequence[int]) -> torch.Tensor:
    """arXiv:1512.03385, section 4.2, with GroupNorm, and its shortcuts of option B."""
    weights = iter(model.parameters())

    def block(inputs: torch.Tensor, stride: int) -> torch.Tensor:
        return F.group_norm(F.conv2d(inputs, weight := next(weights), None, stride, weight.shape[-1] // 2), 16, *two())

    def two() -> tuple[torch.Tensor, torch.Tensor]:
        return next(weights), next(weights)

    hidden = block(images, 1).relu()
    for stage, count in enumerate(blocks):
        for number in range(count):
            stride = 2 if stage and not number else 1
            straight = block(block(hidden, stride).relu(), 1)
            hidden = (straight + (block(hidden, stride) if stride == 2 else hidden)).relu()
    logits = F.linear(hidden.mean((2, 3)), *two())
    assert next(weights, None) is None
    return logits


def _plain_wide_resnet(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """WRN-16-4 as the code of arXiv:2204.13650 has it: ReLU before the norm, and a norm in each projected shortcut."""
    weights = iter(model.parameters())

    def conv(inputs: torch.Tensor, stride: int) -> torch.Tensor:
        weight, bias, gain = next(weights), next(weights), next(weights)
        flat = weight.flatten(1)
        centered = flat - flat.mean(1, keepdim=True)
        standardized = (centered / centered.norm(dim=1, keepdim=True)).view_as(weight) * gain
        return F.conv2d(inputs, standardized, bias, stride, weight.shape[-1] // 2)

    def relu_norm(inputs: torch.Tensor) -> torch.Tensor:
        return F.group_norm(inputs.relu(), 16, next(weights), next(weights))

    hidden = conv(images, 1)
    for stage in range(3):
        for number in range(2):
            stride = 2 if stage and not number else 1
            straight = conv(relu_norm(conv(relu_norm(hidden), stride)), 1)
            hidden = straight + (hidden if number else conv(relu_norm(hidden), stride))
    logits = F.linear(relu_norm(hidden).mean((2, 3)), next(weights), next(weights))
    assert next(weights, None) is None
    return logits


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("resnet20", lambda model, images: _plain_resnet(model, images, (3, 3, 3))),
        ("resnet18", lambda model, images: _plain_resnet(model, images, (2, 2, 2, 2))),
        ("wrn_16_4", _plain_wide_resnet),
    ],
)
def test_residual_networks_are_those_of_the_papers(
    name: str, plain: Callable[[nn.Module, torch.Tensor], torch.Tensor]
) -> None:
    torch.manual_seed(0)
    model, images = build_model(name, CIFAR, 10, {}), torch.randn(2, *CIFAR)
    with torch.no_grad():
        for weight in model.parameters():  # norms begin as ones and zeros, whose order nobody would see
            weight.add_(0.1 * torch.randn_like(weight))
        assert torch.allclose(model(images), plain(model, images), atol=1e-4)


def test_a_pooling_that_is_not_known_is_refused_in_words() -> None:
    with pytest.raises(pg.PrivgradError, match="dp_cnn's pooling is 'avg'; did you mean 'average'"):
        build_model("dp_cnn", CIFAR, 10, {"pooling": "avg"})


@pytest.mark.parametrize("name", list(MODELS))
def test_every_model_takes_one_private_step(name: str) -> None:
    if name == "resnet18":
        pytest.skip("as resnet20, forty times as large")
    torch.manual_seed(0)
    model = build_model(name, MNIST, 4, {})
    data = TensorDataset(torch.randn(3, *MNIST), torch.tensor([0, 1, 2]))
    plan = pg.Plan(sampling=pg.FullBatch(), steps=1, noise=pg.GaussianNoise(multiplier=0.5))
    running = pg.make_private(
        model, torch.optim.SGD(model.parameters(), lr=0.1), data, plan, pg.supervised(F.cross_entropy)
    )
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for batch in running.batches():
        running.step(batch)
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("name", ["dp_cnn", "dp_cnn_small", "feature_cnn", "lenet5", "resnet20", "wrn_16_4"])
def test_images_that_are_too_small_are_refused_in_words(name: str) -> None:
    with pytest.raises(pg.PrivgradError, match=name.split("2")[0] if name == "resnet20" else name):
        build_model(name, (1, 2, 2), 10, {})


@pytest.mark.parametrize(
    ("choice", "layer"), [("group", nn.GroupNorm), ("batch", nn.BatchNorm2d), ("none", nn.Identity)]
)
def test_residual_networks_have_a_choice_of_normalization(choice: str, layer: type[nn.Module]) -> None:
    model = build_model("resnet20", CIFAR, 10, {"normalization": choice})
    assert isinstance(model.get_submodule("stem.1"), layer)
    with pytest.raises(pg.PrivgradError, match="normalization"):
        build_model("resnet20", CIFAR, 10, {"normalization": "layers"})


def test_standardized_weights_have_mean_zero_and_the_variance_of_their_fan_in() -> None:
    torch.manual_seed(0)
    convolution = StandardizedConv2d(5, 7, 3, bias=False)
    with torch.no_grad():
        convolution.weight.mul_(9.0).add_(2.0)
    used: list[torch.Tensor] = []
    with torch.no_grad():
        # The response to unit impulses is the weight that was used.
        for channel in range(5):
            image = torch.zeros(1, 5, 3, 3)
            image[0, channel, 1, 1] = 1.0
            used.append(F.pad(convolution(F.pad(image, (1, 1, 1, 1))), (0, 0)).squeeze(0))
    weight = torch.stack(used, 1).flatten(1)
    assert weight.mean(1).abs().max() < 1e-6
    assert torch.allclose(weight.square().sum(1), torch.ones(7), atol=1e-4)

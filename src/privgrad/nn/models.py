"""Small reference models. Any other torch module works as well."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from privgrad.errors import PrivgradError, reason_of
from privgrad.nn.cnn import DPCNN, FeatureCNN, SmallDPCNN, image_shape
from privgrad.nn.convert import normalized
from privgrad.nn.resnet import WideResNet, resnet18, resnet20
from privgrad.own import imported


class LogisticRegression(nn.Module):
    """One linear layer on flattened inputs."""

    def __init__(self, input_shape: Sequence[int], classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(math.prod(input_shape), classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """[rows, *input_shape] to logits [rows, classes]."""
        logits: Tensor = self.linear(inputs.flatten(1))
        return logits


class MLP(nn.Module):
    """Fully connected layers with tanh between them (bounded activations keep gradient norms, and so clipping, steady).

    normalization: before each tanh, a name in `convert.NORMALIZATIONS`.
    """

    def __init__(
        self, input_shape: Sequence[int], classes: int, hidden: Sequence[int] = (128,), normalization: str = "none"
    ) -> None:
        super().__init__()
        widths = [math.prod(input_shape), *hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), *_norm(normalization, nn.BatchNorm1d, after), nn.Tanh()]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], classes))

    def forward(self, inputs: Tensor) -> Tensor:
        """[rows, *input_shape] to logits [rows, classes]."""
        logits: Tensor = self.layers(inputs)
        return logits


class LeNet5(nn.Module):
    """LeNet-5 (LeCun et al. 1998) with tanh and average pooling, for images of at least 8 x 8 pixels.

    Images smaller than 16 x 16 are padded to it, so that both poolings have something to pool. normalization: before each
    tanh, a name in `convert.NORMALIZATIONS`.
    """

    def __init__(self, input_shape: Sequence[int], classes: int, normalization: str = "none") -> None:
        super().__init__()
        channels, height, width = image_shape("lenet5", input_shape, at_least=8)
        self.pad = nn.ZeroPad2d((0, max(0, 16 - width), 0, max(0, 16 - height)))
        self.features = nn.Sequential(
            nn.Conv2d(channels, 6, 5, padding=2),
            *_norm(normalization, nn.BatchNorm2d, 6),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Conv2d(6, 16, 5),
            *_norm(normalization, nn.BatchNorm2d, 16),
            nn.Tanh(),
            nn.AvgPool2d(2),
        )
        side = self.pad(torch.zeros(1, *input_shape)).shape[-2:]
        features = 16 * ((side[0] // 2 - 4) // 2) * ((side[1] // 2 - 4) // 2)
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(features, 120),
            *_norm(normalization, nn.BatchNorm1d, 120),
            nn.Tanh(),
            nn.Linear(120, 84),
            *_norm(normalization, nn.BatchNorm1d, 84),
            nn.Tanh(),
            nn.Linear(84, classes),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """[rows, channels, height, width] to logits [rows, classes]."""
        logits: Tensor = self.classifier(self.features(self.pad(inputs)))
        return logits


def _norm(name: str, batch_norm: type[_BatchNorm], channels: int) -> list[nn.Module]:
    """No layer at all for "none": parameter names stay what they are without normalization."""
    return [] if name == "none" else [normalized(name, batch_norm, channels)]


MODELS: dict[str, Callable[..., nn.Module]] = {
    "logistic_regression": LogisticRegression,
    "mlp": MLP,
    "lenet5": LeNet5,
    "dp_cnn": DPCNN,
    "dp_cnn_small": SmallDPCNN,
    "feature_cnn": FeatureCNN,
    "resnet20": resnet20,
    "resnet18": resnet18,
    "wrn_16_4": WideResNet,
}
"""Models by their name in a configuration file: called with input_shape, classes and the configuration's arguments."""


def build_model(name: object, input_shape: Sequence[int], classes: int, arguments: dict[str, object]) -> nn.Module:
    """A reference model by name, or the user's own as "package.module:factory".

    A factory is called like ours: factory(input_shape=..., classes=..., **arguments).
    """
    if not isinstance(name, str):
        raise PrivgradError(f"model.name is {name!r}; expected one of: {', '.join(MODELS)}")
    factory = MODELS.get(name)
    if factory is None:
        if ":" not in name:
            raise PrivgradError(
                f"model.name is {name!r}; known: {', '.join(map(repr, MODELS))} (your own: 'package.module:factory')"
            )
        factory = imported("model.name", name)
    try:
        model = factory(input_shape=tuple(input_shape), classes=classes, **arguments)
    except PrivgradError:
        raise
    except Exception as error:  # a factory of the user's own may raise anything
        raise PrivgradError(
            f"model {name!r} cannot be made with arguments {arguments}: {type(error).__name__}: {reason_of(error)}"
        ) from error
    if not isinstance(model, nn.Module):
        raise PrivgradError(f"model {name!r} gave a {type(model).__name__}; expected a torch.nn.Module")
    return model

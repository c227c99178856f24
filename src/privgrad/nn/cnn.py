"""Small convolutional networks of the differential privacy literature, with bounded activations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from privgrad.errors import PrivgradError, nearest

_POOLING: dict[str, type[nn.Module]] = {"max": nn.MaxPool2d, "average": nn.AvgPool2d}


class DPCNN(nn.Module):
    """The tanh CNN of Papernot et al. (arXiv:2007.14191) as arXiv:2112.00845 has it: 550,570 parameters on 3 x 32 x 32.

    Three times two 3 x 3 convolutions (32, 64, 128 channels) and pooling by two, then 128 units. pooling: "max", as in the
    papers, or "average" (on CIFAR-10 at epsilon 3 six points less: experiments/sparsification).
    """

    def __init__(self, input_shape: Sequence[int], classes: int, pooling: str = "max") -> None:
        super().__init__()
        channels, height, width = image_shape("dp_cnn", input_shape, at_least=8)
        if pooling not in _POOLING:
            raise PrivgradError(f"dp_cnn's pooling is {pooling!r}; {nearest(str(pooling), _POOLING)}")
        layers: list[nn.Module] = []
        for wide in (32, 64, 128):
            layers += [
                nn.Conv2d(channels, wide, 3, padding=1),
                nn.Tanh(),
                nn.Conv2d(wide, wide, 3, padding=1),
                nn.Tanh(),
            ]
            layers.append(_POOLING[pooling](2))
            channels = wide
        flat = channels * (height // 8) * (width // 8)
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(flat, 128), nn.Tanh(), nn.Linear(128, classes))

    def forward(self, inputs: Tensor) -> Tensor:
        """[rows, channels, height, width] to logits [rows, classes]."""
        logits: Tensor = self.layers(inputs)
        return logits


class SmallDPCNN(nn.Module):
    """The tanh CNN of the same papers for MNIST: 26,010 parameters on 1 x 28 x 28."""

    def __init__(self, input_shape: Sequence[int], classes: int) -> None:
        super().__init__()
        channels, *_ = image_shape("dp_cnn_small", input_shape, at_least=20)
        self.features = nn.Sequential(
            nn.Conv2d(channels, 16, 8, stride=2, padding=2),
            nn.Tanh(),
            nn.MaxPool2d(2, stride=1),
            nn.Conv2d(16, 32, 4, stride=2),
            nn.Tanh(),
            nn.MaxPool2d(2, stride=1),
            nn.Flatten(),
        )
        with torch.no_grad():
            flat = self.features(torch.zeros(1, *input_shape)).numel()
        self.classifier = nn.Sequential(nn.Linear(flat, 32), nn.Tanh(), nn.Linear(32, classes))

    def forward(self, inputs: Tensor) -> Tensor:
        """[rows, channels, height, width] to logits [rows, classes]."""
        logits: Tensor = self.classifier(self.features(inputs))
        return logits


class FeatureCNN(nn.Module):
    """A small head for spatial features, such as those of the scattering transform: two 3 x 3 convolutions and a linear layer."""

    def __init__(self, input_shape: Sequence[int], classes: int, hidden: int = 64) -> None:
        super().__init__()
        channels, height, width = image_shape("feature_cnn", input_shape, at_least=4)
        self.layers = nn.Sequential(
            nn.Conv2d(channels, hidden, 3, padding=1),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Conv2d(hidden, hidden, 3, padding=1),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(hidden * (height // 2) * (width // 2), classes),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """[rows, channels, height, width] to logits [rows, classes]."""
        logits: Tensor = self.layers(inputs)
        return logits


def image_shape(name: str, input_shape: Sequence[int], at_least: int) -> tuple[int, int, int]:
    """(channels, height, width), or an error that says what the model needs."""
    if len(input_shape) != 3 or min(input_shape[1:]) < at_least:
        raise PrivgradError(
            f"{name} needs images [channels, height, width] of at least {at_least} x {at_least} pixels; "
            f"the data has {tuple(input_shape)}"
        )
    channels, height, width = input_shape
    return channels, height, width

"""Residual networks with a choice of normalization."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from privgrad.errors import check_count
from privgrad.nn.cnn import image_shape
from privgrad.nn.convert import normalized


class StandardizedConv2d(nn.Conv2d):
    """A convolution whose weight is standardized: each output channel's weights to mean 0 and variance 1 / fan-in.

    Weight standardization (arXiv:1903.10520), with the learned gain of arXiv:2101.08692. It looks at weights only.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0, bias: bool = True
    ) -> None:
        super().__init__(inputs, outputs, kernel, stride, padding, bias=bias)
        self.gain = nn.Parameter(torch.ones(outputs, 1, 1, 1))

    def reset_parameters(self) -> None:
        """Normal with variance 1 / fan-in: what a step does to a standardized weight depends on how large the weight is."""
        nn.init.normal_(self.weight, std=self.weight[0].numel() ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """As nn.Conv2d."""
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, correction=0)
        fan_in = self.weight[0].numel()
        scale = torch.rsqrt((variance * fan_in).clamp(min=1e-4)) * self.gain
        return functional.conv2d(inputs, (self.weight - mean) * scale, self.bias, self.stride, self.padding)


def group_norm(channels: int) -> nn.Module:
    """GroupNorm with 16 groups, or one for each channel where there are fewer."""
    return nn.GroupNorm(min(16, channels), channels)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut, projected where sizes differ (arXiv:1512.03385, option B)."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = norm(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))

    def forward(self, inputs: Tensor) -> Tensor:
        """[rows, inputs, h, w] to [rows, outputs, h / stride, w / stride]."""
        hidden = functional.relu(self.norm1(self.conv1(inputs)))
        return functional.relu(self.norm2(self.conv2(hidden)) + self.shortcut(inputs))


class ResNet(nn.Module):
    """The residual network for small images: a 3 x 3 stem, stages of basic blocks that halve the image, a mean, a linear layer.

    widths and blocks: per stage. normalization: a name in `convert.NORMALIZATIONS`; "group" has 16 groups here.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        classes: int,
        widths: Sequence[int] = (16, 32, 64),
        blocks: Sequence[int] = (3, 3, 3),
        normalization: str = "group",
    ) -> None:
        super().__init__()
        channels, *_ = image_shape("resnet", input_shape, at_least=8)
        norm = group_norm if normalization == "group" else partial(normalized, normalization, nn.BatchNorm2d)
        self.stem = nn.Sequential(nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False), norm(widths[0]), nn.ReLU())
        stages: list[nn.Module] = []
        for stage, ((before, width), count) in enumerate(zip(pairwise([widths[0], *widths]), blocks, strict=True)):
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                stages.append(BasicBlock(before if block == 0 else width, width, stride, norm))
        self.stages = nn.Sequential(*stages)
        self.classifier = nn.Linear(widths[-1], classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """[rows, channels, height, width] to logits [rows, classes]."""
        logits: Tensor = self.classifier(self.stages(self.stem(inputs)).mean((2, 3)))
        return logits


def resnet20(input_shape: Sequence[int], classes: int, normalization: str = "group") -> ResNet:
    """ResNet-20: about 270,000 parameters."""
    return ResNet(input_shape, classes, (16, 32, 64), (3, 3, 3), normalization)


def resnet18(input_shape: Sequence[int], classes: int, normalization: str = "group") -> ResNet:
    """ResNet-18 with the stem for small images: about 11 million parameters."""
    return ResNet(input_shape, classes, (64, 128, 256, 512), (2, 2, 2, 2), normalization)


class WideBlock(nn.Module):
    """ReLU, norm, convolution, twice, with standardized weights, and a shortcut that is projected the same way.

    The block of arXiv:1605.07146 as the authors of arXiv:2204.13650 have it in their code: ReLU comes before the norm, and the
    projection has a norm of its own.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = group_norm(inputs)
        self.conv1 = StandardizedConv2d(inputs, outputs, 3, stride, 1)
        self.norm2 = group_norm(outputs)
        self.conv2 = StandardizedConv2d(outputs, outputs, 3, 1, 1)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.ReLU(), group_norm(inputs), StandardizedConv2d(inputs, outputs, 1, stride))

    def forward(self, inputs: Tensor) -> Tensor:
        """[rows, inputs, h, w] to [rows, outputs, h / stride, w / stride]."""
        hidden = self.conv1(self.norm1(functional.relu(inputs)))
        outputs: Tensor = self.shortcut(inputs) + self.conv2(self.norm2(functional.relu(hidden)))
        return outputs


class WideResNet(nn.Module):
    """WRN-16-4 of De et al. (arXiv:2204.13650): GroupNorm with 16 groups and weight standardization; 2.75 million parameters.

    blocks: per stage, (depth - 4) / 6. width: times 16, 32, 64 channels.
    """

    def __init__(self, input_shape: Sequence[int], classes: int, blocks: int = 2, width: int = 4) -> None:
        super().__init__()
        channels, *_ = image_shape("wrn_16_4", input_shape, at_least=8)
        check_count("wrn_16_4's blocks", blocks)
        check_count("wrn_16_4's width", width)
        self.stem = StandardizedConv2d(channels, 16, 3, 1, 1)
        stages: list[nn.Module] = []
        before = 16
        for stage, base in enumerate((16, 32, 64)):
            for block in range(blocks):
                stages.append(WideBlock(before, base * width, 2 if stage > 0 and block == 0 else 1))
                before = base * width
        self.stages = nn.Sequential(*stages)
        self.norm = group_norm(before)
        self.classifier = nn.Linear(before, classes)
        # Truncated at two standard deviations, which takes so much of them away.
        std = before**-0.5 / 0.87962566
        nn.init.trunc_normal_(self.classifier.weight, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """[rows, channels, height, width] to logits [rows, classes]."""
        hidden = self.norm(functional.relu(self.stages(self.stem(inputs))))
        logits: Tensor = self.classifier(hidden.mean((2, 3)))
        return logits

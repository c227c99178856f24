"""The models of the step time table, each with its batch. Peers can run them all: no bare parameters, no BatchNorm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DpCnn(nn.Sequential):
    """The tanh network of Papernot et al. (arXiv:2007.14191) in the shape of arXiv:2112.00845: 550,570 parameters."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        before = 3
        for width in (32, 64, 128):
            for inputs in (before, width):
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.Tanh()]
            layers.append(nn.MaxPool2d(2))
            before = width
        super().__init__(*layers, nn.Flatten(), nn.Linear(2048, 128), nn.Tanh(), nn.Linear(128, 10))


class Residual(nn.Module):
    """Two 3x3 convolutions with GroupNorm; a 1x1 convolution on the way around where shapes change."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.first_norm = nn.GroupNorm(groups, outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.second_norm = nn.GroupNorm(groups, outputs)
        same = inputs == outputs and stride == 1
        self.around = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(inner)) + self.around(x))


class ResNet(nn.Module):
    """ResNet-20 (width 1, 3 blocks a stage) and WRN-16-4 (width 4, 2 blocks a stage), with GroupNorm."""

    def __init__(self, blocks: int, width: int, groups: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            nn.GroupNorm(min(groups, 16), 16),
            nn.ReLU(),
        ]
        before = 16
        for stage, channels in enumerate((16 * width, 32 * width, 64 * width)):
            for block in range(blocks):
                layers.append(Residual(before, channels, 2 if stage and not block else 1, groups))
                before = channels
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(before, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x).mean((2, 3)))
        return logits


class Attention(nn.Module):
    """Fused attention between two projections."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.into, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        qkv = self.into(x).view(rows, length, 3, self.heads, width // self.heads)
        attended = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        projected: Tensor = self.out(attended.transpose(1, 2).reshape(rows, length, width))
        return projected


class Transformer(nn.Module):
    """Four pre-normalised blocks of width 256 on 128 tokens, and a classifier on their mean."""

    def __init__(
        self, width: int = 256, blocks: int = 4, heads: int = 4, tokens: int = 1000, length: int = 128
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(tokens, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                [
                    nn.LayerNorm(width),
                    Attention(width, heads),
                    nn.LayerNorm(width),
                    nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)),
                ]
            )
            for _ in range(blocks)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]).repeat(len(tokens), 1))
        for block in self.blocks:
            first, attention, second, mlp = block.children()
            x = x + attention(first(x))
            x = x + mlp(second(x))
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


@dataclass(frozen=True)
class Bench:
    """make() gives the model, inputs() one batch; micro: rows per part where a step is divided by hand."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    micro: int

    def batch(self) -> tuple[Tensor, Tensor]:
        """Random inputs and labels."""
        inputs = self.inputs()
        return inputs, torch.randint(10, (len(inputs),))


MODELS: dict[str, Bench] = {
    "dp-cnn": Bench(DpCnn, lambda: torch.randn(256, 3, 32, 32), 32),
    "resnet-20-gn": Bench(lambda: ResNet(3, 1, 4), lambda: torch.randn(64, 3, 32, 32), 16),
    "wrn-16-4-gn": Bench(lambda: ResNet(2, 4, 16), lambda: torch.randn(32, 3, 32, 32), 8),
    "mlp": Bench(
        lambda: nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)),
        lambda: torch.randn(512, 784),
        128,
    ),
    "transformer": Bench(Transformer, lambda: torch.randint(1000, (32, 128)), 8),
}


def _tower(depth: int, width: int) -> nn.Sequential:
    """Convolutions of one width, GroupNorm and tanh, and a linear layer."""
    layers: list[nn.Module] = []
    for number in range(depth):
        layers += [nn.Conv2d(width if number else 3, width, 3, padding=1), nn.GroupNorm(4, width), nn.Tanh()]
    return nn.Sequential(*layers, nn.AvgPool2d(4), nn.Flatten(), nn.Linear(16 * width, 10))


def _scale(batch: int, depth: int, width: int) -> Bench:
    return Bench(lambda: _tower(depth, width), lambda: torch.randn(batch, 3, 16, 16), min(batch, 32))


SCALES: dict[str, Bench] = {
    **{f"batch-{batch}": _scale(batch, 4, 32) for batch in (32, 128, 512)},
    **{f"depth-{depth}": _scale(128, depth, 32) for depth in (2, 4, 8, 16)},
    **{f"width-{width}": _scale(128, 4, width) for width in (16, 32, 64, 128)},
}
"""One tower, of which one number at a time changes."""

"""Whole networks, in the shapes that people use, small. No rule was written with them in mind."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """A transformer block with fused attention, pre-normalised."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.into, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        qkv = self.into(self.first(x)).view(rows, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        x = x + self.out(attended.transpose(1, 2).reshape(rows, length, width))
        return x + self.down(F.gelu(self.up(self.second(x))))


class VisionTransformer(nn.Module):
    """Patches by a strided convolution, class token, learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 16) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, 17, 16) * 0.02)
        self.blocks = nn.Sequential(Block(16, 4, False), Block(16, 4, False))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


class UNet(nn.Module):
    """Down, up by transposed convolution, skip connections by concatenation; one loss per pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([self.twice(1, 8), self.twice(8, 16)])
        self.bottom = self.twice(16, 32)
        self.up = nn.ModuleList([nn.ConvTranspose2d(32, 16, 2, stride=2), nn.ConvTranspose2d(16, 8, 2, stride=2)])
        self.merge = nn.ModuleList([self.twice(32, 16), self.twice(16, 8)])
        self.head = nn.Conv2d(8, 5, 1)

    @staticmethod
    def twice(inputs: int, outputs: int) -> nn.Module:
        layers: list[nn.Module] = []
        for channels in (inputs, outputs):
            layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.InstanceNorm2d(outputs, affine=True), nn.SiLU()]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        skipped = []
        for layer in self.down:
            x = layer(x)
            skipped.append(x)
            x = F.max_pool2d(x, 2)
        x = self.bottom(x)
        for up, merge, skip in zip(self.up, self.merge, reversed(skipped), strict=True):
            x = merge(torch.cat([up(x), skip], dim=1))
        return self.head(x)


class Decoder(nn.Module):
    """The shape of GPT-2: token and position tables, causal blocks, output tied to the token table."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(23, 16), nn.Embedding(12, 16)
        self.drop = nn.Dropout(0.0)
        self.blocks = nn.ModuleList([Block(16, 2, True), Block(16, 2, True)])
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 23, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.drop(self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1])))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)).transpose(1, 2)


class LstmClassifier(nn.Module):
    """A table with padding, a bidirectional LSTM, a classifier on the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(23, 8, padding_idx=0)
        self.lstm = nn.LSTM(8, 6, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(12, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.table(tokens))[0].mean(1))


class Residual(nn.Module):
    """Two convolutions with GroupNorm and in-place activations, added to the input in place."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.GroupNorm(4, outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.GroupNorm(4, outputs),
        )
        self.short = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        y += self.short(x)
        return F.relu(y, inplace=True)


class ResNet(nn.Sequential):
    """A residual network without BatchNorm."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.GroupNorm(4, 8),
            nn.ReLU(inplace=True),
            Residual(8, 8, 1),
            Residual(8, 16, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 5),
        )


def images(channels: int, size: int) -> tuple[Tensor, Tensor]:
    """Four pictures with labels."""
    return torch.randn(4, channels, size, size, dtype=torch.float64), torch.randint(5, (4,))


NETWORKS = {
    "vision transformer": (VisionTransformer, lambda: images(3, 16)),
    "u-net": (UNet, lambda: (images(1, 8)[0], torch.randint(5, (4, 8, 8)))),
    "gpt-2": (Decoder, lambda: (torch.randint(23, (4, 12)), torch.randint(23, (4, 12)))),
    "lstm": (LstmClassifier, lambda: (torch.randint(23, (4, 9)), torch.randint(5, (4,)))),
    "resnet": (ResNet, lambda: images(3, 8)),
}

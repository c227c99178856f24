"""Small models, one per way of using a parameter. Each gives outputs whose squares are the losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROWS = 5


def squares(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """A loss that gives every output its own gradient."""
    output = model(*batch)
    if isinstance(output, tuple):
        output = output[0]
    weights = torch.linspace(0.5, 1.5, output[0].numel(), dtype=output.dtype).view(output.shape[1:])
    return ((output + 0.3).square() * weights).flatten(1).sum(1)


class Around(nn.Module):
    """A module of plain functions: make(parameters) gives the parameters by name, use(self, *batch) the output."""

    def __init__(self, use: Callable[..., Any], **parameters: Any) -> None:
        super().__init__()
        for name, value in parameters.items():
            if isinstance(value, tuple):
                value = nn.Parameter(torch.randn(value) / 2)
            setattr(self, name, value)
        self.use = use

    def forward(self, *batch: Tensor) -> Any:
        return self.use(self, *batch)


def before(module: nn.Module, *sizes: int) -> nn.Module:
    """A trainable layer before the module, so that input gradients matter too."""
    return Around(lambda m, x: m.module(x * m.scale), module=module, scale=sizes)


@dataclass(frozen=True)
class Case:
    """make() gives the model, shape is one row's input; integers: a table is looked up, of so many entries."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    integers: int | None = None

    def batch(self, dtype: torch.dtype, rows: int = ROWS) -> tuple[Tensor, ...]:
        """Random rows."""
        if self.integers is not None:
            return (torch.randint(self.integers, (rows, *self.shape)),)
        return (torch.randn(rows, *self.shape, dtype=dtype),)


class Twice(nn.Module):
    """Uses modules one after the other, and shares the weights of the first two."""

    def __init__(self, *modules: nn.Module, tie: bool = True) -> None:
        super().__init__()
        self.stack = nn.ModuleList(modules)
        if tie:
            modules[1].weight = modules[0].weight

    def forward(self, x: Tensor) -> Tensor:
        for module in self.stack:
            x = module(x).tanh()
        return x


class TiedTable(nn.Module):
    """A language model's table: looked up, and multiplied with."""

    def __init__(self, padding: int | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6, padding_idx=padding)
        self.inner = nn.Linear(6, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.inner(self.table(tokens)).tanh(), self.table.weight)


class Standardized(nn.Conv2d):
    """Weight standardization: the operator sees a weight computed from the parameter."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / (weight.std(dim=(1, 2, 3), keepdim=True) + 1e-5), self.bias)


class Lora(nn.Module):
    """A frozen layer with a trained low-rank correction."""

    def __init__(self, merged: bool) -> None:
        super().__init__()
        self.base = nn.Linear(6, 7).requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(7, 2))
        self.merged = merged

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return F.linear(x, self.base.weight + self.up @ self.down, self.base.bias)
        return self.base(x) + F.linear(F.linear(x, self.down), self.up)


class Attention(nn.Module):
    """nn.MultiheadAttention in its variants."""

    def __init__(self, cross: bool = False, weights: bool = False, mask: bool = False, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **options)
        self.cross, self.weights, self.mask = cross, weights, mask

    def forward(self, x: Tensor) -> Tensor:
        if not self.attention.batch_first:
            x = x.transpose(0, 1)
        time = 1 if self.attention.batch_first else 0
        length = x.shape[time]
        other = x.flip(time) * 2 if self.cross else x
        mask = torch.ones(length, length, dtype=torch.bool).triu(1) if self.mask else None
        padding = None
        if self.mask:
            padding = torch.zeros(x.shape[1 - time], length, dtype=torch.bool)
            padding[:, length // 2] = True
        output, _ = self.attention(x, other, other, need_weights=self.weights, attn_mask=mask, key_padding_mask=padding)
        return output if self.attention.batch_first else output.transpose(0, 1)


class Sequence(nn.Module):
    """A recurrent module's outputs and last states."""

    def __init__(self, module: nn.Module, batch_first: bool = True) -> None:
        super().__init__()
        self.module, self.batch_first = module, batch_first

    def forward(self, x: Tensor) -> Tensor:
        output, state = self.module(x if self.batch_first else x.transpose(0, 1))
        last = state[1] if isinstance(state, tuple) else state
        output = output if self.batch_first else output.transpose(0, 1)
        return torch.cat([output.flatten(1), last.transpose(0, 1).flatten(1)], dim=1)


class Cell(nn.Module):
    """A recurrent cell, in a loop of the model's own."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for now in x.unbind(1):
            state = self.cell(now, state)
        return state[0] if isinstance(state, tuple) else state


def frozen(module: nn.Module, *names: str) -> nn.Module:
    """Freeze parameters by name."""
    for name in names:
        module.get_parameter(name).requires_grad_(False)
    return module


def reparametrized(module: nn.Module, how: Callable[..., Any]) -> nn.Module:
    """Apply one of torch.nn.utils.parametrizations."""
    how(module)
    return module


def _expanded(m: nn.Module, x: Tensor) -> Tensor:
    return m.linear(x[:, None].expand(-1, 4, -1)) * x.new_ones(1).expand(7)


def _windows(m: nn.Module, x: Tensor) -> Tensor:
    """Rows folded into the first dimension, as windowed attention does: [n, 4, d] to [2 n, 2, d] and back."""
    return m.linear(x.reshape(-1, 2, x.shape[-1])).reshape(x.shape[0], 4, -1)


def _class_token(m: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([m.token.expand(x.shape[0], -1, -1), x], dim=1) + m.position[:, : x.shape[1] + 1]


CASES: dict[str, Case] = {
    # linear maps
    "linear": Case(lambda: before(nn.Linear(6, 7), 6), (6,)),
    "linear, first": Case(lambda: nn.Linear(6, 7), (6,)),
    "linear [T, d]": Case(lambda: before(nn.Linear(6, 7), 6), (4, 6)),
    "linear [T, d], many positions": Case(lambda: before(nn.Linear(3, 2), 3), (40, 3)),
    "linear [T, d], few positions": Case(lambda: before(nn.Linear(60, 50), 60), (3, 60)),
    "linear [H, W, d]": Case(lambda: before(nn.Linear(6, 7, bias=False), 6), (3, 4, 6)),
    "linear, rows as positions": Case(lambda: Around(_windows, linear=nn.Linear(6, 7)), (4, 6)),
    "linear, time first": Case(
        lambda: Around(lambda m, x: m.linear(x.transpose(0, 1)).transpose(0, 1), linear=nn.Linear(6, 7)), (5, 6)
    ),
    "linear, expanded input": Case(lambda: Around(_expanded, linear=nn.Linear(6, 7)), (6,)),
    "linear, frozen weight": Case(lambda: frozen(before(nn.Linear(6, 7), 6), "module.weight"), (6,)),
    "linear, frozen bias": Case(lambda: frozen(before(nn.Linear(6, 7), 6), "module.bias"), (4, 6)),
    "linear, tied": Case(lambda: Twice(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)), (6,)),
    "linear, tied, [T, d]": Case(lambda: Twice(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)), (9, 6)),
    "linear, used in a loop": Case(
        lambda: Around(lambda m, x: m.linear(m.linear(m.linear(x).tanh()).tanh()), linear=nn.Linear(6, 6)), (6,)
    ),
    "linear, twice on one input": Case(
        lambda: Around(lambda m, x: m.linear(x) * m.linear(x.flip(-1)), linear=nn.Linear(6, 3)), (2, 6)
    ),
    "linear, unused branch": Case(
        lambda: Around(lambda m, x: (m.a(x), m.b(x))[0], a=nn.Linear(6, 3), b=nn.Linear(6, 3)), (6,)
    ),
    "linear, in-place activation": Case(
        lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 3), nn.ELU(inplace=True)), (4, 6)
    ),
    "matmul": Case(lambda: Around(lambda m, x: (x @ m.w).tanh() @ m.v, w=(6, 7), v=(7, 3)), (4, 6)),
    "matmul, transposed": Case(lambda: Around(lambda m, x: torch.matmul(x, m.w.t()), w=(7, 6)), (4, 6)),
    "matmul, weight first": Case(lambda: Around(lambda m, x: m.w @ x.transpose(1, 2), w=(7, 6)), (4, 6)),
    "einsum": Case(lambda: Around(lambda m, x: torch.einsum("btd,hdk->bhtk", x, m.w), w=(2, 6, 3)), (4, 6)),
    "bilinear": Case(lambda: Around(lambda m, x: m.b(x, x.flip(1)), b=nn.Bilinear(6, 6, 3)), (6,)),
    "lora": Case(lambda: Lora(merged=False), (4, 6)),
    "lora, merged": Case(lambda: Lora(merged=True), (4, 6)),
    # convolutions
    "conv1d": Case(lambda: before(nn.Conv1d(3, 4, 3, padding=1), 3, 9), (3, 9)),
    "conv2d": Case(lambda: before(nn.Conv2d(3, 4, 3), 3, 6, 6), (3, 6, 6)),
    "conv2d, first": Case(lambda: nn.Conv2d(3, 4, 3, bias=False), (3, 6, 6)),
    "conv2d, stride": Case(lambda: before(nn.Conv2d(3, 4, 3, stride=2, padding=1), 3, 7, 6), (3, 7, 6)),
    "conv2d, uneven": Case(
        lambda: before(nn.Conv2d(2, 4, (3, 1), stride=(1, 2), padding=(2, 0), dilation=(2, 1)), 2, 7, 6), (2, 7, 6)
    ),
    "conv2d, dilation": Case(lambda: before(nn.Conv2d(3, 4, 3, padding=2, dilation=2), 3, 6, 6), (3, 6, 6)),
    "conv2d, groups": Case(lambda: before(nn.Conv2d(4, 6, 3, groups=2), 4, 6, 6), (4, 6, 6)),
    "conv2d, depthwise": Case(lambda: before(nn.Conv2d(4, 8, 3, groups=4, padding=1), 4, 6, 6), (4, 6, 6)),
    "conv2d, same": Case(lambda: before(nn.Conv2d(3, 4, 4, padding="same", dilation=2), 3, 7, 7), (3, 7, 7)),
    "conv2d, circular": Case(
        lambda: before(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), 3, 6, 6), (3, 6, 6)
    ),
    "conv2d, many weights on a small map": Case(lambda: before(nn.Conv2d(96, 128, 3, padding=1), 96, 3, 3), (96, 3, 3)),
    "conv2d, strided, small map": Case(
        lambda: before(nn.Conv2d(96, 128, 3, stride=2, dilation=2, padding=1), 96, 7, 7), (96, 7, 7)
    ),
    "conv2d, tied": Case(
        lambda: Twice(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 2, 1)), (3, 5, 5)
    ),
    "conv2d, frames as positions": Case(
        lambda: Around(lambda m, x: m.c(x.flatten(0, 1)).unflatten(0, (x.shape[0], -1)), c=nn.Conv2d(3, 4, 3)),
        (2, 3, 6, 6),
    ),
    "conv2d, frames, many weights": Case(
        lambda: Around(lambda m, x: m.c(x.flatten(0, 1)).unflatten(0, (x.shape[0], -1)), c=nn.Conv2d(96, 128, 3)),
        (2, 96, 4, 4),
    ),
    "conv2d, expanded input": Case(
        lambda: Around(lambda m, x: m.c(x[:, None, None].expand(-1, 3, 6, -1)), c=nn.Conv2d(3, 4, 3)), (6,)
    ),
    "conv2d, standardized": Case(lambda: before(Standardized(3, 4, 3), 3, 6, 6), (3, 6, 6)),
    "conv3d": Case(lambda: before(nn.Conv3d(2, 3, 3, padding=1, stride=(1, 2, 1)), 2, 4, 5, 4), (2, 4, 5, 4)),
    "conv_transpose1d": Case(lambda: before(nn.ConvTranspose1d(3, 4, 3, stride=2), 3, 5), (3, 5)),
    "conv_transpose2d": Case(
        lambda: before(nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), 4, 4, 5), (4, 4, 5)
    ),
    "conv_transpose2d, dilation": Case(lambda: before(nn.ConvTranspose2d(3, 4, 3, dilation=2), 3, 4, 4), (3, 4, 4)),
    "conv_transpose3d": Case(lambda: before(nn.ConvTranspose3d(2, 3, 2, stride=2), 2, 2, 3, 2), (2, 2, 3, 2)),
    # tables
    "embedding": Case(lambda: nn.Embedding(11, 6), (7,), 11),
    "embedding, one token": Case(lambda: nn.Embedding(11, 6), (), 11),
    "embedding, padding": Case(lambda: nn.Embedding(11, 6, padding_idx=-2), (7,), 11),
    "embedding, odd rank": Case(lambda: nn.Embedding(4, 3), (2, 3, 2), 4),
    "embedding, tied to the output": Case(TiedTable, (7,), 11),
    "embedding, tied, padding": Case(lambda: TiedTable(3), (7,), 11),
    "embedding bag": Case(lambda: nn.EmbeddingBag(11, 6, mode="sum"), (7,), 11),
    # normalization
    "layer norm": Case(lambda: before(nn.LayerNorm(6), 6), (6,)),
    "layer norm [T, d]": Case(lambda: before(nn.LayerNorm(6), 6), (4, 6)),
    "layer norm over two dimensions": Case(lambda: before(nn.LayerNorm((3, 4)), 3, 4), (2, 3, 4)),
    "layer norm, no bias": Case(lambda: before(nn.LayerNorm(6, bias=False), 6), (4, 6)),
    "layer norm, frozen scale": Case(lambda: frozen(before(nn.LayerNorm(6), 6), "module.weight"), (4, 6)),
    "group norm": Case(lambda: before(nn.GroupNorm(2, 6), 6, 3, 3), (6, 3, 3)),
    "group norm [d]": Case(lambda: before(nn.GroupNorm(2, 6), 6), (6,)),
    "group norm, frozen bias": Case(lambda: frozen(before(nn.GroupNorm(3, 6), 6, 4), "module.bias"), (6, 4)),
    "instance norm": Case(lambda: before(nn.InstanceNorm2d(4, affine=True), 4, 3, 3), (4, 3, 3)),
    "instance norm, running": Case(
        lambda: before(nn.InstanceNorm1d(4, affine=True, track_running_stats=True).eval(), 4, 3), (4, 3)
    ),
    "rms norm": Case(lambda: before(nn.RMSNorm(6), 6), (4, 6)),
    "batch norm, given statistics": Case(lambda: before(nn.BatchNorm2d(4).eval(), 4, 3, 3), (4, 3, 3)),
    # bare parameters
    "scale and shift": Case(lambda: Around(lambda m, x: x * m.s + m.b, s=(6,), b=(1,)), (4, 6)),
    "a number": Case(lambda: Around(lambda m, x: x * m.s.exp(), s=()), (4, 6)),
    "a parameter alone": Case(lambda: Around(lambda m, x: m.w * m.w + x, w=(4, 6)), (4, 6)),
    "class token and positions": Case(lambda: Around(_class_token, token=(1, 1, 6), position=(1, 9, 6)), (4, 6)),
    "prelu": Case(lambda: before(nn.PReLU(4), 4, 3), (4, 3)),
    "a weight that is masked per row": Case(
        lambda: Around(lambda m, x: x * torch.where(x.sum(-1, keepdim=True) > 0, m.a, m.b), a=(6,), b=(6,)), (6,)
    ),
    # attention
    "multi-head attention": Case(lambda: Attention(batch_first=True), (5, 8)),
    "multi-head attention, time first": Case(Attention, (5, 8)),
    "multi-head attention, masks": Case(lambda: Attention(batch_first=True, mask=True), (5, 8)),
    "multi-head attention, masks and weights": Case(lambda: Attention(mask=True, weights=True), (5, 8)),
    "multi-head attention, cross": Case(lambda: Attention(cross=True, batch_first=True), (5, 8)),
    "multi-head attention, separate": Case(lambda: Attention(cross=True, kdim=8, vdim=8, bias=False), (5, 8)),
    "multi-head attention, added": Case(lambda: Attention(add_bias_kv=True, add_zero_attn=True, mask=True), (5, 8)),
    "transformer layer": Case(lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), (5, 8)),
    "fused attention, learned query": Case(
        lambda: Around(
            lambda m, x: F.scaled_dot_product_attention(m.q.expand(x.shape[0], -1, -1, -1), x, x), q=(1, 2, 3, 4)
        ),
        (2, 5, 4),
    ),
    # recurrence
    "lstm": Case(lambda: Sequence(nn.LSTM(5, 4, batch_first=True)), (6, 5)),
    "lstm, deep, both ways, time first": Case(
        lambda: Sequence(nn.LSTM(5, 4, num_layers=2, bidirectional=True), batch_first=False), (6, 5)
    ),
    "gru": Case(lambda: Sequence(nn.GRU(5, 4, num_layers=2, batch_first=True)), (6, 5)),
    "rnn": Case(lambda: Sequence(nn.RNN(5, 4, batch_first=True, bias=False)), (6, 5)),
    "rnn, relu": Case(lambda: Sequence(nn.RNN(5, 4, batch_first=True, nonlinearity="relu")), (6, 5)),
    "lstm cell": Case(lambda: Cell(nn.LSTMCell(5, 4)), (6, 5)),
    "gru cell": Case(lambda: Cell(nn.GRUCell(5, 4)), (6, 5)),
    # derived weights
    "weight norm": Case(
        lambda: before(reparametrized(nn.Linear(6, 7), nn.utils.parametrizations.weight_norm), 6), (4, 6)
    ),
    "spectral norm": Case(
        lambda: before(reparametrized(nn.Linear(6, 7).eval(), nn.utils.parametrizations.spectral_norm), 6), (4, 6)
    ),
    "a derived weight used twice": Case(
        lambda: Around(lambda m, x: (x @ m.w.exp()) * F.linear(x, m.w.sin().t()), w=(6, 3)), (4, 6)
    ),
}

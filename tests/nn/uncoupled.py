"""Models and losses in which every record is by itself. None may be refused."""

from __future__ import annotations

from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import privgrad as pg
from tests.nn.coupled import CROSS_ENTROPY, FEATURES, IMAGES, SEQUENCES, TOKENS, Apply, Case, around


class StochasticDepth(nn.Module):
    """Each row drops the block by a coin of its own."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training:
            return inputs + self.block(inputs)
        keep = (torch.rand(len(inputs), 1) < 0.8).to(inputs)
        return inputs + keep * self.block(inputs) / 0.8


class Routed(nn.Module):
    """A mixture of experts: each row goes to its own expert, in batches of whatever size comes about."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 6)) for _ in range(3)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        weights = self.gate(inputs).softmax(1)
        chosen = weights.argmax(1)
        outputs = torch.zeros_like(inputs)
        for number, expert in enumerate(self.experts):
            here = chosen == number
            outputs[here] = weights[here, number, None] * expert(inputs[here])
        return outputs


class WithLoss(nn.Module):
    """As in Hugging Face's models: a dictionary in, the losses computed inside."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8, padding_idx=0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 2)

    def forward(self, tokens: Tensor, mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = self.encoder(self.embedding(tokens), src_key_padding_mask=mask == 0)
        logits = self.head((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
        return {"logits": logits, "losses": F.cross_entropy(logits, labels, reduction="none")}


class SequenceFirstTransformer(nn.Module):
    """Works on [positions, rows, features] inside, with learned positions and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(8, 6)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 12), 2, enable_nested_tensor=False)
        self.last = nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        placed = inputs + self.positions(torch.arange(inputs.shape[1]))
        return self.last(self.encoder(placed.transpose(0, 1)).mean(0))


class LastState(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell
        self.last = nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.cell(inputs)[0][:, -1])


class KeepsAttention(nn.Module):
    """Leaves the last attention weights in an attribute, to be looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.last = nn.Linear(6, 3)
        self.weights: Tensor | None = None
        self.calls = 0

    def forward(self, inputs: Tensor) -> Tensor:
        mixed, self.weights = self.attention(inputs, inputs, inputs)
        self.calls += 1
        return self.last(mixed.mean(1))


class AuxiliaryInTraining(nn.Module):
    """Gives two outputs in train mode and one in eval mode, as Inception does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 3), nn.Linear(3, 3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, inputs: Tensor) -> Any:
        hidden = self.first(inputs)
        outputs = self.last(self.dropout(hidden))
        return (outputs, hidden) if self.training else outputs


def with_auxiliary(model: nn.Module, batch: Any) -> Tensor:
    outputs, hidden = model(batch[0])
    return CROSS_ENTROPY(lambda _: outputs, batch) + 0.3 * CROSS_ENTROPY(lambda _: hidden, batch)


class Checkpointed(nn.Module):
    """Recomputes its dropout in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Tanh())
        self.last = nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(checkpoint(self.block, inputs, use_reentrant=False))


class OwnGenerator(nn.Module):
    """Noise from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.linear(inputs + 0.1 * torch.randn(inputs.shape, generator=self.generator))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)
        self.last.weight = self.first.weight

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.first(inputs).relu_())


class Scaled(nn.Module):
    """A table by position, made once and cached."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.table: Tensor | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.linspace(0, 1, inputs.shape[1])
        return self.linear((inputs * self.table[:, None]).sum(1))


def dictionary_loss(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch)["losses"]


def denoising(model: nn.Module, batch: Any) -> Tensor:
    """The losses of a diffusion model: noise and time are drawn in the loss function."""
    inputs = batch[0]
    time = torch.rand(len(inputs), 1)
    noise = torch.randn_like(inputs)
    return (model(torch.cat([time * inputs + (1 - time) * noise], 1)) - noise).square().mean(1)


def reparametrised(model: nn.Module, batch: Any) -> Tensor:
    """The losses of a variational autoencoder."""
    mean, spread = model(batch[0]).chunk(2, dim=1)
    code = torch.distributions.Normal(mean, spread.exp()).rsample()
    return (code - batch[0]).square().sum(1) + 0.5 * (mean.square() + spread.exp().square() - 2 * spread).sum(1)


def probabilities(model: nn.Module, batch: Any) -> Tensor:
    """Needs floats in [0, 1]: raises on others."""
    return F.binary_cross_entropy(batch[0].clamp(max=2), model(batch[0]).sigmoid(), reduction="none").mean(1)


def per_class_weight(model: nn.Module, batch: Any) -> Tensor:
    """Weights without a normaliser."""
    return F.cross_entropy(model(batch[0]), batch[1], weight=torch.tensor([1.0, 5.0, 2.0]), reduction="none")


def autocast(model: nn.Module, batch: Any) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(batch[0])
    return F.cross_entropy(outputs.float(), batch[1], reduction="none")


def categorical(model: nn.Module, batch: Any) -> Tensor:
    """A score-function gradient: an action is drawn for each row."""
    choice = torch.distributions.Categorical(logits=model(batch[0]))
    action = choice.sample()
    return -choice.log_prob(action) * (action == batch[1])


def gradient_penalty(model: nn.Module, batch: Any) -> Tensor:
    """A second derivative, record by record."""
    losses = CROSS_ENTROPY(model, batch)
    inputs = batch[0].detach().requires_grad_()
    (slope,) = torch.autograd.grad(model(inputs).square().sum(), inputs, create_graph=True)
    return losses + slope.square().sum(1)


def numpy_noise(model: nn.Module, batch: Any) -> Tensor:
    noise = torch.tensor(numpy.random.randn(*batch[0].shape), dtype=torch.float32)
    return CROSS_ENTROPY(model, (batch[0] + noise, batch[1]))


def nearest_prototype(model: nn.Module, batch: Any) -> Tensor:
    """Distances to learned prototypes, with the rows inside torch.func.vmap."""
    return torch.func.vmap(lambda row: (model(row) - row[:3]).square().sum(), randomness="different")(batch[0])


def text(tokens: int = 5) -> dict[str, Tensor]:
    return {
        "tokens": torch.zeros(1, tokens, dtype=torch.long),
        "mask": torch.zeros(1, tokens, dtype=torch.long),
        "labels": torch.zeros(1, dtype=torch.long),
    }


def deep(layers: int = 12) -> nn.Sequential:
    blocks = [StochasticDepth(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.GELU())) for _ in range(layers)]
    return nn.Sequential(*blocks, nn.Linear(6, 3))


DOUBLES = (torch.zeros(1, 6, dtype=torch.float64), torch.zeros(1, dtype=torch.long))
BFLOATS = (torch.zeros(1, 6, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.long))
ANY = ".*"
UNCOUPLED: dict[str, Case] = {
    "linear": Case(lambda: nn.Linear(6, 3), CROSS_ENTROPY, FEATURES, ANY),
    "zero at the start": Case(lambda: zeros(nn.Linear(6, 3)), CROSS_ENTROPY, FEATURES, ANY),
    "group norm": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(True), nn.Flatten(), nn.Linear(144, 3)),
        CROSS_ENTROPY,
        IMAGES,
        ANY,
    ),
    "instance norm": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4), nn.Flatten(), nn.Linear(144, 3)),
        CROSS_ENTROPY,
        IMAGES,
        ANY,
    ),
    "layer norm": Case(lambda: around(nn.LayerNorm(6)), CROSS_ENTROPY, FEATURES, ANY),
    "rms norm": Case(lambda: around(nn.RMSNorm(6)), CROSS_ENTROPY, FEATURES, ANY),
    "dropout": Case(lambda: around(nn.Dropout(0.5)), CROSS_ENTROPY, FEATURES, ANY),
    "much dropout": Case(lambda: around(nn.Dropout(0.9)), CROSS_ENTROPY, FEATURES, ANY),
    "alpha dropout": Case(lambda: around(nn.AlphaDropout(0.5)), CROSS_ENTROPY, FEATURES, ANY),
    "randomised relu": Case(lambda: around(nn.RReLU()), CROSS_ENTROPY, FEATURES, ANY),
    "channel dropout": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout2d(0.5), nn.Flatten(), nn.Linear(144, 3)),
        CROSS_ENTROPY,
        IMAGES,
        ANY,
    ),
    "batch norm in eval mode": Case(lambda: around(nn.BatchNorm1d(6)).eval(), CROSS_ENTROPY, FEATURES, ANY),
    "attention": Case(
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(6, 2, 12, batch_first=True), Apply(lambda x: x.mean(1)), nn.Linear(6, 3)
        ),
        CROSS_ENTROPY,
        SEQUENCES,
        ANY,
    ),
    "attention in eval mode": Case(
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(6, 2, 12, batch_first=True), Apply(lambda x: x.mean(1)), nn.Linear(6, 3)
        ).eval(),
        CROSS_ENTROPY,
        SEQUENCES,
        ANY,
    ),
    "attention weights kept to look at": Case(KeepsAttention, CROSS_ENTROPY, SEQUENCES, ANY),
    "sequence-first transformer": Case(SequenceFirstTransformer, CROSS_ENTROPY, SEQUENCES, ANY),
    "sequence-first transformer, as many positions as rows": Case(
        SequenceFirstTransformer, CROSS_ENTROPY, (torch.zeros(1, 4, 6), FEATURES[1]), ANY
    ),
    "lstm": Case(lambda: LastState(nn.LSTM(6, 6, 2, batch_first=True, dropout=0.3)), CROSS_ENTROPY, SEQUENCES, ANY),
    "gru": Case(lambda: LastState(nn.GRU(6, 6, batch_first=True)), CROSS_ENTROPY, SEQUENCES, ANY),
    "embedding with padding": Case(
        lambda: nn.Sequential(nn.Embedding(9, 6, padding_idx=0), nn.Flatten(), nn.Linear(30, 3)),
        CROSS_ENTROPY,
        TOKENS,
        ANY,
    ),
    "spectral norm": Case(
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 6)), nn.Tanh(), nn.Linear(6, 3)),
        CROSS_ENTROPY,
        FEATURES,
        ANY,
    ),
    "spectral norm of old": Case(
        lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(6, 6)), nn.Tanh(), nn.Linear(6, 3)),
        CROSS_ENTROPY,
        FEATURES,
        ANY,
    ),
    "weight norm": Case(
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 6)), nn.Tanh(), nn.Linear(6, 3)),
        CROSS_ENTROPY,
        FEATURES,
        ANY,
    ),
    "stochastic depth": Case(deep, CROSS_ENTROPY, FEATURES, ANY),
    "text, loss inside": Case(WithLoss, dictionary_loss, text(), ANY),
    "text of two tokens": Case(WithLoss, dictionary_loss, text(2), ANY),
    "mixture of experts": Case(lambda: around(Routed()), CROSS_ENTROPY, FEATURES, ANY),
    "mixture of experts with dropout": Case(
        lambda: nn.Sequential(Routed(0.5), Routed(0.5), nn.Linear(6, 3)), CROSS_ENTROPY, FEATURES, ANY
    ),
    "float64": Case(lambda: around(nn.Tanh()).double(), CROSS_ENTROPY, DOUBLES, ANY),
    "bfloat16": Case(lambda: around(nn.Tanh()).bfloat16(), CROSS_ENTROPY, BFLOATS, ANY),
    "autocast": Case(lambda: around(nn.Tanh()), autocast, FEATURES, ANY),
    "in-place relu": Case(
        lambda: nn.Sequential(nn.ReLU(True), nn.Linear(6, 6), nn.ReLU(True), nn.Linear(6, 3)),
        CROSS_ENTROPY,
        FEATURES,
        ANY,
    ),
    "auxiliary output in training": Case(AuxiliaryInTraining, with_auxiliary, FEATURES, ANY),
    "activation checkpointing": Case(Checkpointed, CROSS_ENTROPY, FEATURES, ANY),
    "a generator of its own": Case(OwnGenerator, CROSS_ENTROPY, FEATURES, ANY),
    "tied weights": Case(Tied, CROSS_ENTROPY, FEATURES, ANY),
    "a cached table": Case(Scaled, CROSS_ENTROPY, SEQUENCES, ANY),
    "diffusion": Case(lambda: nn.Linear(6, 6), denoising, FEATURES, ANY),
    "variational autoencoder": Case(lambda: nn.Linear(6, 12), reparametrised, FEATURES, ANY),
    "probabilities": Case(lambda: nn.Linear(6, 6), probabilities, FEATURES, ANY),
    "class weights without a normaliser": Case(lambda: nn.Linear(6, 3), per_class_weight, FEATURES, ANY),
    "drawn actions": Case(lambda: nn.Linear(6, 3), categorical, FEATURES, ANY),
    "gumbel softmax": Case(lambda: around(Apply(F.gumbel_softmax)), CROSS_ENTROPY, FEATURES, ANY),
    "frozen layers": Case(lambda: frozen_first(around(nn.Tanh())), CROSS_ENTROPY, FEATURES, ANY),
    "loss module": Case(lambda: nn.Linear(6, 3), pg.supervised(nn.CrossEntropyLoss(reduction="none")), FEATURES, ANY),
    "gradient penalty": Case(lambda: around(nn.Tanh()), gradient_penalty, FEATURES, ANY),
    "noise from numpy": Case(lambda: nn.Linear(6, 3), numpy_noise, FEATURES, ANY),
    "sparse gradients": Case(
        lambda: nn.Sequential(nn.Embedding(9, 6, sparse=True), nn.Flatten(), nn.Linear(30, 3)),
        CROSS_ENTROPY,
        TOKENS,
        ANY,
    ),
    "rows under vmap": Case(lambda: around(nn.Dropout(0.5)), nearest_prototype, FEATURES, ANY),
    "compiled": Case(lambda: torch.compile(around(nn.Dropout(0.5)), backend="eager"), CROSS_ENTROPY, FEATURES, ANY),
    "scripted": Case(lambda: torch.jit.script(around(nn.Tanh())), CROSS_ENTROPY, FEATURES, ANY),
}


def zeros(model: nn.Linear) -> nn.Linear:
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return model


def frozen_first(model: nn.Sequential) -> nn.Sequential:
    model[0].requires_grad_(False)
    return model

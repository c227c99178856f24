"""Models and losses in which one record of a batch depends on the others, and how the detector should name the place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import privgrad as pg

CROSS_ENTROPY = pg.supervised(F.cross_entropy)


class Case(NamedTuple):
    """A model, its loss, a batch of one to take the shapes from, and a regular expression for `Finding.where`."""

    model: Callable[[], nn.Module]
    loss_fn: Callable[[nn.Module, Any], Any]
    batch: Any
    where: str


FEATURES = (torch.zeros(1, 6), torch.zeros(1, dtype=torch.long))
IMAGES = (torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.long))
SEQUENCES = (torch.zeros(1, 5, 6), torch.zeros(1, dtype=torch.long))
TOKENS = (torch.zeros(1, 5, dtype=torch.long), torch.zeros(1, dtype=torch.long))


class Apply(nn.Module):
    """A layer from a function of its input."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, inputs: Tensor) -> Tensor:
        return self.function(inputs)


def around(layer: nn.Module, width: int = 6) -> nn.Sequential:
    """Linear, the layer, linear: the layer is "1"."""
    return nn.Sequential(nn.Linear(width, width), layer, nn.Linear(width, 3))


class SubtractBatchMean(nn.Module):
    """What a person writes by hand."""

    def __init__(self, share: float = 1.0) -> None:
        super().__init__()
        self.share = share

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs - self.share * inputs.mean(0, keepdim=True)


class GhostBatchNorm(nn.Module):
    """BatchNorm over chunks of a batch."""

    def __init__(self, chunk: int = 128) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.chunk = chunk

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.cat([self.norm(part) for part in inputs.split(self.chunk)])


class MinibatchDeviation(nn.Module):
    """Adds the standard deviation over groups of four rows, as StyleGAN's discriminator does."""

    def forward(self, inputs: Tensor) -> Tensor:
        groups = inputs.view(min(4, len(inputs)), -1, inputs.shape[1])
        return inputs + groups.std(0, unbiased=False).mean(1).repeat(len(groups))[:, None]


class InOwnForward(nn.Module):
    """Couples between its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        return self.last(hidden / hidden.norm())


class CoupledGradient(torch.autograd.Function):
    """The forward pass is the identity; the backward pass mixes the rows."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        return inputs.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient + gradient.mean(0, keepdim=True)


class LittleCoupledGradient(CoupledGradient):
    """A millionth of the mean."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient + 1e-6 * gradient.mean(0, keepdim=True)


class DetachedTrick(nn.Module):
    """Forward: inputs, exactly. Backward: the batch mean takes part."""

    def forward(self, inputs: Tensor) -> Tensor:
        mean = inputs.mean(0, keepdim=True)
        return inputs + (mean - mean.detach())


class WeightGradient(torch.autograd.Function):
    """A linear map whose weight gets every row's input in its gradient; no input does."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return inputs @ weight.T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        inputs, weight = ctx.saved_tensors
        return gradient @ weight, gradient.sum(0)[:, None] * inputs.sum(0)


class CoupledWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, inputs: Tensor) -> Tensor:
        return WeightGradient.apply(inputs, self.weight)


class ByBatchSize(torch.autograd.Function):
    """A gradient divided by the size of the batch, under an unchanged value."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        return inputs.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient / len(gradient)


class SequenceFirst(nn.Module):
    """Attention that takes the rows for positions: batch_first=False on [rows, positions, features]."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2)
        self.last = nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.attention(inputs, inputs, inputs)[0].mean(1))


class Bank(nn.Module):
    """Adds the mean of what it has seen, kept in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bank", torch.zeros(6))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = inputs + self.bank
        self.bank = 0.9 * self.bank + 0.1 * inputs.detach().mean(0)
        return outputs


class Watching(nn.Module):
    """Its output is clean; its buffer is not, and leaves with the model."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("largest", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        self.largest.data.copy_(torch.maximum(self.largest, inputs.detach().abs().max()))
        return inputs


class Counting(nn.Module):
    """Counts records: the size of a sampled batch is private."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen += len(inputs)
        return inputs


class Accumulating(nn.Module):
    """A running sum in a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def forward(self, inputs: Tensor) -> Tensor:
        self.total = self.total + inputs.detach().sum()
        return inputs


class Queue(nn.Module):
    """A list of everything that passed."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: list[Tensor] = []

    def forward(self, inputs: Tensor) -> Tensor:
        self.queue.append(inputs.detach().mean(0))
        return inputs


def info_nce(model: nn.Module, batch: Any) -> Tensor:
    """Each row against all rows of the batch."""
    features = F.normalize(model(batch[0]), dim=1)
    return F.cross_entropy(features @ features.T / 0.1, torch.arange(len(features)), reduction="none")


def class_weighted(model: nn.Module, batch: Any) -> Tensor:
    """What reduction="mean" does with weights: divide by the sum of the batch's weights."""
    weights = torch.tensor([1.0, 5.0, 2.0])[batch[1]]
    return weights * F.cross_entropy(model(batch[0]), batch[1], reduction="none") / weights.sum()


def divided_by_size(model: nn.Module, batch: Any) -> Tensor:
    return CROSS_ENTROPY(model, batch) / len(batch[0])


def mean_for_all(model: nn.Module, batch: Any) -> Tensor:
    losses = CROSS_ENTROPY(model, batch)
    return losses.mean().expand(len(losses))


def by_rank(model: nn.Module, batch: Any) -> Tensor:
    """Only the worst half of the batch counts."""
    losses = CROSS_ENTROPY(model, batch)
    return losses * (losses >= losses.median())


def mixed_up(model: nn.Module, batch: Any) -> Tensor:
    """Mixup: every row with another one of the batch."""
    order = torch.randperm(len(batch[0]))
    return CROSS_ENTROPY(model, (0.7 * batch[0] + 0.3 * batch[0][order], batch[1]))


class Adversarial(nn.Module):
    """A loss module with a memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(3))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.centre.lerp_(outputs.detach().mean(0), 0.1)
        return (outputs - self.centre).square().sum(1)


def renormalised() -> nn.Module:
    """Embedding that changes its weights for the tokens that occur: they say which did."""
    return nn.Sequential(nn.Embedding(7, 6, max_norm=0.5), nn.Flatten(), nn.Linear(30, 3))


def sorted_rows(inputs: Tensor) -> Tensor:
    return inputs.sort(0).values


NORM = r"1 \(BatchNorm\dd\)"
COUPLED: dict[str, Case] = {
    "batch norm 1d": Case(lambda: around(nn.BatchNorm1d(6)), CROSS_ENTROPY, FEATURES, NORM),
    "batch norm 1d without statistics": Case(
        lambda: around(nn.BatchNorm1d(6, track_running_stats=False)), CROSS_ENTROPY, FEATURES, NORM
    ),
    "batch norm in eval mode without statistics": Case(
        lambda: around(nn.BatchNorm1d(6, track_running_stats=False)).eval(), CROSS_ENTROPY, FEATURES, NORM
    ),
    "synchronised batch norm": Case(
        lambda: around(nn.SyncBatchNorm(6)), CROSS_ENTROPY, FEATURES, r"1 \(SyncBatchNorm\)"
    ),
    "ghost batch norm": Case(lambda: around(GhostBatchNorm()), CROSS_ENTROPY, FEATURES, r"1\.norm \(BatchNorm1d\)"),
    "ghost batch norm of pairs": Case(
        lambda: around(GhostBatchNorm(2)), CROSS_ENTROPY, FEATURES, r"1\.norm \(BatchNorm1d\)|1 \(GhostBatchNorm\)"
    ),
    "deviation in the batch": Case(
        lambda: around(MinibatchDeviation()), CROSS_ENTROPY, FEATURES, r"1 \(MinibatchDeviation\)"
    ),
    "batch norm 2d": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(True), nn.Flatten(), nn.Linear(144, 3)),
        CROSS_ENTROPY,
        IMAGES,
        NORM,
    ),
    "batch norm behind dropout": Case(
        lambda: nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.9), nn.BatchNorm1d(4), nn.Linear(4, 3)),
        CROSS_ENTROPY,
        FEATURES,
        r"2 \(BatchNorm1d\)",
    ),
    "batch norm behind a gate that starts at zero": Case(
        lambda: zero_last(around(nn.BatchNorm1d(6))), CROSS_ENTROPY, FEATURES, NORM
    ),
    "batch norm behind two gates that start at zero": Case(
        lambda: zero_last(nn.Sequential(*zero_last(around(nn.BatchNorm1d(6))), nn.Linear(3, 3))),
        CROSS_ENTROPY,
        FEATURES,
        NORM,
    ),
    "a little of the batch mean of what is finite": Case(
        lambda: around(Apply(lambda inputs: inputs - 1e-5 * inputs.nan_to_num(0).mean(0))),
        CROSS_ENTROPY,
        FEATURES,
        r"1 \(Apply\)",
    ),
    "subtracting the batch mean": Case(
        lambda: around(SubtractBatchMean()), CROSS_ENTROPY, FEATURES, r"1 \(SubtractBatchMean\)"
    ),
    "subtracting a little of the batch mean": Case(
        lambda: around(SubtractBatchMean(1e-3)), CROSS_ENTROPY, FEATURES, r"1 \(SubtractBatchMean\)"
    ),
    "subtracting next to nothing of the batch mean": Case(
        lambda: around(SubtractBatchMean(1e-9)), CROSS_ENTROPY, FEATURES, r"1 \(SubtractBatchMean\)"
    ),
    "between layers": Case(InOwnForward, CROSS_ENTROPY, FEATURES, r"the model's own forward \(InOwnForward\)"),
    "batch norm alone": Case(lambda: nn.BatchNorm1d(6), CROSS_ENTROPY, FEATURES, r"the model itself \(BatchNorm1d\)"),
    "attention across rows": Case(
        SequenceFirst, CROSS_ENTROPY, SEQUENCES, r"attention \((NonDynamicallyQuantizableLinear|MultiheadAttention)\)"
    ),
    "lstm across rows": Case(
        lambda: nn.Sequential(nn.LSTM(6, 6), Apply(lambda out: out[0].mean(1)), nn.Linear(6, 3)),
        CROSS_ENTROPY,
        SEQUENCES,
        r"0 \(LSTM\)",
    ),
    "sorting the rows": Case(lambda: around(Apply(sorted_rows)), CROSS_ENTROPY, FEATURES, r"1 \(Apply\)"),
    "rolling the rows": Case(
        lambda: around(Apply(lambda inputs: inputs.roll(1, 0))), CROSS_ENTROPY, FEATURES, r"1 \(Apply\)"
    ),
    "swapping pairs of rows": Case(
        lambda: around(Apply(lambda x: x.view(-1, 2, 6).flip(1).reshape(-1, 6) if len(x) > 1 else x)),
        CROSS_ENTROPY,
        FEATURES,
        r"1 \(Apply\)",
    ),
    "a running sum over the rows": Case(
        lambda: around(Apply(lambda inputs: inputs.cumsum(0))), CROSS_ENTROPY, FEATURES, r"1 \(Apply\)"
    ),
    "a scale by the largest value of the batch": Case(
        lambda: around(Apply(lambda inputs: inputs / inputs.detach().abs().max().clamp(min=50))),
        CROSS_ENTROPY,
        FEATURES,
        r"1 \(Apply\)",
    ),
    "normalised tokens": Case(
        lambda: nn.Sequential(nn.Embedding(9, 6), nn.Flatten(), nn.BatchNorm1d(30), nn.Linear(30, 3)),
        CROSS_ENTROPY,
        TOKENS,
        r"2 \(BatchNorm1d\)",
    ),
    "detached trick": Case(lambda: around(DetachedTrick()), CROSS_ENTROPY, FEATURES, r"1 \(DetachedTrick\)"),
    "coupled backward": Case(lambda: around(Apply(CoupledGradient.apply)), CROSS_ENTROPY, FEATURES, r"1 \(Apply\)"),
    "slightly coupled backward": Case(
        lambda: around(Apply(LittleCoupledGradient.apply)), CROSS_ENTROPY, FEATURES, r"1 \(Apply\)"
    ),
    "coupled backward of tokens": Case(
        lambda: nn.Sequential(nn.Embedding(9, 6), nn.Flatten(), Apply(CoupledGradient.apply), nn.Linear(30, 3)),
        CROSS_ENTROPY,
        TOKENS,
        r"2 \(Apply\)",
    ),
    "coupled gradient of a weight": Case(
        lambda: around(CoupledWeight()), CROSS_ENTROPY, FEATURES, r"1 \(CoupledWeight\)"
    ),
    "gradient divided by the size of the batch": Case(
        lambda: around(Apply(ByBatchSize.apply)), CROSS_ENTROPY, FEATURES, "loss function, or the model"
    ),
    "divided by the size of the batch inside": Case(
        lambda: around(Apply(lambda inputs: inputs / len(inputs))), CROSS_ENTROPY, FEATURES, r"1 \(Apply\)"
    ),
    "attention divided by the size of the batch": Case(
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0, batch_first=True),
            Apply(lambda inputs: inputs.mean(1) / len(inputs)),
            nn.Linear(6, 3),
        ),
        CROSS_ENTROPY,
        SEQUENCES,
        r"1 \(Apply\)",
    ),
    "position by row": Case(
        lambda: around(Apply(lambda x: x + torch.arange(float(len(x)))[:, None])),
        CROSS_ENTROPY,
        FEATURES,
        r"1 \(Apply\)",
    ),
    "contrastive loss": Case(lambda: nn.Linear(6, 4), info_nce, FEATURES, "^the loss function$"),
    "class-weighted mean": Case(lambda: nn.Linear(6, 3), class_weighted, FEATURES, "^the loss function$"),
    "divided by the size of the batch": Case(lambda: nn.Linear(6, 3), divided_by_size, FEATURES, "^the loss function$"),
    "divided by the size of the batch, with dropout": Case(
        lambda: around(nn.Dropout(0.5)), divided_by_size, FEATURES, "^the loss function$"
    ),
    "plain mean": Case(lambda: nn.Linear(6, 3), mean_for_all, FEATURES, "^the loss function$"),
    "ranking": Case(lambda: nn.Linear(6, 3), by_rank, FEATURES, "^the loss function$"),
    "mixup": Case(lambda: nn.Linear(6, 3), mixed_up, FEATURES, "^the loss function$"),
    "memory bank": Case(lambda: around(Bank()), CROSS_ENTROPY, FEATURES, r"1 \(Bank\)"),
    "largest value seen": Case(lambda: around(Watching()), CROSS_ENTROPY, FEATURES, r"1 \(Watching\)"),
    "number of records seen": Case(lambda: around(Counting()), CROSS_ENTROPY, FEATURES, r"1 \(Counting\)"),
    "sum in a plain attribute": Case(lambda: around(Accumulating()), CROSS_ENTROPY, FEATURES, r"1 \(Accumulating\)"),
    "queue in a plain list": Case(lambda: around(Queue()), CROSS_ENTROPY, FEATURES, r"1 \(Queue\)"),
    "embedding with max_norm": Case(renormalised, CROSS_ENTROPY, TOKENS, r"0 \(Embedding\)"),
    "loss module with a memory": Case(
        lambda: nn.Linear(6, 3), pg.supervised(Adversarial()), FEATURES, r"the loss function \(Adversarial\)"
    ),
    "instance norm with running statistics": Case(
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True), nn.Flatten(), nn.Linear(144, 3)
        ),
        CROSS_ENTROPY,
        IMAGES,
        r"1 \(InstanceNorm2d\)",
    ),
}


def zero_last(model: nn.Sequential) -> nn.Sequential:
    """As fine-tuning likes to start: the last layer gives zeros."""
    nn.init.zeros_(model[-1].weight)
    nn.init.zeros_(model[-1].bias)
    return model

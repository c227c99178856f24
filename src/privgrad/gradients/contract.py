"""What clipping needs of an engine, and an engine of clipping. Engines and mechanisms meet here and nowhere else.

An engine goes through the batch once. For each unit it has a vector in RELEASE SPACE: named slots, by default one per
trainable parameter. It gives the rule the norms of those vectors, block by block; the rule answers with weights of the
same shape; the engine adds the weighted sums into a sink, as soon as it has them.

    rows --loss, backward--> row gradients --fold--> unit gradients --encoding--> unit vectors --rule--> weighted sums --> sink
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from privgrad.errors import PrivgradError
from privgrad.gradients.norms import norms_of
from privgrad.gradients.products import weighted_product

Tree = Any
"""Any nesting of tuples, lists and dicts of tensors, each with the row as its first dimension."""

LossFn = Callable[[nn.Module, Tree], Tensor]
"""loss_fn(model, batch) -> losses [rows]: one loss per row, each of that row only (batch-of-one semantics)."""


@dataclass(frozen=True)
class Fold:
    """Which unit each row belongs to, and with which factor its gradient enters the unit's vector.

    index: [rows], the unit of each row, in 0..units-1, not decreasing (a unit's rows stand together).
    scale: [rows] or None (1): K views of one example have 1 / K each.
    units: how many units there are; a unit may be without rows (an empty group): it contributes nothing.
    """

    index: Tensor
    units: int
    scale: Tensor | None = None

    @staticmethod
    def identity(rows: int) -> Fold:
        """Every row is a unit."""
        return Fold(torch.arange(rows), rows)

    @cached_property
    def is_identity(self) -> bool:
        """True where rows are units, in order and unscaled."""
        rows = len(self.index)
        return self.scale is None and rows == self.units and bool((self.index == torch.arange(rows)).all())


class Need(IntEnum):
    """What of a parameter's unit gradients must exist at once. Engines may do more, never less."""

    NORMS = 0
    """Norms and weighted sums only: nothing need be materialised."""
    ROWS = 1
    """Some rows (first index) of the parameter only, or none: the others need never be computed. The slot has its name."""
    PLACES = 2
    """Some coordinates (of the flattened parameter) only, as a vector. The slot has its name."""
    COORDINATES = 3
    """Every coordinate of every unit's gradient: [units, *shape]."""


class Encoding(Protocol):
    """A linear map from a unit's gradient to its vector in release space: slots with names and shapes."""

    def slots(self) -> Mapping[str, torch.Size]:
        """The slots of release space, with their shapes."""
        ...

    def need(self, parameter: str) -> Need:
        """What the map needs of one parameter."""
        ...

    def places(self, parameter: str) -> Tensor | None:
        """The rows of a parameter with `Need.ROWS`, the coordinates of one with `Need.PLACES`, increasing; None for others."""
        ...

    def encode(self, gradients: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Unit gradients {parameter: [units, *shape]}, of some or all, to unit vectors {slot: [units, *slot shape]}."""
        ...

    def decode(self, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A sum in release space {slot: shape} back to parameter space {parameter: shape}."""
        ...


@dataclass(frozen=True)
class Identity:
    """Release space is parameter space."""

    shapes: Mapping[str, torch.Size]

    def slots(self) -> Mapping[str, torch.Size]:
        return self.shapes

    def need(self, parameter: str) -> Need:
        return Need.NORMS

    def places(self, parameter: str) -> Tensor | None:
        return None

    def encode(self, gradients: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return gradients

    def decode(self, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return sums


class Rule(Protocol):
    """How much of each unit's vector enters the sum."""

    separable: bool
    """True: each block is decided by its own norms, and may be asked for alone, inside the backward pass."""

    def __call__(self, norms: Tensor, blocks: Sequence[int]) -> Tensor:
        """Weights for norms [units, len(blocks)] of the named block columns, in the same shape.

        A weight of 0 means: this unit (and block) is left out by selection, never by multiplication (0 * NaN is NaN).
        A rule that is not separable is called once per unit, with every block. Each (unit, block) is asked for once.
        """
        ...


class Sink(Protocol):
    """Where weighted sums go."""

    def add(self, slot: str, value: Tensor) -> None:
        """Add `value` (the slot's shape) to the slot's sum."""
        ...

    def add_product(self, slot: str, left: Tensor, weights: Tensor, right: Tensor) -> None:
        """Add left^T diag(weights) right, of left [n, p], weights [n] and right [n, d]: as many numbers as the slot has."""
        ...


@dataclass(frozen=True)
class Joined:
    """Each unit's weighted vector is decoded by itself, scaled to an l2 norm of at most `radius`, its coordinates cut to +-cap.

    What is summed then has the model's parameters for slots. The encoding must want `Need.COORDINATES` of all of them.
    """

    radius: float
    cap: float | None


@dataclass(frozen=True)
class Request:
    """One batch's work for an engine.

    blocks: the slots of each block; together every slot once. caps: for each block, the largest absolute value that a coordinate
    of a unit's weighted vector may have in the sum, or None; empty: no caps at all. joined: the vectors are put together again
    before the sum.
    """

    batch: Tree
    fold: Fold
    encoding: Encoding
    blocks: Sequence[Sequence[str]]
    rule: Rule
    sink: Sink
    caps: Sequence[float | None] = ()
    joined: Joined | None = None

    def cap(self, column: int) -> float | None:
        """The cap of one block."""
        return self.caps[column] if self.caps else None


class Engine(Protocol):
    """Computes clipped sums.

    Contract: agrees with a loop of batch-of-one backward passes to 1e-5 relative (float32), and less closely only where norms are
    rounded upwards for what cancels (`norms.upwards`).
    """

    def accumulate(self, model: nn.Module, loss_fn: LossFn, request: Request) -> None:
        """Add the weighted sum over `request`'s units to its sink. Leaves `.grad` and every buffer as they were."""
        ...


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a private step may change, by name; tied ones once, frozen ones not at all."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def one_per_row(losses: Any, rows: int) -> Tensor:
    """`losses` as a loss function returned them, if they are one number per row; else refused in words."""
    if not isinstance(losses, Tensor) or losses.shape != (rows,):
        got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise PrivgradError(
            f"loss_fn returned {got} for {rows} row(s); expected one loss per row, shape ({rows},): "
            "use reduction='none' and average over everything but the first dimension"
        )
    return losses


class Sums:
    """A sum for each slot, in float32 or wider, that comes to exist with the first thing that is added to it.

    Memory then grows only as the backward pass goes down and lets go of what the forward pass saved. A slot to which nothing was
    added is zero.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], device: torch.device, dtype: torch.dtype) -> None:
        self._shapes = shapes
        self._device, self._dtype = device, dtype
        self._sums: dict[str, Tensor] = {}

    def add(self, slot: str, value: Tensor) -> None:
        """See `Sink.add`. A value of another shape would be broadcast, after it was clipped."""
        if value.shape != self._shapes[slot]:
            raise PrivgradError(
                f"a sum of shape {tuple(value.shape)} for {slot!r}; expected {tuple(self._shapes[slot])}"
            )
        if slot in self._sums:
            self._sums[slot] += value
        else:  # a copy: whose memory the value is, is not for a sink to know
            empty = torch.empty(self._shapes[slot], device=self._device, dtype=self._dtype)
            self._sums[slot] = empty.copy_(value.detach())

    def add_product(self, slot: str, left: Tensor, weights: Tensor, right: Tensor) -> None:
        """See `Sink.add_product`."""
        left, weights, right = (tensor.to(self._dtype) for tensor in (left, weights, right))
        total = self._sums.get(slot)
        if total is not None:
            total = total.view(left.shape[1], right.shape[1])
        self._sums[slot] = weighted_product(left, weights, right, total).view(self._shapes[slot])

    def at(self, slot: str) -> Tensor:
        """One slot's sum: the tensor itself."""
        if slot not in self._sums:
            self._sums[slot] = torch.zeros(self._shapes[slot], device=self._device, dtype=self._dtype)
        return self._sums[slot]

    @property
    def values(self) -> dict[str, Tensor]:
        """{slot: its sum}, in the slots' order: the tensors themselves."""
        return {slot: self.at(slot) for slot in self._shapes}


def most_needed(encoding: Encoding, parameters: Iterable[str]) -> Need:
    """What the encoding needs of the parameter of which it needs most; rows count as norms, since others come in other steps."""
    most = max(encoding.need(name) for name in parameters)
    return most if most > Need.ROWS else Need.NORMS


def masked(encoding: Encoding, parameters: Iterable[str]) -> set[str]:
    """The parameters of which the encoding wants nothing at all."""
    return {name for name in parameters if (places := encoding.places(name)) is not None and len(places) == 0}


def accumulation_dtype(model: nn.Module) -> torch.dtype:
    """float32, or float64 where the model has any: norms and sums are never kept in less."""
    wide = any(parameter.dtype == torch.float64 for parameter in model.parameters())
    return torch.float64 if wide else torch.float32


def add_weighted(request: Request, vectors: Mapping[str, Tensor]) -> None:
    """Clip materialised unit vectors {slot: [units, ...]} by the request's rule and add them to its sink.

    Units whose norm is not finite get the weight 0 from the rule and are selected out before they touch a sum.
    """
    flats = {slot: vector.reshape(len(vector), -1) for slot, vector in vectors.items()}
    lengths = {slot: norms_of(flat) for slot, flat in flats.items()}
    squares = [torch.stack([lengths[slot] for slot in slots]).double().square().sum(0) for slots in request.blocks]
    # Squares that leave the range of floats are infinite in every engine: weights of such units would have no digits.
    norms = torch.stack(squares, dim=1).to(next(iter(flats.values())).dtype).sqrt()
    weights = request.rule(norms, range(len(request.blocks)))
    weighted = {}
    for column, slots in enumerate(request.blocks):
        weight = weights[:, column]
        dropped = weight == 0
        for slot in slots:
            flat = flats[slot]
            if bool(dropped.any()):
                flat = torch.where(dropped[:, None], torch.zeros_like(flat), flat)
            if request.joined is not None:
                weighted[slot] = (weight[:, None] * flat).view_as(vectors[slot])
                continue
            total = weighted_sum(weight, flat, request.cap(column))
            request.sink.add(slot, total.view(vectors[slot].shape[1:]))
    if request.joined is not None:
        _add_joined(request.joined, request.encoding, weighted, request.sink)


def _add_joined(joined: Joined, encoding: Encoding, weighted: Mapping[str, Tensor], sink: Sink) -> None:
    decoded: Mapping[str, Tensor] = torch.func.vmap(encoding.decode)(dict(weighted))
    flats = {name: value.reshape(len(value), -1) for name, value in decoded.items()}
    norms = torch.stack([norms_of(flat) for flat in flats.values()]).norm(dim=0)
    scale = (joined.radius / norms).clamp_(max=1.0)
    for name, flat in flats.items():
        sink.add(name, weighted_sum(scale, flat, joined.cap).view(decoded[name].shape[1:]))


def weighted_sum(weights: Tensor, vectors: Tensor, cap: float | None) -> Tensor:
    """Sum of weights [units] times vectors [units, n]; with a cap, of their coordinates cut to +-cap after the weighting."""
    if cap is None:
        return weights @ vectors
    return (weights[:, None] * vectors).clamp_(-cap, cap).sum(0)

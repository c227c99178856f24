"""The stages of a step, as protocols: a mechanism is one small frozen dataclass that satisfies one of them.

What a stage remembers has one form, `init -> state`, `refresh(state, PublicView) -> state`, `update(state, Release) ->
state`, where a state is a flat dictionary of tensors that one generic checkpoint stores. A stage sees the world through
`PublicView` and `Release` only, so that a mask, a basis or a threshold that depends on private data cannot be written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from privgrad.gradients.contract import Encoding, Engine, Fold, LossFn, Sink, Tree
from privgrad.mechanism.randomness import Source
from privgrad.mechanism.states import ClippedSum, NoisedSum, Release
from privgrad.privacy.adjacency import Adjacency
from privgrad.privacy.events import Sampled
from privgrad.privacy.ledger import Receipt
from privgrad.privacy.sensitivity import Bound

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class PublicView:
    """Everything that a stage may look at between two steps. No private data is reachable from it.

    model: at the released weights. loss_fn: as given by the user. public: the public data set, or None.
    step: steps charged so far; steps: of the whole plan; epoch: round(1/q) of them. shapes: of the trainable parameters.
    generator: public randomness, the same for everyone who knows the plan. norms: of PUBLIC rows (a tree of tensors): [units,
    blocks], of the plan's kind of units, encoding and blocks. gradients: of PUBLIC rows: {parameter: [units, *shape]}, of the
    plan's kind of units.
    """

    model: nn.Module
    loss_fn: LossFn
    public: Any
    step: int
    steps: int
    epoch: int
    shapes: Mapping[str, torch.Size]
    generator: torch.Generator
    norms: Callable[[Tree], Tensor]
    gradients: Callable[[Tree], Mapping[str, Tensor]]


class Stage:
    """A stage without memory; the base of all others."""

    kind: ClassVar[str]
    """The stage's name in a configuration file."""
    needs_public: ClassVar[bool] = False
    """True: it cannot work without public data."""

    def init(self, shapes: Mapping[str, torch.Size]) -> State:
        """The first state, from the shapes of the trainable parameters."""
        return {}

    def refresh(self, state: State, view: PublicView) -> State:
        """The state for the coming step, from public things only."""
        return state

    def update(self, state: State, release: Release) -> State:
        """The state after a step, from what the step released."""
        return state

    @property
    def words(self) -> str:
        """What the stage does, for the certificate."""
        raise NotImplementedError(f"{type(self).__name__} must say in `words` what it does")


@runtime_checkable
class Sampling(Protocol):
    """Chooses the units of each step, from their number alone."""

    @property
    def sampled(self) -> Sampled | None:
        """The sampler as the accountant knows it, with its numbers; None until it knows how many units there are."""
        ...

    @property
    def normaliser(self) -> float | None:
        """The constant, fixed before training, by which the sum over units is divided; None until it is known."""
        ...

    def check(self, adjacency: Adjacency) -> None:
        """Refuse numbers that this adjacency keeps private."""
        ...

    def for_dataset(self, units: int, adjacency: Adjacency) -> Sampling:
        """The same sampler for a data set of so many units, where it needs their number; another number is refused."""
        ...

    def steps_in(self, epochs: float) -> int:
        """How many steps so many passes over the data are."""
        ...

    def charges(self, steps: int) -> int:
        """How many of the first `steps` steps cost an event; the others are covered by an earlier one (a shuffled epoch)."""
        ...

    def draw(self, units: int, step: int, source: Source) -> Tensor:
        """The indices of the units that take part in a step, increasing."""
        ...


@runtime_checkable
class Groups(Protocol):
    """Clips groups of units instead of units. It brings the engine that computes one vector per group."""

    @property
    def count(self) -> int:
        """m: how many groups, and the constant divisor."""
        ...

    def assign(self, fold: Fold, source: Source) -> Fold:
        """The fold of rows into groups. Each unit draws its group independently of all others."""
        ...

    def engine(self, apart: Callable[[], bool], rows: float | None) -> Engine:
        """Streams groups: one vector A(w, group) at a time. rows: expected of a batch, a public constant; None: not known."""
        ...


@runtime_checkable
class Compression(Protocol):
    """Chooses the release space of the coming step from public things."""

    def encoding(self, state: State, shapes: Mapping[str, torch.Size]) -> Encoding:
        """The linear map of the coming step, for trainable parameters of these shapes."""
        ...


@dataclass(frozen=True)
class Block:
    """Slots that are clipped together, to an l2 norm of at most max_norm where no thresholds stage says otherwise.

    max_coordinate: then each coordinate is cut to at most this absolute value; None: it is not.
    """

    name: str
    slots: Sequence[str]
    max_norm: float
    max_coordinate: float | None = None


@runtime_checkable
class Clipping(Protocol):
    """Bounds every unit's vector, block by block."""

    @property
    def separable(self) -> bool:
        """True: each block is decided by its own norms alone."""
        ...

    def partition(self, slots: Mapping[str, torch.Size]) -> Sequence[Block]:
        """The blocks; together every slot once."""
        ...

    def weights(self, norms: Tensor, thresholds: Tensor) -> Tensor:
        """Weights [units, blocks] with weight * norm <= threshold, for finite norms of the same shape."""
        ...


@runtime_checkable
class Thresholds(Protocol):
    """Gives the clipping norms of the coming step from its state, and may ask for a charged side release."""

    def values(self, state: State, max_norms: Tensor) -> Tensor:
        """[blocks] positive thresholds."""
        ...

    def side_bound(self, thresholds: Tensor) -> Bound | None:
        """The set in which one unit's [blocks] side contribution lies; None: there is no side release."""
        ...

    def side(self, state: State, norms: Tensor, thresholds: Tensor) -> Tensor:
        """[units, columns]: what each unit contributes to the side release. norms: of the same shape; thresholds: [columns]."""
        ...


@runtime_checkable
class Noise(Protocol):
    """Adds noise to a clipped sum."""

    @property
    def multiplier(self) -> float | None:
        """The joint z of everything that a step releases; None until calibrated."""
        ...

    @property
    def insecure_seed(self) -> int | Literal["secret"] | None:
        """The seed of reproducible noise, None for cryptographic noise, "secret" in a plan that was read back."""
        ...

    def add(self, sums: ClippedSum, receipt: Receipt, source: Source) -> NoisedSum:
        """Noise every part so that the joint noise multiplier is `multiplier`."""
        ...


@runtime_checkable
class Mixing(Protocol):
    """Makes the release the weights. It moves them itself: the optimizer gives the learning rate and nothing else."""

    @property
    def width_ratio(self) -> float | Literal["calibrate"]:
        """tau / eta: the width of the uniform in units of the mean gradient; "calibrate" until it is known."""
        ...

    def check(self, plan: Any) -> None:
        """Refuse a plan (`mechanism.plan.Plan`) that the accountant of mixing does not cover."""
        ...

    def mix(
        self,
        state: State,
        weights: Mapping[str, Tensor],
        update: Mapping[str, Tensor],
        rate: float,
        source: Source,
    ) -> tuple[Mapping[str, Tensor], State]:
        """New weights, and the state after them, from the released ones, the noised mean gradient and the learning rate."""
        ...


@runtime_checkable
class Statistics(Protocol):
    """Gives normalization layers the statistics of the coming step."""

    def final(self, state: State, view: PublicView) -> State:
        """The statistics at the weights of `view`, whatever the step: for a model that is looked at, or finished."""
        ...

    def install(self, model: nn.Module, state: State) -> None:
        """Put the state's statistics into the model's layers."""
        ...


@runtime_checkable
class ChargedStatistics(Statistics, Protocol):
    """Statistics from private records, by a side release that is charged with the step."""

    def side_bound(self) -> Bound:
        """The set in which one unit's side contribution lies."""
        ...

    def side_size(self, state: State, step: int) -> int:
        """How many numbers step 1, 2, ... sums for them; 0: that step has no such release."""
        ...

    def add_side(
        self,
        state: State,
        model: nn.Module,
        loss_fn: LossFn,
        batch: Tree,
        fold: Fold,
        sink: Sink,
        slot: str,
        *,
        grouped: bool,
    ) -> None:
        """PRIVATE. Add every unit's contribution to `slot` of the sink. grouped: units are groups, whose rows go together."""
        ...

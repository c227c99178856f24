"""Toy stages, one per place where the frame could crack. Paper-thin on purpose: the real ones come with their own issues."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from privgrad.gradients.contract import Fold, LossFn, Need, Request, trainable
from privgrad.mechanism.randomness import Source
from privgrad.mechanism.stage import Block, PublicView, Stage, State
from privgrad.mechanism.states import Consumer, Release
from privgrad.privacy.sensitivity import Bound


class Split:
    """g -> (B g, g - B^T B g): the embedding in a public basis, and the residual."""

    def __init__(self, basis: Tensor, shapes: Mapping[str, torch.Size]) -> None:
        self.basis = basis
        self.shapes = shapes

    def slots(self) -> Mapping[str, torch.Size]:
        return {"embedding": torch.Size([len(self.basis)]), "residual": torch.Size([self.basis.shape[1]])}

    def places(self, parameter: str) -> None:
        return None

    def need(self, parameter: str) -> Need:
        return Need.COORDINATES

    def encode(self, gradients: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        flat = torch.cat([value.flatten(1) for value in gradients.values()], dim=1)
        embedding = flat @ self.basis.T
        return {"embedding": embedding, "residual": flat - embedding @ self.basis}

    def decode(self, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        flat = sums["embedding"] @ self.basis + sums["residual"]
        sizes = [shape.numel() for shape in self.shapes.values()]
        parts = zip(self.shapes.items(), flat.split(sizes), strict=True)
        return {name: part.view(shape) for (name, shape), part in parts}


@dataclass(frozen=True)
class ToyEmbedding(Stage):
    """An orthonormal basis of PUBLIC per-example gradients at the released weights."""

    kind: ClassVar[str] = "toy_embedding"
    dimensions: int = 2

    def init(self, shapes: Mapping[str, torch.Size]) -> State:
        total = sum(shape.numel() for shape in shapes.values())
        return {"basis": torch.zeros(self.dimensions, total)}

    def refresh(self, state: State, view: PublicView) -> State:
        parameters = list(trainable(view.model).values())
        losses = view.loss_fn(view.model, view.public)
        gradients = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
        flat = torch.stack([torch.cat([part.flatten() for part in row]) for row in gradients])
        basis, _ = torch.linalg.qr(flat[: self.dimensions].T)
        return {"basis": basis.T.contiguous()}

    def encoding(self, state: State, shapes: Mapping[str, torch.Size]) -> Split:
        return Split(state["basis"], shapes)

    words: ClassVar[str] = "toy embedding"


@dataclass(frozen=True)
class BySlot(Stage):
    """Every slot its own block, each with its own norm. Separable."""

    kind: ClassVar[str] = "by_slot"
    max_norms: tuple[float, ...] = (1.0, 1.0)
    separable: ClassVar[bool] = True

    def partition(self, slots: Mapping[str, torch.Size]) -> Sequence[Block]:
        return [Block(slot, (slot,), norm) for slot, norm in zip(slots, self.max_norms, strict=True)]

    def weights(self, norms: Tensor, thresholds: Tensor) -> Tensor:
        return (thresholds / norms).clamp(max=1.0)

    words: ClassVar[str] = "toy clipping by slot"


@dataclass(frozen=True)
class NormStatistics(Stage):
    """A charged side release: each unit gives min(norm, limit) per block; thresholds follow the noised mean."""

    kind: ClassVar[str] = "norm_statistics"
    limit: float = 2.0

    def init(self, shapes: Mapping[str, torch.Size]) -> State:
        return {"mean": torch.ones(1)}

    def values(self, state: State, max_norms: Tensor) -> Tensor:
        return (max_norms * state["mean"].to(max_norms)).clamp(min=1e-3)

    def side_bound(self, thresholds: Tensor) -> Bound | None:
        return Bound.box(*[self.limit] * len(thresholds))

    def side(self, state: State, norms: Tensor, thresholds: Tensor) -> Tensor:
        return norms.clamp(max=self.limit)

    def update(self, state: State, release: Release) -> State:
        (noised,) = release.side[Consumer.THRESHOLDS].values()
        return {"mean": (noised / release.divisor).clamp(0.1, self.limit)}

    words: ClassVar[str] = "toy norm statistics"


@dataclass(frozen=True)
class MidpointMixing(Stage):
    """Makes the release the weights: a uniform point between the last two released weights, less the noised step."""

    kind: ClassVar[str] = "midpoint"
    width_ratio: ClassVar[float] = 0.0

    def check(self, plan: object) -> None:
        """Whatever it does is post-processing of the Gaussian."""

    def init(self, shapes: Mapping[str, torch.Size]) -> State:
        return {name: torch.zeros(shape) for name, shape in shapes.items()}

    def mix(
        self, state: State, weights: Mapping[str, Tensor], update: Mapping[str, Tensor], rate: float, source: Source
    ) -> tuple[Mapping[str, Tensor], State]:
        mixed = {}
        for name, now in weights.items():
            share = source.integers(now.numel(), 2**20).view(now.shape) / 2**20
            mixed[name] = state[name] + share * (now - state[name]) - rate * update[name]
        return mixed, state

    def update(self, state: State, release: Release) -> State:
        return {name: value.clone() for name, value in release.weights.items()}

    words: ClassVar[str] = "toy mixing"


@dataclass(frozen=True)
class ToyGroups(Stage):
    """Independent groups; the mean gradient of a group in one ordinary backward pass, streamed."""

    kind: ClassVar[str] = "toy_groups"
    count: int = 3

    def assign(self, fold: Fold, source: Source) -> Fold:
        chosen = source.integers(fold.units, self.count)
        return Fold(chosen[fold.index], self.count)

    def engine(self, apart: object, rows: float | None) -> StreamedGroups:
        return StreamedGroups()

    words: ClassVar[str] = "toy groups"


class StreamedGroups:
    """One backward per group: memory for one gradient only."""

    def accumulate(self, model: nn.Module, loss_fn: LossFn, request: Request) -> None:
        parameters = trainable(model)
        for group in range(request.fold.units):
            member = request.fold.index == group
            if not member.any():
                continue
            part = tuple(leaf[member] for leaf in request.batch)
            gradients = torch.autograd.grad(loss_fn(model, part).mean(), list(parameters.values()))
            vectors = request.encoding.encode({name: g[None] for name, g in zip(parameters, gradients, strict=True)})
            norms = torch.stack(
                [torch.sqrt(sum(vectors[s].square().sum() for s in slots)) for slots in request.blocks]
            )[None]
            weights = request.rule(norms, range(len(request.blocks)))
            for column, slots in enumerate(request.blocks):
                for slot in slots:
                    request.sink.add(slot, weights[0, column] * vectors[slot][0])


@dataclass(frozen=True)
class PublicMean(Stage):
    """A public forward inside the step: the mean of the layer's inputs over the public batch, at the step's weights."""

    kind: ClassVar[str] = "public_mean"

    def refresh(self, state: State, view: PublicView) -> State:
        with torch.no_grad():
            return {"mean": view.model.first(view.public[0]).mean(0)}

    def final(self, state: State, view: PublicView) -> State:
        return self.refresh(state, view)

    def install(self, model: nn.Module, state: State) -> None:
        model.center = state["mean"]

    words: ClassVar[str] = "toy public statistics"


class HookedEngine:
    """For stacks of bias-free Linear layers: calls a separable rule inside the backward pass, block by block."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []
        self.inside_backward = False

    def accumulate(self, model: nn.Module, loss_fn: LossFn, request: Request) -> None:
        assert request.rule.separable
        names = {module: f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        handles = []
        for module, slot in names.items():

            def caught(module: nn.Module, inputs: tuple[Tensor], output: Tensor, slot: str = slot) -> None:
                given = inputs[0].detach()

                def clip_and_free(gradient: Tensor) -> None:
                    column = next(i for i, slots in enumerate(request.blocks) if slot in slots)
                    norms = (gradient.norm(dim=1) * given.norm(dim=1))[:, None]
                    weights = request.rule(norms, (column,))
                    self.calls.append((column,))
                    request.sink.add(slot, (gradient * weights).T @ given)

                output.register_hook(clip_and_free)

            handles.append(module.register_forward_hook(caught))
        first = request.batch[0].clone().requires_grad_()
        losses = loss_fn(model, (first, *request.batch[1:]))
        for handle in handles:
            handle.remove()
        torch.autograd.grad(losses.sum(), first)

"""Gradient embedding: gradients as a short vector in a basis of public gradients, and what is left of them (arXiv:2102.12677)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from privgrad.errors import PrivgradError, check_count, nearest
from privgrad.gradients.contract import Encoding, Need, Tree
from privgrad.mechanism.layerwise import split
from privgrad.mechanism.stage import PublicView, Stage, State

BLOCKS = ("all", "tensor", "module")


@dataclass(frozen=True)
class GradientEmbedding(Stage):
    """g -> (e, r) = (B g, g - B^T e), with B [rank, d] an orthonormal basis of public gradients at the released weights.

    e and r are slots of one release, `embedding.BLOCK` and `residual.PARAMETER`, clipped as the plan clips: layerwise clipping
    with blocks = {embedding = ["embedding.*"], residual = ["residual.*"]} gives each a norm of its own. The update is B^T e + r.

    rank: directions for each block. anchors: so many public rows, drawn anew each time (all, where there are fewer), and of them
    groups where groups are clipped. every: so many steps a basis serves. iterations: of the power method. residual: without it
    only e is released, and the update stays in the basis. blocks: one basis for "all" parameters together, each "tensor" or
    each "module".

    joined: B^T e + r is put together for each unit after clipping, and what is summed and noised has the model's coordinates: one
    part, of radius C = sqrt(C_e^2 + C_r^2), whose coordinates the clipping may bound (p). Mixing needs this. The noise is then
    the same in the basis as outside of it.

    Costs what the vmap engine costs, whatever the engine: gradients are written out, and multiplied with every direction.

    Guarantee: costs no privacy. B sees public data and released weights only. What is clipped is e and r as they were computed,
    so that no bound rests on B being orthonormal. That the public data are public is the user's word.
    """

    kind: ClassVar[str] = "embedding"
    needs_public: ClassVar[bool] = True

    rank: int = 32
    anchors: int = 256
    every: int = 20
    iterations: int = 1
    residual: bool = True
    blocks: str = "all"
    joined: bool = False

    def __post_init__(self) -> None:
        for name in ("rank", "anchors", "every", "iterations"):
            check_count(f"compression.{name}", getattr(self, name))
        if self.rank > self.anchors:
            raise PrivgradError(
                f"compression.rank is {self.rank}, and {self.anchors} anchors span no more than {self.anchors} directions; "
                "expected at most as many, better several times fewer: lower rank, or raise anchors"
            )
        if not isinstance(self.residual, bool):
            raise PrivgradError(f"compression.residual is {self.residual!r}; expected true or false")
        if not isinstance(self.joined, bool):
            raise PrivgradError(f"compression.joined is {self.joined!r}; expected true or false")
        if self.blocks not in BLOCKS:
            raise PrivgradError(f"compression.blocks is {self.blocks!r}; {nearest(str(self.blocks), BLOCKS)}")

    def init(self, shapes: Mapping[str, torch.Size]) -> State:
        blocks = split(self.blocks, list(shapes))
        for block, names in blocks.items():
            size = sum(shapes[name].numel() for name in names)
            if self.rank > size:
                raise PrivgradError(
                    f"compression.rank is {self.rank}, and the block {block!r} has {size} coordinates; expected at most as many: "
                    "lower the rank, or take larger blocks (compression.blocks = 'all')"
                )
        return {block: torch.empty(0) for block in blocks}

    def refresh(self, state: State, view: PublicView) -> State:
        if view.step % self.every and all(basis.numel() for basis in state.values()):
            return state
        gradients = view.gradients(self._drawn(view.public, view.generator))
        bases = {}
        for block, names in split(self.blocks, list(view.shapes)).items():
            flat = torch.cat([gradients[name].reshape(len(gradients[name]), -1) for name in names], dim=1)
            # Where groups or gradients that are not finite leave fewer of them than directions, the rest are any.
            flat = flat[flat.isfinite().all(dim=1)]
            bases[block] = basis_of(flat, self.rank, self.iterations, view.generator)
        return bases

    def encoding(self, state: State, shapes: Mapping[str, torch.Size]) -> Encoding:
        return Embedded(shapes, split(self.blocks, list(shapes)), state, residual=self.residual)

    def _drawn(self, public: Tree, generator: torch.Generator) -> Tree:
        count = len(next(leaf for leaf in pytree.tree_leaves(public) if isinstance(leaf, Tensor)))
        if count < self.rank:
            raise PrivgradError(
                f"compression.rank is {self.rank}, and there are {count} public rows; expected at least as many: give more "
                "public data, or lower the rank"
            )
        chosen = torch.randperm(count, generator=generator)[: self.anchors].sort().values
        drawn: Tree = pytree.tree_map(
            lambda leaf: leaf[chosen.to(leaf.device)] if isinstance(leaf, Tensor) else leaf, public
        )
        return drawn

    @property
    def words(self) -> str:
        rest = "and what is left of it" if self.residual else "and nothing else of it"
        return (
            f"each contribution is written as {self.rank} numbers in a basis of public gradients {rest}; the basis is made anew "
            f"every {self.every} steps"
        )


def basis_of(gradients: Tensor, rank: int, iterations: int, generator: torch.Generator) -> Tensor:
    """[rank, d]: orthonormal rows that span nearly the top singular directions of `gradients` [units, d].

    Power iteration from a random start. Householder's QR gives orthonormal rows also where the gradients span fewer directions.
    """
    largest = gradients.abs().sum(0).max()
    scaled = gradients / largest if largest > 0 else gradients
    start = torch.randn(len(scaled), rank, generator=generator).to(scaled)
    basis: Tensor = torch.linalg.qr(scaled.T @ start).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(scaled.T @ (scaled @ basis)).Q
    return basis.T.contiguous()


class Embedded:
    """Release space: for each block its embedding [rank], for each parameter its residual (in its own shape)."""

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        blocks: Mapping[str, list[str]],
        bases: Mapping[str, Tensor],
        *,
        residual: bool,
    ) -> None:
        self._shapes, self._residual = shapes, residual
        self._parts: dict[str, dict[str, Tensor]] = {}
        for block, names in blocks.items():
            parts = torch.split(bases[block], [shapes[name].numel() for name in names], dim=1)
            self._parts[block] = dict(zip(names, parts, strict=True))
        self._ranks = {block: len(basis) for block, basis in bases.items()}

    def slots(self) -> Mapping[str, torch.Size]:
        embeddings = {f"embedding.{block}": torch.Size([rank]) for block, rank in self._ranks.items()}
        residuals = {f"residual.{name}": shape for name, shape in self._shapes.items()} if self._residual else {}
        return embeddings | residuals

    def need(self, parameter: str) -> Need:
        return Need.COORDINATES

    def places(self, parameter: str) -> Tensor | None:
        return None

    def encode(self, gradients: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        encoded = {}
        for block, parts in self._parts.items():
            given = {name: gradients[name].reshape(len(gradients[name]), -1) for name in parts}
            embedding = torch.stack([given[name] @ part.to(given[name]).T for name, part in parts.items()]).sum(0)
            encoded[f"embedding.{block}"] = embedding
            if self._residual:
                for name, part in parts.items():
                    left = torch.addmm(given[name], embedding, part.to(embedding), alpha=-1)
                    encoded[f"residual.{name}"] = left.view(gradients[name].shape)
        return encoded

    def decode(self, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        decoded = {}
        for block, parts in self._parts.items():
            embedding = sums[f"embedding.{block}"]
            for name, part in parts.items():
                found = (embedding @ part.to(embedding)).view(self._shapes[name])
                decoded[name] = found.add_(sums[f"residual.{name}"]) if self._residual else found
        return {name: decoded[name] for name in self._shapes}

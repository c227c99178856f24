"""Clipping block by block, and clipping without a threshold to tune."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import ClassVar

import torch
from torch import Tensor

from privgrad.errors import PrivgradError, check_number, nearest
from privgrad.mechanism.stage import Block, Stage

Blocks = str | Mapping[str, Sequence[str]]
"""How slots (parameters, by default) are grouped: "all" together, each "tensor" or each "module" by itself, or
{name: patterns} such as {features = ["conv*"], head = ["fc.*"]}."""
_NAMED = ("all", "tensor", "module")


@dataclass(frozen=True)
class LayerwiseClipping(Stage):
    """g_l * min(1, C_l / ||g_l||) for every block l of parameters (arXiv:2307.11939, arXiv:2212.01539).

    max_norm: C_l, one number for all blocks or one per block (in the order of the model's parameters, or of `blocks`).
    blocks: see `Blocks`. p: above 1, then every coordinate is cut to +-C / sqrt(p), with C^2 = sum of C_l^2.

    Guarantee: a unit's block l lies in the l2 ball of radius C_l. Blocks are parts of ONE release: z follows from all of them.
    """

    kind: ClassVar[str] = "layerwise"
    separable: ClassVar[bool] = True

    max_norm: float | tuple[float, ...] = 1.0
    blocks: Blocks = "tensor"
    p: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_norm", _norms(self.max_norm))
        object.__setattr__(self, "blocks", _checked(self.blocks))
        check_number("clipping.p", self.p, at_least=1)

    @property
    def radius(self) -> float | None:
        """C, where it is known without the model: the number of blocks must be."""
        if isinstance(self.max_norm, tuple):
            return math.hypot(*self.max_norm)
        return self.max_norm if self.blocks == "all" else None

    def partition(self, slots: Mapping[str, torch.Size]) -> Sequence[Block]:
        blocks = _blocks(split(self.blocks, list(slots)), self.max_norm)
        if self.p == 1:
            return blocks
        cap = math.hypot(*(block.max_norm for block in blocks)) / math.sqrt(self.p)
        return [replace(block, max_coordinate=cap) for block in blocks]

    def weights(self, norms: Tensor, thresholds: Tensor) -> Tensor:
        return (thresholds / norms).clamp_(max=1.0)

    @property
    def words(self) -> str:
        cut = (
            f", then each coordinate is cut to at most that of the whole over {math.sqrt(self.p):.4g}"
            if self.p > 1
            else ""
        )
        return f"each contribution is scaled down, {_each(self.blocks)}, to an l2 norm of at most {_shown(self.max_norm)}{cut}"


@dataclass(frozen=True)
class AutomaticClipping(Stage):
    """g * C / (||g|| + gamma): every contribution has nearly norm C, however small it was (arXiv:2206.07136, AUTO-S).

    max_norm: C. It scales update and noise alike, so that only its product with the learning rate matters. stability: gamma, in
    units of gradient norm. blocks: as for layerwise clipping; "all" is one norm for the whole gradient.

    Guarantee: a unit's block lies in the l2 ball of radius max_norm.
    """

    kind: ClassVar[str] = "automatic"

    max_norm: float | tuple[float, ...] = 1.0
    stability: float = 0.01
    blocks: Blocks = "all"

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_norm", _norms(self.max_norm))
        object.__setattr__(self, "blocks", _checked(self.blocks))
        # The square of a norm below 1e-23 is 0 in float32: divided by less than that, such a contribution would be unbounded.
        check_number("clipping.stability", self.stability, at_least=1e-12)

    @property
    def separable(self) -> bool:
        """Blocks are decided one by one, where there are several."""
        return self.blocks != "all"

    def partition(self, slots: Mapping[str, torch.Size]) -> Sequence[Block]:
        return _blocks(split(self.blocks, list(slots)), self.max_norm)

    def weights(self, norms: Tensor, thresholds: Tensor) -> Tensor:
        return thresholds / (norms + self.stability)

    @property
    def words(self) -> str:
        return f"each contribution is scaled, {_each(self.blocks)}, to an l2 norm of nearly and at most {_shown(self.max_norm)}"


def split(blocks: Blocks, slots: Sequence[str]) -> dict[str, list[str]]:
    """{block: its slots}, every slot once.

    Raises:
        PrivgradError: patterns that match nothing, or a slot that is in no block or in two.
    """
    if blocks == "all":
        return {"gradient": list(slots)}
    found: dict[str, list[str]] = {}
    if isinstance(blocks, str):
        for slot in slots:
            found.setdefault(slot if blocks == "tensor" else slot.rpartition(".")[0] or slot, []).append(slot)
        return found
    for name, patterns in blocks.items():
        found[name] = [slot for slot in slots if any(fnmatchcase(slot, pattern) for pattern in patterns)]
        if not found[name]:
            raise PrivgradError(
                f"clipping.blocks.{name} is {list(patterns)} and matches no parameter; "
                f"{nearest(str(patterns[0]) if patterns else name, slots)}"
            )
    placed = [slot for inside in found.values() for slot in inside]
    missing = [slot for slot in slots if slot not in placed]
    twice = sorted({slot for slot in placed if placed.count(slot) > 1})
    if missing or twice:
        raise PrivgradError(
            "clipping.blocks must have every parameter in exactly one block; "
            f"in none: {', '.join(missing) or '-'}; in several: {', '.join(twice) or '-'}"
        )
    return found


def _blocks(partition: Mapping[str, Sequence[str]], max_norm: float | tuple[float, ...]) -> list[Block]:
    norms = max_norm if isinstance(max_norm, tuple) else (max_norm,) * len(partition)
    if len(norms) != len(partition):
        raise PrivgradError(
            f"clipping.max_norm has {len(norms)} numbers, and there are {len(partition)} blocks "
            f"({', '.join(partition)}); expected one number, or one per block"
        )
    return [Block(name, tuple(slots), norm) for (name, slots), norm in zip(partition.items(), norms, strict=True)]


def _norms(value: object) -> float | tuple[float, ...]:
    if not isinstance(value, list | tuple):
        check_number("clipping.max_norm", value, above=0)
        return float(value)  # type: ignore[arg-type]
    for number in value:
        check_number("clipping.max_norm", number, above=0)
    if not value:
        raise PrivgradError("clipping.max_norm is []; expected a number, or one per block")
    return tuple(float(number) for number in value)


def _checked(blocks: object) -> Blocks:
    if isinstance(blocks, str):
        if blocks not in _NAMED:
            raise PrivgradError(f"clipping.blocks is {blocks!r}; {nearest(blocks, _NAMED)}")
        return blocks
    if not isinstance(blocks, Mapping) or not blocks:
        raise PrivgradError(
            f"clipping.blocks is {blocks!r}; expected 'all', 'tensor', 'module', or a table of names with patterns"
        )
    for name, patterns in blocks.items():
        if not isinstance(patterns, list | tuple) or not all(isinstance(pattern, str) for pattern in patterns):
            raise PrivgradError(
                f"clipping.blocks.{name} is {patterns!r}; expected a list of patterns, such as ['fc.*']"
            )
    return {str(name): list(patterns) for name, patterns in blocks.items()}


def _each(blocks: Blocks) -> str:
    if not isinstance(blocks, str):
        return f"in the blocks {', '.join(blocks)}"
    return {"all": "as a whole", "tensor": "tensor by tensor", "module": "module by module"}[blocks]


def _shown(norm: float | tuple[float, ...]) -> str:
    return (
        f"{norm:g}"
        if not isinstance(norm, tuple)
        else ", ".join(f"{number:g}" for number in norm) + " (in their order)"
    )

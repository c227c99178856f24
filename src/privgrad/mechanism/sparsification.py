"""Random sparsification: a public random part of the coordinates takes part in a step; the rest gets nothing, not even noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from privgrad.errors import PrivgradError, check_count, check_number, nearest
from privgrad.gradients.contract import Encoding, Need
from privgrad.mechanism.stage import PublicView, Stage, State

STRUCTURES = ("elements", "rows", "blocks", "layers")


@dataclass(frozen=True)
class RandomSparsification(Stage):
    """Masks a share of each parameter's coordinates, the same for all units, before clipping (arXiv:2112.00845).

    final_ratio: r*, the share that is masked in the end. ramp: the share rises from 0 in the first epoch to r* in the last,
    r(e) = r* min(e / max(E - 1, 1), 1), an epoch being round(1/q) steps; without it, it is r* from the start (which the paper
    finds to hurt). refreshes: masks per epoch. structure: "elements"; "rows" (first index of a parameter: output channels), whose
    masked part is never computed; "blocks" of `block` neighbouring rows; or "layers" (all parameters of a module), below the
    first of which no gradient is computed at all. At least one coordinate, row or block of each parameter is kept, or one layer.

    An optimizer with a state (momentum, Adam) goes on moving masked coordinates by its own rule.

    Guarantee: costs no privacy. The mask is drawn from public randomness that never sees data: the step releases the same
    Gaussian mechanism on fewer coordinates, with the same sensitivity.
    """

    kind: ClassVar[str] = "random_sparsification"

    final_ratio: float = 0.9
    ramp: bool = True
    refreshes: int = 1
    structure: str = "elements"
    block: int = 8

    def __post_init__(self) -> None:
        check_number("compression.final_ratio", self.final_ratio, at_least=0, below=1)
        if not isinstance(self.ramp, bool):
            raise PrivgradError(f"compression.ramp is {self.ramp!r}; expected true or false")
        check_count("compression.refreshes", self.refreshes)
        check_count("compression.block", self.block)
        if self.structure not in STRUCTURES:
            raise PrivgradError(
                f"compression.structure is {self.structure!r}; {nearest(str(self.structure), STRUCTURES)}"
            )

    def ratio(self, step: int, epoch: int, steps: int) -> float:
        """r at a step (from 0) of so many, with so many steps in an epoch."""
        epochs = -(-steps // epoch)
        return self.final_ratio * min(step // epoch / max(epochs - 1, 1), 1.0) if self.ramp else self.final_ratio

    def init(self, shapes: Mapping[str, torch.Size]) -> State:
        return {name: torch.arange(self._places(shape)) for name, shape in shapes.items()}

    def refresh(self, state: State, view: PublicView) -> State:
        if view.step % max(1, view.epoch // self.refreshes):
            return state
        ratio = self.ratio(view.step, view.epoch, view.steps)
        if self.structure == "layers":
            return self._layers(view.shapes, ratio, view.generator)
        return {name: self._drawn(shape, ratio, view.generator) for name, shape in view.shapes.items()}

    def encoding(self, state: State, shapes: Mapping[str, torch.Size]) -> Encoding:
        return Kept(shapes, state, by_rows=self.structure != "elements")

    def _places(self, shape: torch.Size) -> int:
        return shape.numel() if self.structure == "elements" or not shape else shape[0]

    def _drawn(self, shape: torch.Size, ratio: float, generator: torch.Generator) -> Tensor:
        """The kept places of one parameter, increasing."""
        places, together = self._places(shape), self.block if self.structure == "blocks" else 1
        drawn = _kept(-(-places // together), ratio, generator)
        if together == 1:
            return drawn
        rows = (drawn[:, None] * together + torch.arange(together)).flatten()
        return rows[rows < places]

    def _layers(self, shapes: Mapping[str, torch.Size], ratio: float, generator: torch.Generator) -> State:
        """All places of the parameters of kept layers, none of the others'."""
        layers = list(dict.fromkeys(map(_layer, shapes)))
        kept = {layers[place] for place in _kept(len(layers), ratio, generator).tolist()}
        return {name: torch.arange(self._places(shape) * (_layer(name) in kept)) for name, shape in shapes.items()}

    @property
    def words(self) -> str:
        rising = "a share that rises to" if self.ramp else "a share of"
        what = {
            "elements": "coordinates of each parameter",
            "rows": "rows of each parameter",
            "blocks": f"blocks of {self.block} rows of each parameter",
            "layers": "layers",
        }[self.structure]
        return f"{rising} {self.final_ratio:g} of the {what}, drawn at random, takes no part in a step"


def _layer(parameter: str) -> str:
    """The name of the module that a parameter belongs to."""
    return parameter.rpartition(".")[0]


def _kept(count: int, ratio: float, generator: torch.Generator) -> Tensor:
    """Which of so many are kept, increasing; at least one is."""
    kept = max(1, math.ceil((1 - ratio) * count - 1e-9))
    return torch.randperm(count, generator=generator)[:kept].sort().values


class Kept:
    """Release space: the kept coordinates of each parameter as a vector, or its kept rows (none, where its layer is masked).

    places: for each parameter the kept coordinates of the flattened tensor, or rows.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], places: Mapping[str, Tensor], *, by_rows: bool) -> None:
        self._shapes, self._places, self._by_rows = shapes, places, by_rows

    def slots(self) -> Mapping[str, torch.Size]:
        return {name: self._slot(name) for name in self._shapes}

    def need(self, parameter: str) -> Need:
        if self._whole(parameter):
            return Need.NORMS
        return Need.ROWS if self._rows_of(parameter) else Need.PLACES

    def places(self, parameter: str) -> Tensor | None:
        """The kept rows or coordinates of a parameter, unless all are."""
        return None if self._whole(parameter) else self._places[parameter]

    def encode(self, gradients: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        encoded = {}
        for name, gradient in gradients.items():
            places = self._places[name].to(gradient.device)
            spread = (
                gradient if self._rows_of(name) else gradient.flatten(1) if gradient.dim() > 1 else gradient[:, None]
            )
            encoded[name] = gradient if self._whole(name) else spread.index_select(1, places)
        return encoded

    def decode(self, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        decoded = {}
        for name, value in sums.items():
            shape = self._shapes[name]
            if self._whole(name):
                decoded[name] = value
                continue
            full = value.new_zeros(shape if self._rows_of(name) else torch.Size([shape.numel()]))
            decoded[name] = full.index_copy_(0, self._places[name].to(value.device), value).view(shape)
        return decoded

    def _rows_of(self, name: str) -> bool:
        return self._by_rows and len(self._shapes[name]) > 0

    def _whole(self, name: str) -> bool:
        shape = self._shapes[name]
        return len(self._places[name]) == (shape[0] if self._rows_of(name) else shape.numel())

    def _slot(self, name: str) -> torch.Size:
        shape = self._shapes[name]
        if self._whole(name):
            return shape
        kept = len(self._places[name])
        return torch.Size([kept, *shape[1:]]) if self._rows_of(name) else torch.Size([kept])

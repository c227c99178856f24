"""A model and its loss under a probe: run again and again from the same state and the same random numbers."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from privgrad.errors import PrivgradError
from privgrad.gradients.contract import LossFn, Tree, one_per_row, trainable
from privgrad.nn.draws import EqualDraws
from privgrad.nn.state import Slot, Snapshot, devices_of, foreign_draws, seed_all

ROWS = 4
"""Rows of a probe. (A power of two: layers that work on pairs or quarters of a batch can run.)"""


@dataclass(frozen=True)
class Draw:
    """The random numbers of a run. keep_all: dropout keeps everything."""

    seed: int
    keep_all: bool


@dataclass(frozen=True)
class Run:
    """One forward pass.

    inputs: the floating-point tensors that went in. changes: what the pass left in the modules. equal: every row drew the same
    numbers, so that the pass can be compared with one of another size.
    """

    losses: Tensor
    inputs: list[Tensor]
    changes: dict[Slot, Any]
    draws: EqualDraws
    equal: bool


class Subject:
    """Runs `loss_fn(model, batch)` on the model itself, inside a snapshot of its state."""

    def __init__(self, model: nn.Module, loss_fn: LossFn, modules: Mapping[str, nn.Module], snapshot: Snapshot) -> None:
        self.model, self.loss_fn, self.modules = model, loss_fn, modules
        self.hooked = {name: m for name, m in modules.items() if not isinstance(m, torch.jit.ScriptModule)}
        self.parameters = list(trainable(model).values())
        self.device = self.parameters[0].device
        self._devices = devices_of(modules)
        self._snapshot = snapshot
        self._awake = awakened(self.parameters)
        self.precision = max(torch.finfo(parameter.dtype).eps for parameter in self.parameters)
        """The machine epsilon of the coarsest type that was met."""
        self.generators: dict[int, weakref.ref[torch.Generator]] = {}
        """That operations were given, wherever they are held."""
        self._seeds: dict[int, set[int]] = {}

    def run(
        self,
        batch: Tree,
        draw: Draw,
        *,
        hooks: Callable[[], AbstractContextManager[Any]] = nullcontext,
        restore: bool = True,
    ) -> Run:
        """The losses of `batch`. restore=False goes on from the state that the run before left.

        Raises:
            PrivgradError: losses that are not one number per row. Whatever the model or the loss function raises.
        """
        if restore:
            self._snapshot.restore()
            with torch.no_grad():
                for parameter, value in self._awake:
                    parameter.copy_(value)
        seed_all(draw.seed, self._devices)
        leaves, structure = pytree.tree_flatten(batch)
        leaves = [leaf.detach().to(self.device) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        inputs = [leaf.requires_grad_() for leaf in leaves if isinstance(leaf, Tensor) and leaf.dtype.is_floating_point]
        # Clones: a model may change its input in place, which autograd forbids on a leaf.
        given = pytree.tree_unflatten([x.clone() if isinstance(x, Tensor) else x for x in leaves], structure)
        draws = EqualDraws(ROWS, self._devices, seed=draw.seed, keep_all=draw.keep_all)
        rows = next(len(leaf) for leaf in leaves if isinstance(leaf, Tensor))
        with torch.enable_grad(), draws.drawing(self.hooked), hooks(), _Given(self.generators):
            before = foreign_draws()
            losses = one_per_row(self.loss_fn(self.model, given), rows)
        self._seeds.setdefault(draw.seed, set()).update(draws.seeds)
        equal = draws.equal and foreign_draws() == before
        types = [kind for kind in draws.types if kind.is_floating_point]
        self.precision = max([self.precision, *(torch.finfo(kind).eps for kind in types)])
        return Run(losses, inputs, self._snapshot.changes(), draws, equal)

    def gradient(self, run: Run, row: int) -> tuple[Tensor, list[Tensor]]:
        """The gradient of one row's loss by all trainable parameters, flat, and by each input. Only before the next run.

        What is not finite counts as zero: the derivative of another row, infinite times zero, is no coupling.

        Raises:
            PrivgradError: a backward pass that fails.
        """
        wanted = [*self.parameters, *run.inputs]
        if run.losses.requires_grad:
            try:
                with run.draws.drawing(self.hooked):  # activation checkpointing draws again
                    found = torch.autograd.grad(
                        run.losses[row], wanted, retain_graph=True, allow_unused=True, materialize_grads=True
                    )
            except Exception as error:
                raise PrivgradError(f"no gradient can be taken of one record's loss: {reason(error)}") from error
        else:
            found = tuple(torch.zeros_like(tensor) for tensor in wanted)
        count = len(self.parameters)
        dense = [part.to_dense() if part.is_sparse else part for part in found[:count]]
        flat = torch.cat([part.flatten().to(self.device) for part in dense])
        return flat.nan_to_num(0, 0, 0), [part.nan_to_num(0, 0, 0) for part in found[count:]]

    @property
    def seeds_itself(self) -> bool:
        """Whether some draw was the same whatever the runs were seeded with: the model or the loss seeds torch's generator."""
        known = list(self._seeds.values())
        return len(known) > 1 and bool(set.intersection(*known))

    @property
    def same_shape(self) -> float:
        """The relative difference that rounding explains where the shapes are equal: for float32, 2.4e-5.

        Kernels repeat themselves bit by bit there, but an expert that gets other rows runs in another shape.
        """
        return float(self.precision ** (2 / 3))

    @property
    def other_shape(self) -> float:
        """The same between batches of different sizes: half of the digits. (On a GPU, products may be in TF32.)"""
        coarse = 2.0**-10 if self.device.type == "cuda" else 0.0
        return math.sqrt(max(self.precision, coarse))


class _Given(TorchFunctionMode):
    """Notes the generators that operations are given. (What is dispatched gets another object for the same generator.)"""

    def __init__(self, found: dict[int, weakref.ref[torch.Generator]]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in (*args, *(kwargs or {}).values()):
            if isinstance(value, torch.Generator):
                self._found[id(value)] = weakref.ref(value)
        return func(*args, **(kwargs or {}))


def awakened(parameters: Iterable[nn.Parameter]) -> list[tuple[nn.Parameter, Tensor]]:
    """Random values for trainable tensors that are all zero: a gate that starts at zero would hide what is behind it."""
    generator = torch.Generator().manual_seed(0)
    return [
        (p, torch.randn(p.shape, generator=generator).div(math.sqrt(max(1, p.numel() // len(p)))).to(p))
        for p in parameters
        if p.dim() and p.numel() and not bool(p.any())
    ]


def keep_row(others: Tree, batch: Tree, row: int) -> Tree:
    """`others` with one row of `batch`."""

    def mixed(other: Any, own: Any) -> Any:
        if not isinstance(own, Tensor):
            return own
        result = other.clone()
        result[row] = own[row]
        return result

    return pytree.tree_map(mixed, others, batch)


def only_row(batch: Tree, row: int) -> Tree:
    """A batch of one."""
    return pytree.tree_map(lambda leaf: leaf[row : row + 1] if isinstance(leaf, Tensor) else leaf, batch)


def scaled(batch: Tree, factor: float) -> Tree:
    """The batch with its floats multiplied (by NaN: made NaN)."""
    return pytree.tree_map(
        lambda leaf: leaf * factor if isinstance(leaf, Tensor) and leaf.dtype.is_floating_point else leaf, batch
    )


def zero_integers(batch: Tree) -> Tree:
    """The batch with its integers and booleans 0: of every vocabulary, a single entry occurs."""
    return pytree.tree_map(
        lambda leaf: leaf if not isinstance(leaf, Tensor) or leaf.dtype.is_floating_point else torch.zeros_like(leaf),
        batch,
    )


def differ(one: Tensor, other: Tensor, tolerance: float, scale: float | None = None) -> bool:
    """Whether two tensors differ by more than `tolerance` times `scale` (by default the largest value of both).

    A value that is finite in one of the tensors only is a difference; shapes that differ are one, too.
    """
    if one.shape != other.shape:
        return True
    if torch.equal(one, other):
        return False
    finite = one.isfinite()
    if not (one.is_floating_point() or one.is_complex()) or not torch.equal(finite, other.isfinite()):
        return True
    distance = largest_of([(one - other)[finite]])
    return distance > tolerance * (largest_of([one, other]) if scale is None else scale)


def largest_of(tensors: Iterable[Tensor]) -> float:
    """The largest finite absolute value."""
    values = (tensor.detach() for tensor in tensors)
    return max(
        (float(finite.abs().max()) for value in values if (finite := value[value.isfinite()]).numel()), default=0.0
    )


def reason(error: Exception) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__

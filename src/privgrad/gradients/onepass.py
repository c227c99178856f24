"""The one-pass engine: one forward and one backward pass over all rows, and no weight gradient that is not used.

    forward     under vmap over the rows, with parameters caught where they are used (`catching`): autograd is left with
                input gradients only
    backward    each caught use makes a term of its input and output gradient (`terms`); terms give norms (`collector`)
    sums        the rule answers with weights, and the weighted sums come from the same terms (book-keeping,
                arXiv:2210.00038)

Batch-of-one semantics is a precondition of every engine: a row's loss depends on that row alone. vmap enforces it, since
each row's forward sees that row alone. A model that asks what a value is, which vmap cannot answer, is tried on the way that
its authors made for torch.compile, too; what vmap cannot run is left to slower engines, which says so.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from privgrad.errors import PrivgradError, reason_of
from privgrad.gradients.batched import NotCoveredError, as_if_compiled
from privgrad.gradients.catching import Catching, Rule, uncovered
from privgrad.gradients.chunks import chunks
from privgrad.gradients.collector import Collector
from privgrad.gradients.contract import (
    Engine,
    Fold,
    Identity,
    LossFn,
    Need,
    Request,
    Tree,
    accumulation_dtype,
    masked,
    most_needed,
    trainable,
)
from privgrad.gradients.folding import Folding
from privgrad.gradients.loss import WithLoss, buffers_kept, nothing_in_grad
from privgrad.gradients.memory import Saved, Workspace, even, rows_of
from privgrad.gradients.rules import ALWAYS, RULES
from privgrad.gradients.streamed import StreamedEngine
from privgrad.gradients.vmap import VmapEngine


class OnePassEngine:
    """Per-unit gradients from (input, output gradient) pairs, chunk by chunk. An engine belongs to one model.

    memory: bytes for one chunk; None chooses (see `gradients.memory`). rules: for operators of your own (see `gradients.rules`).

    Guarantee: a gradient that an ordinary backward pass would give to a trainable parameter is in the norms and in the sums; or
    the batch goes to a slower engine (vmap, or one row after the other), with a warning that says why. Nothing lands in `.grad`.
    """

    def __init__(self, memory: int | None = None, *, rules: Mapping[Any, Rule] | None = None) -> None:
        self.memory = memory
        self.rules = {**RULES, **(rules or {})}
        self._rows_per_chunk: dict[tuple[Need, bool], int] = {}
        self._as_compiled = False
        self._slower: Engine | None = None
        self._workspace = Workspace()

    def accumulate(self, model: nn.Module, loss_fn: LossFn, request: Request) -> None:
        """See `contract.Engine.accumulate`."""
        if len(request.fold.index) == 0:
            return
        module, parameters = WithLoss(model, loss_fn), trainable(model)
        kind = (most_needed(request.encoding, parameters), request.fold.is_identity)
        if self._slower is None and kind not in self._rows_per_chunk:
            self._rows_per_chunk[kind] = self._try_one_unit(module, parameters, request)
        asleep = masked(request.encoding, parameters)
        awake = {name: parameter for name, parameter in parameters.items() if name not in asleep}
        count = len(request.fold.index)
        rows = count if self._slower is not None else even(count, self._rows_per_chunk[kind])
        for batch, fold in chunks(request.batch, request.fold, rows):
            part = replace(request, batch=batch, fold=fold)
            if self._slower is not None:
                self._slower.accumulate(model, loss_fn, part)
                continue
            try:
                with _frozen(parameters[name] for name in asleep):
                    self._one_pass(module, awake, part)
            except NotCoveredError as reason:
                if reason.late:
                    raise PrivgradError(
                        f"the one-pass engine cannot go on with this model, in the midst of a step: {reason}; let an autograd "
                        "function of your own return a new tensor (grad * factor, not grad.mul_(factor))"
                    ) from None
                self._slower = self._fall_back(module, part, str(reason))
                self._slower.accumulate(model, loss_fn, part)

    def multiplied_out(self, model: nn.Module, loss_fn: LossFn, request: Request, rows: int) -> float:
        """The share of a gradient that would have to exist for a unit of so many rows; infinite for a model not covered."""
        module, parameters = WithLoss(model, loss_fn), trainable(model)
        trial = replace(_trial(request, rows), rule=_Nobody(False))
        device = next(iter(parameters.values())).device
        try:
            with _unmoved_generators(device):
                most = self._one_pass(module, parameters, trial).most
        except torch.OutOfMemoryError:
            raise
        except (NotCoveredError, RuntimeError):
            return math.inf
        return most / (sum(p.numel() for p in parameters.values()) * accumulation_dtype(model).itemsize)

    def _one_pass(self, module: WithLoss, parameters: Mapping[str, nn.Parameter], request: Request) -> Collector:
        """One chunk. Raises NotCoveredError, before anything has reached the rule or the sink unless it says that it is late."""
        device = next(iter(parameters.values())).device
        dtype = accumulation_dtype(module.model)
        self._workspace.clear()
        folding = Folding.of(request.fold, device)
        collector = Collector(request, parameters, folding, dtype, self._workspace)
        losses = self._forward(module, collector, request.batch)
        left = uncovered(losses, parameters)
        if left is not None:
            raise NotCoveredError(f"{left[0]} is used by {left[1]}, where the engine does not see it")
        collector.start()
        if losses.requires_grad:
            with nothing_in_grad(parameters):
                torch.autograd.grad(losses.sum(), collector.anchor, allow_unused=True)
        collector.finish()
        return collector

    def _forward(self, module: WithLoss, collector: Collector, batch: Tree) -> Tensor:
        """Losses [rows], all rows at once, every row on its own."""

        def loss(row: Tree) -> Any:
            one = pytree.tree_map(lambda leaf: leaf.unsqueeze(0), row)
            catching = Catching(collector, self.rules, ALWAYS, pytree.tree_leaves(row)[0])
            try:
                with catching:
                    return module(one).squeeze(0)
            finally:
                catching.scope.close()

        way = as_if_compiled() if self._as_compiled else nullcontext()
        with buffers_kept(module), torch.enable_grad(), torch.compiler.set_stance("force_eager"), way:
            try:
                losses: Tensor = torch.func.vmap(loss, randomness="different")(batch)
            except (NotCoveredError, PrivgradError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # a model may raise anything; a slower engine meets what is its own fault
                # Its kind only: the words may be about records, and in the midst of a training this becomes a warning.
                raise NotCoveredError(f"its forward pass raises {type(error).__name__}") from error
        return losses

    def _try_one_unit(self, module: WithLoss, parameters: Mapping[str, nn.Parameter], request: Request) -> int:
        """Rows per chunk, from what a row saves and a unit keeps. Only sizes are looked at; they are the same for every row.

        Where units may have several rows, of two: what is a product of one row is often none of several.

        A model that this engine cannot take is noticed here, on both of its ways.
        """
        device = next(module.parameters()).device
        rows = 1 if request.fold.is_identity else 2
        trial = _trial(_unmasked(request, parameters), rows)
        reason = ""
        # The way for graphs is kept once it is taken: what is asked does not depend on the kind of request.
        for as_compiled in (True,) if self._as_compiled else (False, True):
            self._as_compiled = as_compiled
            saved = Saved(module)
            # torch.func.grad, where a model uses it, does not go together with counting.
            for counting in (saved.counting(), nullcontext()):
                try:
                    with _unmoved_generators(device), counting:
                        kept = self._one_pass(module, parameters, trial).most
                    if self._as_compiled:
                        self._check_way(module, parameters, request)
                    return rows_of(saved.bytes // rows, kept, self.memory, device)
                except torch.OutOfMemoryError:
                    raise
                except (NotCoveredError, RuntimeError) as error:
                    cause = error.__cause__  # a RuntimeError says what vmap cannot run
                    reason = reason or reason_of(cause if isinstance(cause, RuntimeError) else error)
        self._slower = self._fall_back(module, trial, reason)
        return 1

    def _check_way(self, module: WithLoss, parameters: Mapping[str, nn.Parameter], request: Request) -> None:
        """Refuse a way for graphs that leads elsewhere: norms of the first row, by parameter, without dropout, are compared.

        Half precision and other kernels differ by less than is allowed here; other mathematics differ by more.
        """
        with _unmoved_generators(next(module.parameters()).device), _evaluating(module):
            expected = _norms(StreamedEngine(), module, request)
            rule = _Nobody(separable=False)
            self._one_pass(module, parameters, replace(_by_parameter(request, parameters), rule=rule))
            found = torch.cat(rule.seen)
        floor = 0.01 * float(expected.nan_to_num().max())
        if not torch.allclose(found, expected, rtol=0.05, atol=floor, equal_nan=True):
            raise NotCoveredError("it computes something else while torch.compiler.is_compiling() is true")

    def _fall_back(self, module: WithLoss, request: Request, reason: str) -> Engine:
        """Choose the slower engine, and say so, once."""
        device = next(module.parameters()).device
        slower: Engine = StreamedEngine()
        with _unmoved_generators(device):
            expected = _norms(slower, module, request)
            try:
                # Parameters that the model holds outside of its modules are not swapped, and would be missed.
                if not bool(((_norms(VmapEngine(1), module, request) == 0) & (expected > 0)).any()):
                    slower = VmapEngine(self.memory)
            except (PrivgradError, RuntimeError):
                pass
        warnings.warn(
            f"the one-pass engine does not cover this model ({reason}); {type(slower).__name__} takes its place, with the "
            "same result, more slowly",
            stacklevel=3,
        )
        return slower


@contextmanager
def _frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Parameters without a gradient: autograd then goes no further down than the lowest of the others."""
    asleep = list(parameters)
    for parameter in asleep:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asleep:
            parameter.requires_grad_(True)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Modules in evaluation mode, each as it was before afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    for part, _ in modes:
        part.training = False
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def _unmoved_generators(device: torch.device) -> Iterator[None]:
    """A throw-away random state: looking at sizes must not move the user's generator."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def _norms(engine: Engine, module: WithLoss, request: Request) -> Tensor:
    """[parameters]: the norms that an engine finds for the first row, by parameter."""
    rule = _Nobody(separable=False)
    alone = replace(_by_parameter(request, trainable(module.model)), rule=rule)
    engine.accumulate(module.model, module.loss_fn, alone)
    return torch.cat(rule.seen)


def _by_parameter(request: Request, parameters: Mapping[str, nn.Parameter]) -> Request:
    """A unit of the first row alone, each parameter a block, for nobody."""
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    blocks = [(name,) for name in shapes]
    return replace(_trial(request), encoding=Identity(shapes), blocks=blocks, caps=(), joined=None)


def _trial(request: Request, rows: int = 1) -> Request:
    """A unit of the first row alone, so many times, for nobody: no weight, no sum."""
    batch = pytree.tree_map(lambda leaf: leaf[:1].expand(rows, *leaf.shape[1:]).clone(), request.batch)
    fold = Fold(torch.zeros(rows, dtype=torch.int64), 1)
    return replace(request, batch=batch, fold=fold, rule=_Nobody(request.rule.separable), sink=_Nowhere())


def _unmasked(request: Request, parameters: Mapping[str, nn.Parameter]) -> Request:
    """The request if all rows of all parameters took part: other ones do in other steps, and chunks are sized once."""
    if most_needed(request.encoding, parameters) > Need.ROWS:
        return request
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    return replace(request, encoding=Identity(shapes), joined=None)


class _Nobody:
    """A rule under which no unit contributes. seen: the norms it was asked about."""

    def __init__(self, separable: bool) -> None:
        self.separable = separable
        self.seen: list[Tensor] = []

    def __call__(self, norms: Tensor, blocks: Sequence[int]) -> Tensor:
        self.seen.append(norms)
        return torch.zeros_like(norms)


class _Nowhere:
    """A sink that keeps nothing."""

    def add(self, slot: str, value: Tensor) -> None:
        pass

    def add_product(self, slot: str, left: Tensor, weights: Tensor, right: Tensor) -> None:
        pass

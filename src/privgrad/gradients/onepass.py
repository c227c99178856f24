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
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from privgrad.errors import PrivgradError, reason_of
from privgrad.gradients.batched import Hidden, NotCoveredError, as_if_compiled
from privgrad.gradients.catching import Catching, Rule, uncovered
from privgrad.gradients.chunks import chunks
from privgrad.gradients.collector import Collector
from privgrad.gradients.contract import (
    Engine,
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
from privgrad.gradients.loss import WithLoss, hooked, nothing_in_grad, nothing_kept
from privgrad.gradients.memory import Saved, Workspace, even, rows_of
from privgrad.gradients.rules import ALWAYS, RULES
from privgrad.gradients.streamed import StreamedEngine
from privgrad.gradients.trial import (
    Nobody,
    by_parameter,
    evaluating,
    made_up_rows,
    norms_by_parameter,
    trial_of,
    unmasked,
    unmoved_generators,
)
from privgrad.gradients.vmap import VmapEngine

_OF_VMAP = ("vmap", "functorch", "torch.func", "Batching rule")
"""What torch's words name where they are about a transform, and so about the model."""


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
        # Whether the model has operators that torch functions do not lead to: None until it was tried.
        self._hidden: bool | None = None
        self._slower: Engine | None = None
        self._workspace = Workspace()

    def accumulate(self, model: nn.Module, loss_fn: LossFn, request: Request) -> None:
        """See `contract.Engine.accumulate`."""
        if len(request.fold.index) == 0:
            return
        module, parameters = WithLoss(model, loss_fn), trainable(model)
        hook = hooked(module, parameters)
        if hook is not None and self._slower is None:
            self._slower = self._fall_back(module, request, f"{hook} has a backward hook")
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
                self._slower = self._fall_back(module, part, str(reason), alone=reason.alone)
                self._slower.accumulate(model, loss_fn, part)

    def multiplied_out(self, model: nn.Module, loss_fn: LossFn, request: Request, rows: int) -> float:
        """The share of a gradient that would have to exist for a unit of so many rows; infinite for a model not covered."""
        module, parameters = WithLoss(model, loss_fn), trainable(model)
        if hooked(module, parameters) is not None:
            return math.inf
        asleep = masked(request.encoding, parameters)
        awake = {name: parameter for name, parameter in parameters.items() if name not in asleep}
        trial = replace(trial_of(request, rows), rule=Nobody(False))
        device = next(iter(parameters.values())).device
        try:
            with unmoved_generators(device), _frozen(parameters[name] for name in asleep):
                most = self._one_pass(module, awake, trial).most
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

        hidden = None if self._hidden is False else Hidden()

        def loss(row: Tree) -> Any:
            catching = Catching(collector, self.rules, ALWAYS, pytree.tree_leaves(row)[0], hidden)
            try:
                with catching:
                    result = module(pytree.tree_map(lambda leaf: leaf.unsqueeze(0), row)).squeeze(0)
            finally:
                catching.scope.close()
            if catching.operator is not None:
                raise NotCoveredError(
                    f"{catching.operator} raises an exception that its forward pass catches", alone=True
                )
            return result

        way = as_if_compiled() if self._as_compiled else nullcontext()
        with (
            nothing_kept(module),
            torch.enable_grad(),
            torch.compiler.set_stance("force_eager"),
            way,
            hidden or nullcontext(),
        ):
            try:
                losses: Tensor = torch.func.vmap(loss, randomness="different")(batch)
            except (NotCoveredError, PrivgradError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # a model may raise anything; a slower engine meets what is its own fault
                # Its kind only: the words may be about records, and in the midst of a training this becomes a warning.
                raise NotCoveredError(f"its forward pass raises {type(error).__name__}") from error
        if hidden is not None:
            self._hidden = hidden.met
        return losses

    def _try_one_unit(self, module: WithLoss, parameters: Mapping[str, nn.Parameter], request: Request) -> int:
        """Rows per chunk, from what a row saves and a unit keeps. Only sizes are looked at; they are the same for every row.

        Where units may have several rows, of two: what is a product of one row is often none of several.

        A model that this engine cannot take is noticed here, on both of its ways.
        """
        device = next(module.parameters()).device
        rows = 1 if request.fold.is_identity else 2
        trial = trial_of(unmasked(request, parameters), rows)
        reason, alone = "", False
        # The way for graphs is kept once it is taken: what is asked does not depend on the kind of request.
        for as_compiled in (True,) if self._as_compiled else (False, True):
            self._as_compiled = as_compiled
            saved = Saved(module)
            # torch.func.grad, where a model uses it, does not go together with counting.
            for counting in (saved.counting(), nullcontext()):
                try:
                    with unmoved_generators(device), counting:
                        kept = self._one_pass(module, parameters, trial).most
                    if self._as_compiled:
                        self._check_way(module, parameters, request)
                    return rows_of(saved.bytes // rows, kept, self.memory, device)
                except torch.OutOfMemoryError:
                    raise
                except (NotCoveredError, RuntimeError) as error:
                    reason = reason or _in_words(error)
                    alone = alone or (isinstance(error, NotCoveredError) and error.alone)
        self._slower = self._fall_back(module, trial, reason, alone=alone)
        return 1

    def _check_way(self, module: WithLoss, parameters: Mapping[str, nn.Parameter], request: Request) -> None:
        """Refuse a way for graphs that leads elsewhere: norms of a made-up row, by parameter, without dropout, are compared.

        Half precision and other kernels differ by less than is allowed here; other mathematics differ by more. A private row must
        not decide on which way all others go: it would move what they contribute.
        """
        with unmoved_generators(next(module.parameters()).device), evaluating(module):
            for made_up in made_up_rows(request):
                try:
                    expected = norms_by_parameter(StreamedEngine(), module, made_up)
                except torch.OutOfMemoryError:
                    raise
                except Exception:  # the model may raise anything at what is not its kind of data
                    continue
                if bool(expected.isfinite().all()) and bool((expected > 0).any()):
                    break
            else:
                raise NotCoveredError(
                    "it gives no gradient on made-up rows, on which its way for graphs would be checked"
                )
            rule = Nobody(separable=False)
            self._one_pass(module, parameters, replace(by_parameter(made_up, parameters), rule=rule))
            found = torch.cat(rule.seen)
        if not torch.allclose(found, expected, rtol=0.05, atol=0.01 * float(expected.max())):
            raise NotCoveredError("it computes something else while torch.compiler.is_compiling() is true")

    def _fall_back(self, module: WithLoss, request: Request, reason: str, *, alone: bool = False) -> Engine:
        """Choose the slower engine, and say so, once. alone: every row has to go through the model by itself."""
        slower: Engine = StreamedEngine()
        with unmoved_generators(next(module.parameters()).device):
            try:
                # Whether vmap can run it is a matter of the model and of shapes: under vmap nothing can ask for a row's values.
                if not alone:
                    norms_by_parameter(VmapEngine(1), module, request)
                    slower = VmapEngine(self.memory)
            except (PrivgradError, RuntimeError):
                pass
        warnings.warn(
            f"the one-pass engine does not cover this model ({reason}); {type(slower).__name__} takes its place, with the "
            "same result, more slowly",
            stacklevel=3,
        )
        return slower


def _in_words(error: Exception) -> str:
    """Why a model is not covered. What vmap says that it cannot run is quoted; any other words may be about the record."""
    cause = error.__cause__ or error
    if isinstance(cause, RuntimeError) and any(name in str(cause) for name in _OF_VMAP):
        return reason_of(cause)
    return str(error) if isinstance(error, NotCoveredError) else f"its backward pass raises {type(error).__name__}"


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

"""The one-pass engine: one forward and one backward pass over all rows, and no weight gradient that is not used.

    forward     under vmap over the rows, with parameters caught where they are used (`catching`): autograd is left with
                input gradients only
    backward    each caught use makes a term of its input and output gradient (`terms`); terms give norms (`collector`)
    sums        the rule answers with weights, and the weighted sums come from the same terms (book-keeping,
                arXiv:2210.00038)

Batch-of-one semantics is a precondition of every engine: a row's loss depends on that row alone. vmap enforces it, since
each row's forward sees that row alone; what vmap cannot run is left to slower engines, which says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from privgrad.gradients.catching import Catching, NotCoveredError, Rule, uncovered
from privgrad.gradients.chunks import chunks
from privgrad.gradients.collector import Collector
from privgrad.gradients.contract import Engine, Fold, LossFn, Request, Tree, accumulation_dtype, trainable
from privgrad.gradients.memory import Saved, even, rows_of
from privgrad.gradients.rules import ALWAYS, RULES
from privgrad.gradients.terms import Folding
from privgrad.gradients.vmap import VmapEngine, WithLoss


class OnePassEngine:
    """Per-unit gradients from (input, output gradient) pairs, chunk by chunk.

    memory: bytes for one chunk; None chooses (see `gradients.memory`). rules: for operators of your own (see `gradients.rules`).
    fallback: the engine for models that this one does not cover; None is the vmap engine.

    Guarantee: a gradient that an ordinary backward pass would give to a trainable parameter is in the norms and in the sums, or
    the whole batch goes to the fallback, with a warning that names the operator. Nothing lands in `.grad`.
    """

    def __init__(
        self,
        memory: int | None = None,
        *,
        rules: Mapping[Any, Rule] | None = None,
        fallback: Engine | None = None,
    ) -> None:
        self.memory = memory
        self.rules = {**RULES, **(rules or {})}
        self.fallback = VmapEngine(memory) if fallback is None else fallback
        self._rows_per_chunk: int | None = None
        self._falls_back = False

    def accumulate(self, model: nn.Module, loss_fn: LossFn, request: Request) -> None:
        """See `contract.Engine.accumulate`."""
        if len(request.fold.index) == 0:
            return
        module = WithLoss(model, loss_fn)
        parameters = trainable(model)
        if self._rows_per_chunk is None:
            self._rows_per_chunk = self._largest_chunk(module, parameters, request)
        rows = even(len(request.fold.index), self._rows_per_chunk)
        for batch, fold in chunks(request.batch, request.fold, rows):
            part = Request(batch, fold, request.encoding, request.blocks, request.rule, request.sink)
            if self._falls_back or self._one_pass(module, parameters, part) is None:
                self.fallback.accumulate(model, loss_fn, part)

    def _largest_chunk(self, module: WithLoss, parameters: Mapping[str, nn.Parameter], request: Request) -> int:
        """Rows per chunk, from what one row saves and keeps. Only sizes are looked at; they are the same for every row."""
        row = pytree.tree_map(lambda leaf: leaf[:1].clone(), request.batch)
        trial = Request(
            row, Fold.identity(1), request.encoding, request.blocks, _Nobody(request.rule.separable), _Nowhere()
        )
        device = next(iter(parameters.values())).device
        saved = Saved(module)
        # A throw-away random state: looking at sizes must not move the user's generator.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), saved.counting():
            kept = self._one_pass(module, parameters, trial)
        return 1 if kept is None else rows_of(saved.bytes, kept, self.memory, device)

    def _one_pass(self, module: WithLoss, parameters: Mapping[str, nn.Parameter], request: Request) -> int | None:
        """One chunk; the bytes of its gradients. None where the model is not covered: then nothing has reached the sink."""
        dtype = accumulation_dtype(module.model)
        device = next(iter(parameters.values())).device
        collector = Collector(request, parameters, Folding.of(request.fold, device), dtype)
        try:
            losses = self._forward(module, collector, request.batch)
        except torch.OutOfMemoryError:
            raise
        except (NotCoveredError, RuntimeError) as error:
            self._fall_back(str(error).strip().splitlines()[0])
            return None
        left = uncovered(losses, parameters)
        if left is not None:
            self._fall_back(f"{left[0]} is used by {left[1]}, out of its sight")
            return None
        collector.start()
        if losses.requires_grad:
            torch.autograd.grad(losses.sum(), collector.anchor, allow_unused=True)
        collector.finish()
        return collector.most

    def _forward(self, module: WithLoss, collector: Collector, batch: Tree) -> Tensor:
        """Losses [rows], all rows at once, every row on its own."""
        # Copies: what a forward pass writes into a buffer is forgotten.
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}

        def loss(row: Tree) -> Any:
            one = pytree.tree_map(lambda leaf: leaf.unsqueeze(0), row)
            with Catching(collector, self.rules, ALWAYS, pytree.tree_leaves(row)[0]):
                return torch.func.functional_call(module, buffers, (one,)).squeeze(0)

        with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            losses: Tensor = torch.func.vmap(loss, randomness="different")(batch)
        return losses

    def _fall_back(self, reason: str) -> None:
        if not self._falls_back:
            self._falls_back = True
            warnings.warn(
                f"the one-pass engine does not cover this model ({reason}); {type(self.fallback).__name__} takes its "
                "place, with the same result, more slowly",
                stacklevel=2,
            )


class _Nobody:
    """A rule under which no unit contributes."""

    def __init__(self, separable: bool) -> None:
        self.separable = separable

    def __call__(self, norms: Tensor, blocks: Sequence[int]) -> Tensor:
        return torch.zeros_like(norms)


class _Nowhere:
    """A sink that keeps nothing."""

    def add(self, slot: str, value: Tensor) -> None:
        pass

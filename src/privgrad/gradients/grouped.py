"""The mean gradient of each group of rows, in whichever of two ways costs less."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from privgrad.gradients.contract import Fold, LossFn, Need, Request, accumulation_dtype, most_needed, trainable
from privgrad.gradients.onepass import OnePassEngine
from privgrad.gradients.streamed import StreamedEngine

_WORTH_IT = 0.25
"""One pass is cheaper while no more than this share of a group's gradient has to be multiplied out: measured on CPUs."""


class MeanEngine:
    """A unit's vector is the gradient of the mean of its rows' losses.

    Where a row's loss depends on that row alone, the mean of losses is a scaled sum of rows, and one pass over all groups gives
    it: worth it for linear layers, whose gradients it never multiplies out. All else goes through the model group by group.

    apart: whether rows are alone with the model as it is now. rows: expected of a group; None: not known, and one pass is not
    tried. Neither may rest on private rows: the two ways agree no further than engines do.

    Guarantee: what a unit's vector is depends on its own rows, the weights and fresh randomness only, on either way.
    """

    def __init__(self, apart: Callable[[], bool], rows: float | None) -> None:
        self._apart = apart
        self._rows = rows
        self._one_pass = OnePassEngine()
        self._streamed = StreamedEngine(mean=True)
        self._worth_it: dict[Need, bool] = {}

    def accumulate(self, model: nn.Module, loss_fn: LossFn, request: Request) -> None:
        """See `contract.Engine.accumulate`. `request.fold.index` may be in any order."""
        if not self._apart():
            self._streamed.accumulate(model, loss_fn, request)
            return
        together = _in_order(request, accumulation_dtype(model))
        most = most_needed(request.encoding, trainable(model))
        if most not in self._worth_it and len(request.fold.index):
            self._worth_it[most] = self._tried(model, loss_fn, together)
        if self._worth_it.get(most):
            self._one_pass.accumulate(model, loss_fn, together)
        else:
            self._streamed.accumulate(model, loss_fn, request)

    def _tried(self, model: nn.Module, loss_fn: LossFn, request: Request) -> bool:
        """Whether groups of the expected size are worth it. Fewer rows have less multiplied out, and are cheaper to try."""
        if self._rows is None:
            return False
        average, rows = max(1, round(self._rows)), 1
        while self._one_pass.multiplied_out(model, loss_fn, request, rows) <= _WORTH_IT:
            if rows == average:
                return True
            rows = min(2 * rows, average)
        return False


def _in_order(request: Request, dtype: torch.dtype) -> Request:
    """The same request with each unit's rows together, without units that have none, and the mean as factors of rows."""
    order = request.fold.index.argsort(stable=True)
    _, index = torch.unique(request.fold.index[order], return_inverse=True)
    scale = request.fold.scale
    factors = torch.ones(len(order), dtype=dtype) if scale is None else scale[order].to(dtype)
    totals = torch.zeros(int(index[-1]) + 1 if len(index) else 0, dtype=dtype).index_add_(0, index, factors)

    def ordered(leaf: Tensor) -> Tensor:
        return leaf[order.to(leaf.device)]

    batch = pytree.tree_map(ordered, request.batch)
    return replace(request, batch=batch, fold=Fold(index, len(totals), factors / totals[index]))

"""The reference engine: `torch.func.vmap` of `torch.func.grad`, in micro-batches that fit a memory budget.

It covers every model that torch.func can batch, it cannot couple examples (each row's forward sees that row alone), and it
is the yardstick for faster engines.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from privgrad.errors import PrivgradError
from privgrad.gradients.batched import Hidden, Swallowed
from privgrad.gradients.catching import uncovered
from privgrad.gradients.chunks import chunks
from privgrad.gradients.contract import (
    Fold,
    LossFn,
    Request,
    Tree,
    accumulation_dtype,
    add_weighted,
    trainable,
)
from privgrad.gradients.loss import WithLoss, nothing_kept
from privgrad.gradients.memory import rows_within


class VmapEngine:
    """Materialises unit gradients chunk by chunk.

    memory: bytes for one chunk's gradients and activations; None chooses (see `gradients.memory`). It changes nothing in
    the mathematics: a unit's rows are never divided between chunks.
    """

    def __init__(self, memory: int | None = None) -> None:
        self.memory = memory
        self._rows_per_chunk: int | None = None

    def accumulate(self, model: nn.Module, loss_fn: LossFn, request: Request) -> None:
        """See `contract.Engine.accumulate`."""
        rows = len(request.fold.index)
        if rows == 0:
            return
        module = WithLoss(model, loss_fn)
        originals = trainable(model)
        for name, parameter in originals.items():
            if parameter._backward_hooks:
                raise PrivgradError(
                    f"the vmap engine passes by the backward hook of {name}; remove it, or use StreamedEngine"
                )
        parameters = {f"model.{name}": parameter.detach() for name, parameter in originals.items()}
        buffers = {f"model.{name}": buffer for name, buffer in model.named_buffers()}
        if self._rows_per_chunk is None:
            row = pytree.tree_map(lambda leaf: leaf[:1], request.batch)
            with nothing_kept(module):
                self._rows_per_chunk = rows_within(
                    self.memory, module, row, sum(p.numel() for p in parameters.values())
                )
        dtype = accumulation_dtype(model)
        for batch, fold in chunks(request.batch, request.fold, self._rows_per_chunk):
            row_gradients = _row_gradients(module, originals, parameters, buffers, batch)
            gradients = {
                name.removeprefix("model."): _fold_rows(gradient.to(dtype), fold)
                for name, gradient in row_gradients.items()
            }
            add_weighted(request, request.encoding.encode(gradients))


def _row_gradients(
    module: nn.Module,
    originals: Mapping[str, nn.Parameter],
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    batch: Tree,
) -> dict[str, Tensor]:
    """{parameter: [rows, *shape]}: each row through the model as a batch of one."""

    copies = {name: buffer.clone() for name, buffer in buffers.items()}

    def loss(values: dict[str, Tensor], row: Tree) -> Any:
        one = pytree.tree_map(lambda leaf: leaf.unsqueeze(0), row)
        return torch.func.functional_call(module, {**values, **copies}, (one,)).sum()

    per_row = torch.func.vmap(torch.func.grad_and_value(loss), in_dims=(None, 0), randomness="different")
    try:
        gradients: dict[str, Tensor]
        hidden = Hidden()
        with nothing_kept(module), hidden, Swallowed(hidden) as swallowed:
            gradients, losses = per_row(dict(parameters), batch)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise PrivgradError(
            f"the vmap engine cannot take per-example gradients of this model: {reason}. In-place changes of buffers "
            "(BatchNorm in train mode) and some fused operators (LSTM, GRU) are the usual cause"
        ) from error
    if swallowed.operator is not None:
        raise PrivgradError(
            f"the vmap engine cannot take per-example gradients of this model: {swallowed.operator} raises an exception for some "
            "row, and the model goes on with all of them in another way; use StreamedEngine"
        )
    # Of a model whose parameters are all swapped nothing is left that autograd knows.
    left = uncovered(losses, originals)
    if left is not None:
        raise PrivgradError(
            "the vmap engine cannot take per-example gradients of this model: it uses "
            f"{left[0]} outside of the module that holds it"
        )
    return gradients


def _fold_rows(gradient: Tensor, fold: Fold) -> Tensor:
    """[rows, *shape] to [units, *shape]: the scaled sum over each unit's rows."""
    if fold.is_identity:
        return gradient
    if fold.scale is not None:
        gradient = gradient * fold.scale.to(gradient).view(-1, *[1] * (gradient.dim() - 1))
    units = gradient.new_zeros(fold.units, *gradient.shape[1:])
    return units.index_add_(0, fold.index.to(gradient.device), gradient)

"""Ordinary backward passes, one unit after the other: memory for one gradient, any model that autograd takes.

With groups as units it is the engine of Batch Clipping (arXiv:2307.11939): all rows of a group go through the model together,
so that BatchNorm sees its own group, and no other. Otherwise it is a loop over batches of one: slow, always right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from privgrad.errors import PrivgradError, RefusedError
from privgrad.gradients.contract import Fold, LossFn, Request, Tree, accumulation_dtype, add_weighted, trainable
from privgrad.gradients.loss import WithLoss, nothing_in_grad, nothing_kept


class StreamedEngine:
    """A unit's vector is the scaled sum of its rows' gradients, each row alone with the model.

    mean: it is the gradient of the mean of its rows' losses instead, all rows taken together: their scaled sum, divided by the
    sum of their factors, which is the number of the unit's examples. local_steps (with `mean`): k > 0 makes it the
    weight change of k steps of SGD with rate `local_rate` on the unit's rows instead. A unit of one row that BatchNorm refuses
    (one value per channel) goes through twice.

    Guarantee: what a unit's vector is depends on its own rows, the weights and fresh randomness only: buffers are as they were
    for every unit, and after the last. A unit without rows contributes nothing; the rule is called once for each other one.
    """

    def __init__(self, *, mean: bool = False, local_steps: int = 0, local_rate: float = 0.0) -> None:
        self.mean = mean
        self.local_steps = local_steps
        self.local_rate = local_rate

    def accumulate(self, model: nn.Module, loss_fn: LossFn, request: Request) -> None:
        """See `contract.Engine.accumulate`. `request.fold.index` may be in any order."""
        module = WithLoss(model, loss_fn)
        parameters = trainable(model)
        dtype = accumulation_dtype(model)
        for unit in torch.unique(request.fold.index).tolist():
            rows = (request.fold.index == unit).nonzero().flatten()
            if len(rows) == 1 and self.mean and _has_batch_norm(model):
                rows = rows.repeat(2)
            # Rows together only where the mean of losses is asked for: a model that looks at its whole batch (attention asks
            # whether any row is padded) would otherwise take another way than with each row alone.
            vector: dict[str, Tensor] = {}
            for part in [rows] if self.mean else rows.split(1):
                for name, value in self._vector(module, parameters, request, part).items():
                    vector[name] = vector[name] + value if name in vector else value.to(dtype)
            vectors = request.encoding.encode({name: value[None] for name, value in vector.items()})
            add_weighted(replace(request, batch=None, fold=Fold.identity(1)), vectors)

    def _vector(
        self, module: WithLoss, parameters: Mapping[str, nn.Parameter], request: Request, rows: Tensor
    ) -> dict[str, Tensor]:
        if not self.local_steps:
            return self._gradients(module, parameters, request, rows)
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        try:
            for _ in range(self.local_steps):
                gradients = self._gradients(module, parameters, request, rows)
                with torch.no_grad():
                    for name, parameter in parameters.items():
                        parameter.sub_(gradients[name], alpha=self.local_rate)
            return {name: before[name] - parameter.detach() for name, parameter in parameters.items()}
        finally:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(before[name])

    def _gradients(
        self, module: WithLoss, parameters: Mapping[str, nn.Parameter], request: Request, rows: Tensor
    ) -> dict[str, Tensor]:
        device = next(iter(parameters.values())).device
        batch: Tree = pytree.tree_map(lambda leaf: leaf[rows.to(leaf.device)], request.batch)
        versions = [parameter._version for parameter in module.parameters()]
        with nothing_kept(module), torch.enable_grad():
            losses: Any = module(batch)
            factors = torch.ones_like(losses)
            if request.fold.scale is not None:
                factors = request.fold.scale[rows].to(device, losses.dtype)
            total = (losses * factors).sum()
            if self.mean:
                total = total / factors.sum()
        if versions != [parameter._version for parameter in module.parameters()]:
            raise RefusedError(
                "the model's forward pass changes its own parameters (nn.Embedding with max_norm does): they would be "
                "released un-noised; take the change out of forward"
            )
        if not total.requires_grad:
            return {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        try:
            with nothing_in_grad(parameters):
                gradients = torch.autograd.grad(
                    total, list(parameters.values()), allow_unused=True, materialize_grads=True
                )
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise PrivgradError(f"the model's gradient cannot be taken by torch.autograd.grad: {reason}") from error
        dense = (gradient.to_dense() if gradient.is_sparse else gradient for gradient in gradients)
        return dict(zip(parameters, dense, strict=True))


def _has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training for module in model.modules())

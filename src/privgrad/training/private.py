"""make_private: the user's own model, optimizer, data and loop, one private step at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset

from privgrad.errors import PrivgradError, RefusedError
from privgrad.gradients.contract import Engine, LossFn, Tree, trainable
from privgrad.gradients.onepass import OnePassEngine
from privgrad.mechanism.noise import SECRET
from privgrad.mechanism.plan import Plan
from privgrad.mechanism.states import Release
from privgrad.mechanism.step import Reduce, StepRunner
from privgrad.privacy.accounting import Precision
from privgrad.privacy.certificate import round_up
from privgrad.privacy.ledger import Ledger
from privgrad.training.batches import SampledBatch, sampled_batches, size_of


@dataclass(frozen=True)
class Spent:
    """What has been spent so far: (epsilon, delta)-DP after `steps` of `planned` charged steps."""

    epsilon: float
    delta: float
    steps: int
    planned: int

    def __str__(self) -> str:
        return f"epsilon = {round_up(self.epsilon, 3)} at delta = {self.delta:g} after {self.steps} of {self.planned} steps"


class Private:
    """A model in private training. Made by `make_private`; drives nothing by itself.

    Guarantee: everything that reaches `.grad`, the weights or the caller is a `Release` of the plan, charged to the ledger
    before. `batches` yields what the plan's sampler drew, and a batch that was drawn must be used.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        dataset: Dataset[Any],
        runner: StepRunner,
        collate_fn: Callable[[list[Any]], Tree] | None,
        workers: int,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.runner = runner
        self._dataset = dataset
        self._collate_fn = collate_fn
        self._workers = workers
        self._sampling = runner.source("sampling")
        self._parameters = trainable(model)
        self._pending: SampledBatch | None = None
        self._iterators = 0

    @property
    def plan(self) -> Plan:
        """The mechanism."""
        return self.runner.plan

    @property
    def ledger(self) -> Ledger:
        """What was charged."""
        return self.runner.ledger

    def batches(self) -> Iterator[SampledBatch]:
        """The batches of all steps that the plan has left; each goes to `step` or `backward` before the next is taken.

        Raises:
            PrivgradError: the caller skipped a batch. Leaving one out because of what is in it would not be accounted for.
        """
        self._iterators += 1
        current = self._iterators
        units = size_of(self._dataset)
        first = self.ledger.count + 1
        draws = (self.plan.sampling.draw(units, self._sampling.at(step)) for step in range(first, self.plan.steps + 1))
        pin = next(iter(self._parameters.values())).is_cuda
        for batch in sampled_batches(
            self._dataset, draws, collate_fn=self._collate_fn, workers=self._workers, pin_memory=pin
        ):
            if current != self._iterators:
                raise PrivgradError("batches() was asked for again since; go on with the newer iterator")
            if self._pending is not None and not self._pending.used:
                raise PrivgradError(
                    "a sampled batch was skipped; pass every batch to step() or backward(), also empty ones"
                )
            self._pending = batch
            yield batch

    def step(self, batch: SampledBatch) -> None:
        """One private step: clip, sum, charge, noise, and move the weights by the optimizer (or by mixing)."""
        release = self._release(batch)
        if release.weights is not None:
            with torch.no_grad():
                for name, value in release.weights.items():
                    self._parameters[name].copy_(value)
            return
        self._fill(release)
        self.optimizer.step()

    def backward(self, batch: SampledBatch) -> None:
        """Fill `.grad` with the release, where another loop owns the optimizer. Overwrites; there is nothing to zero.

        Raises:
            RefusedError: with mixing, whose release is the weights: the noised gradient alone would cost far more.
        """
        if self.plan.mixing is not None:
            raise RefusedError("backward() would give away the gradient before mixing; use step() with a mixing plan")
        self._fill(self._release(batch))

    def finalize(self) -> None:
        """Bring what depends on the weights (public statistics) up to date with the final ones."""
        self.runner.refresh()

    def spent(self, precision: Precision = Precision.FINE) -> Spent:
        """epsilon of everything charged so far, an upper bound."""
        record = self.ledger.record
        return Spent(record.spent(precision), self.plan.delta, record.count, self.plan.steps)

    def _release(self, batch: SampledBatch) -> Release:
        if batch is None or batch is not self._pending:
            raise PrivgradError(
                f"step() got {_described(batch)}; it takes the one that private.batches() gave last, whose sampling is accounted"
            )
        data, fold = batch.take()
        device = next(iter(self._parameters.values())).device
        data = pytree.tree_map(
            lambda leaf: leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf, data
        )
        charged = self.ledger.count
        try:
            return self.runner.release(data, fold, rate=float(self.optimizer.param_groups[0]["lr"]))
        except BaseException:
            # Which steps fail may depend on the records in them: the batch must be tried again, or the training ends.
            if self.ledger.count == charged:
                batch.give_back()
            raise

    def _fill(self, release: Release) -> None:
        update: Mapping[str, Tensor] = release.update or {}
        for name, parameter in self._parameters.items():
            parameter.grad = update[name].to(parameter.dtype)


def make_private(
    model: nn.Module,
    optimizer: Optimizer,
    dataset: Dataset[Any],
    plan: Plan,
    loss_fn: LossFn,
    *,
    public: Any = None,
    collate_fn: Callable[[list[Any]], Tree] | None = None,
    workers: int = 0,
    engine: Engine | None = None,
    ledger: Ledger | None = None,
    reduce: Reduce | None = None,
) -> Private:
    """Train `model` privately in your own loop. The model is neither wrapped nor renamed.

    loss_fn: loss_fn(model, batch) -> losses [rows]; `supervised(F.cross_entropy)` for (input, target) pairs.
    public: data that is not private, for stages that use some. collate_fn, workers: as for torch's DataLoader.
    engine: how per-example gradients are computed; None chooses. ledger: None keeps it in memory.
    reduce: sums a buffer over data-parallel workers.

    Raises:
        PrivgradError: a data set that does not fit the plan, an optimizer that needs a closure or holds other parameters.
        RefusedError: a model that couples examples, with the ways out.
    """
    plan = plan.for_dataset(size_of(dataset))
    check_private(model, optimizer, plan)
    chosen = OnePassEngine() if engine is None else engine
    ledger = Ledger(plan.terms()) if ledger is None else ledger
    runner = StepRunner(plan, model, loss_fn, chosen, ledger, public, reduce)
    return Private(model, optimizer, dataset, runner, collate_fn, workers)


def check_private(model: nn.Module, optimizer: Optimizer, plan: Plan) -> None:
    """Refuse what cannot be trained privately, before anything is written. See `make_private` for what is refused."""
    _check_optimizer(model, optimizer)
    if plan.groups is None:
        _check_coupling(model)
    if plan.noise.insecure_seed == SECRET:
        raise PrivgradError("the plan was stored without its seed; give noise.insecure_seed again to run it")


def _described(batch: object) -> str:
    return (
        "a batch of another plan, or an earlier one" if isinstance(batch, SampledBatch) else f"a {type(batch).__name__}"
    )


def _check_optimizer(model: nn.Module, optimizer: Optimizer) -> None:
    if isinstance(optimizer, torch.optim.LBFGS):
        raise RefusedError(
            "LBFGS calls the loss several times a step (a closure), each a release of its own; use SGD or Adam"
        )
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise RefusedError("SparseAdam needs sparse gradients, and a noised gradient is dense; use SGD or Adam")
    if not trainable(model):
        raise PrivgradError("the model has no trainable parameter; unfreeze at least one (requires_grad = True)")
    known = {id(parameter) for parameter in model.parameters()}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    foreign = sum(id(parameter) not in known for parameter in held)
    if foreign:
        raise PrivgradError(
            f"the optimizer holds {foreign} parameter(s) that are not the model's; build it from model.parameters()"
        )
    missing = [name for name, parameter in trainable(model).items() if all(parameter is not other for other in held)]
    if missing:
        raise PrivgradError(
            f"the optimizer does not hold {', '.join(missing)}; give it all trainable parameters, or freeze those "
            "(requires_grad = False)"
        )


def _check_coupling(model: nn.Module) -> None:
    names = [
        f"{name or 'the model itself'} ({type(module).__name__})"
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and (module.training or not module.track_running_stats)
    ]
    if names:
        raise RefusedError(
            f"{', '.join(names)}: in train mode an example's output depends on the others in its batch, so that clipping its "
            "gradient does not bound what it changes; use GroupNorm or LayerNorm, or freeze the layer with .eval() and given "
            "statistics"
        )

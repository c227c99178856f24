"""make_private: the user's own model, optimizer, data and loop, one private step at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset

from privgrad.errors import PrivgradError, RefusedError, VerificationError, check_count
from privgrad.gradients.contract import Engine, LossFn, Tree, trainable
from privgrad.gradients.onepass import OnePassEngine
from privgrad.mechanism.noise import SECRET
from privgrad.mechanism.plan import Plan
from privgrad.mechanism.randomness import Source
from privgrad.mechanism.stage import ChargedStatistics
from privgrad.mechanism.states import Release
from privgrad.mechanism.statistics import in_eval_mode
from privgrad.mechanism.step import Reduce, StepRunner
from privgrad.nn.coupling import CouplingGuard
from privgrad.nn.generators import Generator, check_foreign, generators_in, reseed
from privgrad.nn.probe import Probe, PublicProbe, SyntheticProbe
from privgrad.nn.state import same_randomness, seed_all
from privgrad.privacy.accounting import Precision
from privgrad.privacy.certificate import round_up
from privgrad.privacy.ledger import Ledger
from privgrad.training.batches import (
    Drawn,
    SampledBatch,
    check_apart,
    dicts_from,
    first_row,
    sampled_batches,
    with_dicts,
)
from privgrad.training.loss import check_loss
from privgrad.training.optimizers import check_optimizer, check_plain
from privgrad.training.padding import check_order, check_padding
from privgrad.training.processes import check_processes
from privgrad.training.public import public_rows
from privgrad.training.units import Keys, Units, Views, units_of


@dataclass(frozen=True)
class Spent:
    """What has been spent so far: (epsilon, delta)-DP after `steps` of `planned` charged steps."""

    epsilon: float
    delta: float
    steps: int
    planned: int

    def __str__(self) -> str:
        return f"epsilon = {round_up(self.epsilon, 3)} at delta = {self.delta!r} after {self.steps} of {self.planned} steps"


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
        coupling: CouplingGuard,
        collate_fn: Callable[[list[Any]], Tree] | None,
        workers: int,
        units: Units,
        reading: Sequence[Generator],
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.runner = runner
        self._dataset = dataset
        self._coupling = coupling
        self._collate_fn = collate_fn
        self._workers = workers
        self._units = units
        self._records = runner.source("records")
        self._loading, self._forward = runner.source("loading"), runner.source("forward")
        self._sampling = runner.source("sampling")
        self._parameters = trainable(model)
        self._pending: SampledBatch | None = None
        self._pending_step = 0
        self._reading = reading
        self._filled_at: list[int] | None = None
        self._iterators = 0

    @property
    def plan(self) -> Plan:
        """The mechanism."""
        return self.runner.plan

    @property
    def ledger(self) -> Ledger:
        """What was charged."""
        return self.runner.ledger

    def batches(self, steps: int | None = None) -> Iterator[SampledBatch]:
        """The batches of all steps that the plan has left; each goes to `step` or `backward` before the next is taken.

        steps: only those of the next so many, for a loop that looks at its model in between.

        Raises:
            PrivgradError: the caller skipped a batch. Leaving one out because of what is in it would not be accounted for. Or
                all batches were given before.
        """
        if steps is not None:
            check_count("batches(steps)", steps, at_least=1)
        if self._iterators and self.ledger.count >= self.plan.steps:
            raise PrivgradError(
                f"batches() has given the batches of all {self.plan.steps} steps of the plan, of every epoch; in a loop over "
                "epochs ask for batches(steps) of one epoch each"
            )
        return self._batches(steps)

    def _batches(self, steps: int | None) -> Iterator[SampledBatch]:
        self._iterators += 1
        current = self._iterators
        following = self.ledger.count + 1
        last = self.plan.steps if steps is None else min(self.ledger.count + steps, self.plan.steps)
        draws = (self._draw(step) for step in range(following, last + 1))
        pin = next(iter(self._parameters.values())).is_cuda
        batches = sampled_batches(
            self._dataset,
            draws,
            collate_fn=self._collate_fn,
            workers=self._workers,
            pin_memory=pin,
            seed=_seed(self._loading.at(0)),
            in_order=self._units.several_rows,
        )
        while True:
            with self._own_randomness(self._loading, self._reading):
                batch = next(batches, None)
            if batch is None:
                return
            if current != self._iterators:
                raise PrivgradError("batches() was asked for again since; go on with the newer iterator")
            if self._pending is not None and not self._pending.used:
                raise PrivgradError(
                    "a sampled batch was skipped; pass every batch to step() or backward(), also empty ones"
                )
            self._pending, self._pending_step = batch, following
            following += 1
            yield batch

    def _draw(self, step: int) -> Drawn:
        drawn = self.plan.sampling.draw(self._units.count, step, self._sampling.at(step))
        return self._units.rows(drawn, self._records.at(step))

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

        Every batch is a whole step of the plan: `optimizer.step()` follows each. Two calls between which the weights did not
        move are warned about: the first release would be lost, and stays charged.

        Raises:
            RefusedError: with mixing, whose release is the weights: the noised gradient alone would cost far more.
        """
        if self.plan.mixing is not None:
            raise RefusedError("backward() would give away the gradient before mixing; use step() with a mixing plan")
        if self._filled_at == self._versions():
            warnings.warn(
                "backward() was called twice, and the weights did not move in between: the first gradient is overwritten, and "
                "stays charged. Gradients are not added up over batches; call optimizer.step() after each backward(), and take "
                "larger batches in the plan (memory is no reason against it: the engine goes through a batch in chunks)",
                stacklevel=2,
            )
        self._fill(self._release(batch))
        self._filled_at = self._versions()

    @property
    def disclosed(self) -> dict[str, float]:
        """What the last step gives away without noise, because the plan names it (`disclose`); empty by default."""
        return dict(self.runner.disclosed)

    def finalize(self) -> None:
        """Bring what depends on the weights (public statistics) up to date with the ones that the model has now."""
        self.runner.finalize()

    def spent(self, precision: Precision = Precision.FINE) -> Spent:
        """epsilon of everything charged so far, an upper bound."""
        record = self.ledger.record
        return Spent(record.spent(precision), self.plan.delta, record.count, self.plan.steps)

    def state_dict(self) -> dict[str, Any]:
        """What the mechanism remembers between steps (thresholds, masks, mixing) and has seen of the ledger, for a checkpoint.

        Beside those of model and optimizer. Guarantee: made from releases alone.
        """
        return {
            "plan": self.plan.digest(),
            "stages": {name: dict(state) for name, state in self.runner.states.items()},
            "ledger": {"steps": self.ledger.count, "head": self.ledger.head},
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave. The ledger is the one that was resumed: what it has charged since stays charged.

        Raises:
            PrivgradError: the state of another plan.
            VerificationError: a ledger that has lost steps which the state has seen.
        """
        try:
            stages = {name: dict(state) for name, state in saved["stages"].items()}
            plan, steps, head = saved["plan"], int(saved["ledger"]["steps"]), saved["ledger"]["head"]
            if not all(isinstance(value, Tensor) for state in stages.values() for value in state.values()) or steps < 0:
                raise TypeError("a stage remembers tensors, and steps are counted")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PrivgradError("this is no state of a private training; expected what state_dict() gave") from error
        if plan != self.plan.digest() or stages.keys() != self.runner.states.keys():
            raise PrivgradError("this state is of another plan; resume with the one that started the training")
        if steps > self.ledger.count or (steps == self.ledger.count and head != self.ledger.head):
            raise VerificationError(
                f"the ledger holds {self.ledger.count} steps, and this state has seen {steps} of another or longer one; give "
                "make_private the training's own: ledger=Ledger.resume(terms, path)"
            )
        device = next(iter(self._parameters.values())).device
        self.runner.states = {
            name: {key: value.to(device) for key, value in state.items()} for name, state in stages.items()
        }

    def _release(self, batch: SampledBatch) -> Release:
        if batch is None or batch is not self._pending:
            raise PrivgradError(
                f"step() got {_described(batch)}; it takes the batch that private.batches() gave last, whose sampling is "
                "accounted for, and none from a DataLoader of your own"
            )
        if not batch.used and self.ledger.count + 1 != self._pending_step:
            # What a step is charged as goes by its number, and so does whom it drew.
            raise PrivgradError(
                f"this batch was drawn for step {self._pending_step}, and the ledger is at step {self.ledger.count + 1}: another "
                "training has charged it in between; give each training a ledger of its own"
            )
        data, fold = batch.take()
        device = next(iter(self._parameters.values())).device
        data = pytree.tree_map(
            lambda leaf: leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf, data
        )
        for parameter in self._parameters.values():
            parameter.grad = None  # the last release is done with: its memory is this step's
        charged = self.ledger.count
        try:
            # The model may be in other train and eval modes than it was.
            if self.plan.groups is None:
                self._coupling.check()
            else:
                self._coupling.check_memory()
            with self._own_randomness(self._forward, self._coupling.generators()):
                return self.runner.release(data, fold, rate=float(self.optimizer.param_groups[0]["lr"]))
        except BaseException:
            # Which steps fail may depend on the records in them: the batch must be tried again, or the training ends.
            if self.ledger.count == charged:
                batch.give_back()
            raise

    @contextmanager
    def _own_randomness(self, source: Source, generators: Sequence[Generator]) -> Iterator[None]:
        """Dropout and augmentation draw from a seed of this step, and leave the state of the process's generators as it was.

        How much is drawn follows the size of a private batch: from generators whose seed is known, one record more would change
        the masks of all others, and their state (in a checkpoint) would tell the size. So do `generators`, of somebody's code.
        """
        devices = sorted({parameter.device for parameter in self._parameters.values()}, key=str)
        with same_randomness(devices, generators):
            drawn = source.at(self.ledger.count + 1).integers(1 + len(generators), 2**53)
            seed_all(int(drawn[0]), devices)
            for generator, seed in zip(generators, drawn[1:].tolist(), strict=True):
                reseed(generator, seed)
            yield

    def _fill(self, release: Release) -> None:
        update: Mapping[str, Tensor] = release.update or {}
        for name, parameter in self._parameters.items():
            parameter.grad = update[name].to(parameter.dtype)

    def _versions(self) -> list[int]:
        """How often each weight was written to."""
        return [parameter._version for parameter in self._parameters.values()]


def _seed(source: Source) -> int:
    return int(source.integers(1, 2**53))


def make_private(
    model: nn.Module,
    optimizer: Optimizer,
    dataset: Dataset[Any],
    plan: Plan,
    loss_fn: LossFn,
    *,
    keys: Keys | None = None,
    public: Any = None,
    collate_fn: Callable[[list[Any]], Tree] | None = None,
    workers: int = 0,
    views: int = 1,
    engine: Engine | None = None,
    ledger: Ledger | Callable[[], Ledger] | None = None,
    reduce: Reduce | None = None,
    probe: Tree = None,
) -> Private:
    """Train `model` privately in your own loop. The model is neither wrapped nor renamed.

    loss_fn: loss_fn(model, batch) -> losses [rows]; `supervised(F.cross_entropy)` for (input, target) pairs.
    keys: whose record each row is, where the plan protects users. public: data that are not private, for stages that use some: a
    Dataset, or a batch.
    collate_fn, workers: as for torch's DataLoader. views: how often each sampled row is read, where the data set augments it; the
    mean of its views' gradients is clipped.
    engine: how per-example gradients are computed; None chooses. ledger: None keeps it in memory; a function is called, to
    open one, once everything is accepted. reduce: sums a buffer over data-parallel workers; refused with noise.
    probe: a small batch that is not private, as collate_fn gives them, on which model and loss are searched for coupling; None
    makes random records with the shapes of the data set's (see `privgrad.nn.find_coupling`).

    Raises:
        PrivgradError: a data set that does not fit the plan, an optimizer that needs a closure or holds other parameters, a loss
            that is not one finite number per row.
        RefusedError: a model in DistributedDataParallel or its like; a model, a loss or a collate_fn that couples examples, with
            the ways out; it may also come from the first step in other train and eval modes. (Where groups are clipped, examples
            of a group may couple in the model, but nothing may remember them.)
    """
    check_loss(loss_fn)
    check_processes(model)
    check_foreign(model, loss_fn)
    collate_fn = None if collate_fn is None else dicts_from(collate_fn)
    units = Views(units_of(dataset, plan.protects, keys), views)
    plan = plan.for_dataset(units.count)
    check_optimizer(model, optimizer)
    if plan.mixing is not None:
        check_plain(optimizer)
    if plan.noise.insecure_seed == SECRET:
        raise PrivgradError("the plan was stored without its seed; give noise.insecure_seed again to run it")
    plan.check_public(public is not None)
    reading = list(generators_in(dataset=dataset, collate_fn=collate_fn).values())
    with same_randomness([], reading):
        check_apart(dataset, collate_fn)
        if units.several_rows:
            check_order(dataset, collate_fn)
        check_padding(model, loss_fn, dataset, collate_fn)
        coupling = CouplingGuard(model, loss_fn, _probe(model, dataset, collate_fn, probe))
    shown = public_rows(public, dataset, collate_fn)
    if plan.groups is None:
        coupling.check()
    else:
        coupling.check_memory()
    if isinstance(plan.statistics, ChargedStatistics):
        with in_eval_mode(model):  # in which records are measured, one after the other where vmap cannot run the model
            coupling.check_memory()
    chosen = OnePassEngine() if engine is None else engine
    if ledger is None:
        ledger = Ledger(plan.terms())
    elif not isinstance(ledger, Ledger):
        ledger = ledger()
    if ledger.terms != plan.terms():
        raise PrivgradError(
            "the ledger was opened under other terms (plan, sampler, adjacency, accountant or delta) than the plan has for this "
            "data set; open it with plan.for_dataset(units).terms()"
        )
    runner = StepRunner(plan, model, loss_fn, chosen, ledger, shown, reduce, coupling.passes)
    return Private(model, optimizer, dataset, runner, coupling, collate_fn, workers, units, reading)


def _probe(
    model: nn.Module, dataset: Dataset[Any], collate_fn: Callable[[list[Any]], Tree] | None, public: Tree
) -> Probe:
    if public is not None:
        return PublicProbe(with_dicts(public))
    with same_randomness(sorted({p.device for p in model.parameters()}, key=str)):  # reading a record may augment it
        return SyntheticProbe.like(first_row(dataset, collate_fn))


def _described(batch: object) -> str:
    return (
        "a batch of another plan, or an earlier one" if isinstance(batch, SampledBatch) else f"a {type(batch).__name__}"
    )

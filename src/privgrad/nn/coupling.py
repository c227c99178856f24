"""Does one record's loss depend on the others of its batch? Found by changing the others, whatever a layer is called.

Clipping a record's gradient bounds what the record can change only if its loss depends on that record alone. Class names cannot
tell: a line of the user's own forward, a contrastive loss or a weighted mean couples records as BatchNorm does.
"""

from __future__ import annotations

import gc
import math
import warnings
import weakref

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from privgrad.errors import PrivgradError, RefusedError
from privgrad.gradients.contract import LossFn, trainable
from privgrad.gradients.loss import WithLoss
from privgrad.nn.finding import Finding, refuse_coupling, refuse_memory
from privgrad.nn.generators import generators_in
from privgrad.nn.inspection import Inspection, NotFiniteError
from privgrad.nn.probe import Probe
from privgrad.nn.state import named, undisturbed
from privgrad.nn.subject import ROWS, Draw, Subject, reason

_FIRST, _SECOND = Draw(seed=1, keep_all=True), Draw(seed=2, keep_all=False)
Met = dict[int, weakref.ref[torch.Generator]]
_LARGE = 1e3
"""Rows this much larger blow up a coupling that is small (a hundredth of the batch's mean, say); NaN passes through every sum."""


def find_coupling(model: nn.Module, loss_fn: LossFn, probe: Probe) -> list[Finding]:
    """The places in the model and its loss where one record of a batch depends on the others; an empty list where there is none.

    Runs `loss_fn(model, batch)` on batches of four rows, in the train or eval modes at hand. For each row the other rows are
    replaced, made a thousand times as large, or made NaN: the row's loss must not move, nor its gradient by the parameters,
    nor may it have a gradient by other rows. Loss and gradient must be the same in a batch of one. No parameter, buffer or
    accumulating attribute may take up values or numbers of records. Random draws are the same in all runs, and dropout keeps
    everything in most of them.

    Parameters, buffers, attributes, `.grad`, modes and random states are afterwards what they were before.

    Guarantee: none by itself; it is a test, not a proof. A coupling that shows only in larger batches, at other values, in other
    modes or after some training passes. Where torch cannot be made to draw row by row (fused attention with dropout), the
    comparison with a batch of one is left out.

    Raises:
        PrivgradError: a loss that is not one finite number per row, cannot run on the probe or on one row, or reaches no
            trainable parameter; parameters that are not finite.
        RefusedError: losses that differ from run to run although all random numbers are the same, or random numbers that are the
            same whatever torch's generator was seeded with.
    """
    found, _ = _coupling(model, loss_fn, probe)
    return found


def _coupling(model: nn.Module, loss_fn: LossFn, probe: Probe) -> tuple[list[Finding], Met]:
    _check_parameters(model)
    modules = named(model, loss_fn)
    with warnings.catch_warnings(), undisturbed(modules) as snapshot:
        warnings.simplefilter("ignore")  # NaN and large rows are no news to the user
        subject = Subject(model, loss_fn, modules, snapshot)
        form, first = _first_inspection(subject, probe)
        found = first.thoroughly(_LARGE) or _inspection(subject, form, _SECOND).quickly(math.nan)
        if subject.seeds_itself:
            raise RefusedError(
                "the model or the loss seeds torch's generator in its forward pass: a record more would shift known draws of all "
                "that come after it; leave the seed to privgrad, or draw once, when the model is made"
            )
        return found, subject.generators


def find_memory(model: nn.Module, loss_fn: LossFn, probe: Probe) -> list[Finding]:
    """What model and loss would remember of one group of records when the next one comes, or when the model is stored.

    For plans that clip groups, whose records may couple. Buffers are left out where engines put them back after each group
    (`gradients.loss.nothing_kept`): not those of scripted modules, nor of modules that only the loss function holds.

    Guarantee, errors: as `find_coupling`.
    """
    found, _ = _memory(model, loss_fn, probe)
    return found


def _memory(model: nn.Module, loss_fn: LossFn, probe: Probe) -> tuple[list[Finding], Met]:
    _check_parameters(model)
    modules = named(model, loss_fn)
    reached = {
        module for module in WithLoss(model, loss_fn).modules() if not isinstance(module, torch.jit.ScriptModule)
    }
    put_back = {(name, buffer) for name, module in modules.items() if module in reached for buffer in module._buffers}
    with warnings.catch_warnings(), undisturbed(modules) as snapshot:
        warnings.simplefilter("ignore")
        subject = Subject(model, loss_fn, modules, snapshot)
        _, first = _first_inspection(subject, probe)
        first.thoroughly(_LARGE)
        return first.remembered(put_back), subject.generators


class CouplingGuard:
    """Refuses coupling, once for every combination of train and eval modes in which the model is met."""

    def __init__(self, model: nn.Module, loss_fn: LossFn, probe: Probe) -> None:
        self._model, self._loss_fn, self._probe = model, loss_fn, probe
        self._modules = list(named(model, loss_fn).values())
        self._answers: dict[tuple[bool, ...], bool] = {}
        self._forgetting: set[tuple[bool, ...]] = set()
        self._generators: dict[int, torch.Generator] = {}

    def passes(self) -> bool:
        """True where `check` finds nothing: rows are alone. Kept for every combination of modes, whatever the answer."""
        modes = self._modes()
        if modes not in self._answers:
            try:
                self._answers[modes] = not find_coupling(self._model, self._loss_fn, self._probe)
            except PrivgradError:
                self._answers[modes] = False
        return self._answers[modes]

    def check(self) -> None:
        """Probe the model if its modes were never seen.

        Raises:
            PrivgradError, RefusedError: as `find_coupling`, and for whatever it finds.
        """
        modes = self._modes()
        if not self._answers.get(modes, False):
            found, met = _coupling(self._model, self._loss_fn, self._probe)
            refuse_coupling(found)
            self._take(met)
            self._answers[modes] = True

    def check_memory(self) -> None:
        """Refuse what would go from group to group, or from measured record to record, if the model's modes were never seen.

        Raises:
            PrivgradError, RefusedError: as `find_memory`, and for whatever it finds.
        """
        modes = self._modes()
        if modes not in self._forgetting:
            found, met = _memory(self._model, self._loss_fn, self._probe)
            refuse_memory(found)
            self._take(met)
            self._forgetting.add(modes)

    def generators(self) -> list[torch.Generator]:
        """The random generators of torch that model and loss held when they were checked, or gave to an operation then."""
        return list(self._generators.values())

    def _take(self, met: Met) -> None:
        if met:
            gc.collect()
        for reference in met.values():
            generator = reference()
            if generator is None:
                raise RefusedError(
                    "the model or the loss makes a torch.Generator in its forward pass: a record more would shift known draws of "
                    "all that come after it; make it once and keep it (it is seeded secretly in each step), or draw without one"
                )
            self._generators[id(generator)] = generator
        for held in generators_in(model=self._model, loss_fn=self._loss_fn).values():
            if isinstance(held, torch.Generator):
                self._generators[id(held)] = held

    def _modes(self) -> tuple[bool, ...]:
        return tuple(module.training for module in self._modules)


def _first_inspection(subject: Subject, probe: Probe) -> tuple[Probe, Inspection]:
    """The first form of the probe on which the loss runs and is finite, with the first run."""
    problems: list[PrivgradError] = []
    for form in probe.forms():
        try:
            return form, _inspection(subject, form, _FIRST)
        except UnsuitableError as error:
            problems.append(error)
    raise problems[0]


class UnsuitableError(PrivgradError):
    """The loss cannot run on a probe, or is not finite there."""


def _inspection(subject: Subject, form: Probe, draw: Draw) -> Inspection:
    try:
        return Inspection(subject, draw, form.pair(ROWS, torch.Generator().manual_seed(draw.seed)))
    except NotFiniteError as error:
        problem = str(error)
    except PrivgradError:
        raise
    except Exception as error:
        problem = reason(error) + (" (loss_fn is called with (model, batch))" if isinstance(error, TypeError) else "")
    raise UnsuitableError(f"the model and its loss cannot be probed on {form.words}: {problem}; {form.advice}")


def _check_parameters(model: nn.Module) -> None:
    if not trainable(model):
        raise PrivgradError("the model has no trainable parameter; unfreeze at least one (requires_grad = True)")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise PrivgradError(f"{name} has no shape yet (a lazy layer); run the model once on a public batch first")
        if not bool(parameter.isfinite().all()):
            raise PrivgradError(f"{name} holds values that are not finite (NaN or infinity); initialise the model anew")

"""Trainer: a whole private run, with progress, checkpoints, resume and a certificate."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import Dataset

from privgrad.errors import PrivgradError, command
from privgrad.files import read_json, write_atomically
from privgrad.gradients.contract import Engine, LossFn, Tree
from privgrad.mechanism.plan import Plan
from privgrad.nn.public_norm import without_statistics
from privgrad.privacy.accounting import Precision
from privgrad.privacy.certificate import Evaluation, round_up
from privgrad.privacy.ledger import Ledger
from privgrad.training.averaging import AveragedWeights, ExponentialAverage
from privgrad.training.checkpoint import load_tree, load_weights, save_tree, save_weights
from privgrad.training.disclosing import training_metrics
from privgrad.training.evaluation import DeclaredSplit, accuracy, check_split
from privgrad.training.metrics import Metrics
from privgrad.training.private import make_private
from privgrad.training.progress import ProgressDisplay, display
from privgrad.training.ration import Ration
from privgrad.training.run import Run, plan_text
from privgrad.training.stops import InterruptedRunError, stop_requests
from privgrad.training.units import Keys, units_of

_CHECKPOINT_SHARE = 0.05
"""The share of the time that checkpoints may take: a small model gets one after nearly every step."""
_EPSILON_SHARE = 0.02
"""The share that epsilon for the display may take (about half a second a time)."""


@dataclass(frozen=True)
class Result:
    """What a finished run reached. test_accuracy is None where there was no split to evaluate on."""

    epsilon: float
    delta: float
    steps: int
    noise_multiplier: float
    test_accuracy: float | None
    run: Path


class Trainer:
    """Trains `model` by `plan` and leaves a run directory with a certificate.

    schedule: a learning-rate scheduler, stepped once per step. averaging: evaluate and keep averaged weights. test: a declared
    split. evaluations: how often it is looked at. data_name: what the certificate calls the data. See `make_private` for the
    others. config: text for config.toml in the run directory.

    A run can be stopped at any moment and resumed; steps that a crash lost stay charged, and count among the plan's steps.

    Guarantee: that of the plan, for everything in the run directory. Metrics are of the declared split only.
    """

    _ledger: Ledger | None = None

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        dataset: Dataset[Any],
        plan: Plan,
        loss_fn: LossFn,
        *,
        directory: Path | str,
        test: DeclaredSplit | None = None,
        schedule: LRScheduler | None = None,
        keys: Keys | None = None,
        public: Any = None,
        collate_fn: Callable[[list[Any]], Tree] | None = None,
        workers: int = 0,
        views: int = 1,
        engine: Engine | None = None,
        averaging: ExponentialAverage | None = None,
        evaluations: int = 10,
        data_name: str = "a data set given in Python",
        config: str | None = None,
        resume: bool = False,
        quiet: bool = False,
        probe: Tree = None,
    ) -> None:
        if test is not None:
            check_split(test, dataset)
        if averaging is not None and not isinstance(averaging, ExponentialAverage):
            raise PrivgradError(f"averaging is {averaging!r}; expected ExponentialAverage(decay=0.95), or None")
        keys = keys if keys is None or isinstance(keys, Tensor) else list(keys)  # read more than once
        self.plan = plan.for_dataset(units_of(dataset, plan.protects, keys).count)
        if isinstance(schedule, ReduceLROnPlateau):
            raise PrivgradError(
                "ReduceLROnPlateau follows a loss, which stays private; use a schedule that follows the step"
            )
        untouched = without_statistics(model) if self.plan.statistics is None else []
        if self.plan.groups is not None and untouched:
            raise PrivgradError(
                f"{', '.join(untouched)} would have no statistics at inference: private training never updates them; add "
                "plan.statistics = { kind = 'public_batch' } and public data, or { kind = 'private' } (charged), or use "
                "nn.convert(model, to='test_batch')"
            )
        self.run = Run(Path(directory))
        self.model, self.optimizer, self.schedule, self.test = model, optimizer, schedule, test
        self._data_name, self._quiet, self._config = data_name, quiet, config
        self._every = max(1, self.plan.steps // max(1, evaluations))
        self._training_metrics = partial(training_metrics, self.plan.disclose, model, loss_fn, dataset, collate_fn)
        self._applied = 0
        self._whole = -1
        self._metrics = Metrics(self.run.metrics)
        self._average = None if averaging is None else AveragedWeights(model, averaging)
        try:
            self.private = make_private(
                model,
                optimizer,
                dataset,
                self.plan,
                loss_fn,
                keys=keys,
                public=public,
                collate_fn=collate_fn,
                workers=workers,
                views=views,
                engine=engine,
                ledger=lambda: self._open_ledger(resume),  # after all checks: a run that is refused writes nothing
                probe=probe,
            )
            self._complete = resume and self.run.complete
            if resume:
                self._go_on()
            else:
                self._save()
        except BaseException:
            if self._ledger is not None:
                if not resume:
                    self._ledger.abandon()
                self._ledger.close()
            raise

    def fit(self) -> Result:
        """Run the steps that are left, then write model and certificate. A run that has them already is left as it is.

        Raises:
            InterruptedRunError: Ctrl-C (after the step at hand, with a checkpoint; a second one stops at once).
        """
        bar = display(quiet=self._quiet)
        ledger = self.private.ledger
        bar.start(ledger.count, self.plan.steps)
        try:
            if self._complete:
                return self._earlier()
            with stop_requests() as stop:
                try:
                    self._loop(bar, stop)
                except Exception:
                    self._save_whole_steps()
                    raise
            if self._metrics.last < ledger.count:
                self._measure()  # a crash took the last look, or the last step itself
            self._save()
            if self._average is not None:
                self._average.copy_to_model()
            self.private.finalize()
            return self._finish()
        finally:
            bar.stop()
            ledger.abandon()  # closes it; one without a step, so that the directory is free again

    def _loop(self, bar: ProgressDisplay, stop: threading.Event) -> None:
        ledger = self.private.ledger
        saving, telling = Ration(_CHECKPOINT_SHARE), Ration(_EPSILON_SHARE)
        epsilon = measured = ""
        self._whole = ledger.count
        for batch in self.private.batches():
            self.private.step(batch)
            self._applied += 1
            if self.schedule is not None:
                self.schedule.step()
            if self._average is not None:
                self._average.update(self._applied)
            look = ledger.count % self._every == 0 or ledger.count == self.plan.steps
            if look or telling.due:
                with telling.turn():
                    epsilon = f"epsilon {round_up(ledger.record.spent(Precision.COARSE), 2)} at step {ledger.count}"
            if look:
                measured = self._measure()
            self._whole = ledger.count
            bar.step(ledger.count, "  ".join(filter(None, (epsilon, measured))))
            if stop.is_set() or saving.due:
                with saving.turn():
                    self._save()
            if stop.is_set() and ledger.count < self.plan.steps:
                raise InterruptedRunError(
                    f"stopped after step {ledger.count} of {self.plan.steps}, nothing is lost; go on with: "
                    f"{command()} train --resume --out {self.run.directory}"
                )

    def _measure(self) -> str:
        """One line of metrics.jsonl; its accuracy in words for the display."""
        if not all(bool(parameter.isfinite().all()) for parameter in self.model.parameters()):
            raise PrivgradError(
                f"the weights are not finite any more after step {self.private.ledger.count}; the learning rate is too high for "
                "this model and noise. The steps so far stay charged"
            )
        epsilon = self.private.ledger.record.spent(Precision.COARSE)
        entry: dict[str, Any] = {
            "step": self.private.ledger.count,
            "epsilon": epsilon if epsilon < float("inf") else None,
        }
        words = ""
        if self.test is not None:
            with nullcontext() if self._average is None else self._average.applied():
                self.private.finalize()
                entry["test_accuracy"] = accuracy(self.model, self.test)
            words = f"{self.test.name} accuracy {entry['test_accuracy']:.1%} at step {self.private.ledger.count}"
        if self.plan.disclose:
            with nullcontext() if self._average is None else self._average.applied():
                self.private.finalize()
                entry["disclosed"] = self.private.disclosed | self._training_metrics()
        self._metrics.add(entry)
        return words

    def _open_ledger(self, resume: bool) -> Ledger:
        terms = self.plan.terms()
        if resume:
            self.run.check_plan(self.plan.to_json())
            self._ledger = Ledger.resume(terms, self.run.ledger)
        else:
            self.run.create()
            self._ledger = Ledger(terms, self.run.ledger, self._write_plan)
        return self._ledger

    def _write_plan(self) -> None:
        """Before the ledger's first line: a directory in which a run has begun always says which plan it is of."""
        self.run.clear()
        if self._config is not None:
            # Of a seeded plan it holds the seed.
            seeded = self.plan.noise.insecure_seed is not None
            write_atomically(self.run.config, self._config, secret=seeded)
        write_atomically(self.run.plan, plan_text(self.plan.to_json()))

    def _go_on(self) -> None:
        """Take up a resumed run: its weights, and what was measured of them."""
        charged = self.private.ledger.count
        self.run.check_tail()
        if self._complete:
            load_weights(self.run.model, self.model)
            self.run.sync()
            return
        self.private.ledger.flush()
        if self.run.checkpoint.exists():
            self._restore()
        elif self.run.model.exists():
            raise PrivgradError(
                f"{self.run.directory} holds a model without its checkpoint, so there is nothing to go on from; put the "
                "checkpoint back, or choose another directory (--out)"
            )
        else:
            if charged > 0:  # without steps, a crash came before the first checkpoint
                print(
                    f"privgrad: {self.run.checkpoint} is gone: {charged} steps stay charged, and the weights start anew",
                    file=sys.stderr,
                )
            self._metrics.go_back(0)
            self.run.make()
            self._save()

    def _save(self) -> None:
        save_tree(
            self.run.checkpoint,
            {
                "model": dict(self.model.state_dict()),
                "optimizer": self.optimizer.state_dict(),
                "schedule": None if self.schedule is None else self.schedule.state_dict(),
                **self.private.state_dict(),
                "random": torch.get_rng_state(),
                "average": None if self._average is None else self._average.values,
                "applied": self._applied,
            },
        )

    def _save_whole_steps(self) -> None:
        """Where a run fails between two steps (a record that cannot be read), keep those since the last checkpoint.

        One that fails within a step, after its charge, may have moved some of the weights: the last checkpoint stays then.
        """
        if self.private.ledger.count == self._whole:
            with suppress(Exception):  # of two errors, the first one is told
                self._save()

    def _restore(self) -> None:
        saved = load_tree(self.run.checkpoint)
        try:
            self.run.check_tail(saved["ledger"])
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            if self.schedule is not None and saved["schedule"] is not None:
                self.schedule.load_state_dict(saved["schedule"])
            self.private.load_state_dict(saved)
            torch.set_rng_state(saved["random"])
            self._applied = int(saved["applied"])
            if self._average is not None and saved["average"] is not None:
                self._average.restore(saved["average"])
            self._metrics.go_back(saved["ledger"]["steps"])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise PrivgradError(
                f"{self.run.checkpoint} does not fit this model and optimizer, or is damaged: {str(error).splitlines()[0]}; "
                "resume with the ones that started the run"
            ) from error

    def _earlier(self) -> Result:
        """The result of a run that was finished before, from its certificate."""
        metrics = (read_json(self.run.certificate).get("evaluation") or {}).get("metrics", {})
        return self._result(metrics.get("test_accuracy"))

    def _finish(self) -> Result:
        record = self.private.ledger.record
        save_weights(self.run.model, dict(self.model.state_dict()))
        reached = None if self.test is None else accuracy(self.model, self.test)
        evaluation = None
        if self.test is not None and reached is not None:
            evaluation = Evaluation(self.test.name, self.test.declared, {"test_accuracy": reached})
        self.run.certify(record, self.plan, self._applied, self._data_name, evaluation)
        return self._result(reached)

    def _result(self, reached: float | None) -> Result:
        record, multiplier = self.private.ledger.record, self.plan.facts().noise_multiplier
        return Result(record.spent(), self.plan.delta, record.count, multiplier, reached, self.run.directory)

"""A tiny run, told through one life of the process after another, and what must hold whatever happens in them."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import privgrad as pg
from privgrad import files
from privgrad.cli import run as privgrad
from privgrad.mechanism.plan import Plan
from privgrad.privacy.ledger import read_ledger
from privgrad.training import trainer as trainer_module
from privgrad.training.averaging import ExponentialAverage
from privgrad.training.run import Run
from privgrad.training.trainer import Trainer
from tests.faults.disk import Death, Disk, Fault, Killed, Point

STEPS = 8
FILES = {
    "plan.json",
    "ledger.jsonl",
    "model.safetensors",
    "checkpoint/latest.safetensors",
    "metrics.jsonl",
    "certificate.json",
    "certificate.md",
    "certificate.html",
}
LOSS = pg.supervised(F.cross_entropy)
INPUTS = torch.linspace(-1, 1, 8).view(8, 1)
DATA = TensorDataset(INPUTS, (INPUTS[:, 0] > 0).long())
TEST = TensorDataset(0.9 * INPUTS, (INPUTS[:, 0] > 0).long())


def plan(sampling: Any) -> Plan:
    """RDP, because an epsilon then takes a hundredth of a second."""
    noise = pg.GaussianNoise(multiplier=1.0, insecure_seed=7)
    return Plan(sampling=sampling, steps=STEPS, noise=noise, accountant=pg.Accountant.RDP)


@dataclass(frozen=True)
class Shape:
    """One way in which a run goes.

    every_step: whether each step gets a checkpoint. before: how the lives before the one with the fault ended.
    """

    name: str
    every_step: bool = True
    before: tuple[Death, ...] = ()
    sampling: Any = pg.PoissonSampling(rate=0.5, divisor=4.0)
    averaging: ExponentialAverage | None = None
    cosine: bool = False
    test: bool = False
    command_line: bool = False

    @property
    def steps(self) -> int:
        return 3 if self.command_line else STEPS


SHAPES = (
    Shape("fresh"),
    Shape("fresh, few checkpoints", every_step=False, test=True),
    Shape("averaging and schedule", averaging=ExponentialAverage(0.9), cosine=True, test=True),
    Shape("shuffled", sampling=pg.ShuffledBatches(batch_size=4)),
    Shape("resumed", every_step=False, before=(Death("write", "ledger.jsonl", 5),), test=True),
    Shape("shuffled, resumed", before=(Death("fsync", "ledger.jsonl", 4),), sampling=pg.ShuffledBatches(batch_size=4)),
    Shape("resumed after the last step", every_step=False, before=(Death("write", "metrics.jsonl", 0),)),
    Shape(
        "finishing again", before=(Death("replace", "certificate.md", 0),), averaging=ExponentialAverage(0.9), test=True
    ),
    Shape("started again", before=(Death("write", "ledger.jsonl", 0),)),
    Shape("resumed without a checkpoint", before=(Death("replace", "latest.safetensors", 0),)),
    Shape("command line", command_line=True),
    Shape("command line, resumed", command_line=True, before=(Death("fsync", "ledger.jsonl", 3),)),
)


@dataclass
class World:
    """The disk, and what really happened on it: the steps whose noise moved weights, in all lives."""

    disk: Disk
    shape: Shape
    applied: list[int] = field(default_factory=list)
    lineage: list[int] = field(default_factory=list)
    """The steps behind the weights that are in memory now."""
    saved: dict[str, list[int]] = field(default_factory=dict)
    """The steps behind the weights of each checkpoint that was ever written."""
    said: str = ""

    @property
    def directory(self) -> Path:
        return self.disk.root / "run"

    def live(self, fault: Fault | Death | None = None, *, resume: bool) -> str:
        """One life of the process: "finished", "killed", or the one line with which it ended."""
        self.disk.start_life(fault)
        self.lineage = []
        with self._watched():
            try:
                said = self._command(resume) if self.shape.command_line else self._fit(resume)
                assert self.disk.open_files == 0, "a file was left open, and with it the lock"
                return said
            except Killed:
                return "killed"
            finally:
                for file in files._opened:
                    file._descriptor = None  # those of the dead
                self.disk.end_life()
                self.disk.check_nothing_else_wrote()

    def _fit(self, resume: bool) -> str:
        try:
            self._trainer(resume).fit()
        except pg.PrivgradError as error:
            return str(error)
        return "finished"

    @property
    def begun(self) -> bool:
        return Run(self.directory).begun

    def _trainer(self, resume: bool) -> Trainer:
        torch.manual_seed(0)
        model = nn.Linear(1, 2, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        return Trainer(
            model,
            optimizer,
            DATA,
            plan(self.shape.sampling),
            LOSS,
            directory=self.directory,
            schedule=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS) if self.shape.cosine else None,
            averaging=self.shape.averaging,
            test=pg.DeclaredSplit(TEST) if self.shape.test else None,
            evaluations=4,
            resume=resume,
            quiet=True,
        )

    def _command(self, resume: bool) -> str:
        err = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
            code = privgrad([*COMMAND, *(["--resume"] if resume else []), "--out", str(self.directory)])
        assert code in (0, 2), err.getvalue()
        assert "Traceback" not in err.getvalue()
        return "finished" if code == 0 else err.getvalue().splitlines()[-1].removeprefix("privgrad: ")

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Files through the disk, checkpoints as the shape has them, and a look at each step and each checkpoint."""
        save, load, step = trainer_module.save_tree, trainer_module.load_tree, pg.Private.step

        def watched_step(private: pg.Private, batch: Any) -> None:
            step(private, batch)
            self.applied.append(private.ledger.count)
            self.lineage.append(private.ledger.count)

        def watched_save(path: Path, tree: Any) -> None:
            self.saved[_key(tree)] = list(self.lineage)
            save(path, tree)

        def watched_load(path: Path) -> Any:
            tree = load(path)
            self.lineage = list(self.saved[_key(tree)])
            return tree

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "os", self.disk)
            patch.setattr(trainer_module, "_CHECKPOINT_SHARE", 1e12 if self.shape.every_step else 0.0)
            patch.setattr(trainer_module, "save_tree", watched_save)
            patch.setattr(trainer_module, "load_tree", watched_load)
            patch.setattr(pg.Private, "step", watched_step)
            yield

    # What must hold.

    def check_now(self) -> None:
        """After each life: the ledger holds at least the steps whose noise moved weights, and `verify` speaks in words."""
        run = Run(self.directory)
        if not run.begun:
            assert not self.applied, "the ledger forgot steps"
            return
        record = read_ledger(run.ledger)
        assert record.count >= len(set(self.applied))
        assert record.count >= max(self.applied, default=0)
        verified = run.verify()
        assert not verified.mismatches or verified.finished, verified.mismatches

    def check_finished(self) -> None:
        """After the last life."""
        run = Run(self.directory)
        verified = run.verify()
        assert verified.mismatches == []
        assert verified.finished
        assert verified.steps == self.shape.steps >= len(self.applied)
        assert len(set(self.applied)) == len(self.applied), "one charge was used for two steps"
        stored = Plan.from_json(json.loads(run.plan.read_bytes()))
        assert verified.epsilon >= stored.epsilon(steps=len(self.applied)) > 0
        certificate = json.loads(run.certificate.read_bytes())
        assert certificate["steps"]["applied"] == len(self.lineage) or not self.lineage
        found = {path.relative_to(self.directory).as_posix() for path in self.directory.rglob("*") if path.is_file()}
        assert found == FILES | ({"config.toml"} if self.shape.command_line else set())
        measured = [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()]
        assert measured == sorted(set(measured))
        assert measured[-1] == self.shape.steps


COMMAND = (
    "train",
    *("--model", "logistic_regression", "--set", "plan.noise.multiplier=1.0", "--set", "plan.noise.insecure_seed=7"),
    *("--set", "plan.steps=3", "--set", "training.evaluations=1", "--set", "privacy.accountant=rdp"),
    *("--set", "plan.sampling.expected_batch_size=16"),
)


def _key(tree: Any) -> str:
    values = [value.tolist() for value in tree["model"].values()]
    return json.dumps([tree["applied"], tree["ledger"], values])


def world_before(shape: Shape, root: Path, seed: int = 0) -> World:
    """The disk at the start of the life that gets the fault."""
    world = World(Disk(root, seed), shape)
    for death in shape.before:
        assert world.live(death, resume=world.begun) == "killed"
    return world


def trace_of(shape: Shape, root: Path) -> list[Point]:
    """The operations of that life where nothing goes wrong."""
    world = world_before(shape, root)
    assert world.live(resume=world.begun) == "finished"
    return list(world.disk.trace)


def check(shape: Shape, fault: Fault, root: Path, seed: int = 0) -> str:
    """The whole story of one fault. Returns how the life with the fault ended."""
    world = world_before(shape, root, seed)
    ended = world.live(fault, resume=world.begun)
    world.check_now()
    # What a user does: resume; where there is nothing to resume, start. As the messages say.
    said = world.live(resume=True)
    if "start one without --resume" in said:
        said = world.live(resume=False)
    assert said == "finished", said
    world.check_finished()
    if fault.kind not in ("EINVAL", "EACCES"):  # a file system that flushes no directories
        world.disk.cut_power()
        world.check_finished()
    return ended

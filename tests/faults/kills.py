"""Kill a real training process at any moment, and finish its run: `python -m tests.faults.kills [--kills 20] [--json FILE]`.

Each run of `privgrad train` gets SIGKILL at a random moment: in start-up, between any two steps, or while it finishes. A third of
them are killed once more while they resume. Whatever is left is then resumed, or started where nothing had begun.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from privgrad.cli import run as privgrad
from privgrad.privacy.ledger import has_begun, read_ledger
from privgrad.training.run import Run

STEPS = 40
PHASES = ("start-up", "steps", "steps", "steps", "finishing")
OPTIONS = (
    *("--model", "logistic_regression", "--set", "plan.noise.multiplier=1.0", "--set", f"plan.steps={STEPS}"),
    *("--set", "plan.sampling.expected_batch_size=64", "--set", "training.evaluations=8"),
    *("--set", "privacy.accountant=rdp"),
)
PROGRAM = """
import sys
from tests.faults.kills import watch_steps
watch_steps(sys.argv.pop(1))
from privgrad_command import main
main()
"""


def watch_steps(witness: str) -> None:
    """One byte in the file `witness` for each step whose noise moved the weights of this process."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    descriptor = os.open(witness, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def applied(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # Of the model, whose weight and bias make two; the command line tries the optimizer's arguments on one of its own.
        if len(optimizer.param_groups[0]["params"]) == 2:
            os.write(descriptor, b".")

    register_optimizer_step_post_hook(applied)


class Forked:
    """A process that need not load the libraries again. As far as `Story` goes, a Popen."""

    def __init__(self, arguments: list[str], witness: str, err: Path) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 (until the process ends)
                sys.stderr = err.open("w", buffering=1)
                watch_steps(witness)
                code = privgrad(arguments)
            finally:
                os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None and (found := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.returncode = os.waitstatus_to_exitcode(found[1])
        return self.returncode

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.001)
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


@dataclass(frozen=True)
class Moment:
    """When to kill: so many seconds after the phase has begun; for steps, after the ledger has so many of them."""

    phase: str
    step: int
    seconds: float


@dataclass
class Story:
    """One run over several lives. witness: a file that gets one byte for each step that was applied, in whichever life."""

    root: Path
    name: str
    fork: bool = False

    @property
    def directory(self) -> Path:
        return self.root / self.name

    @property
    def witness(self) -> Path:
        return self.root / f"{self.name}.applied"

    @property
    def err(self) -> Path:
        return self.root / f"{self.name}.err"

    def start(self) -> subprocess.Popen[bytes] | Forked:
        """One more life, with what a user types next."""
        more = ("--resume",) if Run(self.directory).begun else OPTIONS
        arguments = ["train", *more, "--out", str(self.directory)]
        if self.fork:
            return Forked(arguments, str(self.witness), self.err)
        command = [sys.executable, "-c", PROGRAM, str(self.witness), *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=self.err.open("w"))

    @property
    def charged(self) -> int:
        ledger = Run(self.directory).ledger
        return read_ledger(ledger).count if has_begun(ledger) else 0

    @property
    def applied(self) -> int:
        return len(self.witness.read_bytes()) if self.witness.exists() else 0

    def killed(self, moment: Moment) -> bool:
        """One life, up to the kill; False where it was over before."""
        process = self.start()
        try:
            while not self._reached(moment) and process.poll() is None:
                time.sleep(0.001)
            time.sleep(moment.seconds)
            early = process.poll() is None
        finally:
            process.kill()
            process.wait()
        assert "Traceback" not in self.err.read_text()
        assert self.charged >= self.applied, f"{self.applied} steps moved the weights and {self.charged} are charged"
        return early

    def _reached(self, moment: Moment) -> bool:
        if moment.phase == "start-up":
            return True
        ledger = Run(self.directory).ledger
        return ledger.exists() and ledger.read_bytes().count(b"\n") > moment.step

    def finish(self) -> None:
        """The last life, and what must hold after it."""
        assert self.start().wait() == 0, self.err.read_text()
        verified = Run(self.directory).verify()
        assert verified.mismatches == []
        assert verified.finished
        assert verified.steps == self.charged == STEPS >= self.applied
        steps = json.loads(Run(self.directory).certificate.read_bytes())["steps"]
        assert steps["charged"] == STEPS >= self.applied >= steps["applied"]
        measured = [json.loads(line)["step"] for line in Run(self.directory).metrics.read_text().splitlines()]
        assert measured == sorted(set(measured))


def sweep(root: Path, kills: int, chance: random.Random, *, fork: bool = False) -> list[dict[str, Any]]:
    """`kills` runs, each killed once or twice and then finished. fork: without loading the libraries for each."""
    start_up, finishing = _durations(Story(root, "whole", fork))
    told = []
    for number in range(kills):
        phase = PHASES[number % len(PHASES)]
        story = Story(root, f"run-{number}", fork)
        moments = [_moment(phase, chance, start_up, finishing)]
        if number % 3 == 2:
            moments.append(_moment("steps", chance, start_up, finishing))
        lives = []
        for moment in moments:
            hit = story.killed(moment)
            lives.append({"phase": moment.phase, "after_step": moment.step, "hit": hit})
            lives[-1] |= {"charged": story.charged, "applied": story.applied}
        story.finish()
        told.append({"kills": lives, "charged": story.charged, "applied": story.applied})
        print(told[-1], file=sys.stderr, flush=True)
    return told


def _durations(whole: Story) -> tuple[float, float]:
    """Seconds from the start to the ledger's first line, and from its last one to the end, where nobody kills."""
    begun = time.monotonic()
    process = whole.start()
    run = Run(whole.directory)
    while not has_begun(run.ledger):
        assert process.poll() is None, whole.err.read_text()
        time.sleep(0.001)
    start_up = time.monotonic() - begun
    while run.ledger.read_bytes().count(b"\n") <= STEPS and process.poll() is None:
        time.sleep(0.001)
    last_step = time.monotonic()
    while not run.page.exists() and process.poll() is None:
        time.sleep(0.001)
    finishing = time.monotonic() - last_step
    assert process.wait() == 0, whole.err.read_text()
    return start_up, finishing


def _moment(phase: str, chance: random.Random, start_up: float, finishing: float) -> Moment:
    if phase == "start-up":
        return Moment(phase, 0, chance.uniform(0, start_up))
    if phase == "steps":
        return Moment(phase, chance.randint(1, STEPS - 1), chance.uniform(0, 0.05))
    return Moment(phase, STEPS, chance.uniform(0, finishing))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the result there")
    arguments = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        told = sweep(Path(root), arguments.kills, random.Random(arguments.seed))
    kills = [life for story in told for life in story["kills"]]
    result = {
        "command": f"python -m tests.faults.kills --kills {arguments.kills} --seed {arguments.seed}",
        "runs": len(told),
        "finished_and_verified": len(told),
        "kills_that_hit_a_living_process": sum(life["hit"] for life in kills),
        "seconds": round(time.monotonic() - begun),
        "stories": told,
    }
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{len(told)} runs, {len(kills)} kills: all finished and verified")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Nonsense through the command line: `python -m tests.fuzz [--cases 10000] [--seed 0] [--json FILE]`.

Mutated configurations go to `epsilon`, `calibrate` and `train`, numbers to `epsilon` and `calibrate`, damaged runs to
`verify` and `train --resume`. Every case ends with exit code 0, 1 or 2 and in words, within 20 seconds of work; what is known
to be nonsense ends with 1 or 2. `--only N` repeats one case.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import functools
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from privgrad.cli import build
from privgrad.cli import run as privgrad
from privgrad.training.private import Private
from tests.fuzz.configurations import BASE, nonsense
from tests.fuzz.runs import damage

LIMIT_SECONDS = 20.0
LARGEST_MEMORY = 8 * 2**30
"""Address space: who asks for more is told so, and the machine goes on."""
NUMBERS = (
    "0.01",
    "1",
    "0",
    "-1",
    "nan",
    "inf",
    "1e-300",
    "1e300",
    "1e-12",
    "0.5",
    "",
    "x",
    "1_000",
    "9" * 400,
    "0x10",
    "1e400",
)
COUNTS = ("1", "10", "0", "-1", "1.5", "1000000", "10" * 9, "9" * 400, "nan", "", "ten")
KINDS = {"configuration": 5, "numbers": 1, "verify": 3, "resume": 1}


@dataclass
class Findings:
    """How the cases ended, and the ones that should not have ended so."""

    codes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slowest: float = 0.0


class Fuzz:
    """Cases by their number: the same number gives the same case."""

    def __init__(self, root: Path, seed: int = 0) -> None:
        self.root, self.seed = root, seed
        self.findings = Findings()
        self._finished, self._stopped = root / "finished", root / "stopped"
        self._base = root / "base.toml"
        self._base.write_text(tomli_w.dumps(BASE))
        assert self._train(self._finished) == 0
        with pytest.MonkeyPatch.context() as patch:
            step = Private.step
            patch.setattr(Private, "step", lambda *given: (step(*given), os.kill(os.getpid(), signal.SIGINT)))
            assert self._train(self._stopped) == 130

    def _train(self, directory: Path) -> Any:
        more = ("--set", "plan.steps=3", "--set", "plan.noise.insecure_seed=3", "--out", str(directory))
        return self._run(["train", str(self._base), *more])[0]

    def case(self, number: int) -> None:
        """Run one case and judge it."""
        chance = random.Random(f"{self.seed}:{number}")
        kind = chance.choices(list(KINDS), list(KINDS.values()))[0]
        arguments, refused, words = getattr(self, f"_{kind}")(chance)
        begun = time.process_time()  # of this process: the machine may be busy
        code, output = self._run(arguments)
        seconds = time.process_time() - begun
        self.findings.slowest = max(self.findings.slowest, seconds)
        self.findings.codes[f"{arguments[0]}: {code}"] += 1
        problem = self._problem(code, output, seconds, refused)
        if problem:
            self.findings.failures.append(f"case {number}, {' '.join(arguments)[:300]} ({words}): {problem}")
            print(self.findings.failures[-1], file=sys.stderr, flush=True)

    def _problem(self, code: Any, output: str, seconds: float, refused: bool) -> str:
        if code not in (0, 1, 2):
            return f"ended with {code}: {output[-1500:]}"
        if "Traceback" in output:
            return f"a traceback: {output[-1500:]}"
        if seconds > LIMIT_SECONDS:
            return f"took {seconds:.0f} s"
        if refused and code == 0:
            return f"was accepted: {output[-200:]}"
        if code != 0 and not output.strip():
            return "was refused without a word"
        return ""

    def _run(self, arguments: list[str]) -> tuple[Any, str]:
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output), _quiet():
            faulthandler.dump_traceback_later(10 * LIMIT_SECONDS, exit=True, file=sys.__stderr__)
            signal.setitimer(signal.ITIMER_PROF, 2 * LIMIT_SECONDS)
            try:
                return privgrad(arguments), output.getvalue()
            except BaseException as error:  # whatever gets out is a finding
                if isinstance(error, KeyboardInterrupt):
                    raise
                return f"{type(error).__name__}", output.getvalue() + traceback.format_exc()
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
                faulthandler.cancel_dump_traceback_later()

    # The kinds of cases: arguments, whether they must be refused, and words for a report.

    def _configuration(self, chance: random.Random) -> tuple[list[str], bool, str]:
        command = chance.choice(("epsilon", "epsilon", "calibrate", "train", "train"))
        made = nonsense(chance, calibrated=command == "calibrate" and chance.random() < 0.8)
        if command == "train" and not made.trains:
            command = "epsilon"
        path = self.root / "config.toml"
        path.write_bytes(made.text.encode("utf-8", "surrogatepass"))
        arguments = [command, str(path)]
        for setting in made.settings:
            arguments += ["--set", setting]
        if command == "train":
            shutil.rmtree(self.root / "out", ignore_errors=True)
            arguments += ["--out", str(self.root / "out")]
        if command == "calibrate" and chance.random() < 0.5:
            arguments += ["--epsilon", "3"]
            made.refused_because = "" if made.refused_because.startswith("privacy.epsilon") else made.refused_because
        section = made.refused_because.split(".")[0]
        looked_at = (
            command == "train" or section in ("privacy", "plan", "plann") or "run.worker " in made.refused_because
        )
        return arguments, bool(made.refused_because) and looked_at, made.refused_because

    def _numbers(self, chance: random.Random) -> tuple[list[str], bool, str]:
        arguments = [chance.choice(("epsilon", "calibrate")), "--accountant", chance.choice(("rdp", "rdp", "pld", "x"))]
        arguments += ["--sampling-rate", chance.choice(NUMBERS), "--steps", chance.choice(COUNTS)]
        if arguments[0] == "epsilon":
            arguments += ["--noise-multiplier", chance.choice(NUMBERS)]
        else:
            arguments += ["--epsilon", chance.choice(NUMBERS)]
        if chance.random() < 0.5:
            arguments += ["--delta", chance.choice(("1e-5", *NUMBERS))]
        if chance.random() < 0.3:
            arguments += ["--adjacency", chance.choice(("zero_out", "add_remove", "replace_one", "x"))]
        wrong = {"nan", "inf", "", "x", "-1", "1e400", "9" * 400, "0x10", "ten", "1.5"}
        given = dict(zip(arguments[1::2], arguments[2::2], strict=True))
        refused = any(value in wrong for name, value in given.items() if name != "--steps" or value != "9" * 400)
        refused |= given["--steps"] in ("0", "-1") or given["--sampling-rate"] in ("0", "1e300")
        refused |= given.get("--delta") in ("0", "1", "1e300") or given.get("--epsilon") == "0"
        return arguments, refused, ""

    def _verify(self, chance: random.Random) -> tuple[list[str], bool, str]:
        done = damage(self.root / "damaged", self._finished, chance)
        more = ["--json"] if chance.random() < 0.3 else []
        return ["verify", str(self.root / "damaged"), *more], done.noticed, done.words

    def _resume(self, chance: random.Random) -> tuple[list[str], bool, str]:
        original = chance.choice((self._finished, self._stopped))
        done = damage(self.root / "damaged", original, chance)
        return ["train", "--resume", "--out", str(self.root / "damaged")], False, done.words


class TooLongError(BaseException):
    """Not to be caught on the way out."""


def _too_long(number: int, frame: Any) -> None:
    raise TooLongError


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Warnings of torch about what is asked of it are no findings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def fuzz(cases: range, seed: int = 0) -> Findings:
    """Run the cases of these numbers."""
    memory = Path("/dev/shm")
    with (
        tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(build, "load", functools.cache(build.load))
        before = signal.signal(signal.SIGPROF, _too_long)
        fuzzing = Fuzz(Path(folder), seed)
        for number in cases:
            fuzzing.case(number)
        signal.signal(signal.SIGPROF, before)
    return fuzzing.findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one case")
    parser.add_argument("--json", type=Path, help="write the result there")
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (LARGEST_MEMORY, LARGEST_MEMORY))
    begun = time.monotonic()
    only = arguments.only
    found = fuzz(range(arguments.cases) if only is None else range(only, only + 1), arguments.seed)
    result = {
        "command": f"python -m tests.fuzz --cases {arguments.cases} --seed {arguments.seed}",
        "cases": arguments.cases,
        "failures": found.failures,
        "exit_codes": dict(sorted(found.codes.items())),
        "slowest_seconds": round(found.slowest, 1),
        "seconds": round(time.monotonic() - begun),
    }
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{sum(found.codes.values())} cases, {len(found.failures)} failures, slowest {found.slowest:.1f} s")
    return 1 if found.failures else 0


if __name__ == "__main__":
    sys.exit(main())

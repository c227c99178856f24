"""Real processes: Ctrl-C at any moment, with a terminal and without, and two processes on one run directory."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from privgrad.cli import run as privgrad
from privgrad.privacy.ledger import read_ledger
from privgrad.training.checkpoint import load_tree

ENDLESS = [
    *("train", "--model", "logistic_regression", "--set", "plan.noise.multiplier=1.0"),
    *(
        "--set",
        "plan.steps=1000000",
        "--set",
        "plan.sampling.expected_batch_size=64",
        "--set",
        "privacy.accountant=rdp",
    ),
]
LIMIT = 100.0


class Process:
    """A child with its output (both kinds together), in a group and a session of its own."""

    def __init__(self, pid: int, output: int, terminal: bool) -> None:
        self.pid, self.output, self.terminal = pid, output, terminal
        self.text = ""
        self.code: int | None = None

    def read(self, seconds: float) -> None:
        """Take in what it says for so long. (A child blocks where nobody reads its terminal.)"""
        deadline = time.monotonic() + seconds
        while select.select([self.output], [], [], max(0.0, deadline - time.monotonic()))[0]:
            try:
                found = os.read(self.output, 65536)
            except OSError:  # a terminal whose last user has gone
                found = b""
            self.text += found.decode(errors="replace")
            if not found:
                time.sleep(max(0.0, deadline - time.monotonic()))
                return

    def wait_for(self, what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LIMIT
        while not what():
            self.read(0.01)
            assert self.alive, self.text
            assert time.monotonic() < deadline, self.text

    @property
    def alive(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is None

    def press(self) -> None:
        """Ctrl-C, as a terminal sends it: to all processes in the foreground."""
        if self.terminal:
            os.write(self.output, b"\x03")
        else:
            os.killpg(self.pid, signal.SIGINT)

    def end(self) -> str:
        """The last line that it said, after its end."""
        deadline = time.monotonic() + LIMIT
        while self.alive:
            self.read(0.01)
            assert time.monotonic() < deadline, self.text
        self.read(0.2)
        assert "Traceback" not in self.text
        return self.text.strip().splitlines()[-1].strip() if self.text.strip() else ""

    @property
    def children(self) -> set[int]:
        """The processes of its group, without itself."""
        found = set()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != self.pid:
                try:
                    fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                except OSError:
                    continue
                if int(fields[2]) == self.pid and fields[0] != "Z":
                    found.add(int(entry.name))
        return found


@contextmanager
def started(arguments: list[str], *, terminal: bool, prepare: Callable[[], Any] = lambda: None) -> Iterator[Process]:
    """The command line in a child that need not load the libraries again. prepare: done in the child before."""
    if terminal:
        pid, output = pty.fork()
    else:
        output, write = os.pipe()
        pid = os.fork()
    if pid == 0:
        code = 70
        try:
            if not terminal:
                os.setsid()
                os.dup2(write, 1)
                os.dup2(write, 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            signal.signal(signal.SIGINT, signal.default_int_handler)
            prepare()
            code = privgrad(arguments)
            sys.stderr.flush()
        finally:
            os._exit(code)
    if not terminal:
        os.close(write)
    process = Process(pid, output, terminal)
    try:
        yield process
    finally:
        if process.alive:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(output)


def steps_in(directory: Path) -> int:
    ledger = directory / "ledger.jsonl"
    return max(0, ledger.read_bytes().count(b"\n") - 1) if ledger.exists() else 0


def slowed(target: str, marker: Path) -> Callable[[], None]:
    """In the child: the function says through `marker` that it was reached, and takes its time."""

    def prepare() -> None:
        patch = pytest.MonkeyPatch()
        module, _, name = target.rpartition(".")
        real = getattr(sys.modules[module], name)

        def slow(*arguments: Any, **options: Any) -> Any:
            marker.touch()
            for _ in range(100):
                time.sleep(0.01)
            return real(*arguments, **options)

        patch.setattr(target, slow)

    return prepare


terminals = pytest.mark.parametrize("terminal", [False, True], ids=["no terminal", "terminal"])


@terminals
def test_ctrl_c_ends_a_run_after_its_step(tmp_path: Path, terminal: bool) -> None:
    directory = tmp_path / "run"
    with started([*ENDLESS, "--out", str(directory)], terminal=terminal) as process:
        process.wait_for(lambda: steps_in(directory) > 2)
        process.press()
        assert "nothing is lost; go on with:" in process.text + process.end()
        assert process.code == 130
    saved = load_tree(directory / "checkpoint" / "latest.safetensors")
    assert saved["applied"] == saved["ledger"]["steps"] == read_ledger(directory / "ledger.jsonl").count


@terminals
def test_ctrl_c_twice_ends_it_at_once(tmp_path: Path, terminal: bool) -> None:
    directory, marker = tmp_path / "run", tmp_path / "evaluating"
    options = ["--set", "training.evaluations=1000000", "--out", str(directory)]
    slow = slowed("privgrad.training.trainer.accuracy", marker)
    with started([*ENDLESS, *options], terminal=terminal, prepare=slow) as process:
        process.wait_for(marker.exists)
        pressed = time.monotonic()
        process.press()
        process.read(0.1)
        process.press()
        last = process.end()
        assert time.monotonic() - pressed < 0.9, "the slow evaluation was waited for"
        assert "stopped at once; what was charged is in the ledger; go on with:" in process.text, last
        assert process.code == 130
    assert (
        read_ledger(directory / "ledger.jsonl").count
        >= load_tree(directory / "checkpoint/latest.safetensors")["applied"]
    )


def test_ctrl_c_in_an_evaluation_ends_after_it(tmp_path: Path) -> None:
    directory, marker = tmp_path / "run", tmp_path / "evaluating"
    options = ["--set", "training.evaluations=1000000", "--out", str(directory)]
    slow = slowed("privgrad.training.trainer.accuracy", marker)
    with started([*ENDLESS, *options], terminal=False, prepare=slow) as process:
        process.wait_for(marker.exists)
        process.press()
        assert "stopped after step 1 of 1000000, nothing is lost" in process.end()
        assert process.code == 130
    assert json.loads((directory / "metrics.jsonl").read_text())["step"] == 1


@pytest.mark.parametrize(
    "target", ["privgrad.cli.build.load", "privgrad.cli.train.build_plan", "privgrad.mechanism.plan.calibrate"]
)
def test_ctrl_c_before_the_first_step_leaves_nothing(tmp_path: Path, target: str) -> None:
    """While data is loading, and while the noise is calibrated."""
    directory, marker = tmp_path / "run", tmp_path / "reached"
    calibrated = [argument for argument in ENDLESS if not argument.startswith("plan.noise")]
    calibrated.pop(calibrated.index("--set"))
    with started([*calibrated, "--out", str(directory)], terminal=False, prepare=slowed(target, marker)) as process:
        process.wait_for(marker.exists)
        process.press()
        assert process.end() == "privgrad: stopped"
        assert process.code == 130
    assert not directory.exists()


def test_ctrl_c_while_a_run_starts_leaves_its_directory_free(tmp_path: Path) -> None:
    directory, marker = tmp_path / "run", tmp_path / "reached"
    slow = slowed("privgrad.training.trainer.make_private", marker)
    with started([*ENDLESS, "--out", str(directory)], terminal=False, prepare=slow) as process:
        process.wait_for(marker.exists)
        process.press()
        assert process.end() == "privgrad: stopped before the first step; nothing was charged"
        assert process.code == 130
    with started([*ENDLESS, "--out", str(directory)], terminal=False) as process:
        process.wait_for(lambda: steps_in(directory) > 1)


@pytest.mark.parametrize("command", ["epsilon", "calibrate"])
def test_ctrl_c_in_the_other_commands_is_as_quiet(tmp_path: Path, command: str) -> None:
    marker = tmp_path / "reached"
    numbers = [command, "--sampling-rate", "0.1", "--steps", "10"]
    numbers += ["--noise-multiplier", "1"] if command == "epsilon" else []
    target = "privgrad.privacy.accounting.epsilon"
    with started(numbers, terminal=False, prepare=slowed(target, marker)) as process:
        process.wait_for(marker.exists)
        process.press()
        assert process.end() == "privgrad: stopped"
        assert process.code == 130


PROGRAM = [sys.executable, "-c", "from privgrad_command import main; main()"]


def test_ctrl_c_while_the_libraries_load_is_as_quiet() -> None:
    with subprocess.Popen(PROGRAM, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=LIMIT)[1]
    assert process.returncode == 130
    assert err in ("privgrad: stopped before anything was begun\n", "privgrad: stopped\n")


@terminals
def test_ctrl_c_with_workers_leaves_none_of_them(tmp_path: Path, terminal: bool) -> None:
    """A terminal sends the signal to the workers too."""
    directory = tmp_path / "run"
    options = ["--set", "run.workers=2", "--out", str(directory)]
    with started([*ENDLESS, *options], terminal=terminal) as process:
        process.wait_for(lambda: steps_in(directory) > 2)
        assert len(process.children) == 2
        process.press()
        assert "nothing is lost; go on with:" in process.text + process.end()
        assert process.code == 130
        assert process.children == set()


def test_a_run_whose_process_was_killed_is_resumed_at_once_though_its_workers_live_on(tmp_path: Path) -> None:
    """A data-loading worker looks for its parent every five seconds only; it must not hold the lock so long."""
    directory = tmp_path / "run"
    options = ["--set", "run.workers=2", "--out", str(directory)]
    with started([*ENDLESS, *options], terminal=False) as process:
        process.wait_for(lambda: steps_in(directory) > 2)
        workers = process.children
        os.kill(process.pid, signal.SIGKILL)
        while process.alive:  # not `end`: a worker may well complain that its parent has gone
            process.read(0.01)
        before = steps_in(directory)
        assert process.children == workers, "the workers are gone already: this test shows nothing"
        with started(["train", "--resume", "--out", str(directory)], terminal=False) as second:
            second.wait_for(lambda: steps_in(directory) > before)
        for worker in process.children:
            os.kill(worker, signal.SIGKILL)


def test_two_processes_on_one_directory_in_all_orders(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "run"
    start, resume = [*ENDLESS, "--out", str(directory)], ["train", "--resume", "--out", str(directory)]
    for first in (start, resume):
        with started(first, terminal=False) as process:
            before = steps_in(directory)
            process.wait_for(lambda before=before: steps_in(directory) > before + 1)
            assert privgrad(resume) == 2
            assert "is in use by another privgrad process" in capfd.readouterr().err
            assert privgrad(start) == 2
            assert "already holds a run; continue it with --resume" in capfd.readouterr().err
            for _ in range(5):
                assert privgrad(["verify", str(directory), "--json"]) == 0
                said = json.loads(capfd.readouterr().out)
                assert said["ok"]
                assert not said["finished"]
                process.read(0.05)
            seen = steps_in(directory)
            process.wait_for(lambda seen=seen: steps_in(directory) > seen)
            process.press()
            assert "nothing is lost" in process.end()
    assert privgrad(["verify", str(directory)]) == 0

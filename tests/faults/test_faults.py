"""Whatever fails or dies, and whenever: the run is finished afterwards, and its ledger forgot nothing. (A sample; all of it
is `python -m tests.faults`.)"""

from __future__ import annotations

import ast
import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest

import privgrad
from privgrad import files
from tests.faults import kills
from tests.faults.__main__ import all_cases, run_all, sample
from tests.faults.disk import ERRORS, KILLS, Death, Disk, Fault, Killed
from tests.faults.lives import SHAPES, Shape, World, check, trace_of, world_before


def shape(name: str) -> Shape:
    return next(shape for shape in SHAPES if shape.name == name)


def test_a_run_survives_a_sample_of_all_faults(tmp_path: Path) -> None:
    cases = all_cases(tmp_path)
    assert len(cases) > 5000
    chosen = sample(cases, 150)
    assert {case.kind for case in chosen} >= set(KILLS)
    ends, failures = run_all(chosen, tmp_path)
    assert failures == []
    assert ends["killed"] > 20
    assert ends["refused in words"] > 20


@pytest.mark.parametrize("kind", KILLS)
@pytest.mark.parametrize("operation", ["write", "fsync"])
@pytest.mark.parametrize("which", [0, 1, 8])
def test_a_death_at_the_ledger_forgets_no_step(tmp_path: Path, kind: str, operation: str, which: int) -> None:
    """At the first line, the first step and the last one."""
    (tmp_path / "trace").mkdir()
    (tmp_path / "run").mkdir()
    points = trace_of(shape("fresh"), tmp_path / "trace")
    ledger = [point for point in points if (point.operation, point.name) == (operation, "ledger.jsonl")]
    assert check(shape("fresh"), Fault(ledger[which].number, kind), tmp_path / "run") == "killed"


@pytest.mark.parametrize("kind", ["EIO", "EIO, power cut"])
def test_a_flush_that_failed_is_not_believed_when_it_succeeds_later(tmp_path: Path, kind: str) -> None:
    """Linux takes pages for clean whose flush failed. In the last step nothing is appended afterwards that would flush them."""
    (tmp_path / "trace").mkdir()
    points = trace_of(shape("fresh"), tmp_path / "trace")
    flushes = [point.number for point in points if (point.operation, point.name) == ("fsync", "ledger.jsonl")]
    for number in (flushes[3], flushes[-1]):
        (tmp_path / str(number)).mkdir()
        said = check(shape("fresh"), Fault(number, kind), tmp_path / str(number))
        assert said.startswith("the ledger cannot be written (Input/output error)")


def test_three_deaths_in_a_row(tmp_path: Path) -> None:
    for number, deaths in enumerate(
        [
            (Death("write", "ledger.jsonl", 0), Death("replace", "plan.json"), Death("fsync", "ledger.jsonl", 2)),
            (Death("write", "ledger.jsonl", 4), Death("pread", "ledger.jsonl"), Death("write", "ledger.jsonl", 1)),
            (Death("replace", "model.safetensors"), Death("replace", "certificate.md"), Death("fsync", "ledger.jsonl")),
        ]
    ):
        root = tmp_path / str(number)
        root.mkdir()
        world = world_before(Shape("three deaths", before=deaths), root)
        world.check_now()
        assert world.live(resume=world.begun) == "finished"
        world.check_finished()


# The layer itself.


def test_no_write_of_a_run_goes_around_the_layer(tmp_path: Path) -> None:
    """Python tells an audit hook of every file that it opens, whoever asks; `check_nothing_else_wrote` compares the bytes."""
    opened: list[Path] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and watching and isinstance(arguments[0], str | bytes | os.PathLike):
            path = Path(os.fsdecode(arguments[0]))
            if tmp_path in path.parents and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                opened.append(path)

    watching = True
    sys.addaudithook(hook)
    try:
        world = World(Disk(tmp_path), shape("fresh, few checkpoints"))
        assert world.live(resume=False) == "finished"
    finally:
        watching = False
    through = [point.name for point in world.disk.trace if point.operation == "open"]
    assert [path.name for path in opened] == through


def test_the_source_writes_files_in_one_module() -> None:
    writing = {
        "write_text",
        "write_bytes",
        "unlink",
        "rename",
        "replace",
        "rmdir",
        "mkdir",
        "touch",
        "truncate",
        "save_file",
    }
    for path in sorted(Path(privgrad.__path__[0]).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            # The readers' cache of decoded images is no part of a run, and is made again when it is damaged.
            if not isinstance(node, ast.Call) or path.name == "files.py" or path.parent.name == "data":
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            owner = getattr(getattr(node.func, "value", None), "id", "")
            if name == "open":
                modes = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
                assert modes == ["rb"], f"{path.name}:{node.lineno}"
            assert owner in ("text", "dataclasses") or name not in writing or not _on_a_path(node), (
                f"{path}:{node.lineno}"
            )


def _on_a_path(node: ast.Call) -> bool:
    """`replace` is also what strings and dataclasses do."""
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    return name != "replace" or (len(node.args) == 1 and not node.keywords)


def test_a_write_around_the_layer_is_found(tmp_path: Path) -> None:
    world = World(Disk(tmp_path), shape("fresh"))
    assert world.live(Death("write", "ledger.jsonl", 3), resume=False) == "killed"
    with (world.directory / "metrics.jsonl").open("a") as stream:
        stream.write("{}\n")
    with pytest.raises(AssertionError):
        world.disk.check_nothing_else_wrote()


def test_a_function_that_the_disk_does_not_know_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(AttributeError, match="add it to Disk"):
        Disk(tmp_path).rename  # noqa: B018


def test_a_power_cut_keeps_what_was_flushed_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(tmp_path)
    monkeypatch.setattr(files, "os", disk)
    path = tmp_path / "file"
    descriptor = disk.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    disk.write(descriptor, b"first")
    disk.fsync(descriptor)
    disk.write(descriptor, b"second")
    disk.close(descriptor)
    assert path.read_bytes() == b"firstsecond"
    files.sync_directory(tmp_path)
    disk.cut_power()
    assert path.read_bytes() == b"first"
    files.write_atomically(path, "third")
    disk.unlink(path)
    disk.cut_power()
    assert path.read_bytes() == b"third"
    disk.mkdir(tmp_path / "folder")
    disk.cut_power()
    assert list(tmp_path.iterdir()) == [path]


def test_a_torn_power_cut_leaves_any_part(tmp_path: Path) -> None:
    left = set()
    for seed in range(40):
        root = tmp_path / str(seed)
        root.mkdir()
        disk = Disk(root, seed)
        descriptor = disk.open(root / "file", os.O_RDWR | os.O_CREAT, 0o666)
        disk.write(descriptor, b"abcdef")
        disk.close(descriptor)
        disk.cut_power(torn=True)
        left.add((root / "file").read_bytes() if (root / "file").exists() else None)
    assert None in left
    assert b"" in left
    assert b"abcdef" in left
    assert any(content and b"abcdef".startswith(content) and len(content) < 6 for content in left)
    assert any(content and not content.strip(b"\0") for content in left)


def test_a_failed_flush_is_lost_also_when_a_later_one_succeeds(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    disk.start_life(Fault(2, "EIO"))
    descriptor = disk.open(tmp_path / "file", os.O_RDWR | os.O_CREAT, 0o666)
    disk.write(descriptor, b"abc")
    with pytest.raises(OSError, match="Input/output"):
        disk.fsync(descriptor)
    disk.write(descriptor, b"def")
    disk.fsync(descriptor)
    folder = disk.open(tmp_path, os.O_RDONLY)
    disk.fsync(folder)
    disk.close(folder)
    disk.close(descriptor)
    assert (tmp_path / "file").read_bytes() == b"abcdef"
    disk.cut_power()
    assert (tmp_path / "file").read_bytes() == b"\0\0\0def"


def test_the_dead_do_nothing(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    disk.start_life(Death("open", "file"))
    for _ in range(2):
        with pytest.raises(Killed):
            disk.open(tmp_path / "file", os.O_RDWR | os.O_CREAT, 0o666)
    assert list(tmp_path.iterdir()) == []


def test_every_operation_has_its_errors() -> None:
    assert all(ERRORS.values())
    assert set(ERRORS) >= {
        "mkdir",
        "open",
        "write",
        "fsync",
        "replace",
        "unlink",
        "ftruncate",
        "close",
        "fsync directory",
    }


# Real processes.


def test_a_killed_process_is_finished_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 in start-up, between two steps and while it finishes. (Twenty of them: `python -m tests.faults.kills`.)"""
    monkeypatch.setattr(kills, "PHASES", ("start-up", "steps", "finishing"))
    told = kills.sweep(tmp_path, 3, random.Random(1), fork=True)
    assert [story["charged"] for story in told] == [kills.STEPS] * 3
    assert sum(life["hit"] for story in told for life in story["kills"]) >= 2

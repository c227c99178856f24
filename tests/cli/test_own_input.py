"""What users write and name: one line in words, whatever their model, their settings, their editor or their terminal do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

import privgrad as pg
from tests.cli.test_commands import SMALL, refusal, say

OWN = """
def key(input_shape, classes):
    raise KeyError("words")

def silent(input_shape, classes):
    raise ArithmeticError

def nothing():
    pass
"""


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("own_models:key", "cannot be made with arguments {}: KeyError: 'words'"),
        ("own_models:silent", "cannot be made with arguments {}: ArithmeticError: ArithmeticError"),
        ("own_models:nothing", "unexpected keyword argument 'input_shape'"),
        ("own_models:absent", "cannot be imported: AttributeError"),
        ("no_models:key", "cannot be imported: ModuleNotFoundError"),
        ("broken_models:key", "cannot be imported: SyntaxError"),
        ("failing_models:key", "cannot be imported: ZeroDivisionError: division by zero"),
    ],
)
def test_a_model_of_the_users_own_that_fails_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, says: str
) -> None:
    (tmp_path / "own_models.py").write_text(OWN)
    (tmp_path / "broken_models.py").write_text("def key(:")
    (tmp_path / "failing_models.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    assert says in refusal("train", "--model", name, "--out", tmp_path / "run")


@pytest.mark.parametrize("argument", ["width=0", "blocks=-1", "width=2.5"])
def test_a_network_of_no_size_is_refused(tmp_path: Path, argument: str) -> None:
    given = ("train", "--model", "wrn_16_4", "--set", f"model.arguments.{argument}", "--out", tmp_path / "run")
    assert "expected a whole number of at least 1" in refusal(*given)


def test_public_images_beyond_memory_are_refused(tmp_path: Path) -> None:
    wanted = ("--set", "public.source=dead_leaves", "--set", "public.count=10000000000000")
    assert "do not fit into memory" in refusal("train", *SMALL, *wanted, "--out", tmp_path / "run")


def test_what_follows_a_line_break_in_a_setting_is_not_dropped(tmp_path: Path) -> None:
    given = ("train", "--set", "plan.steps=3\nepochs = 5", "--out", tmp_path / "run")
    assert r"3\nepochs = 5" in refusal(*given)


def test_a_configuration_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_bytes(b"\xef\xbb\xbf[plan]\nsteps = 3\n[plan.noise]\nkind = 'gaussian'\nmultiplier = 1.0\n")
    said = say("epsilon", path)
    assert said.code == 0, said


def test_a_device_that_is_not_there_is_refused_in_one_sentence(tmp_path: Path) -> None:
    assert len(refusal("train", "--set", "run.device=mps", "--out", tmp_path / "run")) < 300


def test_a_terminal_that_cannot_show_a_name_loses_no_run(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", "from privgrad.cli import main; main()", "train", *SMALL, "--out", "Ärzte"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert r"\xc4rzte" in run.stdout
    assert say("verify", tmp_path / "Ärzte").code == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"adjacency": "add_removed"}, "adjacency is 'add_removed'; did you mean 'add_remove'?"),
        ({"accountant": "prv"}, "accountant is 'prv'"),
    ],
)
def test_dp_sgd_says_which_names_it_knows(change: dict[str, Any], says: str) -> None:
    data = TensorDataset(torch.zeros(10, 2))
    with pytest.raises(pg.PrivgradError, match=says.replace("?", r"\?")):
        pg.dp_sgd(data, epsilon=1, delta=1e-5, steps=2, batch_size=5, **change)

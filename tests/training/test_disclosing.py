"""What is shown without noise: nothing, unless it is named; and what is named stands in the certificate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import privgrad as pg
from privgrad.mechanism.disclosure import DISCLOSURES
from privgrad.mechanism.plan import Plan
from privgrad.training.run import Run

LOSS = pg.supervised(F.cross_entropy)


def records() -> TensorDataset:
    inputs = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
    return TensorDataset(inputs, (inputs[:, 0] > 0).long())


def plan(**changes: Any) -> Plan:
    return Plan(
        sampling=pg.PoissonSampling(rate=0.5, divisor=12.0),
        steps=4,
        noise=pg.GaussianNoise(multiplier=1.0, insecure_seed=3),
        **changes,
    )


def fitted(directory: Path, **changes: Any) -> pg.Trainer:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    trainer = pg.Trainer(model, optimizer, records(), plan(**changes), LOSS, directory=directory, quiet=True)
    trainer.fit()
    return trainer


def test_nothing_is_disclosed_by_default(tmp_path: Path) -> None:
    trainer = fitted(tmp_path)
    assert trainer.private.disclosed == {}
    assert "disclosed" not in (tmp_path / "metrics.jsonl").read_text()
    assert "without noise" not in (tmp_path / "certificate.md").read_text()


@pytest.mark.parametrize("name", list(DISCLOSURES))
def test_what_is_named_is_written_and_said_and_nothing_else(tmp_path: Path, name: str) -> None:
    fitted(tmp_path, disclose=(name,))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines
    assert all(line["disclosed"].keys() == {name} for line in lines)
    words = DISCLOSURES[name].replace("{unit}", "record")
    certificate = json.loads((tmp_path / "certificate.json").read_text())
    assert certificate["disclosed"] == [words]
    assert certificate["plan"]["disclose"] == [name]
    assert (
        f"Shown without noise, because the user asked for it by name: {words}"
        in (tmp_path / "certificate.md").read_text()
    )
    assert words.split(" ")[1] in (tmp_path / "certificate.html").read_text()
    assert Run(tmp_path).verify().mismatches == []


def test_the_values_are_those_of_the_training(tmp_path: Path) -> None:
    trainer = fitted(tmp_path, disclose=tuple(DISCLOSURES))
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["disclosed"]
    inputs, targets = records().tensors
    logits = trainer.model(inputs).detach()
    assert last["training_loss"] == pytest.approx(float(F.cross_entropy(logits, targets)), rel=1e-5)
    assert last["training_accuracy"] == pytest.approx(float((logits.argmax(1) == targets).float().mean()))


def test_a_steps_values_are_those_of_its_batch() -> None:
    model = nn.Linear(3, 2)
    running = pg.make_private(
        model,
        torch.optim.SGD(model.parameters(), lr=0.5),
        records(),
        plan(disclose=("batch_size", "clipped_share", "gradient_norm"), clipping=pg.FlatClipping(max_norm=0.6)),
        LOSS,
    )
    for batch in running.batches():
        norms = []
        for row in range(len(batch.data[0])):
            model.zero_grad()
            LOSS(model, tuple(leaf[row : row + 1] for leaf in batch.data)).sum().backward()
            norms.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm())
        norm = torch.stack(norms)
        running.step(batch)
        assert running.disclosed["batch_size"] == len(norm)
        assert running.disclosed["gradient_norm"] == pytest.approx(float(norm.mean()), rel=1e-5)
        assert running.disclosed["clipped_share"] == pytest.approx(float((norm > 0.6).float().mean()))


def test_another_disclosure_is_another_plan() -> None:
    assert plan().digest() != plan(disclose=("batch_size",)).digest()
    again = Plan.from_json(plan(disclose=["batch_size"]).to_json())
    assert again.disclose == ("batch_size",)


@pytest.mark.parametrize("names", ["batch_size", ["loss"], [3], 5, {}, {"batch_size": 1}, ["batch_size", "batch_size"]])
def test_a_name_that_is_not_known_is_refused(names: Any) -> None:
    with pytest.raises(pg.PrivgradError, match="disclose"):
        plan(disclose=names)

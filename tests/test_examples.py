"""The examples run, and keep what they promise."""

from __future__ import annotations

import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from examples import audit_own_training, batch_norm, foreign_optimizer, own_loop, resumed_loop
from examples.tables import breast_cancer

from privgrad.cli import run as privgrad
from privgrad.files import read_json
from privgrad.privacy.ledger import read_ledger


def test_own_loop_adds_at_most_six_lines() -> None:
    source = Path(own_loop.__file__).read_text()
    assert len(re.findall(r"# \(\+\)$", source, flags=re.MULTILINE)) <= 6
    mentions = [line for line in source.splitlines() if re.search(r"\b(pg|private|plan)\b[.(= ]", line)]
    assert all("(+)" in line for line in mentions), "a privgrad line is not counted"
    assert own_loop.main() > 0.85


def test_another_framework_may_own_the_optimizer() -> None:
    assert foreign_optimizer.main() > 0.85


def test_a_loop_that_was_stopped_goes_on(tmp_path: Path) -> None:
    resumed_loop.main(tmp_path / "run", epochs=2)
    assert read_ledger(tmp_path / "run" / "ledger.jsonl").count == 20
    assert resumed_loop.main(tmp_path / "run") > 0.85
    assert read_ledger(tmp_path / "run" / "ledger.jsonl").count == 50
    assert resumed_loop.main(tmp_path / "run") > 0.85, "finished before: the weights of the checkpoint"


def test_a_transformer_of_hugging_face_trains_as_it_is() -> None:
    pytest.importorskip("transformers", reason="no dependency of ours; pip install transformers")
    from examples import hugging_face

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*does not cover this model")
        assert hugging_face.main() > 0.9


def test_batch_norm_trains_with_statistics_that_are_charged(tmp_path: Path) -> None:
    result = batch_norm.main(tmp_path / "run")
    assert result.epsilon <= 3
    assert result.test_accuracy is not None
    assert result.test_accuracy > 0.85
    certificate = read_json(tmp_path / "run" / "certificate.json")
    assert "part of the release, and of its noise multiplier, in every step" in certificate["mechanism"]["statistics"]
    assert certificate["plan"]["statistics"]["kind"] == "private"
    assert privgrad(["verify", str(tmp_path / "run")]) == 0


def test_an_audit_tells_a_broken_training_from_a_private_one() -> None:
    found = audit_own_training.main()
    assert not found["plain_sgd"].holds
    assert not found["broken_dp_sgd"].holds
    assert found["dp_sgd"].holds
    assert found["broken_dp_sgd"].epsilon_lower > audit_own_training.CLAIMED


def test_a_table_is_trained_with_one_command(tmp_path: Path) -> None:
    breast_cancer.main(tmp_path)
    config = shutil.copy(Path(breast_cancer.__file__).with_suffix(".toml"), tmp_path)
    assert privgrad(["train", str(config), "--out", str(tmp_path / "run")]) == 0
    certificate = read_json(tmp_path / "run" / "certificate.json")
    assert certificate["epsilon"] <= 3
    assert certificate["evaluation"]["metrics"]["test_accuracy"] > 0.93
    assert privgrad(["verify", str(tmp_path / "run")]) == 0


def test_state_dict_keys_are_unchanged() -> None:
    import privgrad as pg

    model = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))
    before = list(model.state_dict())
    data = torch.utils.data.TensorDataset(torch.randn(20, 2), torch.zeros(20, dtype=torch.long))
    plan = pg.Plan(
        sampling=pg.PoissonSampling(expected_batch_size=5, dataset_size=20),
        steps=3,
        noise=pg.GaussianNoise(multiplier=1.0),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    private = pg.make_private(model, optimizer, data, plan, pg.supervised(torch.nn.functional.cross_entropy))
    for batch in private.batches():
        private.step(batch)
    assert list(model.state_dict()) == before
    assert type(model) is torch.nn.Sequential

"""Advice on plans and models that the command line does not meet."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import privgrad as pg
from privgrad.gradients.onepass import OnePassEngine
from privgrad.training.advice import advise


def test_weights_that_begin_at_zero_get_no_learning_rate() -> None:
    model = nn.Linear(5, 3)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    plan = pg.Plan(
        sampling=pg.PoissonSampling(expected_batch_size=16, dataset_size=64),
        steps=3,
        noise=pg.GaussianNoise(multiplier=1.0),
        mixing=pg.ModelMix(),
        clipping=pg.CoordinateClipping(p=4.0),
    )
    public = (torch.randn(32, 5), torch.randint(3, (32,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    advised = advise(plan, model, optimizer, pg.supervised(F.cross_entropy), public, OnePassEngine(), steps=0)
    found = {item.topic: item for item in advised.advice}
    assert found["learning_rate"].suggested is None
    assert "all 0" in found["learning_rate"].reason
    assert found["mixing"].suggested is not None

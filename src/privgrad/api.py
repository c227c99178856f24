"""The short way to a plan."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset

from privgrad.errors import PrivgradError, RefusedError, check_number, choice
from privgrad.mechanism.clipping import FlatClipping
from privgrad.mechanism.noise import GaussianNoise
from privgrad.mechanism.plan import Plan
from privgrad.mechanism.sampling import PoissonSampling
from privgrad.privacy.adjacency import Adjacency
from privgrad.privacy.events import Accountant
from privgrad.training.batches import size_of


def dp_sgd(
    dataset: Dataset[Any],
    *,
    epsilon: float,
    delta: float,
    batch_size: float,
    epochs: float | None = None,
    steps: int | None = None,
    max_norm: float = 1.0,
    adjacency: Adjacency | str = Adjacency.ZERO_OUT,
    accountant: Accountant | str = Accountant.PLD,
) -> Plan:
    """DP-SGD (arXiv:1607.00133) on `dataset`, calibrated to (epsilon, delta): Poisson sampling, flat clipping, Gaussian noise.

    batch_size: the EXPECTED batch size. epochs or steps: one of them; steps = round(epochs / q).

    Guarantee: the plan's epsilon at delta is at most the given one.

    Raises:
        RefusedError: adjacency "add_remove", under which nothing may be derived from the data set's size.
    """
    if adjacency == Adjacency.ADD_REMOVE:
        raise RefusedError(
            "dp_sgd derives the sampling rate from the size of the data set, which add_remove keeps private; build a Plan with "
            "PoissonSampling(rate=..., divisor=...)"
        )
    if (epochs is None) == (steps is None):
        raise PrivgradError("give epochs or steps, one of the two")
    sampling = PoissonSampling(expected_batch_size=batch_size, dataset_size=size_of(dataset))
    if epochs is not None:
        check_number("epochs", epochs, above=0)
        steps = sampling.steps_in(epochs)
    assert steps is not None
    plan = Plan(
        sampling=sampling,
        steps=steps,
        clipping=FlatClipping(max_norm=max_norm),
        noise=GaussianNoise(),
        adjacency=choice("adjacency", Adjacency, adjacency),
        accountant=choice("accountant", Accountant, accountant),
        delta=delta,
    )
    return plan.calibrate(epsilon)

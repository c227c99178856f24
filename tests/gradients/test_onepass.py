"""The one-pass engine against a loop of batch-of-one backward passes."""

from __future__ import annotations

import warnings

import pytest
import torch

from privgrad.gradients.onepass import OnePassEngine
from tests.gradients.compare import agrees
from tests.gradients.operators import CASES, squares


@pytest.fixture(autouse=True)
def _no_fallback() -> None:
    """A model that falls back would agree whatever the rules do."""
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["flat", "tensor", "spanning"])
@pytest.mark.parametrize("name", CASES)
def test_operators_agree_with_a_loop(name: str, kind: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    model = case.make().to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agrees(OnePassEngine(), model, squares, case.batch(dtype), kind=kind, separable=kind == "spanning")

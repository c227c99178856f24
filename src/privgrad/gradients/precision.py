"""Norms and sums have all bits of float32: rounded apart, they would not bound what a record contributes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from privgrad.errors import PrivgradError

_PLACES = ("mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn", "cuda.matmul")
"""Where torch 2.9 and later keep a precision of their own, under torch.backends."""
_EXACT = ("none", "ieee")


def check_precision(device: torch.device) -> None:
    """Refuse a step whose products would have fewer bits.

    Raises:
        PrivgradError: autocast around the whole step, or float32 products in TF32 or bfloat16.
    """
    if torch.is_autocast_enabled(device.type):
        raise PrivgradError(
            "the step runs inside torch.autocast, which would round norms and sums, and so move a sum by more than a record "
            "may; take the step out of it, and put autocast into loss_fn, around the model"
        )
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set by the newer names below
        precision = "highest"
    if precision != "highest":
        raise PrivgradError(_message("torch's float32 matmul precision", precision, "highest"))
    for place in _PLACES:
        precision = getattr(_backend(place), "fp32_precision", "none")
        if precision not in _EXACT:
            raise PrivgradError(_message(f"torch.backends.{place}.fp32_precision", precision, "ieee"))


def _message(setting: str, precision: str, exact: str) -> str:
    return (
        f"{setting} is {precision!r}, which would round norms and sums, and so move a sum by more than a record may; set it to "
        f"{exact!r}, and for speed put autocast into loss_fn"
    )


def _backend(place: str) -> Any:
    """torch.backends.PLACE, or None where this torch has no such thing."""
    found: Any = torch.backends
    for name in place.split("."):
        found = getattr(found, name, None)
    return found


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """cuDNN with all bits of float32: by default it takes ten of them (TF32), and a sum would exceed the norm's bound."""
    cudnn, conv = torch.backends.cudnn, _backend("cudnn.conv")
    if conv is None:  # before torch 2.9
        with cudnn.flags(cudnn.enabled, cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False):
            yield
        return
    before, conv.fp32_precision = conv.fp32_precision, "ieee"
    try:
        yield
    finally:
        conv.fp32_precision = before

"""Norms and sums have all bits of float32: rounded apart, they would not bound what a record contributes."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from privgrad.errors import PrivgradError


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
    if (precision := torch.get_float32_matmul_precision()) != "highest":
        raise PrivgradError(
            f"torch's float32 matmul precision is {precision!r}, which would round norms and sums, and so move a sum by more "
            "than a record may; set it to 'highest' (torch.set_float32_matmul_precision), and for speed put autocast into loss_fn"
        )


def exact_convolutions() -> AbstractContextManager[None]:
    """cuDNN with all bits of float32: by default it takes ten of them (TF32), and a sum would exceed the norm's bound."""
    now = torch.backends.cudnn
    return now.flags(enabled=now.enabled, benchmark=now.benchmark, deterministic=now.deterministic, allow_tf32=False)

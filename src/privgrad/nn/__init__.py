"""Layers and models that behave under differential privacy, and the detector of those that do not."""

from privgrad.nn.convert import convert
from privgrad.nn.coupling import find_coupling
from privgrad.nn.finding import Finding
from privgrad.nn.probe import PublicProbe, SyntheticProbe
from privgrad.nn.public_norm import FrozenBatchNorm, PrivateBatchNorm, PublicBatchNorm

__all__ = [
    "Finding",
    "FrozenBatchNorm",
    "PrivateBatchNorm",
    "PublicBatchNorm",
    "PublicProbe",
    "SyntheticProbe",
    "convert",
    "find_coupling",
]

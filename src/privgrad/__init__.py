"""privgrad: train PyTorch models with differential privacy.

The object that runs a step is the object that is accounted for.
"""

from privgrad import nn
from privgrad.api import dp_sgd
from privgrad.errors import PrivgradError, RefusedError, VerificationError
from privgrad.mechanism.clipping import CoordinateClipping, FlatClipping
from privgrad.mechanism.embedding import GradientEmbedding
from privgrad.mechanism.groups import RandomGroups
from privgrad.mechanism.layerwise import AutomaticClipping, LayerwiseClipping
from privgrad.mechanism.mixing import ModelMix
from privgrad.mechanism.noise import GaussianNoise
from privgrad.mechanism.plan import Plan
from privgrad.mechanism.private_statistics import PrivateStatistics
from privgrad.mechanism.sampling import (
    FixedSizeSampling,
    FullBatch,
    PoissonSampling,
    ShuffledBatches,
    TruncatedPoissonSampling,
)
from privgrad.mechanism.sparsification import RandomSparsification
from privgrad.mechanism.statistics import PublicStatistics
from privgrad.mechanism.thresholds import PrivateThresholds, PublicThresholds, QuantileThresholds
from privgrad.privacy.adjacency import Adjacency, Example, User
from privgrad.privacy.events import Accountant
from privgrad.privacy.ledger import Ledger
from privgrad.training.evaluation import DeclaredSplit
from privgrad.training.loss import supervised
from privgrad.training.private import Private, Spent, make_private
from privgrad.training.trainer import Result, Trainer

__all__ = [
    "Accountant",
    "Adjacency",
    "AutomaticClipping",
    "CoordinateClipping",
    "DeclaredSplit",
    "Example",
    "FixedSizeSampling",
    "FlatClipping",
    "FullBatch",
    "GaussianNoise",
    "GradientEmbedding",
    "LayerwiseClipping",
    "Ledger",
    "ModelMix",
    "Plan",
    "PoissonSampling",
    "Private",
    "PrivateStatistics",
    "PrivateThresholds",
    "PrivgradError",
    "PublicStatistics",
    "PublicThresholds",
    "QuantileThresholds",
    "RandomGroups",
    "RandomSparsification",
    "RefusedError",
    "Result",
    "ShuffledBatches",
    "Spent",
    "Trainer",
    "TruncatedPoissonSampling",
    "User",
    "VerificationError",
    "dp_sgd",
    "make_private",
    "nn",
    "supervised",
]

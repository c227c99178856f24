"""Membership inference: was this record in the training? By its loss, or by what other trainings make of it (arXiv:2112.03570).

An attack is a score for each record, higher where the record rather was in. `membership` says how good the scores are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from privgrad.audit.bounds import epsilon_from_rates
from privgrad.errors import PrivgradError, check_number

FALSE_POSITIVE_RATES = (0.001, 0.01, 0.1)
"""At which the true positive rate is stated: an attack that names a few records with certainty is a bad one to suffer."""
_ENOUGH = 32
"""From so many references of each kind on, each record has a spread of its own; below, all records share one."""


@dataclass(frozen=True)
class MembershipAudit:
    """How well scores tell members from others.

    tpr: {false positive rate: the largest true positive rate that some threshold reaches within it}. auc: the chance of a
    member to score higher than another. epsilon_lower: see `membership`. trials: how many scores it rests on.
    """

    auc: float
    tpr: Mapping[float, float]
    epsilon_lower: float
    delta: float
    confidence: float
    trials: int
    members: NDArray[np.float64] = field(repr=False, compare=False)
    others: NDArray[np.float64] = field(repr=False, compare=False)


def membership(
    members: Tensor | Sequence[float],
    others: Tensor | Sequence[float],
    *,
    delta: float = 1e-5,
    confidence: float = 0.95,
    seed: int = 0,
) -> MembershipAudit:
    """What scores of records that were in (members) and of records that were not (others) show.

    epsilon_lower: a threshold is chosen on one random half of the scores, and the other half is counted with it
    (`bounds.epsilon_from_rates`). seed: of the halves.

    Guarantee (of the audit): `epsilon_lower` exceeds the true epsilon with a chance of at most 1 - confidence IF a coin decided
    who is a member and scores are independent of one another (each of a training of its own, say). Scores of one model are
    nearly so, and no more than that; `one_run.audit_training` does not need it. Members and others that differ by anything else
    (time, source) show a difference that is no leak.
    """
    check_number("delta", delta, at_least=0, below=1)
    inside, outside = _scores("members", members), _scores("others", others)
    chance = np.random.default_rng(seed)
    halves = [np.array_split(chance.permutation(scores), 2) for scores in (inside, outside)]
    (chosen_by, counted), (chosen_by_others, counted_others) = halves
    threshold = _best_threshold(chosen_by, chosen_by_others, delta, confidence)
    hits, alarms = int((counted > threshold).sum()), int((counted_others > threshold).sum())
    lower = epsilon_from_rates(hits, len(counted), alarms, len(counted_others), delta, confidence)
    curve = {rate: _true_positive_rate(inside, outside, rate) for rate in FALSE_POSITIVE_RATES}
    trials = len(inside) + len(outside)
    return MembershipAudit(_auc(inside, outside), curve, lower, delta, confidence, trials, inside, outside)


def loss_scores(losses: Tensor) -> Tensor:
    """The loss threshold attack (arXiv:1709.01604): members have the smaller losses. [records] to [records]."""
    return -losses.detach().to(torch.float64)


def confidence_scores(logits: Tensor, labels: Tensor) -> Tensor:
    """log(p / (1 - p)) of the right class, nearly normal over trainings: what LiRA compares (arXiv:2112.03570).

    logits: [records, classes]; labels: [records]. Computed so that nothing overflows.
    """
    logarithms = functional.log_softmax(logits.detach().to(torch.float64), dim=1)
    right = logarithms.gather(1, labels[:, None])[:, 0]
    rest = logarithms.scatter(1, labels[:, None], -math.inf).logsumexp(1)
    return right - rest


def likelihood_ratio_scores(observed: Tensor, references: Tensor, included: Tensor) -> Tensor:
    """LiRA (arXiv:2112.03570, algorithm 1): the log-likelihood ratio of each record's membership, from reference models.

    observed: [records], the attacked model's `confidence_scores`. references: [models, records], those of models that the
    attacker trained on records drawn likewise. included: [models, records], true where a record was in a model's training. A
    record that was in none is judged by the models without it alone (the offline attack), by how unusual its score is there; one
    that was in all of them likewise.
    """
    models = references.shape[0] if references.dim() == 2 else 0
    shape = (models, len(observed))
    if references.shape != shape or included.shape != shape or models < 2:
        raise PrivgradError(
            f"references is {list(references.shape)} and included {list(included.shape)} for {len(observed)} records; expected "
            "[models, records] both, of at least two models"
        )
    inside, known = _fits(references, included.bool())
    outside, without = _fits(references, ~included.bool())
    ratio = _log_density(observed, inside) - _log_density(observed, outside)
    too_high = -torch.special.log_ndtr((outside[0] - observed) / outside[1])
    too_low = torch.special.log_ndtr((observed - inside[0]) / inside[1])
    return torch.where(known & without, ratio, torch.where(without, too_high, too_low))


def _fits(references: Tensor, chosen: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """([records] means, [records] spreads) over the chosen models of each record, and where there is any."""
    values = references.to(torch.float64)
    count = chosen.sum(0)
    mean = torch.where(chosen, values, 0.0).sum(0) / count.clamp(min=1)
    squares = torch.where(chosen, (values - mean).square(), 0.0).sum(0)
    own = squares / (count - 1).clamp(min=1)
    together = squares.sum() / (count - 1).clamp(min=0).sum().clamp(min=1)
    variance = torch.where(count >= _ENOUGH, own, together)
    return (mean, variance.clamp(min=1e-12).sqrt()), count > 0


def _log_density(values: Tensor, fit: tuple[Tensor, Tensor]) -> Tensor:
    mean, spread = fit
    return -0.5 * ((values.to(torch.float64) - mean) / spread).square() - spread.log()


def _scores(name: str, given: Tensor | Sequence[float]) -> NDArray[np.float64]:
    scores = np.asarray(given.detach().cpu() if isinstance(given, Tensor) else given, dtype=np.float64)
    if scores.ndim != 1 or len(scores) < 2 or np.isnan(scores).any():
        raise PrivgradError(
            f"{name} has the shape {list(scores.shape)}, or a NaN; expected at least two scores, [records]"
        )
    return scores


def _auc(inside: NDArray[np.float64], outside: NDArray[np.float64]) -> float:
    """P[member scores higher], ties counting one half."""
    ordered = np.sort(outside)
    below = np.searchsorted(ordered, inside, side="left") + np.searchsorted(ordered, inside, side="right")
    return float(below.mean() / (2 * len(outside)))


def _true_positive_rate(inside: NDArray[np.float64], outside: NDArray[np.float64], rate: float) -> float:
    """The best that a threshold reaches with at most this share of false positives."""
    allowed = math.floor(rate * len(outside) + 1e-9)
    threshold = np.sort(outside)[::-1][allowed] if allowed < len(outside) else -math.inf
    return float((inside > threshold).mean())


def _best_threshold(
    inside: NDArray[np.float64], outside: NDArray[np.float64], delta: float, confidence: float
) -> float:
    """The threshold with the largest bound on these scores, among the quantiles of both."""
    grid = np.concatenate([[0.0005, 0.001, 0.002, 0.005], np.linspace(0.01, 0.99, 50), [0.995, 0.998, 0.999, 0.9995]])
    tried = np.unique(np.quantile(np.concatenate([inside, outside]), grid, method="lower"))
    bounds = [
        epsilon_from_rates(
            int((inside > at).sum()), len(inside), int((outside > at).sum()), len(outside), delta, confidence
        )
        for at in tried
    ]
    return float(tried[int(np.argmax(bounds))])

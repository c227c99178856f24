"""The one-run audit: many canaries in ONE training, each in or out by a coin of its own (arXiv:2305.08846).

Black box: `audit_training` takes any training, privgrad's or not, as a function. White box: `audit_run` trains a plan with Dirac
canaries (arXiv:2202.12219), each of which pulls one coordinate of its own as hard as it can, and reads the released gradients.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import TensorDataset

from privgrad.audit.bounds import epsilon_from_one_run, gaussian_epsilon_from_one_run
from privgrad.errors import PrivgradError, RefusedError, check_count, check_number
from privgrad.gradients.contract import LossFn, Tree
from privgrad.mechanism.plan import Plan
from privgrad.mechanism.sampling import FullBatch, PoissonSampling
from privgrad.privacy.adjacency import Adjacency, User
from privgrad.privacy.events import Sampler
from privgrad.training.private import Private, make_private
from privgrad.training.progress import ProgressDisplay, Silent

Trained = TypeVar("Trained")

GUESS_FRACTION = 0.05
"""Of the canaries, about how many a guess is made: half of them the highest scores (in), half the lowest (out)."""
_PULL = 1e4
"""The gradient norm of a canary: far above every clipping norm."""


@dataclass(frozen=True)
class OneRunAudit:
    """What a training claims (None: nothing), and what its canaries show of it at `confidence`.

    epsilon_lower: for every mechanism. epsilon_lower_gaussian: for one whose trade-off curve is that of a Gaussian, else None.
    canaries: m; guesses: r, fixed beforehand; correct: how many of them were right. scores, inside: [m], of each canary.
    """

    epsilon_claimed: float | None
    epsilon_lower: float
    epsilon_lower_gaussian: float | None
    delta: float
    confidence: float
    canaries: int
    guesses: int
    correct: int
    scores: Tensor = field(repr=False, compare=False)
    inside: Tensor = field(repr=False, compare=False)

    @property
    def best(self) -> float:
        """The larger of the bounds that apply. (The Gaussian's, where it is one: it uses more of what is known.)"""
        return self.epsilon_lower if self.epsilon_lower_gaussian is None else self.epsilon_lower_gaussian

    def at(self, confidence: float) -> OneRunAudit:
        """The same guesses at another confidence."""
        gaussian = self.epsilon_lower_gaussian is not None
        return _concluded(
            self.scores, self.inside, self.guesses, self.epsilon_claimed, self.delta, confidence, gaussian
        )

    @property
    def holds(self) -> bool:
        """True where the canaries show no more than is claimed (always, where nothing is)."""
        return self.epsilon_claimed is None or self.best <= self.epsilon_claimed


def audit_training(
    train: Callable[[Tree], Trained],
    canaries: Tree,
    score: Callable[[Trained, Tree], Tensor],
    *,
    delta: float = 1e-5,
    claimed: float | None = None,
    gaussian: bool = False,
    guess_fraction: float = GUESS_FRACTION,
    confidence: float = 0.95,
    seed: int | None = None,
) -> OneRunAudit:
    """Audit any training by one run of it: what can an attacker show who sees what it gives away?

    canaries: a tree of tensors with one canary per row, m in all: records that a training may overfit (random inputs, wrong
    labels). train: trains once on the given canaries (those whose coin said "in"), and whatever other records it wants; what it
    returns goes to the attacker. score: [m], one number per canary, higher where it rather was in (minus its loss, say).
    delta: at which epsilon is stated. claimed: the epsilon that the training claims. gaussian: its trade-off curve is that of a
    Gaussian mechanism (DP-SGD on full batches), by which much more is shown. guess_fraction: fixed beforehand: trying several
    and keeping the best is no bound. seed: of the coins; None draws them anew.

    Guarantee (of the audit): `epsilon_lower` exceeds the true epsilon at `delta` with a chance of at most 1 - confidence.
    """
    m = _rows(canaries)
    check_number("delta", delta, at_least=0, below=1)
    check_number("guess_fraction", guess_fraction, above=0, at_most=1)
    guesses = max(2, round(guess_fraction * m))
    coins = torch.Generator().manual_seed(secrets.randbits(62) if seed is None else seed)
    inside = torch.randint(2, (m,), generator=coins).bool()
    trained = train(pytree.tree_map(lambda leaf: leaf[inside] if isinstance(leaf, Tensor) else leaf, canaries))
    scores = score(trained, canaries)
    if not isinstance(scores, Tensor) or scores.shape != (m,) or not bool(scores.isfinite().all()):
        raise PrivgradError(f"score() returned no tensor of {m} finite numbers; expected one for each canary")
    return _concluded(scores.detach().cpu(), inside, guesses, claimed, delta, confidence, gaussian)


def audit_run(
    plan: Plan,
    *,
    canaries: int = 10_000,
    model: nn.Module | None = None,
    loss_fn: LossFn | None = None,
    companions: tuple[Tensor, ...] = (),
    public: tuple[Tensor, ...] | None = None,
    guess_fraction: float = GUESS_FRACTION,
    confidence: float = 0.95,
    seed: int | None = None,
    progress: ProgressDisplay | None = None,
) -> OneRunAudit:
    """Train `plan` once, on canaries beside other records, and guess from the released gradients which canaries were in.

    The model gets a table with one coordinate for each canary, whose gradient lies in it alone. Under replace_one, a canary
    that is out is replaced by its opposite. model, loss_fn, companions: a model to train along, and the tensors of its records
    (any: they are there so that the step is a real one); none: the table alone. public: tensors of the same kind, where a stage
    needs some.

    Guarantee (of the audit): that of `audit_training`.

    Raises:
        RefusedError: a sampler that does not draw each record by itself: canaries would not be in by coins of their own.
    """
    check_count("canaries", canaries, at_least=20)
    if (model is None) != (loss_fn is None) or (model is None and (companions or public is not None)):
        raise PrivgradError("model, loss_fn and companions belong together; give them all, or none")
    audited = _forced(plan)
    replacing = plan.adjacency is Adjacency.REPLACE_ONE
    display = Silent() if progress is None else progress
    beside = Beside(model, loss_fn, canaries)

    def train(inside: Tree) -> Tensor:
        signs = torch.full((canaries,), -1.0 if replacing else 0.0)
        signs[inside[0]] = 1.0
        index = signs.nonzero()[:, 0]
        dataset = TensorDataset(*beside.rows(companions, index, signs[index]))
        shown = None if public is None else beside.rows(public, index[:0], signs[:0])
        private = make_private(
            beside,
            torch.optim.SGD(beside.parameters(), lr=0.1),
            dataset,
            audited,
            beside.losses,
            keys=torch.arange(len(dataset)) if isinstance(plan.protects, User) else None,
            public=shown,
            probe=beside.rows(tuple(tensor[:4] for tensor in companions), torch.arange(2), torch.ones(2)),
        )
        return _seen(private, beside, display)

    return audit_training(
        train,
        (torch.arange(canaries),),
        lambda seen, _: seen,
        delta=plan.delta,
        claimed=audited.epsilon(),
        gaussian=audited.mixing is None and audited.sampled.sampler is Sampler.FULL_BATCH,
        guess_fraction=guess_fraction,
        confidence=confidence,
        seed=seed,
    )


class Beside(nn.Module):
    """A model with a table of one coordinate per canary beside it. Rows are (the model's tensors ..., index, sign).

    A row with sign 0 is the model's own; else its gradient is `sign` times a large number in the table's place `index`.
    """

    def __init__(self, model: nn.Module | None, loss_fn: LossFn | None, canaries: int) -> None:
        super().__init__()
        self.model = model
        self.table = nn.Embedding(canaries, 1)
        nn.init.zeros_(self.table.weight)
        self._loss_fn = loss_fn

    def rows(self, own: tuple[Tensor, ...], index: Tensor, signs: Tensor) -> tuple[Tensor, ...]:
        """The model's own rows (a canary's are zeros), then the canaries."""
        count = len(own[0]) if own else 0
        zeros = [tensor.new_zeros((len(index), *tensor.shape[1:])) for tensor in own]
        padded = [torch.cat([tensor, zero]) for tensor, zero in zip(own, zeros, strict=True)]
        places = torch.cat([torch.zeros(count, dtype=torch.int64), index])
        return *padded, places, torch.cat([torch.zeros(count), signs])

    def losses(self, module: nn.Module, batch: Tree) -> Tensor:
        """[rows]."""
        *own, index, signs = batch
        pulled: Tensor = _PULL * signs * self.table(index)[:, 0]
        if self.model is None or self._loss_fn is None:
            return pulled
        return torch.where(signs == 0, self._loss_fn(self.model, tuple(own)), pulled)


def _forced(plan: Plan) -> Plan:
    """The plan for another number of records: the rate and the divisor that it has, as numbers."""
    sampler, q = plan.sampled.sampler, plan.sampled.rate
    if sampler is Sampler.FULL_BATCH or (sampler is Sampler.POISSON and q == 1):
        return dataclasses.replace(plan, sampling=FullBatch(divisor=_divisor(plan)))
    if sampler is Sampler.POISSON:
        return dataclasses.replace(plan, sampling=PoissonSampling(rate=q, divisor=_divisor(plan)))
    raise RefusedError(
        f"the one-run audit needs canaries that are sampled each by itself, and the plan samples by {sampler.value!r}; use "
        "poisson or full_batch, or audit a step (--kind step)"
    )


def _divisor(plan: Plan) -> float:
    return plan.divisor if plan.sampling.normaliser is None else float(plan.sampling.normaliser)


def _seen(private: Private, beside: Beside, display: ProgressDisplay) -> Tensor:
    """[canaries]: minus the sum of what was released of the table. (Gradients point upwards, and a pull is a positive one.)"""
    seen = torch.zeros(beside.table.num_embeddings, dtype=torch.float64)
    mixing = private.plan.mixing is not None
    display.start(0, private.plan.steps)
    try:
        for step, batch in enumerate(private.batches(), start=1):
            if mixing:
                private.step(batch)
            else:
                private.backward(batch)
                assert beside.table.weight.grad is not None
                seen += beside.table.weight.grad[:, 0].double()
                private.optimizer.step()
            display.step(step, "")
    finally:
        display.stop()
    return -beside.table.weight.detach()[:, 0].double() if mixing else seen


def _concluded(
    scores: Tensor,
    inside: Tensor,
    guesses: int,
    claimed: float | None,
    delta: float,
    confidence: float,
    gaussian: bool,
) -> OneRunAudit:
    order = scores.argsort()
    low = guesses // 2
    called_in, called_out = order[len(order) - (guesses - low) :], order[:low]
    correct = int(inside[called_in].sum()) + int((~inside[called_out]).sum())
    counts = correct, guesses, len(scores)
    lower = epsilon_from_one_run(*counts, delta, confidence)
    shown = gaussian_epsilon_from_one_run(*counts, delta, confidence) if gaussian else None
    return OneRunAudit(
        claimed, lower, shown, delta, confidence, len(scores), guesses, correct, scores=scores, inside=inside
    )


def _rows(canaries: Tree) -> int:
    counts = {len(leaf) if leaf.dim() else 0 for leaf in pytree.tree_leaves(canaries) if isinstance(leaf, Tensor)}
    if len(counts) != 1 or min(counts) < 20:
        raise PrivgradError(
            f"canaries has {sorted(counts) or 'no'} rows; expected tensors with the same number of rows, at least 20: one each"
        )
    return counts.pop()

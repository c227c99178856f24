"""Small things that many tests need."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import privgrad as pg
from privgrad.audit.step import Direction, linear_loss
from privgrad.gradients.contract import Engine, Fold, LossFn, Sums, Tree
from privgrad.gradients.onepass import OnePassEngine
from privgrad.mechanism.plan import Plan
from privgrad.mechanism.states import ClippedSum
from privgrad.mechanism.step import Reduce, StepRunner
from privgrad.privacy.ledger import Ledger

__all__ = ["Direction", "as_vector", "full_batch_plan", "linear_loss", "loop_gradients", "rows", "runner"]


def full_batch_plan(count: int, steps: int = 1, multiplier: float = 0.0, **stages: object) -> Plan:
    """Every unit in every step, so that only the inner mechanism is random."""
    seed = stages.pop("seed", None)
    return Plan(
        sampling=pg.PoissonSampling(rate=1.0, divisor=float(count)),
        steps=steps,
        noise=stages.pop("noise", pg.GaussianNoise(multiplier=multiplier, insecure_seed=seed)),
        **stages,
    )


def runner(
    plan: Plan,
    model: nn.Module,
    loss_fn: LossFn,
    *,
    engine: Engine | None = None,
    public: object = None,
    reduce: Reduce | None = None,
    apart: bool = False,
) -> StepRunner:
    """A step runner with an in-memory ledger. apart: of groups, that rows are known not to see one another."""
    ledger = Ledger(plan.terms())
    return StepRunner(plan, model, loss_fn, engine or OnePassEngine(), ledger, public, reduce, apart=lambda: apart)


def as_vector(sums: Sums | ClippedSum) -> Tensor:
    """All slots of a sum side by side, copied."""
    return torch.cat([value.flatten() for value in sums.values.values()])


def rows(*inputs: Tensor) -> tuple[Tree, Fold]:
    """A batch whose rows are units."""
    return inputs, Fold.identity(len(inputs[0]))


def loop_gradients(model: nn.Module, loss_fn: LossFn, batch: Tree) -> dict[str, Tensor]:
    """{parameter: [rows, *shape]} by a loop of ordinary batch-of-one backward passes: the yardstick."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    collected: dict[str, list[Tensor]] = {name: [] for name in parameters}
    count = len(batch[0])
    for row in range(count):
        one = tuple(leaf[row : row + 1] for leaf in batch)
        gradients = torch.autograd.grad(
            loss_fn(model, one).sum(), list(parameters.values()), allow_unused=True, materialize_grads=True
        )
        for name, gradient in zip(parameters, gradients, strict=True):
            collected[name].append(gradient)
    return {name: torch.stack(values) for name, values in collected.items()}

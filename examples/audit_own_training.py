"""My training claims epsilon = 1: what can an attacker show? An audit of loops that are not privgrad's, by one run of each.

Canaries are records that a training can only learn by heart (random inputs with random labels); a coin decides for each whether
it is in. Afterwards an attacker sees the model, and guesses by the losses which canaries were in.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import privgrad as pg
from privgrad.audit.one_run import OneRunAudit, audit_training

CLAIMED, DELTA, STEPS, RATE, MAX_NORM = 1.0, 1e-5, 20, 0.5, 1.0
FEATURES, CANARIES = 3000, 1600
Rows = tuple[Tensor, Tensor]


def plan_for(rows: Rows) -> pg.Plan:
    """DP-SGD on full batches at the claimed epsilon."""
    sampling = pg.FullBatch(divisor=float(len(rows[1])))
    return pg.Plan(sampling=sampling, steps=STEPS, clipping=pg.FlatClipping(MAX_NORM), delta=DELTA).calibrate(CLAIMED)


def plain_sgd(rows: Rows) -> nn.Module:
    """No privacy at all."""
    model = nn.Linear(FEATURES, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(rows[0]), rows[1]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model


def broken_dp_sgd(rows: Rows) -> nn.Module:
    """Clips the MEAN gradient and adds the noise that would do if each record's gradient were clipped: a mistake often made."""
    model = nn.Linear(FEATURES, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    noise = float(plan_for(rows).noise.multiplier or 0.0) * MAX_NORM / len(rows[1])
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(rows[0]), rows[1]).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad += noise * torch.randn_like(parameter)
        optimizer.step()
    return model


def dp_sgd(rows: Rows) -> nn.Module:
    """The same with privgrad."""
    model = nn.Linear(FEATURES, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    loss_fn = pg.supervised(F.cross_entropy)
    private = pg.make_private(model, optimizer, TensorDataset(*rows), plan_for(rows), loss_fn)
    for batch in private.batches():
        private.step(batch)
    return model


def audit(train: Callable[[Rows], nn.Module]) -> OneRunAudit:
    """One run of a training, with all that an attacker needs of it: the model's losses on the canaries."""
    torch.manual_seed(0)
    canaries = torch.randn(CANARIES, FEATURES), torch.randint(2, (CANARIES,))

    def score(model: nn.Module, rows: Rows) -> Tensor:
        return -F.cross_entropy(model(rows[0]), rows[1], reduction="none")

    return audit_training(train, canaries, score, delta=DELTA, claimed=CLAIMED, guess_fraction=0.1)


def main() -> dict[str, OneRunAudit]:
    """Audit all three, and say what each shows."""
    found = {train.__name__: audit(train) for train in (plain_sgd, broken_dp_sgd, dp_sgd)}
    for name, result in found.items():
        verdict = "not refuted" if result.holds else "REFUTED"
        print(
            f"{name}: {result.correct} of {result.guesses} guesses right; epsilon is at least {result.epsilon_lower:.2f} "
            f"(95 % sure), claimed {CLAIMED:g}: {verdict}"
        )
    return found


if __name__ == "__main__":
    main()

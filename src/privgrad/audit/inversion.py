"""Gradient inversion: what can be rebuilt of a record from one released gradient of it.

An attacker who knows the weights, the model and the mechanism looks for a record whose gradient, masked and clipped as the
mechanism does it, agrees with the release: by L2 distance (`deep_leakage`, DLG) or by direction, with a prior for smooth images
(`inverting_gradients`). What is found is shown in pictures and figures; how much noise protects is the ledger's to say.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from privgrad.errors import PrivgradError, check_count
from privgrad.gradients.contract import Encoding, Fold, Identity, LossFn, trainable
from privgrad.gradients.onepass import OnePassEngine
from privgrad.mechanism.plan import Plan
from privgrad.mechanism.sampling import FullBatch
from privgrad.mechanism.stage import Clipping
from privgrad.mechanism.step import StepRunner
from privgrad.privacy.ledger import Ledger


@dataclass(frozen=True)
class Observed:
    """Everything that the attacker knows of a step on one record.

    update: what was released, {parameter: tensor}. encoding, clipping: how the record's gradient was masked and clipped before
    the noise; both are public. shape: of a record's input. classes: of labels.
    """

    model: nn.Module
    loss_fn: LossFn
    update: Mapping[str, Tensor]
    encoding: Encoding
    clipping: Clipping
    shape: tuple[int, ...]
    classes: int

    @property
    def released(self) -> Tensor:
        """[coordinates] that take part in the release, block by block."""
        vectors = self.encoding.encode({name: value.unsqueeze(0) for name, value in self.update.items()})
        slots = [slot for block in self.clipping.partition(self.encoding.slots()) for slot in block.slots]
        return torch.cat([vectors[slot].flatten() for slot in slots])

    def expected(self, inputs: Tensor, target: Tensor) -> Tensor:
        """The same [coordinates] for a record of the attacker's own, without noise; differentiable by the record."""
        parameters = trainable(self.model)
        losses = self.loss_fn(self.model, (inputs, target))
        gradients = torch.autograd.grad(losses.sum(), list(parameters.values()), create_graph=True)
        vectors = self.encoding.encode({name: g.unsqueeze(0) for name, g in zip(parameters, gradients, strict=True)})
        blocks = self.clipping.partition(self.encoding.slots())
        flats = [torch.cat([vectors[slot].flatten() for slot in block.slots]) for block in blocks]
        norms = torch.stack([torch.linalg.vector_norm(flat) for flat in flats])
        weights = self.clipping.weights(norms[None], norms.new_tensor([block.max_norm for block in blocks]))[0]
        clipped = []
        for block, flat, weight in zip(blocks, flats, weights, strict=True):
            cap = block.max_coordinate
            clipped.append(flat * weight if cap is None else (flat * weight).clamp(-cap, cap))
        return torch.cat(clipped)


@dataclass(frozen=True)
class Reconstruction:
    """What an attack found. inputs: [*shape]. label: the class it ended with. objective: what it made small."""

    inputs: Tensor
    label: int
    objective: float


def observe(plan: Plan, model: nn.Module, loss_fn: LossFn, inputs: Tensor, label: Tensor, classes: int) -> Observed:
    """Run the first step of `plan` on one record, inputs [1, *shape] and label [1], and keep what an attacker sees.

    The attacker's best case: the record is sampled for certain, alone, and the sum is not divided. (A ramp of sparsification
    starts at 0: attack a plan with ramp=False.)

    Raises:
        PrivgradError: a plan whose release is not the clipped and noised gradient of one record (groups, mixing), or whose
            clipping norms come from elsewhere (thresholds).
    """
    for stage in ("groups", "mixing", "thresholds"):
        if getattr(plan, stage) is not None:
            raise PrivgradError(f"gradient inversion attacks one record's released gradient; leave out plan.{stage}")
    forced = dataclasses.replace(plan, sampling=FullBatch(divisor=1.0))
    runner = StepRunner(forced, model, loss_fn, OnePassEngine(), Ledger(forced.terms()))
    release = runner.release((inputs, label), Fold.identity(1))
    assert release.update is not None  # mixing was refused above
    shapes = {name: parameter.shape for name, parameter in trainable(model).items()}
    encoding: Encoding = Identity(shapes)
    if plan.compression is not None:
        encoding = plan.compression.encoding(runner.states["compression"], shapes)
    return Observed(model, loss_fn, release.update, encoding, plan.clipping, tuple(inputs.shape[1:]), classes)


def inferred_label(observed: Observed) -> int:
    """The class whose row of the last layer has the largest released gradient (after iDLG, arXiv:2001.02610).

    Of cross entropy, a row's gradient is (p_c - y_c) times the features, and |p_c - y_c| is largest for the true class: all
    other p_c add up to it. Needs at least three classes.
    """
    if observed.classes < 3:
        raise PrivgradError(f"there are {observed.classes} classes; the label is inferred for at least three: give it")
    squares = torch.zeros(observed.classes, dtype=torch.float64)
    for value in reversed(list(observed.update.values())):
        if value.dim() > 2 or value.shape[0] != observed.classes:
            break
        squares += value.reshape(observed.classes, -1).square().sum(1).double().cpu()
    if not bool(squares.any()):
        raise PrivgradError("the last layer has no row for each class, or nothing of it was released; give the label")
    return int(squares.argmax())


def deep_leakage(
    observed: Observed, *, label: int | None = None, iterations: int = 300, restarts: int = 1, seed: int = 0
) -> Reconstruction:
    """DLG (arXiv:1906.08935, algorithm 1): L-BFGS on the squared distance between the two gradients.

    label: a known one, or None: a soft label is looked for together with the record. iterations: of L-BFGS, for each of
    `restarts` starts from standard normal pixels. objective: squared distance over the squared norm of the release.
    """
    check_count("iterations", iterations)
    released = observed.released
    scale = released.square().sum()

    def distance(inputs: Tensor, target: Tensor) -> Tensor:
        return (observed.expected(inputs, target) - released).square().sum() / scale

    def descend(inputs: Tensor, logits: Tensor | None) -> None:
        searched = [inputs] if logits is None else [inputs, logits]
        optimizer = torch.optim.LBFGS(
            searched,
            max_iter=iterations,
            history_size=50,
            tolerance_grad=0,
            tolerance_change=0,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            value = distance(inputs, _target(observed, label, logits))
            for leaf, gradient in zip(searched, torch.autograd.grad(value, searched), strict=True):
                leaf.grad = gradient
            return value

        optimizer.step(closure)  # type: ignore[no-untyped-call]

    return _best_of(observed, distance, descend, label, restarts, seed)


def inverting_gradients(
    observed: Observed,
    *,
    label: int | None = None,
    iterations: int = 1000,
    variation: float = 1e-2,
    rate: float = 0.1,
    box: tuple[float, float] = (-1.0, 1.0),
    restarts: int = 1,
    seed: int = 0,
) -> Reconstruction:
    """Inverting Gradients (arXiv:2003.14053, equation 4): 1 - cosine + variation * total variation, by Adam on signs.

    For images [channels, height, width] with pixels in `box`. rate: Adam's, a tenth after 3/8, 5/8 and 7/8 of the iterations.
    label: as in `deep_leakage`.
    """
    if len(observed.shape) != 3:
        raise PrivgradError(
            f"records have the shape {list(observed.shape)}; total variation needs images: [channels, height, width]"
        )
    check_count("iterations", iterations)
    released = observed.released

    def objective(inputs: Tensor, target: Tensor) -> Tensor:
        expected = observed.expected(inputs, target)
        return 1 - torch.cosine_similarity(expected, released, dim=0) + variation * total_variation(inputs)

    def descend(inputs: Tensor, logits: Tensor | None) -> None:
        searched = [inputs] if logits is None else [inputs, logits]
        optimizer = torch.optim.Adam(searched, lr=rate)
        milestones = [iterations * part // 8 for part in (3, 5, 7)]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
        for _ in range(iterations):
            gradients = torch.autograd.grad(objective(inputs, _target(observed, label, logits)), searched)
            inputs.grad = gradients[0].sign()
            if logits is not None:
                logits.grad = gradients[1]
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                inputs.clamp_(*box)

    return _best_of(observed, objective, descend, label, restarts, seed)


def total_variation(images: Tensor) -> Tensor:
    """The mean absolute difference of neighbouring pixels of images [..., height, width]."""
    down, right = images.diff(dim=-2).abs(), images.diff(dim=-1).abs()
    return down.mean() + right.mean()


def _target(observed: Observed, label: int | None, logits: Tensor | None) -> Tensor:
    """A class [1], or a soft label [1, classes]."""
    if logits is not None:
        return logits.softmax(1)
    return torch.tensor([label], device=next(observed.model.parameters()).device)


def _best_of(
    observed: Observed,
    objective: Callable[[Tensor, Tensor], Tensor],
    descend: Callable[[Tensor, Tensor | None], None],
    label: int | None,
    restarts: int,
    seed: int,
) -> Reconstruction:
    """The best end of several random starts; `descend` moves inputs (and the label's logits) in place."""
    check_count("restarts", restarts)
    if label is not None:
        check_count("label", label, at_least=0, at_most=observed.classes - 1)
    chance = torch.Generator().manual_seed(seed)
    like = next(observed.model.parameters())
    best: Reconstruction | None = None
    for _ in range(restarts):
        inputs = torch.randn(1, *observed.shape, generator=chance).to(like).requires_grad_()
        logits = None
        if label is None:
            logits = torch.randn(1, observed.classes, generator=chance).to(like).requires_grad_()
        descend(inputs, logits)
        value = float(objective(inputs, _target(observed, label, logits)).detach())
        value = value if math.isfinite(value) else math.inf
        found = int(logits.argmax()) if logits is not None else label
        if best is None or value < best.objective:
            best = Reconstruction(inputs.detach()[0], int(found or 0), value)
    assert best is not None
    return best

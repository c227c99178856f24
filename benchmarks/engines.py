"""One training step of every engine: forward, backward, (clip, noise,) and the optimizer."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import privgrad as pg
from benchmarks.models import Bench
from privgrad.gradients import products
from privgrad.gradients.contract import Engine, Fold
from privgrad.gradients.memory import keep_pages
from privgrad.gradients.onepass import OnePassEngine
from privgrad.gradients.vmap import VmapEngine
from privgrad.mechanism.plan import Plan
from privgrad.mechanism.step import StepRunner
from privgrad.privacy.ledger import Ledger

Step = Callable[[], None]
LEARNING_RATE = 0.1
GROUP_SIZE = 32
SPARSE = pg.RandomSparsification(final_ratio=0.9, ramp=False, structure="rows")
LAYERS = pg.RandomSparsification(final_ratio=0.9, ramp=False, structure="layers", refreshes=100)
"""Other layers at every step: the benchmark's epoch has 100."""
ELEMENTS = pg.RandomSparsification(final_ratio=0.9, ramp=False)
BARE = pg.RandomSparsification(final_ratio=0.999, ramp=False, structure="rows")
"""Hardly a row is left: what a private step costs without weight gradients, norms and noise."""


class SkippedError(Exception):
    """An engine that cannot run here; the message says why."""


def plain(bench: Bench, parts: int = 1, around: Callable[[], AbstractContextManager[Any]] = nullcontext) -> Step:
    """The step without privacy; in parts, its gradients accumulate. around: a context for its forward pass."""
    model, (inputs, targets) = bench.make(), bench.batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)

    def step() -> None:
        optimizer.zero_grad()
        for some, labels in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
            with around():
                loss = F.cross_entropy(model(some), labels) / parts
            torch.autograd.backward(loss)
        optimizer.step()

    return step


class _Products(TorchFunctionMode):
    """Linear layers by privgrad's products."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.linear or kwargs:
            return func(*args, **(kwargs or {}))
        inputs, weight, *bias = args
        flat = products.linear(inputs.reshape(-1, inputs.shape[-1]), weight, *bias)
        return flat.view(*inputs.shape[:-1], len(weight))


def tuned(bench: Bench) -> Step:
    """The step without privacy, with all that privgrad does for any training: it keeps its pages, and takes faster products."""
    keep_pages()
    return plain(bench, around=_Products)


def microbatched(bench: Bench) -> Step:
    """The step without privacy in small parts, as an engine under memory pressure would do it."""
    return plain(bench, len(bench.batch()[0]) // bench.micro)


def private(bench: Bench, engine: Engine | None = None, **stages: Any) -> Step:
    """privgrad's step as `make_private` runs it: clipped sum, ledger, noise from the cryptographic generator, optimizer."""
    model, batch = bench.make(), bench.batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    rows = len(batch[0])
    plan = Plan(
        sampling=pg.PoissonSampling(rate=0.01, divisor=float(rows)),
        steps=10**6,
        noise=pg.GaussianNoise(multiplier=1.0),
        **stages,
    )
    loss = pg.supervised(F.cross_entropy)
    runner = StepRunner(plan, model, loss, engine or OnePassEngine(), Ledger(plan.terms()), apart=lambda: True)
    fold = Fold.identity(rows)
    parameters = dict(model.named_parameters())

    def step() -> None:
        optimizer.zero_grad()
        update = runner.release(batch, fold).update or {}
        for name, parameter in parameters.items():
            parameter.grad = update[name]
        optimizer.step()

    return step


def unnoised(bench: Bench, **stages: Any) -> Step:
    """privgrad's clipped sum and the optimizer, without the noise: what of a step is the engine's. Not private."""
    model, batch = bench.make(), bench.batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    plan = Plan(
        sampling=pg.PoissonSampling(rate=0.01, divisor=1.0), steps=1, noise=pg.GaussianNoise(multiplier=0.0), **stages
    )
    runner = StepRunner(plan, model, pg.supervised(F.cross_entropy), OnePassEngine(), Ledger(plan.terms()))
    fold = Fold.identity(len(batch[0]))

    def step() -> None:
        optimizer.zero_grad()
        sums = runner.clipped_sum(batch, fold)
        for name, parameter in model.named_parameters():
            parameter.grad = sums.values[name].div_(len(batch[0]))
        optimizer.step()

    return step


def grouped(bench: Bench) -> Step:
    """Batch Clipping in random groups."""
    return private(bench, groups=pg.RandomGroups(max(1, len(bench.batch()[0]) // GROUP_SIZE)))


def opacus(bench: Bench, ghost: bool) -> Step:
    """Opacus as its PrivacyEngine would put it together."""
    if importlib.util.find_spec("opacus") is None:
        raise SkippedError("opacus is not installed")
    from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    plain_model, (inputs, targets) = bench.make(), bench.batch()
    sgd = torch.optim.SGD(plain_model.parameters(), lr=LEARNING_RATE)
    options = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": len(inputs)}
    model: nn.Module
    if ghost:
        model = GradSampleModuleFastGradientClipping(plain_model, max_grad_norm=1.0, use_ghost_clipping=True)
        optimizer: Any = DPOptimizerFastGradientClipping(sgd, **options)
        criterion: Any = DPLossFastGradientClipping(model, optimizer, nn.CrossEntropyLoss())
    else:
        model, optimizer, criterion = GradSampleModule(plain_model), DPOptimizer(sgd, **options), nn.CrossEntropyLoss()

    def step() -> None:
        optimizer.zero_grad()
        criterion(model(inputs), targets).backward()
        optimizer.step()

    return step


ENGINES: dict[str, Callable[[Bench], Step]] = {
    "plain": plain,
    "plain-tuned": tuned,
    "plain-microbatched": microbatched,
    "privgrad-flat": private,
    "privgrad-layerwise": lambda bench: private(bench, clipping=pg.LayerwiseClipping()),
    "privgrad-group": grouped,
    "privgrad-sparse": lambda bench: private(bench, compression=SPARSE),
    "privgrad-sparse-layers": lambda bench: private(bench, compression=LAYERS),
    "privgrad-sparse-elements": lambda bench: private(bench, compression=ELEMENTS),
    "privgrad-bare": lambda bench: private(bench, compression=BARE),
    "privgrad-unnoised": unnoised,
    "vmap": lambda bench: private(bench, VmapEngine()),
    "opacus-hooks": lambda bench: opacus(bench, ghost=False),
    "opacus-ghost": lambda bench: opacus(bench, ghost=True),
}

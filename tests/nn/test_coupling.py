"""The coupling detector finds what couples, by its name, passes what does not, and leaves everything as it was."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.data import Dataset, TensorDataset

import privgrad as pg
from privgrad.nn import Finding, PublicProbe, SyntheticProbe, find_coupling
from privgrad.nn.subject import ROWS
from tests.frame.toys import ToyGroups
from tests.helpers import full_batch_plan
from tests.nn.coupled import (
    COUPLED,
    CROSS_ENTROPY,
    FEATURES,
    Apply,
    Bank,
    Case,
    DetachedTrick,
    Queue,
    SubtractBatchMean,
    around,
)
from tests.nn.uncoupled import UNCOUPLED, Routed, StochasticDepth, text


def found(model: nn.Module, loss_fn: Any = CROSS_ENTROPY, batch: Any = FEATURES) -> list[Finding]:
    return find_coupling(model, loss_fn, SyntheticProbe.like(batch))


def built(case: Case, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return case.model()


# What couples is found; what does not passes.


@pytest.mark.parametrize("case", COUPLED.values(), ids=COUPLED.keys())
def test_coupling_is_found_and_named(case: Case) -> None:
    findings = found(built(case), case.loss_fn, case.batch)
    assert findings
    assert all(re.search(case.where, finding.where) for finding in findings), findings


@pytest.mark.parametrize("case", UNCOUPLED.values(), ids=UNCOUPLED.keys())
@pytest.mark.parametrize("seed", [0, 1])
def test_what_treats_every_record_by_itself_passes(case: Case, seed: int) -> None:
    assert found(built(case, seed), case.loss_fn, case.batch) == []


class AtAKink(nn.Module):
    """The first row that it ever meets lies at the kink of a ReLU: on one side in a batch, alone not, by less than rounding."""

    def __init__(self, kink: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.kink = kink
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, inputs: Tensor) -> Tensor:
        before = inputs[:, 0] * self.weight
        rounded = 1e-9 if len(inputs) > 1 else 0.0
        return inputs.sum(1) * self.weight + F.relu(before - self.kink(before) + rounded)


def test_a_kink_that_one_row_meets_is_no_coupling() -> None:
    """Kernels round by the shape of the batch; at a kink that is another slope."""
    met: list[Tensor] = []

    def first_of_all(values: Tensor) -> Tensor:
        if not met:
            met.append(values[0].detach())
        return met[0]

    assert found(AtAKink(first_of_all), lambda model, batch: model(batch[0])) == []
    assert met


LAYERS: list[Callable[[], nn.Module]] = [
    lambda: nn.Linear(6, 6),
    lambda: nn.LayerNorm(6),
    lambda: nn.GroupNorm(2, 6),
    lambda: nn.Dropout(0.9),
    lambda: nn.LeakyReLU(0.2),
    lambda: nn.Sequential(nn.Linear(6, 6), nn.LeakyReLU(0.2, inplace=True), nn.Linear(6, 6)),
    lambda: nn.GELU(),
    lambda: nn.Tanh(),
    lambda: nn.Sequential(nn.Linear(6, 6), nn.SiLU()),
    lambda: StochasticDepth(nn.Linear(6, 6)),
    lambda: Routed(0.5),
    lambda: parametrizations.spectral_norm(nn.Linear(6, 6)),
]
COUPLERS: list[Callable[[], nn.Module]] = [
    lambda: nn.BatchNorm1d(6),
    lambda: nn.BatchNorm1d(6, affine=False, track_running_stats=False),
    lambda: SubtractBatchMean(),
    lambda: SubtractBatchMean(1e-3),
    lambda: DetachedTrick(),
    lambda: Bank(),
    lambda: Apply(lambda inputs: inputs.sort(0).values),
    lambda: Apply(lambda inputs: inputs.roll(1, 0)),
    lambda: Apply(lambda inputs: inputs.softmax(0)),
    lambda: Apply(lambda inputs: inputs.cumsum(0)),
]
architectures = st.lists(st.sampled_from(LAYERS), min_size=0, max_size=5)


@settings(max_examples=40, deadline=None)
@given(architectures, st.integers(0, 2**20))
def test_random_networks_of_uncoupled_layers_pass(layers: list[Callable[[], nn.Module]], seed: int) -> None:
    torch.manual_seed(seed)
    assert found(nn.Sequential(*(layer() for layer in layers), nn.Linear(6, 3))) == []


@settings(max_examples=60, deadline=None)
@given(architectures, st.sampled_from(COUPLERS), st.integers(0, 5), st.booleans(), st.integers(0, 2**20))
def test_a_coupling_layer_anywhere_is_found_and_named(
    layers: list[Callable[[], nn.Module]], coupler: Callable[[], nn.Module], place: int, nested: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    place = min(place, len(layers))
    modules = [layer() for layer in layers]
    bad = coupler()
    modules.insert(place, nn.Sequential(nn.Identity(), bad) if nested else bad)
    name = f"{place}.1" if nested else f"{place}"
    findings = found(nn.Sequential(nn.Sequential(*modules), nn.Linear(6, 3)))
    named = [finding.where for finding in findings]
    assert f"0.{name} ({type(bad).__name__})" in named
    # A layer after it may be named beside it, where it makes rounding errors large; one before it never.
    assert all(int(where.split(" ")[0].split(".")[1]) >= place for where in named)


def test_every_layer_that_couples_is_named_at_once() -> None:
    model = nn.Sequential(
        nn.Linear(6, 6),
        nn.BatchNorm1d(6),
        nn.ReLU(),
        nn.Sequential(nn.Linear(6, 6), SubtractBatchMean()),
        nn.Linear(6, 3),
    )
    couples = [finding.where for finding in found(model) if "output" in finding.what]
    assert couples == ["1 (BatchNorm1d)", "3.1 (SubtractBatchMean)"]


def test_the_model_and_its_loss_are_told_apart() -> None:
    places = [finding.where for finding in found(around(nn.BatchNorm1d(6)), COUPLED["contrastive loss"].loss_fn)]
    assert places[:2] == ["1 (BatchNorm1d)", "the loss function"]


@pytest.mark.parametrize("row", range(ROWS))
def test_one_row_that_hears_of_one_other_is_enough(row: int) -> None:
    """Whatever the pair of rows, and however little is heard."""
    for other in set(range(ROWS)) - {row}:

        def mixed(inputs: Tensor, other: int = other) -> Tensor:
            if len(inputs) < ROWS:
                return inputs
            heard = torch.zeros_like(inputs)
            heard[row] = 1e-7 * inputs[other]
            return inputs + heard

        assert [finding.where for finding in found(around(Apply(mixed)))] == ["1 (Apply)"]


# The check leaves no trace.


class Everything(nn.Module):
    """All that a forward pass may leave behind."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            parametrizations.spectral_norm(nn.Linear(6, 6)), nn.Dropout(0.5), Bank(), Queue(), nn.BatchNorm1d(6)
        )
        self.last = nn.Linear(6, 3)
        nn.init.zeros_(self.last.weight)
        self.generator = torch.Generator().manual_seed(1)
        self.calls = [0]
        self.cache: dict[str, Tensor] = {}

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls[0] += 1
        self.cache["last"] = inputs
        self.anew = inputs
        noise = torch.randn(inputs.shape, generator=self.generator)
        return self.last(self.layers(inputs + noise + random.random() + float(numpy.random.rand())))


def failing(model: nn.Module, batch: Any) -> Tensor:
    model(batch[0])
    raise ValueError("no")


@pytest.mark.parametrize("loss_fn", [CROSS_ENTROPY, failing], ids=["found", "failed"])
def test_everything_is_as_it_was(loss_fn: Any) -> None:
    torch.manual_seed(0)
    model = Everything()
    model.layers[1].eval()
    CROSS_ENTROPY(model, (torch.randn(3, 6), torch.tensor([0, 1, 2]))).sum().backward()
    parameters = {name: (p, p.detach().clone(), p.grad, p.grad.clone()) for name, p in model.named_parameters()}
    buffers = {name: (b, b.clone()) for name, b in model.named_buffers()}
    queue, queued, calls, cached = model.layers[3].queue, list(model.layers[3].queue), model.calls, dict(model.cache)
    modes = [module.training for module in model.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    states = torch.get_rng_state(), model.generator.get_state(), random.getstate(), numpy.random.get_state()[1].copy()

    if loss_fn is failing:
        with pytest.raises(pg.PrivgradError, match="ValueError: no"):
            found(model, loss_fn)
    else:
        assert found(model, loss_fn)

    for name, parameter in model.named_parameters():
        same, value, gradient, of_gradient = parameters[name]
        assert parameter is same
        assert torch.equal(parameter, value)
        assert parameter.grad is gradient
        assert torch.equal(gradient, of_gradient)
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name][0]
        assert torch.equal(buffer, buffers[name][1])
    assert model.layers[3].queue is queue
    assert len(queue) == len(queued) == 1
    assert queue[0] is queued[0]
    assert model.calls is calls
    assert calls == [1]
    assert model.cache.keys() == cached.keys()
    assert model.cache["last"] is cached["last"]
    assert [module.training for module in model.modules()] == modes
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(model.generator.get_state(), states[1])
    assert random.getstate() == states[2]
    assert (numpy.random.get_state()[1] == states[3]).all()


def test_a_generator_outside_the_model_is_put_back() -> None:
    generator = torch.Generator().manual_seed(5)
    before = generator.get_state()

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return CROSS_ENTROPY(model, (batch[0] + torch.randn(batch[0].shape, generator=generator), batch[1]))

    assert found(nn.Linear(6, 3), loss_fn) == []
    assert torch.equal(generator.get_state(), before)


# The probe.


def test_a_synthetic_probe_holds_nothing_of_the_records() -> None:
    def draws(value: float) -> Any:
        like = {"x": torch.full((1, 3), value), "ids": torch.full((1, 5), int(value)), "on": torch.tensor([value > 3])}
        return SyntheticProbe.like(like).pair(4, torch.Generator().manual_seed(0))

    (one, other), (one_again, other_again) = draws(2.0), draws(77.0)
    for key in ("x", "ids", "on"):
        assert torch.equal(one[key], one_again[key])
        assert torch.equal(other[key], other_again[key])
        assert len(one[key]) == 4
        assert not (one[key] == other[key]).any(), "every value changes"
    assert one["on"].dtype == torch.bool
    assert {*one["ids"].flatten().tolist()} == {0, 1}
    assert all({*row.tolist()} == {0, 1} for row in torch.cat([one["ids"], other["ids"]]))


def test_a_public_probe_gives_rows_of_its_batch_and_changes_each() -> None:
    probe = PublicProbe((torch.arange(3), [torch.arange(30, 60, 10)]))
    for seed in range(20):
        (one, (tens,)), (other, _) = probe.pair(4, torch.Generator().manual_seed(seed))
        assert {*one.tolist()} == {0, 1, 2}
        assert torch.equal(tens, 10 * one + 30)
        assert not (one == other).any()


def far_classes(model: nn.Module, batch: Any) -> Tensor:
    """Knows no class below 5."""
    return F.cross_entropy(model(batch[0]), torch.tensor([0, 1, 2])[batch[1] - 5], reduction="none") / (batch[1] > 4)


def test_a_loss_that_needs_other_values_asks_for_a_public_probe_and_takes_it() -> None:
    with pytest.raises(pg.PrivgradError, match=r"IndexError.*not private as probe="):
        found(nn.Linear(6, 3), far_classes)
    public = PublicProbe((torch.randn(5, 6), torch.tensor([5, 6, 7, 5, 6])))
    assert find_coupling(nn.Linear(6, 3), far_classes, public) == []
    assert [finding.where for finding in find_coupling(around(SubtractBatchMean()), far_classes, public)] == [
        "1 (SubtractBatchMean)"
    ]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.zeros(1, 6), ["a name"]), "a batch holds a str; expected tensors"),
        ((), "a batch holds nothing"),
        ((torch.zeros(1, 6), torch.zeros(2)), "different numbers of rows"),
        ((torch.zeros(1, 6), torch.tensor(1.0)), "different numbers of rows, or none"),
    ],
)
def test_what_is_no_batch_is_refused(batch: Any, message: str) -> None:
    with pytest.raises(pg.PrivgradError, match=message):
        SyntheticProbe.like(batch)


def test_a_public_probe_of_one_row_is_refused() -> None:
    with pytest.raises(pg.PrivgradError, match="at least two"):
        PublicProbe(FEATURES)


# What is no coupling, and wrong all the same.


def broken(model: nn.Linear) -> nn.Linear:
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    return model


def never_learns(model: nn.Module, batch: Any) -> Tensor:
    return CROSS_ENTROPY(model, batch).detach()


def squeezed(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none").squeeze()


def pairs(model: nn.Module, batch: Any) -> Tensor:
    """Cannot work on an odd batch."""
    return CROSS_ENTROPY(model, batch).view(-1, 2).flatten()


class Remembering:
    """A loss with a memory that no module holds."""

    def __init__(self) -> None:
        self.largest = 0.0

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        losses = CROSS_ENTROPY(model, batch)
        self.largest += 1.0
        return losses / self.largest


@pytest.mark.parametrize(
    ("model", "loss_fn", "message"),
    [
        (lambda: broken(nn.Linear(6, 3)), CROSS_ENTROPY, "weight holds values that are not finite"),
        (lambda: around(Apply(lambda x: x / 0 * 0)), CROSS_ENTROPY, r"losses are not finite \(NaN or infinity\)"),
        (lambda: nn.Sequential(nn.LazyLinear(3)), CROSS_ENTROPY, r"0\.weight has no shape yet"),
        (lambda: nn.Linear(6, 3), lambda model, batch: model(batch[0]).sum(), r"loss_fn returned \(\) for 4 row"),
        (lambda: nn.Linear(6, 3), lambda model, batch: model(batch[0]), r"loss_fn returned \(4, 3\) for 4 row"),
        (lambda: nn.Linear(6, 3), squeezed, r"loss_fn returned \(\) for 1 row"),
        (lambda: nn.Linear(6, 3), pairs, "cannot take a batch of one record"),
        (lambda: nn.Linear(6, 3), never_learns, "do not depend on any trainable parameter"),
        (lambda: nn.Linear(6, 3), Remembering(), "keeps something outside its modules"),
        (lambda: nn.Linear(6, 3).requires_grad_(False), CROSS_ENTROPY, "no trainable parameter"),
        (
            lambda: nn.Sequential(nn.Linear(6, 3), nn.LeakyReLU(0.2, True), nn.LeakyReLU(0.2, True)),
            CROSS_ENTROPY,
            "no gradient can be taken of one record's loss: RuntimeError: .*inplace operation",
        ),
        (lambda: nn.Linear(5, 3), CROSS_ENTROPY, "RuntimeError: mat1 and mat2"),
    ],
)
def test_what_cannot_be_checked_is_refused_in_words(model: Callable[[], nn.Module], loss_fn: Any, message: str) -> None:
    with pytest.raises(pg.PrivgradError, match=message) as caught:
        found(model(), loss_fn)
    assert "\n" not in str(caught.value)


# At the door of training.


def records(batch: Any = FEATURES, count: int = 6) -> TensorDataset:
    return TensorDataset(*(leaf.expand(count, *leaf.shape[1:]).clone() for leaf in batch))


def private(model: nn.Module, loss_fn: Any = CROSS_ENTROPY, data: Dataset[Any] | None = None, **options: Any) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"plan": full_batch_plan(6)} | options
    plan = options.pop("plan")
    return pg.make_private(model, optimizer, records() if data is None else data, plan, loss_fn, **options)


def test_make_private_refuses_with_the_ways_out_in_one_line() -> None:
    with pytest.raises(pg.RefusedError) as caught:
        private(around(nn.BatchNorm1d(6)))
    line = str(caught.value)
    assert line.startswith("1 (BatchNorm1d): one record's output depends on the other records of its batch; ")
    assert "running_mean, running_var would take up the records" in line
    assert "privgrad.nn.convert(model, to='group')" in line
    assert ".eval()" in line
    assert "\n" not in line


def test_make_private_refuses_a_coupling_loss() -> None:
    with pytest.raises(pg.RefusedError, match=r"^the loss function: .*reduction='none'"):
        private(nn.Linear(6, 4), COUPLED["contrastive loss"].loss_fn)


def test_a_deep_network_is_refused_without_a_list_of_all_its_layers() -> None:
    layers = [module for _ in range(9) for module in (nn.Linear(6, 6), nn.BatchNorm1d(6))]
    with pytest.raises(pg.RefusedError, match=r"1 \(BatchNorm1d\), .* and 3 more: one record's output"):
        private(nn.Sequential(*layers, nn.Linear(6, 3)))


def test_where_groups_are_clipped_their_records_may_couple() -> None:
    running = private(around(nn.BatchNorm1d(6)), plan=full_batch_plan(6, groups=ToyGroups(2)))
    assert running.plan.groups is not None


def test_other_modes_are_checked_when_they_are_met() -> None:
    """A frozen layer that model.train() wakes in the user's loop."""
    model = around(nn.BatchNorm1d(6))
    model[1].eval()
    running = private(model, plan=full_batch_plan(6, steps=3))
    batches = running.batches()
    running.step(next(batches))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    batch = next(batches)
    with pytest.raises(pg.RefusedError, match=r"1 \(BatchNorm1d\)"):
        running.step(batch)
    assert running.ledger.count == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model[1].eval()
    running.step(batch)
    assert running.ledger.count == 2


def test_a_public_probe_is_used_where_one_is_given() -> None:
    labels = torch.tensor([5, 6, 7, 5, 6, 7])
    data = TensorDataset(torch.zeros(6, 6), labels)
    with pytest.raises(pg.PrivgradError, match="probe="):
        private(nn.Linear(6, 3), far_classes, data)
    running = private(nn.Linear(6, 3), far_classes, data, probe=(torch.randn(6, 6), labels))
    running.step(next(running.batches()))


def test_reading_the_first_record_moves_no_random_state() -> None:
    class Augmented(Dataset[Any]):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> Any:
            return torch.randn(6) + random.random() + float(numpy.random.rand()), 0

    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[2]
    private(nn.Linear(6, 3), data=Augmented())
    # (The linear layer itself draws: it is made before.)
    torch.set_rng_state(states[0])
    model = nn.Linear(6, 3)
    before = torch.get_rng_state()
    private(model, data=Augmented())
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == states[1]
    assert numpy.random.get_state()[2] == states[2]


def test_a_record_that_cannot_be_collated_is_refused_without_its_words() -> None:
    class Bad(Dataset[Any]):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> Any:
            raise KeyError("the patient's name")

    with pytest.raises(pg.PrivgradError, match="KeyError") as caught:
        private(nn.Linear(6, 3), data=Bad())
    assert "patient" not in str(caught.value)


def test_text_with_its_loss_inside_the_model_trains() -> None:
    class Texts(Dataset[Any]):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> Any:
            return {key: torch.ones_like(value[0]) for key, value in text().items()}

    case = UNCOUPLED["text, loss inside"]
    running = private(case.model(), case.loss_fn, Texts())
    assert running.ledger.count == 0


def test_a_refused_run_writes_nothing(tmp_path: Any) -> None:
    model = around(nn.BatchNorm1d(6))
    with pytest.raises(pg.RefusedError, match="BatchNorm1d"):
        pg.Trainer(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            records(),
            full_batch_plan(6, multiplier=1.0),
            CROSS_ENTROPY,
            directory=tmp_path / "run",
            quiet=True,
        )
    assert not (tmp_path / "run").exists()


class Annealed(nn.Module):
    """A temperature that falls with every call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(6, 3), 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(inputs) / (1 + 0.1 * self.calls)


def test_a_schedule_by_the_number_of_calls_is_refused() -> None:
    """It would stand still, or follow the number of private records."""
    (finding,) = found(Annealed())
    assert "calls would go on from one forward pass to the next" in str(finding)
    assert "set it from outside, between two steps" in str(finding)

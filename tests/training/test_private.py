"""make_private in the user's own loop: what is refused at the door, and what a step does to the model and to nothing else."""

from __future__ import annotations

import dataclasses
import warnings
from collections import OrderedDict, UserDict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

import privgrad as pg
from privgrad.gradients.contract import Fold
from privgrad.mechanism.plan import Plan
from privgrad.training.batches import SampledBatch, check_apart
from privgrad.training.private import Private, Spent
from privgrad.training.public import public_rows
from tests.helpers import full_batch_plan, loop_gradients

COUNT = 12
LOSS = pg.supervised(F.cross_entropy)


def records(count: int = COUNT, dtype: torch.dtype = torch.float32) -> TensorDataset:
    inputs = torch.randn(count, 3, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return TensorDataset(inputs, (inputs[:, 0] > 0).long())


def plan(steps: int = 4, *, rate: float = 0.5, multiplier: float = 1.0, seed: int | None = None) -> Plan:
    return Plan(
        sampling=pg.PoissonSampling(rate=rate, divisor=6.0),
        steps=steps,
        noise=pg.GaussianNoise(multiplier=multiplier, insecure_seed=seed),
    )


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def private(model: nn.Module | None = None, **changes: Any) -> Private:
    model = network() if model is None else model
    values: dict[str, Any] = {"dataset": records(), "plan": plan(), "loss_fn": LOSS}
    values.setdefault("optimizer", torch.optim.SGD(model.parameters(), lr=0.1))
    return pg.make_private(model, **(values | changes))


def train(running: Private) -> None:
    for batch in running.batches():
        running.step(batch)


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def clipped_mean(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """DP-SGD's update without noise at C = 1, written out: the mean over rows of g min(1, 1 / ||g||)."""
    norms = torch.stack([value.flatten(1).square().sum(1) for value in gradients.values()]).sum(0).sqrt()
    factors = (1 / norms).clamp(max=1)
    return {
        name: (value * factors.view(-1, *[1] * (value.dim() - 1))).mean(0).to(value)
        for name, value in gradients.items()
    }


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(records())


class Dictionaries(Dataset[dict[str, Tensor]]):
    """Records as dictionaries, as Hugging Face's data sets give them."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        inputs, targets = records()[index]
        return {"inputs": inputs, "labels": targets}


def dictionary_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["inputs"]), batch["labels"], reduction="none")


# Refused at the door.


def test_an_optimizer_that_needs_a_closure_is_refused() -> None:
    model = network()
    with pytest.raises(pg.RefusedError, match=r"LBFGS.*use SGD or Adam"):
        private(model, optimizer=torch.optim.LBFGS(model.parameters()))


def test_an_optimizer_of_another_model_is_refused() -> None:
    model, other = network(), nn.Linear(3, 2)
    optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1)
    with pytest.raises(pg.PrivgradError, match=r"2 parameter\(s\) that are not the model's"):
        private(model, optimizer=optimizer)


def test_an_optimizer_that_lacks_trainable_parameters_is_refused_by_their_names() -> None:
    model = network()
    with pytest.raises(pg.PrivgradError, match=r"does not hold 2\.weight, 2\.bias;"):
        private(model, optimizer=torch.optim.SGD(model[0].parameters(), lr=0.1))


def test_an_optimizer_may_lack_frozen_parameters() -> None:
    model = network()
    model[2].requires_grad_(False)
    train(private(model, optimizer=torch.optim.SGD(model[0].parameters(), lr=0.1)))


@pytest.mark.parametrize(
    "layer",
    [
        pytest.param(lambda: nn.BatchNorm1d(4), id="train mode"),
        pytest.param(
            lambda: nn.BatchNorm1d(4, track_running_stats=False).eval(), id="statistics of the batch in eval mode"
        ),
        pytest.param(lambda: nn.SyncBatchNorm(4), id="synchronised"),
    ],
)
def test_batch_normalization_is_refused_by_its_path(layer: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(OrderedDict(norm=layer())), nn.Linear(4, 2))
    with pytest.raises(pg.RefusedError, match=r"1\.norm \(\w*BatchNorm\w*\).*GroupNorm or LayerNorm"):
        private(model)


class Remembering(nn.Module):
    """Adds up its inputs in a plain attribute, which no engine puts back."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = torch.zeros(3)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + x.detach().sum(0)
        return x + self.seen


class Scripted(nn.Module):
    """Batch normalization over records and a second dimension, so that a group of one record can run."""

    def __init__(self, *, scripted: bool) -> None:
        super().__init__()
        norm = nn.BatchNorm1d(1)
        self.norm = torch.jit.script(norm) if scripted else norm

    def forward(self, x: Tensor) -> Tensor:
        normalised: Tensor = self.norm(x[:, None])
        return normalised[:, 0]


def grouped() -> Plan:
    return Plan(sampling=pg.FullBatch(), steps=2, groups=pg.RandomGroups(3), noise=pg.GaussianNoise(multiplier=1.0))


@pytest.mark.parametrize(("layer", "name"), [(Remembering, "seen"), (lambda: Scripted(scripted=True), "running_mean")])
def test_what_a_group_would_leave_to_the_next_is_refused(layer: Callable[[], nn.Module], name: str) -> None:
    """Else a record moves the vectors of all later groups, and the statistics of a scripted layer leave un-noised."""
    model = nn.Sequential(layer(), nn.Linear(3, 2))
    before = copy_of(model)
    with pytest.raises(pg.RefusedError, match=name):
        private(model, plan=grouped())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_layer_that_starts_to_remember_after_a_change_of_modes_is_refused_with_groups() -> None:
    model = nn.Sequential(Scripted(scripted=True), nn.Linear(3, 2)).eval()
    running = private(model, plan=grouped())
    batches = running.batches()
    running.step(next(batches))
    model.train()
    with pytest.raises(pg.PrivgradError, match="running_mean"):
        running.step(next(batches))


def test_buffers_that_engines_put_back_are_no_hindrance_to_groups() -> None:
    model = nn.Sequential(Scripted(scripted=False), nn.Linear(3, 2))
    train(private(model, plan=grouped()))
    assert not model[0].norm.running_mean.any()  # type: ignore[union-attr]


def test_batch_normalization_with_given_statistics_is_allowed_and_keeps_them() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[1].eval()
    before = copy_of(model[1])
    train(private(model))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(model[1].state_dict()[name], before[name])


def test_a_data_set_of_another_size_than_the_plans_is_refused() -> None:
    by_size = Plan(
        sampling=pg.PoissonSampling(expected_batch_size=6, dataset_size=COUNT + 1),
        steps=2,
        noise=pg.GaussianNoise(multiplier=1.0),
    )
    with pytest.raises(pg.PrivgradError, match=f"made for {COUNT + 1} records and the data set has {COUNT}"):
        private(plan=by_size)


def test_an_expected_batch_beyond_the_data_set_is_refused() -> None:
    large = Plan(
        sampling=pg.PoissonSampling(expected_batch_size=COUNT + 1), steps=2, noise=pg.GaussianNoise(multiplier=1.0)
    )
    with pytest.raises(pg.PrivgradError, match=f"expected a finite number at most {COUNT}"):
        private(plan=large)


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(pg.PrivgradError, match="data set is empty"):
        private(dataset=TensorDataset(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)))


def test_a_stream_is_refused() -> None:
    with pytest.raises(pg.PrivgradError, match="map-style"):
        private(dataset=Stream())


def test_a_model_without_trainable_parameters_is_refused() -> None:
    model = network().requires_grad_(False)
    with pytest.raises(pg.PrivgradError, match="no trainable parameter"):
        private(model)


class Turned(nn.Module):
    """A complex factor; as two real numbers where it is `real`."""

    def __init__(self, real: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        factor = torch.ones(2, dtype=torch.complex64)
        self.factor = nn.Parameter(torch.view_as_real(factor) if real else factor)

    def forward(self, inputs: Tensor) -> Tensor:
        factor = self.factor if self.factor.is_complex() else torch.view_as_complex(self.factor)
        return (self.linear(inputs) * factor).real


def test_a_complex_parameter_is_refused_and_works_as_a_real_one() -> None:
    with pytest.raises(pg.PrivgradError, match=r"'factor' is complex.*view_as_complex"):
        private(Turned(real=False))
    private(Turned(real=True))
    frozen = Turned(real=False)
    frozen.factor.requires_grad_(False)
    private(frozen)


def test_a_plan_without_a_noise_multiplier_is_refused() -> None:
    blank = Plan(sampling=pg.PoissonSampling(rate=0.5, divisor=6.0), steps=2)
    with pytest.raises(pg.PrivgradError, match="calibrate"):
        private(plan=blank)


def test_a_plan_whose_seed_was_not_stored_is_not_run() -> None:
    stored = Plan.from_json(plan(seed=5).to_json())
    with pytest.raises(pg.PrivgradError, match="insecure_seed again"):
        private(plan=stored)
    assert private(plan=stored.with_seed(5)).plan == plan(seed=5)


# The loss.


def mean_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def logits(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0])


def number(model: nn.Module, batch: Any) -> Any:
    return 0.5


def nothing(model: nn.Module, batch: Any) -> Any:
    return None


@pytest.mark.parametrize(
    ("loss_fn", "got"), [(mean_loss, r"\(\)"), (logits, r"\(4, 2\)"), (number, "float"), (nothing, "NoneType")]
)
def test_a_loss_that_is_not_one_number_per_row_is_refused_before_training(
    loss_fn: Callable[..., Any], got: str
) -> None:
    with pytest.raises(pg.PrivgradError, match=rf"loss_fn returned {got} .*one loss per row.*reduction='none'"):
        private(loss_fn=loss_fn)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_supervised_refuses_a_loss_module_that_couples_records(reduction: str) -> None:
    with pytest.raises(pg.PrivgradError, match=f"CrossEntropyLoss has reduction='{reduction}'.*reduction='none'"):
        pg.supervised(nn.CrossEntropyLoss(reduction=reduction))


def test_supervised_refuses_a_criterion_that_gives_one_number() -> None:
    loss_fn = pg.supervised(lambda predictions, targets, reduction: F.cross_entropy(predictions, targets))
    with pytest.raises(pg.PrivgradError, match="single number"):
        loss_fn(network(), records().tensors)


def test_supervised_takes_a_function_and_a_module_alike() -> None:
    model, batch = network(), records().tensors
    by_function, by_module = LOSS(model, batch), pg.supervised(nn.CrossEntropyLoss(reduction="none"))(model, batch)
    assert by_function.shape == (COUNT,)
    assert torch.equal(by_function, by_module)


def test_supervised_averages_pixels_but_never_rows() -> None:
    images, targets = torch.randn(2, 3, 4, 4), torch.randint(3, (2, 4, 4))
    losses = pg.supervised(F.cross_entropy)(nn.Identity(), (images, targets))
    expected = torch.stack(
        [F.cross_entropy(image[None], target[None]) for image, target in zip(images, targets, strict=True)]
    )
    torch.testing.assert_close(losses, expected)


# Batches.


def test_a_batch_is_good_for_one_step() -> None:
    running = private()
    batch = next(running.batches())
    running.step(batch)
    assert batch.used
    with pytest.raises(pg.PrivgradError, match="used already"):
        running.step(batch)
    with pytest.raises(pg.PrivgradError, match="used already"):
        running.backward(batch)
    assert running.ledger.count == 1


def test_two_trainings_do_not_share_a_ledger() -> None:
    """What a step is charged as goes by its number, and so does whom it drew: both would draw the records of step 1."""
    ledger = pg.Ledger(plan().for_dataset(COUNT).terms())
    one, other = (private(ledger=ledger) for _ in range(2))
    first, second = next(one.batches()), next(other.batches())
    one.step(first)
    with pytest.raises(pg.PrivgradError, match="drawn for step 1, and the ledger is at step 2"):
        other.step(second)
    assert ledger.count == 1


def test_a_skipped_batch_is_refused() -> None:
    running = private()
    batches = running.batches()
    running.step(next(batches))
    next(batches)
    with pytest.raises(pg.PrivgradError, match="skipped"):
        next(batches)
    assert running.ledger.count == 1


def test_a_batch_cannot_be_skipped_by_asking_for_batches_again() -> None:
    running = private()
    next(running.batches())
    with pytest.raises(pg.PrivgradError, match="skipped"):
        running.step(next(running.batches()))


@pytest.mark.parametrize("thing", [None, records().tensors, [torch.zeros(2, 3)], "batch"])
def test_step_takes_nothing_but_sampled_batches(thing: object) -> None:
    running = private()
    for use in (running.step, running.backward):
        with pytest.raises(
            pg.PrivgradError, match=rf"{type(thing).__name__}; it takes the batch that private\.batches"
        ):
            use(thing)  # type: ignore[arg-type]
    assert running.ledger.count == 0


@pytest.mark.parametrize("made", ["by another plan", "by hand"])
def test_a_batch_that_this_plan_did_not_sample_is_refused(made: str) -> None:
    running = private(plan=plan(rate=0.01))
    foreign = SampledBatch(records().tensors, Fold.identity(COUNT))
    if made == "by another plan":
        foreign = next(private(plan=plan(rate=1.0)).batches())
    with pytest.raises(pg.PrivgradError):
        running.step(foreign)


def test_a_collate_function_that_makes_two_rows_of_a_record_is_refused() -> None:
    running = private(plan=plan(rate=1.0), collate_fn=lambda rows: default_collate(rows + rows))
    with pytest.raises(pg.PrivgradError):
        running.step(next(running.batches()))


def test_there_are_as_many_batches_as_steps_and_none_beyond() -> None:
    running = private(plan=plan(3))
    assert len([running.step(batch) for batch in running.batches()]) == 3
    with pytest.raises(pg.PrivgradError, match="all 3 steps of the plan are charged"):
        running.runner.release(records().tensors, Fold.identity(COUNT))
    assert running.ledger.count == 3


def test_going_on_after_a_break_takes_the_steps_that_are_left() -> None:
    running = private(plan=plan(4))
    for batch in running.batches():
        running.step(batch)
        if running.ledger.count == 2:
            break
    train(running)
    assert running.ledger.count == 4


def test_empty_batches_are_steps_and_are_charged_and_noised() -> None:
    model = network()
    running = private(model, plan=plan(5, rate=1e-9))
    for step, batch in enumerate(running.batches(), start=1):
        assert batch.data is None
        before = copy_of(model)
        running.step(batch)
        assert running.ledger.count == step
        assert all(not torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert running.ledger.count == 5


def test_an_empty_batch_without_noise_moves_nothing() -> None:
    model = network()
    before = copy_of(model)
    train(private(model, plan=plan(3, rate=1e-9, multiplier=0.0)))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_sampling_follows_the_plans_rate() -> None:
    running = private(dataset=records(400), plan=plan(20, rate=0.25))
    sizes = []
    for batch in running.batches():
        sizes.append(len(batch.fold.index))
        running.step(batch)
    # 8000 coins: six standard deviations are 233.
    assert abs(sum(sizes) - 2000) < 233
    assert len(set(sizes)) > 1


def test_no_seeded_sample_serves_two_steps() -> None:
    """Steps are accounted for as independent draws."""
    running = private(plan=plan(4, seed=1))
    one, other = running.batches(), running.batches()
    running.step(next(one))
    running.step(next(other))
    with pytest.raises(pg.PrivgradError, match="newer iterator"):
        next(one)
    assert running.ledger.count == 2


# What a step does.


def test_a_step_moves_the_weights_by_the_clipped_mean_gradient() -> None:
    model = network()
    before, gradients = copy_of(model), loop_gradients(model, LOSS, records().tensors)
    train(private(model, plan=full_batch_plan(COUNT)))
    for name, update in clipped_mean(gradients).items():
        torch.testing.assert_close(model.state_dict()[name], before[name] - 0.1 * update)


def test_backward_fills_grad_and_leaves_the_weights() -> None:
    model = network()
    before, gradients = copy_of(model), loop_gradients(model, LOSS, records().tensors)
    running = private(model, plan=full_batch_plan(COUNT, steps=2))
    for batch, expected in zip(running.batches(), (nullcontext(), pytest.warns(match="overwritten")), strict=True):
        with expected:
            running.backward(batch)
        for name, update in clipped_mean(gradients).items():
            torch.testing.assert_close(model.get_parameter(name).grad, update)  # overwritten, not added to
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert running.ledger.count == 2


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_backward_and_a_step_after_each_give_no_warning(optimizer: type[Optimizer]) -> None:
    model = network()
    owner = optimizer(model.parameters(), lr=0.1)
    running = private(model, optimizer=owner)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in running.batches():
            running.backward(batch)
            owner.step()


def test_the_model_is_neither_wrapped_nor_renamed() -> None:
    model = network()
    keys, kind, hooks = list(model.state_dict()), type(model), len(model._forward_hooks)
    running = private(model)
    train(running)
    assert running.model is model
    assert type(model) is kind
    assert list(model.state_dict()) == keys
    assert len(model._forward_hooks) == hooks


def test_frozen_parameters_are_untouched_and_have_no_grad() -> None:
    model = network()
    model[0].requires_grad_(False)
    before = copy_of(model)
    trained = loop_gradients(model, LOSS, records().tensors)
    assert trained.keys() == {"2.weight", "2.bias"}
    train(private(model, plan=full_batch_plan(COUNT)))
    for name in ("0.weight", "0.bias"):
        assert torch.equal(model.state_dict()[name], before[name])
        assert model.get_parameter(name).grad is None
    for name, update in clipped_mean(trained).items():
        torch.testing.assert_close(model.state_dict()[name], before[name] - 0.1 * update)


def test_a_parameter_unfrozen_later_is_refused_and_stays_untouched() -> None:
    model = network()
    model[0].requires_grad_(False)
    running = private(model)
    before = copy_of(model)
    model[0].requires_grad_(True)
    with pytest.raises(pg.PrivgradError, match="fixed when training starts"):
        train(running)
    assert running.ledger.count == 0
    assert torch.equal(model.state_dict()["0.weight"], before["0.weight"])
    assert model[0].weight.grad is None


def test_a_parameter_frozen_later_is_refused_in_words() -> None:
    model = network()
    running = private(model, plan=plan(rate=1.0))
    model[0].requires_grad_(False)
    with pytest.raises(pg.PrivgradError):
        running.step(next(running.batches()))


def test_tied_weights_count_their_whole_gradient() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.last = nn.Linear(3, 3)
            self.last.weight = self.first.weight

        def forward(self, inputs: Tensor) -> Tensor:
            return self.last(torch.tanh(self.first(inputs)))

    model = Tied()
    before, gradients = copy_of(model), loop_gradients(model, LOSS, records().tensors)
    assert gradients.keys() == {"first.weight", "first.bias", "last.bias"}
    train(private(model, plan=full_batch_plan(COUNT)))
    assert model.last.weight is model.first.weight
    for name, update in clipped_mean(gradients).items():
        torch.testing.assert_close(model.state_dict()[name], before[name] - 0.1 * update)


def test_a_model_in_float64_is_trained_in_float64() -> None:
    model = network().double()
    data = records(dtype=torch.float64)
    before, gradients = copy_of(model), loop_gradients(model, LOSS, data.tensors)
    train(private(model, dataset=data, plan=full_batch_plan(COUNT)))
    for name, update in clipped_mean(gradients).items():
        value = model.state_dict()[name]
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, before[name] - 0.1 * update, rtol=1e-12, atol=1e-12)


def test_a_model_in_bfloat16_gets_gradients_of_its_own_type() -> None:
    model = network().bfloat16()
    running = private(model, dataset=records(dtype=torch.bfloat16))
    train(running)
    assert all(parameter.grad.dtype == torch.bfloat16 for parameter in model.parameters())
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_a_record_whose_gradient_is_not_finite_contributes_nothing() -> None:
    inputs, targets = (tensor.clone() for tensor in records().tensors)
    inputs[3, 0], inputs[7, 1] = float("nan"), float("inf")
    model = network()
    before = copy_of(model)
    fine = [row for row in range(COUNT) if row not in (3, 7)]
    gradients = loop_gradients(model, LOSS, (inputs[fine], targets[fine]))
    train(private(model, dataset=TensorDataset(inputs, targets), plan=full_batch_plan(COUNT)))
    for name, update in clipped_mean(gradients).items():
        expected = before[name] - 0.1 * update * len(fine) / COUNT
        torch.testing.assert_close(model.state_dict()[name], expected)


def test_the_divisor_is_the_plans_and_not_the_size_of_the_batch() -> None:
    model = network()
    before, gradients = copy_of(model), loop_gradients(model, LOSS, records().tensors)
    half = Plan(
        sampling=pg.PoissonSampling(rate=1.0, divisor=2.0 * COUNT), steps=1, noise=pg.GaussianNoise(multiplier=0.0)
    )
    train(private(model, plan=half))
    for name, update in clipped_mean(gradients).items():
        torch.testing.assert_close(model.state_dict()[name], before[name] - 0.1 * update / 2)


# Data of other forms.


def test_batches_may_be_dictionaries() -> None:
    model = network()
    expected = network()
    expected.load_state_dict(copy_of(model))
    train(private(expected, plan=full_batch_plan(COUNT, steps=2)))
    train(private(model, dataset=Dictionaries(), loss_fn=dictionary_loss, plan=full_batch_plan(COUNT, steps=2)))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name])


class Encoding(UserDict[str, Tensor]):
    """A mapping that torch does not look into, like a tokenizer's BatchEncoding."""


def to_encoding(rows: list[Any]) -> Encoding:
    return Encoding(default_collate(rows))


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_may_be_mappings_of_another_kind(workers: int) -> None:
    ends = []
    for collate in (default_collate, to_encoding):
        torch.manual_seed(0)
        running = private(
            dataset=Dictionaries(), loss_fn=dictionary_loss, collate_fn=collate, workers=workers, plan=plan(seed=1)
        )
        train(running)
        ends.append(copy_of(running.model))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_public_batches_may_be_mappings_of_another_kind() -> None:
    probe = to_encoding([Dictionaries()[index] for index in range(4)])
    train(private(dataset=Dictionaries(), loss_fn=dictionary_loss, collate_fn=to_encoding, probe=probe))
    public = public_rows(probe, Dictionaries(), None)
    assert type(public) is dict
    assert public["inputs"].shape == (4, 3)


def test_the_users_collate_function_is_used() -> None:
    seen: list[int] = []

    def collate(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        seen.append(len(rows))
        inputs, targets = default_collate(rows)
        return {"inputs": 2 * inputs, "labels": targets}

    model = network()
    inputs, targets = records().tensors
    before, gradients = copy_of(model), loop_gradients(model, LOSS, (2 * inputs, targets))
    train(private(model, loss_fn=dictionary_loss, collate_fn=collate, plan=full_batch_plan(COUNT)))
    assert seen[-2:] == [1, COUNT]  # one record for the shapes of the probe, then the batch
    assert set(seen[:-2]) == {2}  # and pairs, to see that rows do not mix
    for name, update in clipped_mean(gradients).items():
        torch.testing.assert_close(model.state_dict()[name], before[name] - 0.1 * update)


def turned(batch: list[Tensor], order: Tensor) -> list[Tensor]:
    return [0.5 * batch[0] + 0.5 * batch[0][order], batch[1]]


@pytest.mark.parametrize(
    "order", [lambda rows: torch.arange(rows).flip(0), lambda rows: torch.arange(rows).roll(1), torch.randperm]
)
def test_a_collate_function_that_mixes_records_is_refused(order: Callable[[int], Tensor]) -> None:
    """Else one record more moves the sum by 2.8 C: it is in two rows."""
    model, state = network(), torch.get_rng_state()
    with pytest.raises(pg.RefusedError, match="collate_fn mixes records"):
        private(model, collate_fn=lambda rows: turned(default_collate(rows), order(len(rows))))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_search_for_mixing_shows_the_function_no_private_value() -> None:
    """An outcome that depends on values of records would be a release without noise."""
    dataset = TensorDataset(*(7.0 + 0 * tensor.double() for tensor in records().tensors))
    shown: list[float] = []

    def collate(rows: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        shown.extend(float(value) for row in rows for part in row for value in part.flatten())
        return default_collate(rows)

    check_apart(dataset, collate)
    assert shown
    assert 7.0 not in shown
    shown.clear()
    labelled: Any = [(torch.zeros(3), 7)] * 3
    check_apart(
        labelled, lambda rows: [default_collate([row for row, _ in rows]), shown.extend(label for _, label in rows)]
    )
    assert shown
    assert 7.0 not in shown


def test_a_collate_function_that_pads_or_draws_for_each_record_is_allowed() -> None:
    own = torch.Generator().manual_seed(0)

    def pad(rows: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        inputs, targets = default_collate([(row + 0.1 * torch.randn(3), target) for row, target in rows])
        return [inputs + 0.1 * torch.randn(inputs.shape, generator=own), targets]

    train(private(collate_fn=pad))


def test_the_users_collate_function_is_never_called_with_no_rows() -> None:
    def collate(rows: list[Any]) -> Any:
        assert rows
        return default_collate(rows)

    running = private(collate_fn=collate, plan=plan(5, rate=0.02))
    train(running)
    assert running.ledger.count == 5


def test_a_worker_process_gives_the_same_training() -> None:
    models = [network(), network()]
    models[1].load_state_dict(copy_of(models[0]))
    for workers, model in enumerate(models):
        running = private(model, plan=plan(3, seed=1), workers=workers)
        train(running)
        assert running.ledger.count == 3
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[name])


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda model: torch.optim.Adam(model.parameters(), lr=0.01),
        lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
        lambda model: torch.optim.RMSprop(model.parameters(), lr=0.01),
        lambda model: torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=0.1, momentum=0.9),
    ],
)
def test_any_optimizer_that_needs_no_closure_works(optimizer: Callable[[nn.Module], Optimizer]) -> None:
    model = network()
    before = copy_of(model)
    train(private(model, optimizer=optimizer(model)))
    assert all(not torch.equal(before[name], value) for name, value in model.state_dict().items())


# What was spent.


def test_spent_counts_the_charged_steps() -> None:
    planned = full_batch_plan(COUNT, steps=3, multiplier=5.0)
    running = private(plan=planned)
    assert running.spent() == Spent(epsilon=0.0, delta=1e-5, steps=0, planned=3)
    spent = []
    for batch in running.batches():
        running.step(batch)
        spent.append(running.spent())
    assert [so_far.steps for so_far in spent] == [1, 2, 3]
    assert [so_far.epsilon for so_far in spent] == [planned.epsilon(steps=steps) for steps in (1, 2, 3)]
    assert 0 < spent[0].epsilon < spent[1].epsilon < spent[2].epsilon


def test_spent_reads_as_a_sentence_that_rounds_epsilon_upwards() -> None:
    assert str(Spent(1.00001, 1e-5, 7, 10)) == "epsilon = 1.001 at delta = 1e-05 after 7 of 10 steps"
    assert str(Spent(float("inf"), 1e-5, 1, 1)).startswith("epsilon = infinity")


def test_a_ledger_of_other_terms_is_refused() -> None:
    """It would be asked for epsilon under its own rules, which were another plan's."""
    other = dataclasses.replace(plan(), delta=1e-2)
    with pytest.raises(pg.PrivgradError, match="opened under other terms"):
        private(ledger=pg.Ledger(other.terms()))
    private(ledger=pg.Ledger(plan().terms()))


# What is given in another's place.


@pytest.mark.parametrize("loss_fn", [F.cross_entropy, nn.CrossEntropyLoss(), nn.CrossEntropyLoss])
def test_a_criterion_in_the_place_of_a_loss_is_named(loss_fn: Any) -> None:
    with pytest.raises(
        pg.PrivgradError, match=r"loss_fn is (cross_entropy|CrossEntropyLoss), a criterion.*give supervised"
    ):
        private(loss_fn=loss_fn)


def test_a_loss_of_outputs_and_targets_is_told_how_it_is_called() -> None:
    with pytest.raises(pg.PrivgradError, match=r"called with \(model, batch\)"):
        private(loss_fn=lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="none"))


def test_a_class_of_a_criterion_is_refused() -> None:
    with pytest.raises(pg.PrivgradError, match=r"supervised\(CrossEntropyLoss\(reduction='none'\)\)"):
        pg.supervised(nn.CrossEntropyLoss)


def test_a_class_of_an_optimizer_is_refused() -> None:
    with pytest.raises(pg.PrivgradError, match=r"build it: SGD\(model.parameters\(\), lr=...\)"):
        private(optimizer=torch.optim.SGD)


def test_a_loader_in_the_place_of_a_data_set_is_named() -> None:
    """Its length is a number of batches."""
    loader = DataLoader(records(), batch_size=3)
    with pytest.raises(pg.PrivgradError, match=r"loader.dataset"):
        private(dataset=loader)
    with pytest.raises(pg.PrivgradError, match=r"loader.dataset"):
        pg.dp_sgd(loader, epsilon=1, delta=1e-5, steps=1, batch_size=3)  # type: ignore[arg-type]

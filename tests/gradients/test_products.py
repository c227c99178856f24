"""Products by oneDNN, also where a processor or a size would not choose it: on other machines this file is the one that does."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privgrad.gradients import products
from tests.gradients import test_onepass
from tests.gradients.networks import NETWORKS
from tests.gradients.operators import CASES, squares

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """oneDNN for every size, and how often it was called."""
    torch.manual_seed(0)
    products._onednn.cache_clear()
    monkeypatch.setattr(products, "_processor", lambda: "vendor_id : AuthenticAMD")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    multiply = products._onednn()
    products._onednn.cache_clear()
    assert multiply is not None
    made: list[int] = []

    def counted(*args: Any) -> Tensor:
        made.append(1)
        result: Tensor = multiply(*args)
        return result

    monkeypatch.setattr(products, "_onednn", lambda: counted)
    monkeypatch.setattr(products, "_LARGE", 0)
    monkeypatch.setattr(products, "_LARGE_EACH", 0)
    monkeypatch.setattr(products, "_NARROW", 0)
    monkeypatch.setattr(products, "_MULTIPLE", 4)
    return made


LINEAR = [
    name
    for name in CASES
    if name.startswith(("linear", "multi-head attention")) or name == "embedding, tied to the output"
]


def near(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


@pytest.mark.parametrize("layout", ["as it is", "transposed", "strided"])
def test_products_are_right(layout: str, calls: list[int]) -> None:
    def matrix(*shape: int) -> Tensor:
        if layout == "transposed":
            return torch.randn(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)
        return torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2] if layout == "strided" else torch.randn(*shape)

    for count in (70, 72):
        left, weights, right, total = matrix(count, 300), torch.rand(count), matrix(count, 90), torch.randn(300, 90)
        before = left.clone(), right.clone()
        for other in (right, right[:, :3], matrix(count, 400)):
            expected = left.double().T @ (weights.double()[:, None] * other.double())
            assert near(products.weighted_product(left, weights, other), expected)
        expected = total.double() + left.double().T @ (weights.double()[:, None] * right.double())
        assert products.weighted_product(left, weights, right, total) is total
        assert near(total, expected)
        assert torch.equal(left, before[0])
        assert torch.equal(right, before[1])
    units = matrix(5, 40, 70), matrix(5, 70, 30)
    out = torch.empty(5, 40, 30)
    assert products.batched_product(*units, out) is out
    assert near(out, torch.bmm(units[0].double(), units[1].double()))
    assert len(calls) == 13


def test_biases_that_do_not_lie_side_by_side_are_read_as_they_are(calls: list[int]) -> None:
    """oneDNN reads on from a bias's first number, whatever its strides say: into other tensors, and so other records."""
    inputs, weight = torch.randn(40, 16), torch.randn(24, 16)
    biases = torch.randn(24), torch.randn(1).expand(24), torch.randn(24, 2)[:, 1], torch.randn(()), torch.randn(1)
    for bias in biases:
        assert near(products.linear(inputs, weight, bias), F.linear(inputs.double(), weight.double(), bias.double()))
    assert len(calls) == 1


def test_windows_that_overlap_are_multiplied(calls: list[int]) -> None:
    windows, other = torch.randn(100).unfold(0, 16, 2), torch.randn(43, 20)
    total = torch.zeros(20, 16)
    assert products.weighted_product(other, torch.ones(43), windows, total) is total
    assert near(total, other.T.double() @ windows.double())
    out = torch.empty(1, 20, 16)
    assert near(products.batched_product(other.T[None], windows[None], out)[0], other.T.double() @ windows.double())
    assert near(products.linear(other.T.contiguous(), windows.T), other.T.double() @ windows.double())
    assert len(calls) == 3


def test_batches_of_many_sizes_are_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """For each shape that it has seen oneDNN keeps half a mebibyte: under Poisson sampling that would go on and on."""
    multiply, shapes = products._onednn(), set()
    assert multiply is not None

    def seen(*args: Any) -> Tensor:
        shapes.add(tuple(args[0].shape))
        result: Tensor = multiply(*args)
        return result

    monkeypatch.setattr(products, "_onednn", lambda: seen)
    monkeypatch.setattr(products, "_MULTIPLE", 32)
    layer = nn.Linear(16, 24)
    for count in range(33, 97):
        inputs = torch.randn(count, 16, requires_grad=True)
        output = products.linear(inputs, layer.weight.detach(), layer.bias.detach())
        assert output.shape == (count, 24)
        torch.autograd.backward(output.square().sum())
        products.weighted_product(inputs.detach(), torch.ones(count), output.detach())
    assert shapes == {(64, 16), (64, 24), (96, 16), (96, 24), (16, 32), (16, 64), (16, 96)}


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_and_its_gradients_of_first_and_second_order(bias: bool) -> None:
    layer, inputs = nn.Linear(70, 90, bias), torch.randn(300, 70, requires_grad=True)

    def outcome(linear: Any, layer: nn.Linear, inputs: Tensor) -> list[Tensor]:
        output = linear(inputs, layer.weight, layer.bias).tanh()
        parameters = list(layer.parameters())
        first = torch.autograd.grad(output.square().sum(), [inputs, *parameters], create_graph=True)
        second = torch.autograd.grad(first[0].square().sum(), parameters)
        return [output, *first, *second]

    found = outcome(products.linear, layer, inputs)
    expected = outcome(F.linear, layer.double(), inputs.double())
    assert all(near(one, other) for one, other in zip(found, expected, strict=True))


def test_other_types_autocast_and_a_user_who_turned_it_off_get_torchs_own(calls: list[int]) -> None:
    left, right = torch.randn(30, 7), torch.randn(9, 7)
    products.linear(left.double(), right.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert products.linear(left, right).dtype == torch.bfloat16
    torch.backends.mkldnn.enabled = False
    try:
        products.linear(left, right)
    finally:
        torch.backends.mkldnn.enabled = True
    assert not calls


@pytest.mark.parametrize("kind", ["flat", "tensor"])
@pytest.mark.parametrize("name", LINEAR)
def test_operators_agree_with_a_loop(name: str, kind: str, calls: list[int]) -> None:
    case = CASES[name]
    batch = case.batch(torch.float32)
    test_onepass.covered(None, case.make(), squares, batch, kind=kind)
    assert calls


@pytest.mark.parametrize("name", ["vision transformer", "gpt-2", "lstm"])
def test_networks_agree_with_a_loop(name: str, calls: list[int]) -> None:
    make, batch = NETWORKS[name]
    narrow = tuple(leaf.float() if leaf.is_floating_point() else leaf for leaf in batch())
    test_onepass.covered(None, make(), test_onepass.cross_entropy, narrow, tolerance=2e-5)
    assert calls


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("name", ["linear", "linear [T, d]", "multi-head attention", "linear, tied"])
def test_a_non_finite_gradient_contributes_exactly_zero(name: str, poison: float, calls: list[int]) -> None:
    test_onepass.test_a_non_finite_gradient_contributes_exactly_zero(name, poison)
    assert calls


@pytest.mark.parametrize("left_over", [1e-2, 1e-4, 1e-6, 1e-8])
def test_rounding_lets_no_unit_contribute_more_than_its_norm(left_over: float, calls: list[int]) -> None:
    test_onepass.test_rounding_lets_no_unit_contribute_more_than_its_norm("product", left_over)
    assert calls


def test_intel_and_narrow_processors_keep_torchs_own() -> None:
    code = """
import sys, torch
from privgrad.gradients import products
products._processor = lambda: sys.argv[1]
torch.backends.cpu.get_cpu_capability = lambda: sys.argv[2]
torch.backends.mkl.is_available = lambda: True
print(products._onednn() is None)
"""
    for processor, capability, own in (
        ("vendor_id : GenuineIntel", "AVX512", True),
        ("vendor_id : AuthenticAMD", "AVX2", True),
        ("vendor_id : AuthenticAMD", "AVX512", False),
    ):
        command = [sys.executable, "-c", code, processor, capability]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == f"{own}\n"


def test_a_product_that_has_changed_its_meaning_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    products._onednn.cache_clear()
    monkeypatch.setattr(products, "_processor", lambda: "vendor_id : AuthenticAMD")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert products._onednn() is not None
    products._onednn.cache_clear()
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda x, w, *_: x @ w.T)
    assert products._onednn() is None
    products._onednn.cache_clear()

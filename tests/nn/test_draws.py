"""Inside EqualDraws every row gets the same random numbers, in a batch of any size, and the generators do not move."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from privgrad.nn.draws import EqualDraws

ROWS = 4


def drawn(function: Callable[[Tensor], Tensor], inputs: Tensor, *, keep_all: bool = False, seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    draws = EqualDraws(ROWS, [], seed=seed, keep_all=keep_all)
    with draws.drawing({}):
        result = function(inputs)
    assert draws.equal
    return result


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: F.dropout(x, 0.5),
    "fused dropout": lambda x: torch.native_dropout(x, 0.5, True)[0],
    "alpha dropout": lambda x: F.alpha_dropout(x, 0.5, training=True),
    "randomised relu": lambda x: F.rrelu(x - 2, training=True),
    "uniform": lambda x: torch.rand(x.shape),
    "normal": lambda x: torch.randn(len(x), x.shape[1]),
    "normal, own generator": lambda x: torch.randn(x.shape, generator=generator()),
    "normal like": torch.randn_like,
    "integers": lambda x: torch.randint(1000, (len(x), 40)),
    "integers like": lambda x: torch.randint_like(x, 1000),
    "normal with a mean": lambda x: torch.normal(x, 1.0),
    "normal with a spread": lambda x: torch.normal(0.0, x),
    "normal in place": lambda x: torch.empty_like(x).normal_(),
    "exponential in place": lambda x: torch.empty_like(x).exponential_(),
    "coins": lambda x: torch.bernoulli(x / 2),
    "coins in place": lambda x: torch.empty_like(x).bernoulli_(x / 2),
    "poisson": torch.poisson,
    "gamma": lambda x: torch.distributions.Gamma(x, x).sample(),
    "dirichlet": lambda x: torch.distributions.Dirichlet(x).sample(),
    "categories": lambda x: torch.multinomial(x, 5),
    "gumbel": lambda x: F.gumbel_softmax(x),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_rows_draw_alike_in_batches_of_any_size(function: Callable[[Tensor], Tensor]) -> None:
    inputs = torch.linspace(0.1, 1.9, 40).expand(ROWS, 40)
    batch = drawn(function, inputs)
    alone = drawn(function, inputs[:1])
    seven = drawn(function, inputs[:1].expand(7, 40))
    assert all(torch.equal(row, alone[0]) for row in (*batch, *seven))
    assert len(batch[0].unique()) > 1, "within a row the numbers differ"
    assert not torch.equal(batch, drawn(function, inputs, seed=2))


def test_rows_may_stand_second() -> None:
    noise = drawn(torch.randn_like, torch.zeros(6, ROWS, 5))
    assert (noise == noise[:1, :1]).all()


def test_coins_can_be_made_to_keep_everything() -> None:
    inputs = torch.ones(ROWS, 40)
    for function in (lambda x: F.dropout(x, 0.75), lambda x: torch.native_dropout(x, 0.75, True)[0]):
        assert (drawn(function, inputs, keep_all=True) == 4).all()
    assert (drawn(lambda x: torch.bernoulli(0.01 * x), inputs, keep_all=True) == 1).all()
    assert (drawn(lambda x: torch.bernoulli(0 * x), inputs, keep_all=True) == 0).all()
    assert (drawn(lambda x: torch.empty_like(x).bernoulli_(0.01 * x), inputs, keep_all=True) == 1).all()


def test_a_permutation_stays_one() -> None:
    assert sorted(drawn(lambda x: torch.randperm(len(x)), torch.zeros(40)).tolist()) == list(range(40))


def test_what_cannot_be_made_equal_is_noted() -> None:
    draws = EqualDraws(ROWS, [], seed=1, keep_all=False)
    with draws.drawing({}):
        torch.multinomial(torch.ones(5), ROWS, replacement=True)
    assert not draws.equal


def test_a_module_draws_the_same_whatever_others_drew_before() -> None:
    one, other = nn.Dropout(0.5), nn.Dropout(0.5)
    inputs = torch.ones(ROWS, 40)

    def both(skip: bool) -> Tensor:
        draws = EqualDraws(ROWS, [], seed=1, keep_all=False)
        with draws.drawing({"one": one, "other": other}):
            if not skip:
                one(inputs)
            return torch.cat([other(inputs), other(inputs)])

    assert torch.equal(both(skip=False), both(skip=True))
    assert not torch.equal(both(skip=True)[:ROWS], both(skip=True)[ROWS:]), "another call draws anew"


def test_loops_that_draw_until_they_accept_come_to_an_end() -> None:
    def accepted(inputs: Tensor) -> Tensor:
        while True:
            coin = torch.rand(len(inputs), 1)
            if float(coin[0]) > 0.95:
                return coin.expand(-1, 2)

    assert (drawn(accepted, torch.zeros(ROWS)) > 0.95).all()

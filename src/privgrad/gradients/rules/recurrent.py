"""LSTM, GRU and plain recurrent layers: step by step, each use of a weight caught; one row's steps are the sum."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from privgrad.gradients.batched import is_batched
from privgrad.gradients.catching import Rule, Scope
from privgrad.gradients.rules import linear

Step = Callable[[Tensor, Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]
"""(gates from the input, gates from the state, state) to the next state; its first tensor is the output."""


def _lstm_step(inputs: Tensor, hidden: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    into, forget, new, out = (inputs + hidden).chunk(4, dim=-1)
    cell = forget.sigmoid() * state[-1] + into.sigmoid() * new.tanh()
    return out.sigmoid() * cell.tanh(), cell


def _gru_step(inputs: Tensor, hidden: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    parts = zip(inputs.chunk(3, dim=-1), hidden.chunk(3, dim=-1), strict=True)
    (reset_in, reset), (update_in, update), (new_in, new) = parts
    keep = (update_in + update).sigmoid()
    candidate = (new_in + (reset_in + reset).sigmoid() * new).tanh()
    return (candidate + keep * (state[0] - candidate),)


def _plain_step(activation: Callable[[Tensor], Tensor]) -> Step:
    return lambda inputs, hidden, state: (activation(inputs + hidden),)


def _recurrent(step: Step, states: int) -> Rule:
    def recurrent(scope: Scope, input: Tensor, hx: Any, params: Any, *options: Any) -> Any:
        """torch.lstm and its like, for plain (not packed) sequences."""
        if not isinstance(params, list | tuple) or not is_batched(input) or len(options) != 6:
            return NotImplemented
        has_biases, layers, dropout, training, bidirectional, batch_first = options
        first = list(hx) if states == 2 else [hx]
        directions = 2 if bidirectional else 1
        each = len(params) // (layers * directions)
        if each != (4 if has_biases else 2) or any(is_batched(weight) for weight in params):
            return NotImplemented  # projections

        def on_rows(rows: int, inputs: Tensor, *first: Tensor) -> tuple[Tensor, ...]:
            # [rows, T, n, d], n being the records that one row holds (1).
            output = inputs.transpose(1, 2) if batch_first else inputs
            last: list[list[Tensor]] = [[] for _ in range(states)]
            for layer in range(layers):
                outputs = []
                for direction in range(directions):
                    number = layer * directions + direction
                    weights = params[number * each : (number + 1) * each]
                    given = output.flip(1) if direction else output
                    sequence, end = _layer(scope, rows, step, given, [part[:, number] for part in first], weights)
                    outputs.append(sequence.flip(1) if direction else sequence)
                    for place, part in enumerate(end):
                        last[place].append(part)
                output = torch.cat(outputs, dim=-1)
                if dropout and layer < layers - 1:
                    output = F.dropout(output, dropout, training)
            output = output.transpose(1, 2) if batch_first else output
            return output, *(torch.stack(parts, dim=1) for parts in last)

        return scope.on_rows(on_rows, input, *first)

    return recurrent


def _layer(
    scope: Scope, rows: int, step: Step, inputs: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One direction of one layer: [rows, T, n, d] to [rows, T, n, hidden], and the last state."""
    input_bias, hidden_bias = (weights[2], weights[3]) if len(weights) == 4 else (None, None)
    gates = linear.on_rows(scope, rows, inputs, weights[0], input_bias)
    outputs = []
    current = tuple(state)
    for now in gates.unbind(1):
        current = step(now, linear.on_rows(scope, rows, current[0], weights[1], hidden_bias), current)
        outputs.append(current[0])
    return torch.stack(outputs, dim=1), current


def _cell(step: Step, states: int) -> Rule:
    def cell(
        scope: Scope, input: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None
    ) -> Any:
        """torch.lstm_cell and its like."""
        with scope.mode:
            state = tuple(hx) if states == 2 else (hx,)
            after = step(F.linear(input, w_ih, b_ih), F.linear(state[0], w_hh, b_hh), state)
        return after if states == 2 else after[0]

    return cell


def _both(step: Step, states: int, layer: Any, cell: Any) -> Iterator[tuple[Any, Rule]]:
    yield layer, _recurrent(step, states)
    yield cell, _cell(step, states)


RULES: Mapping[Any, Rule] = dict(
    [
        *_both(_lstm_step, 2, torch._VF.lstm, torch._VF.lstm_cell),
        *_both(_gru_step, 1, torch._VF.gru, torch._VF.gru_cell),
        *_both(_plain_step(torch.tanh), 1, torch._VF.rnn_tanh, torch._VF.rnn_tanh_cell),
        *_both(_plain_step(torch.relu), 1, torch._VF.rnn_relu, torch._VF.rnn_relu_cell),
    ]
)

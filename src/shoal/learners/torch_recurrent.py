"""Recurrent layers out of linear ones, for ``vmap``, which cannot run torch's own for many clients at once.

The equations are those of ``nn.RNN``, ``nn.GRU`` and ``nn.LSTM``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shoal.errors import CannotStackError

State = tuple[Tensor, ...]
"""The hidden state of one layer and direction, [n, hidden]; of an LSTM also the cell's, [n, cells]."""

Cell = Callable[[Tensor, State, Callable[[Tensor], Tensor]], State]
"""``cell(inputs' part of the gates, state, hidden state's part)`` returns the next state."""


def lstm(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Does what ``torch.lstm`` does for sequences of one length."""
    _refuse_packed(args)
    inputs, states, weights, *settings = args
    outputs, (hidden, cells) = _layers(_lstm_cell, inputs, states, weights, settings)
    return outputs, hidden, cells


def gru(*args: Any) -> tuple[Tensor, Tensor]:
    """Does what ``torch.gru`` does for sequences of one length."""
    return _single(_gru_cell, args)


def rnn_tanh(*args: Any) -> tuple[Tensor, Tensor]:
    """Does what ``torch.rnn_tanh`` does for sequences of one length."""
    return _single(_rnn_cell(torch.tanh), args)


def rnn_relu(*args: Any) -> tuple[Tensor, Tensor]:
    """Does what ``torch.rnn_relu`` does for sequences of one length."""
    return _single(_rnn_cell(torch.relu), args)


def _single(cell: Cell, args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    _refuse_packed(args)
    inputs, state, weights, *settings = args
    outputs, (hidden,) = _layers(cell, inputs, (state,), weights, settings)
    return outputs, hidden


def _refuse_packed(args: tuple[Any, ...]) -> None:
    if not isinstance(args[3], bool):  # a packed sequence brings its batch sizes, and all else one place further
        raise CannotStackError(
            "its forward pass runs a PackedSequence, whose steps are of another size for each client"
        )


def _layers(
    cell: Cell,
    inputs: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    settings: Sequence[Any],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Runs all layers and directions; returns the outputs and the last states."""
    has_biases, num_layers, dropout, train, bidirectional, batch_first = settings
    sequence = inputs.transpose(0, 1) if batch_first else inputs
    directions = 2 if bidirectional else 1
    a_direction = len(weights) // (num_layers * directions)
    ends: list[State] = []
    for layer in range(num_layers):
        if layer and dropout and train:
            sequence = F.dropout(sequence, dropout)
        outputs = []
        for direction in range(directions):
            number = layer * directions + direction
            own = weights[number * a_direction : (number + 1) * a_direction]
            start = tuple(state[number] for state in states)
            found, end = _run(cell, sequence, start, own, has_biases=has_biases, backwards=direction == 1)
            outputs.append(found)
            ends.append(end)
        sequence = torch.cat(outputs, dim=-1) if bidirectional else outputs[0]
    last = tuple(torch.stack(one) for one in zip(*ends, strict=True))
    return (sequence.transpose(0, 1) if batch_first else sequence), last


def _run(
    cell: Cell, sequence: Tensor, state: State, weights: Sequence[Tensor], *, has_biases: bool, backwards: bool
) -> tuple[Tensor, State]:
    """Runs one direction of one layer over [steps, n, features]."""
    w_input, w_hidden, *rest = weights
    b_input, b_hidden = (rest[0], rest[1]) if has_biases else (None, None)
    projection = rest[2 if has_biases else 0] if len(rest) > (2 if has_biases else 0) else None
    gates = F.linear(sequence, w_input, b_input)  # for all steps at once
    steps = range(sequence.shape[0])
    outputs: list[Tensor] = []
    for step in reversed(steps) if backwards else steps:
        state = cell(gates[step], state, lambda hidden: F.linear(hidden, w_hidden, b_hidden))
        if projection is not None:
            state = (F.linear(state[0], projection), *state[1:])
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if backwards else outputs), state


def _lstm_cell(gates: Tensor, state: State, recur: Callable[[Tensor], Tensor]) -> State:
    hidden, cells = state
    enter, forget, candidate, leave = (gates + recur(hidden)).chunk(4, dim=-1)
    cells = forget.sigmoid() * cells + enter.sigmoid() * candidate.tanh()
    return leave.sigmoid() * cells.tanh(), cells


def _gru_cell(gates: Tensor, state: State, recur: Callable[[Tensor], Tensor]) -> State:
    (hidden,) = state
    reset, update, candidate = gates.chunk(3, dim=-1)
    old_reset, old_update, old_candidate = recur(hidden).chunk(3, dim=-1)
    kept = (update + old_update).sigmoid()
    new = (candidate + (reset + old_reset).sigmoid() * old_candidate).tanh()
    return (new + kept * (hidden - new),)


def _rnn_cell(activation: Callable[[Tensor], Tensor]) -> Cell:
    def cell(gates: Tensor, state: State, recur: Callable[[Tensor], Tensor]) -> State:
        return (activation(gates + recur(state[0])),)

    return cell

"""Modules to step through, and the steps."""

from __future__ import annotations

import pytest
import torch

import fused_rnn

CELLS = {
    "rnn_tanh": (fused_rnn.RNN, {}),
    "rnn_relu": (fused_rnn.RNN, {"nonlinearity": "relu"}),
    "gru": (fused_rnn.GRU, {}),
    "lstm": (fused_rnn.LSTM, {}),
    "projected": (fused_rnn.LSTM, {}),
}
every_cell = pytest.mark.parametrize("cell", CELLS)
SIZES = [(1, 1), (5, 7), (16, 16), (33, 50), (100, 130), (8, 300), (600, 70)]


def make(cell, inputs, hidden, **options):
    cls, extra = CELLS[cell]
    if cell == "projected":
        if hidden == 1:
            pytest.skip("a projection is smaller than the hidden size")
        extra = {"proj_size": max(1, hidden // 3)}
    return cls(inputs, hidden, **extra, **options)


def run(step, xs, state=None):
    ys = []
    for x in xs:
        y, state = step(x, state)
        ys.append(y)
    return torch.stack(ys), state


def start(module, batch):
    h = torch.randn(module.num_layers, batch, module.proj_size or module.hidden_size)
    if not isinstance(module, (torch.nn.LSTM, fused_rnn.LSTM)):
        return h
    return h, torch.randn(module.num_layers, batch, module.hidden_size)

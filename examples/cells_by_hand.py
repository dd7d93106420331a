"""Cells by hand: the recurrences written out, and shown equal to fused_rnn.

Three models that textbooks build step by step, each given the weights of a layer of ours and the
same input:

- an RNN cell of two linear layers, one for the input and one for the state;
- a stack of such cells, where each layer reads the states of the one below;
- a GRU in NumPy, in both forms in use. Both start from the gates

      r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)    reset
      z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)    update

  and end with h' = (1 - z) n + z h; they differ in the candidate n. With the reset gate after the
  product, as in torch.nn and cuDNN, n = tanh(W_in x + b_in + r (W_hn h + b_hn)). With the reset
  gate before the product, as in the paper (Cho et al., 2014, https://arxiv.org/abs/1406.1078), n =
  tanh(W_in x + b_in + W_hn (r h) + b_hn). Much teaching code also writes z for our 1 - z: negate
  the rows of W_iz, W_hz and their biases to move weights across.

Everything runs in float64, where two right answers agree to about 1e-15.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

import common
import fused_rnn


class HandRNNCell(nn.Module):
    """h' = tanh(W_ih x + b_ih + W_hh h + b_hh), as two linear layers."""

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        self.from_input = nn.Linear(input_size, hidden_size)
        self.from_state = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        # x: [B, I], h: [B, H] -> [B, H]
        return torch.tanh(self.from_input(x) + self.from_state(h))

    @torch.no_grad()
    def take_weights(self, layer: fused_rnn.RNN, number: int) -> None:
        for linear, side in ((self.from_input, "ih"), (self.from_state, "hh")):
            linear.weight.copy_(getattr(layer, f"weight_{side}_l{number}"))
            linear.bias.copy_(getattr(layer, f"bias_{side}_l{number}"))


class HandRNN(nn.Module):
    """Cells on top of each other: at every timestep the state of one is the input of the next."""

    def __init__(self, input_size: int, hidden_size: int, num_layers: int):
        super().__init__()
        sizes = [input_size] + [hidden_size] * (num_layers - 1)
        self.hidden_size = hidden_size
        self.cells = nn.ModuleList(HandRNNCell(size, hidden_size) for size in sizes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # x: [T, B, I] -> outputs [T, B, H], final states [L, B, H]
        states = [x.new_zeros(x.shape[1], self.hidden_size) for _ in self.cells]
        outputs = []
        for value in x:
            for number, cell in enumerate(self.cells):
                value = states[number] = cell(value, states[number])
            outputs.append(value)
        return torch.stack(outputs), torch.stack(states)

    def take_weights(self, layer: fused_rnn.RNN) -> None:
        for number, cell in enumerate(self.cells):
            cell.take_weights(layer, number)


def numpy_gru(x, weights: dict, reset_after: bool):
    """A GRU layer in NumPy: x [T, B, I] -> outputs [T, B, H].

    `weights` has torch's names and layout: rows of gates r, z, n in weight_ih_l0 [3H, I],
    weight_hh_l0 [3H, H], bias_ih_l0 [3H], bias_hh_l0 [3H].
    """

    def sigmoid(a):
        return 1 / (1 + np.exp(-a))

    w_ir, w_iz, w_in = np.split(weights["weight_ih_l0"], 3)
    w_hr, w_hz, w_hn = np.split(weights["weight_hh_l0"], 3)
    b_ir, b_iz, b_in = np.split(weights["bias_ih_l0"], 3)
    b_hr, b_hz, b_hn = np.split(weights["bias_hh_l0"], 3)
    h = np.zeros((x.shape[1], w_hr.shape[1]))
    outputs = []
    for x_t in x:
        r = sigmoid(x_t @ w_ir.T + b_ir + h @ w_hr.T + b_hr)
        z = sigmoid(x_t @ w_iz.T + b_iz + h @ w_hz.T + b_hz)
        hidden = r * (h @ w_hn.T + b_hn) if reset_after else (r * h) @ w_hn.T + b_hn
        n = np.tanh(x_t @ w_in.T + b_in + hidden)
        h = (1 - z) * n + z * h
        outputs.append(h)
    return np.stack(outputs)


def compare_rnn(x: Tensor, num_layers: int) -> float:
    ours = fused_rnn.RNN(x.shape[2], 20, num_layers).to(x)
    by_hand = HandRNN(x.shape[2], 20, num_layers).to(x)
    by_hand.take_weights(ours)
    pairs = zip(ours(x), by_hand(x), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def compare_gru(x: Tensor, reset_after: bool) -> float:
    ours = fused_rnn.GRU(x.shape[2], 20, reset_after=reset_after).to(x)
    weights = {name: p.detach().cpu().numpy() for name, p in ours.named_parameters()}
    by_hand = torch.from_numpy(numpy_gru(x.cpu().numpy(), weights, reset_after))
    return (ours(x)[0].cpu() - by_hand).abs().max().item()


def main(argv: list[str] | None = None) -> int:
    parser = common.Parser(__doc__, cell=None, steps=(100, 30), steps_help="timesteps")
    args = parser.parse(argv)
    x = torch.randn(args.steps, 8, 12, dtype=torch.float64, device=args.device)
    differences = {
        "RNN cell of two linear layers": compare_rnn(x, num_layers=1),
        "3-layer RNN of such cells": compare_rnn(x, num_layers=3),
        "GRU in NumPy, reset after the product": compare_gru(x, reset_after=True),
        "GRU in NumPy, reset before the product": compare_gru(x, reset_after=False),
    }
    results = [
        common.Result(
            f"{name}: largest difference", value, 0.0, "equal", 1e-12, higher_is_better=False
        )
        for name, value in differences.items()
    ]
    return common.report(args, "cells_by_hand", results)


if __name__ == "__main__":
    raise SystemExit(main())

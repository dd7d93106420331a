"""A layer as a node of ONNX: LSTM, GRU or RNN, with its weights in ONNX's order.

The operators are specified at https://onnx.ai/onnx/operators. Their gates are i, o, f, c of LSTM
and z, r, h of GRU, the biases of input and recurrence lie one after the other, and an LSTM's
peepholes go to the gates i, o, f.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cells import ONNX_GATES, ONNX_PEEPHOLES, Cell, DirectionWeights, reorder_gates

# Of the gates of a direction, as the attribute `activations` lists them.
ACTIVATIONS = {
    "lstm": ("Sigmoid", "Tanh", "Tanh"),
    "gru": ("Sigmoid", "Tanh"),
    "gru_reset_before": ("Sigmoid", "Tanh"),
    "rnn_tanh": ("Tanh",),
    "rnn_relu": ("Relu",),
}


class OnnxNode(NamedTuple):
    """What a node of ONNX needs to compute a layer."""

    operator: str  # "LSTM", "GRU" or "RNN"
    W: Tensor  # [D, G*H, I]
    R: Tensor  # [D, G*H, H]
    B: Tensor | None  # [D, 2*G*H]
    attributes: dict[str, Any]  # of the node: hidden_size, direction, ...
    P: Tensor | None = None  # [D, 3*H], LSTM with peepholes


def operator_of(cell: Cell) -> str:
    """The name that ONNX has for a cell."""
    return cell.name.split("_")[0].upper()


def node_of(cell: Cell, weights: list[DirectionWeights]) -> OnnxNode:
    """The node of one layer without projection and normalisation; `weights` of each direction."""
    order, directions = ONNX_GATES[cell.name], len(weights)
    first = weights[0]
    attributes: dict[str, Any] = {
        "hidden_size": first.w_hh.shape[1],
        "direction": "bidirectional" if directions == 2 else "forward",
    }
    if cell.gates == 3:
        attributes["linear_before_reset"] = int(cell.gates_b_hn)
    if cell.gates == 1:
        attributes["activations"] = list(ACTIVATIONS[cell.name]) * directions
    w = torch.stack([reorder_gates(d.w_ih, order) for d in weights])
    r = torch.stack([reorder_gates(d.w_hh, order) for d in weights])
    b = p = None
    if first.b_ih is not None:
        halves = ((d.b_ih, d.b_hh) for d in weights)
        b = torch.stack([torch.cat([reorder_gates(bias, order) for bias in d]) for d in halves])
    if first.peephole is not None:
        p = torch.stack([reorder_gates(d.peephole, ONNX_PEEPHOLES) for d in weights])
    return OnnxNode(operator_of(cell), w, r, b, attributes, p)

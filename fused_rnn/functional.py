"""Recurrent networks as functions of tensors: stacks of layers, dropout, projections, packed rows.

Weights come as one flat list in the order of torch.nn's `_flat_weights`: layer after layer,
forward direction before reverse, each w_ih [G*H, I], w_hh [G*H, P][, b_ih, b_hh [G*H]]
[, w_hr [P, H]]; G gates, H hidden_size, P proj_size or H.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, ops
from .cells import CELLS


def rnn_tanh(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Elman layers with tanh, h' = tanh(W_ih x + b_ih + W_hh h + b_hh).

    Args:
        input: [T, B, I], [B, T, I] with `batch_first`, or packed rows [N, I] with `batch_sizes`.
        hx: [num_layers*D, B, H], or None for zeros; D is 2 when bidirectional, else 1.
        weights: see the module's docstring.
        dropout: probability of zeroing an element of a layer's output on its way to the next.
        training: whether dropout is active.
        batch_sizes: int64 [T] on the CPU, non-increasing: how many packed rows each step has.

    Returns:
        output [T, B, D*H] (laid out as `input` is) and h_n [num_layers*D, B, H].

    Raises:
        TypeError, ValueError, RuntimeError: an argument does not fit; the message names it.

    Example:
        >>> w = [torch.randn(4, 3), torch.randn(4, 4)]
        >>> output, h_n = rnn_tanh(torch.randn(5, 2, 3), None, w)
        >>> output.shape, h_n.shape
        (torch.Size([5, 2, 4]), torch.Size([1, 2, 4]))
    """
    return _recurrent(
        "rnn_tanh", input, hx, weights, num_layers, bidirectional, dropout, training, batch_first,
        batch_sizes,
    )  # fmt: skip


def rnn_relu(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Elman layers with relu; otherwise as `rnn_tanh`."""
    return _recurrent(
        "rnn_relu", input, hx, weights, num_layers, bidirectional, dropout, training, batch_first,
        batch_sizes,
    )  # fmt: skip


def gru(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated recurrent units (Cho et al. 2014), reset gate after the product as in torch.nn.

    Arguments and results as for `rnn_tanh`; G is 3, the gates in the order r, z, n.
    """
    return _recurrent(
        "gru", input, hx, weights, num_layers, bidirectional, dropout, training, batch_first,
        batch_sizes,
    )  # fmt: skip


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Long short-term memory (Hochreiter and Schmidhuber 1997), projected (Sak et al. 2014) where
    `weights` hold a w_hr.

    Arguments as for `rnn_tanh`, but hx is (h_0 [num_layers*D, B, P], c_0 [num_layers*D, B, H]);
    G is 4, the gates in the order i, f, g, o. Returns output [T, B, D*P] and (h_n, c_n).
    """
    return _recurrent(
        "lstm", input, hx, weights, num_layers, bidirectional, dropout, training, batch_first,
        batch_sizes,
    )  # fmt: skip


def _recurrent(
    cell_name: str,
    input: Tensor,
    hx,
    weights: Sequence[Tensor],
    num_layers: int,
    bidirectional: bool,
    dropout: float,
    training: bool,
    batch_first: bool,
    batch_sizes: Tensor | None,
):
    cell, directions = CELLS[cell_name], 2 if bidirectional else 1
    packed = batch_sizes is not None
    checks.is_dense_tensor(input, "input")
    checks.stack_options(num_layers, dropout)
    states = None if hx is None else checks.states(hx, cell.has_c)
    if torch._C._is_any_autocast_enabled():
        input, states, weights = _autocast(input, states, weights)
    if batch_first and not packed and input.dim() == 3:
        input = input.transpose(0, 1)
    batch_size = 0
    if packed:
        batch_size = _first_batch_size(batch_sizes, states)
    elif input.dim() == 3:
        batch_size = input.shape[1]
    checks.recurrent_arguments(
        cell, input, states, weights, num_layers, directions, batch_size, packed
    )
    per_layer = len(weights) // num_layers
    if states is None:
        states = _zero_states(cell, input, weights, num_layers * directions, batch_size, per_layer)
    x = input
    finals = []
    for layer in range(num_layers):
        span = slice(layer * directions, (layer + 1) * directions)
        h0, c0 = states[0][span], states[1][span] if cell.has_c else None
        layer_weights = list(weights[layer * per_layer : (layer + 1) * per_layer])
        x, *final = ops.layer(cell_name, x, h0, c0, layer_weights, batch_sizes)
        finals.append(final)
        if dropout and training and layer < num_layers - 1:
            x = F.dropout(x, dropout, True)
    if batch_first and not packed:
        x = x.transpose(0, 1)
    h_n, c_n = (
        parts[0] if num_layers == 1 or parts[0] is None else torch.cat(parts)
        for parts in zip(*finals, strict=True)
    )
    return x, (h_n, c_n) if cell.has_c else h_n


def _first_batch_size(batch_sizes: Tensor, states: Sequence[Tensor] | None) -> int:
    """The batch size of packed rows; the values after the first are checked where they are used."""
    checks.is_dense_tensor(batch_sizes, "batch_sizes")
    if batch_sizes.dtype != torch.int64 or batch_sizes.dim() != 1 or not batch_sizes.is_cpu:
        raise RuntimeError(
            "batch_sizes: expected a 1-D int64 tensor on the CPU, got "
            f"{batch_sizes.dim()}-D {batch_sizes.dtype} on {batch_sizes.device}"
        )
    if batch_sizes.shape[0] == 0:
        raise RuntimeError("batch_sizes: Expected sequence length to be larger than 0 in RNN")
    if torch.compiler.is_compiling():
        # A number that a graph computes cannot be asked about, and breaks it where it is not
        # compiled in full; the operator looks at it when it runs.
        if states is not None and states[0].dim() == 3:
            return states[0].shape[1]
        first = batch_sizes[0].item()
        torch._check(first >= 0)
        return first
    first = int(batch_sizes[0])
    if first < 1:
        raise RuntimeError(f"batch_sizes: expected positive sizes, got {first} for the first step")
    return first


def _zero_states(cell, input, weights, layers, batch_size, per_layer) -> tuple[Tensor, ...]:
    hidden = weights[0].shape[0] // cell.gates
    out = weights[1].shape[1]
    h0 = input.new_zeros((layers, batch_size, out))
    return (h0, input.new_zeros((layers, batch_size, hidden))) if cell.has_c else (h0,)


def _autocast(input, states, weights):
    """Under autocast every cell follows the rule of nn.Linear: all operands in autocast's dtype."""
    device_type = input.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return input, states, weights
    dtype = torch.get_autocast_dtype(device_type)

    def cast(tensor):
        eligible = tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(dtype) if eligible else tensor

    states = None if states is None else tuple(cast(s) for s in states)
    return cast(input), states, [cast(w) for w in weights]

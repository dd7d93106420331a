"""The cells: one table of their facts, and each cell's equations as readable torch code.

The `step` functions are the mathematics every backend is tested against. They use plain
torch operations only, so they can be differentiated any number of times, vmapped and traced.

Shapes: B batch, H hidden_size, P output size (H, or proj_size for a projected LSTM),
G gates. Weights are laid out as torch.nn lays them out, gates stacked along dim 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

_Item = TypeVar("_Item")


class DirectionWeights(NamedTuple):
    """The parameters of one direction of one layer."""

    w_ih: Tensor  # [G*H, I]
    w_hh: Tensor  # [G*H, P]
    b_ih: Tensor | None = None  # [G*H]
    b_hh: Tensor | None = None  # [G*H]
    w_hr: Tensor | None = None  # [P, H], projected LSTM only
    peephole: Tensor | None = None  # [3*H] from c to i, f and o, where an LSTM has them
    # Gains of normalisations, of W_ih x [G*H] and W_hh h [G*H], and of an LSTM's c [H] with, where
    # there are biases, what is added to it [H], one after the other; longer than any other vector.
    norm: Tensor | None = None


def rnn_tanh_step(gx: Tensor, state: tuple[Tensor, ...], w: DirectionWeights) -> tuple[Tensor, ...]:
    """h' = tanh(W_ih x + b_ih + W_hh h + b_hh)   (Elman 1990)."""
    (h,) = state
    return (torch.tanh(gx + F.linear(h, w.w_hh, w.b_hh)),)


def rnn_relu_step(gx: Tensor, state: tuple[Tensor, ...], w: DirectionWeights) -> tuple[Tensor, ...]:
    """h' = relu(W_ih x + b_ih + W_hh h + b_hh)."""
    (h,) = state
    return (torch.relu(gx + F.linear(h, w.w_hh, w.b_hh)),)


def gru_step(gx: Tensor, state: tuple[Tensor, ...], w: DirectionWeights) -> tuple[Tensor, ...]:
    """Cho et al. 2014, with the reset gate after the product, as torch.nn and cuDNN have it.

    r = sigmoid(gx_r + W_hr h + b_hr)        z = sigmoid(gx_z + W_hz h + b_hz)
    n = tanh(gx_n + r * (W_hn h + b_hn))     h' = (1 - z) * n + z * h
    """
    (h,) = state
    gx_r, gx_z, gx_n = gx.chunk(3, -1)
    gh_r, gh_z, gh_n = F.linear(h, w.w_hh, w.b_hh).chunk(3, -1)
    r = torch.sigmoid(gx_r + gh_r)
    z = torch.sigmoid(gx_z + gh_z)
    n = torch.tanh(gx_n + r * gh_n)
    return (n + z * (h - n),)


def gru_reset_before_step(
    gx: Tensor, state: tuple[Tensor, ...], w: DirectionWeights
) -> tuple[Tensor, ...]:
    """Cho et al. 2014 as they wrote it, with the reset gate before the product.

    As `gru_step`, but for    n = tanh(gx_n + W_hn (r * h) + b_hn)
    """
    (h,) = state
    hidden = h.shape[-1]
    w_rz, w_n = w.w_hh.split((2 * hidden, hidden))
    b_rz, b_n = (None, None) if w.b_hh is None else w.b_hh.split((2 * hidden, hidden))
    gx_rz, gx_n = gx.split((2 * hidden, hidden), -1)
    r, z = torch.sigmoid(gx_rz + F.linear(h, w_rz, b_rz)).chunk(2, -1)
    n = torch.tanh(gx_n + F.linear(r * h, w_n, b_n))
    return (n + z * (h - n),)


def lstm_step(gx: Tensor, state: tuple[Tensor, ...], w: DirectionWeights) -> tuple[Tensor, ...]:
    """Hochreiter and Schmidhuber 1997 with forget gates; projection as in Sak et al. 2014.

    i, f, o = sigmoid(...)    g = tanh(...)    c' = f * c + i * g    h' = (W_hr) (o * tanh(c'))
    """
    h, c = state
    i, f, g, o = (gx + F.linear(h, w.w_hh, w.b_hh)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return (h if w.w_hr is None else F.linear(h, w.w_hr), c)


@dataclass(frozen=True)
class Cell:
    """What the rest of the package needs to know of a cell.

    The forward scan saves for backward `saved_gates` columns of H per row, and the backward
    scan returns `grad_gates` columns of H per row:

    - LSTM: (i, f, g, o), activated; gradients of the pre-activations in the same order.
    - GRU: (hn, r, z, n) with hn = W_hn h + b_hn; gradients (d_hn, d_r, d_z, d_n), so that
      columns [0, 3H) face W_hh (in the order n, r, z) and [H, 4H) face W_ih, both as views.
    - GRU with the reset gate before the product: (r, z, n); gradients of the pre-activations.
    - RNN: nothing, since y alone gives the derivative; gradients of the pre-activation.
    """

    name: str
    gates: int
    saved_gates: int
    grad_gates: int
    has_c: bool
    step: Callable[[Tensor, tuple[Tensor, ...], DirectionWeights], tuple[Tensor, ...]]
    index: int  # how csrc names the cell
    products: tuple[int, ...]  # gates of each product with rows of W_hh, one after the other
    gates_b_hn: bool = False  # whether r multiplies b_hn, which then is no part of the input side
    in_torch: bool = True  # whether torch.nn has it

    @property
    def grads_are_shared(self) -> bool:
        """Whether W_ih and W_hh face the same columns of gradients; each a part of them in GRU."""
        return self.grad_gates == self.gates

    @property
    def torch_mode(self) -> str:
        """The name torch.nn.RNNBase has for this cell."""
        return self.name.upper()


CELLS = {
    cell.name: cell
    for cell in (
        Cell("rnn_tanh", 1, 0, 1, False, rnn_tanh_step, 0, (1,)),
        Cell("rnn_relu", 1, 0, 1, False, rnn_relu_step, 1, (1,)),
        Cell("gru", 3, 4, 4, False, gru_step, 2, (3,), gates_b_hn=True),
        Cell("lstm", 4, 4, 4, True, lstm_step, 3, (4,)),
        Cell("gru_reset_before", 3, 3, 3, False, gru_reset_before_step, 4, (2, 1), in_torch=False),
    )
}
# By what a module's `mode` is.
CELL_OF_MODE = {cell.torch_mode: cell for cell in CELLS.values()}


def weight_shapes(
    cell: Cell,
    features: int,
    hidden: int,
    output: int,  # other than `hidden` where there is a projection
    num_layers: int,
    directions: int,
    biased: bool,
) -> list[tuple[int, ...]]:
    """The shapes of a stack's weights, in the order of torch.nn's `_flat_weights`."""
    rows = cell.gates * hidden
    tail = [(rows, output)]  # what follows w_ih: w_hh, b_ih, b_hh, w_hr
    if biased:
        tail += [(rows,), (rows,)]
    if output != hidden:
        tail.append((output, hidden))
    later = [(rows, output * directions), *tail]
    return [(rows, features), *tail] * directions + later * (directions * (num_layers - 1))


def equal_parts(items: Sequence[_Item], count: int) -> list[Sequence[_Item]]:
    """What there is for all weights of several layers or directions, taken apart."""
    size = len(items) // count
    return [items[i * size : (i + 1) * size] for i in range(count)]


def zero_states(
    cell: Cell, like: Tensor, leading: tuple[int, ...], output: int, hidden: int
) -> tuple[Tensor, ...]:
    """Initial states where none are given: h [..., P] and, where the cell has it, c [..., H]."""
    h0 = like.new_zeros((*leading, output))
    return (h0, like.new_zeros((*leading, hidden))) if cell.has_c else (h0,)


# Which of our gates come first, second, ... in another format. Keras' kernels are transposed.
ONNX_GATES = {
    "rnn_tanh": (0,),
    "rnn_relu": (0,),
    "gru": (1, 0, 2),  # z r h
    "gru_reset_before": (1, 0, 2),
    "lstm": (0, 3, 1, 2),  # i o f c
}
ONNX_PEEPHOLES = (0, 2, 1)  # to the gates i o f
KERAS_GATES = ONNX_GATES | {"lstm": (0, 1, 2, 3)}  # i f c o


def reorder_gates(parameter: Tensor, order: tuple[int, ...]) -> Tensor:
    """[G*H, ...] with the gates in the given order."""
    if order == tuple(range(len(order))):
        return parameter
    rows = parameter.shape[0] // len(order)
    # Not chunk: the exporter to ONNX does not compute a Split of constants in advance.
    return torch.cat([parameter.narrow(0, i * rows, rows) for i in order])


def restore_gates(parameter: Tensor, order: tuple[int, ...]) -> Tensor:
    """The inverse of `reorder_gates`."""
    return reorder_gates(parameter, tuple(order.index(i) for i in range(len(order))))


def is_half(dtype: torch.dtype) -> bool:
    """Whether `dtype` is one of the 16-bit types, whose sums and states are kept in float32."""
    return dtype in (torch.float16, torch.bfloat16)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the states run through time: float32 for half types, else `dtype`."""
    return torch.float32 if is_half(dtype) else dtype

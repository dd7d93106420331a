"""The pointwise part of each cell as Triton functions; `scan.py` takes one as a constant.

Every value is float32, a tile [BLOCK_B, BLOCK_H] of batch rows times hidden units.

forward(pre, h, c, peephole) -> (new h, new c, saved)
    pre: the tuple of pre-activations, both sides added, in the order of `cells.Cell.saved_gates`:
    LSTM's i, f, g, o; GRU's hn, r, z, n, where hn has the hidden side only and n the input side
    only. h, c: the state before the step. saved: what backward wants, in the same order.
backward(saved, h_before, h_after, c_before, c_after, dh, dc, peephole)
        -> (d, dh before, dc before)
    dh: the whole gradient of the new h; dc: of the new c, but for what comes through h. d: the
    gradients of the pre-activations in the order of `cells.Cell.grad_gates`. dh before: what
    reaches the state before the step, but for what comes through W_hh.

peephole: those of an LSTM, [1, BLOCK_H] for the gates i, f and o, or None.

A GRU that resets before the product gets r and z themselves, from the first product, and what n is
the tanh of; backward it gives, in place of d_r, what that is per gradient of r * h.

A cell without c passes it through. The formulas are those of `fused_rnn/cells.py`.
"""

from typing import NamedTuple

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """Within 4 ulp everywhere: near zero by a polynomial, where the formula with exp would keep
    an absolute accuracy only."""
    size = tl.abs(x)
    large = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    square = x * x
    # Fitted to tanh on [0, 0.6], for the smallest relative error: 1.3 ulp.
    tail = -0.00590586056932807 * square + 0.020805377513170242
    tail = tail * square - 0.05378668010234833
    tail = tail * square + 0.13331958651542664
    tail = tail * square - 0.33333298563957214
    small = x + x * (square * tail)
    return tl.where(size < 0.6, small, tl.where(x < 0, -large, large))


@triton.jit
def rnn_tanh_forward(pre, h, c, peephole):
    return tanh(pre[0]), c, ()


@triton.jit
def rnn_tanh_backward(saved, h_before, h_after, c_before, c_after, dh, dc, peephole):
    return (dh * (1.0 - h_after * h_after),), tl.zeros_like(dh), dc


@triton.jit
def rnn_relu_forward(pre, h, c, peephole):
    # This way round a NaN passes, as in torch.
    return tl.where(pre[0] <= 0.0, 0.0, pre[0]), c, ()


@triton.jit
def rnn_relu_backward(saved, h_before, h_after, c_before, c_after, dh, dc, peephole):
    return (tl.where(h_after <= 0.0, 0.0, dh),), tl.zeros_like(dh), dc


@triton.jit
def gru_forward(pre, h, c, peephole):
    r = sigmoid(pre[1])
    z = sigmoid(pre[2])
    n = tanh(pre[3] + r * pre[0])
    return n + z * (h - n), c, (pre[0], r, z, n)


@triton.jit
def gru_backward(saved, h_before, h_after, c_before, c_after, dh, dc, peephole):
    hn, r, z, n = saved[0], saved[1], saved[2], saved[3]
    d_n = dh * (1.0 - z) * (1.0 - n * n)
    d_hn = d_n * r
    d_r = d_hn * hn * (1.0 - r)
    d_z = dh * (h_before - n) * z * (1.0 - z)
    return (d_hn, d_r, d_z, d_n), dh * z, dc


@triton.jit
def gru_reset_before_forward(pre, h, c, peephole):
    r, z, n = pre[0], pre[1], tanh(pre[2])
    return n + z * (h - n), c, (r, z, n)


@triton.jit
def gru_reset_before_backward(saved, h_before, h_after, c_before, c_after, dh, dc, peephole):
    r, z, n = saved[0], saved[1], saved[2]
    d_n = dh * (1.0 - z) * (1.0 - n * n)
    d_z = dh * (h_before - n) * z * (1.0 - z)
    return (h_before * r * (1.0 - r), d_z, d_n), dh * z, dc


@triton.jit
def lstm_forward(pre, h, c, peephole):
    pre_i, pre_f = pre[0], pre[1]
    if peephole is not None:
        pre_i += peephole[0] * c
        pre_f += peephole[1] * c
    i = sigmoid(pre_i)
    f = sigmoid(pre_f)
    g = tanh(pre[2])
    if peephole is None:
        o = sigmoid(pre[3])
    c = f * c + i * g
    if peephole is not None:
        o = sigmoid(pre[3] + peephole[2] * c)
    return o * tanh(c), c, (i, f, g, o)


@triton.jit
def lstm_backward(saved, h_before, h_after, c_before, c_after, dh, dc, peephole):
    o, tanh_c = saved[3], tanh(c_after)
    dc = dc + dh * o * (1.0 - tanh_c * tanh_c)
    if peephole is not None:
        dc += dh * tanh_c * o * (1.0 - o) * peephole[2]
    d = lstm_gates_backward(saved, c_before, dc)
    d_o = dh * tanh_c * o * (1.0 - o)
    dc_before = lstm_past_backward(saved, d, dc, peephole)
    return (d[0], d[1], d[2], d_o), tl.zeros_like(dh), dc_before


@triton.jit
def lstm_gates_backward(saved, c_before, dc):
    """The whole gradient of the new c passed on to the pre-activations of i, f and g."""
    i, f, g = saved[0], saved[1], saved[2]
    return dc * g * i * (1.0 - i), dc * c_before * f * (1.0 - f), dc * i * (1.0 - g * g)


@triton.jit
def lstm_past_backward(saved, d, dc, peephole):
    """And to that of the old c; d: what `lstm_gates_backward` gave."""
    dc_before = dc * saved[1]
    if peephole is not None:
        dc_before += d[0] * peephole[0] + d[1] * peephole[1]
    return dc_before


class CellFunctions(NamedTuple):
    forward: triton.JITFunction
    backward: triton.JITFunction


FUNCTIONS = {
    "rnn_tanh": CellFunctions(rnn_tanh_forward, rnn_tanh_backward),
    "rnn_relu": CellFunctions(rnn_relu_forward, rnn_relu_backward),
    "gru": CellFunctions(gru_forward, gru_backward),
    "gru_reset_before": CellFunctions(gru_reset_before_forward, gru_reset_before_backward),
    "lstm": CellFunctions(lstm_forward, lstm_backward),
}

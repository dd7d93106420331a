"""The reference backend: pure PyTorch, any device, any floating dtype.

The forward scan advances state by state with few, in-place operations. The backward scan uses
that the gradients of one step's gates are linear in the gradient of its state, with factors
that depend on saved values only: these are computed for the whole sequence at once, so that a
timestep costs a multiplication or two and one matrix product.

Half types run through time in float32 and are rounded where they leave the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import handover
from ..cells import DirectionWeights, is_half
from ..problem import Course, LayerInputs, Masks, Problem, Rows
from .base import Backend, allocate_output
from .bundles import LayerOutput, OutputGrads, ScanGrads

States = tuple[Tensor, ...]
Step = Callable[[int, States], States]  # (t, states before) -> states after


class ReferenceBackend(Backend):
    name = "reference"

    def unsupported(self, problem: Problem) -> str | None:
        dtype = problem.dtype
        if not dtype.is_floating_point or dtype.itemsize < 2:
            return f"needs a floating-point dtype of 16 bits or more, got {dtype}"
        return None

    def describe(self, problem: Problem) -> str:
        if handover.is_of(problem):
            return "reference, or torch's own layer in a module's call"
        return ": ".join(filter(None, (self.name, ", ".join(problem.extras))))

    def in_float32(self, problem: Problem) -> bool:
        return is_half(problem.dtype)

    def scan_forward(
        self,
        problem: Problem,
        gx: Tensor,
        inputs: LayerInputs,
        save: bool,
    ) -> LayerOutput:
        _, weights, h0, c0, rows = inputs
        out = allocate_output(problem, gx, save)
        cell, width = problem.cell, problem.output_size
        for d, w in enumerate(weights):
            pieces = _Direction(
                w,
                gx[d],
                out.y[:, d * width : (d + 1) * width],
                out.gates[d] if save else None,
                out.cells[d] if problem.keeps_cells(save) else None,
                rows,
            )
            initial = (h0[d], c0[d]) if cell.has_c else (h0[d],)
            final = (out.h_n[d], out.c_n[d]) if cell.has_c else (out.h_n[d],)
            step = _FORWARD[cell.name](pieces)
            if rows.masks is not None:
                step = _masked_forward(step, _course(rows, d, initial))
            _run(step, initial, final, rows, backwards=d == 1)
        _clear_padding(rows, out.y, out.gates, out.cells)
        return out

    def scan_backward(
        self, problem: Problem, grads: OutputGrads, inputs: LayerInputs, saved: LayerOutput
    ) -> ScanGrads:
        _, weights, h0, c0, rows = inputs
        cell, width, hidden = problem.cell, problem.output_size, problem.hidden_size
        directions, count = problem.directions, saved.y.shape[0]
        grad_gates = saved.y.new_empty((directions, count, cell.grad_gates * hidden))
        grad_h = saved.y.new_empty((directions, count, width)) if problem.proj_size else None
        grad_h0 = h0.new_empty(h0.shape)  # contiguous, whatever h0 is
        grad_c0 = c0.new_empty(c0.shape) if cell.has_c else None
        masks = rows.masks or Masks()
        grad_resets = [
            None if reset is None else torch.zeros_like(reset, dtype=h0.dtype)
            for reset in (masks.reset_h, masks.reset_c)
        ]
        for d, w in enumerate(weights):
            columns = slice(d * width, (d + 1) * width)
            reverse = d == 1
            pieces = _DirectionGrads(
                w,
                grad_gates[d],
                None if grads.y is None else grads.y[:, columns].split(rows.batch_sizes),
                None if grad_h is None else grad_h[d].split(rows.batch_sizes),
                saved.y[:, columns],
                rows.shift(saved.y[:, columns], h0[d], reverse, _of(masks.reset_h, d))
                if "gru" in cell.name
                else None,
                saved.gates[d],
                saved.cells[d],
                rows.shift(saved.cells[d], c0[d], reverse, _of(masks.reset_c, d))
                if cell.has_c
                else None,
                None if grads.cells is None else grads.cells[d].split(rows.batch_sizes),
                rows.batch_sizes,
            )
            initial = [torch.zeros_like(h0[d]) if grads.h_n is None else grads.h_n[d]]
            final = [grad_h0[d]]
            if cell.has_c:
                initial.append(torch.zeros_like(c0[d]) if grads.c_n is None else grads.c_n[d])
                final.append(grad_c0[d])
            # Gradients run through time against the direction of the states.
            step = _BACKWARD[cell.name](pieces)
            if rows.masks is not None:
                step = _masked_backward(
                    step, _course(rows, d, initial), [_of(grad, d) for grad in grad_resets]
                )
            _run(step, initial, final, rows, backwards=not reverse)
        _clear_padding(rows, grad_gates, grad_h)
        return ScanGrads(grad_gates, grad_h0, grad_c0, grad_h, *grad_resets)


def _of(tensor: Tensor | None, direction: int) -> Tensor | None:
    return None if tensor is None else tensor[direction]


def _course(rows: Rows, direction: int, states: Sequence[Tensor]) -> Course:
    """On a device that the host does not wait for, every step is taken by all rows, and then by
    some it was not."""
    return Course.of(rows.masks, rows.timesteps, direction, states)


def _masked_forward(step: Step, course: Course) -> Step:
    def masked(t: int, states: States) -> States:
        return course.passed(t, states, step(t, course.started(t, states)))

    return masked


def _masked_backward(step: Step, course: Course, grad_resets: list[Tensor | None]) -> Step:
    """`grad_resets` [B, P or H] each: of the states after a restart, added to; None: not wanted."""

    def masked(t: int, grads: States) -> States:
        grads = course.passed(t, grads, step(t, grads))
        if course.restarts is None:
            return grads
        for total, grad in zip(grad_resets, grads, strict=False):
            if total is not None:
                total += torch.where(course.restarts[t], grad, 0)
        return tuple(torch.where(course.restarts[t], 0, grad) for grad in grads)

    return masked


def _clear_padding(rows: Rows, *tensors: Tensor | None) -> None:
    """Zeros [..., N, K] in the rows of steps that are not taken, whatever was computed there."""
    taken = None if rows.masks is None else rows.masks.taken(rows.timesteps)
    if taken is None:
        return
    padding = ~taken.flatten().unsqueeze(1)
    for tensor in tensors:
        if tensor is not None:
            tensor.masked_fill_(padding, 0)


def _run(step: Step, initial: States, final: States, rows: Rows, backwards: bool) -> None:
    """Carries states through the timesteps, in time or `backwards`, from `initial` to `final`.

    Both hold one row per batch row. In a packed batch a row's states enter at the first
    timestep it has on the way and leave for `final` at its last.
    """
    order = range(rows.timesteps)
    sizes = rows.batch_sizes
    states, current = tuple(s[:0] for s in initial), 0
    for t in reversed(order) if backwards else order:
        size = sizes[t]
        if size > current:
            joining = tuple(s[current:size] for s in initial)
            states = (
                tuple(torch.cat(pair) for pair in zip(states, joining, strict=True))
                if current
                else joining
            )
        elif size < current:
            for state, end in zip(states, final, strict=True):
                end[size:current] = state[size:]
            states = tuple(s[:size] for s in states)
        current = size
        states = step(t, states)
    for state, end in zip(states, final, strict=True):
        end[:current] = state


class _Direction(NamedTuple):
    """One direction of a forward scan. gates and cells are None when they are not kept."""

    w: DirectionWeights
    gx: Tensor  # [N, G*H], may be overwritten
    y: Tensor  # [N, P], to fill
    gates: Tensor | None  # [N, S*H], to fill
    cells: Tensor | None  # [N, H], to fill
    rows: Rows


class _DirectionGrads(NamedTuple):
    """One direction of a backward scan."""

    w: DirectionWeights
    grad_gates: Tensor  # [N, Q*H], to fill
    grad_y: tuple[Tensor, ...] | None  # per step [b, P]
    grad_h: tuple[Tensor, ...] | None  # per step [b, P], to fill, projected LSTM only
    y: Tensor  # [N, P]
    y_before: Tensor | None  # [N, P] the h each row started from, GRU only
    gates: Tensor  # [N, S*H]
    cells: Tensor  # [N, H]
    cells_before: Tensor | None  # [N, H] the c each row started from, LSTM only
    grad_cells: tuple[Tensor, ...] | None  # per step [b, H]
    batch_sizes: list[int]


def _rnn_forward(activation: Callable) -> Callable[[_Direction], Step]:
    def build(d: _Direction) -> Step:
        w_hh = d.w.w_hh.t()
        gx, y = (tensor.split(d.rows.batch_sizes) for tensor in (d.gx, d.y))

        def step(t: int, states: States) -> States:
            (h,) = states
            return (activation(gx[t].addmm_(h, w_hh), y[t]),)

        return step

    return build


def _tanh(pre: Tensor, out: Tensor) -> Tensor:
    return torch.tanh(pre, out=out)


def _relu(pre: Tensor, out: Tensor) -> Tensor:
    # clamp_min propagates NaN as relu does, and can write where it is told to.
    return torch.clamp_min(pre, 0, out=out)


def _gru_forward(d: _Direction) -> Step:
    hidden, sizes = d.w.w_hh.shape[1], d.rows.batch_sizes
    w_hh = d.w.w_hh.roll(hidden, 0).t()  # gates in the order n, r, z of the saved columns
    b_hn = None if d.w.b_hh is None else d.w.b_hh[2 * hidden :]
    y = d.y.split(sizes)
    gx_rz = d.gx[:, : 2 * hidden].split(sizes)
    gx_n = d.gx[:, 2 * hidden :].split(sizes)
    gates = d.gates
    if gates is None:
        # One timestep's worth, used again and again: step t takes the first rows of it.
        scratch = d.gx.new_empty((d.rows.batch_size, 4 * hidden))
        gates_of = [scratch[:size] for size in sizes] if d.rows.packed else [scratch] * len(sizes)
    else:
        gates_of = gates.split(sizes)

    def step(t: int, states: States) -> States:
        (h,) = states
        saved = gates_of[t]
        torch.mm(h, w_hh, out=saved[:, : 3 * hidden])
        hn, rz, n = saved.split((hidden, 2 * hidden, hidden), 1)
        if b_hn is not None:
            hn += b_hn
        r, z = rz.add_(gx_rz[t]).sigmoid_().chunk(2, 1)
        torch.addcmul(gx_n[t], r, hn, out=n).tanh_()
        # Not lerp, which makes NaN of infinite states.
        return (torch.addcmul(n, z, h - n, out=y[t]),)

    return step


def _gru_reset_before_forward(d: _Direction) -> Step:
    hidden, sizes = d.w.w_hh.shape[1], d.rows.batch_sizes
    w_rz, w_n = (w.t() for w in d.w.w_hh.split((2 * hidden, hidden)))
    y, gx = d.y.split(sizes), d.gx.split(sizes)

    def step(t: int, states: States) -> States:
        (h,) = states
        rz, n = gx[t].split((2 * hidden, hidden), 1)  # the saved gates, where they are saved
        r, z = rz.addmm_(h, w_rz).sigmoid_().chunk(2, 1)
        n.addmm_(r * h, w_n).tanh_()
        return (torch.addcmul(n, z, h - n, out=y[t]),)

    return step


def _lstm_forward(d: _Direction) -> Step:
    hidden, sizes = d.w.w_hh.shape[0] // 4, d.rows.batch_sizes
    w_hh = d.w.w_hh.t()
    w_hr = None if d.w.w_hr is None else d.w.w_hr.t()
    y, gx = d.y.split(sizes), d.gx.split(sizes)
    cells = None if d.cells is None else d.cells.split(sizes)

    def step(t: int, states: States) -> States:
        h, c = states
        pre = gx[t].addmm_(h, w_hh)  # where they are saved, the gates live in gx's memory
        if_, g, o = pre.split((2 * hidden, hidden, hidden), 1)
        i, f = if_.sigmoid_().chunk(2, 1)
        g.tanh_()
        o.sigmoid_()
        c = f * c if cells is None else torch.mul(f, c, out=cells[t])
        c.addcmul_(i, g)
        h = c.tanh()
        if w_hr is None:
            return (torch.mul(o, h, out=y[t]), c)
        return (torch.mm(h.mul_(o), w_hr, out=y[t]), c)

    return step


def _arriving(d: _DirectionGrads, t: int, grad_h: Tensor) -> Tensor:
    """[b, P] the whole gradient of h_t: what came through time, and what came from y."""
    return grad_h if d.grad_y is None else grad_h + d.grad_y[t]


def _rnn_tanh_backward(d: _DirectionGrads) -> Step:
    factors = torch.sub(1, d.y * d.y, out=d.grad_gates).split(d.batch_sizes)

    def step(t: int, states: States) -> States:
        grad = factors[t].mul_(_arriving(d, t, states[0]))
        return (grad @ d.w.w_hh,)

    return step


def _rnn_relu_backward(d: _DirectionGrads) -> Step:
    y, grads = d.y.split(d.batch_sizes), d.grad_gates.split(d.batch_sizes)
    # Not a product: a gradient that is NaN or infinite must not get past a unit that is off.
    mask = torch.ops.aten.threshold_backward.grad_input

    def step(t: int, states: States) -> States:
        grad = mask(_arriving(d, t, states[0]), y[t], 0, grad_input=grads[t])
        return (grad @ d.w.w_hh,)

    return step


def _gru_backward(d: _DirectionGrads) -> Step:
    hn, r, z, n = d.gates.chunk(4, 1)
    f_hn, f_r, f_z, f_n = d.grad_gates.chunk(4, 1)
    torch.mul(1 - z, 1 - n * n, out=f_n)
    torch.mul(d.y_before - n, z * (1 - z), out=f_z)
    torch.mul(f_n, r, out=f_hn)
    torch.mul(f_hn * hn, 1 - r, out=f_r)
    hidden = z.shape[1]
    w_hh = d.w.w_hh.roll(hidden, 0)
    factors = d.grad_gates.unflatten(1, (4, hidden)).split(d.batch_sizes)
    facing_hidden = d.grad_gates[:, : 3 * hidden].split(d.batch_sizes)
    z = z.split(d.batch_sizes)

    def step(t: int, states: States) -> States:
        grad_h = _arriving(d, t, states[0])
        factors[t].mul_(grad_h.unsqueeze(1))
        # The sum last: as the start of the product's accumulation, in torch.addmm, it would make
        # the error of small batches three to four times as large.
        return (torch.addcmul(facing_hidden[t] @ w_hh, grad_h, z[t]),)

    return step


def _gru_reset_before_backward(d: _DirectionGrads) -> Step:
    r, z, n = d.gates.chunk(3, 1)
    hidden = r.shape[1]
    w_rz, w_n = d.w.w_hh.split((2 * hidden, hidden))
    f_r, f_z, f_n = d.grad_gates.chunk(3, 1)
    torch.mul(d.y_before * r, 1 - r, out=f_r)
    torch.mul(d.y_before - n, z * (1 - z), out=f_z)
    torch.mul(1 - z, 1 - n * n, out=f_n)
    f_r, f_zn, rz = (
        f.split(d.batch_sizes)
        for f in (f_r, d.grad_gates[:, hidden:], d.grad_gates[:, : 2 * hidden])
    )
    r, z = r.split(d.batch_sizes), z.split(d.batch_sizes)

    def step(t: int, states: States) -> States:
        grad_h = _arriving(d, t, states[0])
        zn = f_zn[t].unflatten(1, (2, hidden)).mul_(grad_h.unsqueeze(1))
        grad_rh = zn[:, 1] @ w_n  # of the product's operand, r * h
        f_r[t].mul_(grad_rh)
        through = torch.addcmul(grad_rh * r[t], grad_h, z[t])
        return (through.add_(rz[t] @ w_rz),)

    return step


def _lstm_backward(d: _DirectionGrads) -> Step:
    i, f, g, o = d.gates.chunk(4, 1)
    f_i, f_f, f_g, f_o = d.grad_gates.chunk(4, 1)
    torch.mul(g, i * (1 - i), out=f_i)
    torch.mul(d.cells_before, f * (1 - f), out=f_f)
    torch.mul(i, 1 - g * g, out=f_g)
    tanh_c = d.cells.tanh()
    torch.mul(tanh_c, o * (1 - o), out=f_o)
    c_of_h = tanh_c.square_().neg_().add_(1).mul_(o).split(d.batch_sizes)  # dc/dh
    hidden, sizes = i.shape[1], d.batch_sizes
    grad_gates = d.grad_gates.split(sizes)
    factors_ifg = d.grad_gates.unflatten(1, (4, hidden))[:, :3].split(sizes)
    factors_o, f = f_o.split(sizes), f.split(sizes)

    def step(t: int, states: States) -> States:
        grad_h, grad_c = states
        grad_h = _arriving(d, t, grad_h)
        if d.w.w_hr is not None:
            d.grad_h[t].copy_(grad_h)
            grad_h = grad_h @ d.w.w_hr
        grad_c = torch.addcmul(grad_c, grad_h, c_of_h[t])
        if d.grad_cells is not None:
            grad_c += d.grad_cells[t]
        factors_ifg[t].mul_(grad_c.unsqueeze(1))
        factors_o[t].mul_(grad_h)
        return (grad_gates[t] @ d.w.w_hh, grad_c.mul_(f[t]))

    return step


_FORWARD: dict[str, Callable[[_Direction], Step]] = {
    "rnn_tanh": _rnn_forward(_tanh),
    "rnn_relu": _rnn_forward(_relu),
    "gru": _gru_forward,
    "lstm": _lstm_forward,
    "gru_reset_before": _gru_reset_before_forward,
}
_BACKWARD: dict[str, Callable[[_DirectionGrads], Step]] = {
    "rnn_tanh": _rnn_tanh_backward,
    "rnn_relu": _rnn_relu_backward,
    "gru": _gru_backward,
    "lstm": _lstm_backward,
    "gru_reset_before": _gru_reset_before_backward,
}

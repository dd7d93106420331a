"""The narrow waist: one recurrent layer, with its one or two directions, as operators.

`layer` is what the rest of the package calls. Below it are two torch.library operators with
fake implementations, so that compilers see a layer as one opaque node:

    fused_rnn::layer_forward    inputs -> y, h_n, c_n, and what backward needs (gates, cells)
    fused_rnn::layer_backward   gradients of the outputs, and what was saved -> those of the inputs

Shapes: T timesteps, B batch, N rows, I input_size, H hidden_size, P output size (proj_size, or
H), D directions, G gates. Sequences are [T, B, ...], or [N, ...] with `batch_sizes` when packed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch, onnx
from .backends.base import LayerOutput, Needs, OutputGrads
from .cells import CELLS, DirectionWeights, state_dtype
from .problem import Problem, Rows

_library = torch.library.Library("fused_rnn", "DEF")
_library.define(
    "layer_forward("
    "Tensor x, "  # [T, B, I], or [N, I] when packed
    "Tensor h0, "  # [D, B, P]
    "Tensor? c0, "  # [D, B, H], LSTM only
    "Tensor[] weights, "  # of each direction in turn: w_ih, w_hh[, b_ih, b_hh][, w_hr]
    "Tensor? batch_sizes, "  # int64 [T] on the CPU: the layout of a PackedSequence
    "str cell, bool save, str backend"  # backend: "auto" to choose; "" to ask when it runs
    ") -> (Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "layer_backward("
    "Tensor? grad_y, Tensor? grad_h_n, Tensor? grad_c_n, "
    "Tensor x, Tensor h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, "
    "Tensor y, Tensor gates, Tensor cells, "
    "str cell, bool[] needs, str backend"  # needs: which of x, h0, c0, *weights want a gradient
    ") -> Tensor[]",  # their gradients; an empty tensor where none was wanted
    tags=(torch.Tag.pt2_compliant_tag,),
)


def layer(
    cell: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One layer of `cell` over a whole sequence.

    Args:
        cell: a name in `cells.CELLS`.
        x: [T, B, I], or [N, I] with `batch_sizes`.
        h0: [D, B, P]. D is 1 or 2.
        c0: [D, B, H] for LSTM, else None.
        weights: for each direction w_ih [G*H, I], w_hh [G*H, P], and where there are biases
            b_ih, b_hh [G*H], and with a projection w_hr [P, H].
        batch_sizes: int64 [T] on the CPU, the layout of packed rows.

    Returns:
        y [T, B, D*P] or [N, D*P]; h_n [D, B, P]; c_n [D, B, H] or None.
    """
    if torch.compiler.is_compiling():
        if onnx.is_exporting():
            return _onnx_layer(cell, x, h0, c0, weights, batch_sizes)
        # An exported program is trained through the operator's Autograd kernel, or not at all.
        save = torch.is_grad_enabled() and not torch.compiler.is_exporting()
        y, h_n, c_n, _, _ = torch.ops.fused_rnn.layer_forward(
            x, h0, c0, weights, batch_sizes, cell, save, ""
        )
    elif _needs_oracle(x):
        y, h_n, c_n = oracle(cell, x, h0, c0, weights, batch_sizes)
    else:
        y, h_n, c_n = _layer_autograd(
            x, h0, c0, weights, batch_sizes, cell, False, dispatch.requested() or "auto"
        )[:3]
    return y, h_n, c_n if CELLS[cell].has_c else None


def _onnx_layer(cell, x, h0, c0, weights, batch_sizes):
    if batch_sizes is not None:
        raise RuntimeError(
            "torch.onnx.export: input: ONNX's recurrent operators do not take a PackedSequence; "
            "give the model the padded batch"
        )
    return onnx.layer(cell, x, h0, c0, by_direction(h0, c0, weights))


def oracle(
    cell: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same layer in plain torch operations, step by step: differentiable any number of
    times, forward and reverse, and under every function transform. Slow."""
    spec = CELLS[cell]
    layout = _layout(cell, x, h0, c0, weights, batch_sizes)
    sizes, offsets = layout.rows.batch_sizes, layout.rows.offsets
    steps = range(layout.rows.timesteps)
    if not layout.rows.packed:
        x = x.flatten(0, 1)
    outputs, finals = [], []
    for d, w in enumerate(layout.weights):
        initial = (h0[d],) if c0 is None else (h0[d], c0[d])
        gx = torch.nn.functional.linear(x, w.w_ih, w.b_ih)
        y: list[Tensor | None] = [None] * len(steps)
        ended: list[tuple[Tensor, ...]] = []  # states of rows that have ended, last rows first
        states = tuple(s[: sizes[-1 if d else 0]] for s in initial)
        for t in reversed(steps) if d else steps:
            size, current = sizes[t], states[0].shape[0]
            if size > current:
                states = tuple(
                    torch.cat((s, i[current:size])) for s, i in zip(states, initial, strict=True)
                )
            elif size < current:
                ended.append(tuple(s[size:] for s in states))
                states = tuple(s[:size] for s in states)
            states = spec.step(gx[offsets[t] : offsets[t] + size], states, w)
            y[t] = states[0]
        ended.append(states)
        outputs.append(torch.cat(y))
        finals.append([torch.cat(parts) for parts in zip(*reversed(ended), strict=True)])
    y = torch.cat(outputs, -1)
    if not layout.rows.packed:
        y = y.unflatten(0, (len(steps), layout.rows.batch_size))
    h_n, *c_n = (torch.stack(parts) for parts in zip(*finals, strict=True))
    return y, h_n, c_n[0] if c_n else None


def make_problem(
    cell: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    training: bool,
) -> Problem:
    """The problem of one layer call, from its arguments as `layer` takes them."""
    directions = h0.shape[0]
    out, hidden = h0.shape[2], weights[1].shape[0] // CELLS[cell].gates
    return Problem(
        cell_name=cell,
        timesteps=x.shape[0] if batch_sizes is None else batch_sizes.shape[0],
        batch_size=h0.shape[1],
        input_size=x.shape[-1],
        hidden_size=hidden,
        proj_size=out if out != hidden else 0,
        directions=directions,
        bias=len(weights) // directions >= 4,
        packed=batch_sizes is not None,
        training=training,
        dtype=x.dtype,
        device_type=x.device.type,
    )


class _Layout(NamedTuple):
    rows: Rows
    weights: list[DirectionWeights]


def _layout(
    cell: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
) -> _Layout:
    timesteps = x.shape[0] if batch_sizes is None else batch_sizes.shape[0]
    return _Layout(
        Rows(timesteps, h0.shape[1], batch_sizes, x.shape[0]), by_direction(h0, c0, weights)
    )


def by_direction(h0: Tensor, c0: Tensor | None, weights: list[Tensor]) -> list[DirectionWeights]:
    """The flat list as each direction's parameters."""
    projected = c0 is not None and c0.shape[2] != h0.shape[2]
    per_direction = len(weights) // h0.shape[0]
    split = []
    for start in range(0, len(weights), per_direction):
        one = weights[start : start + per_direction]
        biases = one[2:4] if len(one) >= 4 else (None, None)
        split.append(DirectionWeights(one[0], one[1], *biases, one[-1] if projected else None))
    return split


def _rows_of(sequence: Tensor | None, packed: bool) -> Tensor | None:
    """[N, K] view or copy of a sequence."""
    return sequence if sequence is None or packed else sequence.flatten(0, 1)


def _unflatten(rows: Tensor, like: Tensor) -> Tensor:
    """[T, B, K] from rows [N, K], for `like` [T, B, ...]. Not a view to autograd, which would
    forbid changing an operator's output in place."""
    return torch.ops.aten._unsafe_view(rows, (*like.shape[:-1], rows.shape[-1]))


def _forward_impl(x, h0, c0, weights, batch_sizes, cell, save, backend):
    problem = make_problem(cell, x, h0, c0, weights, batch_sizes, save)
    rows, split = _layout(cell, x, h0, c0, weights, batch_sizes)
    out = dispatch.select(problem, backend).layer_forward(
        problem, _rows_of(x, problem.packed), split, h0, c0, rows, save
    )
    y = out.y if problem.packed else _unflatten(out.y, x)
    return y, out.h_n, out.c_n, out.gates, out.cells


def _forward_fake(x, h0, c0, weights, batch_sizes, cell, save, backend):
    spec = CELLS[cell]
    directions, batch, out = h0.shape
    hidden = weights[1].shape[0] // spec.gates
    count = math.prod(x.shape[:-1])  # Size.numel would make the sizes constants
    return (
        x.new_empty((*x.shape[:-1], directions * out)),
        x.new_empty((directions, batch, out)),
        x.new_empty((directions, batch, hidden * spec.has_c)),
        x.new_empty((directions, count, hidden * spec.saved_gates * save)),
        x.new_empty(
            (directions, count, hidden * (spec.has_c and save)), dtype=state_dtype(x.dtype)
        ),
    )


def _backward_impl(
    grad_y,
    grad_h_n,
    grad_c_n,
    x,
    h0,
    c0,
    weights,
    batch_sizes,
    y,
    gates,
    cells,
    cell,
    needs,
    backend,
):
    problem = make_problem(cell, x, h0, c0, weights, batch_sizes, True)
    rows, split = _layout(cell, x, h0, c0, weights, batch_sizes)
    chosen = dispatch.select(problem, backend)
    result = chosen.layer_backward(
        problem,
        OutputGrads(_rows_of(grad_y, problem.packed), grad_h_n, grad_c_n),
        _rows_of(x, problem.packed),
        split,
        h0,
        c0,
        rows,
        LayerOutput(_rows_of(y, problem.packed), None, None, gates, cells),
        Needs(needs[0], needs[1], needs[2], needs[3:]),
    )
    grad_x = result.x if result.x is None or problem.packed else _unflatten(result.x, x)
    grads = [grad_x, result.h0, result.c0, *result.weights]
    return [x.new_empty(0) if g is None else g for g in grads]


def _backward_fake(
    grad_y,
    grad_h_n,
    grad_c_n,
    x,
    h0,
    c0,
    weights,
    batch_sizes,
    y,
    gates,
    cells,
    cell,
    needs,
    backend,
):
    inputs = [x, h0, c0, *weights]
    return [
        like.new_empty(like.shape) if need else x.new_empty(0)
        for like, need in zip(inputs, needs, strict=True)
    ]


class _LayerFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cell, backend, batch_sizes, x, h0, c0, *weights):
        with torch._C._AutoDispatchBelowAutograd():
            y, h_n, c_n, gates, cells = torch.ops.fused_rnn.layer_forward(
                x, h0, c0, weights, batch_sizes, cell, True, backend
            )
        ctx.save_for_backward(batch_sizes, y, gates, cells, x, h0, c0, *weights)
        ctx.cell, ctx.backend = cell, backend
        ctx.mark_non_differentiable(gates, cells)
        if not CELLS[cell].has_c:
            ctx.mark_non_differentiable(c_n)
        ctx.set_materialize_grads(False)
        return y, h_n, c_n, gates, cells

    @staticmethod
    def backward(ctx, grad_y, grad_h_n, grad_c_n, _gates, _cells):
        batch_sizes, y, gates, cells, x, h0, c0, *weights = ctx.saved_tensors
        needs = ctx.needs_input_grad[3:]
        grads = (grad_y, grad_h_n, grad_c_n if CELLS[ctx.cell].has_c else None)
        if all(grad is None for grad in grads):
            return (None,) * (3 + len(needs))
        if torch.is_grad_enabled():  # create_graph: the gradients must be differentiable
            results = _differentiable_backward(
                ctx.cell, grads, (x, h0, c0, *weights), batch_sizes, needs
            )
        else:
            results = torch.ops.fused_rnn.layer_backward(
                *grads, x, h0, c0, weights, batch_sizes, y, gates, cells, ctx.cell, needs,
                ctx.backend,
            )  # fmt: skip
        wanted = (g if need else None for g, need in zip(results, needs, strict=True))
        return (None, None, None, *wanted)


def _differentiable_backward(cell, grads, inputs, batch_sizes, needs):
    """The gradients of the inputs as differentiable functions of the inputs and `grads`."""
    # A view of each input, so that differentiation stops there: an input may depend on another.
    views = [None if i is None else i.view_as(i) for i in inputs]
    x, h0, c0, *weights = views
    outputs = oracle(cell, x, h0, c0, weights, batch_sizes)
    used = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
    wanted = [v for v, need in zip(views, needs, strict=True) if need]
    found = iter(
        torch.autograd.grad(
            [o for o, _ in used],
            wanted,
            [g for _, g in used],
            create_graph=True,
            materialize_grads=True,
        )
    )
    return [next(found) if need else None for need in needs]


def _layer_autograd(x, h0, c0, weights, batch_sizes, cell, save, backend):
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, h0, c0, *weights)
    ):
        return _LayerFunction.apply(cell, backend, batch_sizes, x, h0, c0, *weights)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.fused_rnn.layer_forward(
            x, h0, c0, weights, batch_sizes, cell, save, backend
        )


def _needs_oracle(x: Tensor) -> bool:
    """Whether only plain torch operations will do: inside a function transform, under
    forward-mode differentiation, or for a dtype no backend has."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or x.is_complex()
    )


_library.impl("layer_forward", _forward_impl, "CompositeExplicitAutograd")
_library.impl("layer_forward", _layer_autograd, "Autograd")
_library.impl("layer_backward", _backward_impl, "CompositeExplicitAutograd")
torch.library.register_fake("fused_rnn::layer_forward", _forward_fake, lib=_library)
torch.library.register_fake("fused_rnn::layer_backward", _backward_fake, lib=_library)

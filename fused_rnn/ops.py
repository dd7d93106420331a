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
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from . import derivatives, direct, dispatch, flops, onnx, plain
from .backends.base import Backend
from .backends.bundles import LayerOutput, Needs, OutputGrads
from .cells import CELLS, Cell, state_dtype
from .layer_call import (
    BackwardCall,
    LayerCall,
    LayerResult,
    layer_inputs,
    make_problem,
    no_autocast,
    rows_of,
    unflatten,
    with_resets,
    without_resets,
)
from .problem import NO_NOISE, Masks, Noise, Problem, in_memory, wants_gradients
from .transformed import are_batched, is_exporting, is_transformed, needs_oracle

_library = torch.library.Library("fused_rnn", "DEF")
_INPUTS = (
    "Tensor x, "  # [T, B, I], or [N, I] when packed
    "Tensor h0, "  # [D, B, P]
    "Tensor? c0, "  # [D, B, H], LSTM only
    # of each direction in turn: w_ih, w_hh[, b_ih, b_hh][, w_hr][, peephole][, norm]
    "Tensor[] weights, "
    "Tensor? batch_sizes, "  # int64 [T] on the CPU: the layout of a PackedSequence
    "Tensor? lengths, Tensor? resets, Tensor? reset_h, Tensor? reset_c, "  # see problem.Masks
)
_NOISE = (  # see problem.Noise; gets no gradient
    "Tensor? h_factor=None, Tensor? kept_h=None, Tensor? kept_c=None, "
    "float part_h=0.0, float part_c=0.0"
)
_library.define(
    f"layer_forward({_INPUTS}"
    "str cell, "
    "bool save, "  # whether backward will follow
    "bool states, "  # whether `cells` is an output, wanted in every row and differentiable
    "bool recompute, "  # whether backward shall compute gates and cells anew
    "str backend, "  # "auto" to choose; "" to ask when it runs
    f"{_NOISE}"
    ") -> (Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "layer_backward("
    "Tensor? grad_y, Tensor? grad_h_n, Tensor? grad_c_n, Tensor? grad_cells, "
    f"{_INPUTS}"
    "Tensor y, Tensor gates, Tensor cells, "
    "str cell, "
    "bool[] needs, "  # which of x, h0, c0, reset_h, reset_c, *weights want a gradient
    f"bool states, bool recompute, str backend, {_NOISE}"
    ") -> Tensor[]",  # their gradients; an empty tensor where none was wanted
    tags=(torch.Tag.pt2_compliant_tag,),
)

_NO_MASKS = Masks()


def layer(
    cell: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None = None,
    masks: Masks | None = None,
    *,
    states: bool = False,
    recompute: bool = False,
    noise: Noise = NO_NOISE,
) -> LayerResult:
    """One layer of `cell` over a whole sequence.

    Args:
        cell: a name in `cells.CELLS`.
        x: [T, B, I], or [N, I] with `batch_sizes`.
        h0: [D, B, P]. D is 1 or 2.
        c0: [D, B, H] for LSTM, else None.
        weights: for each direction w_ih [G*H, I], w_hh [G*H, P], and where there are biases
            b_ih, b_hh [G*H], with a projection w_hr [P, H], with peepholes those [3*H], and where
            it normalises the gains, see `cells.DirectionWeights`.
        batch_sizes: int64 [T] on the CPU, the layout of packed rows.
        masks: where the rows of a padded batch end and start afresh. y is zero past the end.
        states: whether to give LSTM's c after every step.
        recompute: whether backward computes anew what it would otherwise have to keep.
        noise: what recurrent dropout and zoneout do, h_factor in `cells.state_dtype`. It,
            peepholes and gains are for backends whose `extras` have them; others leave them to
            plain operations, which backward runs anew.
    """
    states, masks = states and CELLS[cell].has_c, masks or _NO_MASKS
    inputs = (x, h0, c0, weights, batch_sizes, *masks, cell)
    if torch.compiler.is_compiling() and not is_transformed():
        if onnx.is_exporting():
            return onnx.layer(cell, x, h0, c0, weights, batch_sizes, masks, states, noise)
        # An exported program is trained through the operator's Autograd kernel, or not at all.
        save = torch.is_grad_enabled() and not is_exporting()
        out = torch.ops.fused_rnn.layer_forward(*inputs, save, states, recompute, "", *noise)
    elif needs_oracle(x):
        call = LayerCall(*inputs, False, states, recompute, "", *noise)
        if (result := derivatives.with_tangents(call, _outputs)) is not None:
            return result
        if not torch.compiler.is_compiling():
            masks.check(x.shape[0])
        return plain.of_call(call)
    else:
        save = wants_gradients(x, h0, c0, masks.reset_h, masks.reset_c, *weights)
        backend = dispatch.requested() or "auto"
        call = LayerCall(*inputs, save, states, recompute, backend, *noise)
        out = _LayerFunction.apply(call, *call.differentiable) if save else _outputs(call)
    y, h_n, c_n, _, cells = out
    if not states:
        cells = None
    elif batch_sizes is None:
        cells = cells.unflatten(1, x.shape[:2])
    return LayerResult(y, h_n, c_n if CELLS[cell].has_c else None, cells)


class _Way(NamedTuple):
    """How a call ran."""

    problem: Problem
    backend: Backend


def _must_be_seen(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a call is to be an operator: for a mode, trace or profiler, or because a tensor is
    more than numbers in memory. Else what it runs is called as it is, which takes the host less
    time."""
    if torch.compiler.is_compiling() or direct.anything_found(direct.SIGHT_GUARDS):
        return True
    given = [t for t in tensors if t is not None]
    return not direct.are_plain(given) or any(t.is_meta for t in given)


def _outputs(call: LayerCall) -> tuple[Tensor, ...]:
    """What `layer_forward` gives, of what nobody differentiates."""
    with torch._C._AutoDispatchBelowAutograd():
        return _run_forward(call)[0]


def _run_forward(call: LayerCall) -> tuple[tuple[Tensor, ...], _Way | None]:
    """What `layer_forward` gives, and how it ran where that is not an operator's own business. To
    be called below autograd."""
    if (given := _directly(call)) is not None:
        return given, None
    if _must_be_seen((*call.differentiable, call.batch_sizes, call.lengths, call.resets)):
        return torch.ops.fused_rnn.layer_forward(*call), None
    return _forward(call)


def _forward_impl(*arguments):
    call = LayerCall(*arguments)
    given = _directly(call)
    return _forward(call)[0] if given is None else given


def _forward(call: LayerCall) -> tuple[tuple[Tensor, ...], _Way | None]:
    if (given := _by_operator(call)) is not None:
        return given, None
    x, noise = call.x, call.noise
    save = call.save and not call.recompute
    problem = make_problem(*call.inputs, call.save, call.states, noise)
    inputs = layer_inputs(*call.inputs[1:], noise)
    chosen = dispatch.select(problem, call.backend)
    if not chosen.has_extras(problem):
        return _forward_of_oracle(problem, call, save), _Way(problem, chosen)
    with no_autocast(x.device.type):
        out = chosen.forward(problem, inputs, save)
    y = out.y if problem.packed else unflatten(out.y, x)
    return (y, out.h_n, out.c_n, out.gates, out.cells), _Way(problem, chosen)


def _directly(call: LayerCall) -> tuple[Tensor, ...] | None:
    """What `layer_forward` gives, by a call of the extension module, which asks by itself whether
    somebody watches; or None: not for it."""
    # By autocast's rule operands are cast before the operator, or are not meant to be.
    if not _is_ordinary(call) or torch._C._is_any_autocast_enabled():
        return None
    cell, inputs = CELLS[call.cell], (call.x, call.h0, call.c0, *call.weights)
    given = direct.calls().train_layer(
        cell.index, call.h0.shape[0], call.save, False, call.batch_sizes, *inputs
    )
    return None if given is None else _with_empty_outputs(cell, *given)


def _by_operator(call: LayerCall) -> tuple[Tensor, ...] | None:
    """What `layer_forward` gives that saves, by the CPU library's operator, or None: not for it. To
    be called below autograd."""
    if not call.save or not _is_ordinary(call) or direct.is_watched():
        return None
    cell, inputs = CELLS[call.cell], (call.x, call.h0, call.c0, call.weights, call.batch_sizes)
    given = direct.train_layer(cell, *inputs, call.h0.shape[0])
    return _with_empty_outputs(cell, *given) if given else None


def _is_ordinary(call: LayerCall) -> bool:
    """Whether the CPU library may be tried, as far as arguments tell."""
    if call.x.dtype != torch.float32 or not call.x.is_cpu or call.states or call.recompute:
        return False
    if call.backend not in ("", "auto") or call.lengths is not None or call.resets is not None:
        return False
    return not call.noise.names


def _with_empty_outputs(cell: Cell, y: Tensor, h_n: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    """y, h_n, c_n, gates and cells, with zero columns where they are not given."""
    c_n, *saved = rest if cell.has_c else (y.new_empty((*h_n.shape[:2], 0)), *rest)
    gates, cells = direct.saved_outputs(cell, saved, 0) if saved else (None, None)
    nothing = h_n.shape[0], math.prod(y.shape[:-1]), 0
    return (
        y,
        h_n,
        c_n,
        y.new_empty(nothing) if gates is None else gates,
        y.new_empty(nothing) if cells is None else cells,
    )


def _forward_of_oracle(problem: Problem, call: LayerCall, save: bool) -> tuple[Tensor, ...]:
    """`_forward` where no backend has the layer's recurrence. What it saves is left as it was."""
    call.masks.check(problem.timesteps)
    out = plain.of_call(call)
    _, _, c_n, gates, cells = _outputs_to_fill(problem, call.x, call.h0, save)
    y = out.y if problem.packed else unflatten(out.y.flatten(0, 1), call.x)
    if out.cells is not None:
        cells = out.cells if problem.packed else out.cells.flatten(1, 2)
    return y, out.h_n, c_n if out.c_n is None else out.c_n, gates, cells


def _forward_fake(*arguments):
    call = LayerCall(*arguments)
    save = call.save and not call.recompute
    problem = make_problem(*call.inputs, save, call.states, call.noise)
    return _outputs_to_fill(problem, call.x, call.h0, save)


def _outputs_to_fill(problem: Problem, x: Tensor, h0: Tensor, save: bool) -> tuple[Tensor, ...]:
    """What `layer_forward` gives, with any numbers in it."""
    directions, batch, out = h0.shape
    hidden, keep_cells = problem.hidden_size, problem.keeps_cells(save)
    # No product of a size and a bool, which torch 2.11 does not take of symbols.
    saved = problem.saved_columns if save else 0
    count = math.prod(x.shape[:-1])  # Size.numel would make the sizes constants
    return (
        x.new_empty((*x.shape[:-1], directions * out)),
        x.new_empty((directions, batch, out)),
        x.new_empty((directions, batch, hidden if problem.cell.has_c else 0)),
        x.new_empty((directions, count, saved), dtype=problem.saved_dtype),
        x.new_empty((directions, count, hidden if keep_cells else 0), dtype=state_dtype(x.dtype)),
    )


def _backward_impl(*arguments):
    return _backward(BackwardCall.of(*arguments))


def _backward(asked: BackwardCall, way: _Way | None = None) -> list[Tensor]:
    # Hooks may give what was saved back in another order.
    grads, call, saved, needs = asked
    call = call._replace(**call.noise.contiguous()._asdict())
    y, gates, cells = (t.contiguous() for t in saved)
    asked, x = BackwardCall(grads, call, (y, gates, cells), needs), call.x
    if way is None and (given := _gradients_by_library(asked)):
        wanted = iter(given)
        return [next(wanted) if need else x.new_empty(0) for need in needs]
    if way is None:
        problem = make_problem(*call.inputs, True, call.states, call.noise)
        chosen = dispatch.select(problem, call.backend)
    else:
        problem, chosen = way
    if not chosen.has_extras(problem):
        leaves = [  # which in a compiled graph are nobody's to differentiate
            t.detach().requires_grad_() if need else t
            for t, need in zip(call.differentiable, needs, strict=True)
        ]
        found = plain.gradients(call.at(leaves), grads, needs, False)
        return [x.new_empty(0) if g is None else g for g in found]
    inputs, packed = layer_inputs(*call.inputs[1:], call.noise), problem.packed
    grads = [None if grad is None else in_memory(grad) for grad in grads]
    saved = LayerOutput(rows_of(y, packed), None, None, gates, cells)
    with no_autocast(x.device.type):
        if call.recompute:
            saved = chosen.forward(problem, inputs, True)
        grads = OutputGrads(rows_of(grads[0], packed), *grads[1:])
        result = chosen.backward(problem, grads, inputs, saved, Needs.of(needs))
    grad_x = result.x if result.x is None or packed else unflatten(result.x, x)
    found = [grad_x, result.h0, result.c0, result.reset_h, result.reset_c, *result.weights]
    return [x.new_empty(0) if g is None else g for g in found]


def _gradients_by_library(asked: BackwardCall) -> list[Tensor] | None:
    """The gradients that are needed, by the CPU library before anything is asked, or nothing."""
    grads, call, (y, gates, cells), needs = asked
    if not _is_ordinary(call):
        return None
    cell, directions, needs = CELLS[call.cell], call.h0.shape[0], without_resets(needs)
    saved = y, gates if cell.saved_gates else None, cells if cell.has_c else None
    inputs, rows = (call.x, call.h0, call.c0), call.batch_sizes
    given = direct.calls().train_layer_backward(
        cell.index, directions, False, needs, *grads, (*saved, rows, *inputs, *call.weights)
    )
    if given is not None or direct.is_watched():
        return given
    return direct.train_layer_backward(
        cell, grads[:3], *inputs, call.weights, rows, saved, directions, needs
    )


def _backward_fake(*arguments):
    asked = BackwardCall.of(*arguments)
    return [
        like.new_empty(like.shape) if need else asked.call.x.new_empty(0)
        for like, need in zip(asked.call.differentiable, asked.needs, strict=True)
    ]


class _LayerFunction(torch.autograd.Function):
    """Autograd's function of a call that saves, with its `differentiable`."""

    @staticmethod
    def forward(ctx, call, *differentiable):
        with torch._C._AutoDispatchBelowAutograd():
            (y, h_n, c_n, gates, cells), ctx.way = _run_forward(call)
        tensors, ctx.rest = call.apart()
        ctx.save_for_backward(y, gates, cells, *tensors)
        has_c = CELLS[call.cell].has_c
        fixed = [(gates, True), (c_n, not has_c), (cells, not call.states)]
        ctx.mark_non_differentiable(*(tensor for tensor, is_fixed in fixed if is_fixed))
        ctx.set_materialize_grads(False)
        return y, h_n, c_n, gates, cells

    @staticmethod
    def backward(ctx, grad_y, grad_h_n, grad_c_n, _gates, grad_cells):
        saved = ctx.saved_tensors  # once: checkpointing computes them anew at every look
        y, gates, cells, *tensors = saved
        call = LayerCall.joined(tensors, ctx.rest)
        needs = ctx.needs_input_grad[1:]
        grads = (
            grad_y, grad_h_n, grad_c_n if CELLS[call.cell].has_c else None,
            grad_cells if call.states else None,
        )  # fmt: skip
        if all(grad is None for grad in grads):
            return (None,) * (1 + len(needs))
        asked = BackwardCall(grads, call, (y, gates, cells), needs)
        return (None, *layer_gradients(asked, ctx.way))


def layer_gradients(asked: BackwardCall, way: _Way | None = None) -> list[Tensor | None]:
    """The gradients of a call's `differentiable`, differentiable ones where grad mode is on. `way`:
    how forward ran, if that is known."""
    grads, call, _, needs = asked
    if torch.is_grad_enabled() or are_batched(grads):  # create_graph, or by vmap
        if derivatives.are_fast(asked):
            return derivatives.gradients(asked, lambda: _gradients(asked, way))
        return plain.gradients(call, grads, needs, torch.is_grad_enabled())
    return _gradients(asked, way)


def _gradients(asked: BackwardCall, way: _Way | None) -> list[Tensor | None]:
    if way is None or _must_be_seen((*asked.grads, *asked.call.differentiable, *asked.saved)):
        results = torch.ops.fused_rnn.layer_backward(*asked.arguments)
    else:
        results = _backward(asked, way)
    return [g if need else None for g, need in zip(results, asked.needs, strict=True)]


def gradients_anew(
    cell: str,
    grads: tuple[Tensor | None, ...],  # of y, h_n, c_n
    inputs: tuple[Tensor | None, ...],  # x, h0, c0, *weights
    needs: tuple[bool, ...],  # of these
) -> list[Tensor | None]:
    """`layer_gradients` where nothing was saved. To be called where grad mode is off."""
    if (found := direct.gradients_anew(CELLS[cell], grads, inputs, needs)) is not None:
        return found
    x, h0, c0, *weights = inputs
    options = True, False, False, dispatch.requested() or "auto"
    call = LayerCall(x, h0, c0, weights, None, *_NO_MASKS, cell, *options)
    with torch._C._AutoDispatchBelowAutograd():
        (y, _, _, gates, cells), way = _run_forward(call)
    needs = with_resets(needs, False)
    asked = BackwardCall((*grads, None), call, (y, gates, cells), needs)
    return list(without_resets(layer_gradients(asked, way)))


def _layer_autograd(*arguments):
    call = LayerCall(*arguments)
    if wants_gradients(*call.differentiable):
        call = call._replace(save=True)
        return _LayerFunction.apply(call, *call.differentiable)
    return _outputs(call)


_library.impl("layer_forward", _forward_impl, "CompositeExplicitAutograd")
_library.impl("layer_forward", _layer_autograd, "Autograd")
_library.impl("layer_backward", _backward_impl, "CompositeExplicitAutograd")
torch.library.register_fake("fused_rnn::layer_forward", _forward_fake, lib=_library)
torch.library.register_fake("fused_rnn::layer_backward", _backward_fake, lib=_library)
flops.register(torch.ops.fused_rnn.layer_forward, flops.layer_forward)
flops.register(torch.ops.fused_rnn.layer_backward, flops.layer_backward)

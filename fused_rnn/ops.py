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
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

from . import direct, dispatch, flops, onnx, second_order
from .backends.base import Backend, LayerOutput, Needs, OutputGrads
from .cells import CELLS, Cell, DirectionWeights, state_dtype
from .oracle import Recurrence, plain_recurrence
from .oracle import run as oracle_run
from .problem import NO_NOISE, Masks, Noise, Problem, Rows, wants_gradients
from .recurrences import Extras, general_recurrence, noise_of_steps

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


class LayerResult(NamedTuple):
    """What a layer gives."""

    y: Tensor  # [T, B, D*P], or [N, D*P] when packed
    h_n: Tensor  # [D, B, P]
    c_n: Tensor | None  # [D, B, H], LSTM only
    cells: Tensor | None = None  # [D, T, B, H] or [D, N, H] c after every step, where asked for


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
    states = states and CELLS[cell].has_c
    inputs = (x, h0, c0, weights, batch_sizes, *(masks or _NO_MASKS))
    if torch.compiler.is_compiling() and not is_transformed():
        if onnx.is_exporting():
            return onnx_layer(cell, x, h0, c0, weights, batch_sizes, masks, states, noise)
        # An exported program is trained through the operator's Autograd kernel, or not at all.
        save = torch.is_grad_enabled() and not torch.compiler.is_exporting()
        options = (cell, save, states, recompute, "")
        out = torch.ops.fused_rnn.layer_forward(*inputs, *options, *noise)
    elif (result := _with_tangents(cell, inputs, states, noise)) is not None:
        return result
    elif needs_oracle(x):
        if masks is not None and not torch.compiler.is_compiling():
            masks.check(x.shape[0])
        recurrence = recurrence_of(noise, batch_sizes)
        return oracle(
            cell, x, h0, c0, weights, batch_sizes, masks, states=states, recurrence=recurrence
        )
    else:
        backend = dispatch.requested() or "auto"
        out = _layer_autograd(*inputs, cell, False, states, recompute, backend, *noise)
    y, h_n, c_n, _, cells = out
    if not states:
        cells = None
    elif batch_sizes is None:
        cells = cells.unflatten(1, x.shape[:2])
    return LayerResult(y, h_n, c_n if CELLS[cell].has_c else None, cells)


def _with_tangents(
    cell: str, inputs: tuple[Any, ...], states: bool, noise: Noise
) -> LayerResult | None:
    """What `layer` gives in forward mode, of what nobody differentiates in reverse; or None."""
    if forward_ad._current_level < 0 or torch.compiler.is_compiling():
        return None
    x, h0, c0, weights, batch_sizes, *masks = inputs
    given = [t for t in (x, h0, c0, *weights) if t is not None]
    if states or noise.names or any(m is not None for m in masks) or wants_gradients(*given):
        return None
    if not _is_only_forward_mode() or not second_order.fits(
        cell, second_order.Given(x, h0, c0, weights)
    ):
        return None

    def unpacked(t: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """A tangent that is all zeros is none."""
        if t is None:
            return None, None
        primal, tangent = forward_ad.unpack_dual(t)
        return primal, None if tangent is None or tangent._is_zerotensor() else tangent

    (x, dx), (h0, dh0), (c0, dc0) = map(unpacked, (x, h0, c0))
    weights, along = (list(ts) for ts in zip(*map(unpacked, weights), strict=True))
    backend = dispatch.requested() or "auto"
    with torch._C._AutoDispatchBelowAutograd():
        (y, h_n, c_n, *_), _ = _run_forward(
            x, h0, c0, weights, batch_sizes, *masks, cell, False, False, False, backend, *noise
        )
    along = second_order.Given(dx, dh0, dc0, along)
    with torch.no_grad(), _no_autocast(x.device.type):
        moves = second_order.tangents(
            cell, second_order.Given(x, h0, c0, weights), y, along, batch_sizes
        )
    outputs = y, h_n, c_n if CELLS[cell].has_c else None
    return LayerResult(
        *(
            o if o is None else forward_ad.make_dual(o, m)
            for o, m in zip(outputs, moves, strict=True)
        )
    )


def _is_only_forward_mode() -> bool:
    """Whether no transform of torch.func is under way but one `jvp`."""
    depth = _functorch.get_dynamic_layer_stack_depth()
    if depth != 1:
        return depth == 0
    return _functorch.peek_interpreter_stack().key() == _functorch.TransformType.Jvp


def onnx_layer(
    cell: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    masks: Masks | None,
    states: bool,
    noise: Noise = NO_NOISE,
) -> LayerResult:
    """What `layer` computes, as a node of ONNX, or of a layer that has more in its recurrence than
    ONNX's, step after step.

    Raises:
        RuntimeError: ONNX has no such operator, or the steps are not a fixed number.
    """
    masks = masks or Masks()
    for name, given in (
        ("a PackedSequence as input; give the model the padded batch, and lengths", batch_sizes),
        ("resets", masks.resets),
        ("return_states of an LSTM", states or None),
    ):
        if given is not None:
            raise RuntimeError(f"torch.onnx.export: ONNX's recurrent operators do not have {name}")
    split = split_by_direction(h0, c0, weights)
    if not noise.names and split[0].norm is None:
        return LayerResult(*onnx.layer(cell, x, h0, c0, split, masks.lengths), None)
    if isinstance(x.shape[0], torch.SymInt):
        raise RuntimeError(
            "torch.onnx.export: input: expected a fixed number of timesteps, since ONNX's "
            "recurrent operators have no layer normalisation, zoneout and recurrent dropout, got a "
            "dynamic one; export the model with that dimension static"
        )
    recurrence = recurrence_of(noise, None)
    return oracle(cell, x, h0, c0, weights, None, masks, recurrence=recurrence)


def oracle(
    cell: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None = None,
    masks: Masks | None = None,
    *,
    states: bool = False,
    recurrence: Callable[..., Recurrence] = plain_recurrence,
) -> LayerResult:
    """What `layer` computes, by plain torch operations (see `fused_rnn.oracle`)."""
    dtype, wide = x.dtype, state_dtype(x.dtype)
    if masks is not None:
        masks = masks.in_dtype(wide)
    # Also of gains, which are in float32 beside weights that autocast made bfloat16.
    x, h0, c0, *weights = (None if t is None else t.to(wide) for t in (x, h0, c0, *weights))
    rows, by_direction = _layout(cell, x, h0, c0, weights, batch_sizes, masks)
    initial = (h0,) if c0 is None else (h0, c0)
    x_rows = _rows_of(x, rows.packed)
    with _no_autocast(x.device.type):
        (y, *cells), (h_n, *c_n) = oracle_run(
            CELLS[cell], x_rows, initial, by_direction, rows, recurrence
        )
    if not rows.packed:
        y, *cells = y.unflatten(0, x.shape[:2]), *(c.unflatten(1, x.shape[:2]) for c in cells)
    y, h_n, *c_n = (t.to(dtype) for t in (y, h_n, *c_n))
    return LayerResult(y, h_n, c_n[0] if c_n else None, cells[0] if states and cells else None)


def _no_autocast(device_type: str) -> AbstractContextManager:
    """Operands have autocast's dtype already, and some run through time in a wider one."""
    if torch._C._is_any_autocast_enabled() and device_type != "meta":
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def recurrence_of(noise: Noise, batch_sizes: Tensor | None) -> Callable[..., Recurrence]:
    """What `oracle` takes for layers with noise, peepholes or normalisations, or without."""

    def recurrence(cell: Cell, d: int, w: DirectionWeights) -> Recurrence:
        if not noise.names and w.peephole is None and w.norm is None:
            return plain_recurrence(cell, d, w)
        steps = noise_of_steps(noise, d, batch_sizes)
        return general_recurrence(cell, w, Extras.of_weights(cell, w), steps)

    return recurrence


def make_problem(
    cell: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    masks: Masks | None,
    training: bool,
    states: bool = False,
    noise: Noise = NO_NOISE,
) -> Problem:
    """The problem of one layer call, from its arguments as `layer` takes them."""
    directions = h0.shape[0]
    masks = masks or Masks()
    out, hidden = h0.shape[2], weights[1].shape[0] // CELLS[cell].gates
    first = split_by_direction(h0, c0, weights)[0]
    return Problem(
        cell_name=cell,
        timesteps=x.shape[0] if batch_sizes is None else batch_sizes.shape[0],
        batch_size=h0.shape[1],
        input_size=x.shape[-1],
        hidden_size=hidden,
        proj_size=out if out != hidden else 0,
        directions=directions,
        bias=first.b_ih is not None,
        packed=batch_sizes is not None,
        training=training,
        dtype=x.dtype,
        device_type=x.device.type,
        lengths=masks.lengths is not None,
        resets=masks.resets is not None,
        states=states,
        extras=(
            *noise.names,
            *(() if first.norm is None else ("layer_norm",)),
            *(() if first.peephole is None else ("peepholes",)),
        ),
        averaged=noise.averaged,
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
    masks: Masks | None,
    noise: Noise = NO_NOISE,
) -> _Layout:
    timesteps = x.shape[0] if batch_sizes is None else batch_sizes.shape[0]
    if batch_sizes is None and x.shape[1] != h0.shape[1]:  # rows as many might be divided anew
        raise RuntimeError(f"h0: expected a batch of {x.shape[1]} as of x, got {h0.shape[1]}")
    if masks is not None and masks.lengths is None and masks.resets is None:
        masks = None
    if batch_sizes is None:
        noise = noise.of_rows()
    rows = Rows(timesteps, h0.shape[1], batch_sizes, x.shape[0], masks, noise=noise)
    return _Layout(rows, split_by_direction(h0, c0, weights))


def split_by_direction(
    h0: Tensor, c0: Tensor | None, weights: list[Tensor]
) -> list[DirectionWeights]:
    """The flat list as each direction's parameters."""
    projected = c0 is not None and c0.shape[2] != h0.shape[2]
    per_direction = len(weights) // h0.shape[0]
    split = []
    for start in range(0, len(weights), per_direction):
        w_ih, w_hh, *one = weights[start : start + per_direction]
        norm = None
        if one and one[-1].dim() == 1 and one[-1].shape[0] > w_ih.shape[0]:
            norm = one.pop()
        peephole = one.pop() if (len(one) - projected) % 2 else None  # biases come in pairs
        w_hr = one.pop() if projected else None
        biases = one or (None, None)
        split.append(DirectionWeights(w_ih, w_hh, *biases, w_hr, peephole, norm))
    return split


def _rows_of(sequence: Tensor | None, packed: bool) -> Tensor | None:
    """[N, K] view or copy of a sequence."""
    return sequence if sequence is None or packed else sequence.flatten(0, 1)


def unflatten(rows: Tensor, like: Tensor) -> Tensor:
    """[T, B, K] from rows [N, K], for `like` [T, B, ...]. Not a view to autograd, which would
    forbid changing an operator's output in place."""
    return torch.ops.aten._unsafe_view(rows, (*like.shape[:-1], rows.shape[-1]))


def _is_ordinary(
    x: Tensor, layout: tuple[Tensor | None, ...], states: bool, recompute: bool, backend: str
) -> bool:
    """Whether the CPU library may be tried before anything is asked."""
    if x.dtype != torch.float32 or not x.is_cpu or states or recompute:
        return False
    if backend not in ("", "auto") or any(t is not None for t in layout):
        return False
    return not direct.is_watched()


def _with_empty_outputs(cell: Cell, y: Tensor, h_n: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    """y, h_n, c_n, gates and cells, with zero columns where the cell does not have them."""
    given, shape = iter(rest), (*h_n.shape[:2], 0)
    saved = h_n.shape[0], y.shape[:-1].numel(), 0
    return (
        y,
        h_n,
        next(given) if cell.has_c else y.new_empty(shape),
        next(given) if cell.saved_gates else y.new_empty(saved),
        next(given) if cell.has_c else y.new_empty(saved),
    )


class _Way(NamedTuple):
    """How a call ran."""

    problem: Problem
    backend: Backend


def _must_be_seen(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a call is to be an operator: for a mode, trace or profiler, or because a tensor is
    more than numbers in memory. Else what it runs is called as it is, which takes the host less
    time."""
    if torch.compiler.is_compiling() or any(guard() for guard in direct.SIGHT_GUARDS):
        return True
    given = [t for t in tensors if t is not None]
    return not direct.are_plain(given) or any(t.is_meta for t in given)


def _run_forward(*arguments) -> tuple[tuple[Tensor, ...], _Way | None]:
    """What `layer_forward` gives, of its arguments, and how it ran where that is not an operator's
    own business. To be called below autograd."""
    x, h0, c0, weights, batch_sizes, lengths, resets, reset_h, reset_c, *_ = arguments
    masks = lengths, resets, reset_h, reset_c
    if _must_be_seen((x, h0, c0, *weights, batch_sizes, *masks)):
        return torch.ops.fused_rnn.layer_forward(*arguments), None
    return _forward(*arguments)


def _forward_impl(*arguments):
    return _forward(*arguments)[0]


def _forward(
    x, h0, c0, weights, batch_sizes, lengths, resets, reset_h, reset_c,
    cell, save, states, recompute, backend, *noise,
):  # fmt: skip
    noise = Noise(*noise)
    layout = lengths, resets, noise.names or None
    if save and _is_ordinary(x, layout, states, recompute, backend):
        given = direct.train_layer(CELLS[cell], x, h0, c0, weights, batch_sizes, h0.shape[0])
        if given:
            return _with_empty_outputs(CELLS[cell], *given), None
    inputs = (cell, x, h0, c0, weights, batch_sizes, Masks(lengths, resets, reset_h, reset_c))
    problem = make_problem(*inputs, save, states, noise)
    rows, by_direction = _layout(*inputs, noise)
    chosen = dispatch.select(problem, backend)
    if not chosen.has_extras(problem):
        outputs = _forward_of_oracle(problem, inputs, noise, save and not recompute)
        return outputs, _Way(problem, chosen)
    with _no_autocast(x.device.type):
        out = chosen.forward(
            problem, _rows_of(x, problem.packed), by_direction, h0, c0, rows, save and not recompute
        )
    y = out.y if problem.packed else unflatten(out.y, x)
    return (y, out.h_n, out.c_n, out.gates, out.cells), _Way(problem, chosen)


def _forward_of_oracle(
    problem: Problem, inputs: tuple[Any, ...], noise: Noise, save: bool
) -> tuple[Tensor, ...]:
    """`_forward` where no backend has the layer's recurrence. What it saves is left as it was."""
    _, x, h0, *_, batch_sizes, masks = inputs
    masks.check(problem.timesteps)
    recurrence = recurrence_of(noise, batch_sizes)
    out = oracle(*inputs, states=problem.states, recurrence=recurrence)
    _, _, c_n, gates, cells = _outputs_to_fill(problem, x, h0, save)
    y = out.y if problem.packed else unflatten(out.y.flatten(0, 1), x)
    if out.cells is not None:
        cells = out.cells if problem.packed else out.cells.flatten(1, 2)
    return y, out.h_n, c_n if out.c_n is None else out.c_n, gates, cells


def _forward_fake(
    x, h0, c0, weights, batch_sizes, lengths, resets, reset_h, reset_c,
    cell, save, states, recompute, backend, *noise,
):  # fmt: skip
    inputs = (cell, x, h0, c0, weights, batch_sizes, Masks(lengths, resets, reset_h, reset_c))
    save = save and not recompute
    return _outputs_to_fill(make_problem(*inputs, save, states, Noise(*noise)), x, h0, save)


def _outputs_to_fill(problem: Problem, x: Tensor, h0: Tensor, save: bool) -> tuple[Tensor, ...]:
    """What `layer_forward` gives, with any numbers in it."""
    directions, batch, out = h0.shape
    hidden, keep_cells = problem.hidden_size, problem.keeps_cells(save)
    count = math.prod(x.shape[:-1])  # Size.numel would make the sizes constants
    return (
        x.new_empty((*x.shape[:-1], directions * out)),
        x.new_empty((directions, batch, out)),
        x.new_empty((directions, batch, hidden * problem.cell.has_c)),
        x.new_empty((directions, count, problem.saved_columns * save), dtype=problem.saved_dtype),
        x.new_empty((directions, count, hidden * keep_cells), dtype=state_dtype(x.dtype)),
    )


def _backward_impl(
    grad_y, grad_h_n, grad_c_n, grad_cells,
    x, h0, c0, weights, batch_sizes, lengths, resets, reset_h, reset_c,
    y, gates, cells, cell, needs, states, recompute, backend, *noise, way=None,
):  # fmt: skip
    noise = Noise(*noise)
    layout = lengths, resets, noise.names or None
    if way is None and _is_ordinary(x, layout, states, recompute, backend):
        spec, grads = CELLS[cell], (grad_y, grad_h_n, grad_c_n)
        saved = y, gates if spec.saved_gates else None, cells if spec.has_c else None
        given = direct.train_layer_backward(
            spec, grads, x, h0, c0, weights, batch_sizes, saved, h0.shape[0],
            (*needs[:3], *needs[5:]),
        )  # fmt: skip
        if given:
            wanted = iter(given)
            return [next(wanted) if need else x.new_empty(0) for need in needs]
    inputs = (cell, x, h0, c0, weights, batch_sizes, Masks(lengths, resets, reset_h, reset_c))
    if way is None:
        problem = make_problem(*inputs, True, states, noise)
        chosen = dispatch.select(problem, backend)
    else:
        problem, chosen = way
    if not chosen.has_extras(problem):
        grads = grad_y, grad_h_n, grad_c_n, grad_cells
        inputs = [  # which in a compiled graph are nobody's to differentiate
            t.detach().requires_grad_() if need else t
            for t, need in zip((x, h0, c0, reset_h, reset_c, *weights), needs, strict=True)
        ]
        layout = batch_sizes, lengths, resets, noise
        with torch.enable_grad():
            found = _gradients_of_oracle(cell, grads, inputs, layout, needs, False)
        return [x.new_empty(0) if g is None else g for g in found]
    rows, by_direction = _layout(*inputs, noise)
    x_rows = _rows_of(x, problem.packed)
    saved = LayerOutput(_rows_of(y, problem.packed), None, None, gates, cells)
    grads = OutputGrads(_rows_of(grad_y, problem.packed), grad_h_n, grad_c_n, grad_cells)
    given = x_rows, by_direction, h0, c0, rows
    with _no_autocast(x.device.type):
        if recompute:
            saved = chosen.forward(problem, *given, True)
        result = chosen.backward(problem, grads, *given, saved, Needs(*needs[:5], needs[5:]))
    grad_x = result.x if result.x is None or problem.packed else unflatten(result.x, x)
    grads = [grad_x, result.h0, result.c0, result.reset_h, result.reset_c, *result.weights]
    return [x.new_empty(0) if g is None else g for g in grads]


def _backward_fake(
    grad_y, grad_h_n, grad_c_n, grad_cells,
    x, h0, c0, weights, batch_sizes, lengths, resets, reset_h, reset_c,
    y, gates, cells, cell, needs, states, recompute, backend, *noise,
):  # fmt: skip
    inputs = [x, h0, c0, reset_h, reset_c, *weights]
    return [
        like.new_empty(like.shape) if need else x.new_empty(0)
        for like, need in zip(inputs, needs, strict=True)
    ]


class _LayerFunction(torch.autograd.Function):
    """Of the tensors, those that can ask for a gradient come last."""

    @staticmethod
    def forward(
        ctx, options, noise, batch_sizes, lengths, resets,
        x, h0, c0, reset_h, reset_c, *weights,
    ):  # fmt: skip
        cell, states, _, _ = options
        with torch._C._AutoDispatchBelowAutograd():
            (y, h_n, c_n, gates, cells), ctx.way = _run_forward(
                x, h0, c0, weights, batch_sizes, lengths, resets, reset_h, reset_c,
                cell, True, *options[1:], *noise,
            )  # fmt: skip
        ctx.save_for_backward(
            y, gates, cells, batch_sizes, lengths, resets, *noise[:3],
            x, h0, c0, reset_h, reset_c, *weights,
        )  # fmt: skip
        ctx.options, ctx.parts = options, noise[3:]
        fixed = [(gates, True), (c_n, not CELLS[cell].has_c), (cells, not states)]
        ctx.mark_non_differentiable(*(tensor for tensor, is_fixed in fixed if is_fixed))
        ctx.set_materialize_grads(False)
        return y, h_n, c_n, gates, cells

    @staticmethod
    def backward(ctx, grad_y, grad_h_n, grad_c_n, _gates, grad_cells):
        kept = ctx.saved_tensors  # once: checkpointing computes them anew at every look
        layout = *kept[3:6], Noise(*kept[6:9], *ctx.parts)
        cell, states, _, _ = ctx.options
        needs = ctx.needs_input_grad[5:]
        grads = (
            grad_y, grad_h_n, grad_c_n if CELLS[cell].has_c else None,
            grad_cells if states else None,
        )  # fmt: skip
        if all(grad is None for grad in grads):
            return (None,) * (5 + len(needs))
        results = layer_gradients(ctx.options, grads, kept[:3], layout, kept[9:], needs, ctx.way)
        return (None, None, None, None, None, *results)


def layer_gradients(
    options: tuple[str, bool, bool, str],  # cell, states, recompute and backend of the operators
    grads: tuple[Tensor | None, ...],  # of y, h_n, c_n, cells
    saved: tuple[Tensor, ...],  # y, gates, cells
    layout: tuple[Any, ...],  # batch_sizes, lengths, resets, noise
    inputs: tuple[Tensor | None, ...],  # x, h0, c0, reset_h, reset_c, *weights
    needs: tuple[bool, ...],  # of these
    way: _Way | None = None,  # how forward ran, if that is known
) -> list[Tensor | None]:
    """The gradients of the inputs, differentiable ones where grad mode is on."""
    if torch.is_grad_enabled() or are_batched(grads):  # create_graph, or by vmap
        if _has_fast_second_order(options, grads, layout, inputs):
            arguments = *grads[:3], *inputs
            found = _Gradients.apply(options, saved, layout, needs, way, *arguments)
            return list(found)
        return _differentiable_backward(options[0], grads, inputs, layout, needs)
    x, h0, c0, reset_h, reset_c, *weights = inputs
    batch_sizes, lengths, resets, noise = layout
    cell, *others = options
    arguments = (
        *grads, x, h0, c0, weights, batch_sizes, lengths, resets, reset_h, reset_c,
        *saved, cell, needs, *others, *noise,
    )  # fmt: skip
    if way is None or _must_be_seen((*grads, *inputs, *saved)):
        results = torch.ops.fused_rnn.layer_backward(*arguments)
    else:
        results = _backward_impl(*arguments, way=way)
    return [g if need else None for g, need in zip(results, needs, strict=True)]


def gradients_anew(
    cell: str,
    grads: tuple[Tensor | None, ...],  # of y, h_n, c_n
    inputs: tuple[Tensor | None, ...],  # x, h0, c0, *weights
    needs: tuple[bool, ...],  # of these
) -> list[Tensor | None]:
    """`layer_gradients` where nothing was saved. To be called where grad mode is off."""
    x, h0, c0, *weights = inputs
    if (found := direct.gradients_anew(CELLS[cell], grads, inputs, needs)) is not None:
        return found
    options = False, False, dispatch.requested() or "auto"
    nothing = (None,) * 5
    with torch._C._AutoDispatchBelowAutograd():
        (y, _, _, gates, cells), way = _run_forward(
            x, h0, c0, weights, *nothing, cell, True, *options, *NO_NOISE
        )
    found = layer_gradients(
        (cell, *options), (*grads, None), (y, gates, cells), (*nothing[:3], NO_NOISE),
        (x, h0, c0, None, None, *weights), (*needs[:3], False, False, *needs[3:]), way,
    )  # fmt: skip
    return [*found[:3], *found[5:]]


def _has_fast_second_order(options, grads, layout, inputs) -> bool:
    cell, states = options[:2]
    _, lengths, resets, noise = layout
    x, h0, c0, reset_h, reset_c, *weights = inputs
    if not x.is_cpu and not (lengths is None and resets is None):
        return False  # the host would have to wait for them
    if states or noise.names or any(t is not None for t in (reset_h, reset_c, grads[3])):
        return False
    if torch.compiler.is_compiling() or are_batched(grads) or needs_oracle(x):
        return False
    return second_order.fits(cell, second_order.Given(x, h0, c0, weights))


class _Gradients(torch.autograd.Function):
    """A layer's gradients, as a function of those of y, h_n and c_n and of the inputs."""

    @staticmethod
    def forward(ctx, options, saved, layout, needs, way, *given):
        ctx.cell, ctx.needs = options[0], needs
        ctx.save_for_backward(saved[0].detach(), *layout[:3], *given)
        grads, inputs = (*given[:3], None), given[3:]
        results = layer_gradients(options, grads, saved, layout, inputs, needs, way)
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    def backward(ctx, *along):
        y, batch_sizes, lengths, resets, *given = ctx.saved_tensors
        wanted, masks = ctx.needs_input_grad[5:], Masks(lengths, resets)
        if torch.is_grad_enabled() or are_batched(along):
            found = _third_order(ctx, (batch_sizes, *masks[:2], NO_NOISE), given, along, wanted)
            return (None,) * 5 + tuple(found)
        grads, (x, h0, c0, _, _, *weights) = given[:3], given[3:]
        arguments = ctx.cell, grads, second_order.Given(x, h0, c0, weights), y
        along = second_order.Given(*along[:3], along[5:])
        with _no_autocast(x.device.type):
            if lengths is None and resets is None:
                of_grads, of_inputs = second_order.gradients(*arguments, along, batch_sizes)
            else:
                of_grads, of_inputs = second_order.gradients_in_pieces(*arguments, along, masks)
        found = *of_grads, *of_inputs[:3], None, None, *of_inputs.weights
        found = [g if want else None for g, want in zip(found, wanted, strict=True)]
        return (None,) * 5 + tuple(found)


def _third_order(ctx, layout, given, along, wanted):
    """What `_Gradients` hands back, in plain operations: to be differentiated, or for several
    gradients at once."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        views = [t if t is None else t.view_as(t) for t in given]
        grads, inputs = (*views[:3], None), views[3:]
        gradients = _gradients_of_oracle(ctx.cell, grads, inputs, layout, ctx.needs, True)
        return differentiable_grads(gradients, along, views, wanted, create_graph)


def are_batched(grads: Iterable[Tensor | None]) -> bool:
    """Whether backward runs for several gradients at once, is_grads_batched or inside vmap."""
    if torch.compiler.is_compiling():  # which does not know these functions, and has no vmap here
        return False
    is_batched, is_legacy = _functorch.is_batchedtensor, _functorch.is_legacy_batchedtensor
    return any(g is not None and (is_batched(g) or is_legacy(g)) for g in grads)


def _differentiable_backward(cell, grads, inputs, layout, needs):
    """The gradients of the inputs as functions of the inputs and `grads`, in plain operations."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        return _gradients_of_oracle(cell, grads, inputs, layout, needs, create_graph)


def _gradients_of_oracle(cell, grads, inputs, layout, needs, create_graph):
    batch_sizes, lengths, resets, noise = layout
    # A view of each input, so that differentiation stops there: an input may depend on another.
    views = [None if i is None else i.view_as(i) for i in inputs]
    x, h0, c0, reset_h, reset_c, *weights = views
    masks = Masks(lengths, resets, reset_h, reset_c)
    recurrence = recurrence_of(noise, batch_sizes)
    *outputs, cells = oracle(
        cell, x, h0, c0, weights, batch_sizes, masks, states=True, recurrence=recurrence
    )
    if grads[3] is not None and batch_sizes is None:
        cells = cells.flatten(1, 2)
    return differentiable_grads((*outputs, cells), grads, views, needs, create_graph)


def differentiable_grads(outputs, grads, views, needs, create_graph):
    """Of `views`, where there is a need, the gradients of the outputs that have one in `grads`."""
    used = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
    wanted = [v for v, need in zip(views, needs, strict=True) if need]
    found = iter(
        torch.autograd.grad(
            [o for o, _ in used],
            wanted,
            [g.to(o.dtype) for o, g in used],
            create_graph=create_graph,
            materialize_grads=True,
        )
    )
    return [next(found) if need else None for need in needs]


def _layer_autograd(
    x, h0, c0, weights, batch_sizes, lengths, resets, reset_h, reset_c,
    cell, save, states, recompute, backend, *noise,
):  # fmt: skip
    if wants_gradients(x, h0, c0, reset_h, reset_c, *weights):
        return _LayerFunction.apply(
            (cell, states, recompute, backend), Noise(*noise), batch_sizes, lengths, resets,
            x, h0, c0, reset_h, reset_c, *weights,
        )  # fmt: skip
    with torch._C._AutoDispatchBelowAutograd():
        outputs, _ = _run_forward(
            x, h0, c0, weights, batch_sizes, lengths, resets, reset_h, reset_c,
            cell, save, states, recompute, backend, *noise,
        )  # fmt: skip
        return outputs


def is_transformed() -> bool:
    """Whether a transform of torch.func is under way. Of all functions that tell it, this one has
    its true answer in a graph that is being compiled."""
    return _functorch.get_dynamic_layer_stack_depth() > 0


if torch.__version__ < "2.13":  # whose compiler does not know the function
    is_transformed = torch.compiler.assume_constant_result(is_transformed)


def needs_oracle(x: Tensor) -> bool:
    """Whether only plain torch operations will do: inside a function transform, under
    forward-mode differentiation, or for a dtype no backend has."""
    return is_transformed() or torch.autograd.forward_ad._current_level >= 0 or x.is_complex()


_library.impl("layer_forward", _forward_impl, "CompositeExplicitAutograd")
_library.impl("layer_forward", _layer_autograd, "Autograd")
_library.impl("layer_backward", _backward_impl, "CompositeExplicitAutograd")
torch.library.register_fake("fused_rnn::layer_forward", _forward_fake, lib=_library)
torch.library.register_fake("fused_rnn::layer_backward", _backward_fake, lib=_library)
flops.register(torch.ops.fused_rnn.layer_forward, flops.layer_forward)
flops.register(torch.ops.fused_rnn.layer_backward, flops.layer_backward)

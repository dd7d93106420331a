"""Training on the CPU in two calls of the library, past the waist; and any call on ragged rows.

What `direct.py` is to inference: of a small layer the kernels take tens of microseconds, and the
general way's checks, its choice of a backend and its operators written in Python some hundreds. So
modules ask here first where gradients are wanted, or all states, or where rows are packed, or a
padded batch has lengths or resets. What runs is what the general way would have run: the library
(csrc/cpu/train.cpp) looks at every tensor. The extension module (csrc/direct_calls.cpp) calls it,
or operators do where that says None: of large layers, to which a few microseconds are nothing. To a
call that is wrong or out of the ordinary, or that somebody watches or redirects, the answer is
None.

Padded rows that end early or start afresh are packed there (csrc/cpu/pieces.h), as the general way
packs them in `backends/pieces.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence

from . import direct, dispatch, looks, ops
from .cells import CELL_OF_MODE, Cell, zero_states
from .direct import States
from .layer_call import BackwardCall, LayerCall, with_resets, without_resets
from .problem import wants_gradients
from .transformed import are_batched

# Up to so many floats, 1 MiB, the copy that input in another order needs is kept for backward. The
# general way makes it anew there, which is less memory, and no time beside what more rows take.
_KEPT_COPY = 1 << 18

_INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


class _Masks(NamedTuple):
    """Which steps a padded batch has, as the extension module reads them."""

    lengths: Tensor | None  # int64 [B]
    resets: Tensor | None  # bool [T, B], with batch_first [B, T]
    batch_first: bool  # x and y, too


# The steps of a padded batch, or the sizes of those of packed rows; None: all steps of all rows.
_Rows = _Masks | Tensor | None


def layers(
    module: torch.nn.RNNBase,
    looked: list[Any],
    input: Any,
    hx: Any,
    lengths: Any = None,
    resets: Any = None,
    return_states: Any = False,
) -> tuple[Any, ...] | None:
    """What `module.forward(input, hx, ...)` has to return, or None: take the general way."""
    cell, num_layers = CELL_OF_MODE.get(module.mode), module.num_layers
    if cell is None or type(num_layers) is not int or type(return_states) is not bool:
        return None
    dropout = looks.dropout_of(module)
    if dropout is None or module.recompute:
        return None
    is_packed, masks = type(input) is PackedSequence, None
    if lengths is not None or resets is not None:
        masks = None if is_packed else _masks(lengths, resets, module.batch_first)
        if masks is None or (return_states and cell.has_c):
            return None
    in_order = is_packed or masks is not None or not module.batch_first
    is_plain = num_layers == 1 and in_order
    if is_plain:
        result = _one_layer(module, cell, input, hx, masks, return_states)
        if result is not None:
            return result
    if _is_float64(input) and masks is None and not return_states:
        return direct.layers(module, looked, input, hx)
    x, rows, order, original_order = input, masks, None, None
    if is_packed:
        x, rows, order, original_order = input
    states = _states_of_ordinary(cell, x, hx)
    if states is None:
        return None
    if x.dim() == 2 and rows is None:
        return _unbatched(module, looked, x, states, return_states)
    if x.dim() != (2 if is_packed else 3):
        return None
    weights = looks.layer_weights(module, looked)
    if not direct.are_plain(weights):
        return None
    if dropout and masks is not None and module.batch_first:
        # The general way drops elements in the order of timesteps, here there would be others.
        return None
    is_turned = module.batch_first and rows is None
    if not is_packed:
        x = _in_memory_order(x, is_turned)
    if order is not None and states[0] is not None:
        states = _in_order(states, order)
    if x is None or states is None:
        return None
    directions = 2 if module.bidirectional else 1
    if num_layers == 1:
        result = _run(cell, x, states, weights, directions, rows, return_states)
        result = _results(cell, result, directions, return_states)
    else:
        result = _run_stack(
            cell, x, states, weights, directions, rows, num_layers, dropout, return_states
        )
    if result is None:
        return None
    y, final, *histories = result
    if is_packed:
        y, final = PackedSequence(y, *input[1:]), _in_original_order(final, original_order)
    elif is_turned:
        y = y.transpose(0, 1)
        histories = [tuple(h.transpose(1, 2) for h in history) for history in histories]
    return y, tuple(final) if cell.has_c else final[0], *histories


def _one_layer(
    module: torch.nn.RNNBase,
    cell: Cell,
    input: Any,
    hx: Any,
    masks: _Masks | None,
    return_states: bool,
) -> tuple[Any, ...] | None:
    """What `layers` gives for [T, B, I], packed rows or a batch with masks, with nothing asked that
    the library's call asks by itself."""
    states = direct.given_states(cell, hx)
    weights = looks.own_parameters(module, module._flat_weights_names)
    if states is None or weights is None:
        return None
    x, rows, order, original_order = input, masks, None, None
    if is_packed := type(input) is PackedSequence:
        x, rows, order, original_order = input
    elif type(input) is not Tensor or input.dim() != 3:
        return None
    if order is not None and hx is not None:
        return None
    directions = 2 if module.bidirectional else 1
    result = _run_directly(cell, x, states, weights, directions, rows, return_states)
    if result is None:
        return None
    y, final, *histories = _results(cell, result, directions, return_states)
    if is_packed:
        y, final = PackedSequence(y, *input[1:]), _in_original_order(final, original_order)
    return y, tuple(final) if cell.has_c else final[0], *histories


def _unbatched(
    module: torch.nn.RNNBase, looked: list[Any], input: Tensor, states: States, return_states: bool
) -> tuple[Any, ...] | None:
    """What `layers` gives for [T, I] and states [L*D, H]: a batch of one."""
    if input.is_nested or input.layout != torch.strided:
        return None
    if any(s is not None and s.dim() != 2 for s in states):
        return None
    place = 0 if module.batch_first else 1
    h0, c0 = (s if s is None else s.unsqueeze(1) for s in states)
    hx = h0 if c0 is None else (h0, c0)
    result = layers(module, looked, input.unsqueeze(place), hx, None, None, return_states)
    if result is None:
        return None
    y, final, *histories = result
    histories = [tuple(h.squeeze(1 + place) for h in history) for history in histories]
    if type(final) is tuple:
        return y.squeeze(place), tuple(s.squeeze(1) for s in final), *histories
    return y.squeeze(place), final.squeeze(1), *histories


def step(module: torch.nn.RNNCellBase, looked: list[Any], cell: Cell, input: Any, hx: Any) -> Any:
    """What `module.forward(input, hx)` has to return, or None: take the general way."""
    weights = looks.own_parameters(module, looks.CELL_WEIGHTS)
    states = direct.given_states(cell, hx)
    is_plain = weights is not None and states is not None and type(input) is Tensor
    if is_plain and input.dim() == 2:
        weights = looks.those_given(weights)
        result = _run_directly(cell, input, states, weights, 1)
        if result is not None and weights[1].shape[1] == module.hidden_size:
            return result if cell.has_c else result[0]
    if _is_float64(input):
        return direct.step(module, looked, cell, input, hx)
    states = _states_of_ordinary(cell, input, hx)
    if states is None or input.dim() not in (1, 2):
        return None
    if is_row := input.dim() == 1:
        if any(s is not None and s.dim() != 1 for s in states):
            return None
        input, *states = (t if t is None else t.unsqueeze(0) for t in (input, *states))
    weights = looks.cell_weights(module, looked)
    if not direct.are_plain(weights) or weights[1].shape[-1] != module.hidden_size:
        return None
    # Usually a timestep of a batch, and of a batch-first one no two rows lie together.
    if (x := _in_memory_order(input)) is None:
        return None
    result = _run(cell, x, states, weights, 1)
    if result is not None and is_row:
        result = tuple(state.squeeze(0) for state in result)
    return result if result is None or cell.has_c else result[0]


def _states_of_ordinary(cell: Cell, input: Any, hx: Any) -> States | None:
    """hx as (h0, c0), or None: the call is not for here."""
    if not direct.are_plain((input,)):
        return None
    if direct.is_watched(or_autocast=False) or forward_ad._current_level >= 0:
        return None
    if input.dtype not in direct.NUMBER_TYPES or not input.is_cpu:
        return None
    states = direct.given_states(cell, hx)
    if states is None:
        return None
    given = [state for state in states if state is not None]
    dense = [_in_memory_order(state) for state in given]
    if any(state is None for state in dense):
        return None
    h0, c0 = (*dense, None, None)[:2]
    return h0, c0


def _is_float64(input: Any) -> bool:
    """Whether it may be handed over to torch."""
    return type(input) is Tensor and input.dtype is torch.float64


def _is_float32(x: Tensor) -> bool:
    """Whether a layer computes in float32: half types and autocast are the extension module's."""
    return x.dtype == torch.float32 and not torch._C._is_any_autocast_enabled()


def _in_memory_order(x: Tensor, batch_first: bool = False) -> Tensor | None:
    """x, or [T, B, I] of [B, T, I], as the library takes it: in the order of its memory. None: not
    for here."""
    if x.is_nested or x.layout != torch.strided:
        return None
    x = x.transpose(0, 1) if batch_first else x
    return x if x.is_contiguous() or x.numel() > _KEPT_COPY else x.contiguous()


def _in_order(states: States, order: Tensor) -> States | None:
    """The states in the order of a PackedSequence's rows; or None: they are not as many."""
    # The library looks at the rest.
    if any(s is not None and (s.dim() != 3 or s.shape[1] != order.shape[0]) for s in states):
        return None
    h0, c0 = (None if s is None else s.index_select(1, order) for s in states)
    return h0, c0


def _in_original_order(final: list[Tensor], order: Tensor | None) -> list[Tensor]:
    return final if order is None else [state.index_select(1, order) for state in final]


def _run_stack(
    cell: Cell,
    x: Tensor,
    states: States,
    weights: list[Tensor],
    directions: int,
    rows: _Rows,
    num_layers: int,
    dropout: float,
    return_states: bool,
) -> tuple[Any, ...] | None:
    """What `_results` gives, of layer after layer."""
    per_layer, remainder = divmod(len(weights), max(num_layers, 1))
    # Of states for more layers, slices would take the first.
    leading = (num_layers * directions,)
    if remainder or any(s is not None and s.shape[:1] != leading for s in states):
        return None
    finals, histories = [], []
    before_draws = None
    for layer in range(num_layers):
        span = slice(layer * directions, (layer + 1) * directions)
        h0, c0 = (None if state is None else state[span] for state in states)
        of_layer = weights[layer * per_layer : (layer + 1) * per_layer]
        result = _run(cell, x, (h0, c0), of_layer, directions, rows, return_states)
        result = _results(cell, result, directions, return_states)
        if result is None:
            if before_draws is not None:  # who begins again draws what torch.nn does
                torch.set_rng_state(before_draws)
            return None
        x, final, *history = result
        finals.append(final)
        histories.extend(history)
        if dropout and layer < num_layers - 1:
            if before_draws is None:
                before_draws = torch.get_rng_state()
            x = F.dropout(x, dropout, True)
    if not finals:
        return None
    final, *history = (
        tuple(map(torch.cat, zip(*parts, strict=True))) for parts in (finals, histories) if parts
    )
    return x, final, *history


def _run(
    cell: Cell,
    x: Tensor,  # [T, B, I], [N, I] of packed rows, or of a cell's timestep [B, I]
    states: States,  # [D, B, P] and [D, B, H], or [B, H]; or None for zeros
    weights: list[Tensor],  # as in `ops.layer`
    directions: int,
    rows: _Rows = None,
    return_states: bool = False,
) -> tuple[Tensor, ...] | None:
    """y, h_n (not of a timestep) and, where the cell has it, c_n, and with `return_states`
    [D, N, H] after every step, in float32; or None: not for here."""
    outputs = _run_directly(cell, x, states, weights, directions, rows, return_states)
    if outputs is None and not (return_states and cell.has_c):
        outputs = _run_by_operators(cell, x, states, weights, directions, rows)
    return outputs


def _run_directly(
    cell: Cell,
    x: Tensor,
    states: States,
    weights: list[Any],
    directions: int,
    rows: _Rows = None,
    return_states: bool = False,
) -> tuple[Tensor, ...] | None:
    """What `_run` gives, of any arguments: past torch's dispatcher, with which a small layer takes
    longer. Asks by itself whether somebody watches."""
    if forward_ad._current_level >= 0:
        return None
    try:
        save = wants_gradients(*weights, x, *states)
    except AttributeError:  # not all weights are tensors
        return None
    return_cells = return_states and cell.has_c
    outputs = direct.calls().train_layer(
        cell.index, directions, save, return_cells, rows, x, *states, *weights
    )
    if outputs is None or not save:
        return outputs if outputs is None else tuple(outputs)
    return _apply(cell, directions, rows, outputs, return_cells, x, *states, *weights)


def _results(
    cell: Cell, outputs: tuple[Tensor, ...] | None, directions: int, return_states: bool
) -> tuple[Any, ...] | None:
    """The module's results, of what `_run` gives, y, [h_n] or [h_n, c_n], and with `return_states`
    (h,) or (h, c)."""
    if outputs is None:
        return None
    y, *final = outputs
    if not return_states:
        return y, final
    history = (torch.stack(y.chunk(directions, -1)),)
    if cell.has_c:
        cells = final.pop().to(y.dtype)
        history = *history, cells if y.dim() == 2 else cells.unflatten(1, y.shape[:2])
    return y, final, history


def _run_by_operators(
    cell: Cell, x: Tensor, states: States, weights: list[Tensor], directions: int, rows: _Rows
) -> tuple[Tensor, ...] | None:
    """What `_run` gives, in float32, by operators."""
    if not _is_float32(x):
        return None
    save = wants_gradients(*weights, x, *states)
    batch_sizes, masks = (None, rows) if isinstance(rows, _Masks) else (rows, ())
    with torch._C._AutoDispatchBelowAutograd():
        outputs = direct.train_layer(
            cell, x, *states, weights, batch_sizes, directions, save, *masks
        )
    if not outputs or not save:
        return tuple(outputs) or None
    return _apply(cell, directions, rows, outputs, False, x, *states, *weights)


def _masks(lengths: Any, resets: Any, batch_first: bool) -> _Masks | None:
    """None: not for here. The library looks at sizes and values."""
    masks = [mask for mask in (lengths, resets) if mask is not None]
    if not direct.are_plain(masks) or any(t.layout != torch.strided or t.is_nested for t in masks):
        return None
    if any(t._is_zerotensor() or not t.is_cpu for t in masks):
        return None
    if lengths is not None:
        if lengths.dtype not in _INTEGERS:
            return None
        lengths = lengths.to(torch.int64).contiguous()
    return _Masks(lengths, resets if resets is None else resets.contiguous(), batch_first)


def _are_plain(grads: list[Tensor | None]) -> bool:
    """Whether gradients may go past autograd: nobody differentiates them, batches or watches."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or direct.is_watched():
        return False
    # Zeros without memory, as the backward of torch.sgn gives, stay so when made contiguous.
    if any(grad is not None and grad._is_zerotensor() for grad in grads):
        return False
    return not are_batched(grads)


class _Layer(torch.autograd.Function):
    """A layer that the library has run already."""

    @staticmethod
    def forward(ctx, cell, directions, rows, outputs, return_cells, x, h0, c0, *weights):
        ctx.is_step = x.dim() == 2 and rows is None
        given = (1 if ctx.is_step else 2) + cell.has_c  # what follows them is saved only
        gates, cells = direct.saved_outputs(cell, outputs, given)
        ctx.batch_first = False
        if isinstance(rows, _Masks):
            ctx.batch_first = rows.batch_first
            rows = outputs[-1]  # the pieces, which nobody else knows
        # Of a GRU's or an LSTM's timestep nobody needs it: it may be changed in place, as torch's.
        y = None if ctx.is_step and cell.saved_gates else outputs[0]
        ctx.save_for_backward(y, gates, cells, rows, x, h0, c0, *weights)
        ctx.cell, ctx.directions, ctx.dtype = cell, directions, outputs[0].dtype
        ctx.set_materialize_grads(False)
        return *outputs[:given], *((cells,) if return_cells else ())

    @staticmethod
    def backward(ctx, *grads):
        grads = list(grads)
        if ctx.is_step:
            grads.insert(1, None)
        grads += [None] * (4 - len(grads))  # of c_n and cells
        needs = ctx.needs_input_grad[5:]
        if all(grad is None for grad in grads):
            return (None,) * (5 + len(needs))
        saved = ctx.saved_tensors  # once: checkpointing computes them anew at every look
        results = _library_gradients(ctx, grads, saved, needs)
        if results is None:
            results = _general_gradients(ctx, grads, saved, needs)
        return (None, None, None, None, None, *results)


# `_Layer.apply` without what it asks first, 3 us: arguments that the library has read are neither
# transforms' nor left over from one, and a forward of this form needs no signature.
_apply = super(torch.autograd.Function, _Layer).apply


# Both give the gradients of x, h0, c0 and the weights, from those of y, h_n, c_n and cells.


def _library_gradients(ctx, grads, saved, needs) -> list[Tensor | None] | None:
    """None: not for here."""
    results = None
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        results = direct.calls().train_layer_backward(
            ctx.cell.index, ctx.directions, ctx.batch_first, needs, *grads, saved
        )
    if results is None:
        if grads[3] is not None or not _are_plain(grads):
            return None
        y, gates, cells, rows, x, h0, c0, *weights = saved
        batch_sizes, pieces = (None, rows) if _are_pieces(rows) else (rows, None)
        results = direct.train_layer_backward(
            ctx.cell, grads[:3], x, h0, c0, weights, batch_sizes, (y, gates, cells), ctx.directions,
            needs, pieces, ctx.batch_first,
        )  # fmt: skip
    given = iter(results)
    return [next(given) if need else None for need in needs] if results else None


def _general_gradients(ctx, grads, saved, needs) -> list[Tensor | None]:
    """Differentiable ones where grad mode is on."""
    y, gates, cells, rows, *given = saved
    # What autocast had made of them.
    x, h0, c0, *weights = (t if t is None else t.to(ctx.dtype) for t in given)
    if ctx.is_step:
        x, h0, c0, y, *grads = (
            None if t is None else t.unsqueeze(0) for t in (x, h0, c0, y, *grads)
        )
    if ctx.batch_first:
        x, y, grads[0] = (None if t is None else t.transpose(0, 1) for t in (x, y, grads[0]))
    nothing = x.new_empty((ctx.directions, x.shape[:-1].numel(), 0))
    gates, cells = (nothing if t is None else t for t in (gates, cells))
    batch_sizes, lengths, resets = rows, None, None
    if _are_pieces(rows):
        batch_sizes, (lengths, resets) = None, _masks_of(rows, *x.shape[:2])
        gates, cells = (_with_room(t, x.shape[:2].numel()) for t in (gates, cells))
    leading = ctx.directions, x.shape[1] if batch_sizes is None else int(batch_sizes[0])
    if h0 is None:
        widths = weights[1].shape[1], weights[0].shape[0] // ctx.cell.gates
        h0, c0 = (*zero_states(ctx.cell, x, leading, *widths), None)[:2]
    if y is None:
        with torch.no_grad(), dispatch.backend("auto"):
            y = ops.layer(ctx.cell.name, x, h0, c0, weights).y
    call = LayerCall(
        x, h0, c0, weights, batch_sizes, lengths, resets, None, None,
        ctx.cell.name, True, grads[3] is not None, False, "auto",
    )  # fmt: skip
    asked = BackwardCall(tuple(grads), call, (y, gates, cells), with_resets(needs, False))
    results = without_resets(ops.layer_gradients(asked))
    states = [g.squeeze(0) if ctx.is_step and g is not None else g for g in results[:3]]
    if ctx.batch_first and states[0] is not None:
        states[0] = states[0].transpose(0, 1)
    results = zip([*states, *results[3:]], given, strict=True)
    return [g if g is None or t is None else g.to(t.dtype) for g, t in results]


def _are_pieces(rows: Tensor | None) -> bool:
    """Whether rows in backward are the pieces of a padded batch; else they are the sizes of packed
    rows' steps."""
    return rows is not None and rows.dim() == 2


def _with_room(packed: Tensor, count: int) -> Tensor:
    """[D, count, K] with the elements of [D, M, K] at its beginning, as the general way saves them.
    A copy: what is saved may be wanted again."""
    directions, rows, width = packed.shape
    room = directions * (count - rows) * width
    return F.pad(packed.reshape(-1), (0, room)).view(directions, count, width)


def _masks_of(pieces: Tensor, timesteps: int, batch_size: int) -> tuple[Tensor, Tensor]:
    """Lengths and resets that cut a batch into these pieces."""
    row, start, length, flags = pieces.unbind(1)
    lengths = row.new_zeros(batch_size).index_add_(0, row, length)
    resets = flags.new_zeros((timesteps, batch_size), dtype=torch.bool)
    resets[start, row] = flags >= 2  # a piece that starts afresh
    return lengths, resets

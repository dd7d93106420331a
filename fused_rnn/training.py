"""Training on the CPU in two calls of the library, past the waist; and any call on ragged rows.

What `direct.py` is to inference: of a small layer the kernels take tens of microseconds, and the
general way's checks, its choice of a backend and its operators written in Python some hundreds. So
modules ask here first where gradients are wanted, or where rows are packed, or a padded batch has
lengths or resets. What runs is what the general way would have run: the library
(csrc/cpu/train.cpp) looks at every tensor. The extension module (csrc/direct_calls.cpp) calls it,
or operators do where that says None: of large layers, to which a few microseconds are nothing. To a
call that is wrong or out of the ordinary, or that somebody watches or redirects, the answer is
None.

Padded rows that end early or start afresh are packed, see `backends/pieces.py`: here once for all
layers, and packed they stay for backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence

from . import direct, looks, ops
from .backends.pieces import Pieces
from .cells import Cell
from .direct import States
from .native import cpu_library_error
from .problem import NO_NOISE, Masks, wants_gradients

# Up to so many floats, 1 MiB, the copy that input in another order needs is kept for backward. The
# general way makes it anew there, which is less memory, and no time beside what more rows take.
_KEPT_COPY = 1 << 18

_INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


def layers(
    module: torch.nn.RNNBase,
    looked: list[Any],
    input: Any,
    hx: Any,
    lengths: Any = None,
    resets: Any = None,
) -> tuple[Any, Any] | None:
    """What `module.forward(input, hx, ...)` has to return, or None: take the general way."""
    cell, dropout, num_layers = direct.CELL_OF.get(module.mode), module.dropout, module.num_layers
    if cell is None or type(num_layers) is not int or type(dropout) is not float:
        return None
    if not 0 <= dropout <= 1 or module.recompute:
        return None
    is_packed = type(input) is PackedSequence
    in_order = is_packed or not module.batch_first
    is_plain = num_layers == 1 and lengths is None and resets is None and in_order
    if is_plain and (result := _one_layer(module, cell, input, hx)) is not None:
        return result
    if _is_float64(input) and lengths is None and resets is None:
        return direct.layers(module, looked, input, hx)
    x, batch_sizes, order, original_order = input, None, None, None
    if is_packed:
        x, batch_sizes, order, original_order = input
    states = _states_of_ordinary(cell, x, hx)
    if states is None:
        return None
    if (lengths is not None or resets is not None) and not _is_float32(x):
        return None
    if x.dim() == 2 and not is_packed and lengths is None and resets is None:
        return _unbatched(module, looked, x, states)
    if x.dim() != (2 if is_packed else 3):
        return None
    weights = looks.layer_weights(module, looked)
    if not direct.are_plain(weights):
        return None
    dropout = dropout if module.training and num_layers > 1 else 0.0
    batch_first = module.batch_first and not is_packed
    pieces = None
    if lengths is not None or resets is not None:
        # The general way drops elements of padded rows, here there would be others.
        pieces = None if is_packed or dropout else _cut(x, lengths, resets, batch_first)
        if pieces is None:
            return None
        leading, x = x.shape[:2], _gather(x.flatten(0, 1), pieces.index)
        batch_sizes = pieces.batch_sizes
    elif not is_packed:
        x = _in_memory_order(x, batch_first)
    if order is not None and states[0] is not None:
        states = _in_order(states, order)
    if x is None or states is None:
        return None
    directions = 2 if module.bidirectional else 1
    if num_layers == 1:
        result = _run(cell, x, states, weights, directions, batch_sizes, pieces)
    else:
        result = _run_stack(
            cell, x, states, weights, directions, batch_sizes, pieces, num_layers, dropout
        )
    if result is None:
        return None
    y, *final = result
    if is_packed:
        y, final = PackedSequence(y, *input[1:]), _in_original_order(final, original_order)
    elif pieces is not None:
        y = _spread(y, pieces.index, leading.numel()).view(*leading, -1)
    elif batch_first:
        y = y.transpose(0, 1)
    return y, tuple(final) if cell.has_c else final[0]


def _one_layer(
    module: torch.nn.RNNBase, cell: Cell, input: Any, hx: Any
) -> tuple[Tensor, Any] | None:
    """As `layers` for [T, B, I] or packed rows, with nothing asked that the library's call asks by
    itself."""
    states = direct.given_states(cell, hx)
    weights = looks.own_parameters(module, module._flat_weights_names)
    if states is None or weights is None:
        return None
    x, batch_sizes, order, original_order = input, None, None, None
    if is_packed := type(input) is PackedSequence:
        x, batch_sizes, order, original_order = input
    elif type(input) is not Tensor or input.dim() != 3:
        return None
    if order is not None and hx is not None:
        return None
    directions = 2 if module.bidirectional else 1
    result = _run_directly(cell, x, states, weights, directions, batch_sizes)
    if result is None:
        return None
    y, *final = result
    if is_packed:
        y, final = PackedSequence(y, *input[1:]), _in_original_order(final, original_order)
    return y, tuple(final) if cell.has_c else final[0]


def _unbatched(
    module: torch.nn.RNNBase, looked: list[Any], input: Tensor, states: States
) -> tuple[Any, Any] | None:
    """As `layers` for [T, I] and states [L*D, H]: a batch of one."""
    if input.is_nested or input.layout != torch.strided:
        return None
    if any(s is not None and s.dim() != 2 for s in states):
        return None
    place = 0 if module.batch_first else 1
    h0, c0 = (s if s is None else s.unsqueeze(1) for s in states)
    result = layers(module, looked, input.unsqueeze(place), h0 if c0 is None else (h0, c0))
    if result is None:
        return None
    y, final = result
    if type(final) is tuple:
        return y.squeeze(place), tuple(s.squeeze(1) for s in final)
    return y.squeeze(place), final.squeeze(1)


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
    """Of the rows of a PackedSequence; or None: they are not as many."""
    if not _have_rows(states, order.shape[0]):
        return None
    h0, c0 = (None if s is None else s.index_select(1, order) for s in states)
    return h0, c0


def _in_original_order(final: list[Tensor], order: Tensor | None) -> list[Tensor]:
    return final if order is None else [state.index_select(1, order) for state in final]


def _have_rows(states: States, count: int) -> bool:
    """Whether they are of so many batch rows; the library looks at the rest."""
    return all(s is None or (s.dim() == 3 and s.shape[1] == count) for s in states)


def _run_stack(
    cell: Cell,
    x: Tensor,
    states: States,
    weights: list[Tensor],
    directions: int,
    batch_sizes: Tensor | None,
    pieces: Pieces | None,
    num_layers: int,
    dropout: float,
) -> list[Tensor] | None:
    """As `_run`, layer after layer."""
    per_layer, remainder = divmod(len(weights), max(num_layers, 1))
    # Of states for more layers, slices would take the first.
    leading = (num_layers * directions,)
    if remainder or any(s is not None and s.shape[:1] != leading for s in states):
        return None
    finals = []
    for layer in range(num_layers):
        span = slice(layer * directions, (layer + 1) * directions)
        h0, c0 = (None if state is None else state[span] for state in states)
        of_layer = weights[layer * per_layer : (layer + 1) * per_layer]
        result = _run(cell, x, (h0, c0), of_layer, directions, batch_sizes, pieces)
        if result is None:
            return None
        x, *final = result
        finals.append(final)
        if dropout and layer < num_layers - 1:
            x = F.dropout(x, dropout, True)
    return [x, *map(torch.cat, zip(*finals, strict=True))] if finals else None


def _run(
    cell: Cell,
    x: Tensor,  # [T, B, I], [N, I] with `batch_sizes`, or of a cell's timestep [B, I]
    states: States,  # [D, B, P] and [D, B, H], or [B, H]; or None for zeros
    weights: list[Tensor],  # as in `ops.layer`
    directions: int,
    batch_sizes: Tensor | None = None,
    pieces: Pieces | None = None,  # of the padded batch whose rows x and states are
) -> tuple[Tensor, ...] | None:
    """y, h_n (not of a timestep) and, where the cell has it, c_n; or None: not for here."""
    of_rows = states
    if pieces is not None:
        if not _have_rows(states, pieces.batch_size):
            return None
        states = tuple(None if s is None else pieces.initial(s, None) for s in states)
    outputs = _run_directly(cell, x, states, weights, directions, batch_sizes)
    if outputs is None:
        outputs = _run_by_operators(cell, x, states, weights, directions, batch_sizes)
    if outputs is None or pieces is None:
        return outputs
    y, *final = outputs
    return y, *(pieces.final(s, of_row) for s, of_row in zip(final, of_rows, strict=False))


def _run_directly(
    cell: Cell,
    x: Tensor,
    states: States,
    weights: list[Any],
    directions: int,
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, ...] | None:
    """As `_run`, of any arguments: past torch's dispatcher, with which a small layer takes longer.
    Asks by itself whether somebody watches."""
    if forward_ad._current_level >= 0:
        return None
    try:
        save = wants_gradients(*weights, x, *states)
    except AttributeError:  # not all weights are tensors
        return None
    outputs = direct.calls().train_layer(
        cell.index, directions, save, batch_sizes, x, *states, *weights
    )
    if outputs is None or not save:
        return outputs if outputs is None else tuple(outputs)
    return _apply(cell, directions, batch_sizes, outputs, x, *states, *weights)


def _run_by_operators(
    cell: Cell,
    x: Tensor,
    states: States,
    weights: list[Tensor],
    directions: int,
    batch_sizes: Tensor | None,
) -> tuple[Tensor, ...] | None:
    """As `_run`, in float32."""
    if not _is_float32(x):
        return None
    save = wants_gradients(*weights, x, *states)
    with torch._C._AutoDispatchBelowAutograd():
        outputs = direct.train_layer(cell, x, *states, weights, batch_sizes, directions, save)
    if not outputs or not save:
        return tuple(outputs) or None
    return _apply(cell, directions, batch_sizes, outputs, x, *states, *weights)


def _cut(x: Tensor, lengths: Any, resets: Any, batch_first: bool) -> Pieces | None:
    """None: not for here, or no step is left."""
    masks = [mask for mask in (lengths, resets) if mask is not None]
    if cpu_library_error() is not None or not direct.are_plain(masks):
        return None
    if any(t.is_nested or t.layout != torch.strided or not t.is_cpu for t in (x, *masks)):
        return None
    if any(t._is_zerotensor() for t in (x, *masks)):
        return None
    timesteps, batch_size = x.shape[1::-1] if batch_first else x.shape[:2]
    if lengths is not None:
        if lengths.dtype not in _INTEGERS or lengths.shape != (batch_size,) or batch_size == 0:
            return None
        lengths = lengths.to(torch.int64)
        low, high = map(int, torch.aminmax(lengths))
        if not 0 <= low <= high <= timesteps:
            return None
    if resets is not None:
        if resets.dtype != torch.bool or resets.shape != x.shape[:2]:
            return None
        if batch_first:
            resets = resets.t()
    pieces = Pieces(Masks(lengths, resets), timesteps, batch_size, batch_first)
    return pieces if pieces.index.shape[0] else None


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    """Rows of a padded batch [N, I] in the order of an index [M]."""
    if wants_gradients(rows):
        return _Gathered.apply(rows, index)
    return torch.ops.fused_rnn_cpu.gather_rows.default(rows.contiguous(), index)


def _spread(rows: Tensor, index: Tensor, count: int) -> Tensor:
    """Rows [M, K] where an index [M] says, among zeros [N, K]."""
    if wants_gradients(rows):
        return _Spread.apply(rows, index, count)
    return torch.ops.fused_rnn_cpu.spread_rows.default(rows, index, count)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, index):
        ctx.index, ctx.count = index, rows.shape[0]
        return _gather(rows, index)

    @staticmethod
    def backward(ctx, grad):
        if _are_plain([grad]):
            return _spread(grad.contiguous(), ctx.index, ctx.count), None
        return grad.new_zeros((ctx.count, grad.shape[1])).index_copy(0, ctx.index, grad), None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, index, count):
        ctx.index = index
        return _spread(rows, index, count)

    @staticmethod
    def backward(ctx, grad):
        if _are_plain([grad]):
            return _gather(grad, ctx.index), None, None
        return grad.index_select(0, ctx.index), None, None


def _are_plain(grads: list[Tensor | None]) -> bool:
    """Whether gradients may go past autograd: nobody differentiates them, batches or watches."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or direct.is_watched():
        return False
    # Zeros without memory, as the backward of torch.sgn gives, stay so when made contiguous.
    if any(grad is not None and grad._is_zerotensor() for grad in grads):
        return False
    return not ops.are_batched(grads)


class _Layer(torch.autograd.Function):
    """A layer that the library has run already."""

    @staticmethod
    def forward(ctx, cell, directions, batch_sizes, outputs, x, h0, c0, *weights):
        ctx.is_step = x.dim() == 2 and batch_sizes is None
        given = (1 if ctx.is_step else 2) + cell.has_c  # what follows them is saved only
        gates = outputs[given] if cell.saved_gates else None
        cells = outputs[given + 1] if cell.has_c else None
        ctx.save_for_backward(outputs[0], gates, cells, batch_sizes, x, h0, c0, *weights)
        ctx.cell, ctx.directions = cell, directions
        ctx.set_materialize_grads(False)
        return tuple(outputs[:given])

    @staticmethod
    def backward(ctx, *grads):
        grads = [*grads, *(() if ctx.cell.has_c else (None,))]
        if ctx.is_step:
            grads.insert(1, None)
        needs = ctx.needs_input_grad[4:]
        if all(grad is None for grad in grads):
            return (None,) * (4 + len(needs))
        saved = ctx.saved_tensors  # once: checkpointing computes them anew at every look
        results = _library_gradients(ctx, grads, saved, needs)
        if results is None:
            results = _general_gradients(ctx, grads, saved, needs)
        return (None, None, None, None, *results)


# `_Layer.apply` without what it asks first, 3 us: arguments that the library has read are neither
# transforms' nor left over from one, and a forward of this form needs no signature.
_apply = super(torch.autograd.Function, _Layer).apply


# Both give the gradients of x, h0, c0 and the weights, from those of y, h_n and c_n.


def _library_gradients(ctx, grads, saved, needs) -> list[Tensor | None] | None:
    """None: not for here."""
    results = None
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        results = direct.calls().train_layer_backward(
            ctx.cell.index, ctx.directions, needs, *grads, saved
        )
    if results is None:
        if not _are_plain(grads):
            return None
        y, gates, cells, batch_sizes, x, h0, c0, *weights = saved
        results = direct.train_layer_backward(
            ctx.cell, grads, x, h0, c0, weights, batch_sizes, (y, gates, cells), ctx.directions,
            needs,
        )  # fmt: skip
    given = iter(results)
    return [next(given) if need else None for need in needs] if results else None


def _general_gradients(ctx, grads, saved, needs) -> list[Tensor | None]:
    """Differentiable ones where grad mode is on."""
    y, gates, cells, batch_sizes, *given = saved
    # What autocast had made of them.
    x, h0, c0, *weights = (t if t is None else t.to(y.dtype) for t in given)
    if ctx.is_step:
        x, h0, c0, y, *grads = (
            None if t is None else t.unsqueeze(0) for t in (x, h0, c0, y, *grads)
        )
    leading = ctx.directions, x.shape[1] if batch_sizes is None else int(batch_sizes[0])
    if h0 is None:
        h0 = x.new_zeros((*leading, weights[1].shape[1]))
        if ctx.cell.has_c:
            c0 = x.new_zeros((*leading, weights[0].shape[0] // ctx.cell.gates))
    nothing = x.new_empty((ctx.directions, x.shape[:-1].numel(), 0))
    gates, cells = (nothing if t is None else t for t in (gates, cells))
    results = ops.layer_gradients(
        (ctx.cell.name, False, False, "auto"),
        (*grads, None),
        (y, gates, cells),
        (batch_sizes, None, None, NO_NOISE),
        (x, h0, c0, None, None, *weights),
        (*needs[:3], False, False, *needs[3:]),
    )
    states = [g.squeeze(0) if ctx.is_step and g is not None else g for g in results[:3]]
    results = zip([*states, *results[5:]], given, strict=True)
    return [g if g is None or t is None else g.to(t.dtype) for g, t in results]

"""The CPU library asked first, past the waist: inference in one call, a layer in training in two.

A step of a streaming model takes a few microseconds; its checks, the choice of a backend and
operators written in Python take a hundred. So modules ask here first. What runs is what the
general way would have run, the cpu backend on arguments that fit each other: the library
(csrc/cpu/infer.cpp) looks at every tensor. To a call that is wrong or out of the ordinary, or
that somebody watches or redirects, the answer is None: the general way alone knows error messages
and choices. No library takes small float64 calls, but torch's own functions (handover.py), which
know gradients too.

It is a call of the extension module (csrc/direct_calls.cpp) or, where that is absent or says None,
an operator, which takes a few more kinds of tensors and some microseconds longer. Those of training
(csrc/cpu/train.cpp) are for `fused_rnn.training` and for graphs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from . import dispatch, handover
from .cells import CELL_OF_MODE, Cell
from .looks import cell_weights, dropout_of, layer_weights
from .native import cpu_library_error, library_path
from .once import once

_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))
States = tuple[Tensor | None, Tensor | None]  # h0 and c0


# One gives something true where a call is to do more than compute numbers,
_STEP_GUARDS = (
    torch._C._is_torch_function_mode_enabled,
    torch._C._len_torch_dispatch_stack,
    torch._C._get_tracing_state,
    torch._C._functorch.peek_interpreter_stack,
)
# or elsewhere,
_ELSEWHERE_GUARDS = (*_STEP_GUARDS, *dispatch.redirections())
# or in another dtype, which a stepper's weights do not change to.
_GUARDS = (*_ELSEWHERE_GUARDS, torch._C._is_any_autocast_enabled)
# A profiler sees operators only, and for it they are enough. Autocast is another question.
_CALL_GUARDS = (torch._C._autograd._profiler_enabled, *_ELSEWHERE_GUARDS)
SIGHT_GUARDS = (torch._C._autograd._profiler_enabled, *_STEP_GUARDS)


def is_excused(guard: Callable[[], Any]) -> bool:
    """Whether what a guard has found changes nothing: torch.set_default_device is a mode of torch's
    functions, but only of those that make tensors of nothing, which no call here makes."""
    if guard is not torch._C._is_torch_function_mode_enabled:
        return False
    modes = torch.overrides._get_current_function_mode_stack()
    return all(type(mode) is DeviceContext for mode in modes)


# As in csrc/cpu/direct.h.
NUMBER_TYPES = torch.float32, torch.bfloat16, torch.float16


def layers(
    module: torch.nn.RNNBase, looked: list[Any], input: Any, hx: Any
) -> tuple[Tensor, Any] | None:
    """What `module.forward(input, hx)` has to return, or None: take the general way."""
    if forward_ad._current_level >= 0:
        return None
    result = calls().infer_module(module, input, hx)
    if result is not None:
        return result
    cell, num_layers = CELL_OF_MODE.get(module.mode), module.num_layers
    if cell is None or type(num_layers) is not int or dropout_of(module) != 0:
        return None
    if is_watched() or (states := given_states(cell, hx)) is None:
        return None
    sizes = num_layers, 2 if module.bidirectional else 1, not module.batch_first
    weights = layer_weights(module, looked)
    outputs = _by_operator_or_torch("layers", cell, input, weights, states, *sizes)
    if not outputs:
        return None
    return (outputs[0], (outputs[1], outputs[2])) if cell.has_c else (outputs[0], outputs[1])


def step(module: torch.nn.RNNCellBase, looked: list[Any], cell: Cell, input: Any, hx: Any) -> Any:
    """What `module.forward(input, hx)` has to return, or None: take the general way."""
    if forward_ad._current_level >= 0:
        return None
    weights = cell_weights(module, looked)
    result = calls().infer_cell(cell.index, input, weights, hx, module.hidden_size)
    if result is not None:
        return result
    if is_watched() or (states := given_states(cell, hx)) is None:
        return None
    outputs = _by_operator_or_torch("cell", cell, input, weights, states, module.hidden_size)
    if not outputs:
        return None
    return (outputs[0], outputs[1]) if cell.has_c else outputs[0]


def anything_found(guards: Iterable[Callable[[], Any]]) -> bool:
    return any(guard() and not is_excused(guard) for guard in guards)


def is_watched(or_autocast: bool = True) -> bool:
    """Whether a call is to do more than compute numbers, or elsewhere, or in another dtype."""
    guards = _GUARDS if or_autocast else _ELSEWHERE_GUARDS
    return anything_found(guards) or not calls().cpu_is_welcome()


def autocast_type() -> int:
    """The place in NUMBER_TYPES of what autocast makes CPU tensors, 0 for nothing; -1 for another
    type."""
    if not torch.is_autocast_enabled("cpu"):
        return 0
    dtype = torch.get_autocast_dtype("cpu")
    return NUMBER_TYPES.index(dtype) if dtype in NUMBER_TYPES[1:] else -1


def _by_operator_or_torch(
    name: str, cell: Cell, input: Any, weights: list[Any], states: States, *sizes: int
) -> list[Tensor]:
    """What the operator returns, or torch's function that is handed over to; nothing where the call
    is for neither."""
    if not are_plain((input, *weights)):
        return []
    if input.dtype is torch.float64:
        if dispatch.requested():
            return []
        function = handover.layers if name == "layers" else handover.step
        return function(cell, input, weights, *states, *sizes)
    if cpu_library_error() is not None:
        return []
    operator = getattr(torch.ops.fused_rnn_cpu, f"infer_{name}").default
    try:
        return operator(cell.index, input, weights, *states, *sizes)
    except NotImplementedError:  # the dispatcher's, for the rarest kinds of tensors
        return []


def are_plain(tensors: Iterable[Any]) -> bool:
    """Whether they are tensors, of no subclass, which may have a meaning of its own."""
    return _PLAIN_TYPES.issuperset(map(type, tensors))


def given_states(cell: Cell, hx: Any) -> States | None:
    """hx as (h0, c0), or None if it is not made as it should be."""
    if hx is None:
        return None, None
    if not cell.has_c:
        return (hx, None) if are_plain((hx,)) else None
    if type(hx) not in (tuple, list) or len(hx) != 2:
        return None
    h0, c0 = hx
    return (h0, c0) if are_plain(hx) else None


def train_layer(
    cell: Cell,
    x: Tensor,  # [T, B, I], [N, I] with `batch_sizes`, or of a cell's timestep [B, I]
    h0: Tensor | None,  # [D, B, P] or [B, H], None for zeros
    c0: Tensor | None,  # [D, B, H] or [B, H], beside h0 of an LSTM
    weights: list[Tensor],  # as in `ops.layer`
    batch_sizes: Tensor | None,
    directions: int,
    save: bool = True,
    lengths: Tensor | None = None,  # int64 [B]
    resets: Tensor | None = None,  # bool [T, B]
    batch_first: bool = False,  # x, y and resets, where there are masks
) -> list[Tensor]:
    """y, h_n (not of a timestep), c_n and, to be saved, gates and cells, those that the cell has,
    and the pieces that masks cut a batch into; nothing where the call is not for the library. To be
    called below autograd, and not where `is_watched`."""
    if cpu_library_error() is not None:
        return []
    try:
        return torch.ops.fused_rnn_cpu.train_layer.default(
            cell.index, x, weights, h0, c0, batch_sizes, directions, save, lengths, resets,
            batch_first,
        )  # fmt: skip
    except NotImplementedError:  # the dispatcher's, for the rarest kinds of tensors
        return []


def train_layer_backward(
    cell: Cell,
    grads: Iterable[Tensor | None],  # of y, h_n and c_n
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    saved: tuple[Tensor | None, ...],  # y, gates, cells; None where the cell has none
    directions: int,
    needs: Sequence[bool],  # of x, h0, c0 and the weights
    pieces: Tensor | None = None,  # of a padded batch with masks
    batch_first: bool = False,
) -> list[Tensor]:
    """The gradients that are needed, one after the other; nothing where the call is not for the
    library. As `train_layer` otherwise."""
    if cpu_library_error() is not None:
        return []
    grads = [grad if grad is None else grad.contiguous() for grad in grads]
    wanted = sum(1 << i for i, need in enumerate(needs) if need)
    return torch.ops.fused_rnn_cpu.train_layer_backward.default(
        cell.index, *grads, x, weights, h0, c0, batch_sizes, *saved, directions, wanted, pieces,
        batch_first,
    )  # fmt: skip


def saved_outputs(
    cell: Cell, outputs: Sequence[Tensor], given: int
) -> tuple[Tensor | None, Tensor | None]:
    """gates and cells, None where the cell has none, from the outputs of `train_layer` to be saved:
    those behind the `given` first."""
    gates = outputs[given] if cell.saved_gates else None
    return gates, outputs[given + 1] if cell.has_c else None


def infer_layer(cell: Cell, *inputs: Tensor | None) -> list[Tensor] | None:
    """y, h_n and, where the cell has it, c_n, of a padded layer's x, h0, c0 and weights; or None:
    the call is not for here. To be called where nobody wants gradients."""
    directions = inputs[1].shape[0]
    return calls().train_layer(cell.index, directions, False, False, None, *inputs)


def gradients_anew(
    cell: Cell,
    grads: Sequence[Tensor | None],  # of y, h_n and c_n
    inputs: Sequence[Tensor | None],  # x, h0, c0, *weights
    needs: Sequence[bool],  # of these
) -> list[Tensor | None] | None:
    """The gradients of a padded layer of which nothing was saved, or None: the call is not for
    here."""
    directions, both = inputs[1].shape[0], calls()
    outputs = both.train_layer(cell.index, directions, True, False, None, *inputs)
    if outputs is None:
        return None
    kept = outputs[0], *saved_outputs(cell, outputs, 2 + cell.has_c), None, *inputs
    found = both.train_layer_backward(
        cell.index, directions, False, tuple(needs), *grads, None, kept
    )
    if found is None:
        return None
    given = iter(found)
    return [next(given) if need else None for need in needs]


def no_answer(*args: Any) -> None:
    """The answer to a call that is for the operators: None."""


class _NoCalls:
    """Stands in for the extension module where it cannot be used."""

    infer_module = infer_layers = infer_cell = prepare_step = staticmethod(no_answer)
    train_layer = train_layer_backward = staticmethod(no_answer)
    cpu_is_welcome = staticmethod(dispatch.cpu_is_welcome)


@once
def calls() -> Any:
    """The functions of csrc/direct_calls.cpp, connected with the CPU library and with torch."""
    if cpu_library_error() is not None:
        return _NoCalls
    try:
        from . import _C

        connect = _C.connect
        exchange = Tensor.__dlpack_c_exchange_api__
        address = ctypes.CDLL(str(library_path())).fused_rnn_direct_calls
    except (ImportError, AttributeError):  # no headers where it was built, or an older torch
        return _NoCalls
    address.restype = ctypes.c_void_p
    types = Tensor, torch.nn.Parameter
    cells = {mode: cell.index for mode, cell in CELL_OF_MODE.items()}
    guards = _CALL_GUARDS, 1 + len(_STEP_GUARDS), is_excused
    autocast = torch._C._is_any_autocast_enabled, autocast_type
    connected = connect(address(), exchange, *types, *guards, cells, *autocast)
    return _C if connected else _NoCalls

"""Inference on the CPU in one operator call, past the waist.

A step of a streaming model takes a few microseconds; its checks, the choice of a backend and
operators written in Python take a hundred. So modules ask here first. What runs is what the
general way would have run, the cpu backend on arguments that fit each other: the operators
(csrc/cpu/library.cpp) look at every tensor. To a call that is wrong or out of the ordinary, or
that somebody watches or redirects, the answer is None: the general way alone knows error messages
and choices.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import dispatch
from .cells import CELLS, Cell
from .native import cpu_library_error

# Those that torch.nn has too: the library has no kernel for the others.
_CELLS = {cell.torch_mode: cell for cell in CELLS.values() if cell.name != "gru_reset_before"}
# Not isinstance: a subclass may have a meaning of its own.
_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))


def layers(module: torch.nn.RNNBase, input: Any, hx: Any) -> tuple[Tensor, Any] | None:
    """What `module.forward(input, hx)` has to return, or None: take the general way."""
    if not _nothing_but_numbers():
        return None
    cell, dropout, num_layers = _CELLS.get(module.mode), module.dropout, module.num_layers
    if cell is None or type(num_layers) is not int or type(dropout) is not float:
        return None
    if dropout != 0 and ((module.training and num_layers > 1) or not 0 <= dropout <= 1):
        return None
    # What is parametrized or was replaced by a plain attribute is not among the parameters.
    weights = list(map(module._parameters.get, module._flat_weights_names))
    states = _states(cell, hx)
    if states is None or not _PLAIN_TYPES.issuperset(map(type, (input, *weights))):
        return None
    directions = 2 if module.bidirectional else 1
    time_first = not module.batch_first
    try:
        outputs = _operator("infer_layers")(
            cell.index, input, weights, *states, num_layers, directions, time_first
        )
    except NotImplementedError:  # the dispatcher's, for the rarest kinds of tensors
        return None
    if not outputs:
        return None
    return (outputs[0], (outputs[1], outputs[2])) if cell.has_c else (outputs[0], outputs[1])


def step(module: torch.nn.RNNCellBase, cell: Cell, input: Any, hx: Any) -> Any:
    """What `module.forward(input, hx)` has to return, or None: take the general way."""
    if not _nothing_but_numbers():
        return None
    parameters = module._parameters
    weights = [parameters.get("weight_ih"), parameters.get("weight_hh")]
    if module.bias:
        weights += parameters.get("bias_ih"), parameters.get("bias_hh")
    states = _states(cell, hx)
    if states is None or not _PLAIN_TYPES.issuperset(map(type, (input, *weights))):
        return None
    try:
        outputs = _operator("infer_cell")(cell.index, input, weights, *states, module.hidden_size)
    except NotImplementedError:
        return None
    if not outputs:
        return None
    return (outputs[0], outputs[1]) if cell.has_c else outputs[0]


def _nothing_but_numbers() -> bool:
    """Whether a call computes its results and does nothing else: no gradients, no tracing, no
    transforms, no modes, no choice of a backend but the cpu's, and nobody who records it."""
    return not (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._is_any_autocast_enabled()
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or dispatch.is_redirected("cpu")
        or cpu_library_error() is not None
    )


def _states(cell: Cell, hx: Any) -> tuple[Tensor | None, Tensor | None] | None:
    """hx as (h0, c0), or None if it is not made as it should be."""
    if hx is None:
        return None, None
    if not cell.has_c:
        return (hx, None) if type(hx) in _PLAIN_TYPES else None
    if type(hx) not in (tuple, list) or len(hx) != 2:
        return None
    h0, c0 = hx
    return (h0, c0) if type(h0) in _PLAIN_TYPES and type(c0) in _PLAIN_TYPES else None


@cache
def _operator(name: str) -> Callable[..., list[Tensor]]:
    return getattr(torch.ops.fused_rnn_cpu, name).default

"""Under torch.compile: inference on the CPU, a module's whole call as one operator; and cells.

What a compiler was told about Python's objects is checked again at every call of its graph, and
since the call before has swept the caches that takes ten times what a loop over the same call would
show. So little is asked here, and the stack of layers, or a cell's timestep, is one operator,

    fused_rnn::infer_layers    inputs and weights of a module -> y, h_n, c_n

which runs what the module would have run in eager mode (see `fused_rnn.direct`), and checks its
arguments as it does. To a call that is out of the ordinary the answer is None: the general way
puts an operator per layer into the graph. A cell's timestep in training is plain operations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks, direct, flops, functional, looks, onnx, plain
from .cells import CELLS, Cell, state_dtype
from .transformed import is_exporting, is_transformed

_library = torch.library.Library("fused_rnn", "FRAGMENT")
_library.define(
    "infer_layers("
    "Tensor x, "  # [T, B, I], float32 on the CPU
    "Tensor? h0, Tensor? c0, "  # [L*D, B, P] and [L*D, B, H]
    "Tensor[] weights, "  # as in `functional`
    "str cell, int num_layers, bool bidirectional"
    ") -> (Tensor y, Tensor h_n, Tensor c_n)",  # c_n is empty but for an LSTM
    tags=(torch.Tag.pt2_compliant_tag,),
)


def layers(
    module: torch.nn.RNNBase, looked: list[Any], input: Any, hx: Any
) -> tuple[Tensor, Any] | None:
    """What `module.forward(input, hx)` has to return, or None: take the general way. To be called
    while a compiler traces."""
    if not _is_inference():
        return None
    num_layers, has_c = module.num_layers, module.mode == "LSTM"
    if type(num_layers) is not int or looks.dropout_of(module) != 0:
        return None
    weights = looks.attributes(module, module._flat_weights_names, looked)
    h0, c0 = hx if has_c and _is_pair(hx) else (hx, None)
    given = [input] if hx is None else [input, h0, c0] if has_c else [input, h0]
    if not _are_plain(given, weights):
        return None
    x = input.transpose(0, 1) if module.batch_first else input
    y, h_n, c_n = torch.ops.fused_rnn.infer_layers(
        x, h0, c0, weights, module.mode.lower(), num_layers, module.bidirectional
    )
    return y.transpose(0, 1) if module.batch_first else y, (h_n, c_n) if has_c else h_n


def step(
    cell: Cell, x: Tensor, states: tuple[Tensor, ...] | None, weights: list[Tensor]
) -> tuple[Tensor, ...] | None:
    """The new states of a cell, [1, B, H], from x [1, B, I] and states that fit each other, or
    None: take the general way. To be called while a compiler traces."""
    if torch.is_grad_enabled() and _is_alone() and x.dtype == state_dtype(x.dtype):
        # Of which compilers make a few loops, also around it; an operator costs them as much again.
        checks.recurrent_arguments(cell, x, states, weights, 1, 1, x.shape[1], False)
        return plain.step(cell, x, states, weights)
    given = [x, *(states or ())]
    if not _is_inference() or not _are_plain(given, weights):
        return None
    h0, c0 = (*(states or ()), None, None)[:2]
    _, *new = torch.ops.fused_rnn.infer_layers(x, h0, c0, weights, cell.name, 1, False)
    return tuple(new[: 1 + cell.has_c])


def _is_inference() -> bool:
    return not torch.is_grad_enabled() and _is_alone()


def _is_alone() -> bool:
    """Whether a graph has to compute nothing but what is written, in the dtype of what is given,
    and is for this library."""
    if is_exporting() or onnx.is_exporting():
        return False
    return not torch._C._is_any_autocast_enabled() and not is_transformed()


def _is_pair(hx: Any) -> bool:
    return isinstance(hx, (tuple, list)) and len(hx) == 2


def _are_plain(given: list[Any], weights: list[Any]) -> bool:
    """Whether input, states and weights are for the operator."""
    if not all(_is_plain(tensor, 3) for tensor in given):
        return False
    if not all(_is_plain(tensor, 2) for tensor in weights[:2]):
        return False
    return all(isinstance(tensor, Tensor) for tensor in weights)


def _is_plain(value: Any, dimensions: int) -> bool:
    """Whether it is what the CPU's kernels take, as far as can be told of it alone."""
    if not isinstance(value, Tensor) or value.is_nested or value.layout != torch.strided:
        return False
    return value.is_cpu and value.dtype == torch.float32 and value.dim() == dimensions


def _infer_impl(x, h0, c0, weights, cell, num_layers, bidirectional):
    spec = CELLS[cell]
    hx = h0 if c0 is None else (h0, c0)
    sizes = num_layers, 2 if bidirectional else 1, True
    result = direct.calls().infer_layers(spec.index, x, weights, hx, *sizes)
    if result is None:
        with torch.no_grad():
            result = functional.recurrent(
                cell, x, hx, weights, num_layers=num_layers, bidirectional=bidirectional
            )
    y, states = result
    return (y, *states) if spec.has_c else (y, states, x.new_empty(0))


def _infer_fake(x, h0, c0, weights, cell, num_layers, bidirectional):
    spec, directions = CELLS[cell], 2 if bidirectional else 1
    timesteps, batch, _ = x.shape
    out, hidden = weights[1].shape[1], weights[0].shape[0] // spec.gates
    rows = num_layers * directions
    return (
        x.new_empty((timesteps, batch, directions * out)),
        x.new_empty((rows, batch, out)),
        x.new_empty((rows, batch, hidden) if spec.has_c else 0),
    )


_library.impl("infer_layers", _infer_impl, "CompositeExplicitAutograd")
torch.library.register_fake("fused_rnn::infer_layers", _infer_fake, lib=_library)
flops.register(torch.ops.fused_rnn.infer_layers, flops.layer_forward)

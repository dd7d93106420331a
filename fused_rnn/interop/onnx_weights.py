"""Weights of ONNX's LSTM, GRU and RNN nodes: into our modules, and back.

`fused_rnn/onnx_node.py` says how they lie. For a whole model, `torch.onnx.export` writes these
nodes by itself.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..cells import (
    CELLS,
    ONNX_GATES,
    ONNX_PEEPHOLES,
    Cell,
    DirectionWeights,
    restore_gates,
)
from ..modules import GRU, LSTM, RNN, make_module
from ..onnx_node import ACTIVATIONS, OnnxNode, node_of
from . import weights as module_weights


def to_onnx(module: torch.nn.RNNBase) -> list[OnnxNode]:
    """The nodes of ONNX that compute what a module computes, one for each layer.

    Args:
        module: an RNN, GRU or LSTM without projection; GRU with `reset_after` or without, LSTM
            with peepholes or without.

    Returns:
        A node per layer, with copies of the weights. Its X and Y are [T, B, I] and [T, D, B, H]:
        neither `batch_first` nor dropout is in the node.

    Raises:
        TypeError, ValueError: `module` is none of these.

    Example:
        >>> node = to_onnx(GRU(3, 4, bidirectional=True))[0]
        >>> node.operator, node.W.shape, node.R.shape, node.B.shape
        ('GRU', torch.Size([2, 12, 3]), torch.Size([2, 12, 4]), torch.Size([2, 24]))
        >>> node.attributes
        {'hidden_size': 4, 'direction': 'bidirectional', 'linear_before_reset': 1}
    """
    cell = module_weights.cell_of(module, "peepholes")
    return [node_of(cell, module_weights.read(module, layer)) for layer in range(module.num_layers)]


def from_onnx(
    operator: str,
    W: Any,
    R: Any,
    B: Any = None,
    *,
    P: Any = None,
    hidden_size: int | None = None,
    direction: str = "forward",
    linear_before_reset: int = 0,
    activations: Sequence[str] | None = None,
    layout: int = 0,
    **others: Any,
) -> RNN | GRU | LSTM:
    """A module of one layer that computes what a node of ONNX computes.

    Args:
        operator: "LSTM", "GRU" or "RNN".
        W, R, B, P: [D, G*H, I], [D, G*H, H], [D, 2*G*H] and, for LSTM, [D, 3*H], tensors or arrays
            of numpy; B and P may be None.
        hidden_size, direction, linear_before_reset, activations, layout: the node's attributes,
            with ONNX's defaults. linear_before_reset=0 is our `reset_after=False`, layout=1 our
            `batch_first`.
        others: further attributes, which may only have values that change nothing.

    Returns:
        The module, on the CPU and in the dtype of W. Its output is the node's Y with the
        directions side by side.

    Raises:
        TypeError: W, R, B or P is neither a tensor nor an array of floating-point numbers.
        ValueError: no module of ours computes this (the reverse direction alone, other
            activations, clip, input_forget), or the shapes or dtypes do not fit.

    Example:
        >>> node = to_onnx(LSTM(3, 4))[0]
        >>> from_onnx(node.operator, node.W, node.R, node.B, **node.attributes)
        LSTM(3, 4)
    """
    given = (("W", W), ("R", R), ("B", B), ("P", P))
    w, r, b, p = (_tensor(value, name) for name, value in given)
    if w is None or r is None:
        raise TypeError(f"{'W' if w is None else 'R'}: expected a Tensor or array, got NoneType")
    direction = _text(direction)
    if direction not in ("forward", "bidirectional"):
        raise ValueError(
            f"direction: expected 'forward' or 'bidirectional', got {direction!r}; a module "
            "of ours reads backwards only beside reading forwards"
        )
    for name, tensor in (("W", w), ("R", r), ("B", b), ("P", p)):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name}: expected floating-point numbers, got {tensor.dtype}")
        if tensor is not None and tensor.dtype != w.dtype:
            raise ValueError(f"{name}: expected dtype {w.dtype} as W, got {tensor.dtype}")
    directions = 1 + (direction == "bidirectional")
    cell = _cell(operator, linear_before_reset, activations, directions)
    _refuse(others)
    for name, tensor in (("W", w), ("R", r)):
        if tensor.dim() != 3:
            raise ValueError(f"{name}: expected 3 dimensions, got shape {list(tensor.shape)}")
    hidden = r.shape[-1] if hidden_size is None else hidden_size
    if not isinstance(hidden, numbers.Integral):
        raise TypeError(f"hidden_size: expected an int, got {type(hidden).__name__}")
    rows = cell.gates * hidden
    expected = {
        "W": (w, [directions, rows, w.shape[2]]),
        "R": (r, [directions, rows, hidden]),
        "B": (b, [directions, 2 * rows]),
        "P": (p, [directions, 3 * hidden]),
    }
    if p is not None and operator != "LSTM":
        raise ValueError(f"P: expected none for {operator}, which has no peepholes, got {p!r}")
    for name, (tensor, shape) in expected.items():
        if tensor is not None and list(tensor.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {list(tensor.shape)}")
    if layout not in (0, 1):
        raise ValueError(f"layout: expected 0 or 1, got {layout!r}")
    options: dict[str, Any] = {
        "bias": b is not None,
        "batch_first": layout == 1,
        "bidirectional": directions == 2,
        "dtype": w.dtype,
        "device": "cpu",
    }
    if p is not None:
        options["peepholes"] = True
    module = make_module(cell.name, w.shape[2], hidden, **options)
    order = ONNX_GATES[cell.name]
    module_weights.write(
        module,
        [
            DirectionWeights(
                *(restore_gates(weight[d], order) for weight in (w, r)),
                *(() if b is None else (restore_gates(half, order) for half in b[d].chunk(2))),
                peephole=None if p is None else restore_gates(p[d], ONNX_PEEPHOLES),
            )
            for d in range(directions)
        ],
    )
    return module


def _cell(
    operator: str, linear_before_reset: int, activations: Sequence[str] | None, directions: int
) -> Cell:
    if operator not in ("LSTM", "GRU", "RNN"):
        raise ValueError(f"operator: expected 'LSTM', 'GRU' or 'RNN', got {operator!r}")
    if linear_before_reset not in (0, 1):
        raise ValueError(f"linear_before_reset: expected 0 or 1, got {linear_before_reset!r}")
    if operator == "GRU":
        candidates = ["gru" if linear_before_reset else "gru_reset_before"]
    else:
        candidates = ["lstm"] if operator == "LSTM" else ["rnn_tanh", "rnn_relu"]
    if activations is None:
        return CELLS[candidates[0]]
    if isinstance(activations, (str, bytes)) or not isinstance(activations, Iterable):
        raise TypeError(f"activations: expected a list of names, got {activations!r}")
    # Their names are case-insensitive.
    given = [str(_text(name)).capitalize() for name in activations]
    for name in candidates:
        if given == list(ACTIVATIONS[name]) * directions:
            return CELLS[name]
    expected = " or ".join(str(list(ACTIVATIONS[name]) * directions) for name in candidates)
    raise ValueError(f"activations: expected {expected}, got {list(activations)}")


def _refuse(others: dict[str, Any]) -> None:
    neutral = {
        "clip": (None,),
        "input_forget": (None, 0),
        "activation_alpha": (None, [], ()),
        "activation_beta": (None, [], ()),
    }
    for name, value in others.items():
        if name not in neutral:
            raise TypeError(f"from_onnx: unexpected attribute {name!r}")
        if hasattr(value, "tolist"):  # an array's numbers
            value = value.tolist()
        if value not in neutral[name]:
            raise ValueError(
                f"{name}: expected none, since no module of ours has it, got {value!r}"
            )


def _text(value: Any) -> Any:
    """ONNX's own attributes are bytes."""
    return value.decode() if isinstance(value, bytes) else value


def _tensor(value: Any, name: str) -> Tensor | None:
    if value is None:
        return None
    if isinstance(value, Tensor):
        return checks.is_dense_tensor(value, name).detach()
    if not hasattr(value, "__array__"):
        raise TypeError(f"{name}: expected a Tensor or array, got {type(value).__name__}")
    import numpy  # is there, since arrays are

    array = numpy.asarray(value)
    if array.dtype.kind != "f":
        raise TypeError(f"{name}: expected floating-point numbers, got {array.dtype}")
    return torch.tensor(array.astype(array.dtype.newbyteorder("="), order="C"), device="cpu")

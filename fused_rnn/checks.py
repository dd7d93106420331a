"""The border: every argument a user can get wrong is checked here, once, before any kernel runs.

Exceptions have the class torch.nn raises, and its wording where its own test-suite asserts it.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .cells import Cell, weight_shapes


def is_dense_tensor(value: Any, name: str, expected: str = "a Tensor") -> Tensor:
    """`value` if it is a dense tensor.

    Raises:
        TypeError: it is no tensor.
        RuntimeError: it is sparse or nested.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
    if value.is_nested:
        raise RuntimeError(f"{name}: expected a dense tensor, got a nested tensor")
    if value.layout != torch.strided:
        raise RuntimeError(f"{name}: expected a dense tensor, got layout {value.layout}")
    return value


def layer_input(input: Any, owner: str) -> None:
    """`input` as a layer module takes it: a PackedSequence, or a tensor of 2 or 3 dimensions."""
    if isinstance(input, PackedSequence):
        return
    is_dense_tensor(input, "input", "a Tensor or PackedSequence")
    if input.dim() not in (2, 3):
        raise ValueError(f"{owner}: Expected input to be 2D or 3D, got {input.dim()}D instead")


def states(hx: Any, has_c: bool, name: str = "hx") -> tuple[Tensor, ...]:
    """hx as a tuple of state tensors: (h,), or (h, c) where the cell has a c."""
    if not has_c:
        return (is_dense_tensor(hx, name),)
    if not isinstance(hx, (tuple, list)):
        raise TypeError(f"{name}: expected a tuple (h_0, c_0) of Tensors, got {type(hx).__name__}")
    if len(hx) != 2:
        raise RuntimeError(
            f"{name}: expected a tuple (h_0, c_0) of Tensors, got {len(hx)} elements"
        )
    return tuple(is_dense_tensor(state, f"{name}[{i}]") for i, state in enumerate(hx))


def state_dimensions(hx: Sequence[Tensor], batched: bool, name: str = "hx") -> None:
    """Each state of a layer has 3 dimensions with batched input, 2 with unbatched."""
    expected = 3 if batched else 2
    if any(state.dim() != expected for state in hx):
        kind = "batched 3-D" if batched else "unbatched 2-D"
        got = ", ".join(f"{state.dim()}-D" for state in hx)
        raise RuntimeError(
            f"For {kind} input, {name} should also be {expected}-D but got {got} tensor"
        )


def recurrent_arguments(
    cell: Cell,
    input: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    num_layers: int,
    directions: int,
    batch_size: int,
    packed: bool,
) -> None:
    """The arguments of a stack of layers fit each other: ranks, sizes, dtypes and devices.

    `input` is [T, B, I], or [N, I] when packed; states are [L*D, B, P or H].

    Raises:
        TypeError: a weight is no tensor.
        ValueError: input and weights differ in dtype, or there are too few or many weights.
        RuntimeError: anything else does not fit.
    """
    if not isinstance(weights, (list, tuple)):
        raise TypeError(f"weights: expected a list of Tensors, got {type(weights).__name__}")
    per_direction, remainder = divmod(len(weights), num_layers * directions)
    if remainder or not weights or per_direction not in ((2, 3, 4, 5) if cell.has_c else (2, 4)):
        projected = " one more with a projection," if cell.has_c else ""
        raise ValueError(
            f"weights: expected 2 tensors, or 4 with biases,{projected} for each of "
            f"{num_layers * directions} layers and directions, got {len(weights)} in all"
        )
    first = is_dense_tensor(weights[0], "weights[0]")
    _matches_weights(input, first)
    rank = 2 if packed else 3
    if input.dim() != rank:
        raise RuntimeError(f"input must have {rank} dimensions, got {input.dim()}")
    if first.dim() != 2:
        raise RuntimeError(f"weights[0]: expected 2 dimensions, got {first.dim()}")
    if input.shape[-1] != first.shape[1]:
        raise RuntimeError(
            "input.size(-1) must be equal to input_size. "
            f"Expected {first.shape[1]}, got {input.shape[-1]}"
        )
    if not packed and input.shape[0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    hidden_size = first.shape[0] // cell.gates  # and no divmod, which symbols do not have
    if first.shape[0] % cell.gates:
        raise RuntimeError(
            f"weights[0]: expected {cell.gates} gates of hidden_size rows each, got shape "
            f"{list(first.shape)}"
        )
    out = hidden_size
    if per_direction in (3, 5):
        out = _projection_size(weights, per_direction - 1, hidden_size)
    sizes = first.shape[1], hidden_size, out, num_layers, directions, per_direction >= 4
    _have_shapes(weights, weight_shapes(cell, *sizes), first)
    if hx is not None:
        _state_shapes(cell, hx, (num_layers * directions, batch_size), hidden_size, out, first)


def module_weights(module: torch.nn.RNNBase, cell: Cell) -> None:
    """The weights of a module are those that its sizes ask for.

    Raises:
        TypeError: one is no tensor.
        RuntimeError: one has another shape, or another dtype or device than the first one.
    """
    weights = [getattr(module, name) for name in module._flat_weights_names]
    hidden, directions = module.hidden_size, 1 + module.bidirectional
    sizes = module.input_size, hidden, module.proj_size or hidden, module.num_layers, directions
    expected = weight_shapes(cell, *sizes, module.bias)
    if len(weights) != len(expected):
        raise RuntimeError(f"module: expected {len(expected)} weights, got {len(weights)}")
    _have_shapes(weights, expected, is_dense_tensor(weights[0], "weights[0]"))


def _projection_size(weights: Sequence[Tensor], index: int, hidden_size: int) -> int:
    w_hr = is_dense_tensor(weights[index], f"weights[{index}]")
    if w_hr.dim() != 2 or not 1 <= w_hr.shape[0] < hidden_size:
        raise RuntimeError(
            f"weights[{index}]: expected a projection [proj_size, {hidden_size}] with "
            f"0 < proj_size < {hidden_size}, got shape {list(w_hr.shape)}"
        )
    return w_hr.shape[0]


def _matches_weights(input: Tensor, weight: Tensor) -> None:
    if input.dtype != weight.dtype:
        # Which then has cast one of them already.
        where = " under autocast" if torch._C._is_any_autocast_enabled() else ""
        raise ValueError(
            f"RNN input dtype ({input.dtype}) does not match weight dtype ({weight.dtype}){where}. "
            f"Convert input: input.to({weight.dtype}), or convert model: model.to({input.dtype})"
        )
    if input.device != weight.device:
        raise RuntimeError(
            "Input and parameter tensors are not at the same device, found input tensor at "
            f"{input.device} and parameter tensor at {weight.device}"
        )


def _have_shapes(
    weights: Sequence[Tensor], expected: Sequence[tuple[int, ...]], first: Tensor
) -> None:
    dtype, device = first.dtype, first.device
    for i, (weight, shape) in enumerate(zip(weights, expected, strict=True)):
        if is_dense_tensor(weight, f"weights[{i}]").shape != shape:
            raise RuntimeError(
                f"weights[{i}]: expected shape {list(shape)}, got {list(weight.shape)}"
            )
        _same_kind(weight, f"weights[{i}]", dtype, device)


def _state_shapes(
    cell: Cell,
    hx: Sequence[Tensor],
    layers_and_batch: tuple[int, int],
    hidden_size: int,
    out: int,
    weight: Tensor,
    name: str = "hx",
) -> None:
    for i, (state, width) in enumerate(zip(hx, (out, hidden_size), strict=False)):
        expected = (*layers_and_batch, width)
        if state.shape != expected:
            which = f"hidden[{i}]" if cell.has_c else "hidden"
            raise RuntimeError(f"{name}: Expected {which} size {expected}, got {list(state.shape)}")
        _same_kind(state, f"{name}[{i}]" if cell.has_c else name, weight.dtype, weight.device)


def masks(
    lengths: Any, resets: Any, has_reset_states: bool, input: Tensor, packed: bool, swapped: bool
) -> None:
    """Lengths and resets fit `input` [T, B, I], in type and shape.

    What values lengths have is not looked at here, where they may be on a device, or unknown yet
    to a compiler: the operator does it when it runs.

    Raises:
        TypeError: one is no tensor, or has a wrong dtype.
        ValueError: they come with packed input, or reset_hx without resets.
        RuntimeError: a shape or device does not fit.
    """
    if lengths is not None and packed:
        raise ValueError(
            "lengths: expected none with packed input, whose rows have their lengths already"
        )
    if resets is not None and packed:
        raise ValueError(
            "resets: expected none with packed input; give the padded batch, with lengths and "
            "resets"
        )
    if resets is None and has_reset_states:
        raise ValueError("reset_hx: expected resets to go with it, got none")
    steps, batch = input.shape[:2]
    if lengths is not None:
        is_dense_tensor(lengths, "lengths")
        length_dtype(lengths)
        _mask_shape(lengths, "lengths", (batch,), input.device)
    if resets is not None:
        if is_dense_tensor(resets, "resets").dtype != torch.bool:
            raise TypeError(f"resets: expected dtype torch.bool, got {resets.dtype}")
        _mask_shape(resets, "resets", (batch, steps) if swapped else (steps, batch), input.device)


def length_dtype(lengths: Tensor) -> None:
    """Lengths are integers."""
    if lengths.dtype == torch.bool or lengths.is_floating_point() or lengths.is_complex():
        raise TypeError(f"lengths: expected an integer dtype, got {lengths.dtype}")


def _mask_shape(mask: Tensor, name: str, expected: tuple[int, ...], device: torch.device) -> None:
    if mask.shape != expected:
        raise RuntimeError(f"{name}: expected shape {list(expected)}, got {list(mask.shape)}")
    if mask.device != device and not mask.is_cpu:
        raise RuntimeError(f"{name}: expected device cpu or {device}, got {mask.device}")


def reset_states(
    cell: Cell,
    given: Sequence[Tensor],
    weights: Sequence[Tensor],
    num_layers: int,
    directions: int,
    batch_size: int,
) -> None:
    """reset_hx has the shapes of hx, [L*D, B, P or H]; the weights are right."""
    first, out = weights[0], weights[1].shape[1]
    leading = num_layers * directions, batch_size
    _state_shapes(cell, given, leading, first.shape[0] // cell.gates, out, first, "reset_hx")


def parameter(tensor: Tensor, name: str, shape: tuple[int, ...], like: Tensor) -> None:
    """A parameter that torch.nn has not is of that shape, and of the dtype and device of `like`."""
    if tensor.shape != shape:
        raise RuntimeError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    _same_kind(tensor, name, like.dtype, like.device)


def _same_kind(tensor: Tensor, name: str, dtype: torch.dtype, device: torch.device) -> None:
    if tensor.dtype != dtype:
        raise RuntimeError(f"{name}: expected dtype {dtype}, got {tensor.dtype}")
    if tensor.device != device:
        raise RuntimeError(f"{name}: expected device {device}, got {tensor.device}")


def cell_arguments(
    owner: str, cell: Cell, input: Any, hx: Any, weight: Tensor, hidden_size: int
) -> tuple[Tensor, ...] | None:
    """The arguments of a cell module fit each other; returns the states, or None for none given.

    `weight` is w_ih [G*H, I].
    """
    is_dense_tensor(input, "input")
    if is_dense_tensor(weight, "weight_ih").dim() != 2:
        raise RuntimeError(f"weight_ih: expected 2 dimensions, got {weight.dim()}")
    input_size = weight.shape[1]
    if input.dim() not in (1, 2):
        raise ValueError(f"{owner}: Expected input to be 1D or 2D, got {input.dim()}D instead")
    if input.shape[-1] != input_size:
        raise RuntimeError(
            f"input has inconsistent input_size: got {input.shape[-1]} expected {input_size}"
        )
    given = () if hx is None else _cell_states(owner, cell, input, hx, hidden_size)
    if not torch._C._is_any_autocast_enabled():
        _same_kind(input, "input", weight.dtype, weight.device)
    return given or None


def _cell_states(
    owner: str, cell: Cell, input: Tensor, hx: Any, hidden_size: int
) -> tuple[Tensor, ...]:
    given = states(hx, cell.has_c)
    for i, state in enumerate(given):
        if state.dim() not in (1, 2):
            name = f"hx[{i}]" if cell.has_c else "hidden"
            raise ValueError(f"{owner}: Expected {name} to be 1D or 2D, got {state.dim()}D instead")
        if state.shape[-1] != hidden_size:
            raise RuntimeError(
                f"hidden{i} has inconsistent hidden_size: got {state.shape[-1]}, "
                f"expected {hidden_size}"
            )
        if state.dim() != input.dim():
            raise RuntimeError(
                f"{owner}: expected hx to be {input.dim()}-D like input, got {state.dim()}-D"
            )
        if input.dim() == 2 and state.shape[0] != input.shape[0]:
            raise RuntimeError(
                f"Input batch size {input.shape[0]} doesn't match hidden{i} batch size "
                f"{state.shape[0]}"
            )
    return given


def flags(**values: Any) -> None:
    """Each is True or False; numpy's are, as in torch.nn.

    Raises:
        TypeError: one is something else.
    """
    for name, value in values.items():
        if not isinstance(value, bool) and type(value).__name__ not in ("bool", "bool_"):
            raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def real_number(name: str, value: Any) -> int | float:
    """`value` as one of Python's numbers; numpy's, which compare otherwise, are numbers, too.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    return value if type(value) in (int, float) else float(value)


def probability(name: str, value: Any) -> int | float:
    """`value` as a number from 0 to 1.

    Raises:
        TypeError: it is no number. ValueError: it is out of range.
    """
    p = real_number(name, value)
    if not 0 <= p <= 1:
        raise ValueError(f"{name}: expected a probability in [0, 1], got {value}")
    return p


def stack_options(num_layers: Any, dropout: Any) -> None:
    """The numbers of a stack of layers are such.

    Raises:
        TypeError: one is not a number. ValueError: it is out of range.
    """
    # Not only int: numpy's numbers do in torch.nn, too.
    if not isinstance(num_layers, numbers.Integral) or isinstance(num_layers, bool):
        raise TypeError(f"num_layers: expected an int, got {type(num_layers).__name__}")
    if num_layers < 1:
        raise ValueError(f"num_layers: expected at least 1, got {num_layers}")
    probability("dropout", dropout)


def permutable(hx: Sequence[Tensor], indices: Tensor) -> None:
    """Each state [L*D, B, ...] has a row for each of the packed batch's `indices`."""
    for i, state in enumerate(hx):
        if state.shape[1] != indices.shape[0]:
            raise RuntimeError(
                f"hx: Expected hidden[{i}] batch size {indices.shape[0]} to match the packed "
                f"input, got {state.shape[1]}"
            )

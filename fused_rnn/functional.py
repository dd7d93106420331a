"""Recurrent networks as functions of tensors: stacks of layers, dropout, projections, packed rows.

Weights come as one flat list in the order of torch.nn's `_flat_weights`: layer after layer,
forward direction before reverse, each w_ih [G*H, I], w_hh [G*H, P], then b_ih and b_hh [G*H] if
there are biases, then w_hr [P, H] if there is a projection; G gates, H hidden_size, P proj_size or
H.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from . import checks, stack, transforms
from .cells import CELLS, Cell, equal_parts, zero_states
from .general_scan import GeneralScan
from .problem import Masks, Rows, in_memory
from .transfer import sent


class Options(TypedDict, total=False):
    """Keyword arguments of every function here."""

    num_layers: int  # 1
    bidirectional: bool  # False; D is 2 when bidirectional, else 1
    dropout: float  # 0; probability of zeroing an element of a layer's output on its way up
    training: bool  # False; whether dropout is active
    batch_first: bool  # False; whether input, output and resets are [B, T, ...]
    batch_sizes: Tensor | None  # int64 [T] on the CPU, non-increasing: rows of each packed step
    lengths: Tensor | None  # integers [B] from 0 to T: where each row of a padded batch ends
    resets: Tensor | None  # bool [T, B]: before which steps a row of it starts afresh
    reset_hx: Any  # like hx: the states after a reset, None for zeros
    return_states: bool  # False; whether to give the states of every layer and step as well
    recompute: bool  # False; whether backward computes anew what it would have to keep


def rnn_tanh(
    input: Tensor, hx: Tensor | None, weights: Sequence[Tensor], **options: Unpack[Options]
) -> tuple[Any, ...]:
    """Elman layers with tanh, h' = tanh(W_ih x + b_ih + W_hh h + b_hh).

    Args:
        input: [T, B, I], [B, T, I] with `batch_first`, or packed rows [N, I] with `batch_sizes`;
            any floating-point dtype of 16 bits or more, which hx, weights and results have too.
        hx: [num_layers*D, B, H], or None for zeros; D is 2 when bidirectional, else 1.
        weights: w_ih [H, I], w_hh [H, H] and, if there are biases, b_ih and b_hh [H] of each layer
            and direction, in the order that the module's docstring tells.
        options: see `Options`; what they mean is told at `fused_rnn.RNN`.

    Returns:
        output [T, B, D*H] (laid out as `input` is) and h_n [num_layers*D, B, H]. With
        `return_states` also a tuple (h,) of [num_layers*D, T, B, H] ([num_layers*D, B, T, H]
        with `batch_first`, [num_layers*D, N, H] when packed).

    Raises:
        TypeError: an argument, which the message names, is of another type, or there is no option
            of its name.
        ValueError: input has another dtype than w_ih, there are too few or too many weights, or an
            option has a value that it cannot have.
        RuntimeError: shapes, devices, other dtypes or values do not fit.
        UnsupportedProblemError: no backend takes the layer, or not the one that was forced.

    Example:
        >>> w = [torch.randn(4, 3), torch.randn(4, 4)]
        >>> output, h_n = rnn_tanh(torch.randn(5, 2, 3), None, w)
        >>> output.shape, h_n.shape
        (torch.Size([5, 2, 4]), torch.Size([1, 2, 4]))
    """
    return recurrent("rnn_tanh", input, hx, weights, **options)


def rnn_relu(
    input: Tensor, hx: Tensor | None, weights: Sequence[Tensor], **options: Unpack[Options]
) -> tuple[Any, ...]:
    """Elman layers with relu, h' = relu(W_ih x + b_ih + W_hh h + b_hh).

    Args:
        input, hx, weights, options: as for `rnn_tanh`.

    Returns:
        output [T, B, D*H] and h_n [num_layers*D, B, H], and the states as `rnn_tanh`.

    Raises:
        TypeError, ValueError, RuntimeError: as `rnn_tanh` does.

    Example:
        >>> w = [torch.randn(4, 3), torch.randn(4, 4), torch.randn(4), torch.randn(4)]
        >>> output, h_n = rnn_relu(torch.randn(5, 2, 3), torch.zeros(1, 2, 4), w)
        >>> output.min() >= 0
        tensor(True)
    """
    return recurrent("rnn_relu", input, hx, weights, **options)


def gru(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    reset_after: bool = True,
    **options: Unpack[Options],
) -> tuple[Any, ...]:
    """Gated recurrent units (Cho et al. 2014), the reset gate after the product as in torch.nn,
    or before it without `reset_after`.

    Args:
        input, hx, options: as for `rnn_tanh`.
        weights: w_ih [3*H, I], w_hh [3*H, H] and, if there are biases, b_ih and b_hh [3*H] of each
            layer and direction, the gates in the order r, z, n.
        reset_after: whether r multiplies W_hn h + b_hn; else h, before the product.

    Returns:
        output [T, B, D*H] and h_n [num_layers*D, B, H], and the states as `rnn_tanh`.

    Raises:
        TypeError, ValueError, RuntimeError: as `rnn_tanh` does.

    Example:
        >>> w = [torch.randn(12, 3), torch.randn(12, 4)]
        >>> output, h_n = gru(torch.randn(5, 2, 3), None, w, lengths=torch.tensor([3, 5]))
        >>> output.shape, h_n.shape
        (torch.Size([5, 2, 4]), torch.Size([1, 2, 4]))
    """
    checks.flags(reset_after=reset_after)
    return recurrent("gru" if reset_after else "gru_reset_before", input, hx, weights, **options)


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    **options: Unpack[Options],
) -> tuple[Any, ...]:
    """Long short-term memory (Hochreiter and Schmidhuber 1997), projected (Sak et al. 2014) where
    `weights` hold a w_hr.

    Args:
        input, options: as for `rnn_tanh`.
        hx: (h_0 [num_layers*D, B, P], c_0 [num_layers*D, B, H]), or None for zeros; P is H where
            nothing is projected.
        weights: w_ih [4*H, I], w_hh [4*H, P], then, if there are, biases b_ih and b_hh [4*H] and
            the projection w_hr [P, H] of each layer and direction, the gates in the order
            i, f, g, o.

    Returns:
        output [T, B, D*P] and (h_n, c_n), of [num_layers*D, B, P] and [num_layers*D, B, H]. With
        `return_states` also (h, c), of [num_layers*D, T, B, P] and [num_layers*D, T, B, H].

    Raises:
        TypeError, ValueError, RuntimeError: as `rnn_tanh` does.

    Example:
        >>> w = [torch.randn(16, 3), torch.randn(16, 4)]
        >>> output, (h_n, c_n) = lstm(torch.randn(5, 2, 3), None, w)
        >>> output.shape, h_n.shape, c_n.shape
        (torch.Size([5, 2, 4]), torch.Size([1, 2, 4]), torch.Size([1, 2, 4]))
    """
    return recurrent("lstm", input, hx, weights, **options)


def recurrent(
    cell_name: str,
    input: Tensor,
    hx,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reset_hx=None,
    return_states: bool = False,
    recompute: bool = False,
    general: GeneralScan | None = None,
):
    """Layers of the cell of that name in `cells.CELLS`: what the functions above call.

    Args:
        cell_name: "rnn_tanh", "rnn_relu", "gru", "gru_reset_before" or "lstm".
        input, hx, weights: as for the function of that cell.
        num_layers, bidirectional, dropout, training, batch_first: see `Options`.
        batch_sizes, lengths, resets, reset_hx, return_states, recompute: see `Options`.
        general: the recurrence where it is not the cell's own, see `fused_rnn.general_scan`.

    Returns:
        What the function of that cell returns.

    Raises:
        ValueError: there is no cell of that name; or as `rnn_tanh` does.
        TypeError, RuntimeError: as `rnn_tanh` does.

    Example:
        >>> w = [torch.randn(12, 3), torch.randn(12, 4)]
        >>> output, h_n = recurrent("gru_reset_before", torch.randn(5, 2, 3), None, w)
        >>> output.shape, h_n.shape
        (torch.Size([5, 2, 4]), torch.Size([1, 2, 4]))
    """
    if cell_name not in CELLS:
        raise ValueError(f"cell_name: expected one of {', '.join(CELLS)}; got {cell_name!r}")
    cell = CELLS[cell_name]
    checks.flags(
        bidirectional=bidirectional, training=training, batch_first=batch_first,
        return_states=return_states, recompute=recompute,
    )  # fmt: skip
    given = _checked(
        cell, input, hx, weights, num_layers, bidirectional, dropout, batch_first, batch_sizes,
        lengths, resets, reset_hx,
    )  # fmt: skip
    dropout = dropout if training else 0.0
    is_plain = given.masks is None and general is None and given.batch_sizes is None
    together = stack.layers(
        cell_name, given.input, given.states, given.weights, num_layers, dropout=dropout,
        is_plain=is_plain and not (return_states or recompute or bidirectional),
    )  # fmt: skip
    if together is not None:
        x, final = together
        return x.transpose(0, 1) if given.swapped else x, final
    directions = 2 if bidirectional else 1
    x, masks = given.input, given.masks
    finals, histories = [], []
    for layer, weights in enumerate(equal_parts(given.weights, num_layers)):
        span = slice(layer * directions, (layer + 1) * directions)
        h0, *c0 = given.states if num_layers == 1 else (state[span] for state in given.states)
        c0 = c0[0] if cell.has_c else None
        if given.reset_states is not None:
            masks = Masks(masks.lengths, masks.resets, *(s[span] for s in given.reset_states))
        run = transforms.layer if general is None else general.layer(layer)
        x, *final, cells = run(
            cell_name, x, h0, c0, list(weights), given.batch_sizes, masks,
            states=return_states, recompute=recompute,
        )  # fmt: skip
        finals.append(final)
        if return_states:
            by_direction = torch.stack(x.chunk(directions, -1))
            histories.append((by_direction, cells.to(x.dtype)) if cell.has_c else (by_direction,))
        if dropout and layer < num_layers - 1:
            x = F.dropout(x, dropout, True)
    if given.swapped:
        x = _batch_first(x, 0, masks)
    h_n, c_n = _of_all_layers(finals)
    final = (h_n, c_n) if cell.has_c else h_n
    if not return_states:
        return x, final
    history = _of_all_layers(histories)
    if given.swapped:
        history = tuple(_batch_first(h, 1, masks) for h in history)
    return x, final, history


def _batch_first(sequence: Tensor, timesteps: int, masks: Masks | None) -> Tensor:
    """[..., B, T, K] of [..., T, B, K], whose timesteps are that dimension. A view, but with masks:
    the short ways (`training`) write those in this order, and all ways give the same strides."""
    turned = sequence.transpose(timesteps, timesteps + 1)
    return turned if masks is None else turned.contiguous()


def _of_all_layers(parts: list[Sequence[Tensor | None]]) -> tuple[Tensor | None, ...]:
    """Each layer's tensors, [D, ...], as those of all layers, [num_layers*D, ...]."""
    return tuple(
        of_layers[0] if len(of_layers) == 1 or of_layers[0] is None else torch.cat(of_layers)
        for of_layers in zip(*parts, strict=True)
    )


class _Checked(NamedTuple):
    """The tensors of a call as layers take them."""

    input: Tensor  # [T, B, I] or, with batch_sizes, [N, I]
    states: tuple[Tensor, ...]
    weights: Sequence[Tensor]
    batch_sizes: Tensor | None
    masks: Masks | None  # without the states that resets lead to
    reset_states: tuple[Tensor, ...] | None
    swapped: bool  # whether the caller's input was [B, T, I]


def _checked(
    cell: Cell,
    input: Tensor,
    hx,
    weights: Sequence[Tensor],
    num_layers: int,
    bidirectional: bool,
    dropout: float,
    batch_first: bool,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    reset_hx,
) -> _Checked:
    """The arguments of `recurrent`, checked: raises what it raises."""
    directions, packed = 2 if bidirectional else 1, batch_sizes is not None
    checks.is_dense_tensor(input, "input")
    checks.stack_options(num_layers, dropout)
    states = None if hx is None else checks.states(hx, cell.has_c)
    reset_states = None if reset_hx is None else checks.states(reset_hx, cell.has_c, "reset_hx")
    if not torch.compiler.is_compiling():
        input = in_memory(input)
        states, reset_states = (
            None if given is None else tuple(map(in_memory, given))
            for given in (states, reset_states)
        )
    if torch._C._is_any_autocast_enabled():
        input, states, reset_states, weights = _autocast(input, states, reset_states, weights)
    swapped = batch_first and not packed and input.dim() == 3
    if swapped:
        input = input.transpose(0, 1)
    batch_size = 0
    if packed:
        batch_size = _first_batch_size(batch_sizes, states, input)
    elif input.dim() == 3:
        batch_size = input.shape[1]
    checks.recurrent_arguments(
        cell, input, states, weights, num_layers, directions, batch_size, packed
    )
    if not torch.compiler.is_compiling():
        weights = [in_memory(weight) for weight in weights]
    masks = None
    if lengths is not None or resets is not None or reset_states is not None:
        checks.masks(lengths, resets, reset_states is not None, input, packed, swapped)
        if reset_states is not None:
            checks.reset_states(cell, reset_states, weights, num_layers, directions, batch_size)
        masks = _masks(lengths, resets, input.device, swapped)
    if states is None:
        leading = num_layers * directions, batch_size
        widths = weights[1].shape[1], weights[0].shape[0] // cell.gates
        states = zero_states(cell, input, leading, *widths)
    return _Checked(input, states, weights, batch_sizes, masks, reset_states, swapped)


def _masks(
    lengths: Tensor | None, resets: Tensor | None, device: torch.device, swapped: bool
) -> Masks:
    """The masks on `device`, where those that are on the CPU are sent without waiting."""
    if lengths is not None:
        lengths = sent(lengths, device, "lengths").to(torch.int64)
    if resets is not None:
        resets = sent(resets, device, "resets")
        resets = (resets.t() if swapped else resets).contiguous()
    return Masks(lengths, resets)


def _first_batch_size(batch_sizes: Tensor, states: Sequence[Tensor] | None, input: Tensor) -> int:
    """The batch size of packed rows; the values after the first are checked where they are used."""
    checks.is_dense_tensor(batch_sizes, "batch_sizes")
    if batch_sizes.dtype != torch.int64 or batch_sizes.dim() != 1 or not batch_sizes.is_cpu:
        raise RuntimeError(
            "batch_sizes: expected a 1-D int64 tensor on the CPU, got "
            f"{batch_sizes.dim()}-D {batch_sizes.dtype} on {batch_sizes.device}"
        )
    if batch_sizes.shape[0] == 0:
        raise RuntimeError("batch_sizes: Expected sequence length to be larger than 0 in RNN")
    if torch.compiler.is_compiling():
        # A number that a graph computes cannot be asked about, and breaks it where it is not
        # compiled in full; the operator looks at it when it runs.
        if states is not None and states[0].dim() == 3:
            return states[0].shape[1]
        first = batch_sizes[0].item()
        torch._check(first >= 0)
        return first
    first = int(batch_sizes[0])
    if first < 1:
        raise RuntimeError(f"batch_sizes: expected positive sizes, got {first} for the first step")
    if input.dim() == 2 and first > input.shape[0]:
        # Which raises, before there are states for so many rows, or no memory for them.
        Rows(batch_sizes.shape[0], first, batch_sizes, input.shape[0])
    return first


def _autocast(input, states, reset_states, weights):
    """Under autocast every cell follows the rule of nn.Linear: all operands in autocast's dtype."""
    device_type = input.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return input, states, reset_states, weights
    dtype = torch.get_autocast_dtype(device_type)

    def cast(given):  # what is no tensor is refused after this
        eligible = isinstance(given, Tensor) and given.is_floating_point()
        return given.to(dtype) if eligible and given.dtype != torch.float64 else given

    states, reset_states = (
        None if given is None else tuple(cast(s) for s in given) for given in (states, reset_states)
    )
    if isinstance(weights, (list, tuple)):
        weights = [cast(weight) for weight in weights]
    return cast(input), states, reset_states, weights

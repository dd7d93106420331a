"""Truncated backpropagation through time."""

from __future__ import annotations

import numbers
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import checks
from .problem import Masks


def tbptt(
    layer: torch.nn.Module,
    x: Tensor,
    hx: Any = None,
    *,
    window: int,
    back: int | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reset_hx: Any = None,
) -> Iterator[tuple[Tensor, Any]]:
    """Runs a layer over a sequence in windows, for training with truncated backpropagation.

    BPTT(h; h') of Williams and Peng (1990), h' being `window` and h `back`: the loss of each
    window's steps is propagated through the last `back` steps from the window's end. So the
    gradient of each step's loss goes through at least `back - window + 1` steps. With
    `back=window`, the default, states are only cut between windows; with `back=T` nothing is
    truncated. What lies between `back` and `window` is computed again for each window: forward
    costs back / window times as much, and memory is that of `back` steps, not of T.

    Args:
        layer: an RNN, GRU or LSTM in one direction, not stateful: `layer(x, hx)` is called.
        x: [T, B, I] ([B, T, I] with the layer's `batch_first`), or unbatched [T, I].
        hx: initial states as the layer takes them, or None for zeros. Gradients reach them from
            the windows that go back to the first step.
        window: timesteps between two backward passes; the last window may be shorter.
        back: timesteps that a backward pass goes through, at least `window`.
        lengths, resets, reset_hx: as :class:`fused_rnn.RNN` takes them, for the whole of x.

    Yields:
        output: of the next `window` steps, laid out as x is. Call backward on a loss of it before
            going on; the optimizer may step between windows.
        state: the states after them, detached.

    Raises:
        TypeError, ValueError, RuntimeError: an argument does not fit. `window`, `back`, the steps
            of `x`, values of `lengths` and the shape of `resets` are looked at at once, all else
            by the layer in the first window.

    Example:
        >>> layer = torch.nn.GRU(3, 4)
        >>> x, target = torch.randn(10, 2, 3), torch.randn(10, 2, 4)
        >>> windows = tbptt(layer, x, window=3, back=5)
        >>> for (output, state), wanted in zip(windows, target.split(3)):
        ...     (output - wanted).square().sum().backward()
        >>> output.shape
        torch.Size([1, 2, 4])
    """
    if not callable(layer):
        raise TypeError(f"layer: expected a module, got {type(layer).__name__}")
    checks.is_dense_tensor(x, "x")
    if x.dim() not in (2, 3):
        raise ValueError(f"x: expected 2 or 3 dimensions, got {x.dim()}")
    if getattr(layer, "bidirectional", False):
        raise ValueError(
            "layer: expected one direction, got a bidirectional layer, whose reverse direction "
            "begins at the sequence's end"
        )
    if getattr(layer, "stateful", False):
        raise ValueError("layer: expected one that is not stateful, for states are passed to it")
    back = window if back is None else back
    for name, value in (("window", window), ("back", back)):
        if not isinstance(value, numbers.Integral) or isinstance(value, bool):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if window < 1:
        raise ValueError(f"window: expected at least 1, got {window}")
    if back < window:
        raise ValueError(f"back: expected at least the window, {window}, got {back}")
    time = 1 if x.dim() == 3 and getattr(layer, "batch_first", False) else 0
    if x.shape[time] == 0:
        raise ValueError("x: expected at least one timestep, got none")
    for name, mask in (("lengths", lengths), ("resets", resets)):
        if mask is not None:
            checks.is_dense_tensor(mask, name)
    if resets is not None and resets.shape != x.shape[:-1]:
        raise ValueError(f"resets: expected shape {list(x.shape[:-1])}, got {list(resets.shape)}")
    if lengths is not None:
        checks.length_dtype(lengths)
        # Steps are subtracted from them, of which an unsigned dtype would make large numbers.
        lengths = lengths.to(torch.int64)
        Masks(lengths).check(x.shape[time])
    masks = {"lengths": lengths, "resets": resets, "reset_hx": reset_hx}
    return _windows(layer, x, hx, window, back, time, masks)


def _windows(
    layer: torch.nn.Module,
    x: Tensor,
    hx: Any,
    window: int,
    back: int,
    time: int,
    masks: dict[str, Any],
) -> Iterator[tuple[Tensor, Any]]:
    steps = x.shape[time]
    start, state = 0, hx  # where the next window's graph begins, and the states there
    for begin in range(0, steps, window):
        end = min(begin + window, steps)
        next_start = max(start, min(end + window, steps) - back)
        # In pieces: the states before the window's own steps, and those that the next one begins
        # with, are needed for themselves.
        cuts = sorted({start, begin, end, *([next_start] if next_start < end else [])})
        current, kept = state, state
        outputs = []
        for first, last in pairwise(cuts):
            output, current = layer(
                x.narrow(time, first, last - first),
                current,
                **_masks_of(masks, first, last, time),
            )
            if first >= begin:
                outputs.append(output)
            if last == next_start:
                kept = _detached(current)
        start, state = next_start, kept
        yield outputs[0] if len(outputs) == 1 else torch.cat(outputs, time), _detached(current)


def _masks_of(masks: dict[str, Any], first: int, last: int, time: int) -> dict[str, Any]:
    """The masks of the steps [first, last); none that were not given, for layers without them."""
    given = {name: value for name, value in masks.items() if value is not None}
    if "lengths" in given:
        given["lengths"] = (given["lengths"] - first).clamp(0, last - first)
    if "resets" in given:
        given["resets"] = given["resets"].narrow(time, first, last - first)
    return given


def _detached(state: Any) -> Any:
    return state.detach() if isinstance(state, Tensor) else tuple(s.detach() for s in state)

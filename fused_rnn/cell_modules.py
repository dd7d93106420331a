"""RNNCell, GRUCell and LSTMCell: torch.nn's contract for one timestep.

Constructors, parameters, initialisation, state_dict, repr and pickling are torch.nn.RNNCellBase's
own; `forward` is ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks, compiled, direct, functional, looks, symbolic, torchscript, training
from .cells import CELLS, Cell


class _RecurrentCell(torchscript.NotScriptable, torch.nn.RNNCellBase):
    """What the cells share: one timestep, batched or not."""

    _cell_name: str
    _torch_class: type[torch.nn.RNNCellBase]

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """One timestep.

        Args:
            input: [B, I], or [I] for a single row, in the dtype of the parameters (under autocast
                in any).
            hx: h [B, H], or [H], of an LSTMCell a pair (h, c) of these; None for zeros.

        Returns:
            The new h, of an LSTMCell (h, c), shaped as hx.

        Raises:
            TypeError: an argument is of another type.
            ValueError: input has another number of dimensions than 1 or 2.
            RuntimeError: shapes, dtypes or devices do not fit.
            UnsupportedProblemError: no backend takes the cell, or not the one that was forced.

        Example:
            >>> cell, h = GRUCell(10, 20), None
            >>> for x in torch.randn(5, 3, 10):
            ...     h = cell(x, h)
            >>> h.shape
            torch.Size([3, 20])
        """
        cell, looked = self._cell(), []  # see `looks`
        if not torch.compiler.is_compiling():
            shortest = training if torch.is_grad_enabled() else direct
            if (result := shortest.step(self, looked, cell, input, hx)) is not None:
                return result
        if symbolic.is_proxy(input):
            return symbolic.node(self, input, {"hx": hx})
        weights = looks.attributes(self, looks.CELL_WEIGHTS, looked)
        if torch.jit.is_tracing():
            values = dict(zip(looks.CELL_WEIGHTS, weights, strict=True))
            return torchscript.traced(self, self._torch_class, values, input, hx)
        w_ih, w_hh, *biases = weights
        states = checks.cell_arguments(self._get_name(), cell, input, hx, w_ih, self.hidden_size)
        weights = [w_ih, w_hh, *_biases(biases)]
        batched = input.dim() == 2
        if not batched:
            input = input.unsqueeze(0)
            states = None if states is None else tuple(s.unsqueeze(0) for s in states)
        if states is not None:
            states = tuple(s.unsqueeze(0) for s in states)
        finals = _next_states(cell, input.unsqueeze(0), states, weights)
        finals = tuple(s.squeeze(0) if batched else s.flatten() for s in finals)
        return finals if cell.has_c else finals[0]

    def _cell(self) -> Cell:
        return CELLS[self._cell_name]


def _next_states(
    cell: Cell, x: Tensor, states: tuple[Tensor, ...] | None, weights: list[Tensor]
) -> tuple[Tensor, ...]:
    """The states after the one timestep of x [1, B, I]; all are [1, B, H]."""
    if torch.compiler.is_compiling():
        given = compiled.step(cell, x, states, weights)
        if given is not None:
            return given
    hx = states if states is None or cell.has_c else states[0]
    _, final = getattr(functional, cell.name)(x, hx, weights)
    return final if cell.has_c else (final,)


def _biases(given: list[Tensor | None]) -> list[Tensor]:
    present = [bias for bias in given if bias is not None]
    # As torch.nn does, with one of them taken away the other still counts.
    return [torch.zeros_like(present[0]) if b is None else b for b in given] if present else []


class RNNCell(_RecurrentCell):
    r"""One step of an `RNN`: h' = tanh(W_ih x + b_ih + W_hh h + b_hh), or relu.

    A drop-in replacement for `torch.nn.RNNCell`.

    Args:
        input_size, hidden_size: I and H.
        bias: whether to add b_ih and b_hh.
        nonlinearity: "tanh" or "relu".
        device, dtype: of the parameters.

    Inputs:
        input: [B, I], or [I], in the parameters' dtype, any floating-point one of 16 bits or more.
        hx: [B, H], or [H]; None for zeros.

    Returns:
        h': [B, H], or [H], in that dtype.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: input has another number of dimensions than 1 or 2.
        RuntimeError: shapes, dtypes or devices do not fit; another nonlinearity, at the first call.

    Example:
        >>> RNNCell(10, 20)(torch.randn(3, 10)).shape
        torch.Size([3, 20])
    """

    __constants__ = ["input_size", "hidden_size", "bias", "nonlinearity"]  # noqa: RUF012
    _torch_class = torch.nn.RNNCell

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 1, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity

    def _cell(self) -> Cell:
        if self.nonlinearity not in ("tanh", "relu"):
            # As in torch.nn the constructor takes anything, and the first call objects.
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return CELLS[f"rnn_{self.nonlinearity}"]


class GRUCell(_RecurrentCell):
    r"""One step of a `GRU`. A drop-in replacement for `torch.nn.GRUCell`.

    Args:
        input_size, hidden_size: I and H.
        bias: whether to add b_ih and b_hh.
        device, dtype: of the parameters.

    Inputs:
        input: [B, I], or [I], in the parameters' dtype, any floating-point one of 16 bits or more.
        hx: [B, H], or [H]; None for zeros.

    Returns:
        h': [B, H], or [H], in that dtype.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: input has another number of dimensions than 1 or 2.
        RuntimeError: shapes, dtypes or devices do not fit.

    Example:
        >>> GRUCell(10, 20)(torch.randn(10)).shape
        torch.Size([20])
    """

    _cell_name = "gru"
    _torch_class = torch.nn.GRUCell

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device=None, dtype=None
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 3, device=device, dtype=dtype)


class LSTMCell(_RecurrentCell):
    r"""One step of an `LSTM`. A drop-in replacement for `torch.nn.LSTMCell`.

    Args:
        input_size, hidden_size: I and H.
        bias: whether to add b_ih and b_hh.
        device, dtype: of the parameters.

    Inputs:
        input: [B, I], or [I], in the parameters' dtype, any floating-point one of 16 bits or more.
        hx: a pair (h, c), each [B, H], or [H]; None for zeros.

    Returns:
        (h', c'): each [B, H], or [H], in that dtype.

    Raises:
        TypeError: input is no tensor, or hx no pair of tensors.
        ValueError: input has another number of dimensions than 1 or 2.
        RuntimeError: shapes, dtypes or devices do not fit.

    Example:
        >>> h, c = LSTMCell(10, 20)(torch.randn(3, 10))
        >>> h.shape, c.shape
        (torch.Size([3, 20]), torch.Size([3, 20]))
    """

    _cell_name = "lstm"
    _torch_class = torch.nn.LSTMCell

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device=None, dtype=None
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 4, device=device, dtype=dtype)

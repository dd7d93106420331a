"""What goes in and out of a backend's layer, bundled.

Shapes: D directions, B batch, N rows (T*B when padded), I input_size, H hidden_size,
P output size, G gates, S = cell.saved_gates, Q = cell.grad_gates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..cells import DirectionWeights
from ..problem import Rows


class LayerOutput(NamedTuple):
    """What a forward pass gives. `gates` and `cells` have zero columns where not needed."""

    y: Tensor  # [N, D*P]
    h_n: Tensor  # [D, B, P]
    c_n: Tensor  # [D, B, H] for LSTM, else [D, B, 0]
    gates: Tensor  # [D, N, problem.saved_columns] when saved for backward, else [D, N, 0]
    cells: Tensor  # [D, N, H] c after each step in state_dtype, when saved or asked for


class StackOutput(NamedTuple):
    """What the forward pass of a stack of L layers of one direction gives."""

    ys: list[Tensor]  # of each layer [N, H]
    h_n: Tensor  # [L, B, H]
    c_n: Tensor  # [L, B, H] for LSTM, else [L, B, 0]
    gates: list[Tensor]  # of each layer, as in LayerOutput
    cells: list[Tensor]


class StackInputs(NamedTuple):
    """What goes into a stack of L layers of one direction."""

    x: Tensor  # [N, I]
    weights: list[DirectionWeights]  # of each layer
    h0: Tensor  # [L, B, H]
    c0: Tensor | None  # [L, B, H], LSTM only
    dropout: Dropout


class Dropout(NamedTuple):
    """What dropout leaves of the output of each layer of a stack but the last."""

    kept: list[Tensor]  # bool [N, H]; none where there is no dropout
    scale: float  # of what is kept

    def of(self, layer: int, y: Tensor) -> Tensor:
        """`y` of that layer, as the next one reads it; or of its gradient, the reverse."""
        if not self.kept:
            return y
        kept = self.kept[layer].view(y.shape)
        return torch.ops.aten.native_dropout_backward(y, kept, self.scale)


def allocate_saved(
    like: Tensor, rows: Rows, directions: int, width: int, dtype: torch.dtype | None = None
) -> Tensor:
    """[D, N, width] in memory with room for `rows.room` rows."""
    if rows.room == rows.count:
        return like.new_empty((directions, rows.count, width), dtype=dtype)
    flat = like.new_empty(directions * rows.room * width, dtype=dtype)
    return flat[: directions * rows.count * width].view(directions, rows.count, width)


class OutputGrads(NamedTuple):
    """Gradients of a layer's outputs; None stands for zero."""

    y: Tensor | None  # [N, D*P]
    h_n: Tensor | None  # [D, B, P]
    c_n: Tensor | None  # [D, B, H]
    cells: Tensor | None = None  # [D, N, H], where c after each step is an output


class ScanGrads(NamedTuple):
    """What a backward scan gives; gradients of states may be in float32."""

    gates: Tensor  # [D, N, Q*H] gradients of the gate pre-activations
    h0: Tensor  # [D, B, P]
    c0: Tensor | None  # [D, B, H], LSTM only
    h: Tensor | None = None  # [D, N, P] gradient of each step's h, projected LSTM only
    reset_h: Tensor | None = None  # [D, B, P] where masks have it
    reset_c: Tensor | None = None  # [D, B, H] likewise


class InputGrads(NamedTuple):
    """Gradients of a layer's inputs; None where not asked for."""

    x: Tensor | None  # [N, I]
    h0: Tensor | None  # [D, B, P]
    c0: Tensor | None  # [D, B, H]
    # Flat: those of each direction's weights in turn. `Backend.backward` gives them their dtypes.
    weights: list[Tensor | None]
    reset_h: Tensor | None = None  # [D, B, P]
    reset_c: Tensor | None = None  # [D, B, H]


class Needs(NamedTuple):
    """Which inputs ask for a gradient."""

    x: bool
    h0: bool
    c0: bool
    reset_h: bool
    reset_c: bool
    weights: Sequence[bool]

    @classmethod
    def of(cls, needs: Sequence[bool]) -> Needs:
        """What `LayerCall.differentiable` needs gradients of, given in that order."""
        return cls(*needs[:5], needs[5:])

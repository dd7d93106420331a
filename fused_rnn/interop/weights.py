"""Reading and writing the weights of one layer of a module."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import looks
from ..cells import CELL_OF_MODE, Cell, DirectionWeights
from ..convert import option_of_ours
from ..modules import GRU, LSTM, RNN

# Not by torch.nn's names, which may be bound to ours.
_OURS_AND_THEIRS = tuple(kind for cls in (RNN, GRU, LSTM) for kind in (cls, cls._torch_class))


def cell_of(module: object, *allowed: str) -> Cell:
    """The cell of a recurrent module without a projection.

    Raises:
        TypeError: `module` is not one.
        ValueError: it has a projection, or options that only our modules have and that are not
            `allowed`.
    """
    if not isinstance(module, _OURS_AND_THEIRS):
        raise TypeError(
            "module: expected an RNN, GRU or LSTM of fused_rnn or torch.nn, got "
            f"{type(module).__name__}"
        )
    if module.proj_size:
        raise ValueError(f"module: expected no projection, got proj_size={module.proj_size}")
    if option := option_of_ours(module, besides=("reset_after", "stateful", *allowed)):
        raise ValueError(f"module: expected none of our own options, got {option}")
    return CELL_OF_MODE[module.mode]


def read(module: torch.nn.RNNBase, layer: int) -> list[DirectionWeights]:
    """A layer's weights of each direction, detached."""
    per_direction = 4 if module.bias else 2
    directions = 1 + module.bidirectional
    names = module._flat_weights_names[layer * directions * per_direction :]
    weights = []
    looks.refresh(module)
    for d in range(directions):
        own = (getattr(module, name) for name in names[d * per_direction :][:per_direction])
        peephole = getattr(module, _peephole(layer, d), None)
        weights.append(
            DirectionWeights(
                *(w.detach() for w in own),
                peephole=None if peephole is None else peephole.detach(),
            )
        )
    return weights


def write(module: torch.nn.RNNBase, weights: list[DirectionWeights]) -> None:
    """Copies the weights of each direction into a module of one layer."""
    flat: list[Tensor] = [w for direction in weights for w in direction[:4] if w is not None]
    with torch.no_grad():
        for name, weight in zip(module._flat_weights_names, flat, strict=True):
            getattr(module, name).copy_(weight)
        for d, direction in enumerate(weights):
            if direction.peephole is not None:
                getattr(module, _peephole(0, d)).copy_(direction.peephole)


def _peephole(layer: int, direction: int) -> str:
    return f"weight_peephole_l{layer}" + ("_reverse" if direction else "")

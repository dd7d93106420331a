"""How many FLOPs the operators take, for torch.utils.flop_counter and the compilers that ask it.

Counted as torch counts its own: 2*m*k*n for a product of [m, k] and [k, n], and nothing else, by
shapes alone. So packed rows count as many as they are, and a padded batch counts in full whatever
its lengths say, which the host may not know.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .cells import CELLS, equal_parts
from .layer_call import BackwardCall

_COUNTER = "torch.utils.flop_counter"
_formulas: dict[torch._ops.OpOverloadPacket, Callable[..., int]] = {}


def register(operator: torch._ops.OpOverloadPacket, formula: Callable[..., int]) -> None:
    """`formula` takes what the operator takes, and what it gave as `out_val`."""
    _formulas[operator] = formula
    if counter := sys.modules.get(_COUNTER):
        _give(counter, operator)


def _give(counter: ModuleType, operator: torch._ops.OpOverloadPacket) -> None:
    if operator not in counter.flop_registry:  # which takes none twice
        counter.register_flop_formula(operator, get_raw=True)(_formulas[operator])


class _AfterImport(MetaPathFinder):
    """Gives torch's counter the formulas when it is imported. It has to have them before anybody
    counts, but takes 0.25 s to import, more than twice what this package takes beside torch."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_give(module: ModuleType) -> None:
                run(module)
                for operator in _formulas:
                    _give(module, operator)

            spec.loader.exec_module = run_and_give
        return spec


sys.meta_path.insert(0, _AfterImport())


def _rows(x: Tensor) -> int:
    return math.prod(x.shape[:-1])


def _matrices(weights: Sequence[Tensor]) -> list[Tensor]:
    return [w for w in weights if w.dim() == 2]


def forward(x: Tensor, weights: Sequence[Tensor]) -> int:
    """Each row of x meets each matrix once."""
    return 2 * _rows(x) * sum(w.numel() for w in _matrices(weights))


def layer_forward(
    x: Tensor, h0: Any, c0: Any, weights: Sequence[Tensor], *_: Any, **__: Any
) -> int:
    """FLOPs of fused_rnn::layer_forward and infer_layers."""
    return forward(x, weights)


def library_layer(cell: int, x: Tensor, weights: Sequence[Tensor], *_: Any, **__: Any) -> int:
    """FLOPs of fused_rnn_cpu::layer."""
    return forward(x, weights)


def layer_backward(*arguments: Any, **_: Any) -> int:
    """FLOPs of fused_rnn::layer_backward: a product for the gradient of each matrix, and one for
    that of what the matrix was multiplied by."""
    _, call, _, needs = BackwardCall.of(*arguments)
    needs_x, needs_h0, _, needs_reset, _, *needs_weights = needs
    weights, cell = call.weights, CELLS[call.cell]
    rows, directions = _rows(call.x), call.h0.shape[0]
    products = sum(
        rows * w.numel()
        for w, need in zip(weights, needs_weights, strict=True)
        if need and w.dim() == 2
    )
    for of_direction in equal_parts(weights, directions):
        w_ih, w_hh, *w_hr = _matrices(of_direction)
        products += rows * (w_ih.numel() * needs_x + w_hh.numel() + sum(w.numel() for w in w_hr))
        if not (needs_h0 or needs_reset):
            # The first step's is that of h0. A reset gate before the product needs n's still.
            first = cell.products[0]
            products -= call.h0.shape[1] * w_hh.numel() * first // cell.gates
    return 2 * products + (forward(call.x, weights) if call.recompute else 0)


def step(packed, cell, layers, input, hidden, output, bias, per_word, x, *_: Any, **__: Any) -> int:
    """FLOPs of fused_rnn_cpu::step, whose weights are all in one tensor."""
    gates = next(each.gates for each in CELLS.values() if each.index == cell)
    columns = input + (layers - 1) * output + layers * output
    projection = layers * output * hidden if output != hidden else 0
    return 2 * math.prod(x.shape[:-1]) * (gates * hidden * columns + projection)


def step_lstm(packed, layers, *args: Any, **options: Any) -> int:
    """FLOPs of fused_rnn_cpu::step_lstm."""
    return step(packed, CELLS["lstm"].index, layers, *args, **options)

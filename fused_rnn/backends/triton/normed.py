"""Layers that normalise: torch's products and one kernel between two of them (`normed_step.py`).

The input side of all steps is normalised at once. What backward wants of a call lies in `gates`
[D, N, problem.saved_columns], one kind after the other, see `_Saved`.
All in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...cells import Cell, DirectionWeights, equal_parts
from ...problem import LayerInputs, Masks, Problem
from ...recurrences import EPS, Extras
from ..base import (
    aligned,
    collected,
    hidden_order,
    input_side,
    peephole_grad,
    times_operands,
    without_padding,
)
from ..bundles import InputGrads, LayerOutput, Needs, OutputGrads, ScanGrads
from . import launch
from .normed_step import normed_backward, normed_forward

_SCALES = 5  # of a row: of two groups of W_ih x, of two of W_hh h, of c


class _Saved(NamedTuple):
    # Those that kernels read in vectors come first, where they are aligned for any N.
    gates: Tensor  # [D, N, S*H] as without normalisation
    hidden_side: Tensor  # [D, N, G*H] W_hh h with mean 0 and variance 1
    c: Tensor  # [D, N, H] the same of an LSTM's c, else [D, N, 0]
    input_side: Tensor  # [D, N, G*H] the same of W_ih x
    scales: Tensor  # [D, N, 5] the factors that made the variances so

    @classmethod
    def within(cls, problem: Problem, memory: Tensor) -> _Saved:
        cell, hidden = problem.cell, problem.hidden_size
        sides = cell.gates * hidden
        widths = cell.saved_gates * hidden, sides, cell.has_c * hidden, sides, _SCALES
        directions, count, _ = memory.shape
        parts = memory.flatten().split([directions * count * width for width in widths])
        return cls(*(p.view(directions, count, w) for p, w in zip(parts, widths, strict=True)))


def _groups(cell: Cell, hidden: int) -> list[slice]:
    """The columns that are normalised together: GRU's r and z, then n; all of an LSTM's."""
    bounds = (0, 2, 3) if cell.gates == 3 else (0, cell.gates)
    return [slice(a * hidden, b * hidden) for a, b in pairwise(bounds)]


def _all_extras(cell: Cell, weights: list[DirectionWeights]) -> dict[str, Tensor | None]:
    """The extras of all directions, each [D, ...]."""
    of_each = zip(*(Extras.of_weights(cell, w) for w in weights), strict=True)
    return {
        name: None if tensors[0] is None else launch.stacked(tensors)
        for name, tensors in zip(Extras._fields, of_each, strict=True)
    }


def _constants(problem: Problem) -> dict[str, int]:
    hidden, cell = problem.hidden_size, problem.cell
    block = triton.next_power_of_2(hidden)
    return {
        "H": hidden,
        "D": problem.directions,
        "G": cell.gates,
        "S": cell.saved_gates,
        "BLOCK_H": block,
        # Four numbers of a tile to a thread: one load.
        **({} if launch.INTERPRETED else {"num_warps": min(max(block // 128, 1), 16)}),
    }


class _Half(NamedTuple):
    """What goes with a launch, of which a step has two where a GRU resets before the product."""

    name: str  # the kernels' HALF
    weights: Tensor  # [D, K, H] W_hh of its gates, a view
    products: Tensor  # [D, B, K] memory for one step's, or for their gradients


def _halves(problem: Problem, weights: list[DirectionWeights], like: Tensor) -> list[_Half]:
    """The halves of a step, in forward's order."""
    w, hidden = launch.stacked([each.w_hh for each in weights]), problem.hidden_size
    names, parts = ("",), [w]
    if launch.resets_before(problem):
        names, parts = ("gates", "candidate"), w.split((2 * hidden, hidden), 1)
    shape = problem.directions, problem.batch_size
    return [
        _Half(name, part, like.new_empty((*shape, part.shape[1])))
        for name, part in zip(names, parts, strict=True)
    ]


def forward(problem: Problem, inputs: LayerInputs, save: bool) -> LayerOutput:
    x, weights, h0, c0, rows = inputs
    cell, hidden, directions = problem.cell, problem.hidden_size, problem.directions
    count = x.shape[0]
    out = LayerOutput(
        y=x.new_empty((count, directions * hidden)),
        h_n=h0.clone(memory_format=torch.contiguous_format),
        c_n=c0.clone(memory_format=torch.contiguous_format)
        if cell.has_c
        else x.new_empty((directions, problem.batch_size, 0)),
        gates=x.new_empty((directions, count, problem.saved_columns * save)),
        cells=x.new_empty((directions, count, hidden * problem.keeps_cells(save))),
    )
    saved = _Saved.within(problem, out.gates) if save else None
    gx = _input_side(problem, without_padding(x, rows), weights, saved)
    if problem.batch_size == 0:
        return out
    extras = _all_extras(cell, weights)
    h, c = out.h_n, out.c_n if cell.has_c else None
    row_arguments = launch.row_arguments(problem, rows, x.device)
    _restart(rows.masks, h, c)
    operand = torch.empty_like(h)
    if rows.noise.h_factor is None:
        operand.copy_(h)
    else:
        torch.mul(h, row_arguments["h_factor"], out=operand)
    halves = _halves(problem, weights, h)
    arguments = {
        "gx": gx,
        "gains": extras["norm_hh"],
        "bias": None if weights[0].b_hh is None else launch.stacked([w.b_hh for w in weights]),
        "gains_c": extras["norm_c"],
        "bias_c": extras["norm_c_bias"],
        "peephole": extras["peephole"],
        **row_arguments,
        "y": out.y,
        "h": h,
        "c": c,
        "operand": operand,
        "z_state": torch.empty_like(h) if len(halves) == 2 else None,
        "gates": saved and saved.gates,
        "normed_hh": saved and saved.hidden_side,
        "normed_c": saved and saved.c,
        "scales": saved and saved.scales,
        "cells": out.cells if problem.keeps_cells(save) else None,
        "T": problem.timesteps,
        "B": problem.batch_size,
        "N": count,
        "EPS": EPS,
        **_constants(problem),
    }
    grid = problem.batch_size, directions
    with torch.cuda.device_of(x):
        for s in range(problem.timesteps):
            for half in halves:
                torch.bmm(operand, half.weights.transpose(1, 2), out=half.products)
                normed_forward[grid](sums=half.products, s=s, HALF=half.name, **arguments)
    return out


def backward(
    problem: Problem,
    grads: OutputGrads,
    inputs: LayerInputs,
    out: LayerOutput,
    needs: Needs,
) -> InputGrads:
    x, weights, h0, c0, rows = inputs
    cell, hidden, directions = problem.cell, problem.hidden_size, problem.directions
    count = x.shape[0]
    saved = _Saved.within(problem, out.gates)
    inputs = inputs._replace(x=without_padding(x, rows))
    extras = _all_extras(cell, weights)
    masks = rows.masks or Masks()
    grad_h = launch.state_gradient(grads.h_n, h0)
    grad_c = launch.state_gradient(grads.c_n, h0) if cell.has_c else None
    grad_reset_h = None if masks.reset_h is None else torch.zeros_like(grad_h)
    grad_reset_c = None if masks.reset_c is None else torch.zeros_like(grad_h)
    grad_sums = x.new_empty((directions, count, cell.grad_gates * hidden))
    grad_products = x.new_empty((directions, count, cell.gates * hidden))
    grad_seen = x.new_empty((directions, count, hidden)) if cell.has_c else None
    row_arguments = launch.row_arguments(problem, rows, x.device)
    arguments = {
        "y": aligned(out.y),
        "gates": saved.gates,
        "normed_hh": saved.hidden_side,
        "normed_c": saved.c if cell.has_c else None,
        "scales": saved.scales,
        "cells": out.cells if cell.has_c else None,
        "gains": extras["norm_hh"],
        "gains_c": extras["norm_c"],
        "bias_c": extras["norm_c_bias"],
        "peephole": extras["peephole"],
        "h0": aligned(h0),
        "c0": aligned(c0),
        "grad_y": aligned(grads.y),
        "grad_cells": aligned(grads.cells),
        **row_arguments,
        "grad_sums": grad_sums,
        "grad_products": grad_products,
        "grad_seen": grad_seen,
        "grad_h": grad_h,
        "grad_c": grad_c,
        "grad_reset_h": grad_reset_h,
        "grad_reset_c": grad_reset_c,
        "T": problem.timesteps,
        "B": problem.batch_size,
        "N": count,
        "Q": cell.grad_gates,
        **_constants(problem),
    }
    product = torch.zeros_like(grad_h)
    halves = _halves(problem, weights, grad_h)
    grid = problem.batch_size, directions
    if problem.batch_size > 0:
        with torch.cuda.device_of(x):
            for s in reversed(range(problem.timesteps)):
                for half in reversed(halves):
                    normed_backward[grid](
                        carried=half.products, product=product, s=s, HALF=half.name, **arguments
                    )
                    torch.bmm(half.products, half.weights, out=product)
    if row_arguments["h_factor"] is not None:
        product *= row_arguments["h_factor"]
    grad_h += product
    _restart_backward(masks, (grad_h, grad_c), (grad_reset_h, grad_reset_c))
    scan = ScanGrads(grad_sums, grad_h, grad_c, reset_h=grad_reset_h, reset_c=grad_reset_c)
    plain = out._replace(gates=saved.gates)
    found = _LayerGrads(problem, scan, grad_products, grad_seen, inputs, plain, saved)
    grad_x, grad_weights = None, []
    of_directions = zip(weights, equal_parts(needs.weights, directions), strict=True)
    for d, (weight, need) in enumerate(of_directions):
        of_input = found.of_input_products(d, weight)
        if needs.x:
            part = of_input @ weight.w_ih
            grad_x = part if grad_x is None else grad_x.add_(part)
        grad_weights += found.of_weights(d, weight, of_input, need)
    return collected(problem, scan, needs, grad_x, grad_weights)


def _input_side(
    problem: Problem, x: Tensor, weights: list[DirectionWeights], saved: _Saved | None
) -> Tensor:
    """[D, N, G*H] W_ih x, normalised, with gains and biases."""
    cell, hidden = problem.cell, problem.hidden_size
    gx = x.new_empty((len(weights), x.shape[0], cell.gates * hidden))
    for d, w in enumerate(weights):
        products, gains = x @ w.w_ih.t(), Extras.of_weights(cell, w).norm_ih
        for i, group in enumerate(_groups(cell, hidden)):
            width = group.stop - group.start
            of_group = products[:, group]
            normed, _, scale = torch.native_layer_norm(of_group, [width], None, None, EPS)
            torch.mul(normed, gains[group], out=gx[d, :, group])
            if w.b_ih is not None:
                gx[d, :, group] += w.b_ih[group]
            if saved is not None:
                saved.input_side[d, :, group] = normed
                saved.scales[d, :, i : i + 1] = scale
    return gx


def _restart(masks: Masks | None, h: Tensor, c: Tensor | None) -> None:
    """Replaces the states of rows that start afresh before the first step."""
    first = _fresh_at_first(masks)
    if first is None:
        return
    for state, fresh in ((h, masks.reset_h), (c, masks.reset_c)):
        if state is not None:
            state[0] = torch.where(first, 0 if fresh is None else fresh[0], state[0])


def _restart_backward(
    masks: Masks, grads: tuple[Tensor | None, ...], of_fresh: tuple[Tensor | None, ...]
) -> None:
    first = _fresh_at_first(masks)
    if first is None:
        return
    for grad, fresh in zip(grads, of_fresh, strict=True):
        if fresh is not None:
            fresh[0] += torch.where(first, grad[0], 0)
        if grad is not None:
            grad[0] = torch.where(first, 0, grad[0])


def _fresh_at_first(masks: Masks | None) -> Tensor | None:
    """bool [B, 1]: of the first direction; in the second a reset follows the first step."""
    if masks is None or masks.resets is None:
        return None
    first = masks.resets[0]
    return (first if masks.lengths is None else first & (masks.lengths > 0)).unsqueeze(1)


@dataclass(frozen=True)
class _LayerGrads:
    """Turns the scan's gradients into those of the weights, one direction at a time."""

    problem: Problem
    scan: ScanGrads  # its gates: of what the gates add up
    products: Tensor  # [D, N, G*H] of W_hh h
    seen: Tensor | None  # [D, N, H] of an LSTM's normalised c
    inputs: LayerInputs
    out: LayerOutput  # with gates as without normalisation
    saved: _Saved

    def of_input_products(self, d: int, w: DirectionWeights) -> Tensor:
        """[N, G*H] the gradient of W_ih x."""
        cell, saved = self.problem.cell, self.saved
        grads, gains = input_side(cell, self.scan.gates[d]), Extras.of_weights(cell, w).norm_ih
        parts = []
        for i, group in enumerate(_groups(cell, self.problem.hidden_size)):
            grad, normed = grads[:, group] * gains[group], saved.input_side[d, :, group]
            mean, shared = grad.mean(1, True), (grad * normed).mean(1, True)
            parts.append((grad - mean - normed * shared) * saved.scales[d, :, i : i + 1])
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def of_weights(
        self, d: int, w: DirectionWeights, of_input: Tensor, need: list[bool]
    ) -> list[Tensor | None]:
        """The gradients of a direction's weights in the order of DirectionWeights, of those that
        there are; None where not needed."""
        cell, grads = self.problem.cell, self.scan.gates[d]
        made = [lambda: of_input.t() @ self.inputs.x, lambda: self._of_recurrent_weights(d)]
        if w.b_ih is not None:
            sums = grads.sum(0)
            made += [lambda: input_side(cell, sums).clone(), lambda: hidden_order(cell, sums)]
        if w.peephole is not None:
            made.append(lambda: peephole_grad(self.scan, self.inputs, self.out, d))
        made.append(lambda: self._of_gains(d, w.b_ih is not None))
        return [make() if wanted else None for make, wanted in zip(made, need, strict=True)]

    def _of_recurrent_weights(self, d: int) -> Tensor:
        return times_operands(self.problem.cell, self.products[d], self.inputs, self.out, d)

    def _of_gains(self, d: int, biased: bool) -> Tensor:
        cell, grads, saved = self.problem.cell, self.scan.gates[d], self.saved
        found = [
            (input_side(cell, grads) * saved.input_side[d]).sum(0),
            (hidden_order(cell, grads) * saved.hidden_side[d]).sum(0),
        ]
        if self.seen is not None:
            found.append((self.seen[d] * saved.c[d]).sum(0))
            if biased:
                found.append(self.seen[d].sum(0))
        return torch.cat(found)

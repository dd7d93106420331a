"""A layer's call and its gradients in plain torch operations, by the oracle.

What is not for a backend comes here: function transforms, forward mode, complex numbers,
derivatives of gradients, and what a layer has in its recurrence that the chosen backend has not.

Shapes: as in `ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .cells import CELLS, Cell, DirectionWeights, state_dtype, zero_states
from .layer_call import LayerCall, LayerResult, layer_inputs, no_autocast
from .oracle import Recurrence, plain_recurrence, run
from .problem import Masks, Noise
from .recurrences import Extras, general_recurrence, noise_of_steps


def layer(
    cell: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None = None,
    masks: Masks | None = None,
    *,
    states: bool = False,
    recurrence: Callable[..., Recurrence] = plain_recurrence,
) -> LayerResult:
    """What `ops.layer` computes (see `fused_rnn.oracle`)."""
    dtype, wide = x.dtype, state_dtype(x.dtype)
    if masks is not None:
        masks = masks.in_dtype(wide)
    # Also of gains, which are in float32 beside weights that autocast made bfloat16.
    x, h0, c0, *weights = (None if t is None else t.to(wide) for t in (x, h0, c0, *weights))
    x_rows, by_direction, *_, rows = layer_inputs(x, h0, c0, weights, batch_sizes, masks)
    initial = (h0,) if c0 is None else (h0, c0)
    with no_autocast(x.device.type):
        (y, *cells), (h_n, *c_n) = run(CELLS[cell], x_rows, initial, by_direction, rows, recurrence)
    if not rows.packed:
        y, *cells = y.unflatten(0, x.shape[:2]), *(c.unflatten(1, x.shape[:2]) for c in cells)
    y, h_n, *c_n = (t.to(dtype) for t in (y, h_n, *c_n))
    return LayerResult(y, h_n, c_n[0] if c_n else None, cells[0] if states and cells else None)


def step(
    cell: Cell, x: Tensor, states: tuple[Tensor, ...] | None, weights: list[Tensor]
) -> tuple[Tensor, ...]:
    """The states after one timestep of x [1, B, I]; they are [1, B, H], None for zeros."""
    w = DirectionWeights(*weights)
    if states is None:
        states = zero_states(cell, x, (1, x.shape[1]), *[w.w_hh.shape[1]] * 2)
    project, advance = plain_recurrence(cell, 0, w)
    after = advance(0, project(x[0]), tuple(s[0] for s in states))
    return tuple(s.unsqueeze(0) for s in after)


def recurrence_of(noise: Noise, batch_sizes: Tensor | None) -> Callable[..., Recurrence]:
    """What `layer` takes for layers with noise, peepholes or normalisations, or without."""

    def recurrence(cell: Cell, d: int, w: DirectionWeights) -> Recurrence:
        if not noise.names and w.peephole is None and w.norm is None:
            return plain_recurrence(cell, d, w)
        steps = noise_of_steps(noise, d, batch_sizes)
        return general_recurrence(cell, w, Extras.of_weights(cell, w), steps)

    return recurrence


def of_call(call: LayerCall) -> LayerResult:
    """What the call gives, its `save` aside."""
    # Not by the call's properties, which the compiler of torch 2.10 does not look into.
    noise = Noise(call.h_factor, call.kept_h, call.kept_c, call.part_h, call.part_c)
    masks = Masks(call.lengths, call.resets, call.reset_h, call.reset_c)
    return layer(
        call.cell, call.x, call.h0, call.c0, call.weights, call.batch_sizes, masks,
        states=call.states, recurrence=recurrence_of(noise, call.batch_sizes),
    )  # fmt: skip


def gradients(
    call: LayerCall,
    grads: tuple[Tensor | None, ...],  # of y, h_n, c_n, cells
    needs: Sequence[bool],
    create_graph: bool,
) -> list[Tensor | None]:
    """The gradients of `call.differentiable`, as functions of them and `grads` where
    `create_graph`."""
    with torch.enable_grad():
        # A view of each input, so that differentiation stops there: one may depend on another.
        views = [None if t is None else t.view_as(t) for t in call.differentiable]
        *outputs, cells = of_call(call.at(views)._replace(states=True))
        if grads[3] is not None and call.batch_sizes is None:
            cells = cells.flatten(1, 2)
        return differentiable_grads((*outputs, cells), grads, views, needs, create_graph)


def differentiable_grads(outputs, grads, views, needs, create_graph):
    """The gradients of `views`, where there is a need, from those of the outputs that have one in
    `grads`."""
    used = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
    wanted = [v for v, need in zip(views, needs, strict=True) if need]
    found = iter(
        torch.autograd.grad(
            [o for o, _ in used],
            wanted,
            [g.to(o.dtype) for o, g in used],
            create_graph=create_graph,
            materialize_grads=True,
        )
    )
    return [next(found) if need else None for need in needs]

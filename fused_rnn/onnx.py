"""A layer as the standard ONNX operator, LSTM, GRU or RNN, while torch.onnx.export traces.

What differs from ours, beside the weights (`onnx_node.py`): the directions of Y have a dimension of
their own; and there is no projection, which is turned into an LSTM without one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import plain
from .cells import CELLS, DirectionWeights
from .layer_call import LayerResult, split_by_direction
from .onnx_node import node_of, operator_of
from .problem import NO_NOISE, Masks, Noise
from .transformed import assumed_constant, is_dynamic

_DTYPES = (torch.float16, torch.float32, torch.float64)


@assumed_constant
def is_exporting() -> bool:
    """Whether torch.onnx.export traces. Of torch's own function dynamo thinks that it is False,
    though strict export, the exporter's second attempt, goes through dynamo."""
    return torch.onnx.is_in_onnx_export()


def layer(
    cell: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    masks: Masks | None,
    states: bool,
    noise: Noise = NO_NOISE,
) -> LayerResult:
    """What `ops.layer` computes, as a node of ONNX, or of a layer that has more in its recurrence
    than ONNX's, step after step.

    Raises:
        RuntimeError: ONNX has no such operator, or the steps are not a fixed number.
    """
    masks = masks or Masks()
    for name, given in (
        ("a PackedSequence as input; give the model the padded batch, and lengths", batch_sizes),
        ("resets", masks.resets),
        ("return_states of an LSTM", states or None),
    ):
        if given is not None:
            raise RuntimeError(f"torch.onnx.export: ONNX's recurrent operators do not have {name}")
    split = split_by_direction(h0, c0, weights)
    if not noise.names and split[0].norm is None:
        return LayerResult(*_nodes(cell, x, h0, c0, split, masks.lengths), None)
    if is_dynamic(x.shape[0]):
        raise RuntimeError(
            "torch.onnx.export: input: expected a fixed number of timesteps, since ONNX's "
            "recurrent operators have no layer normalisation, zoneout and recurrent dropout, got a "
            "dynamic one; export the model with that dimension static"
        )
    recurrence = plain.recurrence_of(noise, None)
    return plain.layer(cell, x, h0, c0, weights, None, masks, recurrence=recurrence)


def _nodes(
    cell: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[DirectionWeights],
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One layer of padded rows: y [T, B, D*P], h_n [D, B, P], c_n [D, B, H] or None.

    Args:
        cell: a name in `cells.CELLS`.
        x: [T, B, I].
        h0: [D, B, P].
        c0: [D, B, H] for LSTM, else None.
        weights: of each direction.
        lengths: int64 [B], or None: of each row.

    Raises:
        RuntimeError: ONNX's operators do not take x's dtype.
    """
    if x.dtype not in _DTYPES:
        raise RuntimeError(
            f"torch.onnx.export: input: ONNX's {operator_of(CELLS[cell])} takes float16, float32 "
            f"and float64, got {x.dtype}; export the model in float32"
        )
    projections, initial = [w.w_hr for w in weights], (h0, c0)
    if projections[0] is not None:
        x, h0, weights = _without_projection(x, h0, weights, lengths)
    y, h_n, c_n = _node(cell, x, h0, c0, weights, lengths)
    if projections[0] is not None:
        turned = torch.stack([w.t() for w in projections])  # [D, H, P]
        y, h_n = y @ turned, h_n @ turned
    if lengths is not None:
        # What the state is where no step is taken, the operator leaves open.
        empty = (lengths == 0).unsqueeze(-1)
        h_n = torch.where(empty, initial[0], h_n)
        c_n = None if c_n is None else torch.where(empty, initial[1], c_n)
    return y.transpose(1, 2).flatten(2), h_n, c_n


def _node(
    cell: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[DirectionWeights],
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operator itself. Its Y is [T, D, B, H]."""
    node = node_of(CELLS[cell], weights)
    directions, batch, hidden = h0.shape
    ends = None if lengths is None else lengths.to(torch.int32)
    inputs = [x, node.W, node.R, node.B, ends, h0]
    shapes = [(x.shape[0], directions, batch, hidden), (directions, batch, hidden)]
    if c0 is not None:
        inputs.append(c0)
        shapes.append(shapes[1])
    if node.P is not None:
        inputs.append(node.P)
    outputs = torch.onnx.ops.symbolic_multi_out(
        node.operator, inputs, node.attributes, dtypes=[x.dtype] * len(shapes), shapes=shapes
    )
    return tuple(outputs) if c0 is not None else (*outputs, None)


def _without_projection(
    x: Tensor, h0: Tensor, weights: list[DirectionWeights], lengths: Tensor | None
) -> tuple[Tensor, Tensor, list[DirectionWeights]]:
    """The LSTM whose state is m = o * tanh(c) [H] instead of h = W_hr m [P].

    Its recurrent weight is W_hh W_hr, since W_hh h = (W_hh W_hr) m. No m need belong to h0, so
    that enters as further features of the first step's input, which W_hh faces; m starts at zero.
    """
    timesteps, batch = x.shape[:2]
    directions = h0.shape[0]
    hidden = weights[0].w_hr.shape[1]
    steps = torch.arange(timesteps, device=x.device).unsqueeze(1)  # [T, 1]
    last = timesteps - 1 if lengths is None else lengths - 1
    features = [x]
    plain = []
    for d, w in enumerate(weights):
        first = steps == (last if d else 0)  # [T, B], or [T, 1]
        features.append(torch.where(first.unsqueeze(-1), h0[d], h0.new_zeros(())))
        facing = [torch.zeros_like(w.w_hh)] * directions
        facing[d] = w.w_hh
        plain.append(
            w._replace(w_ih=torch.cat([w.w_ih, *facing], 1), w_hh=w.w_hh @ w.w_hr, w_hr=None)
        )
    return torch.cat(features, -1), h0.new_zeros((directions, batch, hidden)), plain

"""A layer's call as its operators take it, and what it is to a backend: a problem, and rows.

The order of the operators' arguments is told here alone, beside their schemas in `ops`.

Shapes: as in `ops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cells import CELLS, DirectionWeights, equal_parts
from .problem import NO_NOISE, LayerInputs, Masks, Noise, Problem, Rows


class LayerResult(NamedTuple):
    """What a layer gives."""

    y: Tensor  # [T, B, D*P], or [N, D*P] when packed
    h_n: Tensor  # [D, B, P]
    c_n: Tensor | None  # [D, B, H], LSTM only
    cells: Tensor | None = None  # [D, T, B, H] or [D, N, H] c after every step, where asked for


class LayerCall(NamedTuple):
    """The arguments of `fused_rnn::layer_forward`; what each is, its schema tells."""

    x: Tensor
    h0: Tensor
    c0: Tensor | None
    weights: list[Tensor]
    batch_sizes: Tensor | None
    lengths: Tensor | None
    resets: Tensor | None
    reset_h: Tensor | None
    reset_c: Tensor | None
    cell: str
    save: bool
    states: bool
    recompute: bool
    backend: str
    h_factor: Tensor | None = None
    kept_h: Tensor | None = None
    kept_c: Tensor | None = None
    part_h: float = 0.0
    part_c: float = 0.0

    @property
    def masks(self) -> Masks:
        return Masks(self.lengths, self.resets, self.reset_h, self.reset_c)

    @property
    def noise(self) -> Noise:
        return Noise(self.h_factor, self.kept_h, self.kept_c, self.part_h, self.part_c)

    @property
    def inputs(self) -> tuple:
        """The tensors as `ops.layer` takes them."""
        return self.cell, self.x, self.h0, self.c0, self.weights, self.batch_sizes, self.masks

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """The tensors that can ask for a gradient; in their order come needs and gradients."""
        return self.x, self.h0, self.c0, self.reset_h, self.reset_c, *self.weights

    def at(self, differentiable: Sequence[Tensor | None]) -> LayerCall:
        """The call with these in the place of its own."""
        x, h0, c0, reset_h, reset_c, *weights = differentiable
        return self._replace(x=x, h0=h0, c0=c0, weights=weights, reset_h=reset_h, reset_c=reset_c)

    def apart(self) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
        """The tensors, for autograd to save, and the rest: what `joined` puts together again."""
        given = self.batch_sizes, self.lengths, self.resets, self.h_factor, self.kept_h, self.kept_c
        options = self.cell, self.save, self.states, self.recompute, self.backend
        return (*given, *self.differentiable), (options, (self.part_h, self.part_c))

    @classmethod
    def joined(cls, tensors: Sequence[Tensor | None], rest: tuple[Any, ...]) -> LayerCall:
        (
            batch_sizes, lengths, resets, h_factor, kept_h, kept_c,
            x, h0, c0, reset_h, reset_c, *weights,
        ) = tensors  # fmt: skip
        options, parts = rest
        return cls(
            x, h0, c0, weights, batch_sizes, lengths, resets, reset_h, reset_c,
            *options, h_factor, kept_h, kept_c, *parts,
        )  # fmt: skip


class BackwardCall(NamedTuple):
    """The arguments of `fused_rnn::layer_backward`, sorted."""

    grads: tuple[Tensor | None, ...]  # of y, h_n, c_n, cells
    call: LayerCall  # forward's, which saves
    saved: tuple[Tensor, ...]  # y, gates, cells
    needs: Sequence[bool]  # of `call.differentiable`

    @classmethod
    def of(
        cls, grad_y, grad_h_n, grad_c_n, grad_cells,
        x, h0, c0, weights, batch_sizes, lengths, resets, reset_h, reset_c,
        y, gates, cells, cell, needs, states, recompute, backend, *noise,
    ) -> BackwardCall:  # fmt: skip
        """The call that the operator's arguments are."""
        call = LayerCall(
            x, h0, c0, weights, batch_sizes, lengths, resets, reset_h, reset_c,
            cell, True, states, recompute, backend, *noise,
        )  # fmt: skip
        return cls((grad_y, grad_h_n, grad_c_n, grad_cells), call, (y, gates, cells), needs)

    @property
    def arguments(self) -> tuple:
        """The call as the operator takes it."""
        c = self.call
        return (
            *self.grads,
            c.x, c.h0, c.c0, c.weights, c.batch_sizes, *c.masks,
            *self.saved, c.cell, self.needs, c.states, c.recompute, c.backend, *c.noise,
        )  # fmt: skip


def with_resets(of_others: Sequence[Any], value: Any) -> tuple[Any, ...]:
    """What is there, in the order of `LayerCall.differentiable`, of x, h0, c0 and the weights, with
    `value` for the states after a reset."""
    return (*of_others[:3], value, value, *of_others[3:])


def without_resets(of_all: Sequence[Any]) -> tuple[Any, ...]:
    """The inverse."""
    return (*of_all[:3], *of_all[5:])


def make_problem(
    cell: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    masks: Masks | None,
    training: bool,
    states: bool = False,
    noise: Noise = NO_NOISE,
) -> Problem:
    """The problem of one layer call, from its arguments as `ops.layer` takes them."""
    directions = h0.shape[0]
    masks = masks or Masks()
    out, hidden = h0.shape[2], weights[1].shape[0] // CELLS[cell].gates
    first = split_by_direction(h0, c0, weights)[0]
    return Problem(
        cell_name=cell,
        timesteps=x.shape[0] if batch_sizes is None else batch_sizes.shape[0],
        batch_size=h0.shape[1],
        input_size=x.shape[-1],
        hidden_size=hidden,
        proj_size=out if out != hidden else 0,
        directions=directions,
        bias=first.b_ih is not None,
        packed=batch_sizes is not None,
        training=training,
        dtype=x.dtype,
        device_type=x.device.type,
        device_index=x.device.index,
        lengths=masks.lengths is not None,
        resets=masks.resets is not None,
        states=states,
        extras=(
            *noise.names,
            *(() if first.norm is None else ("layer_norm",)),
            *(() if first.peephole is None else ("peepholes",)),
        ),
        averaged=noise.averaged,
    )


def layer_inputs(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    masks: Masks | None,
    noise: Noise = NO_NOISE,
) -> LayerInputs:
    """What a backend gets, from a call's arguments as `ops.layer` takes them.

    Raises:
        RuntimeError: the states' batch is not that of x, or `batch_sizes` do not fit.
    """
    timesteps = x.shape[0] if batch_sizes is None else batch_sizes.shape[0]
    if batch_sizes is None and x.shape[1] != h0.shape[1]:  # rows as many might be divided anew
        raise RuntimeError(f"h0: expected a batch of {x.shape[1]} as of x, got {h0.shape[1]}")
    if masks is not None and masks.lengths is None and masks.resets is None:
        masks = None
    if batch_sizes is None:
        noise = noise.of_rows()
    rows = Rows(timesteps, h0.shape[1], batch_sizes, x.shape[0], masks, noise=noise)
    by_direction = split_by_direction(h0, c0, weights)
    return LayerInputs(rows_of(x, rows.packed), by_direction, h0, c0, rows)


def split_by_direction(
    h0: Tensor, c0: Tensor | None, weights: list[Tensor]
) -> list[DirectionWeights]:
    """The flat list as each direction's parameters."""
    projected = c0 is not None and c0.shape[2] != h0.shape[2]
    split = []
    for w_ih, w_hh, *one in equal_parts(weights, h0.shape[0]):
        norm = None
        if one and one[-1].dim() == 1 and one[-1].shape[0] > w_ih.shape[0]:
            norm = one.pop()
        peephole = one.pop() if (len(one) - projected) % 2 else None  # biases come in pairs
        w_hr = one.pop() if projected else None
        biases = one or (None, None)
        split.append(DirectionWeights(w_ih, w_hh, *biases, w_hr, peephole, norm))
    return split


def rows_of(sequence: Tensor | None, packed: bool) -> Tensor | None:
    """[N, K] view or copy of a sequence."""
    return sequence if sequence is None or packed else sequence.flatten(0, 1)


def unflatten(rows: Tensor, like: Tensor) -> Tensor:
    """[T, B, K] from rows [N, K], for `like` [T, B, ...]. Not a view to autograd, which would
    forbid changing an operator's output in place."""
    return torch.ops.aten._unsafe_view(rows, (*like.shape[:-1], rows.shape[-1]))


def no_autocast(device_type: str) -> AbstractContextManager:
    """Operands have autocast's dtype already, and some run through time in a wider one."""
    if torch._C._is_any_autocast_enabled() and device_type != "meta":
        return torch.autocast(device_type, enabled=False)
    return nullcontext()

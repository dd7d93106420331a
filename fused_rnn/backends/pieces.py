"""Lengths and resets by way of packed rows.

A row of a padded batch that ends early or starts afresh is one piece or several, each a sequence
of its own. Sorted by length, pieces are the rows of a packed batch, which every backend runs, and
more of them at a time than the batch had rows. What goes in is gathered, what comes out is put
back, and nothing is computed for padding. The number of pieces decides sizes, so the host has to
know lengths and resets: all of this is for the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from ..cells import state_dtype
from ..native import cpu_library_error
from ..problem import LayerInputs, Masks, Noise, Problem, Rows
from .bundles import InputGrads, LayerOutput, Needs, OutputGrads


class Pieces:
    """The pieces of a padded batch, the longest first. Lengths lie within the sequence.

    Attributes, of K pieces that have M steps together:
        count: K.
        batch_sizes: int64, how many pieces have each timestep.
        index: int64 [M], which row t * B + b of the padded batch each packed row is.
    """

    def __init__(self, masks: Masks, timesteps: int, batch_size: int):
        lengths, resets = (None if mask is None else mask.contiguous() for mask in masks[:2])
        native = cpu_library_error() is None
        cut = torch.ops.fused_rnn_cpu.cut.default if native else _cut
        # By direction: where a piece's initial states are, those of row b at b, others at B + b;
        # the piece whose last state is the row's, rows without one keep theirs, at K + b.
        self.batch_sizes, self.index, self._sources, self._finals = cut(
            lengths, resets, timesteps, batch_size
        )
        self.batch_size, self.count = batch_size, self._sources.shape[1]
        self._has_resets = resets is not None
        self._every_row_has_one = resets is None and self.count == batch_size

    def initial(self, states: Tensor, reset: Tensor | None) -> Tensor:
        """[D, K, ...] the states each piece starts from; `states`, `reset` [D, B, ...]."""
        if not self._has_resets:
            return states.index_select(1, self._sources[0])
        fresh = torch.zeros_like(states) if reset is None else reset
        both = torch.cat((states, fresh), 1)
        return torch.stack([s[i] for s, i in zip(both, self._sources, strict=False)])

    def of_rows(self, values: Tensor | None) -> Tensor | None:
        """[D, K, ...] of the row that each piece is cut from; `values` [D, B, ...]."""
        if values is None:
            return None
        return values.index_select(1, self._sources[0] % self.batch_size)

    def initial_grads(self, grads: Tensor, carried: Tensor) -> tuple[Tensor, Tensor]:
        """Backward of `initial`: gradients of states and reset [D, B, ...].

        `grads` [D, K, ...] are those of the pieces; `carried` [D, B, ...] what rows without a
        step hand through.
        """
        both = torch.cat((carried, torch.zeros_like(carried)), 1)
        for into, grad, source in zip(both, grads, self._sources, strict=False):
            # In the order of the pieces, whatever the number of threads.
            into.index_add_(0, source, grad)
        states, reset = both.split(self.batch_size, 1)
        return states.clone(memory_format=torch.contiguous_format), reset.contiguous()

    def final(self, states: Tensor, initial: Tensor | None) -> Tensor:
        """[D, B, ...] the states each row ends with, from those of the pieces [D, K, ...].

        `initial` [D, B, ...] have the rows without one; None for zeros."""
        if self._every_row_has_one:
            return states.index_select(1, self._finals[0])
        if initial is None:
            initial = states.new_zeros((states.shape[0], self.batch_size, *states.shape[2:]))
        both = torch.cat((states, initial), 1)
        return _by_direction(s[i] for s, i in zip(both, self._finals, strict=False))

    def final_grads(self, grads: Tensor) -> tuple[Tensor, Tensor]:
        """Backward of `final`: gradients of the pieces' states and of the initial ones."""
        count = self.count
        both = grads.new_zeros((grads.shape[0], count + self.batch_size, *grads.shape[2:]))
        for out, grad, index in zip(both, grads, self._finals, strict=False):
            out[index] = grad
        return both.split((count, self.batch_size), 1)


def _cut(
    lengths: Tensor | None, resets: Tensor | None, steps: int, batch: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What csrc/cpu/pieces.cpp does, for where there is no library: batch_sizes, index, sources
    [2, K] and finals [2, B]. Row by row and from left to right first, then sorted."""
    if lengths is None:
        lengths = torch.full((batch,), steps)
    starts = torch.zeros((batch, steps), dtype=torch.bool)
    if resets is not None:
        starts |= resets.t()
    afresh = starts[:, :1].any(1)
    starts[:, :1] = True
    starts &= torch.arange(steps) < lengths.unsqueeze(1)
    row, start = starts.nonzero(as_tuple=True)
    first = torch.ones_like(row, dtype=torch.bool)
    first[1:] = row[1:] != row[:-1]
    last = first.roll(-1)
    end = torch.where(last, lengths[row], start.roll(-1))
    length, order = (end - start).sort(descending=True, stable=True)
    row, start, first, last = (part[order] for part in (row, start, first, last))
    count = row.shape[0]
    longest = int(length[0]) if count else 0
    sizes = torch.bincount(length, minlength=longest + 1).flip(0).cumsum(0).flip(0)[1:]
    step = torch.repeat_interleave(torch.arange(longest), sizes)
    piece = torch.arange(len(step)) - (sizes.cumsum(0) - sizes)[step]
    index = (start[piece] + step) * batch + row[piece]
    sources = torch.stack((row + batch * (~first | afresh[row]), row + batch * ~last))
    finals = torch.arange(count, count + batch).repeat(2, 1)
    for out, which in zip(finals, (last, first), strict=True):
        out[row[which]] = which.nonzero().squeeze(1)
    return sizes, index, sources, finals


def forward_in_pieces(
    forward: Callable[..., LayerOutput],  # a layer_forward that takes packed rows
    problem: Problem,
    inputs: LayerInputs,
    save: bool,
) -> LayerOutput:
    """A padded batch with masks. `gates` and `cells` [D, N, ...] hold the M packed rows one after
    the other from the beginning on, direction by direction, and then zeros. Where `cells` is an
    output, it lies as y does."""
    x, _, h0, c0, rows = inputs
    count = x.shape[0]
    pieces = Pieces(rows.masks, rows.timesteps, rows.batch_size)
    index = pieces.index
    if len(index) == 0:
        return _no_steps(problem, inputs, save)
    _check_memory("x", x)
    out = forward(_packed_problem(problem, pieces), _packed(inputs, pieces), save)
    return LayerOutput(
        y=spread(out.y, index, count),
        h_n=pieces.final(out.h_n, h0),
        c_n=h0.new_empty((*h0.shape[:2], 0)) if c0 is None else pieces.final(out.c_n, c0),
        gates=_stretched(out.gates, count),
        cells=_by_direction(spread(c, index, count) for c in out.cells)
        if problem.states
        else _stretched(out.cells, count),
    )


def _check_memory(name: str, given: Tensor) -> None:
    """Refuses freed memory, as csrc/tensor_checks.h does where the library gets a tensor as it
    is."""
    steps = zip(given.shape, given.stride(), strict=True)
    last = given.storage_offset() + sum((size - 1) * stride for size, stride in steps)
    if given.untyped_storage().nbytes() < (last + 1) * given.itemsize:
        shape = list(given.shape)
        raise RuntimeError(
            f"{name}: expected memory for shape {shape}, got a storage that was made smaller"
        )


def backward_in_pieces(
    backward: Callable[..., InputGrads],  # a layer_backward that takes packed rows
    problem: Problem,
    grads: OutputGrads,
    inputs: LayerInputs,
    saved: LayerOutput,
    needs: Needs,
) -> InputGrads:
    """The backward of `forward_in_pieces`."""
    x, _, h0, c0, rows = inputs
    count = x.shape[0]
    pieces = Pieces(rows.masks, rows.timesteps, rows.batch_size)
    index = pieces.index
    if len(index) == 0:
        return _no_steps_backward(grads, inputs, needs)

    def gathered(cells: Tensor | None) -> Tensor | None:
        return None if cells is None else cells.index_select(1, index)

    h_n, through_h = _final_grads(pieces, grads.h_n, h0)
    c_n, through_c = (None, None) if c0 is None else _final_grads(pieces, grads.c_n, c0)
    result = backward(
        _packed_problem(problem, pieces),
        OutputGrads(
            None if grads.y is None else grads.y.index_select(0, index),
            h_n,
            c_n,
            gathered(grads.cells),
        ),
        _packed(inputs, pieces),
        LayerOutput(
            saved.y.index_select(0, index),
            None,
            None,
            _shrunk(saved.gates, len(index)),
            gathered(saved.cells) if problem.states else _shrunk(saved.cells, len(index)),
        ),
        needs._replace(h0=needs.h0 or needs.reset_h, c0=needs.c0 or needs.reset_c),
    )
    h0_grad, reset_h = (
        (None, None) if result.h0 is None else pieces.initial_grads(result.h0, through_h)
    )
    c0_grad, reset_c = (
        (None, None) if result.c0 is None else pieces.initial_grads(result.c0, through_c)
    )
    return InputGrads(
        None if result.x is None else spread(result.x, index, count),
        h0_grad if needs.h0 else None,
        c0_grad if needs.c0 else None,
        result.weights,
        reset_h if needs.reset_h else None,
        reset_c if needs.reset_c else None,
    )


def _packed_problem(problem: Problem, pieces: Pieces) -> Problem:
    return replace(
        problem,
        timesteps=len(pieces.batch_sizes),
        batch_size=pieces.count,
        packed=True,
        lengths=False,
        resets=False,
    )


def _packed(inputs: LayerInputs, pieces: Pieces) -> LayerInputs:
    x, weights, h0, c0, rows = inputs
    return LayerInputs(
        x.index_select(0, pieces.index),
        weights,
        pieces.initial(h0, rows.masks.reset_h),
        None if c0 is None else pieces.initial(c0, rows.masks.reset_c),
        _packed_rows(pieces, x.shape[0], rows.noise),
    )


def _packed_rows(pieces: Pieces, room: int, noise: Noise) -> Rows:
    kept_h, kept_c = (
        None if kept is None else kept.index_select(1, pieces.index)
        for kept in (noise.kept_h, noise.kept_c)
    )
    noise = noise._replace(h_factor=pieces.of_rows(noise.h_factor), kept_h=kept_h, kept_c=kept_c)
    sizes = pieces.batch_sizes
    return Rows(len(sizes), pieces.count, sizes, len(pieces.index), room=room, noise=noise)


def _by_direction(parts: Iterable[Tensor]) -> Tensor:
    """torch.stack, which gives a view: what autograd's functions return may not be changed in place
    then."""
    return torch.cat([part.unsqueeze(0) for part in parts])


def spread(packed: Tensor, index: Tensor, count: int) -> Tensor:
    """[count, K] with zeros where no packed row [M, K] belongs."""
    return packed.new_zeros((count, packed.shape[1])).index_copy_(0, index, packed)


def _stretched(packed: Tensor, count: int) -> Tensor:
    """[D, count, K] that begins with the elements of `packed` [D, M, K] in their order, and ends
    with zeros; in the same memory if there is room."""
    shape = packed.shape[0], count, packed.shape[2]
    size = shape[0] * count * shape[2]
    if packed.is_contiguous() and packed.storage_offset() == 0:
        room = packed.untyped_storage().nbytes() // packed.itemsize
        if room >= size:
            flat = packed.as_strided((size,), (1,))
            flat[packed.numel() :] = 0
            return flat.view(shape)
    flat = packed.new_empty(size)
    flat[: packed.numel()] = packed.reshape(-1)
    flat[packed.numel() :] = 0
    return flat.view(shape)


def _shrunk(stretched: Tensor, count: int) -> Tensor:
    """The inverse of `_stretched`, a view: [D, count, K]."""
    directions, _, width = stretched.shape
    return stretched.reshape(-1)[: directions * count * width].view(directions, count, width)


def _final_grads(pieces: Pieces, grad: Tensor | None, like: Tensor) -> tuple[Tensor | None, Tensor]:
    if grad is None:
        return None, torch.zeros_like(like)
    return pieces.final_grads(grad)


def _no_steps(problem: Problem, inputs: LayerInputs, save: bool) -> LayerOutput:
    """Every row has ended before it began."""
    x, _, h0, c0, _ = inputs
    hidden, leading = problem.hidden_size, (problem.directions, x.shape[0])
    return LayerOutput(
        x.new_zeros((x.shape[0], problem.directions * problem.output_size)),
        h0.clone(),
        h0.new_empty((*h0.shape[:2], 0)) if c0 is None else c0.clone(),
        x.new_zeros((*leading, problem.saved_columns * save), dtype=problem.saved_dtype),
        x.new_zeros((*leading, hidden * problem.keeps_cells(save)), dtype=state_dtype(x.dtype)),
    )


def _no_steps_backward(grads: OutputGrads, inputs: LayerInputs, needs: Needs) -> InputGrads:
    x, weights, h0, c0, rows = inputs

    def through(need: bool, grad: Tensor | None, like: Tensor | None) -> Tensor | None:
        if not need:
            return None
        return torch.zeros_like(like) if grad is None else grad.clone()

    flat = [w for direction in weights for w in direction if w is not None]
    return InputGrads(
        through(needs.x, None, x),
        through(needs.h0, grads.h_n, h0),
        through(needs.c0, grads.c_n, c0),
        [through(need, None, w) for need, w in zip(needs.weights, flat, strict=True)],
        through(needs.reset_h, None, rows.masks.reset_h),
        through(needs.reset_c, None, rows.masks.reset_c),
    )

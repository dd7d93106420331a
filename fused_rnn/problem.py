"""What a layer call looks like to the backends: the problem, and how its rows lie in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .cells import CELLS, Cell, DirectionWeights, state_dtype
from .transfer import sent
from .transformed import without_transforms


class Stack(NamedTuple):
    """Layers that run side by side, each a chunk of time behind the one it reads from."""

    layers: int
    forward: int  # timesteps of a chunk in each pass; 0: layer after layer
    backward: int


# What a recurrence may have beyond its cell's own.
EXTRAS = ("recurrent_dropout", "zoneout", "layer_norm", "peepholes")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One layer call, as far as the choice of a backend may depend on it."""

    cell_name: str
    timesteps: int
    batch_size: int
    input_size: int
    hidden_size: int
    proj_size: int = 0  # 0: no projection
    directions: int = 1
    bias: bool = True
    packed: bool = False
    training: bool  # whether backward will follow
    dtype: torch.dtype
    device_type: str
    lengths: bool = False  # whether rows end at lengths of their own
    resets: bool = False  # whether rows start afresh at resets
    states: bool = False  # whether c after every step is an output
    extras: tuple[str, ...] = ()  # those of EXTRAS that it has
    averaged: bool = False  # whether zoneout takes the expectation
    stack: Stack | None = None  # what it is a layer of, where layers run side by side
    device_index: int | None = None  # which of several GPUs; None: the current one

    @property
    def cell(self) -> Cell:
        return CELLS[self.cell_name]

    @property
    def gpu(self) -> int:
        """The number of the GPU that its tensors are on."""
        return torch.cuda.current_device() if self.device_index is None else self.device_index

    def keeps_cells(self, save: bool) -> bool:
        """Whether forward has to keep c after every step, given whether it saves for backward.
        An RNN keeps there its h before zoneout, where that cannot be told from y."""
        if self.cell.has_c:
            return save or self.states
        return save and self.averaged and self.cell.saved_gates == 0

    @property
    def saved_columns(self) -> int:
        """The columns of `gates`, where forward saves. Who normalises keeps behind the gates of all
        rows the normalised values of the hidden side, of an LSTM's c and of the input side, and
        five factors of each row: in this order, since in a compiled graph another backend may run
        backward."""
        cell, columns = self.cell, self.cell.saved_gates * self.hidden_size
        if "layer_norm" not in self.extras:
            return columns
        return columns + (2 * cell.gates + cell.has_c) * self.hidden_size + 5

    @property
    def saved_dtype(self) -> torch.dtype:
        """The dtype of `gates`. Gradients go through deviations at every step: rounded to bfloat16
        these made an LSTM's five times as inexact as the reference's."""
        return state_dtype(self.dtype) if "layer_norm" in self.extras else self.dtype

    @property
    def output_size(self) -> int:
        """P: the width of h, and of y per direction."""
        return self.proj_size or self.hidden_size


class Masks(NamedTuple):
    """The ends of a padded batch's rows, and where they start afresh.

    Row b takes the steps [0, lengths[b]). Before step t with resets[t, b] its state becomes
    reset_h[:, b] and reset_c[:, b]. So resets cut a row into pieces that know nothing of each
    other, and the reverse direction runs through each piece from the piece's own end: before
    step t its state is replaced where resets[t + 1, b] and t + 1 < lengths[b].
    """

    lengths: Tensor | None = None  # int64 [B]; None: all of them T
    resets: Tensor | None = None  # bool [T, B]; None: nowhere
    reset_h: Tensor | None = None  # [D, B, P]; None: zeros
    reset_c: Tensor | None = None  # [D, B, H], LSTM only; None: zeros

    def check(self, timesteps: int) -> None:
        """Lengths lie within the sequence. Where they are on a device the host does not wait for
        them: the device asserts it, and torch reports that at its next synchronisation. So does
        a compiled graph, whose compiler does not know them.

        Raises:
            RuntimeError: a length is below 0 or above T.
        """
        if self.lengths is None or self.lengths.numel() == 0:
            return
        compiling = torch.compiler.is_compiling()
        lengths = self.lengths if compiling else without_transforms(self.lengths)
        if lengths.is_cpu and not compiling:
            low, high = (int(bound) for bound in torch.aminmax(lengths))
            if not 0 <= low <= high <= timesteps:
                raise RuntimeError(
                    f"lengths: expected values from 0 to {timesteps}, the timesteps of input, "
                    f"got {low} to {high}"
                )
        elif not lengths.is_meta:
            fits = ((lengths >= 0) & (lengths <= timesteps)).all()
            torch._assert_async(fits, f"lengths: expected values from 0 to {timesteps}")

    def in_dtype(self, dtype: torch.dtype) -> Masks:
        """The same masks with the states after a reset in `dtype`."""
        reset = (None if r is None else r.to(dtype) for r in (self.reset_h, self.reset_c))
        return Masks(self.lengths, self.resets, *reset)

    def restarts(self, reverse: bool) -> Tensor | None:
        """bool [T, B]: before which steps of a direction the state is replaced; None: nowhere."""
        if self.resets is None or not reverse:
            return self.resets
        later = self.resets[1:]
        if self.lengths is not None:
            later = later & self.taken(self.resets.shape[0])[1:]
        return torch.cat((later, torch.zeros_like(self.resets[:1])))

    def taken(self, timesteps: int) -> Tensor | None:
        """bool [T, B]: which steps are taken; None: all of them."""
        if self.lengths is None:
            return None
        steps = torch.arange(timesteps, device=self.lengths.device)
        return steps.unsqueeze(1) < self.lengths


class Course(NamedTuple):
    """What masks do to the states of one direction between its steps."""

    taken: Tensor | None  # bool [T, B, 1], None: everywhere
    restarts: Tensor | None  # bool [T, B, 1] before which of the taken steps, None: nowhere
    fresh: tuple[Tensor, ...]  # [B, P or H] each: the states after a restart

    @classmethod
    def of(cls, masks: Masks, timesteps: int, direction: int, states: Sequence[Tensor]) -> Course:
        """Of states [B, P or H] each, which are h and, of an LSTM, c."""
        taken, restarts = masks.taken(timesteps), masks.restarts(direction == 1)
        if taken is not None:
            taken = taken.unsqueeze(2)
        if restarts is not None:
            restarts = restarts.unsqueeze(2)
            restarts = restarts if taken is None else restarts & taken
        fresh = tuple(
            torch.zeros_like(state) if reset is None else reset[direction].to(state.dtype)
            for state, reset in zip(states, (masks.reset_h, masks.reset_c), strict=False)
        )
        return cls(taken, restarts, fresh)

    def started(self, t: int, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What rows start step t from."""
        if self.restarts is None:
            return states
        pairs = zip(self.fresh, states, strict=True)
        return tuple(torch.where(self.restarts[t], fresh, state) for fresh, state in pairs)

    def passed(
        self, t: int, before: tuple[Tensor, ...], after: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """`after` a step t where it is taken, `before` elsewhere."""
        if self.taken is None:
            return after
        pairs = zip(before, after, strict=True)
        return tuple(torch.where(self.taken[t], new, old) for old, new in pairs)


class Noise(NamedTuple):
    """What recurrent dropout and zoneout do in one call of a layer."""

    h_factor: Tensor | None = None  # [D, B, P] what h is multiplied by before W_hh in every step
    # bool, as y or c lie [D, T, B, P or H] or [D, N, P or H]: where a step leaves h and c as is.
    kept_h: Tensor | None = None
    kept_c: Tensor | None = None
    # Without those, which part of the old state a step leaves in the new one.
    part_h: float = 0.0
    part_c: float = 0.0

    @property
    def averaged(self) -> bool:
        return bool(self.part_h or self.part_c)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of what is in effect, as in Problem.extras."""
        zoneout = self.kept_h is not None or self.kept_c is not None or self.averaged
        given = (("recurrent_dropout", self.h_factor is not None), ("zoneout", zoneout))
        return tuple(name for name, there in given if there)

    def of_rows(self) -> Noise:
        """The same noise with masks [D, N, ...]."""
        flat = (k.flatten(1, -2) if k is not None else None for k in (self.kept_h, self.kept_c))
        return Noise(self.h_factor, *flat, self.part_h, self.part_c)

    def contiguous(self) -> Noise:
        masks = (None if mask is None else mask.contiguous() for mask in self[:3])
        return Noise(*masks, self.part_h, self.part_c)


NO_NOISE = Noise()


class Rows:
    """How a layer's N rows lie in memory: time-major, timestep after timestep.

    Step t owns rows [offsets[t], offsets[t] + batch_sizes[t]); the batch never grows with t.
    A padded batch is the case of equal batch sizes, N = T*B.
    """

    def __init__(
        self,
        timesteps: int,
        batch_size: int,
        batch_sizes: Tensor | None,
        count: int,
        masks: Masks | None = None,
        room: int = 0,
        noise: Noise = NO_NOISE,
    ):
        """`batch_sizes`: int64 [T] on the CPU, as in a PackedSequence, or None when padded.
        `count`: the number of packed rows, N; a padded batch has T*B. `masks`: for one, or None.
        `room`: for how many rows what is saved should have memory, if for more than N.
        `noise`: its masks of zoneout are [D, N, ...].

        Raises:
            RuntimeError: batch_sizes grow, fall below 1, do not start at `batch_size`, or do not
                add up to `count`.
        """
        self.packed = batch_sizes is not None
        self.timesteps = timesteps
        self.batch_size = batch_size
        self.masks = masks
        self.noise = noise
        self.count = count if self.packed else timesteps * batch_size
        self.room = max(room, self.count)
        self._batch_sizes = batch_sizes
        self._list: list[int] | None = None
        if self.packed:
            self._check(count)

    def _check(self, count: int) -> None:
        sizes = self.batch_sizes
        if any(after > before for before, after in pairwise(sizes)) or sizes[-1] < 1:
            raise RuntimeError(
                f"batch_sizes: expected positive, non-increasing sizes, got {_abridged(sizes)}"
            )
        if sizes[0] != self.batch_size:
            raise RuntimeError(
                f"batch_sizes: expected {self.batch_size} rows in the first step, as many as the "
                f"states have, got {sizes[0]}"
            )
        if sum(sizes) != count:
            raise RuntimeError(
                f"batch_sizes: expected sizes that add up to the {count} rows of the packed "
                f"input, got {_abridged(sizes)}, which add up to {sum(sizes)}"
            )

    @property
    def batch_sizes(self) -> list[int]:
        # Not a cached_property: compilers do not see through its lock.
        if self._list is None:
            sizes = self._batch_sizes
            self._list = [self.batch_size] * self.timesteps if sizes is None else sizes.tolist()
        return self._list

    @cached_property
    def offsets(self) -> list[int]:
        return [0, *accumulate(self.batch_sizes)][:-1]

    @cached_property
    def batch_sizes_tensor(self) -> Tensor:
        """int64 [T] on the CPU, for kernels."""
        if self._batch_sizes is None:
            return torch.full((self.timesteps,), self.batch_size, dtype=torch.int64)
        return self._batch_sizes

    def previous_rows(self, reverse: bool) -> Tensor:
        """int64 [N]: for each row, the row that holds the state it started from.

        Rows that started from the initial state number b point at N + b.
        """
        sizes = self.batch_sizes_tensor
        offsets = torch.cumsum(sizes, 0) - sizes
        count = int(sizes.sum())
        step = torch.repeat_interleave(torch.arange(self.timesteps), sizes)
        row = torch.arange(count) - offsets[step]
        neighbour = step + 1 if reverse else step - 1
        inside = (neighbour >= 0) & (neighbour < self.timesteps)
        neighbour = neighbour.clamp(0, max(self.timesteps - 1, 0))
        inside &= row < sizes[neighbour]
        return torch.where(inside, offsets[neighbour] + row, count + row)

    def spread(self, values: Tensor) -> Tensor:
        """[N, K] for each row that of its batch row; `values` [B, K]."""
        if not self.packed:
            return values.repeat(self.timesteps, 1)
        return torch.cat([values[:size] for size in self.batch_sizes])

    def shift(
        self, values: Tensor, initial: Tensor, reverse: bool, reset: Tensor | None = None
    ) -> Tensor:
        """[N, K] for each row, the state it started from.

        `values` [N, K] holds the state after each row, `initial` [B, K] those before the first,
        `reset` [B, K] those after a reset, None for zeros.
        """
        if self.packed:
            index = sent(self.previous_rows(reverse), values.device, "batch_sizes")
            return torch.cat((values, initial)).index_select(0, index)
        count = values.shape[0] - self.batch_size
        parts = (values[self.batch_size :], initial) if reverse else (initial, values[:count])
        before = torch.cat(parts)
        return before if self.masks is None else self._restarted(before, initial, reverse, reset)

    def _restarted(
        self, before: Tensor, initial: Tensor, reverse: bool, reset: Tensor | None
    ) -> Tensor:
        """`before` with what `masks` change."""
        by_step = before.unflatten(0, (self.timesteps, self.batch_size))
        if reverse and self.masks.lengths is not None:
            steps = torch.arange(self.timesteps, device=before.device)
            last = steps.unsqueeze(1) == self.masks.lengths - 1
            by_step = torch.where(last.unsqueeze(2), initial, by_step)
        restarts = self.masks.restarts(reverse)
        if restarts is not None:
            fresh = torch.zeros_like(initial) if reset is None else reset
            by_step = torch.where(restarts.unsqueeze(2), fresh, by_step)
        return by_step.flatten(0, 1)


class LayerInputs(NamedTuple):
    """What a backend gets of a layer call beside its problem."""

    x: Tensor  # [N, I]
    weights: list[DirectionWeights]  # of each direction
    h0: Tensor  # [D, B, P]
    c0: Tensor | None  # [D, B, H], LSTM only
    rows: Rows


def wants_gradients(*tensors: Tensor | None) -> bool:
    """Whether backward may follow a call with them."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def in_memory(tensor: Tensor) -> Tensor:
    """Zeros without memory, as the backward of torch.sgn gives, get some: `contiguous` makes none
    of them, and nothing is written into them."""
    return tensor.clone() if tensor._is_zerotensor() else tensor


def _abridged(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:8]))}, ...]"

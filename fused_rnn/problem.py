"""What a layer call looks like to the backends: the problem, and how its rows lie in memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from .cells import CELLS, Cell


@dataclass(frozen=True)
class Problem:
    """One layer call, as far as the choice of a backend may depend on it."""

    cell_name: str
    timesteps: int
    batch_size: int
    input_size: int
    hidden_size: int
    proj_size: int  # 0: no projection
    directions: int
    bias: bool
    packed: bool
    training: bool  # whether backward will follow
    dtype: torch.dtype
    device_type: str

    @property
    def cell(self) -> Cell:
        return CELLS[self.cell_name]

    @property
    def output_size(self) -> int:
        """P: the width of h, and of y per direction."""
        return self.proj_size or self.hidden_size


class Rows:
    """How a layer's N rows lie in memory: time-major, timestep after timestep.

    Step t owns rows [offsets[t], offsets[t] + batch_sizes[t]); the batch never grows with t.
    A padded batch is the case of equal batch sizes, N = T*B.
    """

    def __init__(self, timesteps: int, batch_size: int, batch_sizes: Tensor | None, count: int):
        """`batch_sizes`: int64 [T] on the CPU, as in a PackedSequence, or None when padded.
        `count`: the number of rows there are in memory, N.

        Raises:
            RuntimeError: batch_sizes grow, fall below 1, do not start at `batch_size`, or do not
                add up to `count`.
        """
        self.packed = batch_sizes is not None
        self.timesteps = timesteps
        self.batch_size = batch_size
        self._batch_sizes = batch_sizes
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

    @cached_property
    def batch_sizes(self) -> list[int]:
        if self._batch_sizes is None:
            return [self.batch_size] * self.timesteps
        return self._batch_sizes.tolist()

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

    def shift(self, values: Tensor, initial: Tensor, reverse: bool) -> Tensor:
        """[N, K] for each row, the state it started from.

        `values` [N, K] holds the state after each row, `initial` [B, K] those before the first.
        """
        if self.packed:
            index = self.previous_rows(reverse).to(values.device)
            return torch.cat((values, initial)).index_select(0, index)
        count = values.shape[0] - self.batch_size
        parts = (values[self.batch_size :], initial) if reverse else (initial, values[:count])
        return torch.cat(parts)


def _abridged(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:8]))}, ...]"

"""What the CUDA operators are given, and what the user forces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .. import environment
from ..problem import Rows
from ..transfer import sent
from .base import aligned

REGIMES = ("cluster", "grid", "steps")


def requested_regime() -> str:
    """What FUSED_RNN_CUDA_REGIME forces, "" for nothing.

    Raises:
        ValueError: it is set to something else than a regime.
    """
    return environment.choice("FUSED_RNN_CUDA_REGIME", REGIMES)


def requested_chunk() -> int | None:
    """The timesteps that FUSED_RNN_CUDA_CHUNK forces, None where it leaves them to the planner.

    Raises:
        ValueError: it is set to something else than a number of timesteps.
    """
    return environment.number("FUSED_RNN_CUDA_CHUNK", "timesteps, or 0")


def requested_graph() -> bool:
    """Whether FUSED_RNN_CUDA_GRAPH lets scans step by step record a CUDA graph.

    Raises:
        ValueError: it is set to something else than 0 or 1.
    """
    return environment.choice("FUSED_RNN_CUDA_GRAPH", ("0", "1")) == "1"


def row_tensors(rows: Rows, like: Tensor, wide: torch.dtype) -> tuple[Tensor | None, ...]:
    """lengths [B], offsets [T] of packed rows, resets [T, B], reset_h and reset_c."""
    if not rows.packed:
        lengths, resets, reset_h, reset_c = rows.masks or (None, None, None, None)
        return (
            aligned(lengths), None, aligned(resets), aligned(reset_h, like.dtype),
            aligned(reset_c, wide),
        )  # fmt: skip
    sizes = rows.batch_sizes_tensor
    lengths = rows.timesteps - torch.searchsorted(
        sizes.flip(0), torch.arange(rows.batch_size), right=True
    )
    offsets = sizes.cumsum(0) - sizes
    both = sent(torch.cat((lengths, offsets)), like.device, "batch_sizes")
    return both[: rows.batch_size], both[rows.batch_size :].clone(), None, None, None


def current_stream(tensor: Tensor) -> int:
    if tensor.device.type != "cuda":
        return 0
    return torch.cuda.current_stream(tensor.device).cuda_stream


@contextmanager
def out_of_memory_as_in_torch() -> Iterator[None]:
    """Where memory runs out within operators, which have a single type of error, as where it does
    in torch's: training loops make their batches smaller on that."""
    try:
        yield
    except RuntimeError as error:
        if "CUDA out of memory" in str(error) and not isinstance(error, torch.OutOfMemoryError):
            raise torch.OutOfMemoryError(str(error)) from error
        raise

"""What torch may do on a GPU: whether cuDNN computes layers, and whether TF32 is allowed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def gpu_precision(tf32: bool, cudnn: bool = True) -> Iterator[None]:
    """Settings of the whole process, put back afterwards.

    Not by torch.backends.cudnn.flags, which also sets, to its own defaults, what it is not told:
    cuDNN off.
    """
    flags = torch.backends.cudnn
    before = flags.enabled, flags.allow_tf32, torch.get_float32_matmul_precision()
    flags.enabled, flags.allow_tf32 = cudnn, tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        flags.enabled, flags.allow_tf32 = before[:2]
        torch.set_float32_matmul_precision(before[2])

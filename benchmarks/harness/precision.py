"""What torch may do on a GPU: whether cuDNN computes layers, and whether TF32 is allowed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def gpu_precision(tf32: bool, cudnn: bool = True) -> Iterator[None]:
    """Settings of the whole process, put back afterwards."""
    now = torch.backends.cudnn
    precision = torch.get_float32_matmul_precision()
    # What it is not told it sets to defaults of its own, cuDNN off among them. None: as it is.
    flags = now.flags(
        enabled=cudnn,
        benchmark=now.benchmark,
        benchmark_limit=None,
        deterministic=now.deterministic,
        allow_tf32=tf32,
        fp32_precision=None,
    )
    with flags:
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)

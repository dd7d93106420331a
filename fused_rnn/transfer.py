"""Values that the host has, on their way to a device without anybody waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device, name: str) -> Tensor:
    """`tensor` on `device`: itself, or a copy that the host does not wait for, made of what it held
    at the call. Where a CUDA graph is captured its replays read the host's memory again: so that
    has to be pinned, and to outlive the graph.

    Args:
        name: of the argument that it comes from.

    Raises:
        RuntimeError: a CUDA graph is captured, and what its replays would read is not pinned.
    """
    if device.type != "cuda" or not tensor.is_cpu or torch.compiler.is_compiling():
        return tensor.to(device, non_blocking=True)
    if not torch.cuda.is_current_stream_capturing():
        # Pinned memory is read some time after the call, when its owner may have changed it.
        source = tensor.clone() if tensor.is_pinned() else tensor
    elif tensor.is_pinned() and tensor.is_contiguous():  # else torch sends a copy in other memory
        source = tensor
    else:
        where = "strided" if tensor.is_pinned() else "pageable"
        raise RuntimeError(
            f"{name}: a CUDA graph that is captured would read the host's {where} memory at every "
            f"replay, when something else may be there: expected values on {device} or dense ones "
            "in pinned memory. What packed sequences need comes from the host: capture padded "
            "ones, with lengths"
        )
    return source.to(device, non_blocking=True)

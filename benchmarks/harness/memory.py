"""How much memory a call takes at most beyond what was there before it."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """A context manager; afterwards `mib` has the MiB, or None where they cannot be told.

    On a GPU what torch's allocator gave out, so without what a library takes by itself. On the CPU
    how far the memory of the process rose above where it was, after returning what was free: of a
    first call that includes what a library keeps for later ones, and not what earlier providers
    left in its pools.
    """

    def __init__(self, device: str) -> None:
        self.gpu = device != "cpu"
        self.mib: float | None = None
        self._before: float | None = None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            self._before = _reset_peak()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before is None or exception[0] is not None:
            return
        if self.gpu:
            torch.cuda.synchronize()
            self.mib = (torch.cuda.max_memory_allocated() - self._before) / 2**20
        else:
            self.mib = (_status("VmHWM") - self._before) / 2**20


def _status(name: str) -> float:
    """Bytes, of a field that is in kB there."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024.0


def _reset_peak() -> float | None:
    try:
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text("5")  # the peak begins anew where the process is
        return _status("VmRSS")
    except (OSError, AttributeError, StopIteration):
        return None

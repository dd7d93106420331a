"""Finds and loads the compiled parts; everything else works without them.

The libraries are plain shared libraries that register operators with torch: for the CPU, for
CUDA, and for the CUDA kernels' emulation on the CPU. `_C` is a small module with the facts of the
build, the planner of the CUDA kernels, and the calls of `direct`. FUSED_RNN_SKIP_BUILD=1 in the
environment makes all of them count as absent, as if the package had been built that way.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from .environment import is_set

_FOLDER = Path(__file__).parent
_LIBRARY = _FOLDER / "libfused_rnn_cpu.so"
_CUDA_LIBRARY = _FOLDER / "libfused_rnn_cuda.so"
_CUDA_EMULATED_LIBRARY = _FOLDER / "libfused_rnn_cuda_emulated.so"


def _load_error(path: Path, kind: str, absent: str) -> str | None:
    """Loads a library. Why it cannot be used, or None when its operators work."""
    if is_set("FUSED_RNN_SKIP_BUILD"):
        return "FUSED_RNN_SKIP_BUILD is set"
    if not path.exists():
        return f"the {kind} library was not built: {absent}"
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        # torch's own message has the path alone; what it was raised from has the linker's words.
        return f"the {kind} library cannot be loaded: {error.__cause__ or error}"
    return None


@cache
def cpu_library_error() -> str | None:
    """Loads the CPU library once. Why it is absent, or None when torch.ops.fused_rnn_cpu works."""
    absent = "no C++ compiler, or FUSED_RNN_SKIP_BUILD set, when fused_rnn was installed"
    return _load_error(_LIBRARY, "CPU", absent)


@cache
def cuda_library_error() -> str | None:
    """Loads the CUDA library once. Why it is absent, or None when its operators work."""
    absent = "install with FUSED_RNN_CUDA=1, or run make build-cuda"
    return _load_error(_CUDA_LIBRARY, "CUDA", absent)


@cache
def cuda_emulated_library_error() -> str | None:
    """The same for the emulation of the CUDA kernels, torch.ops.fused_rnn_cuda_emulated."""
    return _load_error(_CUDA_EMULATED_LIBRARY, "emulated CUDA", "run make emulate")


def library_path() -> Path:
    """The path of the CPU library, for processes that load it without this package."""
    return _LIBRARY


def cpu_capability() -> str:
    """The instruction set the CPU library runs with: it asks the environment once, at its first
    call.

    Raises:
        RuntimeError: FUSED_RNN_CPU_CAPABILITY names none, or one this CPU does not have.
    """
    return torch.ops.fused_rnn_cpu.capability()


def bfloat16_capability() -> str:
    """The instruction set the CPU library runs bfloat16 with, "" where it has none of its own.

    Raises:
        RuntimeError: as `cpu_capability`.
    """
    return torch.ops.fused_rnn_cpu.bfloat16_capability()


def build_facts() -> dict[str, object]:
    """What the doctor prints: how the compiled parts were built, or why they are absent."""
    facts: dict[str, object] = {
        "cpu_library": cpu_library_error() or str(_LIBRARY),
        "cuda_library": cuda_library_error() or str(_CUDA_LIBRARY),
    }
    if is_set("FUSED_RNN_SKIP_BUILD"):
        return facts
    try:
        from . import _C
    except ImportError as error:
        return facts | {"build": f"unknown: {error}"}
    return facts | _C.build_facts() | {"cpu_features": _C.cpu_features()}

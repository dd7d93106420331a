"""Finds and loads the compiled parts; everything else works without them.

The CPU library is a plain shared library that registers operators with torch. `_C` is a small
module with the facts of the build. FUSED_RNN_SKIP_BUILD=1 in the environment makes both count
as absent, as if the package had been built that way.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch

_LIBRARY = Path(__file__).parent / "libfused_rnn_cpu.so"


def _skipped() -> bool:
    return os.environ.get("FUSED_RNN_SKIP_BUILD", "0") not in ("", "0")


@cache
def cpu_library_error() -> str | None:
    """Loads the CPU library once. Why it is absent, or None when torch.ops.fused_rnn_cpu works."""
    if _skipped():
        return "FUSED_RNN_SKIP_BUILD is set"
    if not _LIBRARY.exists():
        return (
            "the CPU library was not built: no C++ compiler, or FUSED_RNN_SKIP_BUILD set, "
            "when fused_rnn was installed"
        )
    try:
        torch.ops.load_library(_LIBRARY)
    except (OSError, RuntimeError) as error:
        return f"the CPU library cannot be loaded: {error}"
    return None


def library_path() -> Path:
    """Where the CPU library is, for processes that load it without this package."""
    return _LIBRARY


def cpu_capability() -> str:
    """The instruction set the CPU library runs with.

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
    facts: dict[str, object] = {"cpu_library": cpu_library_error() or str(_LIBRARY)}
    if _skipped():
        return facts
    try:
        from . import _C
    except ImportError as error:
        return facts | {"build": f"unknown: {error}"}
    return facts | _C.build_facts() | {"cpu_features": _C.cpu_features()}

"""The environment variables that the package reads, and how their values and those of command lines
are read.

`docs/backends.md` says what each does. C++ reads some by itself: FUSED_RNN_BACKEND on the short
ways (csrc/direct_calls.cpp), FUSED_RNN_CPU_CAPABILITY and FUSED_RNN_LOG.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable

# What `python -m fused_rnn doctor` shows where it is set.
VARIABLES = (
    "FUSED_RNN_BACKEND",
    "FUSED_RNN_CPU_CAPABILITY",
    "FUSED_RNN_CUDA_CHUNK",
    "FUSED_RNN_CUDA_GRAPH",
    "FUSED_RNN_CUDA_REGIME",
    "FUSED_RNN_LOG",
    "FUSED_RNN_SKIP_BUILD",
    "FUSED_RNN_TRITON_REGIME",
    "FUSED_RNN_TRITON_TUNING",
    "TRITON_INTERPRET",
)


def is_set(name: str) -> bool:
    """Whether a variable is there and neither empty nor 0."""
    return os.environ.get(name, "0") not in ("", "0")


def choice(name: str, known: Iterable[str]) -> str:
    """The value of a variable, "" where it is not set.

    Raises:
        ValueError: it is set to something that is not `known`.
    """
    value = os.environ.get(name, "")
    if value and value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}; got {value!r}")
    return value


def number(name: str, what: str) -> int | None:
    """The value of a variable that is a natural number or 0, None where it is not set.

    Raises:
        ValueError: it is set to something else; `what` says what was expected.
    """
    value = os.environ.get(name, "")
    if value and not value.isdecimal():
        raise ValueError(f"{name}: expected {what}; got {value!r}")
    return int(value) if value else None


def positive(text: str) -> int:
    """A value on a command line that is a natural number, as a type of argparse's."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number; got {text!r}")
    return int(text)

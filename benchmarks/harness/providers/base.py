"""What a provider is: it turns a case and its data into a `Session`, or raises `CannotDoError`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch

import fused_rnn
from harness.cases import Case
from harness.data import Data, Results
from harness.precision import gpu_precision


class CannotDoError(Exception):
    """A provider has no way of computing a case."""


@dataclass(frozen=True)
class Setting:
    """What a run fixes for every provider."""

    device: str = "cpu"
    threads: int = 1  # of the CPU


@dataclass(frozen=True)
class Session:
    """One case made ready with one provider."""

    call: Callable[[], object]  # what is timed
    results: Callable[[object], Results]  # of what the call returned
    active: Callable[[], AbstractContextManager] = nullcontext  # entered around a run of calls
    kernel: str = ""  # which of its ways the provider took, where it tells


@dataclass(frozen=True)
class Provider:
    name: str
    prepare: Callable[[Case, Data, Setting], Session]
    requires: tuple[str, ...] = ()  # modules that torch and fused_rnn do not bring along
    devices: tuple[str, ...] = ("cpu", "cuda")
    wants: Callable[[Case], bool] = lambda case: True  # False: the question does not arise
    default_on: tuple[str, ...] | None = None  # devices where it need not be named; None: all
    slow: bool = False  # takes part only where a set asks for all
    tf32: bool = False  # rounds the factors of float32 products to 10 bits
    install: str = "pip install -c constraints.txt"  # followed by `requires`

    def unavailable(self) -> str | None:
        """Why it is left out of the run, or None."""
        for module in self.requires:
            names = " ".join(dict.fromkeys(name.split(".")[0] for name in self.requires))
            try:
                # Not imported: what comes with an import (threads, settings) waits for its turn.
                found = importlib.util.find_spec(module)
            except Exception as error:  # of the packages around a module, and they may be broken
                return f"{type(error).__name__}: {error} ({self.install} {names})"
            if found is None:
                return f"{module} is not installed ({self.install} {names})"
        return None


@contextmanager
def torch_settings(
    case: Case, setting: Setting, backend: str | None = None, tf32: bool = False
) -> Iterator[None]:
    """Threads, gradient mode, backend and TF32: set once for many calls, as a program would."""
    threads = torch.get_num_threads()
    torch.set_num_threads(setting.threads)
    try:
        with ExitStack() as stack:
            if setting.device != "cpu":
                stack.enter_context(gpu_precision(tf32))
            if not case.has_grad:
                stack.enter_context(torch.inference_mode())
            if backend is not None:
                stack.enter_context(fused_rnn.backend(backend))
            yield
    finally:
        torch.set_num_threads(threads)


def require_plain(case: Case, *, heads: bool = False, resets: bool = False) -> None:
    """One layer, one direction, whole sequences; heads and resets only where said."""
    if case.layers > 1 or case.bidirectional:
        raise CannotDoError("measured with one layer and one direction only")
    if case.mode in ("packed", "step"):
        raise CannotDoError("measured on whole padded sequences only")
    if case.heads > 1 and not heads:
        raise CannotDoError("has no heads")
    if case.resets and not resets:
        raise CannotDoError("has no resets")


def reordered(tensor: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """The gates of dimension 0, of which place k takes what was in place order[k]."""
    gates = tensor.detach().chunk(len(order))
    return torch.cat([gates[k] for k in order])


def restored(tensor: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """The inverse of `reordered`."""
    return reordered(tensor, tuple(order.index(k) for k in range(len(order))))

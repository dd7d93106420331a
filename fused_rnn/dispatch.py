"""The choice of a backend: problem -> the first backend that supports it, and why not the others.

The choice is a pure function of the problem and of what the user forced, with
`with fused_rnn.backend("reference"):` or the environment variable FUSED_RNN_BACKEND.
"""

from __future__ import annotations

import os
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from .backends.base import Backend
from .backends.cpu import CpuBackend
from .backends.cuda import CudaBackend, CudaEmulatedBackend
from .backends.reference import ReferenceBackend
from .backends.triton import TritonBackend
from .problem import Problem

# In order of preference.
BACKENDS: dict[str, Backend] = {
    b.name: b for b in (CudaBackend(), TritonBackend(), CpuBackend(), ReferenceBackend())
}
# Those that are used only when they are asked for by name.
ON_REQUEST: dict[str, Backend] = {b.name: b for b in (CudaEmulatedBackend(),)}

_Recorder = Callable[[Problem, Backend, bool], None]  # problem, chosen backend, whether forced

_forced: ContextVar[str] = ContextVar("fused_rnn_backend", default="")
# Whether that is another one than the cpu's: what the shortest way asks (direct.py).
_off_the_cpu: ContextVar[bool] = ContextVar("fused_rnn_off_the_cpu", default=False)
_recorder: ContextVar[_Recorder | None] = ContextVar("fused_rnn_recorder", default=None)


class UnsupportedProblemError(RuntimeError):
    """A backend that the user forced cannot take a problem."""


def _check_name(name: str, source: str) -> str:
    if name not in ("", "auto", *BACKENDS, *ON_REQUEST):
        known = ", ".join(["auto", *BACKENDS, *ON_REQUEST])
        raise ValueError(f"{source}: expected one of {known}; got {name!r}")
    return "" if name == "auto" else name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Forces a backend for every layer called inside the `with` block, in this thread or task.

    A forced backend that cannot do the job raises and says why. Complex numbers and steppers that
    are made already do not ask; function transforms have the `cpu` backend's kernels or plain
    operations, and these where another is forced. Backward uses the backend that its
    forward was given; a compiled graph's asks anew when it runs. "auto" lifts an outer block's
    choice.

    Args:
        name: "cuda", "triton", "cpu", "reference", or "auto"; "cuda_emulated" for tests.

    Raises:
        TypeError: the name is no string.
        ValueError: it is not a backend's.
        UnsupportedProblemError (a layer in the block does): the backend cannot take it.

    Example:
        >>> import torch, fused_rnn
        >>> layer = fused_rnn.GRU(3, 4)
        >>> with fused_rnn.backend("reference"):
        ...     y, h = layer(torch.randn(5, 2, 3))
    """
    if not isinstance(name, str):
        raise TypeError(f"backend: expected a str, got {type(name).__name__}")
    _check_name(name, "backend")
    token, off = _forced.set(name), _off_the_cpu.set(name not in ("", "auto", "cpu"))
    try:
        yield
    finally:
        _off_the_cpu.reset(off)
        _forced.reset(token)


def requested() -> str:
    """The backend the user forced, or "" for an automatic choice."""
    name = _forced.get()
    if name:
        return _check_name(name, "backend")
    return _check_name(os.environ.get("FUSED_RNN_BACKEND", ""), "FUSED_RNN_BACKEND")


def cpu_is_welcome() -> bool:
    """Whether FUSED_RNN_BACKEND leaves the choice open, or asks for the cpu backend."""
    return os.environ.get("FUSED_RNN_BACKEND", "") in ("", "auto", "cpu")


def redirections() -> tuple[Callable[[], object], ...]:
    """Functions, one of which gives something true where a `with` block asks for another backend
    than the cpu's, or for a record of choices; and, without Python's lock, where the environment
    does, which C++ (`cpu_is_welcome` of csrc/direct_calls.cpp) reads only under that lock."""
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return _recorder.get, _off_the_cpu.get, lambda: not cpu_is_welcome()
    return _recorder.get, _off_the_cpu.get


def reasons(problem: Problem) -> list[tuple[str, str | None]]:
    """Every backend for the problem's device in order of preference, with why it does not take the
    problem by itself (None: it does)."""
    return [(b.name, _automatic_refusal(b, problem)) for b in _candidates(problem)]


def _candidates(problem: Problem) -> Iterator[Backend]:
    """The backends for the problem's device, in order of preference."""
    return (b for b in BACKENDS.values() if b.device_type in (None, problem.device_type))


def find(name: str) -> Backend:
    """The backend of that name, which must be one."""
    return BACKENDS[name] if name in BACKENDS else ON_REQUEST[name]


def has_stacks(device_type: str) -> bool:
    """Whether some backend that may be used there can run layers of a stack side by side."""
    candidates = [*BACKENDS.values(), *(b for b in ON_REQUEST.values() if b.name == requested())]
    return any(b.has_stacks and b.device_type == device_type for b in candidates)


def _refusal(candidate: Backend, problem: Problem) -> str | None:
    missing = [name for name in problem.extras if name not in candidate.extras]
    if missing and candidate.name != "reference":  # for which plain operations have them
        return f"has no kernel for {', '.join(missing)}"
    return candidate.unsupported(problem)


def _automatic_refusal(candidate: Backend, problem: Problem) -> str | None:
    return _refusal(candidate, problem) or candidate.only_by_name(problem)


def select(problem: Problem, name: str = "") -> Backend:
    """The backend called `name`; the first that takes the problem when `name` is "auto"; what the
    user asks for at this moment when it is empty.

    Raises:
        UnsupportedProblemError: the one that was named cannot take it, or none can.
    """
    name = name or requested() or "auto"
    chosen, forced = choose(problem, name), name != "auto"
    recorder = _recorder.get()
    if recorder is not None:
        recorder(problem, chosen, forced)
    return chosen


def choose(problem: Problem, name: str = "") -> Backend:
    """What `select` gives, for who only wants to know: nobody is told of the choice."""
    name = name or requested() or "auto"
    return _first_backend(problem) if name == "auto" else _forced_backend(problem, name)


@contextmanager
def recording(recorder: _Recorder) -> Iterator[None]:
    """Calls `recorder` at every choice made inside the `with` block, in this thread."""
    token = _recorder.set(recorder)
    try:
        yield
    finally:
        _recorder.reset(token)


def _forced_backend(problem: Problem, name: str) -> Backend:
    chosen = find(name)
    if reason := _refusal(chosen, problem):
        raise UnsupportedProblemError(
            f"backend {name!r} was asked for by name but cannot take this layer: {reason}"
        )
    return chosen


def _first_backend(problem: Problem) -> Backend:
    for candidate in _candidates(problem):
        if _automatic_refusal(candidate, problem) is None:
            if candidate.name == "reference" and problem.device_type == "cuda":
                _warn_slow(problem)
            return candidate
    refusals = "; ".join(f"{n}: {reason}" for n, reason in reasons(problem))
    raise UnsupportedProblemError(f"no backend can take this layer ({refusals})")


def _warn_slow(problem: Problem) -> None:
    why = "; ".join(f"{n}: {reason}" for n, reason in reasons(problem) if reason)
    # The warnings module shows a message once per place, which is here.
    warnings.warn(
        f"fused_rnn: {problem.cell_name} on {problem.device_type} runs on the slow reference "
        f"backend ({why})",
        RuntimeWarning,
        stacklevel=3,
    )

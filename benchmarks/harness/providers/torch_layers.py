"""Layers that torch runs: fused_rnn, torch.nn, and the plain loop, compiled or not."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch

import fused_rnn
from fused_rnn.dispatch import BACKENDS
from harness.cases import Case
from harness.data import Data, module_call
from harness.loop import STEPS, Loop
from harness.providers.base import CannotDoError, Provider, Session, Setting, torch_settings


def _fused_rnn(
    case: Case, data: Data, setting: Setting, backend: str, tf32: bool = False
) -> Session:
    """Weights outside the blocks of heads are zeros, multiplied like others."""
    module = fused_rnn.replace(copy.deepcopy(data.layer))
    if data.resets is not None and "resets" not in inspect.signature(module.forward).parameters:
        raise CannotDoError("has no resets")
    call, results = module_call(module, case, data)
    try:
        with torch_settings(case, setting, backend, tf32):
            choices = fused_rnn.explain(module, *data.args, **data.kwargs).layers
    except fused_rnn.UnsupportedProblemError as error:
        raise CannotDoError(str(error)) from error
    kernel = "+".join(dict.fromkeys(choice.kernel for choice in choices))
    return Session(call, results, lambda: torch_settings(case, setting, backend, tf32), kernel)


def _with_variables(
    case: Case, data: Data, setting: Setting, backend: str, variables: dict[str, str]
) -> Session:
    """Ours, made and called with these environment variables."""

    @contextmanager
    def active() -> Iterator[None]:
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        try:
            with torch_settings(case, setting, backend):
                yield
        finally:
            for name, value in before.items():
                del os.environ[name]
                if value is not None:
                    os.environ[name] = value

    with active():
        session = _fused_rnn(case, data, setting, backend)
    return replace(session, active=active)


def _compiled(case: Case, data: Data, setting: Setting) -> Session:
    """Our layer as torch.compile has it, in one graph; sizes are constants of it."""
    torch._dynamo.reset()  # it compiles one function only so many times
    module = fused_rnn.replace(copy.deepcopy(data.layer))
    compiled = torch.compile(module, fullgraph=True, dynamic=False)
    return Session(*module_call(compiled, case, data), lambda: torch_settings(case, setting))


def _torch_nn(case: Case, data: Data, setting: Setting, tf32: bool = False) -> Session:
    """On a GPU cuDNN, its weights in one piece."""
    if data.resets is not None:
        raise CannotDoError("has no resets")
    data.layer.flatten_parameters()
    call, results = module_call(data.layer, case, data)
    return Session(call, results, lambda: torch_settings(case, setting, tf32=tf32))


def _loop(case: Case, data: Data, setting: Setting, compiled: bool = False) -> Session:
    """Of the loop only the step is compiled: unrolled, a sequence takes minutes to compile."""
    if case.mode == "packed":
        raise CannotDoError("measured on padded sequences only")
    step = STEPS[case.cell]
    if compiled:
        torch._dynamo.reset()  # it compiles one function only so many times
        step = torch.compile(step, dynamic=False)
    call, results = module_call(Loop(data.layer, case, step), case, data)
    return Session(call, results, lambda: torch_settings(case, setting))


def _is_float32(case: Case) -> bool:
    return case.dtype == "float32"


def _is_large(case: Case) -> bool:
    """Whether W_hh, of one layer and one head, is near what a GPU's chip has no room for."""
    return case.H >= 1024 and case.layers == 1 and case.heads == 1


_STEPS = {"devices": ("cuda",), "wants": _is_large}
_TF32 = {"devices": ("cuda",), "wants": _is_float32, "tf32": True}

TORCH_LAYERS = (
    Provider("fused_rnn", partial(_fused_rnn, backend="auto")),
    Provider("fused_rnn tf32", partial(_fused_rnn, backend="auto", tf32=True), **_TF32),
    *(
        Provider(
            f"fused_rnn/{name}",
            partial(_fused_rnn, backend=name),
            # Which of those made for GPUs is best, and where, is for a GPU to find out.
            default_on=("cuda",) if name in ("triton", "cuda") else (),
        )
        for name in BACKENDS
    ),
    Provider(
        "fused_rnn layer after layer",
        # Where ours would run the layers of a stack side by side.
        partial(_with_variables, backend="auto", variables={"FUSED_RNN_CUDA_CHUNK": "0"}),
        devices=("cuda",),
        wants=lambda case: case.layers > 1 and not case.bidirectional,
    ),
    *(
        Provider(
            name,
            partial(
                _with_variables,
                backend="cuda",
                variables={"FUSED_RNN_CUDA_REGIME": "steps", "FUSED_RNN_CUDA_GRAPH": graph},
            ),
            **_STEPS,
        )
        for name, graph in (("fused_rnn/cuda steps", "0"), ("fused_rnn/cuda steps in graphs", "1"))
    ),
    Provider("fused_rnn compiled", _compiled, default_on=()),
    Provider("torch.nn", _torch_nn),
    Provider("torch.nn tf32", partial(_torch_nn, tf32=True), **_TF32),
    Provider("loop", _loop, slow=True),
    Provider("compiled loop", partial(_loop, compiled=True), slow=True),
)

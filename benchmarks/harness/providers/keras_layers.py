"""Keras layers with the torch and the jax backend, on the CPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType

import numpy as np
import torch

from harness.cases import Case
from harness.data import Data, Results, training_call
from harness.providers.base import (
    CannotDoError,
    Provider,
    Session,
    Setting,
    reordered,
    require_plain,
    restored,
    torch_settings,
)

LAYERS = {"rnn": "SimpleRNN", "gru": "GRU", "lstm": "LSTM"}
# Keras has the gates z, r, h of a GRU, and LSTM's as torch does.
GATE_ORDER = {"rnn": (0,), "gru": (1, 0, 2), "lstm": (0, 1, 2, 3)}

_modules: dict[str, dict[str, ModuleType]] = {}


@contextmanager
def _keras(backend: str) -> Iterator[ModuleType]:
    """Keras with this backend. It takes one per process, at its import; so here each backend has
    modules of its own, in force inside the `with` block."""

    def taken_out() -> dict[str, ModuleType]:
        names = [name for name in sys.modules if name.split(".")[0] == "keras"]
        return {name: sys.modules.pop(name) for name in names}

    before, variable = taken_out(), os.environ.get("KERAS_BACKEND")
    sys.modules.update(_modules.get(backend, {}))
    os.environ["KERAS_BACKEND"] = backend
    try:
        import keras

        yield keras
    finally:
        _modules[backend] = taken_out()
        sys.modules.update(before)
        if variable is None:
            del os.environ["KERAS_BACKEND"]
        else:
            os.environ["KERAS_BACKEND"] = variable


def _layer(keras: ModuleType, case: Case, data: Data):
    """A Keras layer with torch's weights; it takes and gives [B, T, ...]."""
    layer = getattr(keras.layers, LAYERS[case.cell])(case.H, return_sequences=True)
    layer.build((case.B, case.T, case.I))
    order = GATE_ORDER[case.cell]
    w_ih, w_hh, b_ih, b_hh = (reordered(p, order) for p in data.layer.parameters())
    bias = torch.stack((b_ih, b_hh)) if case.cell == "gru" else b_ih + b_hh
    layer.set_weights([w_ih.T.numpy(), w_hh.T.numpy(), bias.numpy()])
    return layer


def _as_torch(case: Case, named: dict[str, torch.Tensor]) -> Results:
    """Keras' y, x, kernel, recurrent_kernel and bias as torch.nn's results."""
    results = {"y": named["y"].transpose(0, 1)}
    if "x" in named:
        order = GATE_ORDER[case.cell]
        bias = named["bias"]
        b_ih, b_hh = bias if case.cell == "gru" else (bias, bias)
        results["grad x"] = named["x"].transpose(0, 1)
        results["grad weight_ih_l0"] = restored(named["kernel"].T, order)
        results["grad weight_hh_l0"] = restored(named["recurrent_kernel"].T, order)
        results["grad bias_ih_l0"] = restored(b_ih, order)
        results["grad bias_hh_l0"] = restored(b_hh, order)
    return results


NAMES = ("kernel", "recurrent_kernel", "bias")


def _require(case: Case, setting: Setting, all_threads: bool) -> None:
    require_plain(case)
    if case.dtype != "float32":
        raise CannotDoError("measured in float32 only")
    if all_threads and setting.threads != len(os.sched_getaffinity(0)):
        raise CannotDoError("XLA takes all cores")


def _keras_torch(case: Case, data: Data, setting: Setting) -> Session:
    _require(case, setting, all_threads=False)
    with _keras("torch") as keras:
        layer = _layer(keras, case, data)
    x = data.x.detach().transpose(0, 1).contiguous().requires_grad_(case.has_grad)
    weights = [variable.value for variable in layer.trainable_variables]

    @contextmanager
    def active() -> Iterator[None]:
        with _keras("torch"), torch_settings(case, setting):
            yield

    if not case.has_grad:
        return Session(lambda: layer(x), lambda y: _as_torch(case, {"y": y}), active)
    cotangent = data.cotangent.transpose(0, 1).contiguous()
    batch_first = replace(data, xs=(x,), cotangent=cotangent)
    call, results = training_call(layer, weights, NAMES, batch_first)

    def named(output: object) -> Results:
        plain = {name.removeprefix("grad "): value for name, value in results(output).items()}
        return _as_torch(case, plain)

    return Session(call, named, active)


def _keras_jax(case: Case, data: Data, setting: Setting) -> Session:
    """Compiled as a whole by jax.jit."""
    _require(case, setting, all_threads=True)
    import jax

    with _keras("jax") as keras:
        layer = _layer(keras, case, data)
    x = jax.numpy.asarray(data.x.detach().transpose(0, 1).contiguous().numpy())
    cotangent = jax.numpy.asarray(data.cotangent.transpose(0, 1).contiguous().numpy())
    others = [variable.value for variable in layer.non_trainable_variables]
    weights = [variable.value for variable in layer.trainable_variables]

    def forward(x, weights):
        return layer.stateless_call(weights, others, x)[0]

    def train(x, weights):
        y, backward = jax.vjp(forward, x, weights)
        d_x, d_weights = backward(cotangent)
        return [y, d_x, *d_weights]

    compiled = jax.jit(train if case.has_grad else lambda x, w: [forward(x, w)])
    names = ("y", "x", *NAMES)

    def results(arrays: object) -> Results:
        tensors = [torch.from_numpy(np.array(array)) for array in arrays]
        return _as_torch(case, dict(zip(names, tensors, strict=False)))

    @contextmanager
    def active() -> Iterator[None]:
        with _keras("jax"):
            yield

    return Session(lambda: jax.block_until_ready(compiled(x, weights)), results, active)


KERAS_LAYERS = (
    Provider("keras torch", _keras_torch, ("keras",), ("cpu",), slow=True),
    Provider("keras jax", _keras_jax, ("keras", "jax"), ("cpu",), slow=True),
)

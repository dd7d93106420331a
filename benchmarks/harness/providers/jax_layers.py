"""A layer in jax: one matrix product for the input, lax.scan over time, compiled as a whole."""

from __future__ import annotations

import os

import numpy as np
import torch

from harness.cases import Case
from harness.data import Data, Results
from harness.providers.base import CannotDoError, Provider, Session, Setting, require_plain

# Steps in one trip of the scan's loop. A trip has a price of its own: GRU at (128,1,128) takes
# 9.39 ms step by step, 3.99 by sixteens.
UNROLLED = 16


def _steps(jax):
    jnn, jnp = jax.nn, jax.numpy

    def rnn(state, gx, gh):
        h = jnp.tanh(gx + gh)
        return (h,), h

    def gru(state, gx, gh):
        (h,) = state
        xr, xz, xn = jnp.split(gx, 3, 1)
        hr, hz, hn = jnp.split(gh, 3, 1)
        z = jnn.sigmoid(xz + hz)
        n = jnp.tanh(xn + jnn.sigmoid(xr + hr) * hn)
        h = n + z * (h - n)
        return (h,), h

    def lstm(state, gx, gh):
        i, f, g, o = jnp.split(gx + gh, 4, 1)
        c = jnn.sigmoid(f) * state[1] + jnn.sigmoid(i) * jnp.tanh(g)
        h = jnn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    return {"rnn": rnn, "gru": gru, "lstm": lstm}


def _jax_scan(case: Case, data: Data, setting: Setting) -> Session:
    """Compiled as a whole, UNROLLED steps in a trip of the scan."""
    require_plain(case)
    if case.dtype != "float32":
        raise CannotDoError("measured in float32 only")
    if setting.threads != len(os.sched_getaffinity(0)):
        raise CannotDoError("XLA takes all cores")
    import jax
    from jax import numpy as jnp

    step = _steps(jax)[case.cell]
    weights = {n: jnp.asarray(p.detach().numpy()) for n, p in data.layer.named_parameters()}
    names = list(weights)  # jax sorts dictionaries
    x, cotangent = (jnp.asarray(t.detach().numpy()) for t in (data.x, data.cotangent))

    def forward(x, weights):
        w_ih, w_hh, b_ih, b_hh = (weights[name] for name in names)
        zeros = jnp.zeros((case.B, case.H), x.dtype)
        start = (zeros,) * (2 if case.cell == "lstm" else 1)

        def body(state, gx):
            return step(state, gx, state[0] @ w_hh.T + b_hh)

        return jax.lax.scan(body, start, x @ w_ih.T + b_ih, unroll=UNROLLED)[1]

    def train(x, weights):
        y, backward = jax.vjp(forward, x, weights)
        d_x, d_weights = backward(cotangent)
        gradients = {f"grad {name}": gradient for name, gradient in d_weights.items()}
        return {"y": y, "grad x": d_x} | gradients

    compiled = jax.jit(train if case.has_grad else lambda x, w: {"y": forward(x, w)})

    def results(arrays: object) -> Results:
        return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}

    return Session(lambda: jax.block_until_ready(compiled(x, weights)), results)


JAX_LAYERS = (Provider("jax scan", _jax_scan, ("jax",), ("cpu",), slow=True),)

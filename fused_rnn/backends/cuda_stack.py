"""Stacks of layers whose chunks of time run side by side on the GPU (csrc/cuda/stack_scan.h).

What is saved lies in memory as it does where layers run one after another. The gradients of the
weights are products over whole sequences, layer by layer on a stream of their own, beside the scans
of the layers below.

Shapes: L layers, T timesteps, B batch, N = T*B rows, I input_size, H hidden_size, G gates,
Q = cell.grad_gates.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..cells import equal_parts
from ..once import once
from ..problem import LayerInputs, Problem, Rows, Stack
from .base import aligned, allocate_output, float32_precision, gate_bias, hidden_bias, input_grads
from .bundles import (
    InputGrads,
    LayerOutput,
    Needs,
    OutputGrads,
    ScanGrads,
    StackInputs,
    StackOutput,
)
from .cuda_arguments import current_stream, out_of_memory_as_in_torch, requested_regime


def describe(stack: Stack, training: bool) -> str:
    """How it runs, in a few words."""
    passes = {"forward": stack.forward, "back": stack.backward if training else 0}
    chunks = [f"{chunk} steps {name}" for name, chunk in passes.items() if chunk]
    return f"; {stack.layers} layers side by side in chunks of {', '.join(chunks)}"


@out_of_memory_as_in_torch()
def forward(ops, problem: Problem, inputs: StackInputs, save: bool) -> StackOutput:
    x, weights, h0, c0, dropout = inputs
    cell, layers, wide = problem.cell, len(weights), torch.float32
    # From here on this stream: it waits for the others before anything is freed.
    gx = [x.new_empty((1, x.shape[0], w.w_ih.shape[0])) for w in weights]
    out = [allocate_output(problem, one, save) for one in gx]
    h_n = h0.new_empty(h0.shape)
    # A chunk goes on from c, or from GRU's h, as it was before it is rounded.
    c_n = h0.new_empty(h0.shape if cell.has_c or cell.name == "gru" else (0,), dtype=wide)
    ys, gates, cells = ([getattr(o, name) for o in out] for name in ("y", "gates", "cells"))
    ops.stack_forward(
        cell.index,
        aligned(x),
        [aligned(w.w_ih) for w in weights],
        [gate_bias(cell, w) for w in weights] if problem.bias else [],
        [aligned(w.w_hh) for w in weights],
        hidden_bias(cell, weights),
        aligned(h0),
        aligned(c0, wide),
        *dropout,
        _chunk(problem, problem.stack.forward),
        gx,
        ys,
        h_n,
        c_n,
        gates,
        cells,
        *_how(x, layers),
    )
    c_n = c_n.to(problem.dtype) if cell.has_c else h0.new_empty((*h0.shape[:2], 0))
    return StackOutput(ys, h_n, c_n, gates, cells)


@out_of_memory_as_in_torch()
def backward(
    ops,
    problem: Problem,
    grads: OutputGrads,
    inputs: StackInputs,
    saved: StackOutput,
    needs: Needs,
) -> InputGrads:
    x, weights, h0, c0, dropout = inputs
    cell, layers, wide = problem.cell, len(weights), torch.float32
    grad_ys = [torch.empty_like(y) for y in saved.ys[:-1]]
    columns = cell.grad_gates * problem.hidden_size
    grad_gates = [y.new_empty((1, y.shape[0], columns)) for y in saved.ys]
    grad_h0 = h0.new_empty(h0.shape, dtype=wide)
    grad_c0 = h0.new_empty((*h0.shape[:2], h0.shape[2] * cell.has_c), dtype=wide)
    h0, c0 = aligned(h0), aligned(c0, wide)
    ops.stack_backward(
        cell.index,
        aligned(grads.y),
        aligned(grads.h_n, wide),
        aligned(grads.c_n, wide),
        [aligned(w.w_ih) for w in weights],
        [aligned(w.w_hh) for w in weights],
        h0,
        c0,
        *dropout,
        _chunk(problem, problem.stack.backward),
        [aligned(y) for y in saved.ys],
        [aligned(g) for g in saved.gates],
        [aligned(c) for c in saved.cells],
        grad_ys,
        grad_gates,
        grad_h0,
        grad_c0,
        *_how(x, layers),
    )
    rows = Rows(problem.timesteps, problem.batch_size, None, x.shape[0])
    needs_of_layers = equal_parts(needs.weights, layers)
    found: list[InputGrads] = []
    for layer in reversed(range(layers)):  # in the order in which their scans end
        with _beside(x.device, layers - 1 - layer) as results:
            one = input_grads(
                problem,
                ScanGrads(grad_gates[layer], grad_h0, grad_c0),
                LayerInputs(
                    x if layer == 0 else dropout.of(layer - 1, saved.ys[layer - 1]),
                    weights[layer : layer + 1],
                    h0[layer : layer + 1],
                    None,  # which only peepholes would need
                    rows,
                ),
                LayerOutput(
                    saved.ys[layer], None, None, saved.gates[layer], saved.cells[layer]
                ),
                Needs(
                    needs.x and layer == 0, False, False, False, False,
                    needs_of_layers[layer],
                ),
            )  # fmt: skip
            results += [one.x, *one.weights]
        found.append(one)
    found.reverse()
    return InputGrads(
        found[0].x,
        grad_h0.to(problem.dtype) if needs.h0 else None,
        grad_c0.to(problem.dtype) if needs.c0 else None,
        [grad for one in found for grad in one.weights],
    )


def _chunk(problem: Problem, chunk: int) -> int:
    return min(chunk or problem.timesteps, problem.timesteps)


def _how(x: Tensor, layers: int) -> tuple[str, bool, int, list[int]]:
    """The last arguments of both operators."""
    streams = [0] * layers
    if x.is_cuda:
        caller = torch.cuda.current_stream(x.device)
        streams = [_stream_of(caller, number).cuda_stream for number in range(layers)]
    return requested_regime(), float32_precision() == "tf32", current_stream(x), streams


def _stream_of(caller: torch.cuda.Stream, number: int) -> torch.cuda.Stream:
    """One for each number of a layer, counted as their scans begin: backward from the last one. It
    works for that stream, which a graph may be capturing."""
    return _made(caller.device, caller.cuda_stream, number)


@once
def _made(device: torch.device, caller: int, number: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextmanager
def _beside(device: torch.device, number: int) -> Iterator[list[Tensor | None]]:
    """A `with` block whose work on a GPU follows the scans of the layer of that number on a stream
    of its own, and what comes after the block follows it. The block puts its results into the
    list."""
    results: list[Tensor | None] = []
    if device.type != "cuda":
        yield results
        return
    caller = torch.cuda.current_stream(device)
    side = _stream_of(caller, -1)
    side.wait_stream(_stream_of(caller, number))
    with torch.cuda.stream(side):
        yield results
    for tensor in results:
        if tensor is not None:
            tensor.record_stream(caller)
    caller.wait_stream(side)

"""Stacks of layers that run side by side, for a backend that can do so and finds it faster.

A stack is one autograd function over all its layers. It is not an operator: wherever somebody
watches or transforms operations (compilers, exporters, traces, function transforms, dispatch modes)
layers follow one another, each an operator of its own.

Shapes: L layers, T timesteps, B batch, N = T*B rows, I input_size, H hidden_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import direct, dispatch, plain
from .backends.bundles import Dropout, Needs, OutputGrads, StackInputs, StackOutput
from .cells import CELLS, equal_parts
from .layer_call import make_problem, no_autocast, split_by_direction, unflatten, with_resets
from .problem import Problem, in_memory, wants_gradients
from .transformed import are_batched, needs_oracle


def layers(
    cell: str,
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    num_layers: int,
    *,
    dropout: float,
    is_plain: bool,
) -> tuple[Tensor, Any] | None:
    """What `functional.recurrent` returns for a stack, or None: layer after layer.

    Args:
        x: [T, B, I].
        states: h_0, and for LSTM c_0, each [L, B, H].
        dropout: the probability between layers, 0 unless training.
        is_plain: whether the stack is of one direction, padded, and asks for nothing but y and the
            last states.
    """
    if num_layers < 2 or torch.compiler.is_compiling() or not dispatch.has_stacks(x.device.type):
        return None
    if needs_oracle(x) or torch._C._get_tracing_state() or torch._C._len_torch_dispatch_stack():
        return None
    if not direct.are_plain((x, *states, *weights)):
        return None
    training = wants_gradients(x, *states, *weights)
    h0, c0 = states if CELLS[cell].has_c else (states[0], None)
    of_first = list(equal_parts(weights, h0.shape[0])[0])
    first = h0[:1], None if c0 is None else c0[:1], of_first
    problem = make_problem(cell, x, *first, None, None, training)
    if h0.shape[0] != num_layers:  # two directions
        problem = replace(problem, directions=2)
    name = dispatch.requested() or "auto"
    problems = [problem, *[replace(problem, input_size=problem.output_size)] * (num_layers - 1)]
    chosen = dispatch.choose(problem, name)
    if not chosen.has_stacks or dispatch.choose(problems[-1], name) is not chosen:
        return None
    together = chosen.stack(problem, num_layers, is_plain)
    if together is None:
        return None
    problems = [replace(one, stack=together) for one in problems]
    for one in problems:
        dispatch.select(one, name)  # for whoever records choices
    options = problems[0], chosen.name, _draw(x, h0, dropout)
    if training:
        y, h_n, c_n = _StackFunction.apply(options, x, h0, c0, *weights)
    else:
        with torch.no_grad():
            out = _forward(options, x, h0, c0, weights, False)
        y, h_n, c_n = unflatten(out.ys[-1], x), out.h_n, out.c_n
    return y, (h_n, c_n) if c0 is not None else h_n


def _draw(x: Tensor, h0: Tensor, p: float) -> Dropout:
    """The dropout that torch would draw layer after layer."""
    if p == 0:
        return Dropout([], 1.0)
    ones = x.new_ones((*x.shape[:2], h0.shape[2]))
    kept = [F.dropout(ones, p).bool().flatten(0, 1) for _ in range(h0.shape[0] - 1)]
    return Dropout(kept, 1 / (1 - p) if p < 1 else 0.0)


def _by_layer(h0: Tensor, weights: Sequence[Tensor]) -> list:
    """The DirectionWeights of each layer."""
    parts = equal_parts(weights, h0.shape[0])
    return [split_by_direction(h0[:1], None, list(part))[0] for part in parts]


_Options = tuple[Problem, str, Dropout]  # of the first layer; the backend's name


def _forward(
    options: _Options,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    save: bool,
) -> StackOutput:
    problem, name, dropout = options
    inputs = StackInputs(x.flatten(0, 1), _by_layer(h0, weights), h0, c0, dropout)
    with no_autocast(x.device.type):
        return dispatch.find(name).stack_forward(problem, inputs, save)


class _StackFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, options, x, h0, c0, *weights):
        out = _forward(options, x, h0, c0, weights, True)
        problem, name, dropout = options
        y = unflatten(out.ys[-1], x)
        ctx.save_for_backward(
            *dropout.kept, *out.gates, *out.cells, *out.ys[:-1], y, x, h0, c0, *weights
        )
        ctx.options = problem, name, dropout.scale, len(dropout.kept)
        c_n = out.c_n
        if c0 is None:
            ctx.mark_non_differentiable(c_n)
        ctx.set_materialize_grads(False)
        return y, out.h_n, c_n

    @staticmethod
    def backward(ctx, grad_y, grad_h_n, grad_c_n):
        kept = list(ctx.saved_tensors)  # once: checkpointing computes them anew at every look
        problem, name, scale, drops = ctx.options
        count = problem.stack.layers

        def take(number: int) -> list[Tensor]:
            taken = kept[:number]
            del kept[:number]
            return taken

        dropout = Dropout(take(drops), scale)
        gates, cells, ys = take(count), take(count), take(count)
        x, h0, c0, *weights = kept
        needs = ctx.needs_input_grad[1:]
        grads = grad_y, grad_h_n, None if c0 is None else grad_c_n
        if all(grad is None for grad in grads):
            return (None,) * (1 + len(needs))
        create_graph = torch.is_grad_enabled()
        if create_graph or are_batched(grads):
            with torch.enable_grad():
                results = _differentiable_backward(
                    problem, dropout, grads, kept, needs, create_graph
                )
            return (None, *results)
        ys[-1] = ys[-1].flatten(0, 1)
        grad_y, *of_states = (None if grad is None else in_memory(grad) for grad in grads)
        with no_autocast(x.device.type):
            result = dispatch.find(name).stack_backward(
                problem,
                OutputGrads(None if grad_y is None else grad_y.flatten(0, 1), *of_states),
                StackInputs(x.flatten(0, 1), _by_layer(h0, weights), h0, c0, dropout),
                StackOutput(ys, None, None, gates, cells),
                Needs.of(with_resets(needs, False)),
            )
        grad_x = None if result.x is None else result.x.view(x.shape)
        return (None, grad_x, result.h0, result.c0, *result.weights)


def _differentiable_backward(problem, dropout, grads, inputs, needs, create_graph):
    """What `plain.gradients` gives for a single layer, through every layer."""
    views = [None if i is None else i.view_as(i) for i in inputs]
    x, h0, c0, *weights = views
    count, finals = problem.stack.layers, []
    for layer, of_layer in enumerate(equal_parts(weights, count)):
        one = slice(layer, layer + 1)
        x, *final, _ = plain.layer(
            problem.cell_name,
            x if layer == 0 else _dropped(x, layer - 1, dropout),
            h0[one],
            None if c0 is None else c0[one],
            of_layer,
        )
        finals.append(final)
    states = [torch.cat(parts) for parts in zip(*finals, strict=True) if parts[0] is not None]
    outputs = (x, *states, *[None] * (2 - len(states)))
    return plain.differentiable_grads(outputs, grads, views, needs, create_graph)


def _dropped(y: Tensor, layer: int, dropout: Dropout) -> Tensor:
    if not dropout.kept:
        return y
    return y * dropout.kept[layer].view(y.shape) * dropout.scale

"""The CPU backend: whole layers in C++ (csrc/cpu)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cells import DirectionWeights, is_half
from ..native import cpu_capability, cpu_library_error
from ..problem import Problem, Rows
from .base import (
    Backend,
    InputGrads,
    LayerOutput,
    Needs,
    OutputGrads,
    backward_in_float32,
    forward_in_float32,
)


class CpuBackend(Backend):
    name = "cpu"

    def unsupported(self, problem: Problem) -> str | None:
        if problem.device_type != "cpu":
            return f"needs tensors on the cpu, got {problem.device_type}"
        if problem.dtype != torch.float32 and not is_half(problem.dtype):
            return f"needs dtype float32, bfloat16 or float16, got {problem.dtype}"
        if problem.hidden_size == 0:
            return "needs at least one hidden unit, got hidden_size=0"
        return cpu_library_error()

    def describe(self, problem: Problem) -> str:
        through = " in float32" if is_half(problem.dtype) else ""
        return f"cpu/{cpu_capability()} layer{through}"

    def layer_forward(self, problem, *args) -> LayerOutput:
        if is_half(problem.dtype):
            return forward_in_float32(self._forward, problem, *args)
        return self._forward(problem, *args)

    def layer_backward(self, problem, *args) -> InputGrads:
        if is_half(problem.dtype):
            return backward_in_float32(self._backward, problem, *args)
        return self._backward(problem, *args)

    def _forward(
        self,
        problem: Problem,
        x: Tensor,
        weights: list[DirectionWeights],
        h0: Tensor,
        c0: Tensor | None,
        rows: Rows,
        save: bool,
    ) -> LayerOutput:
        cell, hidden, output = problem.cell, problem.hidden_size, problem.output_size
        directions, batch, count = problem.directions, problem.batch_size, x.shape[0]
        out = LayerOutput(
            y=x.new_empty((count, directions * output)),
            h_n=x.new_empty((directions, batch, output)),
            c_n=x.new_empty((directions, batch, hidden * cell.has_c)),
            gates=x.new_empty((directions, count, hidden * cell.saved_gates * save)),
            cells=x.new_empty((directions, count, hidden * (cell.has_c and save))),
        )
        torch.ops.fused_rnn_cpu.layer_forward(
            cell.index,
            x.contiguous(),
            _flat(weights),
            h0.contiguous(),
            c0.contiguous() if cell.has_c else None,
            rows.batch_sizes_tensor if rows.packed else None,
            *out,
        )
        return out

    def _backward(
        self,
        problem: Problem,
        grads: OutputGrads,
        x: Tensor,
        weights: list[DirectionWeights],
        h0: Tensor,
        c0: Tensor | None,
        rows: Rows,
        saved: LayerOutput,
        needs: Needs,
    ) -> InputGrads:
        cell = problem.cell
        flat = _flat(weights)
        unwanted = x.new_empty(())
        grad_x = x.new_empty(x.shape) if needs.x else unwanted
        grad_h0 = h0.new_empty(h0.shape)
        grad_c0 = c0.new_empty(c0.shape) if cell.has_c else unwanted
        grad_weights = [
            w.new_empty(w.shape) if need else unwanted
            for w, need in zip(flat, needs.weights, strict=True)
        ]
        torch.ops.fused_rnn_cpu.layer_backward(
            cell.index,
            *(None if grad is None else grad.contiguous() for grad in grads),
            x.contiguous(),
            flat,
            h0.contiguous(),
            c0.contiguous() if cell.has_c else None,
            rows.batch_sizes_tensor if rows.packed else None,
            saved.y,
            saved.gates,
            saved.cells,
            grad_x,
            grad_h0,
            grad_c0,
            grad_weights,
        )
        return InputGrads(
            grad_x if needs.x else None,
            grad_h0 if needs.h0 else None,
            grad_c0 if needs.c0 and cell.has_c else None,
            [g if need else None for g, need in zip(grad_weights, needs.weights, strict=True)],
        )


def _flat(weights: list[DirectionWeights]) -> list[Tensor]:
    return [w.contiguous() for direction in weights for w in direction if w is not None]

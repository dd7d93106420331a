"""The CPU backend: scans in C++ (csrc/cpu), with the matrix products around them torch's."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cells import DirectionWeights
from ..native import cpu_capability, cpu_library_error
from ..problem import Problem, Rows
from .base import Backend, LayerOutput, OutputGrads, ScanGrads, allocate_output


class CpuBackend(Backend):
    name = "cpu"

    def unsupported(self, problem: Problem) -> str | None:
        if problem.device_type != "cpu":
            return f"needs tensors on the cpu, got {problem.device_type}"
        if problem.dtype != torch.float32:
            return f"needs dtype torch.float32, got {problem.dtype}"
        if problem.hidden_size == 0:
            return "needs at least one hidden unit, got hidden_size=0"
        if problem.proj_size:
            return f"has no projection, got proj_size={problem.proj_size}"
        return cpu_library_error()

    def describe(self, problem: Problem) -> str:
        return f"cpu/{cpu_capability()} scan"

    def scan_forward(
        self,
        problem: Problem,
        gx: Tensor,
        weights: list[DirectionWeights],
        h0: Tensor,
        c0: Tensor | None,
        rows: Rows,
        save: bool,
    ) -> LayerOutput:
        cell = problem.cell
        out = allocate_output(problem, gx, save)
        has_hidden_bias = cell.name == "gru" and weights[0].b_hh is not None
        torch.ops.fused_rnn_cpu.scan_forward(
            cell.index,
            gx,
            [w.w_hh.contiguous() for w in weights],
            [w.b_hh.contiguous() for w in weights] if has_hidden_bias else [],
            h0.contiguous(),
            c0.contiguous() if cell.has_c else None,
            rows.batch_sizes_tensor if rows.packed else None,
            out.y,
            out.h_n,
            out.c_n,
            out.gates,
            out.cells,
        )
        return out

    def scan_backward(
        self,
        problem: Problem,
        grads: OutputGrads,
        weights: list[DirectionWeights],
        h0: Tensor,
        c0: Tensor | None,
        rows: Rows,
        saved: LayerOutput,
    ) -> ScanGrads:
        cell, hidden = problem.cell, problem.hidden_size
        y = saved.y
        grad_gates = y.new_empty((len(weights), y.shape[0], cell.grad_gates * hidden))
        grad_h0 = y.new_empty(h0.shape)
        grad_c0 = y.new_empty((*h0.shape[:2], hidden * cell.has_c))
        torch.ops.fused_rnn_cpu.scan_backward(
            cell.index,
            *(None if grad is None else grad.contiguous() for grad in grads),
            [w.w_hh.contiguous() for w in weights],
            h0.contiguous(),
            c0.contiguous() if cell.has_c else None,
            rows.batch_sizes_tensor if rows.packed else None,
            y,
            saved.gates,
            saved.cells,
            grad_gates,
            grad_h0,
            grad_c0,
        )
        return ScanGrads(grad_gates, grad_h0, grad_c0 if cell.has_c else None)

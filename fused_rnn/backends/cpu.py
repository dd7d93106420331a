"""The CPU backend: whole layers in C++ (csrc/cpu).

bfloat16 runs natively where the CPU multiplies it, but for relu; else half types run through
float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cells import DirectionWeights, is_half, state_dtype
from ..native import bfloat16_capability, cpu_capability, cpu_library_error
from ..problem import EXTRAS, LayerInputs, Problem
from .base import Backend, is_relu_of_half
from .bundles import InputGrads, LayerOutput, Needs, OutputGrads, allocate_saved


class CpuBackend(Backend):
    name = "cpu"
    device_type = "cpu"
    extras = frozenset(EXTRAS)

    def unsupported(self, problem: Problem) -> str | None:
        if problem.device_type != "cpu":
            return f"needs tensors on the cpu, got {problem.device_type}"
        if problem.dtype != torch.float32 and not is_half(problem.dtype):
            return f"needs dtype float32, bfloat16 or float16, got {problem.dtype}"
        if problem.hidden_size == 0:
            return "needs at least one hidden unit, got hidden_size=0"
        return cpu_library_error()

    def describe(self, problem: Problem) -> str:
        if not is_half(problem.dtype):
            return f"cpu/{cpu_capability()} layer"
        if self.in_float32(problem):
            return f"cpu/{cpu_capability()} layer in float32"
        return f"cpu/{bfloat16_capability()} layer"

    def in_float32(self, problem: Problem) -> bool:
        # Zoneout's expectation adds to h what the type may be too coarse for.
        # Normalised values are wanted as exact as the sums that they come from.
        coarse = is_relu_of_half(problem) or problem.averaged or "layer_norm" in problem.extras
        native = problem.dtype == torch.bfloat16 and not coarse
        return is_half(problem.dtype) and not (native and bfloat16_capability())

    def layer_forward(self, problem: Problem, inputs: LayerInputs, save: bool) -> LayerOutput:
        x, weights, h0, c0, rows = inputs
        cell, hidden, output = problem.cell, problem.hidden_size, problem.output_size
        directions, batch, count = problem.directions, problem.batch_size, x.shape[0]
        wide = state_dtype(problem.dtype)
        out = LayerOutput(
            y=x.new_empty((count, directions * output)),
            h_n=x.new_empty((directions, batch, output), dtype=wide),
            c_n=x.new_empty((directions, batch, hidden * cell.has_c), dtype=wide),
            gates=allocate_saved(x, rows, directions, problem.saved_columns * save),
            cells=allocate_saved(x, rows, directions, hidden * problem.keeps_cells(save), wide),
        )
        torch.ops.fused_rnn_cpu.layer_forward(
            cell.index,
            x.contiguous(),
            _flat(weights),
            h0.contiguous(),
            c0.to(wide).contiguous() if cell.has_c else None,
            rows.batch_sizes_tensor if rows.packed else None,
            *out,
            *rows.noise,
        )
        if wide == problem.dtype:
            return out
        return out._replace(h_n=out.h_n.to(problem.dtype), c_n=out.c_n.to(problem.dtype))

    def layer_backward(
        self,
        problem: Problem,
        grads: OutputGrads,
        inputs: LayerInputs,
        saved: LayerOutput,
        needs: Needs,
    ) -> InputGrads:
        x, weights, h0, c0, rows = inputs
        cell = problem.cell
        dtype, wide = problem.dtype, state_dtype(problem.dtype)
        flat = _flat(weights)
        unwanted = x.new_empty(())
        grad_x = x.new_empty(x.shape) if needs.x else unwanted
        grad_h0 = h0.new_empty(h0.shape, dtype=wide)
        grad_c0 = c0.new_empty(c0.shape, dtype=wide) if cell.has_c else unwanted
        grad_weights = [
            w.new_empty(w.shape) if need else unwanted
            for w, need in zip(flat, needs.weights, strict=True)
        ]
        torch.ops.fused_rnn_cpu.layer_backward(
            cell.index,
            None if grads.y is None else grads.y.contiguous(),
            None if grads.h_n is None else grads.h_n.to(wide).contiguous(),
            None if grads.c_n is None else grads.c_n.to(wide).contiguous(),
            None if grads.cells is None else grads.cells.to(wide).contiguous(),
            x.contiguous(),
            flat,
            h0.contiguous(),
            c0.to(wide).contiguous() if cell.has_c else None,
            rows.batch_sizes_tensor if rows.packed else None,
            saved.y,
            saved.gates,
            saved.cells,
            grad_x,
            grad_h0,
            grad_c0,
            grad_weights,
            *rows.noise,
            spares_h0=not needs.h0,  # whose gradient is then left unfinished
        )
        return InputGrads(
            grad_x if needs.x else None,
            grad_h0.to(dtype) if needs.h0 else None,
            grad_c0.to(dtype) if needs.c0 and cell.has_c else None,
            [g if need else None for g, need in zip(grad_weights, needs.weights, strict=True)],
        )


def _flat(weights: list[DirectionWeights]) -> list[Tensor]:
    """The parameters as the library takes them: matrices in their dtype, biases in the states'."""
    flat = [w.contiguous() for direction in weights for w in direction if w is not None]
    wide = state_dtype(flat[0].dtype)
    return flat if wide == flat[0].dtype else [w.to(wide) if w.dim() == 1 else w for w in flat]

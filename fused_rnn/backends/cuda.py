"""The CUDA backend (csrc/cuda): scans that keep W_hh on chip for the whole sequence, and for layers
too large for that a product and a pointwise kernel per step.

`cuda_emulated` runs the very same kernel sources on the CPU, thread by thread: it exists for tests,
is slow, and is used only where it is asked for by name.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import native
from ..cells import Cell, DirectionWeights, is_half
from ..problem import LayerInputs, Problem, Rows, Stack
from . import cuda_stack
from .base import (
    Backend,
    aligned,
    allocate_output,
    float32_precision,
    hidden_bias,
    is_relu_of_half,
)
from .bundles import (
    InputGrads,
    LayerOutput,
    Needs,
    OutputGrads,
    ScanGrads,
    StackInputs,
    StackOutput,
)
from .cuda_arguments import (
    current_stream,
    out_of_memory_as_in_torch,
    requested_chunk,
    requested_graph,
    requested_regime,
    row_tensors,
)

_GROUP = 8  # rows of matrices are a multiple of so many columns


class CudaBackend(Backend):
    name = "cuda"
    device_type = "cuda"
    has_stacks = True

    def takes_masks(self, problem: Problem) -> bool:
        return True

    def library_error(self) -> str | None:
        return native.cuda_library_error()

    @property
    def ops(self):
        return torch.ops.fused_rnn_cuda

    def unsupported(self, problem: Problem) -> str | None:
        if problem.device_type != self.device_type:
            return f"needs tensors on {self.device_type}, got {problem.device_type}"
        if problem.dtype != torch.float32 and not is_half(problem.dtype):
            return f"needs dtype float32, bfloat16 or float16, got {problem.dtype}"
        if problem.proj_size:
            return f"has no projection, got proj_size={problem.proj_size}"
        if problem.hidden_size == 0 or problem.batch_size == 0:
            return (
                "needs at least one hidden unit and one batch row, got "
                f"hidden_size={problem.hidden_size} and batch size {problem.batch_size}"
            )
        if error := self.library_error():
            return error
        if self.device_type == "cuda" and not torch.cuda.is_available():
            return "torch finds no GPU"
        try:
            return self.ops.refusal(*self._plan_arguments(problem)) or None
        except RuntimeError as error:  # a driver older than the library, say
            return f"the device cannot be used: {str(error).splitlines()[0]}"

    def describe(self, problem: Problem) -> str:
        stack = problem.stack
        at_once = [stack.layers if chunk else 1 for chunk in stack[1:]] if stack else []
        kernels = self.ops.describe(*self._plan_arguments(problem), *at_once)
        through = " in float32" if self.in_float32(problem) else ""
        if (through or problem.dtype == torch.float32) and float32_precision() == "tf32":
            through += " with TF32 products"
        together = cuda_stack.describe(stack, problem.training) if stack else ""
        return f"{self.name}/{kernels}{through}{together}"

    def _plan_arguments(self, problem: Problem) -> tuple:
        device = problem.gpu if self.device_type == "cuda" else 0
        return (
            problem.cell.index,
            4 if self.in_float32(problem) else problem.dtype.itemsize,
            problem.hidden_size,
            problem.batch_size,
            problem.directions,
            problem.training,
            requested_regime(),
            device,
        )

    def in_float32(self, problem: Problem) -> bool:
        return is_relu_of_half(problem)

    def stack(self, problem: Problem, layers: int, is_plain: bool) -> Stack | None:
        chunk = requested_chunk()
        if chunk == 0:
            return None
        if refusal := self._stack_refusal(problem, layers, is_plain):
            if chunk is None:
                return None
            raise ValueError(f"FUSED_RNN_CUDA_CHUNK: layers cannot run side by side: {refusal}")
        if chunk is not None:
            return Stack(layers, chunk, chunk)
        arguments = self._plan_arguments(problem), layers, problem.timesteps
        chunks = self.ops.stack_chunks(*arguments[0], *arguments[1:])
        return Stack(layers, *chunks) if any(chunks) else None

    def _stack_refusal(self, problem: Problem, layers: int, is_plain: bool) -> str:
        if not is_plain:
            return (
                "needs padded input and one direction, without lengths, resets, return_states, "
                "recompute or changes to the recurrence"
            )
        if self.in_float32(problem):
            return f"{problem.cell_name} in {problem.dtype} runs through float32"
        if problem.timesteps == 0:
            return "needs at least one timestep"
        arguments = self._plan_arguments(problem)
        return self.ops.stack_refusal(*arguments, layers, problem.timesteps)

    def layer_forward(self, problem: Problem, inputs: LayerInputs, save: bool) -> LayerOutput:
        cell, hidden = problem.cell, problem.hidden_size
        pad = _Padding(cell, hidden)
        scans = _Scans(self.ops, hidden)
        out = scans.layer_forward(pad.problem(problem), pad.inputs(inputs), save)
        return LayerOutput(
            y=pad.cut(out.y, problem.directions),
            h_n=pad.cut(out.h_n),
            c_n=pad.cut(out.c_n),
            gates=pad.cut(out.gates, cell.saved_gates),
            cells=pad.cut(out.cells),
        )

    def layer_backward(
        self,
        problem: Problem,
        grads: OutputGrads,
        inputs: LayerInputs,
        saved: LayerOutput,
        needs: Needs,
    ) -> InputGrads:
        cell, directions = problem.cell, problem.directions
        pad = _Padding(cell, problem.hidden_size)
        result = _Scans(self.ops, problem.hidden_size).layer_backward(
            pad.problem(problem),
            OutputGrads(
                pad.columns(grads.y, directions),
                pad.states(grads.h_n),
                pad.states(grads.c_n),
                pad.states(grads.cells),
            ),
            pad.inputs(inputs),
            LayerOutput(
                y=pad.columns(saved.y, directions),
                h_n=None,
                c_n=None,
                gates=pad.columns(saved.gates, cell.saved_gates),
                cells=pad.states(saved.cells),
            ),
            needs,
        )
        return result._replace(
            h0=pad.cut(result.h0),
            c0=pad.cut(result.c0),
            reset_h=pad.cut(result.reset_h),
            reset_c=pad.cut(result.reset_c),
            weights=pad.cut_weights(result.weights, directions),
        )

    def stack_forward(self, problem: Problem, inputs: StackInputs, save: bool) -> StackOutput:
        return cuda_stack.forward(self.ops, problem, inputs, save)

    def stack_backward(
        self,
        problem: Problem,
        grads: OutputGrads,
        inputs: StackInputs,
        saved: StackOutput,
        needs: Needs,
    ) -> InputGrads:
        return cuda_stack.backward(self.ops, problem, grads, inputs, saved, needs)


class CudaEmulatedBackend(CudaBackend):
    name = "cuda_emulated"
    device_type = "cpu"

    def library_error(self) -> str | None:
        return native.cuda_emulated_library_error()

    @property
    def ops(self):
        return torch.ops.fused_rnn_cuda_emulated


class _Padding:
    """Zero units up to a multiple of 8. Where hidden_size is one, everything stays as it is."""

    def __init__(self, cell: Cell, hidden: int):
        self.cell, self.hidden = cell, hidden
        self.extra = -hidden % _GROUP

    def problem(self, problem: Problem) -> Problem:
        if not self.extra:
            return problem
        return replace(problem, hidden_size=self.hidden + self.extra)

    def columns(self, values: Tensor | None, count: int) -> Tensor | None:
        """[..., count*H] padded to [..., count*(H + extra)]."""
        if values is None or not self.extra or not values.shape[-1]:
            return values
        return F.pad(values.unflatten(-1, (count, self.hidden)), (0, self.extra)).flatten(-2)

    def states(self, values: Tensor | None) -> Tensor | None:
        return self.columns(values, 1)

    def inputs(self, inputs: LayerInputs) -> LayerInputs:
        if not self.extra:
            return inputs
        x, weights, h0, c0, rows = inputs
        weights = [self.weights(w) for w in weights]
        return LayerInputs(x, weights, self.states(h0), self.states(c0), self.rows(rows))

    def rows(self, rows: Rows) -> Rows:
        masks = rows.masks
        if masks is None:
            return rows
        masks = masks._replace(
            reset_h=self.states(masks.reset_h), reset_c=self.states(masks.reset_c)
        )
        return Rows(rows.timesteps, rows.batch_size, None, rows.count, masks)

    def weights(self, w: DirectionWeights) -> DirectionWeights:
        gates = self.cell.gates
        return DirectionWeights(
            w_ih=self.columns(w.w_ih.t(), gates).t(),
            w_hh=self.states(self.columns(w.w_hh.t(), gates).t()),
            b_ih=self.columns(w.b_ih, gates),
            b_hh=self.columns(w.b_hh, gates),
        )

    def cut(self, values: Tensor | None, count: int = 1) -> Tensor | None:
        """The reverse of `columns`."""
        if values is None or not self.extra or not values.shape[-1]:
            return values
        # Dense, as compilers are told: of a single part flatten gives a view.
        return values.unflatten(-1, (count, -1))[..., : self.hidden].flatten(-2).contiguous()

    def cut_weights(self, grads: list[Tensor | None], directions: int) -> list[Tensor | None]:
        if not self.extra:
            return grads
        gates, per_direction = self.cell.gates, len(grads) // directions
        result = []
        for i, grad in enumerate(grads):
            if grad is not None:
                grad = self.cut(grad.t(), gates).t() if grad.dim() == 2 else self.cut(grad, gates)
                grad = self.cut(grad) if i % per_direction == 1 else grad  # w_hh
                grad = grad.contiguous()
            result.append(grad)
        return result


class _Scans(Backend):
    """The two scans, of layers whose rows are padded; `hidden` is their true hidden_size."""

    def __init__(self, ops, hidden: int):
        self.ops, self.hidden = ops, hidden

    @out_of_memory_as_in_torch()
    def scan_forward(
        self,
        problem: Problem,
        gx: Tensor,
        inputs: LayerInputs,
        save: bool,
    ) -> LayerOutput:
        _, weights, h0, c0, rows = inputs
        cell, wide = problem.cell, torch.float32
        out = allocate_output(problem, gx, save)
        out = out._replace(c_n=torch.empty_like(out.c_n, dtype=wide))
        self.ops.scan_forward(
            cell.index,
            gx,
            [aligned(w.w_hh) for w in weights],
            hidden_bias(cell, weights),
            aligned(h0),
            aligned(c0, wide),
            self.hidden,
            *row_tensors(rows, gx, wide),
            *out,
            requested_regime(),
            float32_precision() == "tf32",
            requested_graph(),
            current_stream(gx),
        )
        return out._replace(c_n=out.c_n.to(problem.dtype))

    @out_of_memory_as_in_torch()
    def scan_backward(
        self, problem: Problem, grads: OutputGrads, inputs: LayerInputs, saved: LayerOutput
    ) -> ScanGrads:
        _, weights, h0, c0, rows = inputs
        cell, pitch, wide = problem.cell, problem.hidden_size, torch.float32
        y = aligned(saved.y)
        grad_gates = y.new_empty((problem.directions, y.shape[0], cell.grad_gates * pitch))
        grad_h0 = y.new_empty(h0.shape, dtype=wide)
        grad_c0 = y.new_empty((*h0.shape[:2], pitch * cell.has_c), dtype=wide)
        fresh = (rows.masks.reset_h, rows.masks.reset_c) if rows.masks else (None, None)
        grad_reset_h, grad_reset_c = (
            None if state is None else y.new_zeros(state.shape, dtype=wide) for state in fresh
        )
        self.ops.scan_backward(
            cell.index,
            aligned(grads.y),
            aligned(grads.h_n, wide),
            aligned(grads.c_n, wide),
            aligned(grads.cells, wide),
            [aligned(w.w_hh) for w in weights],
            aligned(h0),
            aligned(c0, wide),
            self.hidden,
            *row_tensors(rows, y, wide),
            y,
            aligned(saved.gates),
            aligned(saved.cells),
            grad_gates,
            grad_h0,
            grad_c0,
            grad_reset_h,
            grad_reset_c,
            requested_regime(),
            float32_precision() == "tf32",
            requested_graph(),
            current_stream(y),
        )
        return ScanGrads(
            grad_gates,
            grad_h0,
            grad_c0 if cell.has_c else None,
            reset_h=grad_reset_h,
            reset_c=grad_reset_c,
        )

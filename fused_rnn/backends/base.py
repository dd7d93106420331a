"""The backend interface, and the whole-sequence matrix products around a scan.

A backend implements `scan_forward` and `scan_backward`, the part that is sequential in time,
and inherits the input projection and the weight gradients; one that does better fused may
override `layer_forward` and `layer_backward`.

Shapes: D directions, T timesteps, B batch, N rows (T*B when padded), I input_size,
H hidden_size, P output size, G gates, S = cell.saved_gates, Q = cell.grad_gates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..cells import Cell, DirectionWeights, equal_parts, is_half, state_dtype
from ..problem import LayerInputs, Problem, Rows, Stack
from . import pieces
from .bundles import (
    InputGrads,
    LayerOutput,
    Needs,
    OutputGrads,
    ScanGrads,
    StackInputs,
    StackOutput,
)


def allocate_output(problem: Problem, gx: Tensor, save: bool) -> LayerOutput:
    """Outputs to be filled for a layer with input-side gates `gx` [D, N, G*H].

    Where a cell saves as many gates as it has, `gx` itself becomes the saved gates: each
    element is read before it is written, and the memory is half.
    """
    cell, directions, dtype = problem.cell, problem.directions, problem.dtype
    hidden, out, batch = problem.hidden_size, problem.output_size, problem.batch_size
    count = gx.shape[1]
    gates = gx
    if not save or cell.saved_gates != cell.gates:
        gates = gx.new_empty((directions, count, hidden * cell.saved_gates if save else 0))
    return LayerOutput(
        y=gx.new_empty((count, directions * out), dtype=dtype),
        h_n=gx.new_empty((directions, batch, out), dtype=dtype),
        c_n=gx.new_empty((directions, batch, hidden if cell.has_c else 0), dtype=dtype),
        gates=gates,
        cells=gx.new_empty(
            (directions, count, hidden if problem.keeps_cells(save) else 0),
            dtype=state_dtype(dtype),
        ),
    )


class Backend:
    """One way of computing a recurrent layer."""

    name: str
    device_type: str | None = None  # where its tensors have to be; None: anywhere
    extras: frozenset[str] = frozenset()  # those of Problem.extras that its layers have
    has_stacks = False  # whether it can run the layers of a stack side by side

    def unsupported(self, problem: Problem) -> str | None:
        """Why this backend cannot take the problem, or None if it can."""
        raise NotImplementedError

    def only_by_name(self, problem: Problem) -> str | None:
        """Why this backend is not chosen for a problem it can take, unless it is asked for by
        name; None if it may be."""
        return None

    def has_extras(self, problem: Problem) -> bool:
        """Whether its layers have what the problem's recurrence has beyond the cell's own."""
        return self.extras.issuperset(problem.extras)

    def describe(self, problem: Problem) -> str:
        """Which kernel would run, in a few words."""
        return self.name

    def in_float32(self, problem: Problem) -> bool:
        """Whether a layer of a half type is computed in float32, and rounded where it leaves."""
        return False

    def takes_masks(self, problem: Problem) -> bool:
        """Whether its layers look at rows.masks; else they get packed pieces, for which the host
        has to know what masks say: on the CPU only."""
        return problem.device_type != "cpu"

    def forward(self, problem: Problem, inputs: LayerInputs, save: bool) -> LayerOutput:
        """`layer_forward` on any rows, of any dtype there is.

        Raises:
            RuntimeError: lengths do not lie within the sequence.
        """
        run = self.layer_forward
        if self.in_float32(problem):
            run = partial(forward_in_float32, run)
        if not (problem.lengths or problem.resets):
            return run(problem, inputs, save)
        inputs.rows.masks.check(problem.timesteps)
        if self.takes_masks(problem):
            return run(problem, inputs, save)
        return pieces.forward_in_pieces(run, problem, inputs, save)

    def backward(
        self,
        problem: Problem,
        grads: OutputGrads,
        inputs: LayerInputs,
        saved: LayerOutput,
        needs: Needs,
    ) -> InputGrads:
        """The backward of `forward`."""
        run = self.layer_backward
        if self.in_float32(problem):
            run = partial(backward_in_float32, run)
        if (problem.lengths or problem.resets) and not self.takes_masks(problem):
            run = partial(pieces.backward_in_pieces, run)
        result = run(problem, grads, inputs, saved, needs)
        # Beside matrices of a half type there are peepholes and gains in float32.
        given = (w for direction in inputs.weights for w in direction if w is not None)
        return result._replace(
            weights=[
                None if grad is None else grad.to(w.dtype)
                for grad, w in zip(result.weights, given, strict=True)
            ]
        )

    def scan_forward(
        self,
        problem: Problem,
        gx: Tensor,  # [D, N, G*H] input-side pre-activations, owned by the callee
        inputs: LayerInputs,
        save: bool,
    ) -> LayerOutput:
        """Runs the recurrence. gx holds W_ih x and every bias that adds to it, see `gate_bias`;
        `inputs.x` is not looked at."""
        raise NotImplementedError

    def scan_backward(
        self, problem: Problem, grads: OutputGrads, inputs: LayerInputs, saved: LayerOutput
    ) -> ScanGrads:
        """Runs the recurrence backwards, leaving everything in `saved` as it was."""
        raise NotImplementedError

    def layer_forward(self, problem: Problem, inputs: LayerInputs, save: bool) -> LayerOutput:
        x, weights = inputs.x, inputs.weights
        gx = x.new_empty((len(weights), x.shape[0], weights[0].w_ih.shape[0]))
        for direction, w in enumerate(weights):
            bias = gate_bias(problem.cell, w)
            if bias is None:
                torch.mm(x, w.w_ih.t(), out=gx[direction])
            else:
                torch.addmm(bias, x, w.w_ih.t(), out=gx[direction])
        return self.scan_forward(problem, gx, inputs, save)

    def layer_backward(
        self,
        problem: Problem,
        grads: OutputGrads,
        inputs: LayerInputs,
        saved: LayerOutput,
        needs: Needs,
    ) -> InputGrads:
        scan = self.scan_backward(problem, grads, inputs, saved)
        return input_grads(problem, scan, inputs, saved, needs)

    def stack(self, problem: Problem, layers: int, is_plain: bool) -> Stack | None:
        """How a stack of such layers runs side by side, None where they follow one another.

        `is_plain`: whether it is of one direction, padded, and asks for nothing but y, h_n and c_n.

        Raises:
            ValueError: the user forces it, and it cannot be.
        """
        return None

    def stack_forward(
        self,
        problem: Problem,  # of its first layer, with `stack`
        inputs: StackInputs,
        save: bool,
    ) -> StackOutput:
        """Runs a stack of layers side by side; for a backend whose `stack` gives something."""
        raise NotImplementedError

    def stack_backward(
        self,
        problem: Problem,
        grads: OutputGrads,  # y of the last layer [N, H], h_n and c_n of all [L, B, H]
        inputs: StackInputs,
        saved: StackOutput,
        needs: Needs,
    ) -> InputGrads:
        raise NotImplementedError


def input_grads(
    problem: Problem,
    scan: ScanGrads,
    inputs: LayerInputs,
    saved: LayerOutput,
    needs: Needs,
) -> InputGrads:
    """The gradients of a layer's inputs, from what its backward scan gave."""
    cell, weights = problem.cell, inputs.weights
    x = without_padding(inputs.x, inputs.rows)
    grad_x = None
    grad_weights: list[Tensor | None] = []
    of_directions = zip(weights, equal_parts(needs.weights, len(weights)), strict=True)
    for direction, (w, need) in enumerate(of_directions):
        need = iter(need)
        grad_gates = scan.gates[direction]
        grad_in = input_side(cell, grad_gates)  # [N, G*H]
        if needs.x:
            # Not addmm: starting from the other sum costs exactness.
            part = grad_in @ w.w_ih
            grad_x = part if grad_x is None else grad_x.add_(part)
        grad_weights.append(grad_in.t() @ x if next(need) else None)
        grad_weights.append(
            recurrent_weight_grad(cell, grad_gates, inputs, saved, direction)
            if next(need)
            else None
        )
        if w.b_ih is not None:
            need_ih, need_hh = next(need), next(need)
            sums = grad_gates.sum(0) if need_ih or need_hh else None
            grad_weights.append(input_side(cell, sums).clone() if need_ih else None)
            grad_weights.append(hidden_order(cell, sums) if need_hh else None)
        if w.w_hr is not None:
            if next(need):
                hidden = saved.gates[direction].chunk(4, -1)[3] * saved.cells[direction].tanh()
                grad_weights.append(scan.h[direction].t() @ hidden)
            else:
                grad_weights.append(None)
        if w.peephole is not None:
            grad_weights.append(
                peephole_grad(scan, inputs, saved, direction) if next(need) else None
            )
    return collected(problem, scan, needs, grad_x, grad_weights)


def collected(
    problem: Problem,
    scan: ScanGrads,
    needs: Needs,
    grad_x: Tensor | None,
    grad_weights: list[Tensor | None],
) -> InputGrads:
    """All gradients of a layer's inputs, where they are needed: those of states are in `scan`."""
    states = (
        (scan.h0, needs.h0),
        (scan.c0, needs.c0),
        (scan.reset_h, needs.reset_h),
        (scan.reset_c, needs.reset_c),
    )
    h0, c0, *reset = (
        grad.to(problem.dtype) if need and grad is not None else None for grad, need in states
    )
    return InputGrads(grad_x, h0, c0, grad_weights, *reset)


def without_padding(x: Tensor, rows: Rows) -> Tensor:
    """x with zeros past the rows' lengths: there may be NaN, which not even a gradient of zero
    would keep out of a product."""
    if rows.masks is None or rows.masks.lengths is None:
        return x
    return torch.where(rows.masks.taken(rows.timesteps).flatten().unsqueeze(1), x, 0)


def peephole_grad(
    scan: ScanGrads, inputs: LayerInputs, saved: LayerOutput, direction: int
) -> Tensor:
    """[3*H] of an LSTM's peepholes: those of the gates i, f and o, times the c they saw."""
    rows = inputs.rows
    reset = None if rows.masks is None else rows.masks.reset_c
    reset = None if reset is None else reset[direction]
    after, noise = saved.cells[direction], rows.noise  # [N, H]
    before = rows.shift(after, inputs.c0[direction], direction == 1, reset)
    if noise.kept_c is not None or noise.part_c:  # o saw what the step by itself gave
        i, f, g, _ = saved.gates[direction].chunk(4, -1)
        after = f * before + i * g
    d_i, d_f, _, d_o = scan.gates[direction].chunk(4, -1)
    return torch.cat([(d * c).sum(0) for d, c in ((d_i, before), (d_f, before), (d_o, after))])


def aligned(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """Dense, and where 16 bytes may be copied at a time, which Triton compiles kernels of their own
    for; as `dtype` if it is given."""
    if tensor is None:
        return None
    dense = tensor if dtype in (None, tensor.dtype) else tensor.to(dtype)
    if not dense.is_contiguous():
        dense = dense.contiguous()
    return dense.clone() if dense.data_ptr() % 16 else dense


def float32_precision() -> str:
    """The precision of float32 products on a GPU, as the user told torch for its own: "ieee" or
    "tf32"."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def is_relu_of_half(problem: Problem) -> bool:
    """Whether rounding h costs gradients: relu's jumps where a rounded h, as an operand of the
    products, turns the sign of a sum near zero. In float32 it jumps less often."""
    return problem.cell_name == "rnn_relu" and is_half(problem.dtype)


def forward_in_float32(
    forward: Callable[..., LayerOutput],  # a layer_forward that takes float32
    problem: Problem,
    inputs: LayerInputs,
    save: bool,
) -> LayerOutput:
    """A half type's layer, rounded where it leaves `forward`; what is saved as the problem says."""
    wide = torch.float32
    out = forward(replace(problem, dtype=wide), LayerInputs(*_cast(wide, *inputs)), save)
    y, h_n, c_n = _cast(problem.dtype, out.y, out.h_n, out.c_n)
    return LayerOutput(y, h_n, c_n, out.gates.to(problem.saved_dtype), out.cells)


def backward_in_float32(
    backward: Callable[..., InputGrads],  # a layer_backward that takes float32
    problem: Problem,
    grads: OutputGrads,
    inputs: LayerInputs,
    saved: LayerOutput,
    needs: Needs,
) -> InputGrads:
    """The backward of `forward_in_float32`."""
    wide = torch.float32
    result = backward(
        replace(problem, dtype=wide),
        OutputGrads(*_cast(wide, *grads)),
        LayerInputs(*_cast(wide, *inputs)),
        LayerOutput(*_cast(wide, *saved)),
        needs,
    )
    narrow = InputGrads(*_cast(problem.dtype, *result._replace(weights=None)))
    return narrow._replace(weights=result.weights)


def _cast(dtype: torch.dtype, *values):
    """The same nest of lists and tuples with every tensor in `dtype`."""
    return tuple(_cast_one(dtype, value) for value in values)


def _cast_one(dtype: torch.dtype, value):
    if isinstance(value, Tensor):
        return value.to(dtype)
    if isinstance(value, DirectionWeights):
        return DirectionWeights(*_cast(dtype, *value))
    if isinstance(value, list):
        return [_cast_one(dtype, item) for item in value]
    return value


def gate_bias(cell: Cell, w: DirectionWeights) -> Tensor | None:
    """[G*H] the biases that add directly to gx: all of them but GRU's b_hn, which r multiplies."""
    if w.b_ih is None:
        return None
    if not cell.gates_b_hn:
        return w.b_ih + w.b_hh
    hidden = w.w_hh.shape[0] // 3
    bias = w.b_ih.clone()
    bias[: 2 * hidden] += w.b_hh[: 2 * hidden]
    return bias


def hidden_bias(cell: Cell, weights: list[DirectionWeights]) -> Tensor | None:
    """float32 [D, H] GRU's b_hn; None for other cells and without biases."""
    if not cell.gates_b_hn or weights[0].b_hh is None:
        return None
    return torch.stack([w.b_hh.chunk(3)[2] for w in weights]).to(torch.float32)


def input_side(cell: Cell, grad_gates: Tensor) -> Tensor:
    """[..., G*H] the columns that face W_ih and b_ih, a view."""
    if cell.grads_are_shared:
        return grad_gates
    hidden = grad_gates.shape[-1] // 4
    return grad_gates.narrow(-1, hidden, 3 * hidden)


def hidden_side(cell: Cell, grad_gates: Tensor) -> Tensor:
    """[..., G*H] the columns that face W_hh and b_hh, a view; GRU in the order (n, r, z)."""
    if cell.grads_are_shared:
        return grad_gates
    return grad_gates.narrow(-1, 0, grad_gates.shape[-1] // 4 * 3)


def hidden_order(cell: Cell, grad_gates: Tensor) -> Tensor:
    """[..., G*H] `hidden_side` in torch's gate order: of a GRU a copy, else a view."""
    side = hidden_side(cell, grad_gates)
    return side if cell.grads_are_shared else side.roll(-(side.shape[-1] // 3), -1)


def recurrent_weight_grad(
    cell: Cell,
    grad_gates: Tensor,  # [N, Q*H] of this direction
    inputs: LayerInputs,
    saved: LayerOutput,
    direction: int,
) -> Tensor:
    """[G*H, P] the gradient of W_hh."""
    grad = times_operands(cell, hidden_side(cell, grad_gates), inputs, saved, direction)
    return grad if cell.grads_are_shared else grad.roll(-(grad.shape[0] // 3), 0)


def times_operands(
    cell: Cell,
    side: Tensor,  # [N, G*H] of this direction
    inputs: LayerInputs,
    saved: LayerOutput,  # gates [D, N, S*H]
    direction: int,
) -> Tensor:
    """[G*H, P] the gradients of W_hh's products, transposed, times what these multiplied: the state
    each row started from."""
    rows, h0, out = inputs.rows, inputs.h0[direction], inputs.h0.shape[2]
    y = saved.y[:, direction * out : (direction + 1) * out]
    factor = rows.noise.h_factor
    count, batch, reverse = side.shape[0], rows.batch_size, direction == 1
    plain = rows.masks is None and factor is None
    if rows.packed or len(cell.products) > 1 or not plain:
        reset = None if rows.masks is None else rows.masks.reset_h
        reset = None if reset is None else reset[direction]
        before = rows.shift(y, h0, reverse, reset)
        if factor is not None:
            before = (before * rows.spread(factor[direction])).to(y.dtype)
        if len(cell.products) > 1:
            hidden = before.shape[1]
            rz, n = side.split((2 * hidden, hidden), 1)
            r = saved.gates[direction, :, :hidden]
            return torch.cat((rz.t() @ before, n.t() @ (r * before)))
        return side.t() @ before
    if reverse:
        grad = side[: count - batch].t() @ y[batch:]
        return grad.addmm_(side[count - batch :].t(), h0)
    grad = side[batch:].t() @ y[: count - batch]
    return grad.addmm_(side[:batch].t(), h0)

"""Exported programs for those who do not have this package: tables of decompositions.

torch.export keeps a layer as one operator, `fused_rnn::layer_forward`, which runs wherever this
package is imported. Each function here gives a table for `ExportedProgram.run_decompositions` that
puts something else in its place:

    core_aten            torch's core operators, for any runtime of exported programs
    onnx_operators       the standard ONNX operators, for torch.onnx.export of a program
    cpu_library          the C++ operator alone, for a process without Python
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import dispatch, flops, onnx, plain
from .cells import CELLS, state_dtype
from .layer_call import LayerCall, LayerResult, make_problem
from .native import cpu_library_error
from .once import once
from .transformed import is_dynamic

Decompositions = dict[torch._ops.OperatorBase, Callable]


def core_aten() -> Decompositions:
    """Turns each layer into operators of core ATen, one timestep after the other.

    As large as torch.nn's own decomposition, and as slow: for runtimes that know nothing else.

    Returns:
        A table that also holds torch's default decompositions.

    Raises:
        RuntimeError (`run_decompositions` does): the program has a dynamic number of timesteps,
            for which core ATen has no loop, or packed rows.

    Example:
        >>> import torch, fused_rnn
        >>> program = torch.export.export(fused_rnn.GRU(3, 4), (torch.randn(5, 2, 3),))
        >>> program = program.run_decompositions(core_aten())
        >>> any("fused_rnn" in str(node.target) for node in program.graph.nodes)
        False
    """
    return _table(_steps)


def onnx_operators() -> Decompositions:
    """Turns each layer into ONNX's LSTM, GRU or RNN, as torch.onnx.export of a module does.

    Returns:
        A table that holds nothing else: torch.onnx.export decomposes the rest.

    Raises:
        RuntimeError (`run_decompositions` does): the program has packed rows, a dtype that
            ONNX's operators do not take, or a dynamic number of timesteps of layers with layer
            normalisation, zoneout or recurrent dropout, which ONNX's do not have.

    Example:
        >>> import torch, fused_rnn
        >>> program = torch.export.export(fused_rnn.GRU(3, 4), (torch.randn(5, 2, 3),))
        >>> program = program.run_decompositions(onnx_operators())
        >>> # torch.onnx.export(program) now gives a GRU node
    """
    return {torch.ops.fused_rnn.layer_forward.default: _onnx_node}


def cpu_library() -> Decompositions:
    """Turns each float32 layer of padded rows into the C++ library's operator.

    What AOTInductor makes of the program runs in any process that has loaded the library
    (`fused_rnn.native.library_path()`), with or without Python. Other layers stay as they are.

    Returns:
        A table that also holds torch's default decompositions.

    Raises:
        RuntimeError: the library was not built.

    Example:
        >>> import torch, fused_rnn
        >>> program = torch.export.export(fused_rnn.GRU(3, 4), (torch.randn(5, 2, 3),))
        >>> program = program.run_decompositions(cpu_library())
        >>> torch._inductor.aoti_compile_and_package(program)  # doctest: +SKIP
    """
    if reason := cpu_library_error():
        raise RuntimeError(f"export.cpu_library: {reason}")
    return _table(_library_call)


def _table(decomposition: Callable) -> Decompositions:
    table = torch.export.default_decompositions()
    table[torch.ops.fused_rnn.layer_forward.default] = decomposition
    return table


def _steps(*arguments):
    call = LayerCall(*arguments)
    _padded("core_aten", call.batch_sizes)
    if is_dynamic(call.x.shape[0]):
        raise RuntimeError(
            "export.core_aten: input: expected a fixed number of timesteps, since core ATen has "
            "no loop, got a dynamic one; export the model with that dimension static"
        )
    return _as_operator(call, plain.of_call(call))


def _onnx_node(*arguments):
    call = LayerCall(*arguments)
    _padded("onnx_operators", call.batch_sizes)
    return _as_operator(call, onnx.layer(*call.inputs, call.states, call.noise))


def _library_call(*arguments):
    call = LayerCall(*arguments)
    problem = make_problem(*call.inputs, False, call.states, call.noise)
    unlike = problem.packed or problem.lengths or problem.resets or problem.states or problem.extras
    wanted = call.x.dtype == torch.float32 and not unlike
    if not wanted or dispatch.BACKENDS["cpu"].unsupported(problem) is not None:
        return NotImplemented
    _describe_operator()
    y, h_n, c_n = torch.ops.fused_rnn_cpu.layer(
        CELLS[call.cell].index,
        call.x.flatten(0, 1).contiguous(),
        [w.contiguous() for w in call.weights],
        call.h0.contiguous(),
        None if call.c0 is None else call.c0.contiguous(),
    )
    y = y.unflatten(0, (call.x.shape[0], call.x.shape[1]))
    return _as_operator(call, LayerResult(y, h_n, None if call.c0 is None else c_n))


@once
def _describe_operator() -> None:
    flops.register(torch.ops.fused_rnn_cpu.layer, flops.library_layer)

    @torch.library.register_fake("fused_rnn_cpu::layer")
    def _(cell, x, weights, h0, c0):
        directions, batch, out = h0.shape
        c_n = x.new_empty((directions, batch, 0)) if c0 is None else torch.empty_like(c0)
        return x.new_empty((x.shape[0], directions * out)), torch.empty_like(h0), c_n


def _padded(table: str, batch_sizes: Tensor | None) -> None:
    if batch_sizes is not None:
        raise RuntimeError(
            f"export.{table}: input: expected padded rows, got a PackedSequence, whose layout is "
            "known only when it runs"
        )


def _as_operator(call: LayerCall, out: LayerResult) -> tuple[Tensor, ...]:
    """A layer's results as `fused_rnn::layer_forward` returns them, with no gates saved."""
    x, directions = call.x, call.h0.shape[0]
    count = x.shape[0] * x.shape[1]
    gates = x.new_empty((directions, count, 0))
    cells = x.new_empty((directions, count, 0)) if out.cells is None else out.cells.flatten(1, 2)
    c_n = x.new_empty((directions, x.shape[1], 0)) if out.c_n is None else out.c_n
    return out.y, out.h_n, c_n, gates, cells.to(state_dtype(x.dtype))

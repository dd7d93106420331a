"""FLOPs as torch.utils.flop_counter counts them: those of the same products in torch operations."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers.needs import needs_library
from torch.utils.flop_counter import FlopCounterMode

import fused_rnn
from fused_rnn import export, ops, plain
from fused_rnn.cells import CELLS
from fused_rnn.testing import LayerCase, LayerInputs, make_inputs


def count(call, *args, **options) -> int:
    with FlopCounterMode(display=False) as counter:
        call(*args, **options)
    return counter.get_total_flops()


def run(function, inputs: LayerInputs, wanted: str) -> None:
    """A layer's call, with a backward to the tensors that `wanted` says."""
    leaves = inputs.leaves()
    choices = {
        "nothing": [],
        "all": [leaves.x, leaves.h0, *leaves.weights],
        "weights": leaves.weights,
        "x": [leaves.x],
        "w_hh": leaves.weights[1 :: len(leaves.weights) // leaves.h0.shape[0]],
    }
    for tensor in (leaves.x, leaves.h0, leaves.c0, *leaves.weights):
        if tensor is not None and not any(tensor is each for each in choices[wanted]):
            tensor.requires_grad_(False)
    y = function(*leaves.args).y
    if wanted != "nothing":
        torch.autograd.grad(y.sum(), choices[wanted])


CASES = {
    **{cell: LayerCase(cell, 4, 3, 5, 6) for cell in CELLS},
    "projection": LayerCase("lstm", 4, 3, 5, 6, proj_size=2),
    "both directions": LayerCase("lstm", 4, 3, 5, 6, directions=2, proj_size=2),
    "no biases": LayerCase("gru_reset_before", 4, 3, 5, 6, directions=2, bias=False),
    "one timestep": LayerCase("gru", 1, 3, 5, 6),
    "lengths": LayerCase("gru", 4, 3, 5, 6, ends=(2, 4, 1), directions=2),
    "resets": LayerCase("lstm", 4, 3, 5, 6, resets=True, directions=2),
}


@pytest.mark.parametrize("wanted", ["nothing", "all", "weights", "x", "w_hh"])
@pytest.mark.parametrize("name", CASES)
def test_a_layer_counts_as_its_equations(name, wanted):
    inputs = make_inputs(CASES[name])
    expected = count(run, plain.layer, inputs, wanted)
    assert expected > 0
    assert count(run, ops.layer, inputs, wanted) == expected


@pytest.mark.parametrize("wanted", ["nothing", "all", "weights"])
@pytest.mark.parametrize("directions", [1, 2])
def test_packed_rows_count_as_their_sequences(directions, wanted):
    packed = LayerCase.packed("lstm", [4, 2, 1], 5, 6, directions=directions, proj_size=2)
    alone = (replace(packed, batch_size=1, timesteps=t, lengths=()) for t in packed.lengths)
    expected = sum(count(run, plain.layer, make_inputs(case), wanted) for case in alone)
    assert count(run, ops.layer, make_inputs(packed), wanted) == expected


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_a_module_counts_as_torchs(kind):
    """In float64: in float32 torch.nn's LSTM counts as nothing on the CPU."""
    x = torch.randn(4, 3, 5, dtype=torch.float64)

    def train(library):
        module = getattr(library, kind)(5, 6, 2, bidirectional=True, dtype=torch.float64)
        module(x)[0].sum().backward()

    assert count(train, fused_rnn) == count(train, torch.nn) > 0


def test_recomputing_counts():
    x = torch.randn(4, 3, 5)
    module, thrifty = (fused_rnn.LSTM(5, 6, recompute=recompute) for recompute in (False, True))
    forward = count(module, x)

    def train(module):
        module(x)[0].sum().backward()

    assert count(train, thrifty) == count(train, module) + forward


def test_a_model_counts_wherever_it_runs():
    """By module in eager mode, exported, compiled, on meta."""
    module, x = fused_rnn.GRU(5, 6, 2, batch_first=True), torch.randn(3, 4, 5)
    model = torch.nn.Sequential(module)
    expected = 2 * 12 * 18 * (5 + 6 + 6 + 6)
    with FlopCounterMode(display=False) as counter:
        model(x)
    counts = counter.get_flop_counts()
    assert counts["Sequential.0"] == {torch.ops.fused_rnn.layer_forward: expected}
    with torch.no_grad():
        assert count(model, x) == expected
        program = torch.export.export(model, (x,)).module()
        assert count(program, x) == expected
        assert count(torch.compile(model, backend="aot_eager"), x) == expected
        operator = torch.ops.fused_rnn.infer_layers
        parameters = list(module.parameters())
        assert count(operator, x.mT.mT, None, None, parameters, "gru", 2, False) == expected
    assert count(model.to("meta"), x.to("meta")) == expected
    cell = fused_rnn.GRUCell(5, 6)
    assert count(cell, x[0]) == 2 * 4 * 18 * (5 + 6)


@needs_library
@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_operators_of_the_library_count(kind):
    options = {"proj_size": 2} if kind == "LSTM" else {}
    module = getattr(fused_rnn, kind)(5, 6, 2, **options).requires_grad_(False)
    x = torch.randn(1, 3, 5)
    expected = count(module, x)
    assert count(fused_rnn.stepper(module), x[0]) == expected
    program = torch.export.export(module, (x,)).run_decompositions(export.cpu_library())
    assert count(program.module(), x) == expected


def test_the_counter_may_be_imported_first():
    """In a process of its own: tests have imported fused_rnn before."""
    code = (
        "import torch, torch.utils.flop_counter, fused_rnn\n"
        "with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:\n"
        "    fused_rnn.RNNCell(3, 4)(torch.randn(2, 3))\n"
        "print(counter.get_total_flops())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 2 * 2 * 4 * (3 + 4)

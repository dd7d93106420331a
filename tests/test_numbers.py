"""Numbers out of the ordinary: NaN, infinity, denormal and huge ones, by each instruction set."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fused_rnn
from fused_rnn import testing
from fused_rnn.cells import CELLS
from fused_rnn.testing import LayerCase, LayerInputs

pytestmark = pytest.mark.usefixtures("instruction_set", "poisoned")

EPS = torch.finfo(torch.float32).eps
SMALLEST = 2.0**-149  # float32's denormal numbers are multiples of it


def _cases(cell: str) -> list[LayerCase]:
    """Few rows and many, padded and packed."""
    return [
        LayerCase(cell, 9, 3, 5, 130, directions=2),
        LayerCase(cell, 3, 12, 5, 33),
        LayerCase.packed(cell, [9, 3, 3, 1], 5, 33, directions=2),
    ]


every_cell = pytest.mark.parametrize("cell", CELLS)
every_case = pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=f"{cell}-{case}") for cell in CELLS for case in _cases(cell)],
)


def _results(inputs: LayerInputs, case: LayerCase, run=testing.run_layer) -> dict[str, Tensor]:
    return testing.results_and_grads(run, inputs.leaves(), testing.make_cotangents(case))


@every_case
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_go_where_torch_sends_them(case, value):
    for name in testing.make_inputs(case).tensors:
        inputs = testing.make_inputs(case)
        inputs.tensors[name].view(-1)[case.hidden_size // 2] = value
        actual, expected = (
            {f"{value} in {name}: {key}": tensor for key, tensor in results.items()}
            for results in (_results(inputs, case), _results(inputs, case, testing.run_torch))
        )
        testing.assert_same_numbers(actual, expected)


@every_case
def test_nan_stays_in_its_row(case, num_threads):
    num_threads(3)
    clean = _results(testing.make_inputs(case), case)
    infected = 1
    for name in ("x", "h0", "c0") if CELLS[case.cell].has_c else ("x", "h0"):
        inputs = testing.make_inputs(case)
        if name == "x":
            inputs.x.view(-1, case.input_size)[infected] = float("nan")  # in the first step
        else:
            inputs.tensors[name][:, infected] = float("nan")
        dirty = _results(inputs, case)
        assert dirty["y"].isnan().any(), name
        sizes = testing.batch_sizes_of(case.lengths or [case.timesteps] * case.batch_size)
        others = torch.cat([torch.arange(size) for size in sizes.tolist()]) != infected
        for key in ("y", "grad x"):
            rows, expected = (r[key].flatten(0, -2)[others] for r in (dirty, clean))
            assert torch.equal(rows, expected), f"NaN in {name}: {key}"
        others = torch.arange(case.batch_size) != infected
        for key in {"h_n", "c_n", "grad h0", "grad c0"} & clean.keys():
            states, expected = (r[key][:, others] for r in (dirty, clean))
            assert torch.equal(states, expected), f"NaN in {name}: {key}"


@every_cell
@pytest.mark.parametrize("denormal", [("x", "h0", "c0"), ("w_ih", "w_hh"), ("cotangents",)])
def test_denormal_numbers(cell, denormal):
    """They are numbers like others, only with fewer digits: nothing is flushed to zero."""
    case = LayerCase(cell, 3, 5, 7, 33, bias=False)
    inputs = testing.make_inputs(case)
    cotangents = testing.make_cotangents(case)
    for name, tensor in inputs.tensors.items():
        if name in denormal:
            tensor.mul_(1e-39)
    if "cotangents" in denormal:
        cotangents = {name: c * 1e-39 for name, c in cotangents.items()}
    run = testing.results_and_grads
    actual = run(testing.run_layer, inputs.leaves(), cotangents)
    assert torch.full((16,), 1e-39).mul(2).all(), "the calling thread was left flushing to zero"
    torch_own = run(testing.run_torch, inputs.leaves(), cotangents)
    expected = run(testing.run_oracle, inputs.leaves(torch.float64), cotangents)
    for name, value in expected.items():
        rounding = max(SMALLEST, EPS * value.abs().max().item())
        allowed = 2 * _distance(torch_own[name], value) + testing.ROUNDINGS * rounding
        assert _distance(actual[name], value) <= allowed, name


def _distance(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


@every_cell
def test_saturation(cell):
    """Gates of one input with weight 1, from where functions bend to where exp overflows and on."""
    largest = torch.finfo(torch.float32).max
    bends = torch.linspace(-120, 120, 2001)
    huge = torch.tensor([150.0, 1e3, 1e10, 1e30, largest])
    x = torch.cat((bends, huge, -huge))
    case = LayerCase(cell, 1, len(x), 1, 17)
    drawn = testing.make_inputs(case)
    w_ih, *others = drawn.weights
    weights = [torch.ones_like(w_ih), *(torch.zeros_like(w) for w in others)]
    inputs = replace(drawn, x=x.view(1, -1, 1), weights=weights)
    if cell == "rnn_relu":  # huge results, on which errors are measured, would hide the others
        inputs.x.clamp_(-120, 120)
    cotangents = testing.make_cotangents(case)
    run = testing.results_and_grads
    actual = run(testing.run_layer, inputs.leaves(), cotangents)
    torch_own = run(testing.run_torch, inputs.leaves(), cotangents)
    expected = run(testing.run_oracle, inputs.leaves(torch.float64), cotangents)
    testing.assert_accurate(actual, expected, torch_own, case)
    saturated = x.abs() >= 110
    # LSTM's h is the tanh of a c that two saturated gates leave anywhere. Relu's gradient does not
    # vanish, so that grad x is a sum, which rounds as it may.
    names = ["c_n" if CELLS[cell].has_c else "y", *(["grad x"] if cell != "rnn_relu" else [])]
    for name in names:
        assert torch.equal(actual[name][:, saturated], torch_own[name][:, saturated]), name


@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_long_sums_are_no_further_from_the_exact_ones_than_torchs(cell, instruction_set):
    """Of 512 to 2048 numbers forward and to the gradients of x and h0, of 1024 to the weights'.
    Chains of 256 for the latter had 1.4 times torch.nn's error; biases' are below."""
    if instruction_set == "amx":
        pytest.skip("its sums are of six products of parts, see docs/cpu-kernels.md")
    case = LayerCase(cell, 32, 32, 512, 512)
    exact = testing.results_of_draws(testing.run_oracle, case, dtype=torch.float64)
    torch_own = testing.results_of_draws(testing.run_torch, case)
    actual = testing.results_of_draws(testing.run_layer, case)
    for name in ("y", "grad x", "grad h0", "grad w_ih", "grad w_hh"):
        error, theirs = (testing.relative_error(r[name], exact[name]) for r in (actual, torch_own))
        assert error < 1.2 * theirs, name


def _grads_of_sum(module: torch.nn.Module, x: Tensor) -> dict[str, Tensor]:
    y, final = module(x)
    sum(out.sum() for out in torch.utils._pytree.tree_leaves((y, final))).backward()
    return {name: parameter.grad for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"peepholes": True}], ids=["", "peepholes"])
@pytest.mark.parametrize("cell", CELLS)
def test_sums_over_many_rows_do_not_stagnate(cell, options, num_threads):
    """A bias' gradient is a sum over all rows. Of one sign, as after a loss over outputs, one
    chain of float32 additions was some thousand roundings off."""
    if options and not CELLS[cell].has_c:
        pytest.skip("peepholes are LSTM's")
    num_threads(2)
    module = testing.make_module(cell, 1, 2, **options)
    exact, x = copy.deepcopy(module).double(), torch.rand(2, 40_000, 1)
    found = _grads_of_sum(module, x)
    with fused_rnn.backend("reference"):
        expected = _grads_of_sum(exact, x.double())
    for name, grad in found.items():
        if "bias" in name or "peephole" in name:
            assert testing.relative_error(grad, expected[name]) < 4 * EPS, name

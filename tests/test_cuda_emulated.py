"""The CUDA kernels' sources on the CPU, one fiber per thread: right whatever the threads' order.

A seed is one random course of events: which thread runs, which warps starve, when copies and
messages arrive. Shared memory and outputs start as NaN, deadlocks and messages to a CTA that has
left are errors. tests/test_emulator.py shows which mistakes are found.
"""

import ctypes
import functools
import mmap
from dataclasses import replace

import pytest
import torch
from helpers.cuda import (
    BACKEND,
    DTYPES,
    KERNELS,
    assert_accurate_with_every_seed,
    assert_tf32_accurate,
    case_params,
    run_emulated,
    scan_arguments,
    tf32,
)
from helpers.outcomes import flat

import fused_rnn
from fused_rnn import dispatch, testing
from fused_rnn.cells import CELLS
from fused_rnn.layer_call import make_problem
from fused_rnn.testing import LayerCase

CELL_DTYPES = dict.fromkeys(KERNELS, DTYPES)


@pytest.fixture(autouse=True)
def library(cuda_emulated, monkeypatch):
    monkeypatch.setenv("FUSED_RNN_CUDA_REGIME", "cluster")
    return cuda_emulated


def _cases(cell: str) -> list[LayerCase]:
    """One for each kernel there is to emulate, at sizes that fill none of them."""
    case, packed = functools.partial(LayerCase, cell), functools.partial(LayerCase.packed, cell)
    every_mask = {"resets": True, "reset_states": True, "states": CELLS[cell].has_c}
    return [
        case(5, 3, 4, 13),
        case(6, 9, 4, 29, directions=2),
        case(4, 30, 4, 32),
        case(3, 5, 4, 50, bias=False),
        packed([7, 4, 4, 1], 3, 33, directions=2),
        packed([3, 1, 1, 1, 1, 1, 1, 1, 1, 1], 3, 24, directions=2),
        case(1, 1, 1, 1),
        case(6, 11, 3, 32, ends=(6, 0, 3, 1, 5, 2, 2, 4, 0, 1, 3), directions=2),
        case(7, 5, 3, 21, ends=(3, 0, 5, 1, 5), directions=2, **every_mask),
        case(6, 3, 2, 9, resets=True, states=CELLS[cell].has_c),
    ]


def _slow_cases(cell: str) -> list[LayerCase]:
    case, packed = functools.partial(LayerCase, cell), functools.partial(LayerCase.packed, cell)
    return [
        *(case(t, b, 3, h, directions=2) for t in (2, 9) for b in (1, 17) for h in (8, 17, 31, 64)),
        *(packed(lengths, 3, h) for lengths in ([9, 8, 1], [2] * 20 + [1]) for h in (16, 40)),
    ]


@pytest.mark.parametrize(
    ("case", "seeds"),
    [
        *case_params(CELL_DTYPES, _cases, 2),
        *case_params(CELL_DTYPES, _cases, 16, [pytest.mark.slow]),
        *case_params(CELL_DTYPES, _slow_cases, 8, [pytest.mark.slow]),
    ],
)
def test_accuracy(case, seeds):
    assert_accurate_with_every_seed(case, seeds)


@pytest.mark.parametrize("cell", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_row_has_the_same_bits_in_every_batch(cell, dtype):
    """Clusters of 8 and of 16 rows add up in the same order."""
    case = LayerCase(cell, 3, 30, 5, 31, dtype=dtype)
    inputs = testing.make_inputs(case)
    # The input projection is torch's, whose sums may depend on the batch.
    inputs = replace(inputs, x=inputs.x.round(), weights=[w.clone() for w in inputs.weights])
    inputs.weights[0].zero_()
    few = replace(inputs, x=inputs.x[:, :3], h0=inputs.h0[:, :3])
    if inputs.c0 is not None:
        few = replace(few, c0=inputs.c0[:, :3])
    with fused_rnn.backend(BACKEND):
        many_y, few_y = testing.run_layer(inputs)[0], testing.run_layer(few)[0]
    assert torch.equal(many_y[:, :3], few_y)


@pytest.mark.parametrize("cell", KERNELS)
def test_inference_gives_the_same_numbers_as_training(cell):
    inputs = testing.make_inputs(LayerCase(cell, 4, 3, 5, 20, directions=2))
    with fused_rnn.backend(BACKEND):
        training = testing.run_layer(inputs.leaves())
        with torch.no_grad():
            inference = testing.run_layer(inputs)
    for a, b in zip(training, inference, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("hidden", [16, 20])
def test_inference_gives_every_steps_c_alone(hidden):
    case = LayerCase("lstm", 4, 3, 5, hidden, directions=2, ends=(4, 2, 0), states=True)
    inputs = testing.make_inputs(case)
    expected = testing.run_oracle(inputs.leaves(torch.float64))
    with torch.no_grad(), testing.poisoned_memory(), fused_rnn.backend(BACKEND):
        actual = testing.run_layer(inputs)
        gates = torch.ops.fused_rnn.layer_forward(*inputs.forward_args(False, BACKEND))[3]
    for ours, theirs in zip(actual, expected, strict=True):
        testing.assert_near("states", ours, theirs, 1e-5, 1e-5)
    assert gates.numel() == 0


@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_outputs_are_dense_where_units_are_padded(cell):
    """As the operator's fake implementation says, which torch.compile believes."""
    inputs = testing.make_inputs(LayerCase(cell, 3, 2, 4, 5, directions=2))
    with fused_rnn.backend(BACKEND):
        outputs = testing.run_layer(inputs.leaves())
    assert all(output.is_contiguous() for output in outputs)


def test_whole_modules_run_through_it(monkeypatch):
    monkeypatch.setenv("FUSED_RNN_BACKEND", BACKEND)
    module = fused_rnn.LSTM(5, 12, num_layers=2, bidirectional=True, batch_first=True)
    expected = torch.nn.LSTM(5, 12, num_layers=2, bidirectional=True, batch_first=True)
    expected.load_state_dict(module.state_dict())
    x = torch.randn(3, 4, 5)
    actual, wanted = module(x)[0], expected(x)[0]
    torch.testing.assert_close(actual, wanted)
    actual.sum().backward()
    wanted.sum().backward()
    for (name, ours), theirs in zip(module.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=lambda m, n=name: f"{n}: {m}")
    lines = str(fused_rnn.explain(module, x))
    assert "cuda_emulated/scan H<=16 on clusters of 1, 8 rows each" in lines


def test_autocast_ends_where_a_layer_runs_in_float32():
    module = fused_rnn.RNN(5, 16, nonlinearity="relu", bidirectional=True)
    with fused_rnn.backend(BACKEND):
        testing.assert_float32_under_autocast(module, torch.randn(6, 3, 5))


@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_gradients_without_memory(cell):
    """torch.sgn's backward gives zeros that have none."""
    module = testing.make_module(cell, input_size=5, hidden_size=8)
    with fused_rnn.backend(BACKEND):
        y, states = module(torch.randn(3, 2, 5))
        loss = sum(output.sgn().sum() for output in flat((y, states)))
        grads = torch.autograd.grad(loss, list(module.parameters()))
    assert all(grad.count_nonzero() == 0 for grad in grads)


@pytest.mark.parametrize("regime", ["cluster", "grid", "steps"])
def test_nothing_is_read_before_the_resets(regime, monkeypatch):
    """Of rows without any step. A page that nobody may read lies before them."""
    monkeypatch.setenv("FUSED_RNN_CUDA_REGIME", regime)
    memory, libc = mmap.mmap(-1, 2 * mmap.PAGESIZE), ctypes.CDLL(None)
    start = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
    nobody = 0  # PROT_NONE
    assert libc.mprotect(start, ctypes.c_size_t(mmap.PAGESIZE), nobody) == 0
    resets = torch.frombuffer(memory, dtype=torch.bool, count=4 * 3, offset=mmap.PAGESIZE)
    layer, x = fused_rnn.LSTM(3, 16, bidirectional=True), torch.randn(4, 3, 3)
    with fused_rnn.backend(BACKEND):
        y, _ = layer(x, lengths=torch.zeros(3, dtype=torch.int64), resets=resets.view(4, 3))
        y.sum().backward()
    assert y.count_nonzero() == 0


def test_only_who_asks_gets_it(monkeypatch):
    monkeypatch.delenv("FUSED_RNN_BACKEND", raising=False)
    problem = make_problem(*testing.make_inputs(LayerCase("gru", 3, 2, 4, 5)).args, True)
    assert BACKEND not in dict(dispatch.reasons(problem))
    assert dispatch.select(problem).name != BACKEND
    assert dispatch.select(problem, BACKEND).name == BACKEND


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (LayerCase("lstm", 3, 2, 4, 5, dtype=torch.float64), "float64"),
        (LayerCase("lstm", 3, 2, 4, 5, proj_size=2), "proj_size=2"),
        (LayerCase("gru", 3, 0, 4, 5), "batch size 0"),
    ],
    ids=str,
)
def test_what_it_cannot_take_has_a_reason(case, reason):
    with (
        fused_rnn.backend(BACKEND),
        pytest.raises(fused_rnn.UnsupportedProblemError, match=reason),
    ):
        testing.run_layer(testing.make_inputs(case))


# ---- TF32, where the user lets torch have it.


def _tf32_cases(cell: str) -> list[LayerCase]:
    case, packed = functools.partial(LayerCase, cell), functools.partial(LayerCase.packed, cell)
    return [
        case(5, 3, 4, 13, directions=2),
        case(4, 30, 4, 32),
        case(3, 5, 4, 50, bias=False),
        packed([7, 4, 4, 1], 3, 33, directions=2),
        # With 21 units TF32 turns the sign of a sum, and with it a gradient of relu.
        case(7, 5, 3, 23, ends=(3, 0, 5, 1, 5), directions=2, resets=True),
    ]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=f"{cell}-{case}") for cell in KERNELS for case in _tf32_cases(cell)],
)
def test_tf32_is_as_accurate_as_float16(case):
    with tf32():
        results = [run_emulated(case, seed) for seed in range(2)]
    assert_tf32_accurate(results[0], case)
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), f"seed 1: other bits in {name}"


def test_explain_says_which_products():
    layer, x = fused_rnn.LSTM(3, 12), torch.randn(2, 1, 3)
    with fused_rnn.backend(BACKEND):
        assert "TF32" not in str(fused_rnn.explain(layer, x))
        with tf32():
            assert "8 rows each with TF32 products" in str(fused_rnn.explain(layer, x))


# ---- FUSED_RNN_LOG=1 and a GPU that is shared.


def test_the_log_names_kernels_and_problems(monkeypatch, capfd):
    monkeypatch.setenv("FUSED_RNN_LOG", "1")
    inputs = testing.make_inputs(LayerCase("gru", 3, 2, 5, 12, dtype=torch.bfloat16)).leaves()
    with fused_rnn.backend(BACKEND):
        testing.run_layer(inputs)[0].sum().backward()
    lines = capfd.readouterr().err.splitlines()
    assert lines == [
        "fused_rnn: forward of gru BFloat16 T=3 B=2 H=12 D=1: "
        "scan H<=16 on clusters of 1, 8 rows each",
        "fused_rnn: backward of gru BFloat16 T=3 B=2 H=12 D=1: "
        "scan H<=16 on clusters of 1, 8 rows each; back H<=16 on clusters of 1, 8 rows each",
    ]


@pytest.mark.parametrize("value", ["", "0"])
def test_there_is_no_log_unless_it_is_wanted(value, monkeypatch, capfd):
    monkeypatch.setenv("FUSED_RNN_LOG", value)
    with fused_rnn.backend(BACKEND):
        testing.run_layer(testing.make_inputs(LayerCase("gru", 3, 2, 5, 12)))
    assert capfd.readouterr().err == ""


def test_a_gpu_that_is_shared_gets_no_scan_across_the_grid(library, monkeypatch):
    """But the next regime, and a reason where the grid is forced."""
    inputs = testing.make_inputs(LayerCase("lstm", 3, 2, 4, 90))
    library.device(90, 6, 16, True)  # capability, SMs, CTAs of a cluster, whether it is shared
    try:
        monkeypatch.setenv("FUSED_RNN_CUDA_REGIME", "")
        problem = make_problem(*inputs.args, True)
        assert "scan a product per step" in dispatch.find(BACKEND).describe(problem)
        monkeypatch.setenv("FUSED_RNN_CUDA_REGIME", "grid")
        with (
            fused_rnn.backend(BACKEND),
            pytest.raises(
                fused_rnn.UnsupportedProblemError, match=r"other processes share \(MPS\)"
            ),
        ):
            testing.run_layer(inputs)
    finally:
        library.device(90, 6, 16)


# ---- Bad input, at the operators' border.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cell": 5}, "cell: expected 0 to 4, got 5"),
        ({"regime": "grids"}, "regime: expected cluster, grid, steps or nothing, got grids"),
        ({"gx": torch.zeros(1, 6, 64).double()}, "gx: expected dtype .*got Double"),
        ({"gx": torch.zeros(1, 6, 63)}, r"gx: expected shape \[1, 6, 64\], got \[1, 6, 63\]"),
        ({"gx": torch.zeros(6, 64)}, "gx: expected"),
        ({"gx": torch.zeros(1, 5, 64)}, "gx: expected a multiple of the batch size 3"),
        ({"w_hh": []}, "w_hh: expected 1 matrices, got 0"),
        ({"w_hh": [torch.zeros(16, 64).t()]}, "w_hh: expected a contiguous tensor"),
        ({"h0": torch.zeros(1, 3, 16).half()}, "h0: expected dtype Float, got Half"),
        ({"h0": torch.zeros(3, 3, 16)}, "h0: expected 1 or 2 directions, got 3"),
        ({"h0": torch.zeros(1, 3, 15)}, "h0: expected rows of a multiple of 8 columns"),
        ({"h0": torch.zeros(1, 0, 16)}, "h0: expected at least one batch row"),
        ({"c0": None}, "c0: expected a tensor for lstm"),
        ({"hidden_size": 17}, "h0: expected rows of a multiple of 8 columns"),
        ({"lengths": torch.zeros(2).long()}, r"lengths: expected shape \[3\], got \[2\]"),
        ({"lengths": torch.zeros(3)}, "lengths: expected dtype Long, got Float"),
        ({"offsets": torch.zeros(2).long()}, "offsets: packed rows need lengths"),
        ({"resets": torch.zeros(2, 2).bool()}, r"resets: expected shape \[2, 3\]"),
        ({"y": torch.zeros(97)[1:].view(6, 16)}, "y: expected memory aligned to 16 bytes"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments(library, changes, message):
    with pytest.raises(RuntimeError, match=message):
        library.scan_forward(*scan_arguments(**changes).values())

"""The Triton kernels in Triton's interpreter: whole layers against the float64 oracle."""

import copy
import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.pairs import pairs, params
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_padded_sequence
from triton_interpreter import interpreter_or_skip

import fused_rnn
from fused_rnn import ops, testing
from fused_rnn.backends.triton import plan as planner
from fused_rnn.backends.triton import tune
from fused_rnn.cells import CELLS
from fused_rnn.problem import Problem
from fused_rnn.testing import LayerCase

interpreter_or_skip()

from fused_rnn.backends.triton import launch  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned")

HALF = (torch.bfloat16, torch.float16)
KERNELS = tuple(CELLS)


@pytest.fixture(autouse=True)
def _by_name(monkeypatch):
    monkeypatch.setenv("FUSED_RNN_BACKEND", "triton")


def _fast_cases(cell):
    """(regime, case): one tile and several, of units and of rows; "" leaves it to the planner. Of
    small gradients several draws are compared, each of which takes the interpreter seconds: inputs
    are as many as that takes, and biases of RNNs, which the products outside bring, are in one."""
    case, packed = functools.partial(LayerCase, cell), functools.partial(LayerCase.packed, cell)
    bias = CELLS[cell].gates > 1
    cases = [
        ("program", case(4, 3, 5, 11, directions=2, bias=bias)),
        ("program", packed([4, 2, 1], 5, 18, directions=2, bias=False)),
        ("grid", case(2, 17, 5, 20, bias=bias)),
        ("grid", packed([3, 2], 7, 20, directions=2, bias=bias)),
        ("steps", case(2, 3, 6, 33, directions=2, bias=False)),
        ("steps", packed([3, 2], 7, 16, bias=bias)),
        ("", case(2, 2, 8, 100)),
        ("", case(1, 18, 40, 3, bias=bias)),
        ("", case(3, 0, 4, 5, directions=2)),
        *_masked_cases(cell)[:3],
    ]
    # The two RNNs differ in one function.
    return cases[::3] if cell == "rnn_relu" else cases


def _masked_cases(cell):
    """Lengths, resets, states to start afresh from, and for LSTM every step's c."""
    case = functools.partial(LayerCase, cell)
    c = {"states": True} if CELLS[cell].has_c else {}
    full = {"resets": True, "reset_states": True, **c}
    bias = {"bias": CELLS[cell].gates > 1}
    return [
        ("program", case(5, 3, 3, 11, ends=(5, 0, 3), directions=2, **full, **bias)),
        ("grid", case(3, 4, 3, 18, ends=(2, 3, 0, 1), directions=2, **full, **bias)),
        ("steps", case(4, 2, 4, 11, resets=True, directions=2, **bias)),
        ("program", case(9, 18, 3, 5, ends=tuple(i % 10 for i in range(18)), bias=False)),
        ("grid", case(9, 5, 3, 40, resets=True, **c)),
        ("steps", case(6, 17, 3, 33, ends=tuple(i % 7 for i in range(17)), directions=2, **full)),
        ("program", case(3, 2, 3, 4, ends=(0, 0), resets=True, reset_states=True, directions=2)),
    ]


def _bfloat16_cases(cell):
    case = functools.partial(LayerCase, cell, bias=CELLS[cell].gates > 1)
    return [
        ("program", case(4, 3, 4, 15)),
        ("steps", case(3, 3, 4, 11, ends=(3, 0, 2), resets=True, reset_states=True)),
    ]


def _float16_cases(cell):
    return [("grid", LayerCase.packed(cell, [3, 1], 8, 20))]


def _one_loss_cases(cell):
    return [("grid", LayerCase.packed(cell, [3, 2], 7, 20))] if cell == "lstm" else []


def _slow_cases(cell):
    case, packed = functools.partial(LayerCase, cell), functools.partial(LayerCase.packed, cell)
    # A step of a program takes the interpreter 40 ms.
    shapes = ((1, 129, 17), (2, 3, 100), (9, 1, 17), (5, 33, 19), (3, 4, 64))
    cases = [
        (regime, case(t, b, i, h, directions=d, bias=bias))
        for t, b, h in shapes
        for i, d, bias in ((1, 1, True), (15, 2, False))
        for regime in ("program", "grid", "steps")
    ]
    cases += [("", case(2, 3, 33, 650)), ("", case(2, 17, 3, 300, directions=2))]
    cases += [
        (regime, packed(lengths, 11, h, directions=2))
        for lengths in ([7] + [1] * 20, list(range(7, 0, -1)), [5, 5, 4, 2, 2, 1])
        for h in (17, 100)
        for regime in ("program", "grid", "steps")
    ]
    cases += [(regime, packed([3, 1, 1], 11, 1, directions=2)) for regime in ("program", "steps")]
    return cases + _masked_cases(cell)[3:]


NOISE = {
    "recurrent dropout": ({"recurrent_dropout": 0.4}, True),
    "zoneout": ({"zoneout": 0.3}, True),
    "zoneout, expected": ({"zoneout": 0.3}, False),
    "both": ({"recurrent_dropout": 0.4, "zoneout": 0.3}, True),
}
NOISE_OF_LSTM = {
    "zoneout of c": ({"zoneout": (0.0, 0.4)}, True),
    "peepholes": ({"peepholes": True}, True),
    "peepholes and zoneout": ({"peepholes": True, "zoneout": (0.2, 0.4)}, True),
    "all, expected": ({"peepholes": True, "recurrent_dropout": 0.4, "zoneout": 0.3}, False),
}


def _noise_params():
    return [
        pytest.param(cell, *options, id=f"{cell}-{name}")
        for cell in KERNELS
        for name, options in (NOISE | (NOISE_OF_LSTM if cell == "lstm" else {})).items()
    ]


RECURRENT_FORMS = {
    "program": ("program", 7, "padded"),
    "grid": ("grid", 20, "packed"),
    "steps": ("steps", 18, "masked"),
    "bfloat16": ("grid", 20, "bfloat16"),
}


@pytest.mark.parametrize(
    ("cell", "options", "training", "regime", "hidden", "form"),
    pairs(_noise_params(), params(RECURRENT_FORMS), one_in=4),
)
def test_more_in_the_recurrence(cell, options, training, regime, hidden, form, monkeypatch):
    monkeypatch.setenv("FUSED_RNN_TRITON_REGIME", regime)
    layer = testing.make_module(cell, 3, hidden, bidirectional=True, **options).train(training)
    no_backward = not training and cell.startswith("rnn_")
    assert_as_in_torch_operations(layer, form, no_backward=no_backward)


def assert_as_in_torch_operations(layer, form, no_backward=False, **given):
    """By the kernels and, in float64 and with the same masks, by the scan in torch operations."""
    exact = copy.deepcopy(layer).double()
    if form == "bfloat16":
        layer = layer.bfloat16()
        exact = copy.deepcopy(layer).double()
    dtype = next(layer.parameters()).dtype
    x, lengths = torch.randn(4, 3, 3).to(dtype), torch.tensor([4, 2, 1])
    masks = given
    if form == "masked":
        masks |= {"lengths": torch.tensor([2, 0, 4]), "resets": torch.rand(4, 3) < 0.4}
        x[2:, 0] = x[:, 1] = float("nan")  # padding
    results = []
    for module, backend in ((layer, "triton"), (exact, "reference")):
        rows = x.to(next(module.parameters())).requires_grad_(not no_backward)
        input = pack_padded_sequence(rows, lengths) if form == "packed" else rows
        torch.manual_seed(3)
        with fused_rnn.backend(backend), torch.set_grad_enabled(not no_backward):
            leaf = {k: v.to(rows) if v.is_floating_point() else v for k, v in masks.items()}
            leaf = {k: v.requires_grad_(v.is_floating_point()) for k, v in leaf.items()}
            y, final, *histories = module(input, **leaf, return_states=form == "padded")
        finals = final if isinstance(final, tuple) else (final,)
        outputs = (y.data if form == "packed" else y, *finals, *(h for hs in histories for h in hs))
        grads = ()
        if not no_backward:
            loss = sum(
                (o * torch.linspace(1, 2, o.numel()).view_as(o).to(o)).sum() for o in outputs
            )
            inputs = [v for v in leaf.values() if v.requires_grad]
            grads = torch.autograd.grad(loss, [rows, *inputs, *module.parameters()])
        results.append((*outputs, *grads))
    tolerance = 0.05 if form == "bfloat16" else 1e-4
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == dtype
        ours, theirs = ours.double(), theirs.double()
        assert not ours.isnan().any() and not theirs.isnan().any()
        assert (ours - theirs).norm() <= tolerance * theirs.norm() + 1e-6


NORMED = {
    "alone": ({}, True),
    "without biases": ({"bias": False}, True),
    "dropped": ({"recurrent_dropout": 0.4}, True),
    "zoned out": ({"recurrent_dropout": 0.4, "zoneout": 0.3}, True),
    "expected": ({"zoneout": 0.3}, False),
}
NORMED_OF_LSTM = {
    "all": ({"recurrent_dropout": 0.4, "zoneout": (0.2, 0.4), "peepholes": True}, True),
    "all, expected": ({"zoneout": (0.2, 0.4), "peepholes": True}, False),
}


def _normed_params():
    return [
        pytest.param(cell, *options, id=f"{cell}-{name}")
        for cell in KERNELS
        if not cell.startswith("rnn_")
        for name, options in (NORMED | (NORMED_OF_LSTM if cell == "lstm" else {})).items()
    ]


NORMED_FORMS = {
    "1 unit": (1, "padded"),
    "17 units": (17, "padded"),
    "packed": (7, "packed"),
    "masked": (18, "masked"),
    "bfloat16": (20, "bfloat16"),
}


@pytest.mark.parametrize(
    ("cell", "options", "training", "hidden", "form"),
    pairs(_normed_params(), params(NORMED_FORMS), one_in=5),
)
def test_layer_normalisation(cell, options, training, hidden, form):
    layer = testing.make_module(cell, 3, hidden, bidirectional=True, layer_norm=True, **options)
    with torch.no_grad():  # gains of 1 and biases of 0 would hide what is left out
        for parameter in layer.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    given = {}
    if form == "masked" and cell != "lstm":
        given["reset_hx"] = torch.randn(2, 3, hidden)
    assert_as_in_torch_operations(layer.train(training), form, **given)


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"bidirectional": True}, marks=pytest.mark.slow)],
    ids=len,
)
@pytest.mark.parametrize("cell", KERNELS)
def test_autocast_ends_where_a_layer_runs_in_float32(cell, options):
    if not cell.startswith("rnn_"):
        options = options | {"layer_norm": True}
    elif cell != "rnn_relu":
        pytest.skip("runs in bfloat16")
    testing.assert_float32_under_autocast(
        testing.make_module(cell, 5, 20, **options), torch.randn(3, 3, 5)
    )


def test_the_states_that_an_lstm_starts_afresh_from():
    layer = fused_rnn.LSTM(3, 9, bidirectional=True, layer_norm=True)
    exact = copy.deepcopy(layer).double()
    states = [torch.randn(2, 3, 9, dtype=torch.float64) for _ in range(4)]
    x, resets = torch.randn(5, 3, 3, dtype=torch.float64), torch.rand(5, 3) < 0.5
    resets[0, 0] = resets[0, 1] = True
    lengths, results = torch.tensor([5, 0, 3]), []
    for module, backend in ((layer, "triton"), (exact, "reference")):
        dtype = module.weight_ih_l0.dtype
        leaves = [t.to(dtype).requires_grad_() for t in (x, *states)]
        masks = {"resets": resets, "lengths": lengths, "reset_hx": tuple(leaves[3:])}
        with fused_rnn.backend(backend):
            y, (h_n, c_n) = module(leaves[0], tuple(leaves[1:3]), **masks)
        loss = y.square().sum() + h_n.sum() + (2 * c_n).sum()
        grads = torch.autograd.grad(loss, [*leaves, *module.parameters()])
        results.append((y, h_n, c_n, *grads))
    for ours, theirs in zip(*results, strict=True):
        assert (ours.double() - theirs).norm() <= 1e-4 * theirs.norm() + 1e-6


@pytest.mark.parametrize("options", [{}, {"layer_norm": True}], ids=str)
def test_gradients_without_memory(options):
    """torch.sgn's backward gives zeros that have none."""
    layer = fused_rnn.LSTM(3, 9, **options)
    y, (h_n, c_n), ((h,), (c,)) = layer(torch.randn(2, 2, 3), return_states=True)
    loss = sum(output.sgn().sum() for output in (y, h_n, c_n, h, c))
    grads = torch.autograd.grad(loss, list(layer.parameters()))
    assert all(grad.count_nonzero() == 0 for grad in grads)


def test_no_rows_to_normalise():
    layer = fused_rnn.LSTM(3, 9, layer_norm=True)
    x = torch.randn(4, 0, 3, requires_grad=True)
    with fused_rnn.backend("triton"):
        y, (h_n, c_n) = layer(x)
        y.sum().backward()
    assert (y.shape, h_n.shape, c_n.shape) == ((4, 0, 9), (1, 0, 9), (1, 0, 9))
    assert all(p.grad.count_nonzero() == 0 for p in layer.parameters())


def test_zoneouts_expectation_of_an_rnn_has_no_backward():
    layer = fused_rnn.RNN(3, 4, zoneout=0.1).eval()
    with pytest.raises(fused_rnn.UnsupportedProblemError, match="no backward of zoneout's"):
        layer(torch.randn(2, 3, 3))


def _params(cases, dtypes, losses=("all",), marks=()):
    return [
        pytest.param(
            regime,
            replace(case, dtype=dtype),
            loss,
            id="-".join((case.cell, regime or "auto", str(dtype)[6:], str(case), loss)),
            marks=marks,
        )
        for cell in KERNELS
        for regime, case in cases(cell)
        for dtype in dtypes
        for loss in losses
        if loss != "c_n" or CELLS[cell].has_c
    ]


def _check(regime, case, loss="all"):
    """The repository's tolerance rule; see `fused_rnn/testing.py`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSED_RNN_TRITON_REGIME", regime)
        actual = testing.results_of_draws(testing.run_layer, case, loss)
    oracle = testing.results_of_draws(testing.run_oracle, case, loss, torch.float64)
    testing.assert_accurate(
        actual, oracle, testing.results_of_draws(testing.run_torch, case, loss), case
    )


@pytest.mark.parametrize(
    ("regime", "case", "loss"),
    [
        *_params(_fast_cases, (torch.float32,)),
        *_params(_bfloat16_cases, HALF[:1]),
        *_params(_float16_cases, HALF[1:]),
        *_params(_one_loss_cases, (torch.float32,), ("y", "h_n", "c_n")),
        *_params(_slow_cases, (torch.float32, *HALF), marks=[pytest.mark.slow]),
    ],
)
def test_accuracy(regime, case, loss):
    """Outputs, states and every gradient: at most twice torch.nn's error, and a few roundings."""
    _check(regime, case, loss)


@st.composite
def _random_cases(draw, input_sizes, hidden_sizes):
    cell = draw(st.sampled_from(KERNELS))
    sizes = {"input_size": draw(input_sizes), "hidden_size": draw(hidden_sizes)}
    options = {
        "directions": draw(st.integers(1, 2)),
        "bias": draw(st.booleans()),
        "dtype": draw(st.sampled_from((torch.float32, *HALF))),
    }
    lengths = sorted(draw(st.lists(st.integers(1, 3), min_size=1, max_size=18)), reverse=True)
    layout = draw(st.sampled_from(("packed", "padded", "masked")))
    if layout == "packed":
        return LayerCase.packed(cell, lengths, *sizes.values(), **options)
    if layout == "masked":
        options["ends"] = tuple(draw(st.permutations(lengths)))
        options["resets"] = draw(st.booleans())
        options["reset_states"] = options["resets"] and draw(st.booleans())
    return LayerCase(cell, lengths[0], len(lengths), **sizes, **options)


_any_problem = functools.partial(
    settings, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
_regimes = st.sampled_from(("", "steps"))


@_any_problem(max_examples=5)
@given(_random_cases(st.integers(16, 24), st.integers(16, 40)), _regimes)
def test_some_problems(case, regime):
    """Of sizes that need few draws."""
    _check(regime, case)


@pytest.mark.slow
@_any_problem(max_examples=30)
@given(_random_cases(st.integers(1, 9), st.integers(1, 36)), _regimes)
def test_any_problem(case, regime):
    _check(regime, case)


@pytest.mark.parametrize("cell", KERNELS)
def test_inference_gives_the_same_bits_and_saves_nothing(cell):
    case = LayerCase(cell, 3, 2, 4, 20, directions=2)
    inputs = testing.make_inputs(case)
    training = testing.run_layer(inputs.leaves())
    with torch.no_grad():
        inference = testing.run_layer(inputs)
        saved = torch.ops.fused_rnn.layer_forward(*inputs.forward_args(False, "triton"))[3:]
    assert all(map(torch.equal, inference, training))
    assert [tensor.numel() for tensor in saved] == [0, 0]


def test_inference_gives_every_steps_c_alone():
    case = LayerCase("lstm", 4, 3, 5, 20, directions=2, ends=(4, 2, 0), states=True)
    inputs = testing.make_inputs(case)
    expected = testing.run_oracle(inputs.leaves(torch.float64))
    with torch.no_grad(), testing.poisoned_memory():
        actual = testing.run_layer(inputs)
        gates = torch.ops.fused_rnn.layer_forward(*inputs.forward_args(False, "triton"))[3]
    for ours, theirs in zip(actual, expected, strict=True):
        testing.assert_near("states", ours, theirs, 1e-5, 1e-5)
    assert gates.numel() == 0


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        ("rnn_relu", float("nan")),
        ("rnn_tanh", float("inf")),
        ("gru", float("nan")),
        ("gru_reset_before", float("nan")),
        ("gru", -1e30),
        ("lstm", float("inf")),
    ],
)
def test_extreme_input(cell, value):
    """NaN, infinities and overflow show up in the very elements in which torch.nn has them."""
    case = LayerCase.packed(cell, [3, 2], 3, 5, directions=2)
    inputs = testing.make_inputs(case)
    inputs.x.view(-1)[case.input_size] = value
    cotangents = testing.make_cotangents(case)
    actual = testing.results_and_grads(testing.run_layer, inputs.leaves(), cotangents)
    expected = testing.results_and_grads(testing.run_torch, inputs.leaves(), cotangents)
    testing.assert_same_numbers(actual, expected)


def test_small_numbers_keep_their_relative_accuracy():
    """tanh near zero, where a formula of exponentials would have an absolute accuracy only."""
    inputs = testing.make_inputs(LayerCase("rnn_tanh", 2, 4, 8, 8)).map(lambda t: t * 1e-6)
    (y, _), (expected, _) = (
        testing.run_layer(inputs),
        testing.run_oracle(inputs.map(torch.Tensor.double)),
    )
    testing.assert_near("y", y, expected, 1e-6, 1e-6)


@pytest.mark.parametrize("cell", KERNELS)
def test_arguments_are_left_as_they_were(cell):
    """Neither pass writes to what it was given, so that backward may be called again."""
    case = LayerCase(cell, 3, 2, 4, 20)
    leaves = testing.make_inputs(case).leaves()
    before = leaves.map(torch.clone)
    y, *_ = testing.run_layer(leaves)
    first = torch.autograd.grad(y.sum(), list(leaves.tensors.values()), retain_graph=True)
    again = torch.autograd.grad(y.sum(), list(leaves.tensors.values()))
    assert all(map(torch.equal, first, again))
    for name, tensor in leaves.tensors.items():
        assert torch.equal(tensor, before.tensors[name]), name


@pytest.mark.parametrize("cell", KERNELS)
def test_padding_is_never_read(cell):
    """Whatever lies past the end: it reaches no result, and no gradient reaches it."""
    case = LayerCase(cell, 4, 3, 2, 5, directions=2, ends=(4, 0, 2))
    inputs, cotangents = testing.make_inputs(case), testing.make_cotangents(case)
    expected = testing.results_and_grads(testing.run_layer, inputs.leaves(), cotangents)
    padding = torch.arange(4).unsqueeze(1) >= torch.tensor(case.ends)
    inputs.x[padding] = torch.nan
    cotangents["y"][padding] = torch.nan
    actual = testing.results_and_grads(testing.run_layer, inputs.leaves(), cotangents)
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name
    assert not actual["y"][padding].any() and not actual["grad x"][padding].any()


def test_tuning_ends_in_a_table_that_is_used(monkeypatch, tmp_path):
    """All of it but the clock: here the larger tile is the faster one."""
    monkeypatch.setattr(launch, "_exchange", lambda one: "launch")  # one process runs them all
    path = tmp_path / "cache" / "triton.json"
    monkeypatch.setenv("FUSED_RNN_TRITON_TUNING", str(path))
    device = planner.Device("sm90", 132, 232448, True)
    problem = Problem(
        cell_name="rnn_tanh", timesteps=1, batch_size=2, input_size=3, hidden_size=40,
        training=True, dtype=torch.float32, device_type="cuda",
    )  # fmt: skip

    def clock(call):
        call()
        return -call.args[0].block_h

    monkeypatch.setattr(
        tune,
        "candidates",
        lambda *_: [planner.Config("grid", 16, h, 16, 4, False) for h in (16, 32)],
    )
    found = list(tune.tune([problem], device, "ieee", clock, torch.device("cpu")))
    assert [(row.which, row.config.block_h) for row in found] == [("forward", 32), ("backward", 32)]
    tune.write(found, path)
    tune.write(found[:1], path)  # again: in place of the same row, beside the others
    assert sorted(planner.read_rows(path)) == sorted(found)
    assert planner.make_plan(problem, device, "ieee", "grid").forward.config == found[0].config


def test_a_model_with_layers_of_every_kind():
    """Modules on top of the backend: several layers, batch first, packed, and what `explain`
    says."""
    layer = fused_rnn.LSTM(3, 20, num_layers=2, bidirectional=True, batch_first=True)
    x = torch.nn.utils.rnn.pack_sequence([torch.randn(3, 3), torch.randn(2, 3)])
    report = fused_rnn.explain(layer, x)
    assert report.backend == "triton" and len(report.layers) == 2
    expected = torch.nn.LSTM(3, 20, num_layers=2, bidirectional=True, batch_first=True)
    expected.load_state_dict(layer.state_dict())
    with fused_rnn.backend("triton"):
        y, (h_n, c_n) = layer(x)
    torch_y, (torch_h, torch_c) = expected(x)
    pairs = {"y": (y.data, torch_y.data), "h_n": (h_n, torch_h), "c_n": (c_n, torch_c)}
    for name, (actual, wanted) in pairs.items():
        testing.assert_near(name, actual, wanted, 1e-5, 1e-5)


def test_a_regime_that_does_not_fit_is_an_error_that_says_why(monkeypatch):
    monkeypatch.setenv("FUSED_RNN_TRITON_REGIME", "grid")
    layer = fused_rnn.GRU(3, 5)
    with pytest.raises(fused_rnn.UnsupportedProblemError, match="regime 'grid' does not fit"):
        layer(torch.randn(2, 1, 3))
    monkeypatch.setenv("FUSED_RNN_TRITON_REGIME", "z")
    with pytest.raises(ValueError, match="TRITON_REGIME: expected one of program, grid, steps"):
        layer(torch.randn(2, 1, 3))


def _copies(arguments):
    """By address, so that what was one tensor stays one."""
    made = {}

    def copy(value):
        if not isinstance(value, torch.Tensor):
            return value
        return made.setdefault(value.data_ptr(), value.clone())

    return {name: copy(value) for name, value in arguments.items()}


LATER = 2**28  # timesteps
# Their rows belong to timesteps.
OF_TIMESTEPS = ("gx", "y", "gates", "cells", "grad_y", "grad_cells", "grad_gates")


@pytest.mark.parametrize("regime", ["program", "steps"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "gru_reset_before", "lstm"])
def test_offsets_have_64_bits(cell, regime, monkeypatch):
    """All timesteps but the first again as the last of many more, in memory that begins so far
    ahead of the tensors that they lie where those timesteps do: T beyond 65,535, and more than
    2**31 elements."""
    from triton.runtime import interpreter

    case = LayerCase(cell, 4, 3, 5, 6)
    run, convert, calls = launch._run, interpreter._implicit_cvt, []

    def note(kernel, problem, plan, precision, arguments, constants, steps):
        calls.append((kernel, problem, plan, precision, _copies(arguments), dict(constants), steps))
        run(kernel, problem, plan, precision, arguments, constants, steps)

    monkeypatch.setenv("FUSED_RNN_TRITON_REGIME", regime)
    monkeypatch.setattr(launch, "_run", note)
    testing.results_and_grads(
        testing.run_layer, testing.make_inputs(case).leaves(), testing.make_cotangents(case)
    )
    ahead = {}  # of a tensor's address, in bytes

    def convert_and_move(value):
        found = convert(value)
        if isinstance(value, torch.Tensor) and value.data_ptr() in ahead:
            found.handle.data = found.handle.data - np.uint64(ahead[value.data_ptr()])
        return found

    monkeypatch.setattr(interpreter, "_implicit_cvt", convert_and_move)
    for kernel, problem, plan, precision, arguments, constants, steps in calls:
        expected, actual = _copies(arguments), _copies(arguments)
        run(kernel, problem, plan, precision, expected, dict(constants), steps)
        parts = [(range(steps.start, 1), 0), (range(1, steps.stop), LATER)]
        for part, later in parts if kernel is launch.scan.scan_forward else reversed(parts):
            ahead.clear()
            for name in OF_TIMESTEPS:
                if isinstance(tensor := actual.get(name), torch.Tensor):
                    row = tensor.shape[-1] * tensor.itemsize
                    ahead[tensor.data_ptr()] = later * case.batch_size * row
            longer = replace(problem, timesteps=case.timesteps + later)
            part = range(part.start + later, part.stop + later)
            run(kernel, longer, plan, precision, actual, dict(constants), part)
        for name, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(actual[name], value), name


def test_every_argument_is_aligned(monkeypatch):
    """Triton compiles another kernel where one is not: for odd states of layers above the first,
    and for weights that are parts of one vector."""
    run, kernels = launch._run, []

    def note(kernel, problem, plan, precision, arguments, *others):
        tensors = {name: t for name, t in arguments.items() if isinstance(t, torch.Tensor)}
        assert not {name for name, t in tensors.items() if t.data_ptr() % 16}
        kernels.append(kernel)
        run(kernel, problem, plan, precision, arguments, *others)

    monkeypatch.setattr(launch, "_run", note)
    layer, x = fused_rnn.LSTM(3, 5, num_layers=2), torch.randn(2, 3, 3)
    state = [torch.randn(2, 3, 5, requires_grad=True) for _ in "hc"]
    vector = torch.randn(1 + sum(weight.numel() for weight in layer.parameters()))
    weights = dict(layer.named_parameters())
    parts = vector[1:].split([weight.numel() for weight in weights.values()])
    shaped = {
        name: part.view_as(weight)
        for (name, weight), part in zip(weights.items(), parts, strict=True)
    }
    y, final = torch.func.functional_call(layer, shaped, (x, state))
    (y.sum() + final[0].sum() + final[1].sum()).backward()
    assert len(kernels) == 4


@pytest.mark.parametrize("cell", KERNELS)
def test_recompute_and_a_second_run_give_the_same_bits(cell):
    case = LayerCase(cell, 3, 2, 4, 20, directions=2, ends=(3, 1))
    inputs, cotangents = testing.make_inputs(case).leaves(), testing.make_cotangents(case)

    def again(inputs):
        outputs = ops.layer(*inputs.args, recompute=True)
        return tuple(output for output in outputs if output is not None)

    expected = testing.results_and_grads(testing.run_layer, inputs, cotangents)
    for run in (testing.run_layer, again):
        actual = testing.results_and_grads(run, inputs, cotangents)
        for name, value in actual.items():
            assert torch.equal(value, expected[name]), name
    saved = torch.ops.fused_rnn.layer_forward(*inputs.forward_args(True, "triton", True))[3:]
    assert [tensor.numel() for tensor in saved] == [0, 0]

"""CUDA layers step by step, in emulation: a product, here torch's on the CPU, and the pointwise
kernel from the very source that a GPU runs."""

import functools
import itertools
from dataclasses import replace

import pytest
import torch
from helpers.cuda import BACKEND, DTYPES

import fused_rnn
from fused_rnn import testing
from fused_rnn.cells import CELLS
from fused_rnn.testing import LayerCase


@pytest.fixture(autouse=True)
def steps(cuda_emulated, monkeypatch):
    monkeypatch.setenv("FUSED_RNN_CUDA_REGIME", "steps")


def _cases(cell: str) -> list[LayerCase]:
    case, packed = functools.partial(LayerCase, cell), functools.partial(LayerCase.packed, cell)
    masks = {"resets": True, "reset_states": True, "states": CELLS[cell].has_c}
    return [
        case(1, 1, 1, 1),
        case(5, 3, 4, 13, directions=2),
        case(4, 9, 3, 100, bias=False),
        case(6, 2, 3, 17, directions=2, resets=True, states=CELLS[cell].has_c),
        packed([7, 4, 4, 1], 3, 33, directions=2),
        case(7, 5, 3, 21, ends=(3, 0, 5, 1, 5), directions=2, **masks),
        case(6, 11, 3, 32, ends=(6, 0, 3, 1, 5, 2, 2, 4, 0, 1, 3)),
    ]


def _slow_cases(cell: str) -> list[LayerCase]:
    case = functools.partial(LayerCase, cell)
    sizes = list(itertools.product((2, 9), (1, 129), (8, 65, 650)))
    if cell == "rnn_relu":
        # Of a million and a half sums one is so near zero that rounding turns its sign, here in
        # ours and not in torch.nn's, and with it a gradient.
        sizes.remove((9, 129, 650))
    return [
        *(case(t, b, 3, h, directions=2) for t, b, h in sizes),
        LayerCase.packed(cell, [9, 8, 1], 3, 300, directions=2),
        case(20, 5, 3, 130, ends=(20, 0, 7, 13, 1), directions=2, resets=True, reset_states=True),
    ]


def _params(cases, marks=()):
    return [
        pytest.param(
            replace(case, dtype=dtype),
            id="-".join((cell, str(dtype).removeprefix("torch."), str(case))),
            marks=marks,
        )
        for cell in CELLS
        for case in cases(cell)
        for dtype in DTYPES
    ]


def _check(case: LayerCase) -> None:
    with fused_rnn.backend(BACKEND):
        actual = testing.results_of_draws(testing.run_layer, case)
    testing.assert_draws_accurate(actual, case)


@pytest.mark.parametrize("case", [*_params(_cases), *_params(_slow_cases, [pytest.mark.slow])])
def test_accuracy(case):
    """Outputs, states and gradients as accurate as torch.nn's."""
    _check(case)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_it_runs_what_clusters_cannot(cell, dtype, monkeypatch):
    monkeypatch.delenv("FUSED_RNN_CUDA_REGIME")
    _check(LayerCase(cell, 3, 4, 5, 70, dtype=dtype))


@pytest.mark.parametrize("cell", CELLS)
def test_inference_gives_the_same_numbers_as_training(cell):
    inputs = testing.make_inputs(LayerCase(cell, 4, 3, 5, 20, directions=2))
    with fused_rnn.backend(BACKEND):
        training = testing.run_layer(inputs.leaves())
        with torch.no_grad():
            inference = testing.run_layer(inputs)
    for a, b in zip(training, inference, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell != "gru_reset_before"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_either_regime_takes_what_the_other_has_saved(cell, dtype, monkeypatch):
    """A pass is planned for itself: forward may fit on chip where backward does not."""
    case = LayerCase(cell, 5, 3, 4, 30, directions=2, dtype=dtype, ends=(5, 2, 3), resets=True)
    results = {}
    for forward in ("cluster", "steps"):
        for backward in ("cluster", "steps"):
            inputs = testing.make_inputs(case).leaves()
            with fused_rnn.backend(BACKEND):
                monkeypatch.setenv("FUSED_RNN_CUDA_REGIME", forward)
                y = testing.run_layer(inputs)[0]
                monkeypatch.setenv("FUSED_RNN_CUDA_REGIME", backward)
                grads = torch.autograd.grad(y.float().square().sum(), [inputs.x, *inputs.weights])
            results[forward, backward] = [y, *grads]
    expected = results.pop(("cluster", "cluster"))
    tolerance = 2e-5 if dtype == torch.float32 else 0.05
    for regimes, tensors in results.items():
        for i, (ours, theirs) in enumerate(zip(tensors, expected, strict=True)):
            error = testing.relative_error(ours, theirs)
            assert error < tolerance, f"{regimes}: result {i} differs by {error}"


def test_infinite_and_absent_input_stays_where_it_is():
    """What rows that are not taken hold, and what padding of units multiplies, shows nowhere."""
    inputs = testing.make_inputs(LayerCase("lstm", 4, 2, 3, 9, ends=(4, 2), directions=2))
    x = inputs.x.clone()
    x[2:, 1] = float("nan")
    x[1, 0, 0] = float("inf")
    with fused_rnn.backend(BACKEND):
        y, h_n, _ = testing.run_layer(replace(inputs, x=x))
    expected = testing.run_oracle(replace(inputs, x=x))
    torch.testing.assert_close(y, expected[0], equal_nan=True)
    torch.testing.assert_close(h_n, expected[1], equal_nan=True)
    assert torch.isfinite(y[:, 1]).all()


@pytest.mark.parametrize("reset_after", [True, False])
def test_whole_modules_run_through_it(monkeypatch, reset_after):
    monkeypatch.setenv("FUSED_RNN_BACKEND", BACKEND)
    module = fused_rnn.GRU(5, 12, num_layers=2, bidirectional=True, reset_after=reset_after)
    x = torch.randn(3, 4, 5)
    y = module(x)[0]
    grads = torch.autograd.grad(y.square().sum(), list(module.parameters()))
    with fused_rnn.backend("reference"):
        expected = module(x)[0]
        expected_grads = torch.autograd.grad(expected.square().sum(), list(module.parameters()))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(grads, expected_grads)
    assert "scan a product per step" in str(fused_rnn.explain(module, x))


def test_a_regime_that_is_none(monkeypatch):
    monkeypatch.setenv("FUSED_RNN_CUDA_REGIME", "b")
    layer = fused_rnn.GRU(3, 4)
    with (
        fused_rnn.backend(BACKEND),
        pytest.raises(ValueError, match=r"FUSED_RNN_CUDA_REGIME: expected one of .*'b'"),
    ):
        layer(torch.randn(2, 1, 3))


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (LayerCase("gru", 3, 2, 4, 65), "hidden_size up to 64 .* got 65"),
        (LayerCase("gru_reset_before", 3, 2, 4, 5), "second exchange"),
    ],
    ids=str,
)
def test_clusters_that_are_forced_say_why_not(case, reason, monkeypatch):
    monkeypatch.setenv("FUSED_RNN_CUDA_REGIME", "cluster")
    with (
        fused_rnn.backend(BACKEND),
        pytest.raises(fused_rnn.UnsupportedProblemError, match=reason),
    ):
        testing.run_layer(testing.make_inputs(case))


# ---- A graph of some steps, which is launched until all are done.

GRAPH = "FUSED_RNN_CUDA_GRAPH"


def _graph_cases(cell: str) -> list[LayerCase]:
    case, packed = functools.partial(LayerCase, cell), functools.partial(LayerCase.packed, cell)
    masks = {"resets": True, "reset_states": True, "states": CELLS[cell].has_c}
    return [
        case(4, 1, 1, 1),  # the shortest
        case(19, 3, 4, 13, directions=2),
        case(50, 2, 3, 100, bias=False),  # graphs of four steps
        case(9, 3, 3, 21, ends=(3, 0, 9), directions=2, **masks),
        packed([8, 4, 4, 1], 3, 33, directions=2),
    ]


def _results(case: LayerCase) -> dict[str, torch.Tensor]:
    with fused_rnn.backend(BACKEND):
        return testing.results_of_draws(testing.run_layer, case)


def _assert_same(actual, expected) -> None:
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), f"{name} differs"


@pytest.mark.parametrize("case", _params(_graph_cases))
def test_a_graph_has_the_bits_of_the_loop(case, monkeypatch, capfd):
    """Twice, each draw in other memory."""
    expected = _results(case)
    assert "graph" not in capfd.readouterr().err
    monkeypatch.setenv(GRAPH, "1")
    monkeypatch.setenv("FUSED_RNN_LOG", "1")
    for _ in range(2):
        _assert_same(_results(case), expected)
    err = capfd.readouterr().err
    assert err.count(" steps is launched ") == err.count("fused_rnn: forward of ") + err.count(
        "fused_rnn: backward of "
    )


@pytest.mark.parametrize("reset_after", [True, False])
def test_graphs_follow_weights_and_inputs_that_change(reset_after, monkeypatch):
    """Over several steps of training, lengths and states too."""
    results = {}
    for graph in ("0", "1"):
        monkeypatch.setenv(GRAPH, graph)
        torch.manual_seed(1)
        module = fused_rnn.GRU(5, 12, num_layers=2, reset_after=reset_after)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        found = results[graph] = []
        for timesteps, batch in ((12, 4), (12, 4), (5, 2), (30, 3), (12, 4)):
            x, h0 = torch.randn(timesteps, batch, 5), torch.randn(2, batch, 12)
            lengths = torch.randint(0, timesteps + 1, (batch,))
            with fused_rnn.backend(BACKEND):
                y, h_n = module(x, h0, lengths=lengths)
                (y.square().sum() + h_n.sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
            found += [y, h_n]
    for ours, theirs in zip(results["1"], results["0"], strict=True):
        assert torch.equal(ours, theirs)


def test_too_few_steps_need_no_graph(monkeypatch, capfd):
    monkeypatch.setenv(GRAPH, "1")
    monkeypatch.setenv("FUSED_RNN_LOG", "1")
    _check(LayerCase("lstm", 3, 2, 4, 8))
    assert "graph" not in capfd.readouterr().err


def test_what_cannot_be_recorded_runs_in_the_loop(cuda_emulated, monkeypatch, capfd):
    case = LayerCase("gru_reset_before", 21, 2, 4, 8, directions=2)
    inputs = testing.make_inputs(case)
    with fused_rnn.backend(BACKEND):
        expected = testing.run_layer(inputs)
        monkeypatch.setenv(GRAPH, "1")
        monkeypatch.setenv("FUSED_RNN_LOG", "1")
        cuda_emulated.fail_to_record()
        actual = testing.run_layer(inputs)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)
    err = capfd.readouterr().err
    assert "no graph of 2 steps is recorded: the emulator was told to fail" in err
    assert "is launched" not in err


@pytest.mark.parametrize("value", ["2", "yes"])
def test_a_choice_of_graphs_that_is_none(value, monkeypatch):
    monkeypatch.setenv(GRAPH, value)
    layer = fused_rnn.GRU(3, 4)
    with (
        fused_rnn.backend(BACKEND),
        pytest.raises(
            ValueError, match=f"FUSED_RNN_CUDA_GRAPH: expected one of 0, 1; got '{value}'"
        ),
    ):
        layer(torch.randn(2, 1, 3))

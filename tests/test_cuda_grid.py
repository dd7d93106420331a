"""Scans that spread W_hh over the whole grid, emulated: all CTAs at once, over a global memory in
which stores come late and out of order and loads may be stale.
"""

import functools
from dataclasses import replace

import pytest
import torch
from helpers.cuda import BACKEND, DTYPES, KERNELS, assert_accurate_with_every_seed, case_params

import fused_rnn
from fused_rnn import testing
from fused_rnn.cells import CELLS
from fused_rnn.testing import LayerCase

# The half types of relu run through float32.
CELL_DTYPES = {**dict.fromkeys(KERNELS, DTYPES), "rnn_relu": (torch.float32,)}


@pytest.fixture(autouse=True)
def library(cuda_emulated, monkeypatch):
    monkeypatch.setenv("FUSED_RNN_CUDA_REGIME", "grid")
    return cuda_emulated


@pytest.fixture
def ampere(library):
    """A device without clusters."""
    library.device(80, 6, 1)  # capability, SMs, CTAs of a cluster
    yield
    library.device(90, 6, 16)


def _cases(cell: str) -> list[LayerCase]:
    case, packed = functools.partial(LayerCase, cell), functools.partial(LayerCase.packed, cell)
    every_mask = {"resets": True, "reset_states": True, "states": CELLS[cell].has_c}
    return [
        case(1, 1, 2, 17),
        case(3, 5, 3, 90, bias=False),  # three CTAs, one direction after the other
        case(4, 19, 3, 29, directions=2),  # 16 rows to a tile, and more tiles than fit at once
        case(6, 5, 3, 21, ends=(3, 0, 5, 1, 6), directions=2, **every_mask),
        packed([5, 3, 3, 1], 3, 32, directions=2),
    ]


def _slow_cases(cell: str) -> list[LayerCase]:
    case, packed = functools.partial(LayerCase, cell), functools.partial(LayerCase.packed, cell)
    return [
        *(case(t, b, 3, h, directions=d) for t in (2, 11) for b in (1, 40) for h, d in
          ((18, 2), (31, 1), (33, 2), (96, 1))),
        *(packed(lengths, 3, h) for lengths in ([9, 8, 1], [2] * 20 + [1]) for h in (24, 70)),
        case(30, 6, 3, 32, ends=(30, 1, 17, 0, 29, 30), resets=True, reset_states=True),
    ]  # fmt: skip


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


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_a_row_has_the_same_bits_in_every_batch(cell):
    """However many rows a tile has and however many launches there are."""
    inputs = testing.make_inputs(LayerCase(cell, 3, 60, 5, 31))
    # The input projection is torch's, whose sums may depend on the batch.
    inputs.weights[0].zero_()
    few = replace(inputs, x=inputs.x[:, :3], h0=inputs.h0[:, :3])
    if inputs.c0 is not None:
        few = replace(few, c0=inputs.c0[:, :3])
    with fused_rnn.backend(BACKEND):
        many_y, few_y = testing.run_layer(inputs)[0], testing.run_layer(few)[0]
    assert torch.equal(many_y[:, :3], few_y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("value", [1e30, float("inf"), float("nan")])
def test_any_number_may_be_sent(value, dtype):
    """States are whatever the caller gives; what is not finite stays in its row."""
    inputs = testing.make_inputs(LayerCase("gru", 4, 3, 3, 20, dtype=dtype))
    h0 = inputs.h0.clone()
    h0[:, 1] = value
    with fused_rnn.backend(BACKEND):
        usual = testing.run_layer(inputs)[0]
        y = testing.run_layer(replace(inputs, h0=h0))[0]
    assert torch.equal(y[:, ::2], usual[:, ::2])
    if value == 1e30:
        assert y.isfinite().all() and y[0, 1].abs().max() > 1e20
    else:
        assert not y[-1, 1].isfinite().any()


# A message's tag takes the place of a bit that numbers from 2 on have set, smaller ones have not.


@pytest.mark.parametrize("scale", [2.0**-30, 2.0**30])
def test_a_product_of_all_states_scales_with_them(scale):
    """The relu RNN without biases, to the last bit: messages of numbers all small, or all large."""
    inputs = testing.make_inputs(LayerCase("rnn_relu", 5, 3, 3, 40, bias=False))
    with fused_rnn.backend(BACKEND):
        y, h_n = testing.run_layer(inputs)[:2]
        scaled = testing.run_layer(replace(inputs, x=inputs.x * scale, h0=inputs.h0 * scale))
    assert y.abs().max() > 0.1
    assert torch.equal(scaled[0], y * scale)
    assert torch.equal(scaled[1], h_n * scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_gradients_scale_with_that_of_y(cell, dtype):
    inputs = testing.make_inputs(LayerCase(cell, 4, 9, 3, 29, directions=2, dtype=dtype))

    def gradients(scale: float) -> list[torch.Tensor]:
        leaves = inputs.leaves()
        with fused_rnn.backend(BACKEND):
            y = testing.run_layer(leaves)[0]
            y.backward(torch.ones_like(y) * scale)
        return [leaves.x.grad, leaves.h0.grad, *(w.grad for w in leaves.weights)]

    for plain, scaled in zip(gradients(1.0), gradients(2.0**12), strict=True):
        assert torch.equal(scaled, plain * 2.0**12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_large_states_in_16_bits(dtype, monkeypatch):
    inputs = testing.make_inputs(LayerCase("gru", 4, 3, 3, 29, dtype=dtype))
    inputs = replace(inputs, h0=inputs.h0 * 10)
    with fused_rnn.backend(BACKEND):
        across = testing.run_layer(inputs)[0]
        monkeypatch.setenv("FUSED_RNN_CUDA_REGIME", "cluster")
        in_clusters = testing.run_layer(inputs)[0]
    assert (in_clusters.abs() >= 2).any() and (in_clusters.abs() < 2).any()
    torch.testing.assert_close(across, in_clusters)


@pytest.mark.parametrize("hidden", [20, 90])
def test_a_cta_that_never_runs_is_an_error_not_a_hang(library, hidden):
    inputs = testing.make_inputs(LayerCase("lstm", 4, 3, 3, hidden))
    with fused_rnn.backend(BACKEND):
        library.lose_a_cta()
        with pytest.raises(RuntimeError, match="gave up waiting for message 1 of its CTAs"):
            testing.run_layer(inputs)
        y = testing.run_layer(inputs.leaves())[0]
        library.lose_a_cta()
        with pytest.raises(RuntimeError, match="gave up waiting for message 1 .* H=" + str(hidden)):
            y.sum().backward()
        again = testing.run_layer(inputs)[0]
    assert torch.equal(y, again)


@pytest.mark.parametrize("cell", KERNELS)
@pytest.mark.parametrize("hidden", [20, 90])
def test_a_cta_that_begins_late_is_waited_for(library, cell, hidden):
    """As another kernel may hold its SM: for longer than any later message takes."""
    case = LayerCase(cell, 4, 3, 3, hidden)
    results = []
    for rounds in (0, 100):
        inputs = testing.make_inputs(case).leaves()
        with fused_rnn.backend(BACKEND):
            library.delay_a_cta(rounds)
            outputs = testing.run_layer(inputs)
            library.delay_a_cta(rounds)
            outputs[0].sum().backward()
        results.append([*outputs, *(leaf.grad for leaf in inputs.tensors.values())])
    for on_time, late in zip(*results, strict=True):
        assert torch.equal(on_time, late)


def test_explain_says_where_it_runs(monkeypatch, ampere):
    monkeypatch.setenv("FUSED_RNN_BACKEND", BACKEND)
    monkeypatch.delenv("FUSED_RNN_CUDA_REGIME")
    lines = str(fused_rnn.explain(fused_rnn.GRU(5, 24), torch.randn(3, 4, 5)))
    assert "scan H<=32 across the grid by 2, 8 rows each; back H<=32 across the grid by 2" in lines


def test_clusters_are_preferred(library):
    describe = functools.partial(library.describe, CELLS["gru"].index, 4)
    assert "on clusters of 2" in describe(32, 3, 1, True, "", 0)
    assert "across the grid by 3" in describe(65, 3, 1, True, "", 0)
    assert "a product per step" in describe(97, 3, 1, True, "", 0)


def test_a_forward_scan_in_clusters_may_have_a_backward_one_across_the_grid(monkeypatch):
    inputs = testing.make_inputs(LayerCase("lstm", 5, 3, 3, 30, directions=2))
    with fused_rnn.backend(BACKEND):
        monkeypatch.setenv("FUSED_RNN_CUDA_REGIME", "cluster")
        in_clusters = testing.run_layer(inputs.leaves())
        both = inputs.leaves()
        y = testing.run_layer(both)[0]
        monkeypatch.setenv("FUSED_RNN_CUDA_REGIME", "grid")
        y.square().sum().backward()
        across = inputs.leaves()
        testing.run_layer(across)[0].square().sum().backward()
    torch.testing.assert_close(y, in_clusters[0])
    torch.testing.assert_close(both.x.grad, across.x.grad)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (LayerCase("gru", 3, 2, 4, 97), "hidden_size up to 96 .* got 97"),
        (LayerCase("gru_reset_before", 3, 2, 4, 5), "across the grid have no GRU with the reset"),
    ],
    ids=str,
)
def test_what_it_cannot_take_has_a_reason(case, reason):
    with (
        fused_rnn.backend(BACKEND),
        pytest.raises(fused_rnn.UnsupportedProblemError, match=reason),
    ):
        testing.run_layer(testing.make_inputs(case))


def test_a_device_with_too_few_processors_is_refused(library, ampere):
    library.device(80, 2, 1)
    refusal = functools.partial(library.refusal, CELLS["lstm"].index, 2)
    assert refusal(32, 3, 1, True, "grid", 0) == ""
    assert "needs hidden_size up to 32" in refusal(33, 3, 1, True, "grid", 0)

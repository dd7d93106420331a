"""The CUDA kernels' sources on the CPU, one fiber per thread: right whatever the threads' order.

A seed is one random course of events: which thread runs, which warps starve, when copies and
messages arrive. Shared memory and outputs start as NaN, deadlocks and messages to a CTA that has
left are errors. tests/test_emulator.py shows which mistakes are found.
"""

import functools
from dataclasses import replace

import pytest
import torch

import fused_rnn
from fused_rnn import dispatch, native, ops, testing
from fused_rnn.cells import CELLS
from fused_rnn.testing import LayerCase

BACKEND = "cuda_emulated"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def library(poisoned):
    if reason := native.cuda_emulated_library_error():
        pytest.skip(reason)
    return torch.ops.fused_rnn_cuda_emulated


def _cases(cell: str) -> list[LayerCase]:
    """One for each kernel there is to emulate, at sizes that fill none of them."""
    case, packed = functools.partial(LayerCase, cell), functools.partial(LayerCase.packed, cell)
    return [
        case(5, 3, 4, 13),
        case(6, 9, 4, 29, directions=2),
        case(4, 30, 4, 32),
        case(3, 5, 4, 50, bias=False),
        packed([7, 4, 4, 1], 3, 33, directions=2),
        packed([3, 1, 1, 1, 1, 1, 1, 1, 1, 1], 3, 24, directions=2),
        case(1, 1, 1, 1),
    ]


def _slow_cases(cell: str) -> list[LayerCase]:
    case, packed = functools.partial(LayerCase, cell), functools.partial(LayerCase.packed, cell)
    return [
        *(case(t, b, 3, h, directions=2) for t in (2, 9) for b in (1, 17) for h in (8, 17, 31, 64)),
        *(packed(lengths, 3, h) for lengths in ([9, 8, 1], [2] * 20 + [1]) for h in (16, 40)),
    ]


def _params(cases, seeds, marks=()):
    return [
        pytest.param(
            replace(case, dtype=dtype),
            seeds,
            id="-".join((cell, str(dtype).removeprefix("torch."), str(case))),
            marks=marks,
        )
        for cell in CELLS
        for case in cases(cell)
        for dtype in DTYPES
    ]


def _run(case: LayerCase, seed: int) -> dict[str, torch.Tensor]:
    torch.ops.fused_rnn_cuda_emulated.seed(seed)
    with fused_rnn.backend(BACKEND):
        return testing.results_of_draws(testing.run_layer, case)


@pytest.mark.parametrize(
    ("case", "seeds"),
    [
        *_params(_cases, 2),
        *_params(_cases, 16, [pytest.mark.slow]),
        *_params(_slow_cases, 8, [pytest.mark.slow]),
    ],
)
def test_accuracy(case, seeds):
    """Outputs, states and gradients as accurate as torch.nn's, and the same bits for every seed."""
    results = [_run(case, seed) for seed in range(seeds)]
    testing.assert_accurate(
        results[0],
        testing.results_of_draws(testing.run_oracle, case, "all", torch.float64),
        testing.results_of_draws(testing.run_torch, case),
        case,
    )
    for seed, other in enumerate(results):
        for name, tensor in other.items():
            assert torch.equal(tensor, results[0][name]), f"seed {seed}: other bits in {name}"


@pytest.mark.parametrize("cell", CELLS)
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


@pytest.mark.parametrize("cell", CELLS)
def test_inference_gives_the_same_numbers_as_training(cell):
    inputs = testing.make_inputs(LayerCase(cell, 4, 3, 5, 20, directions=2))
    with fused_rnn.backend(BACKEND):
        training = testing.run_layer(inputs.leaves())
        with torch.no_grad():
            inference = testing.run_layer(inputs)
    for a, b in zip(training, inference, strict=True):
        assert torch.equal(a, b)


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


def test_only_who_asks_gets_it(monkeypatch):
    monkeypatch.delenv("FUSED_RNN_BACKEND", raising=False)
    problem = ops.make_problem(*testing.make_inputs(LayerCase("gru", 3, 2, 4, 5)).args, True)
    assert BACKEND not in dict(dispatch.reasons(problem))
    assert dispatch.select(problem).name != BACKEND
    assert dispatch.select(problem, BACKEND).name == BACKEND


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (LayerCase("lstm", 3, 2, 4, 5, dtype=torch.float64), "float64"),
        (LayerCase("lstm", 3, 2, 4, 5, proj_size=2), "proj_size=2"),
        (LayerCase("gru", 3, 0, 4, 5), "batch size 0"),
        (LayerCase("gru", 3, 2, 4, 65), "hidden_size up to 64 .* got 65"),
    ],
    ids=str,
)
def test_what_it_cannot_take_has_a_reason(case, reason):
    with (
        fused_rnn.backend(BACKEND),
        pytest.raises(fused_rnn.UnsupportedProblemError, match=reason),
    ):
        testing.run_layer(testing.make_inputs(case))


# ---- Lengths and resets of padded rows, at the operators.


def _masked_oracle(cell, gx, w_hh, b_hn, h0, c0, lengths, resets, reset_h, reset_c, reverse):
    """One direction, step by step in plain torch: y [T, B, H], h_n, c_n and c [T, B, H]."""
    timesteps, batch, _ = gx.shape
    spec, hidden = CELLS[cell], h0.shape[-1]
    biases = (None, None)
    if b_hn is not None:
        b_hh = torch.cat((b_hn.new_zeros(2 * hidden), b_hn))
        biases = (torch.zeros_like(b_hh), b_hh)
    weights = fused_rnn.cells.DirectionWeights(w_hh.new_zeros(0), w_hh, *biases)
    states = [h0] if c0 is None else [h0, c0]
    fresh = [reset_h] if c0 is None else [reset_h, reset_c]
    ys, cs = [None] * timesteps, [None] * timesteps
    for t in reversed(range(timesteps)) if reverse else range(timesteps):
        taken = (t < lengths).unsqueeze(1)
        at = t + 1 if reverse else t
        anew = resets[at] & (at < lengths) if at < timesteps else torch.zeros(batch).bool()
        states = [
            torch.where((anew & taken[:, 0]).unsqueeze(1), f, s)
            for s, f in zip(states, fresh, strict=True)
        ]
        after = spec.step(gx[t], tuple(states), weights)
        states = [torch.where(taken, a, s) for a, s in zip(after, states, strict=True)]
        ys[t] = torch.where(taken, after[0], 0.0)
        cs[t] = torch.where(taken, after[-1], 0.0)
    return torch.stack(ys), states[0], states[-1], torch.stack(cs)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fresh", [False, True], ids=["from_zeros", "from_states"])
@pytest.mark.parametrize("hidden", [16, 32])
@pytest.mark.parametrize("cell", CELLS)
def test_lengths_and_resets(library, cell, hidden, fresh, seed):
    timesteps, batch, directions = 6, 11, 2
    spec = CELLS[cell]
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).requires_grad_()

    gx = normal(directions, timesteps * batch, spec.gates * hidden)
    w_hh = [(normal(spec.gates * hidden, hidden) * hidden**-0.5).detach() for _ in range(2)]
    b_hn = normal(directions, hidden).detach() if cell == "gru" else None
    h0, reset_h = normal(directions, batch, hidden), normal(directions, batch, hidden)
    c0 = normal(directions, batch, hidden) if spec.has_c else None
    reset_c = normal(directions, batch, hidden) if spec.has_c else None
    lengths = torch.randint(0, timesteps + 1, (batch,), generator=generator)
    resets = torch.rand(timesteps, batch, generator=generator) < 0.3
    zeros = torch.zeros_like(h0)
    fresh_h, fresh_c = (reset_h, reset_c) if fresh else (zeros, zeros if spec.has_c else None)

    expected_y, expected_h, expected_c, expected_cells = [], [], [], []
    for d in range(directions):
        y, h, c, cells = _masked_oracle(
            cell, gx[d].double().unflatten(0, (timesteps, batch)), w_hh[d].double(),
            None if b_hn is None else b_hn[d].double(), h0[d].double(),
            c0[d].double() if spec.has_c else None, lengths, resets, fresh_h[d].double(),
            fresh_c[d].double() if spec.has_c else None, d == 1,
        )  # fmt: skip
        expected_y.append(y.flatten(0, 1))
        expected_h.append(h)
        expected_c.append(c)
        expected_cells.append(cells.flatten(0, 1))
    expected_y = torch.cat(expected_y, 1)
    expected_h = torch.stack(expected_h)
    grad_y, grad_h = torch.randn_like(expected_y), torch.randn_like(expected_h)
    grad_c = torch.randn_like(expected_h)
    loss = (expected_y * grad_y).sum() + (expected_h * grad_h).sum()
    wanted = {"gx": gx, "h0": h0}
    if fresh:
        wanted["reset_h"] = reset_h
    if spec.has_c:
        expected_c = torch.stack(expected_c)
        loss = loss + (expected_c * grad_c).sum()
        wanted["c0"] = c0
        if fresh:
            wanted["reset_c"] = reset_c
    grads = dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))

    library.seed(seed)
    count = timesteps * batch
    detach = [None if t is None else t.detach() for t in (h0, c0, reset_h, reset_c)]
    h0_, c0_, reset_h_, reset_c_ = detach
    masks = (lengths, None, resets, reset_h_ if fresh else None, reset_c_ if fresh else None)
    y = gx.new_empty(count, directions * hidden)
    h_n, c_n = torch.empty_like(h0_), gx.new_empty(directions, batch, hidden * spec.has_c)
    gates = gx.new_empty(directions, count, spec.saved_gates * hidden)
    cells = gx.new_empty(directions, count, hidden * spec.has_c)
    library.scan_forward(
        spec.index, gx.detach(), w_hh, b_hn, h0_, c0_, hidden, *masks, y, h_n, c_n, gates, cells, 0
    )
    grad_gates = gx.new_empty(directions, count, spec.grad_gates * hidden)
    grad_h0, grad_c0 = torch.empty_like(h0_), torch.empty_like(c_n)
    grad_reset_h = torch.zeros_like(h0_) if fresh else None
    grad_reset_c = torch.zeros_like(c_n) if fresh and spec.has_c else None
    library.scan_backward(
        spec.index, grad_y.float(), grad_h.float(), grad_c.float() if spec.has_c else None, w_hh,
        h0_, c0_, hidden, *masks, y, gates, cells, grad_gates, grad_h0, grad_c0, grad_reset_h,
        grad_reset_c, 0,
    )  # fmt: skip

    def near(name, actual, expected):
        testing.assert_near(name, actual, expected, 2e-6, 5e-6)

    near("y", y, expected_y)
    near("h_n", h_n, expected_h)
    near("grad gx", fused_rnn.backends.base.input_side(spec, grad_gates), grads["gx"])
    near("grad h0", grad_h0, grads["h0"])
    if fresh:
        near("grad reset_h", grad_reset_h, grads["reset_h"])
    if spec.has_c:
        near("c_n", c_n, expected_c)
        near("cells", cells, torch.stack(expected_cells))
        near("grad c0", grad_c0, grads["c0"])
        if fresh:
            near("grad reset_c", grad_reset_c, grads["reset_c"])
    dead = torch.arange(timesteps).unsqueeze(1) >= lengths
    assert not gates[:, dead.flatten()].any(), "gates of steps that are not taken"


# ---- Bad input, at the operators' border.


def _arguments(**changes):
    """Those of scan_forward, for an LSTM with T=2, B=3, H=16."""
    arguments = {
        "cell": CELLS["lstm"].index,
        "gx": torch.zeros(1, 6, 64),
        "w_hh": [torch.zeros(64, 16)],
        "b_hn": None,
        "h0": torch.zeros(1, 3, 16),
        "c0": torch.zeros(1, 3, 16),
        "hidden_size": 16,
        "lengths": None,
        "offsets": None,
        "resets": None,
        "reset_h": None,
        "reset_c": None,
        "y": torch.zeros(6, 16),
        "h_n": torch.zeros(1, 3, 16),
        "c_n": torch.zeros(1, 3, 16),
        "gates": torch.zeros(1, 6, 64),
        "cells": torch.zeros(1, 6, 16),
        "stream": 0,
    }
    return arguments | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cell": 4}, "cell: expected 0 to 3, got 4"),
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
        library.scan_forward(*_arguments(**changes).values())

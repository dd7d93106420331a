"""Layers of a stack side by side, in emulation: there the streams' order is random as far as their
events leave it open, so that a chunk that starts before what it reads is there reads NaN."""

import itertools
from dataclasses import replace

import pytest
import torch
from helpers.cuda import (
    BACKEND,
    CHUNK,
    StackCase,
    assert_stack_accurate,
    make_stack,
    run_emulated_stack,
    run_stack,
)
from torch.utils.checkpoint import checkpoint

import fused_rnn
from fused_rnn import dispatch, stack, testing
from fused_rnn import problem as problem_module
from fused_rnn.backends import cuda_stack
from fused_rnn.backends.cuda import CudaEmulatedBackend
from fused_rnn.layer_call import make_problem
from fused_rnn.testing import TORCH_CELLS, LayerCase


@pytest.fixture(autouse=True)
def library(cuda_emulated, monkeypatch):
    monkeypatch.setenv("FUSED_RNN_CUDA_REGIME", "cluster")
    monkeypatch.setenv(CHUNK, "2")
    return cuda_emulated


def _cases(cell: str, dtypes) -> list[StackCase]:
    cases = [
        StackCase(cell, 7, 3, 16, 2, 3),  # the last chunk is shorter
        StackCase(cell, 5, 9, 32, 4, 1, bias=False),
        StackCase(cell, 6, 2, 24, 3, 2),
        StackCase(cell, 4, 3, 16, 2, 9),  # of one chunk
        StackCase(cell, 3, 17, 64, 3, 2),
    ]
    return [replace(case, dtype=dtype) for case in cases for dtype in dtypes]


@pytest.mark.parametrize(
    "case",
    [
        *(c for cell in TORCH_CELLS for c in _cases(cell, [torch.float32])),
        *(
            c
            for cell in TORCH_CELLS
            if cell != "rnn_relu"
            for c in _cases(cell, [torch.bfloat16])[:3]
        ),
        StackCase("lstm", 5, 3, 16, 2, 2, dtype=torch.float16),
    ],
    ids=lambda case: f"{str(case.dtype).removeprefix('torch.')}-{case}",
)
def test_accuracy(case):
    """And the same bits whatever the order of streams and threads."""
    first, *others = (run_emulated_stack(case, seed) for seed in range(3))
    assert_stack_accurate(first, case)
    for seed, other in enumerate(others, 1):
        for name, tensor in other.items():
            assert torch.equal(tensor, first[name]), f"seed {seed}: other bits in {name}"


@pytest.mark.parametrize(
    ("cell", "dtype", "dropout"),
    [
        *itertools.product(TORCH_CELLS, [torch.float32], [0.0, 0.4, 1.0]),
        # Of the other probabilities, torch's dropout on the CPU rounds 1 / (1 - p).
        *itertools.product(["rnn_tanh", "gru", "lstm"], [torch.bfloat16], [0.0, 0.5, 1.0]),
    ],
    ids=str,
)
def test_the_same_bits_as_layer_after_layer(cell, dtype, dropout):
    """Where the sums are the same: between layers they are torch's, and here of one term each."""
    case = StackCase(cell, 7, 5, 16, 3, 2, dropout, dtype=dtype)
    results = []
    for chunk in (0, 1, 2, 7):
        with pytest.MonkeyPatch.context() as patch, fused_rnn.backend(BACKEND):
            patch.setenv(CHUNK, str(chunk))
            module = make_stack(case)
            for name, weight in module.named_parameters():
                if "weight_ih" in name:
                    torch.manual_seed(1)
                    column = torch.randint(weight.shape[1], (weight.shape[0],))
                    with torch.no_grad():
                        weight.copy_(torch.nn.functional.one_hot(column, weight.shape[1]))
            results.append(run_stack(module, case))
    for other, name in itertools.product(results[1:], results[0]):
        assert torch.equal(other[name], results[0][name]), name


def test_inference_gives_the_same_numbers_as_training():
    module, x = make_stack(StackCase("lstm", 7, 3, 16, 3, 2)), torch.randn(7, 3, 5)
    with fused_rnn.backend(BACKEND):
        y, (h_n, c_n) = module(x)
        with torch.no_grad():
            again = module(x)
        with torch.inference_mode():
            inferred = module(x)
    for other in (again, inferred):
        assert torch.equal(other[0], y)
        assert torch.equal(other[1][0], h_n) and torch.equal(other[1][1], c_n)
        assert not other[0].requires_grad


def test_gradients_of_weights_follow_the_scans_as_these_end(monkeypatch):
    """In emulation there is no stream for them to wait on; but which one they would."""
    numbers, beside = [], cuda_stack._beside
    monkeypatch.setattr(
        cuda_stack, "_beside", lambda *args: (numbers.append(args[1]), beside(*args))[1]
    )
    case = StackCase("gru", 7, 3, 16, 4, 2)
    with fused_rnn.backend(BACKEND):
        run_stack(make_stack(case), case)
    assert numbers == [0, 1, 2, 3]  # backward the last layer's scan is the first


def test_batch_first_and_initial_states_of_zero():
    case = StackCase("gru", 5, 3, 16, 2, 2)
    module, x = make_stack(case), torch.randn(5, 3, 5)
    first = fused_rnn.GRU(5, 16, num_layers=2, batch_first=True)
    first.load_state_dict(module.state_dict())
    with fused_rnn.backend(BACKEND):
        y, h_n = module(x)
        y_first, h_first = first(x.transpose(0, 1))
    assert torch.equal(y_first.transpose(0, 1), y) and torch.equal(h_first, h_n)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_autocast_ends_where_layers_run(cell, frozen, monkeypatch):
    """Around a backward, too, of a part that autocast was off for."""
    monkeypatch.setenv(CHUNK, "2")
    module, x = make_stack(StackCase(cell, 5, 3, 16, 2, 2)), torch.randn(5, 3, 5)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not frozen or "weight_ih" in name)
    wanted, grads = [p for p in module.parameters() if p.requires_grad], []
    for within in (False, True):
        with fused_rnn.backend(BACKEND):
            loss = module(x)[0].square().sum()
            with torch.autocast("cpu", torch.bfloat16, enabled=within):
                grads.append(torch.autograd.grad(loss, wanted))
    assert all(map(torch.equal, *grads))


def test_gradients_without_memory(monkeypatch):
    monkeypatch.setenv(CHUNK, "2")
    module = make_stack(StackCase("lstm", 5, 3, 16, 2, 2))
    with fused_rnn.backend(BACKEND):
        y, (h_n, c_n) = module(torch.randn(5, 3, 5))
        loss = y.sgn().sum() + h_n.sgn().sum() + c_n.sgn().sum()
        grads = torch.autograd.grad(loss, list(module.parameters()))
    assert all(grad.count_nonzero() == 0 for grad in grads)


@pytest.mark.parametrize("wanted", ["y", "h_n", "c_n"])
@pytest.mark.parametrize("frozen", ["x", "first layer", "all weights"])
def test_any_part_of_the_gradients(wanted, frozen, monkeypatch):
    module, x = make_stack(StackCase("lstm", 5, 3, 16, 3, 2)), torch.randn(5, 3, 5)
    x.requires_grad_(frozen != "x")
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(
            not (frozen == "all weights" or (frozen == "first layer" and name.endswith("l0")))
        )
    inputs = [t for t in (x, *module.parameters()) if t.requires_grad]
    grads = []
    for chunk in ("0", "2"):
        monkeypatch.setenv(CHUNK, chunk)
        with fused_rnn.backend(BACKEND):
            y, (h_n, c_n) = module(x)
            loss = {"y": y, "h_n": h_n, "c_n": c_n}[wanted].square().sum()
            grads.append(torch.autograd.grad(loss, inputs))
    for apart, together in zip(*grads, strict=True):
        torch.testing.assert_close(together, apart)


def test_backward_may_be_called_again_and_needs_what_it_saved():
    module, x = make_stack(StackCase("gru", 5, 3, 16, 2, 2)), torch.randn(5, 3, 5)
    with fused_rnn.backend(BACKEND):
        y, _ = module(x)
        first = torch.autograd.grad(y.sum(), list(module.parameters()), retain_graph=True)
        again = torch.autograd.grad(y.sum(), list(module.parameters()))
        for a, b in zip(first, again, strict=True):
            assert torch.equal(a, b)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(y.sum(), list(module.parameters()))
        y, _ = module(x)
        y.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_double_backward_goes_through_the_oracle(cell, dropout, monkeypatch):
    case = StackCase(cell, 4, 2, 8, 2, 2, dropout, dtype=torch.float32)
    second = []
    for chunk in ("0", "2"):
        monkeypatch.setenv(CHUNK, chunk)
        module, x = make_stack(case), torch.ones(4, 2, 5).requires_grad_()
        torch.manual_seed(3)
        with fused_rnn.backend(BACKEND):
            y, h_n = module(x)
            loss = y.square().sum() + (h_n[0] if cell == "lstm" else h_n).sum()
            (grad,) = torch.autograd.grad(loss, x, create_graph=True)
            grads = torch.autograd.grad(grad.square().sum(), [x, *module.parameters()])
        second.append([grad, *grads])
    for apart, together in zip(*second, strict=True):
        torch.testing.assert_close(together, apart)


def test_checkpointing_and_offloading_see_what_it_saves(monkeypatch):
    module, x = make_stack(StackCase("lstm", 5, 3, 16, 2, 2)), torch.randn(5, 3, 5)
    seen = []
    with fused_rnn.backend(BACKEND):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
            plain = module(x)[0]
        expected = torch.autograd.grad(plain.sum(), list(module.parameters()))
        y = checkpoint(lambda x: module(x)[0], x, use_reentrant=False)
        grads = torch.autograd.grad(y.sum(), list(module.parameters()))
    assert sum(t.shape[-1:] == (4 * 16,) and t.dim() == 3 for t in seen) == 2  # gates, by layer
    for a, b in zip(grads, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("way", ["compile", "export", "vmap", "forward mode", "dispatch mode"])
def test_who_looks_at_operations_sees_layer_after_layer(way, monkeypatch):
    module, x = make_stack(StackCase("gru", 4, 3, 16, 2, 2)).requires_grad_(False), None
    x = torch.randn(4, 3, 5)
    monkeypatch.setenv(CHUNK, "0")
    with fused_rnn.backend(BACKEND):
        expected = module(x)[0]
    monkeypatch.setenv(CHUNK, "2")
    monkeypatch.setattr(stack, "_forward", None)  # which is never called
    with fused_rnn.backend(BACKEND):
        if way == "compile":
            actual = torch.compile(module, backend="aot_eager", fullgraph=True)(x)[0]
        elif way == "export":
            actual = torch.export.export(module, (x,)).module()(x)[0]
        elif way == "vmap":
            actual = torch.vmap(lambda x: module(x)[0])(x.unsqueeze(0))[0]
        elif way == "forward mode":
            actual, _ = torch.func.jvp(lambda x: module(x)[0], (x,), (torch.ones_like(x),))
        else:
            with torch.utils.flop_counter.FlopCounterMode(display=False):
                actual = module(x)[0]
    torch.testing.assert_close(actual, expected)


def test_explain_says_so(monkeypatch):
    monkeypatch.setenv("FUSED_RNN_BACKEND", BACKEND)
    module, x = make_stack(StackCase("lstm", 4, 3, 16, 2, 2)), torch.randn(4, 3, 5)
    found = fused_rnn.explain(module, x)
    ending = "; 2 layers side by side in chunks of 2 steps forward, 2 steps back"
    assert [layer.kernel.endswith(ending) for layer in found.layers] == [True, True]
    assert [layer.problem.input_size for layer in found.layers] == [5, 16]
    with torch.no_grad():
        assert str(fused_rnn.explain(module, x)).endswith("in chunks of 2 steps forward")
    monkeypatch.setenv(CHUNK, "0")
    assert "side by side" not in str(fused_rnn.explain(module, x))


def test_the_planner_decides_where_nobody_forces(monkeypatch, library):
    """On the emulated device, whose 6 SMs are enough for two clusters of 2."""
    monkeypatch.delenv(CHUNK)
    problem = make_problem(*testing.make_inputs(LayerCase("gru", 9, 3, 5, 32)).args, True)

    def chosen(layers, **changes):
        return dispatch.find(BACKEND).stack(replace(problem, **changes), layers, True)

    forward, backward = chosen(2, timesteps=4000)[1:]
    assert 0 < forward < 4000 and 0 < backward < 4000
    assert chosen(2, timesteps=40) is None
    assert chosen(3, timesteps=4000) is None
    assert chosen(2, timesteps=4000, batch_size=100) is None
    monkeypatch.setenv(CHUNK, "7")
    assert chosen(3, timesteps=40)[1:] == (7, 7)
    monkeypatch.setenv(CHUNK, "0")
    assert chosen(2, timesteps=4000) is None


def test_a_pass_may_run_side_by_side_alone(monkeypatch):
    """The other then has one chunk, the whole of time."""
    case, one_pass = StackCase("lstm", 6, 3, 16, 2, 2), problem_module.Stack(2, 0, 2)
    expected = run_emulated_stack(case)
    for plan in (one_pass, problem_module.Stack(2, 4, 0)):
        monkeypatch.setattr(dispatch.find(BACKEND), "stack", lambda *_, plan=plan: plan)
        for name, tensor in run_emulated_stack(case).items():
            torch.testing.assert_close(tensor, expected[name])


@pytest.mark.parametrize(
    ("options", "call", "reason"),
    [
        ({"bidirectional": True}, {}, "needs padded input and one direction"),
        ({}, {"lengths": torch.tensor([2, 1])}, "without lengths"),
        ({}, {"return_states": True}, "return_states"),
        ({"recompute": True}, {}, "recompute"),
        ({"hidden_size": 9}, {}, "a multiple of 8, got 9"),
        ({"hidden_size": 96, "regime": ""}, {}, "layers that run on clusters"),
        ({"dtype": torch.bfloat16, "cell": fused_rnn.RNN, "nonlinearity": "relu"}, {}, "float32"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_has_a_reason_where_it_is_forced(options, call, reason, monkeypatch):
    options = {"hidden_size": 16, "num_layers": 2, "regime": "cluster"} | options
    monkeypatch.setenv("FUSED_RNN_CUDA_REGIME", options.pop("regime"))
    cell = options.pop("cell", fused_rnn.GRU)
    module, x = cell(5, **options), torch.randn(3, 2, 5, dtype=options.get("dtype"))
    message = f"FUSED_RNN_CUDA_CHUNK: layers cannot run side by side: .*{reason}"
    with fused_rnn.backend(BACKEND):
        with pytest.raises(ValueError, match=message):
            module(x, **call)
        monkeypatch.delenv(CHUNK)
        module(x, **call)


@pytest.mark.parametrize("value", ["two", "-1", "1.5"])
def test_a_chunk_that_is_no_number(value, monkeypatch):
    monkeypatch.setenv(CHUNK, value)
    with (
        fused_rnn.backend(BACKEND),
        pytest.raises(ValueError, match=f"FUSED_RNN_CUDA_CHUNK: expected timesteps.*'{value}'"),
    ):
        fused_rnn.GRU(3, 8, num_layers=2)(torch.randn(2, 1, 3))


def test_one_layer_is_no_stack():
    with fused_rnn.backend(BACKEND):
        fused_rnn.GRU(3, 9)(torch.randn(2, 1, 3))


# ---- Bad input, at the operators' border.


def forward_arguments(**changes):
    """Those of stack_forward, for two layers of LSTM with T=2, B=3, I=5, H=16."""

    def by_layer(*shape):
        return [torch.zeros(shape) for _ in range(2)]

    arguments = {
        "cell": 3,
        "x": torch.zeros(6, 5),
        "w_ih": [torch.zeros(64, 5), torch.zeros(64, 16)],
        "biases": by_layer(64),
        "w_hh": by_layer(64, 16),
        "b_hn": None,
        "h0": torch.zeros(2, 3, 16),
        "c0": torch.zeros(2, 3, 16),
        "kept": [],
        "scale": 1.0,
        "chunk": 1,
        "gx": by_layer(1, 6, 64),
        "ys": by_layer(6, 16),
        "h_n": torch.zeros(2, 3, 16),
        "c_n": torch.zeros(2, 3, 16),
        "gates": by_layer(1, 6, 64),
        "cells": by_layer(1, 6, 16),
        "regime": "",
        "tf32": False,
        "stream": 0,
        "layer_streams": [0, 0],
    }
    return arguments | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w_hh": []}, "w_hh: expected a matrix for each layer"),
        ({"w_ih": [torch.zeros(64, 5)]}, "w_ih: expected 2 tensors, got 1"),
        ({"w_ih": [torch.zeros(64, 5)] * 2}, r"w_ih: expected shape \[64, 16\], got \[64, 5\]"),
        ({"x": torch.zeros(6, 4)}, r"x: expected shape \[6, 5\], got \[6, 4\]"),
        ({"biases": [torch.zeros(64)]}, "biases: expected 2 tensors, got 1"),
        ({"biases": [torch.zeros(63)] * 2}, r"biases: expected shape \[64\], got \[63\]"),
        ({"kept": [torch.zeros(6, 16)]}, "kept: expected dtype Bool, got Float"),
        ({"kept": [torch.zeros(6, 16).bool()] * 2}, "kept: expected 1 tensors, got 2"),
        ({"chunk": 0}, "chunk: expected at least one timestep, got 0"),
        ({"ys": []}, "ys: expected 2 tensors, got 0"),
        ({"layer_streams": [0]}, "layer_streams: expected 2, got 1"),
        ({"regime": "grid"}, "stack of layers: needs layers that run on clusters"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments(library, changes, message):
    library.stack_forward(*forward_arguments().values())
    with pytest.raises(RuntimeError, match=message):
        library.stack_forward(*forward_arguments(**changes).values())


@pytest.mark.parametrize("chunk", ["0", "2"], ids=["layers", "stack"])
@pytest.mark.parametrize("which", ["forward", "backward"])
def test_running_out_of_memory_is_an_error_of_torchs_type(library, chunk, which, monkeypatch):
    class Full:
        def __getattr__(self, name):
            return refuse if name.endswith(which) else getattr(library, name)

    def refuse(*args):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB (torch's call failed)")

    monkeypatch.setenv(CHUNK, chunk)
    monkeypatch.setattr(CudaEmulatedBackend, "ops", Full())
    layer, x = fused_rnn.GRU(3, 16, num_layers=2), torch.randn(4, 2, 3)
    with (
        fused_rnn.backend(BACKEND),
        pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"),
    ):
        layer(x)[0].sum().backward()

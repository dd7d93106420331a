"""The CUDA kernels on a GPU. Their sources run in CI without one: tests/test_cuda_emulated.py."""

import functools
import os
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from helpers.cuda import (
    CHUNK,
    DTYPES,
    KERNELS,
    StackCase,
    assert_stack_accurate,
    assert_tf32_accurate,
    make_stack,
    run_stack,
    tf32,
)
from helpers.needs import skip_unless_supported

import fused_rnn
from fused_rnn import native, testing
from fused_rnn.cells import CELLS
from fused_rnn.testing import LayerCase

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("poisoned", "library"),
]

REGIMES = ("cluster", "grid", "steps")


@pytest.fixture(scope="module")
def library():
    if reason := native.cuda_library_error():
        pytest.skip(reason)


# A relu whose sum is nearly zero has another gradient where the sum is rounded to the other side.
# Among more sums than this that is bound to happen even in float32; rnn_tanh runs the same kernels.
MOST_RELUS = 100_000


def _without_bound_jumps(cases: list[LayerCase]) -> list[LayerCase]:
    def sums(case):
        return case.timesteps * case.batch_size * case.hidden_size * case.directions

    return [case for case in cases if case.cell != "rnn_relu" or sums(case) <= MOST_RELUS]


def _cases(cell: str) -> list[LayerCase]:
    case, packed = functools.partial(LayerCase, cell), functools.partial(LayerCase.packed, cell)
    masks = {"resets": True, "reset_states": True, "states": CELLS[cell].has_c}
    return [
        # Sizes on both sides of every tile's, and one of every number of row blocks.
        *(case(5, 3, 9, h) for h in (1, 17, 64, 65, 100, 128, 200, 256, 384, 500, 512, 640, 768)),
        *(case(4, b, 9, h) for b in (1, 129, 2500) for h in (64, 128, 256)),
        case(1, 1, 1, 1),
        case(33, 17, 15, 100, directions=2, bias=False),
        case(9, 40, 8, 512, directions=2),
        packed(list(range(40, 0, -1)), 11, 100, directions=2),
        packed([2] * 128 + [1], 11, 256),
        case(20, 5, 3, 200, ends=(20, 0, 7, 13, 1), directions=2, **masks),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=f"{cell}-{case}")
        for cell in KERNELS
        for case in _without_bound_jumps(_cases(cell))
    ],
)
def test_accuracy(case, dtype):
    case = replace(case, dtype=dtype, device="cuda")
    skip_unless_supported("cuda", testing.make_inputs(case))
    with fused_rnn.backend("cuda"):
        actual = testing.results_of_draws(testing.run_layer, case)
    # On the CPU, so that TF32 has no part in what torch.nn is allowed to be wrong by.
    host = replace(case, device="cpu")
    testing.assert_accurate(
        {name: tensor.cpu() for name, tensor in actual.items()},
        testing.results_of_draws(testing.run_oracle, host, "all", torch.float64),
        testing.results_of_draws(testing.run_torch, host),
        host,
    )


def _step_cases(cell: str) -> list[LayerCase]:
    case, packed = functools.partial(LayerCase, cell), functools.partial(LayerCase.packed, cell)
    masks = {"resets": True, "reset_states": True, "states": CELLS[cell].has_c}
    return [
        case(1, 1, 1, 1),
        *(case(5, b, 9, h, directions=2) for b in (1, 3, 129) for h in (17, 650, 1024, 1500)),
        case(4, 2, 9, 2560, bias=False),
        packed(list(range(12, 0, -1)), 11, 1000, directions=2),
        case(20, 5, 3, 900, ends=(20, 0, 7, 13, 1), directions=2, **masks),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=f"{cell}-{case}")
        for cell in CELLS
        for case in _without_bound_jumps(_step_cases(cell))
    ],
)
def test_accuracy_step_by_step(case, dtype, monkeypatch):
    monkeypatch.setenv("FUSED_RNN_CUDA_REGIME", "steps")
    test_accuracy(case, dtype)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("hidden", [17, 64, 256, 384])
@pytest.mark.parametrize("cell", KERNELS)
def test_tf32_is_as_accurate_as_float16(cell, hidden, regime, monkeypatch):
    monkeypatch.setenv("FUSED_RNN_CUDA_REGIME", regime)
    host = LayerCase(cell, 9, 5, 7, hidden, directions=2)
    with fused_rnn.backend("cuda"), tf32():
        actual = testing.results_of_draws(testing.run_layer, replace(host, device="cuda"))
    # relu's gradient jumps where TF32 turns the sign of a sum, as float16 would.
    compared = [name for name in actual if cell != "rnn_relu" or not name.startswith("grad")]
    assert_tf32_accurate({name: actual[name].cpu() for name in compared}, host)


def _grid_cases(cell: str) -> list[LayerCase]:
    case, packed = functools.partial(LayerCase, cell), functools.partial(LayerCase.packed, cell)
    masks = {"resets": True, "reset_states": True, "states": CELLS[cell].has_c}
    return [
        # Sizes on both sides of every tile's; batches of one launch, of several, of every tile.
        *(case(5, b, 9, h) for b in (1, 40) for h in (17, 512, 769, 1024, 1300, 1536, 2048)),
        *(case(5, 3, 9, h) for h in (2100, 2300) if cell == "lstm"),
        case(4, 300, 9, 1024, directions=2),
        case(300, 8, 9, 1024, bias=False),
        packed(list(range(12, 0, -1)), 11, 1000, directions=2),
        case(20, 5, 3, 900, ends=(20, 0, 7, 13, 1), directions=2, **masks),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=f"{cell}-{case}")
        for cell in KERNELS
        for case in _without_bound_jumps(_grid_cases(cell))
    ],
)
def test_accuracy_across_the_grid(case, dtype, monkeypatch):
    monkeypatch.setenv("FUSED_RNN_CUDA_REGIME", "grid")
    test_accuracy(case, dtype)


def _layer(cell, hidden, dtype=torch.bfloat16, **options):
    modes = {
        "lstm": fused_rnn.LSTM,
        "gru": fused_rnn.GRU,
        "gru_reset_before": functools.partial(fused_rnn.GRU, reset_after=False),
    }
    make = modes.get(cell) or functools.partial(fused_rnn.RNN, nonlinearity=cell[4:])
    return make(64, hidden, device="cuda", dtype=dtype, **options)


def _force(regime, cell, monkeypatch):
    if regime != "steps" and cell not in KERNELS:
        pytest.skip(f"no W_hh of {cell} is kept on chip")
    monkeypatch.setenv("FUSED_RNN_CUDA_REGIME", regime)


def _results(layer, x):
    """Output and the gradients of all weights and of x."""
    x = x.detach().requires_grad_()
    y, _ = layer(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("cell", KERNELS)
@pytest.mark.parametrize("hidden", [64, 256, 512, 1024])
def test_the_same_bits_every_time_beside_other_work(cell, hidden):
    layer, x = _layer(cell, hidden, bidirectional=True), torch.randn(50, 24, 64, device="cuda")
    x = x.bfloat16()
    other, noise = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    with fused_rnn.backend("cuda"):
        expected = _results(layer, x)
        for repetition in range(200):
            with torch.cuda.stream(other):
                noise = (noise @ noise).tanh_()
            for i, (a, b) in enumerate(zip(_results(layer, x), expected, strict=True)):
                assert torch.equal(a, b), f"repetition {repetition}, result {i}"


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("cell", CELLS)
def test_a_cuda_graph_replays_it(cell, regime, monkeypatch):
    _force(regime, cell, monkeypatch)
    layer = _layer(cell, 256)
    x = torch.randn(30, 8, 64, device="cuda", dtype=torch.bfloat16)
    with fused_rnn.backend("cuda"):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                _results(layer, x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = _results(layer, x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        for a, b in zip(captured, _results(layer, x), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("cell", CELLS)
def test_the_host_does_not_wait(cell, regime, monkeypatch):
    _force(regime, cell, monkeypatch)
    layer = _layer(cell, 128, bidirectional=True)
    x = torch.randn(30, 8, 64, device="cuda", dtype=torch.bfloat16)
    lengths = torch.randint(1, 31, (8,), device="cuda")
    with fused_rnn.backend("cuda"):
        _results(layer, x)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            _results(layer, x)
            layer(x, lengths=lengths)
        finally:
            torch.cuda.set_sync_debug_mode("default")


# ---- Graphs of some steps, of a layer that runs step by step.


@pytest.fixture
def graphs(monkeypatch):
    """Sets whether they are recorded."""
    monkeypatch.setenv("FUSED_RNN_CUDA_REGIME", "steps")
    return lambda value: monkeypatch.setenv("FUSED_RNN_CUDA_GRAPH", value)


def _graph_cases(cell: str) -> list[LayerCase]:
    case, packed = functools.partial(LayerCase, cell), functools.partial(LayerCase.packed, cell)
    masks = {"resets": True, "reset_states": True, "states": CELLS[cell].has_c}
    return [
        case(4, 1, 1, 1),
        case(37, 1, 9, 1024),
        case(50, 3, 9, 650, directions=2),
        case(200, 64, 9, 256, bias=False),
        case(30, 129, 9, 1500, directions=2),
        packed(list(range(40, 0, -1)), 11, 300, directions=2),
        case(20, 5, 3, 900, ends=(20, 0, 7, 13, 1), directions=2, **masks),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=f"{cell}-{case}") for cell in CELLS for case in _graph_cases(cell)],
)
def test_graphs_of_steps_have_the_bits_of_the_loop(case, dtype, graphs):
    case = replace(case, dtype=dtype, device="cuda")
    inputs, cotangents = testing.make_inputs(case), testing.make_cotangents(case, "all", 1)
    results = {}
    with fused_rnn.backend("cuda"):
        for value in ("0", "1"):
            graphs(value)
            results[value] = testing.results_and_grads(
                testing.run_layer, inputs.leaves(), cotangents
            )
    for name, theirs in results["0"].items():
        assert torch.equal(results["1"][name], theirs), f"{name} differs"


@pytest.mark.parametrize("cell", CELLS)
def test_graphs_of_steps_are_recorded(cell, graphs, monkeypatch, capfd):
    """Forward and backward, on the default stream and on another."""
    monkeypatch.setenv("FUSED_RNN_LOG", "1")
    graphs("1")
    layer, x = _layer(cell, 256), torch.randn(40, 8, 64, device="cuda").bfloat16()
    with fused_rnn.backend("cuda"):
        for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                _results(layer, x)
            torch.cuda.synchronize()
            err = capfd.readouterr().err
            assert err.count("steps is launched") == 2, err


@pytest.mark.parametrize("cell", CELLS)
def test_graphs_of_steps_on_several_streams_and_threads(cell, graphs):
    """With memory that is given away while they run."""
    layers = [_layer(cell, hidden, bidirectional=True) for hidden in (256, 1000, 1024)]
    x = torch.randn(60, 24, 64, device="cuda").bfloat16()

    def work(index, stream, found):
        with fused_rnn.backend("cuda"), torch.cuda.stream(stream):
            for _ in range(10):
                found.append(_results(layers[index], x))
                torch.full((1 << 24,), float("nan"), device="cuda")

    with fused_rnn.backend("cuda"):
        graphs("0")
        expected = [_results(layer, x) for layer in layers]
        torch.cuda.synchronize()
        graphs("1")
        streams = [torch.cuda.Stream() for _ in layers]
        found = [[] for _ in layers]
        for index, stream in enumerate(streams):  # one thread, streams side by side
            work(index, stream, found[index])
        threads = [
            threading.Thread(target=work, args=(index, stream, found[index]))
            for index, stream in enumerate(streams)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        torch.cuda.synchronize()
    for theirs, ours in zip(expected, found, strict=True):
        assert len(ours) == 20
        for results in ours:
            for a, b in zip(results, theirs, strict=True):
                assert torch.equal(a, b)


def test_training_in_autocast_with_graphs_of_steps(graphs):
    """Whose weights are other copies in every call."""
    losses = {}
    for value in ("0", "1"):
        graphs(value)
        torch.manual_seed(3)
        layer = _layer("gru", 512, torch.float32)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
        found = losses[value] = []
        with fused_rnn.backend("cuda"):
            for timesteps in (30, 30, 17, 64, 30):
                x = torch.randn(timesteps, 8, 64, device="cuda")
                with torch.autocast("cuda", torch.bfloat16):
                    loss = layer(x)[0].float().square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                found.append(loss.detach())
    assert torch.equal(torch.stack(losses["0"]), torch.stack(losses["1"]))


@pytest.mark.parametrize("cell", CELLS)
def test_within_a_capture_no_graph_of_steps_is_recorded(cell, graphs, monkeypatch):
    graphs("1")
    test_a_cuda_graph_replays_it(cell, "steps", monkeypatch)


def test_the_host_does_not_wait_for_graphs_of_steps(graphs, monkeypatch):
    graphs("1")
    test_the_host_does_not_wait("lstm", "steps", monkeypatch)


def test_scans_across_the_grid_take_turns(monkeypatch):
    """On streams that know nothing of each other: together they would not fit on the device."""
    monkeypatch.setenv("FUSED_RNN_CUDA_REGIME", "grid")
    layers = [_layer(cell, 1024) for cell in ("lstm", "gru", "lstm")]
    x = torch.randn(200, 16, 64, device="cuda", dtype=torch.bfloat16)
    with fused_rnn.backend("cuda"):
        expected = [_results(layer, x) for layer in layers]
        streams = [torch.cuda.Stream() for _ in layers]
        torch.cuda.synchronize()
        for _ in range(20):
            found = []
            for stream, layer in zip(streams, layers, strict=True):
                with torch.cuda.stream(stream):
                    found.append(_results(layer, x))
            torch.cuda.synchronize()
            for ours, theirs in zip(found, expected, strict=True):
                for a, b in zip(ours, theirs, strict=True):
                    assert torch.equal(a, b)


def test_a_hundred_thousand_steps():
    """More than cuDNN takes; offsets beyond 2^31 elements."""
    layer = _layer("lstm", 256)
    x = torch.randn(100_000, 32, 64, device="cuda", dtype=torch.bfloat16)
    with fused_rnn.backend("cuda"), torch.no_grad():
        y, _ = layer(x)
        states, pieces = None, []
        for part in x.split(25_000):
            piece, states = layer(part, states)
            pieces.append(piece)
    assert torch.equal(y[:25_000], pieces[0])
    assert torch.isfinite(y).all()


def test_every_automatic_choice_says_which_kernel_ran():
    layer = _layer("gru", 256)
    text = str(fused_rnn.explain(layer, torch.randn(5, 3, 64, device="cuda").bfloat16()))
    assert "cuda/scan H<=" in text
    layer = _layer("lstm", 5000)
    text = str(fused_rnn.explain(layer, torch.randn(5, 3, 64, device="cuda").bfloat16()))
    assert "cuda/scan a product per step" in text


def test_clusters_are_as_large_as_the_chip_has_them():
    """The device is asked: a whole H100 or H200 has clusters of 16, which an LSTM of 512 takes."""
    name = torch.cuda.get_device_name()
    if not ("H100" in name or "H200" in name) or "MIG" in name:
        pytest.skip(f"what {name} answers is not known")
    x = torch.randn(5, 3, 64, device="cuda").bfloat16()
    assert "on clusters of 16" in str(fused_rnn.explain(_layer("lstm", 512), x))


# ---- Layers of a stack side by side.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", KERNELS)
@pytest.mark.parametrize(
    ("layers", "hidden", "batch", "timesteps", "chunk"),
    [(2, 64, 3, 9, 2), (4, 128, 17, 30, 7), (3, 256, 8, 20, 1), (2, 512, 16, 40, 16)],
)
def test_layers_side_by_side(cell, layers, hidden, batch, timesteps, chunk, dtype, monkeypatch):
    if cell == "rnn_relu" and dtype != torch.float32:
        pytest.skip("runs through float32")
    monkeypatch.setenv(CHUNK, str(chunk))
    monkeypatch.setenv("FUSED_RNN_CUDA_REGIME", "cluster")
    layer = LayerCase(cell, 1, batch, 1, hidden, dtype=dtype, device="cuda")
    skip_unless_supported("cuda", testing.make_inputs(layer))
    case = StackCase(cell, timesteps, batch, hidden, layers, chunk, dtype=dtype, device="cuda")
    with fused_rnn.backend("cuda"):
        actual = run_stack(make_stack(case), case)
    assert_stack_accurate({name: tensor.cpu() for name, tensor in actual.items()}, case)


def _deep(**options):
    case = StackCase("lstm", 200, 16, 256, 4, 24, dtype=torch.bfloat16, device="cuda", **options)
    return make_stack(case), torch.randn(200, 16, 5, device="cuda", dtype=torch.bfloat16)


def test_layers_side_by_side_have_the_same_bits_every_time_beside_other_work(monkeypatch):
    """And give memory back while they run: what else wants it must not get it too early."""
    layer, x = _deep()
    other, noise = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    monkeypatch.setenv(CHUNK, "24")
    with fused_rnn.backend("cuda"):
        expected = _results(layer, x)
        for repetition in range(200):
            with torch.cuda.stream(other):
                noise = (noise @ noise).tanh_()
            found = _results(layer, x)
            torch.full((1 << 26,), float("nan"), device="cuda")  # in whatever is free
            for i, (a, b) in enumerate(zip(found, expected, strict=True)):
                assert torch.equal(a, b), f"repetition {repetition}, result {i}"


def test_dropout_between_layers_side_by_side_is_torchs(monkeypatch):
    layer, x = _deep(dropout=0.5)
    results = []
    for chunk in ("0", "24"):
        monkeypatch.setenv(CHUNK, chunk)
        torch.manual_seed(5)
        with fused_rnn.backend("cuda"):
            results.append(_results(layer, x))
    for apart, together in zip(*results, strict=True):
        assert testing.relative_error(together, apart) < 0.02


def test_a_cuda_graph_replays_layers_side_by_side(monkeypatch):
    layer, x = _deep()
    monkeypatch.setenv(CHUNK, "24")
    with fused_rnn.backend("cuda"):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                _results(layer, x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = _results(layer, x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        for a, b in zip(captured, _results(layer, x), strict=True):
            assert torch.equal(a, b)


def test_the_host_does_not_wait_for_layers_side_by_side(monkeypatch):
    layer, x = _deep()
    monkeypatch.setenv(CHUNK, "24")
    with fused_rnn.backend("cuda"):
        _results(layer, x)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            _results(layer, x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_planner_runs_deep_small_batches_side_by_side():
    name = torch.cuda.get_device_name()
    if not ("H100" in name or "H200" in name) or "MIG" in name:
        pytest.skip(f"what is planned for {name} is not known")
    layer, _ = _deep()
    x = torch.randn(1024, 16, 5, device="cuda", dtype=torch.bfloat16)
    assert "4 layers side by side" in str(fused_rnn.explain(layer, x))


@pytest.mark.parametrize("regime", REGIMES)
def test_the_log_names_kernels_and_problems(regime, monkeypatch, capfd):
    monkeypatch.setenv("FUSED_RNN_LOG", "1")
    monkeypatch.setenv("FUSED_RNN_CUDA_REGIME", regime)
    with fused_rnn.backend("cuda"):
        _results(_layer("gru", 64), torch.randn(3, 2, 64, device="cuda").bfloat16())
    lines = capfd.readouterr().err
    assert "fused_rnn: forward of gru BFloat16 T=3 B=2 H=64 D=1: scan " in lines
    assert "fused_rnn: backward of gru BFloat16 T=3 B=2 H=64 D=1: scan " in lines


FAULT = """
import torch, fused_rnn
layer = fused_rnn.GRU(8, 64, device="cuda")
x = torch.randn(3, 2, 8, device="cuda")
with fused_rnn.backend("cuda"):
    layer(x, lengths=torch.tensor([2, 9], device="cuda"))
"""


def test_a_fault_on_the_device_is_not_taken_for_ours():
    """Lengths beyond the sequence are an assertion of torch's on the device, found by whoever calls
    next: torch itself, or with the log we, before our kernel is launched, and then we say so."""
    env = {**os.environ, "FUSED_RNN_LOG": "1"}
    command = [sys.executable, "-c", FAULT]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode != 0
    assert "device-side assert" in done.stderr
    assert ", in forward of" not in done.stderr
    if "Error: CUDA: " in done.stderr:
        assert "in work that was launched before forward of gru Float T=3 B=2 H=64" in done.stderr

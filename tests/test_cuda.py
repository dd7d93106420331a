"""The CUDA kernels on a GPU. Their sources run in CI without one: tests/test_cuda_emulated.py."""

import functools
from dataclasses import replace

import pytest
import torch
from test_cuda_emulated import assert_tf32_accurate, tf32

import fused_rnn
from fused_rnn import native, testing
from fused_rnn.cells import CELLS
from fused_rnn.testing import LayerCase

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("poisoned", "library"),
]

KERNELS = ("rnn_tanh", "rnn_relu", "gru", "lstm")
REGIMES = ("cluster", "grid", "steps")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(scope="module")
def library():
    if reason := native.cuda_library_error():
        pytest.skip(reason)


def _skip_unless_supported(inputs, training=True):
    if reason := testing.refusal("cuda", inputs, training):
        pytest.skip(reason)


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
    "case", [pytest.param(case, id=f"{cell}-{case}") for cell in KERNELS for case in _cases(cell)]
)
def test_accuracy(case, dtype):
    case = replace(case, dtype=dtype, device="cuda")
    _skip_unless_supported(testing.make_inputs(case))
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
        case(4, 2, 9, 4096, bias=False),
        packed(list(range(12, 0, -1)), 11, 1000, directions=2),
        case(20, 5, 3, 900, ends=(20, 0, 7, 13, 1), directions=2, **masks),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=f"{cell}-{case}") for cell in CELLS for case in _step_cases(cell)],
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
    assert_tf32_accurate({name: tensor.cpu() for name, tensor in actual.items()}, host)


def _grid_cases(cell: str) -> list[LayerCase]:
    case, packed = functools.partial(LayerCase, cell), functools.partial(LayerCase.packed, cell)
    masks = {"resets": True, "reset_states": True, "states": CELLS[cell].has_c}
    return [
        # Sizes on both sides of every tile's; batches of one launch, of several, of every tile.
        *(case(5, b, 9, h) for b in (1, 40) for h in (17, 512, 769, 1024, 1300, 1536, 2048)),
        case(4, 300, 9, 1024, directions=2),
        case(300, 8, 9, 1024, bias=False),
        packed(list(range(12, 0, -1)), 11, 1000, directions=2),
        case(20, 5, 3, 900, ends=(20, 0, 7, 13, 1), directions=2, **masks),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=f"{cell}-{case}") for cell in KERNELS for case in _grid_cases(cell)],
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

"""Inference in a half type in one call (csrc/cpu/infer_half.cpp): the general way's bits."""

from __future__ import annotations

import pytest
import torch
from test_direct_calls import LAID_OUT, has_direct_calls
from test_streaming import flat, states

import fused_rnn
from fused_rnn import direct, dispatch
from fused_rnn.cells import CELLS
from fused_rnn.modules import make_module
from fused_rnn.testing import TORCH_CELLS

pytestmark = has_direct_calls
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=HALVES, ids=str)
def dtype(request):
    return request.param


def general_way(module, *args):
    """A call that somebody watches is not for the short ones."""
    with dispatch.recording(lambda *choice: None):
        return module(*args)


def assert_short_way_agrees(module, *args):
    with torch.no_grad():
        if isinstance(module, torch.nn.RNNBase):
            short = direct.layers(module, [], *args)
        else:
            short = direct.step(module, [], module._cell(), *args)
        assert short is not None
        expected = flat(general_way(module, *args))
    for a, e in zip(flat(short), expected, strict=True):
        assert a.dtype == e.dtype and a.shape == e.shape
        assert torch.equal(a.nan_to_num(7), e.nan_to_num(7)) and torch.equal(a.isnan(), e.isnan())
    return flat(short)


def states_of(dtype, cell, *shape):
    h = states(cell, *shape)
    return tuple(s.to(dtype) for s in h) if isinstance(h, tuple) else h.to(dtype)


@pytest.mark.parametrize("cell", TORCH_CELLS)
@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"num_layers": 3, "bidirectional": True, "batch_first": True}]
)
def test_layers_have_the_general_ways_bits(cell, options, dtype):
    module = make_module(cell, 5, 17, **options).to(dtype)
    parts = len(module._flat_weights) // len(module._all_weights[0])
    for shape in ((1, 1, 5), (7, 3, 5), (3, 60, 5), (4, 5)):
        x = torch.randn(shape, dtype=dtype)
        batch = shape[:1] if module.batch_first else shape[1:2]
        for hx in (None, states_of(dtype, cell, parts, *batch[: len(shape) - 2], 17)):
            assert_short_way_agrees(module, x, hx)


@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_of_every_instruction_set(instruction_set, cell, dtype):
    for sizes in ((3, 1), (33, 100)):
        module = make_module(cell, *sizes, num_layers=2).to(dtype)
        assert_short_way_agrees(module, torch.randn(4, 3, sizes[0], dtype=dtype), None)


def test_projected_layers(dtype):
    module = fused_rnn.LSTM(5, 19, 2, proj_size=4, bidirectional=True).to(dtype)
    hx = torch.randn(4, 3, 4, dtype=dtype), torch.randn(4, 3, 19, dtype=dtype)
    for given in (None, hx):
        assert_short_way_agrees(module, torch.randn(6, 3, 5, dtype=dtype), given)


@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
def test_cells(name, dtype):
    module = getattr(fused_rnn, name)(5, 9).to(dtype)
    for batch in ((), (3,)):
        x = torch.randn(*batch, 5, dtype=dtype)
        cell = module._cell().name
        for hx in (None, states_of(dtype, cell, *batch, 9)):
            assert_short_way_agrees(module, x, hx)


# There are no complex numbers of bfloat16.
@pytest.mark.parametrize("layout", sorted(LAID_OUT.keys() - {"real part"}))
def test_input_may_lie_in_any_order(layout, dtype):
    for batch_first in (False, True):
        module = make_module("gru", 5, 17, num_layers=2, batch_first=batch_first).to(dtype)
        for shape in ((7, 3, 5), (1, 3, 5), (3, 1, 5), (6, 5)):
            x = LAID_OUT[layout](torch.randn(shape, dtype=dtype))
            hx = torch.randn(2, *shape[0 if batch_first else 1 :][: len(shape) - 2], 34)
            y, _ = assert_short_way_agrees(module, x, hx.to(dtype)[..., ::2])
            with torch.no_grad():
                dense, _ = module(x.contiguous(), hx.to(dtype)[..., ::2].contiguous())
                expected, _ = torch.nn.GRU(5, 17, 2, batch_first=batch_first).to(dtype)(x)
            assert torch.equal(y, dense)
            # As far as strides matter, those of torch.nn.
            for size, stride, wanted in zip(y.shape, y.stride(), expected.stride(), strict=True):
                assert size == 1 or stride == wanted


@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_autocast_is_heeded(cell, dtype):
    module = make_module(cell, 5, 17, num_layers=2, bidirectional=True)
    x = torch.randn(7, 3, 5)
    with torch.autocast("cpu", dtype):
        for given in (x, x.to(dtype)):
            for hx in (None, states(cell, 4, 3, 17), states_of(dtype, cell, 4, 3, 17)):
                results = assert_short_way_agrees(module, given, hx)
                assert all(result.dtype == dtype for result in results)


def test_autocast_of_another_device_changes_nothing():
    module, x = fused_rnn.GRU(5, 7), torch.randn(4, 2, 5)
    plain, _ = assert_short_way_agrees(module, x, None)
    torch.set_autocast_enabled("cuda", True)
    try:
        y, _ = assert_short_way_agrees(module, x, None)
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert y.dtype == torch.float32 and torch.equal(y, plain)


def test_mixed_types_are_not_for_the_short_way(dtype):
    module, x = fused_rnn.LSTM(5, 7).to(dtype), torch.randn(4, 2, 5, dtype=dtype)
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    hx = torch.randn(1, 2, 7, dtype=dtype), torch.randn(1, 2, 7, dtype=dtype)
    with torch.no_grad():
        assert direct.layers(module, [], x, hx) is not None
        for wrong in (torch.float32, torch.float64, other):
            assert direct.layers(module, [], x.to(wrong), hx) is None
            assert direct.layers(module, [], x, (hx[0].to(wrong), hx[1])) is None
            assert direct.layers(module, [], x, (hx[0], hx[1].to(wrong))) is None
            assert direct.layers(module.to(wrong), [], x, hx) is None
            with pytest.raises((RuntimeError, ValueError)):
                module(x, hx)
            module.to(dtype)
        with torch.autocast("cpu", other):
            assert direct.layers(module, [], x, hx) is None


def test_extreme_numbers(dtype):
    info = torch.finfo(dtype)
    extremes = [torch.nan, torch.inf, -torch.inf, info.max, -info.max, info.tiny, info.eps, -0.0, 0]
    for cell in ("rnn_relu", "lstm"):
        module = make_module(cell, 9, 17, num_layers=2).to(dtype)
        for i in range(len(extremes)):
            x = torch.randn(5, 3, 9, dtype=dtype)
            x[2, 1, 4] = extremes[i]
            assert_short_way_agrees(module, x, None)
        assert_short_way_agrees(module, torch.tensor(extremes, dtype=dtype).repeat(5, 3, 1), None)


def test_what_would_take_long_to_convert_is_left_to_torchs_threads(dtype):
    module = fused_rnn.RNN(300, 8, nonlinearity="relu").to(dtype)
    for timesteps, short in ((50, True), (1000, False)):
        x = torch.randn(timesteps, 1, 300, dtype=dtype)
        with torch.no_grad():
            assert (direct.layers(module, [], x, None) is not None) == short
            assert torch.equal(module(x)[0], general_way(module, x)[0])


def test_rows_do_not_depend_on_the_call(dtype):
    """The short way takes a long call and a short one the same way."""
    module = fused_rnn.GRU(6, 20).to(dtype)
    x, hx = torch.randn(80, 1, 6, dtype=dtype), None
    with torch.no_grad():
        whole, _ = module(x)
        for t in range(0, 80, 10):
            part, hx = module(x[t : t + 10], hx)
            wide = {torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
            torch.testing.assert_close(part, whole[t : t + 10], rtol=wide, atol=wide)


def test_every_cell_is_known():
    assert set(TORCH_CELLS) | {"gru_reset_before"} == set(CELLS)

"""Inference in a half type in one call (csrc/cpu/infer_half.cpp): the general way's bits."""

from __future__ import annotations

import pytest
import torch
from helpers.inputs import LAID_OUT, states
from helpers.needs import has_direct_calls
from helpers.outcomes import flat
from helpers.ways import general_way

import fused_rnn
from fused_rnn import direct
from fused_rnn.cells import CELLS
from fused_rnn.modules import make_module
from fused_rnn.testing import TORCH_CELLS

pytestmark = has_direct_calls


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


@pytest.mark.parametrize("cell", TORCH_CELLS)
@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"num_layers": 3, "bidirectional": True, "batch_first": True}]
)
def test_layers_have_the_general_ways_bits(cell, options, half):
    module = make_module(cell, 5, 17, **options).to(half)
    parts = len(module._flat_weights) // len(module._all_weights[0])
    for shape in ((1, 1, 5), (7, 3, 5), (3, 60, 5), (4, 5)):
        x = torch.randn(shape, dtype=half)
        batch = shape[:1] if module.batch_first else shape[1:2]
        for hx in (None, states(cell, parts, *batch[: len(shape) - 2], 17, dtype=half)):
            assert_short_way_agrees(module, x, hx)


@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_of_every_instruction_set(instruction_set, cell, half):
    for sizes in ((3, 1), (33, 100)):
        module = make_module(cell, *sizes, num_layers=2).to(half)
        assert_short_way_agrees(module, torch.randn(4, 3, sizes[0], dtype=half), None)


def test_projected_layers(half):
    module = fused_rnn.LSTM(5, 19, 2, proj_size=4, bidirectional=True).to(half)
    hx = torch.randn(4, 3, 4, dtype=half), torch.randn(4, 3, 19, dtype=half)
    for given in (None, hx):
        assert_short_way_agrees(module, torch.randn(6, 3, 5, dtype=half), given)


@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
def test_cells(name, half):
    module = getattr(fused_rnn, name)(5, 9).to(half)
    for batch in ((), (3,)):
        x = torch.randn(*batch, 5, dtype=half)
        cell = module._cell().name
        for hx in (None, states(cell, *batch, 9, dtype=half)):
            assert_short_way_agrees(module, x, hx)


# There are no complex numbers of bfloat16.
@pytest.mark.parametrize("layout", sorted(LAID_OUT.keys() - {"real part"}))
def test_input_may_lie_in_any_order(layout, half):
    for batch_first in (False, True):
        module = make_module("gru", 5, 17, num_layers=2, batch_first=batch_first).to(half)
        for shape in ((7, 3, 5), (1, 3, 5), (3, 1, 5), (6, 5)):
            x = LAID_OUT[layout](torch.randn(shape, dtype=half))
            hx = torch.randn(2, *shape[0 if batch_first else 1 :][: len(shape) - 2], 34)
            y, _ = assert_short_way_agrees(module, x, hx.to(half)[..., ::2])
            with torch.no_grad():
                dense, _ = module(x.contiguous(), hx.to(half)[..., ::2].contiguous())
                expected, _ = torch.nn.GRU(5, 17, 2, batch_first=batch_first).to(half)(x)
            assert torch.equal(y, dense)
            # As far as strides matter, those of torch.nn.
            for size, stride, wanted in zip(y.shape, y.stride(), expected.stride(), strict=True):
                assert size == 1 or stride == wanted


@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_autocast_is_heeded(cell, half):
    module = make_module(cell, 5, 17, num_layers=2, bidirectional=True)
    x = torch.randn(7, 3, 5)
    with torch.autocast("cpu", half):
        for given in (x, x.to(half)):
            for hx in (None, states(cell, 4, 3, 17), states(cell, 4, 3, 17, dtype=half)):
                results = assert_short_way_agrees(module, given, hx)
                assert all(result.dtype == half for result in results)


def test_autocast_of_another_device_changes_nothing():
    module, x = fused_rnn.GRU(5, 7), torch.randn(4, 2, 5)
    plain, _ = assert_short_way_agrees(module, x, None)
    torch.set_autocast_enabled("cuda", True)
    try:
        y, _ = assert_short_way_agrees(module, x, None)
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert y.dtype == torch.float32 and torch.equal(y, plain)


def test_mixed_types_are_not_for_the_short_way(half):
    module, x = fused_rnn.LSTM(5, 7).to(half), torch.randn(4, 2, 5, dtype=half)
    other = torch.float16 if half == torch.bfloat16 else torch.bfloat16
    hx = torch.randn(1, 2, 7, dtype=half), torch.randn(1, 2, 7, dtype=half)
    with torch.no_grad():
        assert direct.layers(module, [], x, hx) is not None
        for wrong in (torch.float32, torch.float64, other):
            assert direct.layers(module, [], x.to(wrong), hx) is None
            assert direct.layers(module, [], x, (hx[0].to(wrong), hx[1])) is None
            assert direct.layers(module, [], x, (hx[0], hx[1].to(wrong))) is None
            assert direct.layers(module.to(wrong), [], x, hx) is None
            with pytest.raises((RuntimeError, ValueError)):
                module(x, hx)
            module.to(half)
        with torch.autocast("cpu", other):
            assert direct.layers(module, [], x, hx) is None


def test_extreme_numbers(half):
    info = torch.finfo(half)
    extremes = [torch.nan, torch.inf, -torch.inf, info.max, -info.max, info.tiny, info.eps, -0.0, 0]
    for cell in ("rnn_relu", "lstm"):
        module = make_module(cell, 9, 17, num_layers=2).to(half)
        for i in range(len(extremes)):
            x = torch.randn(5, 3, 9, dtype=half)
            x[2, 1, 4] = extremes[i]
            assert_short_way_agrees(module, x, None)
        assert_short_way_agrees(module, torch.tensor(extremes, dtype=half).repeat(5, 3, 1), None)


def test_what_would_take_long_to_convert_is_left_to_torchs_threads(half):
    module = fused_rnn.RNN(300, 8, nonlinearity="relu").to(half)
    for timesteps, short in ((50, True), (1000, False)):
        x = torch.randn(timesteps, 1, 300, dtype=half)
        with torch.no_grad():
            assert (direct.layers(module, [], x, None) is not None) == short
            assert torch.equal(module(x)[0], general_way(module, x)[0])


def test_rows_do_not_depend_on_the_call(half):
    """The short way takes a long call and a short one the same way."""
    module = fused_rnn.GRU(6, 20).to(half)
    x, hx = torch.randn(80, 1, 6, dtype=half), None
    with torch.no_grad():
        whole, _ = module(x)
        for t in range(0, 80, 10):
            part, hx = module(x[t : t + 10], hx)
            wide = {torch.bfloat16: 2e-2, torch.float16: 3e-3}[half]
            torch.testing.assert_close(part, whole[t : t + 10], rtol=wide, atol=wide)


def test_every_cell_is_known():
    assert set(TORCH_CELLS) | {"gru_reset_before"} == set(CELLS)

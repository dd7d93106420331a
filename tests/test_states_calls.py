"""All states by the short way (fused_rnn/training.py): the general way's bits."""

import pytest
import torch
from helpers.inputs import HALVES, states
from helpers.masked import HIDDEN, INPUTS, OPTIONS, STEPS, Masked, masks_of
from helpers.modules import parts_of
from helpers.needs import has_direct_calls
from helpers.outcomes import flat, run, weighted
from helpers.ways import assert_general, assert_short
from torch.nn.utils.rnn import pack_sequence

import fused_rnn
from fused_rnn import derivatives, direct
from fused_rnn.cells import CELLS
from fused_rnn.modules import make_module

pytestmark = [pytest.mark.usefixtures("cpu_backend"), has_direct_calls]


def all_states(module):
    return Masked(module, return_states=True)


def input_of(options, batch=5, **like):
    shape = (batch, STEPS) if options["batch_first"] else (STEPS, batch)
    return torch.randn(*shape, INPUTS, **like)


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ".".join(map(str, map(int, o.values()))))
def test_all_states_have_the_general_ways_bits(cell, options, batch, ways):
    module = all_states(make_module(cell, INPUTS, HIDDEN, **options))
    x = input_of(options, batch)
    for hx in (None, states(cell, parts_of(options), batch, HIDDEN)):
        assert_short(ways, run, module, x, hx)
        with torch.no_grad():
            outputs = assert_short(ways, module, x, hx)
        assert not any(t.requires_grad for t in flat(outputs))
        _, final, history = outputs
        leading = (batch, STEPS) if options["batch_first"] else (STEPS, batch)
        assert [h.shape for h in history] == [(parts_of(options), *leading, HIDDEN)] * len(history)
        assert len(history) == 1 + CELLS[cell].has_c
        time = 2 if options["batch_first"] else 1
        for all_steps, last in zip(history, flat(final), strict=True):
            assert torch.equal(all_steps.select(time, -1)[0], last[0])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("options", OPTIONS[::2], ids=lambda o: ".".join(map(str, o.values())))
def test_of_packed_rows(cell, options, ways):
    module = all_states(make_module(cell, INPUTS, HIDDEN, **options))
    rows = [torch.randn(n, INPUTS) for n in (3, 9, 1, 9, 4)]
    for packed in (pack_sequence(rows, enforce_sorted=False), pack_sequence(rows[1:3])):
        batch = int(packed.batch_sizes[0])
        for hx in (None, states(cell, parts_of(options), batch, HIDDEN)):
            assert_short(ways, run, module, packed, hx)
            with torch.no_grad():
                assert_short(ways, module, packed, hx)


@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("layers", [1, 2])
def test_of_half_types_and_under_autocast(cell, dtype, layers, ways):
    x = torch.randn(STEPS, 5, INPUTS)
    module = all_states(make_module(cell, INPUTS, HIDDEN, num_layers=layers))
    with torch.autocast("cpu", dtype):
        outputs = assert_short(ways, run, module, x)
        assert outputs[0].dtype == dtype
        with torch.no_grad():
            _, _, history = assert_short(ways, module, x)
    assert all(h.dtype == dtype for h in history)
    assert_short(ways, run, module.to(dtype), x.to(dtype))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_of_one_sequence(cell, batch_first, ways):
    module = make_module(cell, INPUTS, HIDDEN, num_layers=2, batch_first=batch_first)
    x, hx = torch.randn(STEPS, INPUTS), states(cell, 2, HIDDEN)
    before = ways.direct
    with torch.no_grad():
        _, _, history = module(x, hx, return_states=True)
        _, _, expected = ways.call_generally(lambda: module(x, hx, return_states=True))
    assert ways.direct > before
    assert all(map(torch.equal, history, expected))
    assert history[0].shape == (2, STEPS, HIDDEN)


def test_of_a_projected_layer(ways):
    module = fused_rnn.LSTM(INPUTS, HIDDEN, num_layers=2, bidirectional=True, proj_size=4)
    hx = torch.randn(4, 5, 4), torch.randn(4, 5, HIDDEN)
    outputs = assert_short(ways, all_states(module), torch.randn(STEPS, 5, INPUTS), hx)
    assert [h.shape[-1] for h in outputs[2]] == [4, HIDDEN]
    assert_short(ways, run, all_states(module), torch.randn(STEPS, 5, INPUTS), hx)


def test_dropout_between_layers(ways):
    module = all_states(fused_rnn.LSTM(INPUTS, HIDDEN, 2, dropout=0.5))
    assert_short(ways, run, module, torch.randn(STEPS, 5, INPUTS))


@pytest.mark.parametrize("cell", ["rnn_relu", "gru"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("masks", ["lengths", "both"])
def test_of_rows_with_masks_without_c(cell, batch_first, masks, ways):
    module = make_module(cell, INPUTS, HIDDEN, num_layers=2, batch_first=batch_first)
    module = Masked(module, **masks_of(masks, batch_first), return_states=True)
    x = input_of({"batch_first": batch_first})
    assert_short(ways, run, module, x)
    with torch.no_grad():
        assert_short(ways, module, x)


def of_cells_only(outputs):
    return weighted(outputs[-1:])


def of_a_shared_gradient(outputs):
    return outputs[-1].sum()  # of which autograd gives one number, expanded


@pytest.mark.parametrize("loss", [of_cells_only, of_a_shared_gradient])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_c_alone(loss, dtype, ways):
    module = all_states(fused_rnn.LSTM(INPUTS, HIDDEN, dtype=dtype))
    x = torch.randn(STEPS, 5, INPUTS, dtype=dtype)
    assert_short(ways, lambda *args: run(*args, loss=loss), module, x)


def test_gradients_of_c_to_one_input(ways):
    module = all_states(fused_rnn.LSTM(INPUTS, HIDDEN).requires_grad_(False))
    c0 = torch.randn(1, 5, HIDDEN, requires_grad=True)
    x, h0 = torch.randn(STEPS, 5, INPUTS), torch.randn(1, 5, HIDDEN)

    def gradient():
        return torch.autograd.grad(module(x, (h0, c0))[2][1][0, 3].square().sum(), c0)

    assert_short(ways, gradient)


@pytest.mark.parametrize("of_c", [False, True])
def test_second_derivatives(of_c, ways, monkeypatch):
    """By scans, unless they are of c."""
    module, x = all_states(fused_rnn.LSTM(3, 4)), torch.randn(5, 2, 3)
    scans, fast = [], derivatives.are_fast
    monkeypatch.setattr(
        derivatives, "are_fast", lambda *args: scans.append(fast(*args)) or scans[-1]
    )

    def penalty():
        leaf = x.clone().requires_grad_()
        y, _, (h, c) = module(leaf)
        loss = (y.square() + h[0].sin()).sum() + (c.square().sum() if of_c else 0)
        (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), [leaf, *module.parameters()])

    actual = penalty()
    assert ways.direct == 1 and scans == [not of_c]
    torch.testing.assert_close(actual, ways.call_generally(penalty))


def test_large_ones_go_the_general_way(ways):
    """Of an LSTM: memory of what only backward sees is another's."""
    layer = all_states(fused_rnn.LSTM(64, 128))
    assert_general(ways, layer, torch.randn(600, 8, 64))
    assert_short(ways, run, all_states(fused_rnn.GRU(64, 128)), torch.randn(600, 8, 64))


@pytest.mark.parametrize("grad", [False, True])
def test_what_is_no_flag_is_refused(grad):
    layer, x = fused_rnn.GRU(INPUTS, HIDDEN), torch.randn(STEPS, 5, INPUTS)
    with torch.set_grad_enabled(grad):
        for value in (1, "no"):
            with pytest.raises(TypeError, match="return_states: expected a bool, got"):
                layer(x, return_states=value)


def test_inference_saves_no_gates():
    weights = [torch.randn(4 * HIDDEN, n) for n in (INPUTS, HIDDEN)]
    x, call = torch.randn(STEPS, 5, INPUTS), direct.calls().train_layer
    for save, all_cells, count in ((False, False, 3), (False, True, 4), (True, True, 5)):
        outputs = call(CELLS["lstm"].index, 1, save, all_cells, None, x, None, None, *weights)
        assert len(outputs) == count
    assert call(CELLS["lstm"].index, 1, False, 1, None, x, None, None, *weights) is None
    masks = torch.tensor([9, 3, 0, 1, 9]), None, False
    assert call(CELLS["lstm"].index, 1, False, True, masks, x, None, None, *weights) is None


def test_a_gradient_of_c_that_does_not_fit_gets_nothing():
    weights = [torch.randn(4 * HIDDEN, n) for n in (INPUTS, HIDDEN)]
    x, calls, lstm = torch.randn(STEPS, 5, INPUTS), direct.calls(), CELLS["lstm"].index
    y, _, _, gates, cells = calls.train_layer(lstm, 1, True, True, None, x, None, None, *weights)
    saved = y, gates, cells, None, x, None, None, *weights
    needs = (True, *(False,) * 4)

    def answer(grad_cells):
        return calls.train_layer_backward(lstm, 1, False, needs, y, None, None, grad_cells, saved)

    assert len(answer(torch.randn_like(cells))) == 1
    for wrong in (cells[0], cells[:, 1:], cells.double(), cells.bfloat16(), cells[..., :1], 1):
        assert answer(wrong) is None

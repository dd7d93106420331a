"""Training in a half type, or under autocast, by the library (csrc/cpu/train.cpp): the general
way's bits, with gradients in the type of what they belong to."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from helpers.inputs import LAID_OUT, states
from helpers.masked import Masked
from helpers.needs import has_direct_calls
from helpers.outcomes import run
from helpers.ways import assert_both_ways
from torch.nn.utils.rnn import pack_sequence

import fused_rnn
from fused_rnn.cells import CELLS
from fused_rnn.modules import make_module
from fused_rnn.testing import TORCH_CELLS

pytestmark = [pytest.mark.usefixtures("cpu_backend"), has_direct_calls]


OPTIONS = [{}, {"bias": False, "batch_first": True}, {"num_layers": 3, "bidirectional": True}]


@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_who_begins_again_drops_what_torch_drops(cell, half):
    """The first layer is small enough for the library, the second is not."""
    module = make_module(cell, 8, 128, num_layers=2, dropout=0.5).to(half)
    theirs = fused_rnn.restore(copy.deepcopy(module))
    weights = sum(weight.numel() for weight in module.all_weights[0])
    rows = (2**18 - weights) // (8 + module.weight_ih_l0.shape[0])  # csrc/cpu/operands.h
    x, found = torch.randn(rows, 1, 8), []
    for one in (module, theirs):
        torch.manual_seed(7)
        one(x.to(half))
        found.append(torch.get_rng_state())
    assert torch.equal(*found)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("options", OPTIONS, ids=len)
def test_layers_have_the_general_ways_bits(cell, options, half, ways):
    module = make_module(cell, 5, 17, **options).to(half)
    parts = len(module._all_weights)
    for timesteps, batch in ((1, 1), (7, 3), (3, 60)):
        sizes = (batch, timesteps) if module.batch_first else (timesteps, batch)
        x = torch.randn(*sizes, 5, dtype=half)
        for hx in (None, states(cell, parts, batch, 17, dtype=half)):
            assert_both_ways(ways, module, x, hx)


@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_of_every_instruction_set(instruction_set, cell, half, ways):
    for sizes in ((3, 1), (20, 33)):
        module = make_module(cell, *sizes).to(half)
        assert_both_ways(ways, module, torch.randn(4, 9, sizes[0], dtype=half))
        with torch.autocast("cpu", half):
            module = make_module(cell, *sizes)
            assert_both_ways(ways, module, torch.randn(4, 9, sizes[0]))


def test_projected_layers(half, ways):
    module = fused_rnn.LSTM(5, 19, 2, proj_size=4, bidirectional=True).to(half)
    hx = torch.randn(4, 3, 4, dtype=half), torch.randn(4, 3, 19, dtype=half)
    for given in (None, hx):
        assert_both_ways(ways, module, torch.randn(6, 3, 5, dtype=half), given)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
def test_cells(name, autocast, half, ways):
    module = getattr(fused_rnn, name)(5, 9).to(torch.float32 if autocast else half)
    cell = {"RNNCell": "rnn_tanh", "GRUCell": "gru", "LSTMCell": "lstm"}[name]
    with torch.autocast("cpu", half) if autocast else contextlib.nullcontext():
        for shape in ((3, 5), (1, 5), (5,)):
            x = torch.randn(shape, dtype=module.weight_ih.dtype)
            for hx in (None, states(cell, *shape[:-1], 9, dtype=x.dtype)):
                assert_both_ways(ways, module, x, hx)


# There are no complex numbers of bfloat16.
@pytest.mark.parametrize("layout", sorted(LAID_OUT.keys() - {"real part"}))
def test_input_may_lie_in_any_order(layout, half, ways):
    module = fused_rnn.GRU(5, 17).to(half)
    x = LAID_OUT[layout](torch.randn(4, 3, 5, dtype=half))
    y, _ = module(x)
    assert ways.direct == 1
    expected, _ = module(x.contiguous())
    assert torch.equal(y, expected)


@pytest.mark.parametrize("options", OPTIONS, ids=len)
@pytest.mark.parametrize("cell", CELLS)
def test_autocast_is_heeded(cell, options, half, ways):
    module = make_module(cell, 5, 17, **options)
    parts, sizes = len(module._all_weights), (3, 7) if module.batch_first else (7, 3)
    x = torch.randn(*sizes, 5)
    with torch.autocast("cpu", half):
        for given in (x, x.to(half)):
            for hx in (None, states(cell, parts, 3, 17), states(cell, parts, 3, 17, dtype=half)):
                assert_both_ways(ways, module, given, hx)
        assert module(x)[0].dtype == half
    assert all(g.dtype == torch.float32 for g in run(module, x))


def test_gradients_are_in_the_type_of_what_they_belong_to(half):
    module = fused_rnn.LSTM(5, 6)
    x = torch.randn(4, 3, 5, requires_grad=True)
    h0 = torch.randn(1, 3, 6, dtype=half, requires_grad=True)
    c0 = torch.randn(1, 3, 6, requires_grad=True)
    with torch.autocast("cpu", half):
        y, _ = module(x, (h0, c0))
    y.float().square().sum().backward()
    for t in (x, h0, c0, *module.parameters()):
        assert t.grad.dtype == t.dtype and t.grad.count_nonzero() > 0


def test_gradients_of_gradients_under_autocast(half, ways):
    module, x = fused_rnn.GRU(4, 6), torch.randn(5, 3, 4, requires_grad=True)

    def twice():
        with torch.autocast("cpu", half):
            y, _ = module(x)
        (grad,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
        return [grad, *torch.autograd.grad(grad.square().sum(), [x, *module.parameters()])]

    actual = twice()
    assert ways.direct == 1
    # Sums over timesteps are rounded in other places.
    for a, e in zip(actual, ways.call_generally(twice), strict=True):
        assert a.dtype == e.dtype and (a - e).norm() <= 0.02 * e.norm()


def test_backward_does_not_ask_for_autocast(half):
    module, x = fused_rnn.LSTM(4, 6), torch.randn(5, 3, 4)
    grads = []
    for inside in (False, True):
        with torch.autocast("cpu", half):
            y, _ = module(x)
            loss = y.float().square().sum()
            if inside:
                grads.append(torch.autograd.grad(loss, list(module.parameters())))
        if not inside:
            grads.append(torch.autograd.grad(loss, list(module.parameters())))
    assert all(map(torch.equal, *grads))


def test_much_to_convert_is_the_general_ways(half, ways):
    module = fused_rnn.GRU(8, 300).to(half)
    run(module, torch.randn(2, 2, 8, dtype=half))
    assert (ways.direct, ways.general) == (0, 1)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("options", OPTIONS, ids=len)
def test_packed_rows(cell, options, autocast, half, ways):
    module = make_module(cell, 5, 17, **options).to(torch.float32 if autocast else half)
    own, parts = module.weight_ih_l0.dtype, len(module._all_weights)
    with torch.autocast("cpu", half) if autocast else contextlib.nullcontext():
        for lengths in ((7, 4, 1), (2, 7, 1), (3,)):
            rows = [torch.randn(length, 5, dtype=own) for length in lengths]
            x = pack_sequence(rows, enforce_sorted=False)
            for hx in (None, states(cell, parts, len(lengths), 17, dtype=own)):
                assert_both_ways(ways, module, x, hx)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_batches_with_masks(batch_first, cell, autocast, half, ways):
    options = {"num_layers": 2, "bidirectional": True, "batch_first": batch_first}
    module = make_module(cell, 5, 17, **options).to(torch.float32 if autocast else half)
    own, resets = module.weight_ih_l0.dtype, torch.rand(3, 7) < 0.3
    lengths = torch.tensor([4, 7, 0])
    with torch.autocast("cpu", half) if autocast else contextlib.nullcontext():
        x = torch.randn((3, 7, 5) if batch_first else (7, 3, 5), dtype=own)
        for masks in ({"lengths": lengths}, {"lengths": lengths, "resets": resets}):
            if "resets" in masks and not batch_first:
                masks["resets"] = resets.t()
            masked = Masked(module, **masks)
            for hx in (None, states(cell, 4, 3, 17, dtype=own)):
                assert_both_ways(ways, masked, x, hx)


def test_types_that_differ_are_the_general_ways_to_name(half):
    module = fused_rnn.GRU(5, 6).to(half)
    with pytest.raises(ValueError, match="input dtype"):
        module(torch.randn(4, 3, 5))
    with pytest.raises(RuntimeError, match="hx: expected dtype"):
        module(torch.randn(4, 3, 5, dtype=half), torch.randn(1, 3, 6))

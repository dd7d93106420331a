"""Training past the dispatcher (csrc/python): the operators' bits, and never a guess."""

from __future__ import annotations

import gc
import sys

import pytest
import torch
from helpers.inputs import MISFITS, SIZES_THAT_DO_NOT_FIT, operator_arguments, states
from helpers.modules import LAYERS, make_pair
from helpers.needs import has_direct_calls
from helpers.outcomes import flat, run, weighted
from torch.nn.utils.rnn import pack_sequence

import fused_rnn
from fused_rnn import direct
from fused_rnn.cells import CELLS
from fused_rnn.modules import make_module

pytestmark = [pytest.mark.usefixtures("cpu_backend"), has_direct_calls]


def forward(arguments, save=True, calls=None):
    a = arguments
    call = (calls or direct.calls()).train_layer
    tensors = a["batch_sizes"], a["x"], a["h0"], a["c0"], *a["weights"]
    return call(a["cell"], a["directions"], save, False, *tensors)


def backward(arguments, saved, needs, grads, calls=None):
    """saved: y, gates and cells."""
    a = arguments
    saved = (*saved, a["batch_sizes"], a["x"], a["h0"], a["c0"], *a["weights"])
    call = (calls or direct.calls()).train_layer_backward
    return call(a["cell"], a["directions"], False, needs, *grads, None, saved)


ALL_NEEDS = (True,) * 7


def saved_and_grads(arguments):
    y, h_n, c_n, gates, cells = forward(arguments)
    return (y, gates, cells), (torch.randn_like(y), torch.randn_like(h_n), torch.randn_like(c_n))


def taken(answers):
    """Whether calls of a layer were taken; `cpu_is_welcome` gives True or False."""
    return [answer is not None for answer in answers if type(answer) is not bool]


def every_module(cell):
    yield make_module(cell, 5, 17)
    yield make_module(cell, 5, 17, num_layers=2, bidirectional=True, bias=False)
    if cell == "lstm":
        yield make_module(cell, 5, 17, proj_size=3)


def every_cell_module(cell):
    if CELLS[cell].torch_mode in ("RNN_TANH", "GRU", "LSTM"):
        name = {"RNN_TANH": "RNNCell", "GRU": "GRUCell", "LSTM": "LSTMCell"}
        yield getattr(fused_rnn, name[CELLS[cell].torch_mode])(5, 17)


def inputs_of(cell):
    """Modules of that cell, each with its inputs."""
    for module in every_module(cell):
        yield module, torch.randn(7, 3, 5)
        for lengths in ((7, 4, 1), (2, 7, 1), (3,)):
            rows = [torch.randn(length, 5) for length in lengths]
            yield module, pack_sequence(rows, enforce_sorted=list(lengths) == sorted(lengths)[::-1])
    for module in every_cell_module(cell):
        yield module, torch.randn(3, 5)


@pytest.mark.parametrize("cell", CELLS)
def test_modules_have_the_operators_bits(cell, operators_only, asked):
    for module, x in inputs_of(cell):
        del asked[:]
        actual = run(module, x)
        layers = getattr(module, "num_layers", 1)
        assert taken(asked) == [True] * (2 * layers)
        expected = operators_only(run, module, x)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("needs", [ALL_NEEDS, (False, True, False, True, False, False, True)])
def test_gradients_have_the_operators_bits(needs):
    arguments = operator_arguments()
    saved, grads = saved_and_grads(arguments)
    found = backward(arguments, saved, needs, grads)
    y, gates, cells = saved
    expected = torch.ops.fused_rnn_cpu.train_layer_backward(
        **arguments, **dict(zip(("grad_y", "grad_h_n", "grad_c_n"), grads, strict=True)),
        y=y, gates=gates, cells=cells, needs=sum(need << i for i, need in enumerate(needs)),
    )  # fmt: skip
    assert len(found) == sum(needs) and all(map(torch.equal, found, expected))


def test_gradients_may_be_strided_or_absent():
    arguments = operator_arguments()
    saved, grads = saved_and_grads(arguments)
    expected = backward(arguments, saved, ALL_NEEDS, grads)
    strided = [torch.stack([grad] * 2, -1)[..., 0] for grad in grads]
    assert all(map(torch.equal, backward(arguments, saved, ALL_NEEDS, strided), expected))
    expanded = torch.tensor(2.0).expand(grads[0].shape)
    found = backward(arguments, saved, ALL_NEEDS, (expanded, None, None))
    zeros = map(torch.zeros_like, grads[1:])
    expected = backward(arguments, saved, ALL_NEEDS, (expanded.contiguous(), *zeros))
    assert all(map(torch.equal, found, expected))


def test_only_what_is_wanted_is_saved():
    arguments = operator_arguments()
    assert [len(forward(arguments, save)) for save in (True, False)] == [5, 3]
    assert all(map(torch.equal, forward(arguments), forward(arguments, False)))


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_gets_none(name):
    arguments = operator_arguments()
    saved, grads = saved_and_grads(arguments)
    for value in MISFITS[name]:
        assert forward(arguments | {name: value}) is None
        assert backward(arguments | {name: value}, saved, ALL_NEEDS, grads) is None


def test_arguments_of_other_kinds_get_none_and_no_error():
    arguments = operator_arguments()
    saved, grads = saved_and_grads(arguments)
    others = (None, 2**70, "lstm", 2.0, torch.tensor(3), [])
    for other in others:
        for name in ("cell", "directions", "x"):
            assert forward(arguments | {name: other}) is None
            assert backward(arguments | {name: other}, saved, ALL_NEEDS, grads) is None
        assert forward(arguments, other) is None
        assert backward(arguments, saved, other, grads) is None
        weights = [*arguments["weights"][:3], other]
        assert forward(arguments | {"weights": weights}) is None
        if other is not None:
            for i in range(3):
                odd = [*grads[:i], other, *grads[i + 1 :]]
                assert backward(arguments, saved, ALL_NEEDS, odd) is None
                odd = [*saved[:i], other, *saved[i + 1 :]]
                assert backward(arguments, odd, ALL_NEEDS, grads) is None
    calls = direct.calls()
    assert calls.train_layer() is calls.train_layer_backward() is None
    assert backward(arguments, saved, ALL_NEEDS * 10, grads) is None
    assert backward(arguments, saved, (1,) * 7, grads) is None
    assert calls.train_layer_backward(3, 1, False, ALL_NEEDS, *grads, list(saved)) is None
    assert calls.train_layer_backward(3, 1, False, ALL_NEEDS, *grads, saved) is None


def packed_arguments():
    return operator_arguments() | {"x": torch.randn(5, 4), "batch_sizes": torch.tensor([2, 2, 1])}


def test_packed_rows_have_the_operators_bits():
    arguments = packed_arguments()
    saved, grads = saved_and_grads(arguments)
    operators = torch.ops.fused_rnn_cpu
    expected = operators.train_layer(**arguments)
    assert all(map(torch.equal, forward(arguments), expected)) and expected[0].shape == (5, 6)
    names = "grad_y", "grad_h_n", "grad_c_n", "y", "gates", "cells"
    given = arguments | dict(zip(names, (*grads, *saved), strict=True))
    expected = operators.train_layer_backward(**given, needs=0b1111111)
    found = backward(arguments, saved, ALL_NEEDS, grads)
    assert len(found) == 7 and all(map(torch.equal, found, expected))
    # Whatever lies between them.
    sizes = torch.tensor([[2, 9], [2, 9], [1, 9]])[:, 0].clone()
    assert all(map(torch.equal, forward(arguments | {"batch_sizes": sizes}), forward(arguments)))


@pytest.mark.parametrize("sizes", SIZES_THAT_DO_NOT_FIT, ids=str)
def test_sizes_of_steps_that_do_not_fit_get_none(sizes):
    arguments = packed_arguments()
    saved, grads = saved_and_grads(arguments)
    good = arguments["batch_sizes"]
    others = [good.int(), good.to("meta"), good.to_sparse(), torch.nn.Parameter(good, False)]
    others += [torch.stack([good, good], 1)[:, 0], good.tolist(), tuple(good), 3]
    for odd in (torch.tensor(sizes), *others):
        assert forward(arguments | {"batch_sizes": odd}) is None
        assert backward(arguments | {"batch_sizes": odd}, saved, ALL_NEEDS, grads) is None


@pytest.mark.parametrize("kind", ["negated", "sparse", "zero", "meta", "subclass"])
def test_tensors_that_are_more_than_their_memory_get_none(kind):
    arguments = operator_arguments()
    saved, grads = saved_and_grads(arguments)

    class Subclass(torch.Tensor):
        pass

    change = {
        "negated": torch._neg_view,
        "sparse": lambda t: t.to_sparse(),
        "zero": lambda t: torch._efficientzerotensor(t.shape),
        "meta": lambda t: t.to("meta"),
        "subclass": lambda t: t.as_subclass(Subclass),
    }[kind]
    for name in ("x", "h0", "c0"):
        assert forward(arguments | {name: change(arguments[name])}) is None
    weights = arguments["weights"]
    assert forward(arguments | {"weights": [*weights[:2], change(weights[2]), weights[3]]}) is None
    for i in range(3):
        odd = [*grads[:i], change(grads[i]), *grads[i + 1 :]]
        assert backward(arguments, saved, ALL_NEEDS, odd) is None


def test_who_watches_or_redirects_gets_none(monkeypatch):
    arguments = operator_arguments()
    saved, grads = saved_and_grads(arguments)

    def answers():
        return forward(arguments), backward(arguments, saved, ALL_NEEDS, grads)

    assert None not in answers()
    with torch.autocast("cpu"):  # is heeded, by forward alone
        y, *_ = forward(arguments)
        (grad, *_) = backward(arguments, saved, ALL_NEEDS, grads)
    assert (y.dtype, grad.dtype) == (torch.bfloat16, torch.float32)
    with torch.profiler.profile():
        assert answers() == (None, None)
    with torch.overrides.BaseTorchFunctionMode():
        assert answers() == (None, None)
        with torch.device("cpu"):
            assert answers() == (None, None)
    with torch.device("meta"):  # says where new tensors are that nobody makes here
        assert None not in answers()
    monkeypatch.setenv("FUSED_RNN_BACKEND", "reference")
    assert answers() == (None, None)


def test_large_layers_are_the_operators(asked):
    for timesteps, is_direct in ((256, True), (600, False)):
        del asked[:]
        x = torch.randn(timesteps, 10, 8)
        for given in (x, pack_sequence(list(x.unbind(1)))):
            run(fused_rnn.GRU(8, 64), given)
        assert set(taken(asked)) == {is_direct}


def test_references_balance():
    module = fused_rnn.LSTMCell(4, 6)
    x = torch.randn(3, 4, requires_grad=True)

    def train():
        h, c = module(x)
        (h.sum() + c.sum()).backward()
        x.grad = None

    train()
    gc.collect()
    objects = [x, *module.parameters()]
    before = [sys.getrefcount(o) for o in objects]
    for _ in range(50):
        train()
        flat(module(x))
    gc.collect()
    after = [sys.getrefcount(o) for o in objects]
    assert after == before


@pytest.mark.parametrize("timesteps", [1, 3])
@pytest.mark.parametrize("cell", LAYERS)
def test_gradients_do_not_depend_on_whether_states_want_theirs(cell, timesteps):
    """Where they want none, backward leaves out what only they need: the others' gradients are to
    the bit what they are beside it."""
    ours, _ = make_pair(cell, "", 5, 17, bidirectional=True)
    x, hx = torch.randn(timesteps, 3, 5), states(cell, 2, 3, 17)

    def gradients(wanted):
        leaves = tuple(h.clone().requires_grad_(wanted) for h in flat(hx))
        y, finals = ours(x, leaves if len(leaves) > 1 else leaves[0])
        return torch.autograd.grad(weighted(flat((y, finals))), list(ours.parameters()))

    assert all(map(torch.equal, gradients(True), gradients(False)))

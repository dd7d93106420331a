"""Training past the dispatcher (csrc/direct_calls.cpp): the operators' bits, and never a guess."""

from __future__ import annotations

import gc
import sys

import pytest
import torch
from test_direct_calls import asked, has_direct_calls, operators_only  # noqa: F401, fixtures
from test_streaming import flat
from test_training_calls import MISFITS, operator_arguments, run

import fused_rnn
from fused_rnn import direct
from fused_rnn.cells import CELLS
from fused_rnn.modules import make_module

pytestmark = [pytest.mark.usefixtures("cpu_backend"), has_direct_calls]


def forward(arguments, save=True, calls=None):
    a = arguments
    call = (calls or direct.calls()).train_layer
    return call(a["cell"], a["directions"], save, a["x"], a["h0"], a["c0"], *a["weights"])


def backward(arguments, saved, needs, grads, calls=None):
    """saved: y, gates and cells."""
    a = arguments
    saved = (a["batch_sizes"], *saved, a["x"], a["h0"], a["c0"], *a["weights"])
    call = (calls or direct.calls()).train_layer_backward
    return call(a["cell"], a["directions"], needs, *grads, saved)


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
    if CELLS[cell].torch_mode in ("RNN_TANH", "GRU", "LSTM"):
        name = {"RNN_TANH": "RNNCell", "GRU": "GRUCell", "LSTM": "LSTMCell"}
        yield getattr(fused_rnn, name[CELLS[cell].torch_mode])(5, 17)


@pytest.mark.parametrize("cell", CELLS)
def test_modules_have_the_operators_bits(cell, operators_only, asked):  # noqa: F811
    for module in every_module(cell):
        shape = (3, 5) if isinstance(module, torch.nn.RNNCellBase) else (7, 3, 5)
        x = torch.randn(shape)
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


@pytest.mark.parametrize("name", [name for name in MISFITS if name != "batch_sizes"])
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
    assert calls.train_layer_backward(3, 1, ALL_NEEDS, *grads, list(saved)) is None
    assert calls.train_layer_backward(3, 1, ALL_NEEDS, *grads, saved) is None
    packed = arguments | {"batch_sizes": torch.tensor([2] * 5)}
    assert backward(packed, saved, ALL_NEEDS, grads) is None


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
    monkeypatch.setenv("FUSED_RNN_BACKEND", "reference")
    assert answers() == (None, None)


def test_large_layers_are_the_operators(asked):  # noqa: F811
    for timesteps, is_direct in ((256, True), (600, False)):
        del asked[:]
        run(fused_rnn.GRU(8, 64), torch.randn(timesteps, 10, 8))
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

"""torch.jit, which torch no longer develops: traces hold torch.nn's operators, scripts are refused
with the way out."""

from __future__ import annotations

import io

import pytest
import torch
from helpers.outcomes import flat
from toolkit import Inputs, near, train_step
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fused_rnn

# torch.jit is deprecated, and traces warn of every shape they fix.
pytestmark = pytest.mark.filterwarnings("ignore")


def saved_and_loaded(traced):
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.parametrize("with_hx", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_trace(layer, bidirectional, with_hx, make):
    module, theirs = make.pair(layer, num_layers=2, bidirectional=bidirectional)
    traced = torch.jit.trace(module, Inputs(module, with_hx).args)
    assert not any("fused_rnn" in node.kind() for node in traced.inlined_graph.nodes())
    args = Inputs(module, with_hx, 9, 8).args
    near(train_step(traced, module, *args), train_step(theirs, theirs, *args))
    near(saved_and_loaded(traced)(*args), theirs(*args))


def test_trace_of_cells(cell, make):
    module, theirs = make.pair(cell)
    traced = torch.jit.trace(module, Inputs(module, True).args)
    args = Inputs(module, True, batch=8).args
    near(train_step(traced, module, *args), train_step(theirs, theirs, *args))


def test_trace_of_a_model(make):
    """Parametrized weights, dropout, hooks and packed rows on the way."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = weight_norm(make("lstm", batch_first=True), "weight_hh_l0")
            self.second = make("gru", num_layers=2, dropout=0.5)
            self.between = torch.nn.Linear(5, 3)

        def forward(self, x, rows, batch_sizes):
            packed = PackedSequence(rows, batch_sizes)
            return self.second(self.between(self.first(x)[0]))[0], self.second(packed)[0].data

    model = Model().eval()
    seen = []
    model.first.register_forward_hook(lambda *_: seen.append(1))
    packed = pack_sequence([torch.randn(n, 3) for n in (4, 2)])
    args = (torch.randn(4, 6, 3), packed.data, packed.batch_sizes)
    traced = torch.jit.trace(model, args)
    assert seen == [1, 1, 1]  # of the trace, and of its check, by the model and by the trace
    near(traced(*args), model(*args))


def test_trace_of_what_torch_does_not_have():
    x, lengths = torch.randn(6, 7, 3), torch.full((7,), 3)
    for model in (
        lambda x: fused_rnn.GRU(3, 5)(x, lengths=lengths)[0],
        lambda x: fused_rnn.GRU(3, 5)(x, return_states=True)[0],
        lambda x: fused_rnn.GRU(3, 5, reset_after=False)(x)[0],
    ):
        with pytest.raises(RuntimeError, match=r"torch\.jit\.trace of fused_rnn\.GRU"):
            torch.jit.trace(model, x)


def test_trace_leaves_the_module_as_it_was():
    module = fused_rnn.LSTM(3, 5)
    before = dict(vars(module))
    torch.jit.trace(module, torch.randn(6, 4, 3))
    assert type(module) is fused_rnn.LSTM
    assert vars(module).keys() == before.keys()
    assert all(vars(module)[name] is value for name, value in before.items())


def test_script_is_refused_and_restore_is_the_way():
    for module in (fused_rnn.LSTM(3, 5), fused_rnn.RNN(3, 5), fused_rnn.GRUCell(3, 5)):
        model = torch.nn.Sequential(module)
        name = type(module).__name__
        with pytest.raises(RuntimeError, match=rf"fused_rnn\.{name}: call fused_rnn.restore"):
            torch.jit.script(model)
        assert type(model[0]) is type(module)
        (x,) = Inputs(module).args
        expected = flat(model(x))
        scripted = torch.jit.script(fused_rnn.restore(model))
        near(saved_and_loaded(scripted)(x), expected)
        assert type(fused_rnn.replace(model)[0]) is type(module)

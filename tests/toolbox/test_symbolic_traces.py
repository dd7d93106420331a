"""torch.fx: a symbolic trace has a recurrent module as one node, and steps over what is inside."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from toolkit import Inputs, near, train_step
from torch import nn
from torch.fx import symbolic_trace
from torch.fx.proxy import TraceError

import fused_rnn


class Model(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = nn.ModuleDict({"recurrent": inner})

    def forward(self, x):
        return self.inner["recurrent"](x * 2)


class ModelWithStates(Model):
    def forward(self, x, hx):
        return self.inner["recurrent"](x * 2, hx)


def targets(graph_module):
    return [n.target for n in graph_module.graph.nodes if n.op == "call_module"]


@pytest.mark.parametrize("with_hx", [False, True], ids=["zeros", "hx"])
def test_symbolic_trace(variant, with_hx, make):
    module, theirs = map(ModelWithStates if with_hx else Model, make.pair(variant))
    args = Inputs(module.inner["recurrent"], with_hx).args
    traced = symbolic_trace(module)
    assert targets(traced) == ["inner.recurrent"]
    for graph in (traced, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        found = train_step(graph, graph, *args)
        near(found, train_step(theirs, theirs, *args))
    with torch.no_grad():
        assert targets(symbolic_trace(module))


def test_dropout_follows_the_graph(make):
    model = Model(make("gru", num_layers=2, dropout=0.5)).eval()
    traced = symbolic_trace(model)
    x = Inputs(model.inner["recurrent"]).args[0]
    near(traced(x), model(x))
    assert not torch.equal(traced.train()(x)[0], model(x)[0])


def test_what_torch_does_not_have():
    """Our own arguments go into the graph, and states are carried when it runs."""

    class Ragged(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = fused_rnn.LSTM(3, 4, stateful=True)

        def forward(self, x, lengths):
            return self.layer(x, lengths=lengths, return_states=True)

    model = Ragged()
    traced = symbolic_trace(model)
    assert model.layer.state_h is None
    x, lengths = torch.randn(5, 2, 3), torch.tensor([2, 5])
    expected = [model(x, lengths) for _ in range(2)]
    traced.layer.reset_states()
    for each in expected:
        near(traced(x, lengths), each)


def test_what_a_graph_cannot_hold():
    with pytest.raises(TraceError, match="expected a model with GRUCell in it"):
        symbolic_trace(fused_rnn.GRUCell(3, 4))
    with pytest.raises(TraceError):
        symbolic_trace(fused_rnn.GRU(3, 4))
    layer = fused_rnn.GRU(3, 4)
    layer.register_forward_hook(lambda *_: None)
    with pytest.raises(TraceError, match="expected no forward hooks on GRU"):
        symbolic_trace(nn.Sequential(layer))

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, nn.RNNBase) or super().is_leaf_module(module, name)

    assert [n.target for n in Tracer().trace(nn.Sequential(layer)).nodes if n.op == "call_module"]

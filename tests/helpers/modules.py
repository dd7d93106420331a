"""Modules of ours and torch.nn's, and what can be done to their weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import fused_rnn

NAMES = "RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell"
# cell -> class name, arguments that make it
LAYERS = {
    "rnn_tanh": ("RNN", {}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "gru": ("GRU", {}),
    "lstm": ("LSTM", {}),
}
ALL = [(cell, suffix) for cell in LAYERS for suffix in ("", "Cell")]
every_module = pytest.mark.parametrize(("cell", "suffix"), ALL, ids="".join)
every_layer = pytest.mark.parametrize("cell", LAYERS)


def make_pair(cell, suffix, *sizes, **options):
    """A module of ours and torch.nn's with the same weights, in eval mode."""
    name, extra = LAYERS[cell]
    ours = getattr(fused_rnn, name + suffix)(*sizes, **extra, **options).eval()
    theirs = getattr(torch.nn, name + suffix)(*sizes, **extra, **options).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def changed(cell, suffix, change, which):
    """A module, one of whose weights was changed."""
    ours, _ = make_pair(cell, suffix, 8, 8)
    change(ours, which if suffix else f"{which}_l0")
    return ours


def weight_changes():
    def set_wrong(module, name):
        parameter = getattr(module, name)
        setattr(module, name, torch.nn.Parameter(torch.randn(parameter.shape[0] + 1, 8)))

    def subclass(module, name):
        class Subclass(torch.nn.Parameter):
            pass

        setattr(module, name, Subclass(getattr(module, name).detach()))

    def strided(module, name):
        value = getattr(module, name).detach()
        setattr(module, name, torch.nn.Parameter(value.t().contiguous().t()))

    def missing(module, name):
        delattr(module, name)

    def none(module, name):
        setattr(module, name, None)

    def double(module, name):
        setattr(module, name, torch.nn.Parameter(getattr(module, name).detach().double()))

    def sparse(module, name):
        value = getattr(module, name).detach().to_sparse()
        setattr(module, name, torch.nn.Parameter(value))

    def meta(module, name):
        setattr(module, name, torch.nn.Parameter(getattr(module, name).to("meta")))

    return set_wrong, subclass, strided, missing, none, double, sparse, meta


def weights_that_are_no_parameters():
    def plain_tensor(module, name):
        value = getattr(module, name).detach() * 2
        delattr(module, name)
        setattr(module, name, value)

    def parametrized(module, name):
        class Twice(torch.nn.Module):
            def forward(self, weight):
                return 2 * weight

        parametrize.register_parametrization(module, name, Twice())

    return plain_tensor, parametrized


class Output(nn.Module):
    """The output of a recurrent module, without its states."""

    def forward(self, result):
        return result[0]


def parts_of(options):
    return options.get("num_layers", 1) * (1 + options.get("bidirectional", False))


def parameters_of(module):
    return {name: p.detach() for name, p in module.named_parameters()}


def seeded_pair(name: str, *sizes: int, seed: int = 0, **options) -> tuple[nn.Module, nn.Module]:
    """torch.nn's module and ours, each built from the same seed."""
    modules = []
    for namespace in (nn, fused_rnn):
        torch.manual_seed(seed)
        modules.append(getattr(namespace, name)(*sizes, **options))
    return modules[0], modules[1]

"""A module's weights, looked at once a call.

Where a weight is computed, as by a parametrization, a look may change it: a spectral norm in
training takes a step at each. But several ways may read a call's weights one after the other until
one of them takes the call. So whoever looks leaves what he saw in the call's list, `looked`, which
is empty before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

_COMPUTE_WEIGHTS = WeightNorm, SpectralNorm, BasePruningMethod
CELL_WEIGHTS = "weight_ih", "weight_hh", "bias_ih", "bias_hh"


def own_parameters(module: torch.nn.Module, names: Sequence[str]) -> list[Any] | None:
    """The parameters of these names that lie in the module, and None where one does not: it is
    computed, or is a plain attribute. No look."""
    parameters = module._parameters
    try:
        return [parameters[name] for name in names]
    except KeyError:
        return None


def attributes(module: torch.nn.Module, names: Sequence[str], looked: list[Any]) -> list[Any]:
    """The module's attributes of these names, whatever they are, read once a call."""
    if not looked:
        looked.extend([getattr(module, name) for name in names])
    return looked


def layer_weights(module: torch.nn.RNNBase, looked: list[Any]) -> list[Any]:
    """A layer module's weights in the order of `functional`, whatever they are."""
    names = module._flat_weights_names
    own = own_parameters(module, names)
    return attributes(module, names, looked) if own is None else own


def cell_weights(module: torch.nn.RNNCellBase, looked: list[Any]) -> list[Any]:
    """w_ih, w_hh and the biases there are, whatever `module.bias` says, as torch.nn takes them."""
    own = own_parameters(module, CELL_WEIGHTS)
    return those_given(attributes(module, CELL_WEIGHTS, looked) if own is None else own)


def refresh(module: torch.nn.Module) -> None:
    """Computes the weights that the module's own call would compute first: the older
    torch.nn.utils.weight_norm and spectral_norm, and prune, do so in a hook. For whoever reads
    weights without a call, who would find those of the last one."""
    training, module.training = module.training, False  # no power iteration
    try:
        with torch.no_grad():  # of what was computed copies can be made then
            for hook in list(module._forward_pre_hooks.values()):
                if isinstance(hook, _COMPUTE_WEIGHTS):
                    hook(module, None)
    finally:
        module.training = training


def dropout_of(module: torch.nn.RNNBase) -> float | None:
    """What a call drops of what goes from layer to layer; None for no such probability."""
    dropout = module.dropout
    if type(dropout) is not float or not 0 <= dropout <= 1:
        return None
    return dropout if module.training and module.num_layers > 1 else 0.0


def those_given(weights: list[Any]) -> list[Any]:
    """A cell without biases has an entry for each, which is None."""
    return weights[:2] if weights[2] is weights[3] is None else weights

"""Conversion of whole models: torch.nn's recurrent modules to ours, and back.

A conversion changes the class of the very module object. Parameters, buffers, hooks, names,
train/eval mode and every reference to the module (tied modules, optimizers) stay what they
were, since both classes keep the same state in the same attributes.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from typing import TypeVar, overload

import torch
from torch.nn.utils import parametrize

from .cell_modules import GRUCell, LSTMCell, RNNCell
from .modules import GRU, LSTM, RNN, _RecurrentLayers
from .regularised import PLAIN

_Module = TypeVar("_Module", bound=torch.nn.Module)

_CLASSES = (RNN, GRU, LSTM, RNNCell, GRUCell, LSTMCell)
_TO_FUSED = {ours._torch_class: ours for ours in _CLASSES}
_TO_TORCH = {ours: theirs for theirs, ours in _TO_FUSED.items()}


def replace(model: _Module, *, strict: bool = False) -> _Module:
    """Turns every torch.nn recurrent module and cell inside `model` into ours, in place.

    The Parameter objects stay the same, so optimizers keep working, as do hooks, names,
    train/eval mode, parametrizations and modules used in several places. `isinstance(m,
    nn.LSTM)` is False afterwards; `restore` goes back.

    Args:
        model: any module; it may itself be a recurrent one.
        strict: whether to raise, before anything is changed, when a recurrent module cannot be
            converted. Otherwise a warning names each such module and why.

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `strict`, and something cannot be converted.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.LSTM(3, 4))
        >>> replace(model)
        Sequential(
          (0): LSTM(3, 4)
        )
        >>> type(model[0]).__module__
        'fused_rnn.modules'
    """
    return _convert(model, _TO_FUSED, strict, "replace")


def restore(model: _Module, *, strict: bool = False) -> _Module:
    """Turns every recurrent module of ours inside `model` back into torch.nn's, in place.

    The reverse of `replace`, with the same arguments, result and errors. A module with an option
    that torch.nn lacks and that changes what it computes, from `layer_norm` to `stateful`, stays
    ours: a warning, or with `strict` an error.

    Example:
        >>> import fused_rnn
        >>> type(restore(fused_rnn.GRU(3, 4))) is torch.nn.GRU
        True
    """
    return _convert(model, _TO_TORCH, strict, "restore")


@overload
def from_torch(module: torch.nn.RNN) -> RNN: ...
@overload
def from_torch(module: torch.nn.GRU) -> GRU: ...
@overload
def from_torch(module: torch.nn.LSTM) -> LSTM: ...
@overload
def from_torch(module: torch.nn.RNNCell) -> RNNCell: ...
@overload
def from_torch(module: torch.nn.GRUCell) -> GRUCell: ...
@overload
def from_torch(module: torch.nn.LSTMCell) -> LSTMCell: ...
def from_torch(module: torch.nn.Module) -> torch.nn.Module:
    """Our module for one recurrent module or cell of torch.nn, which stays as it is.

    Args:
        module: a torch.nn.RNN, GRU, LSTM, RNNCell, GRUCell or LSTMCell, parametrized or not.

    Returns:
        An RNN, GRU, LSTM or cell of ours with the same options and hooks. Both share their
        Parameter objects, whatever their shapes, dtype and device.

    Raises:
        TypeError: `module` is not one of torch.nn's six recurrent classes.

    Example:
        >>> theirs = torch.nn.LSTM(3, 4)
        >>> ours = from_torch(theirs)
        >>> ours.weight_hh_l0 is theirs.weight_hh_l0
        True
    """
    target = _target(module, _TO_FUSED)
    if target is None:
        expected = ", ".join(f"torch.nn.{ours.__name__}" for ours in _CLASSES)
        raise TypeError(f"module: expected one of {expected}; got {_class_name(module)}")
    ours = target.__new__(target)
    # Containers of their own, so that a parameter or hook set on one is not set on both.
    for name, value in vars(module).items():
        vars(ours)[name] = copy.copy(value) if isinstance(value, (dict, list, set)) else value
    # What Module.compile() leaves is bound to the original, hence copies do not have it either.
    vars(ours).pop("_compiled_call_impl", None)
    if parametrize.is_parametrized(ours):
        ours._modules["parametrizations"] = torch.nn.ModuleDict(ours.parametrizations.items())
    return ours


def flip_update_gate(module: _Module) -> _Module:
    """Turns a GRU's weights from the other convention of the update gate into ours, in place, or
    back.

    Here as in torch.nn, Keras, ONNX and the first paper (Cho et al. 2014) z_t keeps the old state,
    h_t = (1 - z_t) * n_t + z_t * h_{t-1}. Many texts, after Chung et al. 2014, swap z_t and
    1 - z_t. Since 1 - sigmoid(a) is sigmoid(-a), the rows of z in weights and biases change sign;
    with `layer_norm` those of the gains and biases, as r and z share the mean of their products.

    Args:
        module: a GRU or GRUCell, of ours or of torch.nn, with any layers, directions and options.

    Returns:
        `module` itself.

    Raises:
        TypeError: `module` is not a GRU.
        ValueError: a weight is parametrized: what it is computed from would have to change.

    Example:
        >>> module = GRU(3, 4)  # with weights of a text that has h = z * n + (1 - z) * h
        >>> flip_update_gate(module) is module
        True
    """
    if isinstance(module, (GRU, GRU._torch_class)):
        names = module._flat_weights_names
        if getattr(module, "_regularisation", PLAIN).layer_norm:
            names = [re.sub("^weight_(ih|hh)", r"ln_\1_weight", name) for name in names]
    elif isinstance(module, (GRUCell, GRUCell._torch_class)):
        names = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if module.bias else [])]
    else:
        raise TypeError(f"module: expected a GRU or GRUCell, got {type(module).__name__}")
    for name in names:
        if module._parameters.get(name) is None:
            raise ValueError(f"module: expected {name} to be a plain Parameter, not a computed one")
    with torch.no_grad():
        # Several names may be one Parameter's.
        for parameter in {id(p): p for p in map(module._parameters.get, names)}.values():
            parameter.chunk(3)[1].neg_()
    return module


# What instances of our layers may have, and torch.nn's do not read.
_OWN_ATTRIBUTES = ("_regularisation", "recompute", "stateful", "state_h", "state_c")


def _convert(model: _Module, classes: dict[type, type], strict: bool, verb: str) -> _Module:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    found = [(name, module, _target(module, classes)) for name, module in model.named_modules()]
    refused = list(_refusals(found, classes))
    if refused:
        message = f"{verb}: cannot convert " + "; ".join(refused)
        if strict:
            raise ValueError(message)
        warnings.warn(message, UserWarning, stacklevel=3)
    for _, module, target in found:
        if target is not None:
            module.__class__ = target
            if classes is _TO_TORCH:  # "_regularisation": or a pickle would ask for this package
                for name in _OWN_ATTRIBUTES:
                    vars(module).pop(name, None)
    return model


def _target(module: torch.nn.Module, classes: dict[type, type]) -> type | None:
    """The class `module` is to have, or None if it is not one we convert."""
    cls = type(module)
    if classes is _TO_TORCH and option_of_ours(module):
        return None
    if cls in classes:
        return classes[cls]
    # A parametrized module has a class of its own, made on the fly over the original one.
    if parametrize.is_parametrized(module) and cls.__bases__[0] in classes:
        members = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
        return type(cls.__name__, (classes[cls.__bases__[0]],), members)
    return None


def _refusals(
    found: list[tuple[str, torch.nn.Module, type | None]], classes: dict[type, type]
) -> Iterator[str]:
    """What looks like a recurrent module to convert but is not, and why."""
    originals = {cls.__name__ for cls in classes}
    for name, module, target in found:
        if target is not None:
            continue
        where = (
            f"{name!r} ({_class_name(module)})" if name else f"the model ({_class_name(module)})"
        )
        if isinstance(module, tuple(_TO_TORCH)) and (option := option_of_ours(module)):
            if classes is _TO_TORCH:
                yield f"{where}: torch.nn has no {option}"
        elif isinstance(module, tuple(classes)):
            yield f"{where}: a subclass may rely on what it overrides"
        elif classes is not _TO_FUSED:
            continue  # what follows never was ours
        elif isinstance(module, torch.jit.ScriptModule):
            if getattr(module, "original_name", None) in originals:
                yield f"{where}: scripted or traced; convert the model before torch.jit"
        elif (
            type(module).__module__.startswith("torch.ao.nn") and type(module).__name__ in originals
        ):
            yield f"{where}: quantized, or about to be; it has no parameters as torch.nn's"


def option_of_ours(module: torch.nn.Module, besides: tuple[str, ...] = ()) -> str:
    """What makes our module compute something no module of torch.nn does, or "". The options
    named in `besides` do not count."""
    if isinstance(module, _RecurrentLayers):
        # Not by the attributes, which may have been there before `replace`.
        if not module._cell().in_torch and "reset_after" not in besides:
            return "reset_after=False"
        if module._carries() and "stateful" not in besides:
            return "stateful=True"
    changes = getattr(module, "_regularisation", PLAIN).changes()
    return ", ".join(change for change in changes if change.split("=")[0] not in besides)


def _class_name(value: object) -> str:
    cls = type(value)
    return f"{cls.__module__}.{cls.__qualname__}"

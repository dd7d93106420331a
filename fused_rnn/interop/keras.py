"""Weights of Keras' recurrent layers: into our modules, and back.

Keras 3, with any of its backends. Its kernels are the transposes of ours; LSTM has the gates
i, f, c, o, which is our order, GRU z, r, h where ours are r, z, n; and but for GRU with
`reset_after` there is one bias, which becomes b_ih, with b_hh zero. The update gate means the same
in both. Needs the package `keras` (the extra `keras`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..cells import CELLS, KERAS_GATES, Cell, DirectionWeights, reorder_gates, restore_gates
from ..modules import GRU, LSTM, RNN, make_module
from . import weights as module_weights


def from_keras(layer: Any) -> RNN | GRU | LSTM:
    """A module that computes what a layer of Keras computes.

    Args:
        layer: a built keras.layers.LSTM, GRU (with `reset_after` or without) or SimpleRNN (tanh
            or relu), or a Bidirectional around one with `merge_mode="concat"`.

    Returns:
        A module of one layer with `batch_first`, on the CPU, in the dtype of the variables, which
        it copies. Called with x it returns what the layer returns with `return_sequences`, and
        the states; `stateful` is carried over. In place of a mask of trailing padding it takes
        `lengths`; outputs past a row's end are then zero, where Keras repeats the last one.

    Raises:
        ImportError: keras is not installed.
        TypeError: `layer` is none of these.
        ValueError: it is not built, or computes what no module of ours does: other activations,
            dropout of its own, `go_backwards`, another merge mode. The message says what.

    Example:
        >>> from fused_rnn.interop.keras import from_keras  # doctest: +SKIP
        >>> lstm = from_keras(model.get_layer("lstm"))  # doctest: +SKIP
        >>> output, (h_n, c_n) = lstm(torch.randn(2, 10, 16))  # doctest: +SKIP
    """
    layers = _directions(layer)
    cell = _cell(layers[0])
    for each in layers:
        if not each.cell.built:
            raise ValueError(f"layer: expected a built one, got {each.name!r}; call it, or build()")
    kernel = layers[0].cell.kernel
    options: dict[str, Any] = {
        "bias": bool(layers[0].use_bias),
        "batch_first": True,
        "bidirectional": len(layers) == 2,
        "dtype": _torch_dtype(kernel),
        "device": "cpu",
        "stateful": bool(layers[0].stateful),
    }
    module = make_module(cell.name, kernel.shape[0], layers[0].units, **options)
    module_weights.write(module, [_read(each, cell) for each in layers])
    return module


def to_keras(module: torch.nn.RNNBase, layer: Any) -> Any:
    """Writes the weights of a module into a layer of Keras.

    Args:
        module: an RNN, GRU or LSTM of one layer.
        layer: the layer of Keras that computes the same, as for `from_keras`. One that is not
            built yet is built for the module's input_size.

    Returns:
        `layer`.

    Raises:
        ImportError: keras is not installed.
        TypeError: an argument is not of the kinds above.
        ValueError: they do not compute the same, or differ in their sizes. Nothing is written.

    Example:
        >>> import keras  # doctest: +SKIP
        >>> theirs = keras.layers.GRU(4, return_sequences=True)  # doctest: +SKIP
        >>> to_keras(GRU(3, 4, batch_first=True), theirs) is theirs  # doctest: +SKIP
        True
    """
    cell = module_weights.cell_of(module)
    layers = _directions(layer)
    if module.num_layers != 1:
        raise ValueError(f"module: expected one layer, got num_layers={module.num_layers}")
    if len(layers) != 1 + module.bidirectional:
        expected = "a Bidirectional" if module.bidirectional else "one direction"
        raise ValueError(
            f"layer: expected {expected} as the module has, got {type(layer).__name__}"
        )
    for each in layers:
        if _cell(each) != cell:
            raise ValueError(
                f"layer: expected the equations of {cell.name}, the module's, got those of "
                f"{_cell(each).name}"
            )
        if each.units != module.hidden_size:
            raise ValueError(f"layer: expected {module.hidden_size} units, got {each.units}")
        if module.bias and not each.use_bias:
            raise ValueError("layer: expected use_bias, for the module has biases")
    if not layer.built:
        layer.build((None, None, module.input_size))
    for each in layers:
        if each.cell.kernel.shape[0] != module.input_size:
            raise ValueError(
                f"layer: expected input of {module.input_size} features, as the module, got "
                f"{each.cell.kernel.shape[0]}"
            )
    for each, w in zip(layers, module_weights.read(module, 0), strict=True):
        _write(each, cell, w)
    return layer


def _directions(layer: Any) -> list[Any]:
    """The layer, or the two inside a Bidirectional."""
    try:
        from keras import layers
    except ImportError as error:
        raise ImportError("fused_rnn.interop.keras needs keras: pip install keras") from error
    kinds = (layers.LSTM, layers.GRU, layers.SimpleRNN)
    inner = [layer]
    if type(layer) is layers.Bidirectional:
        if layer.merge_mode != "concat":
            raise ValueError(f"layer: expected merge_mode 'concat', got {layer.merge_mode!r}")
        inner = [layer.forward_layer, layer.backward_layer]
    for each, backwards in zip(inner, (False, True), strict=False):
        if type(each) not in kinds:
            raise TypeError(
                "layer: expected keras.layers.LSTM, GRU or SimpleRNN, or a Bidirectional around "
                f"one, got {type(each).__name__}"
            )
        if bool(each.go_backwards) != backwards:
            raise ValueError(
                f"layer: {each.name!r} has go_backwards={each.go_backwards}: a module of ours "
                "reads forwards, and backwards only beside that; flip the input in time instead"
            )
    if len(inner) == 2:
        first, second = map(_facts, inner)
        if first != second:
            raise ValueError(f"layer: expected two directions alike, got {first} and {second}")
    return inner


def _facts(layer: Any) -> dict[str, Any]:
    config = layer.get_config()
    names = ("units", "activation", "recurrent_activation", "use_bias", "reset_after", "stateful")
    return {"class": type(layer).__name__, **{n: config[n] for n in names if n in config}}


def _cell(layer: Any) -> Cell:
    """The cell whose equations the layer computes."""
    facts, kind = _facts(layer), type(layer).__name__
    activation = facts["activation"]
    allowed = ("tanh", "relu") if kind == "SimpleRNN" else ("tanh",)
    if activation not in allowed:
        raise ValueError(f"layer: expected activation {' or '.join(allowed)}, got {activation!r}")
    if facts.get("recurrent_activation", "sigmoid") != "sigmoid":
        raise ValueError(
            f"layer: expected recurrent_activation 'sigmoid', got {facts['recurrent_activation']!r}"
        )
    for name in ("dropout", "recurrent_dropout"):
        if getattr(layer, name):
            raise ValueError(
                f"layer: expected no {name}, got {getattr(layer, name)}: it does not mean what "
                "it does here; set it to 0 and give the module's option instead"
            )
    if kind == "SimpleRNN":
        return CELLS[f"rnn_{activation}"]
    if kind == "GRU":
        return CELLS["gru" if layer.reset_after else "gru_reset_before"]
    return CELLS["lstm"]


def _torch_dtype(variable: Any) -> torch.dtype:
    import keras

    return getattr(torch, keras.backend.standardize_dtype(variable.dtype))


def _read(layer: Any, cell: Cell) -> DirectionWeights:
    order = KERAS_GATES[cell.name]
    w_ih, w_hh = (
        restore_gates(_tensor(kernel).t(), order)
        for kernel in (layer.cell.kernel, layer.cell.recurrent_kernel)
    )
    if not layer.use_bias:
        return DirectionWeights(w_ih, w_hh)
    bias = _tensor(layer.cell.bias)
    both = bias if cell.gates_b_hn else torch.stack((bias, torch.zeros_like(bias)))
    return DirectionWeights(w_ih, w_hh, *(restore_gates(b, order) for b in both))


def _write(layer: Any, cell: Cell, w: DirectionWeights) -> None:
    order = KERAS_GATES[cell.name]
    inside = layer.cell
    for kernel, weight in ((inside.kernel, w.w_ih), (inside.recurrent_kernel, w.w_hh)):
        kernel.assign(_array(reorder_gates(weight, order).t()))
    if not layer.use_bias:
        return
    if w.b_ih is None:
        bias = torch.zeros(tuple(inside.bias.shape))
    else:
        b_ih, b_hh = (reorder_gates(b, order) for b in (w.b_ih, w.b_hh))
        bias = torch.stack((b_ih, b_hh)) if cell.gates_b_hn else b_ih + b_hh
    inside.bias.assign(_array(bias))


def _tensor(variable: Any) -> Tensor:
    import keras

    # float64 holds every value, and numpy has no bfloat16 of its own.
    return torch.tensor(keras.ops.convert_to_numpy(variable).astype("float64"), device="cpu")


def _array(tensor: Tensor) -> Any:
    tensor = tensor.cpu()
    return (tensor if tensor.dtype == torch.float64 else tensor.float()).contiguous().numpy()

"""haste and TorchRL's Triton kernels, on a GPU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from harness.cases import Case
from harness.data import Data, Results, training_call
from harness.providers.base import (
    CannotDoError,
    Provider,
    Session,
    Setting,
    require_plain,
    restored,
    torch_settings,
)

HASTE_GATE_ORDER = {"gru": (1, 0, 2), "lstm": (0, 2, 1, 3)}  # z, r, n and i, g, f, o


def _haste(case: Case, data: Data, setting: Setting) -> Session:
    """Its own modules, with torch's weights through their from_native_weights."""
    require_plain(case)
    if case.cell == "rnn":
        raise CannotDoError("has no plain RNN")
    import haste_pytorch

    kind = {"gru": haste_pytorch.GRU, "lstm": haste_pytorch.LSTM}[case.cell]
    module = kind(case.I, case.H)
    module.from_native_weights(*(p.detach() for p in data.layer.parameters()))
    # Training only decides whether the kernels keep what backward needs.
    module = module.to(setting.device, data.cotangent.dtype).train(case.has_grad)

    def active():
        return torch_settings(case, setting)

    def forward(x: Tensor) -> Tensor:
        return module(x)[0]

    if not case.has_grad:
        return Session(data.in_turn(forward), lambda y: {"y": y}, active)
    named = dict(module.named_parameters())
    call, results = training_call(forward, list(named.values()), list(named), data)
    order = HASTE_GATE_ORDER[case.cell]

    def as_torch(output: object) -> Results:
        plain = results(output)
        recurrent_bias = plain.get("grad recurrent_bias", plain["grad bias"])
        return {
            "y": plain["y"],
            "grad x": plain["grad x"],
            "grad weight_ih_l0": restored(plain["grad kernel"].T, order),
            "grad weight_hh_l0": restored(plain["grad recurrent_kernel"].T, order),
            "grad bias_ih_l0": restored(plain["grad bias"], order),
            "grad bias_hh_l0": restored(recurrent_bias, order),
        }

    return Session(call, as_torch, active)


TORCHRL = "torchrl.modules.tensordict_module._rnn_triton"


def _torchrl(case: Case, data: Data, setting: Setting, precision: str) -> Session:
    """The functions behind its modules' recurrent_backend="triton", which take [B, T, ...].

    Its kernels tune themselves at the first call of a new T or H, outside the timing.
    """
    require_plain(case, resets=True)
    if case.cell == "rnn":
        raise CannotDoError("has no plain RNN")
    from importlib import import_module

    functions = import_module(TORCHRL)
    weights = list(data.layer.parameters())
    zeros = data.cotangent.new_zeros(case.B, case.T, case.H)  # of the state at every reset
    if data.resets is None:
        resets = torch.zeros(case.B, case.T, dtype=torch.bool, device=setting.device)
    else:
        resets = data.resets.T.contiguous()

    def forward(x: Tensor) -> Tensor:
        if case.cell == "gru":
            return functions.gru_triton(x, zeros, *weights, resets, input_precision=precision)[0]
        return functions.lstm_triton(x, zeros, zeros, *weights, resets, input_precision=precision)[
            0
        ]

    own = replace(
        data,
        xs=tuple(_swapped(x).requires_grad_(case.has_grad) for x in data.xs),
        cotangent=_swapped(data.cotangent),
    )

    def active():
        return torch_settings(case, setting, tf32=precision == "tf32")

    if not case.has_grad:
        return Session(own.in_turn(forward), lambda y: {"y": y.transpose(0, 1)}, active)
    names = [name for name, _ in data.layer.named_parameters()]
    call, results = training_call(forward, weights, names, own)

    def as_torch(output: object) -> Results:
        named = results(output)
        return named | {name: named[name].transpose(0, 1) for name in ("y", "grad x")}

    return Session(call, as_torch, active)


def _swapped(tensor: Tensor) -> Tensor:
    return tensor.detach().transpose(0, 1).contiguous()


def _is_float32(case: Case) -> bool:
    return case.dtype == "float32"


GPU_LIBRARIES = (
    Provider(
        "haste",
        _haste,
        ("haste_pytorch",),
        ("cuda",),
        wants=lambda case: case.dtype in ("float32", "float64"),
        install="see benchmarks/README.md:",
    ),
    *(
        Provider(
            f"torchrl {precision}",
            partial(_torchrl, precision=precision),
            ("torchrl", TORCHRL),
            ("cuda",),
            wants=_is_float32,
            tf32=precision == "tf32",
            install="pip install",
        )
        for precision in ("ieee", "tf32")
    ),
)

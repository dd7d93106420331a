"""The CUDA kernels on the CPU and on a GPU: cases, runs and their accuracy."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch

import fused_rnn
from fused_rnn import testing
from fused_rnn.cells import CELLS
from fused_rnn.testing import LayerCase

BACKEND = "cuda_emulated"
KERNELS = testing.TORCH_CELLS  # the cells that have their own
DTYPES = torch.bfloat16, torch.float16, torch.float32


def case_params(dtypes, cases, seeds, marks=()):
    """What test_accuracy takes, for the dtypes of each cell."""
    return [
        pytest.param(
            replace(case, dtype=dtype),
            seeds,
            id="-".join((cell, str(dtype).removeprefix("torch."), str(case))),
            marks=marks,
        )
        for cell, each in dtypes.items()
        for case in cases(cell)
        for dtype in each
    ]


def run_emulated(case: LayerCase, seed: int) -> dict[str, torch.Tensor]:
    torch.ops.fused_rnn_cuda_emulated.seed(seed)
    with fused_rnn.backend(BACKEND):
        return testing.results_of_draws(testing.run_layer, case)


def assert_accurate_with_every_seed(case: LayerCase, seeds: int) -> None:
    """Outputs, states and gradients as accurate as torch.nn's, and the same bits for every seed."""
    results = [run_emulated(case, seed) for seed in range(seeds)]
    testing.assert_draws_accurate(results[0], case)
    for seed, other in enumerate(results):
        for name, tensor in other.items():
            assert torch.equal(tensor, results[0][name]), f"seed {seed}: other bits in {name}"


@contextmanager
def tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def assert_tf32_accurate(actual: dict[str, torch.Tensor], case: LayerCase) -> None:
    """TF32 has float16's mantissa: what torch.nn may be wrong by there is the measure.

    `case` is of float32 on the CPU.
    """
    exact = testing.results_of_draws(testing.run_oracle, case, "all", torch.float64)
    half = replace(case, dtype=torch.float16)
    of_half = testing.results_of_draws(testing.run_torch, half)
    exact_of_half = testing.results_of_draws(testing.run_oracle, half, "all", torch.float64)
    slack = testing.ROUNDINGS * torch.finfo(torch.float16).eps
    for name, value in actual.items():
        norm = 2 * testing.relative_error(of_half[name], exact_of_half[name]) + slack
        worst = testing.worst_element_error(of_half[name], exact_of_half[name])
        testing.assert_near(name, value, exact[name], norm, 2 * (2 * worst + slack))
    # And it is not float32.
    assert testing.relative_error(actual["y"], exact["y"]) > 1e-5


def scan_arguments(**changes):
    """Those of scan_forward, for an LSTM with T=2, B=3, H=16."""
    arguments = {
        "cell": CELLS["lstm"].index,
        "gx": torch.zeros(1, 6, 64),
        "w_hh": [torch.zeros(64, 16)],
        "b_hn": None,
        "h0": torch.zeros(1, 3, 16),
        "c0": torch.zeros(1, 3, 16),
        "hidden_size": 16,
        "lengths": None,
        "offsets": None,
        "resets": None,
        "reset_h": None,
        "reset_c": None,
        "y": torch.zeros(6, 16),
        "h_n": torch.zeros(1, 3, 16),
        "c_n": torch.zeros(1, 3, 16),
        "gates": torch.zeros(1, 6, 64),
        "cells": torch.zeros(1, 6, 16),
        "regime": "",
        "tf32": False,
        "graph": False,
        "stream": 0,
    }
    return arguments | changes


CHUNK = "FUSED_RNN_CUDA_CHUNK"


@dataclass(frozen=True)
class StackCase:
    cell: str
    timesteps: int
    batch_size: int
    hidden_size: int
    layers: int
    chunk: int
    dropout: float = 0.0
    bias: bool = True
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def __str__(self) -> str:
        sizes = f"T{self.timesteps}-B{self.batch_size}-H{self.hidden_size}-L{self.layers}"
        traits = f"dropout{self.dropout}" if self.dropout else "", "" if self.bias else "no_bias"
        return "-".join(filter(None, (self.cell, sizes, f"chunk{self.chunk}", *traits)))


def make_stack(case: StackCase, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    options = {"num_layers": case.layers, "bias": case.bias, "dropout": case.dropout}
    module = testing.make_module(case.cell, 5, case.hidden_size, dtype=case.dtype, **options)
    return module.to(case.device)


def run_stack(module, case: StackCase, seed: int = 0) -> dict[str, torch.Tensor]:
    """Outputs and all gradients, of random inputs."""
    generator = torch.Generator().manual_seed(seed)
    parameter = next(module.parameters())

    def normal(*shape: int) -> torch.Tensor:
        values = torch.randn(shape, generator=generator).to(case.dtype)
        return values.to(parameter.device, parameter.dtype)

    sizes = case.layers, case.batch_size, case.hidden_size
    x = normal(case.timesteps, case.batch_size, 5).requires_grad_()
    states = [normal(*sizes).requires_grad_() for _ in range(1 + (case.cell == "lstm"))]
    torch.manual_seed(seed)  # of dropout
    y, final = module(x, tuple(states) if len(states) == 2 else states[0])
    outputs = [y, *(final if len(states) == 2 else [final])]
    inputs = {"x": x, "h0": states[0], "c0": states[-1]} | dict(module.named_parameters())
    grads = torch.autograd.grad(outputs, list(inputs.values()), [normal(*o.shape) for o in outputs])
    named = {f"grad {name}": grad for name, grad in zip(inputs, grads, strict=True)}
    return dict(zip(("y", "h_n", "c_n"), outputs, strict=False)) | named


def run_emulated_stack(
    case: StackCase, seed: int = 0, chunk: int | None = None
) -> dict[str, torch.Tensor]:
    with pytest.MonkeyPatch.context() as patch, fused_rnn.backend(BACKEND):
        patch.setenv(CHUNK, str(case.chunk if chunk is None else chunk))
        torch.ops.fused_rnn_cuda_emulated.seed(seed)
        return run_stack(make_stack(case), case)


def assert_stack_accurate(actual: dict[str, torch.Tensor], case: StackCase) -> None:
    """By the repository's rule: a float64 oracle, and torch.nn's own error in the dtype."""
    host = replace(case, device="cpu")
    with fused_rnn.backend("reference"):
        exact = run_stack(make_stack(host).to(torch.float64), host)
    theirs = run_stack(fused_rnn.restore(make_stack(host)), host)
    sizes = case.timesteps, case.batch_size, 5, case.hidden_size
    testing.assert_accurate(actual, exact, theirs, LayerCase(case.cell, *sizes, dtype=case.dtype))

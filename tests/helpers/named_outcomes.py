"""Outputs and gradients of modules by their names, and their comparison."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fused_rnn.testing import (
    assert_near,
    assert_same_numbers,
    relative_error,
    worst_element_error,
)


def copies(value):
    """The same nest with leaf tensors of its own."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, PackedSequence):
        return PackedSequence(copies(value.data), *value[1:])
    if isinstance(value, tuple):
        return tuple(copies(item) for item in value)
    return value


def to(value, dtype: torch.dtype):
    """The same nest as leaves of another dtype."""
    if isinstance(value, Tensor):
        return value.detach().to(dtype).requires_grad_(value.requires_grad)
    if isinstance(value, PackedSequence):
        return PackedSequence(to(value.data, dtype), *value[1:])
    if isinstance(value, tuple):
        return tuple(to(item, dtype) for item in value)
    return value


def doubled(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).double()


def tensors(name: str, value) -> dict[str, Tensor]:
    """Every tensor with values in a nest, by name."""
    if isinstance(value, PackedSequence):
        return {f"{name}.data": value.data}
    if isinstance(value, tuple):
        items = (tensors(f"{name}[{i}]", item) for i, item in enumerate(value))
        return {key: tensor for item in items for key, tensor in item.items()}
    return {name: value} if isinstance(value, Tensor) else {}


def run(module: nn.Module, *args, seed: int = 3) -> dict[str, Tensor]:
    """Outputs of one call on copies of `args`, and the gradients of everything that asks."""
    args = copies(args)
    module.zero_grad()
    torch.manual_seed(seed)
    outputs = module(*args)
    found = tensors("result", outputs)
    result = {k: t.detach() for k, t in found.items()}
    generator = torch.Generator().manual_seed(4)
    loss = sum(
        (t * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)).sum()
        for t in found.values()
    )
    if loss.requires_grad:
        loss.backward()
    for name, tensor in [*tensors("args", args).items(), *module.named_parameters()]:
        if tensor.requires_grad and tensor.grad is not None:
            result[f"grad of {name}"] = tensor.grad.detach().clone()
    return result


def assert_accurate(
    actual: dict[str, Tensor],
    expected: dict[str, Tensor],
    torch_own: dict[str, Tensor],
    dtype: torch.dtype,
    roundings: int = 8,
) -> None:
    """Each tensor is off from `expected`, which is in float64, by at most twice what `torch_own`
    is, plus a few roundings for where torch.nn happens to be exact."""
    assert actual.keys() == expected.keys() == torch_own.keys()
    slack = roundings * torch.finfo(dtype).eps
    for name, value in actual.items():
        assert value.dtype == dtype, f"{name}: {value.dtype}, expected {dtype}"
        bounds = (
            2 * measure(torch_own[name], expected[name]) + slack
            for measure in (relative_error, worst_element_error)
        )
        assert_near(name, value, expected[name], *bounds)


def assert_accurate_run(
    ours: nn.Module,
    theirs: nn.Module,
    exact: nn.Module,
    *args,
    dtype: torch.dtype = torch.float32,
    roundings: int = 8,
) -> None:
    """Outputs and gradients in `dtype` are about as near to float64's as torch's own are."""
    args = to(args, dtype)
    expected, torch_own = run(exact, *to(args, torch.float64)), run(theirs, *args)
    for name, tensor in torch_own.items():
        # A yardstick this far off (another dropout mask, say) would let anything pass.
        limit = 64 * torch.finfo(dtype).eps
        assert relative_error(tensor, expected[name]) < limit, f"{name}: torch itself is off"
    assert_accurate(run(ours, *args), expected, torch_own, dtype, roundings)


def assert_same(ours: nn.Module, theirs: nn.Module, *args) -> None:
    """Both modules give the same outputs and gradients but for rounding. Meant for float64."""
    assert_same_numbers(run(ours, *args), run(theirs, *args))

"""Outputs and gradients of modules as lists of tensors, and their comparison."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def flat(nest) -> list[Tensor]:
    """The tensors of a nest in their order; of packed rows the data."""
    parts = torch.utils._pytree.tree_leaves(nest, lambda part: isinstance(part, PackedSequence))
    parts = [part.data if isinstance(part, PackedSequence) else part for part in parts]
    return [part for part in parts if isinstance(part, Tensor)]


def leaves(value, dtype: torch.dtype | None = None):
    """The same nest, each tensor a leaf that asks for a gradient, of a dtype if one is given."""
    if isinstance(value, PackedSequence):
        return value._replace(data=leaves(value.data, dtype))
    if isinstance(value, tuple):
        return tuple(leaves(part, dtype) for part in value)
    return value if value is None else value.detach().to(dtype, copy=True).requires_grad_()


def weighted(outputs):
    """A sum that every element of every output has its own part in."""
    generator = torch.Generator().manual_seed(3)
    return sum((t * torch.randn(t.shape, generator=generator)).sum() for t in outputs)


def run(module, *args, loss=weighted):
    """Outputs, and the gradients of arguments and parameters."""
    args = tuple(map(leaves, args))
    torch.manual_seed(4)  # of dropout's masks
    outputs = flat(module(*args))
    inputs = [*flat(args), *module.parameters()]
    return [*outputs, *torch.autograd.grad(loss(outputs), inputs)]


def assert_same_bits(actual, expected):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert type(a) is type(e) and a.shape == e.shape and a.requires_grad == e.requires_grad
        assert torch.equal(a, e)


def near(actual, expected, rtol=1e-10, atol=None, of_largest=False) -> None:
    """The same tensors in the same order, up to rounding. `atol` is `rtol` unless it is given, and
    of a tensor's largest element if that is wanted and above one."""
    actual, expected = flat(actual), flat(expected)
    assert len(actual) == len(expected)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        scale = max(1.0, float(e.detach().abs().max())) if of_largest and e.numel() else 1.0
        torch.testing.assert_close(
            a,
            e,
            rtol=rtol,
            atol=scale * (rtol if atol is None else atol),
            msg=lambda message, i=i: f"tensor {i}: {message}",
        )

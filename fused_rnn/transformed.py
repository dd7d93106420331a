"""Who has tensors in hand: the transforms of torch.func, forward mode, vmap."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad


def assumed_constant(function: Callable[[], bool]) -> Callable[[], bool]:
    """`function`, which the compiler calls while it traces, for what it returns. As
    torch.compiler.assume_constant_result does, which imports all of dynamo: 2 s with torch 2.11."""
    function._dynamo_marked_constant = True
    return function


def is_transformed() -> bool:
    """Whether a transform of torch.func is under way. Of all functions that tell it, this one has
    its true answer in a graph that is being compiled."""
    return _functorch.get_dynamic_layer_stack_depth() > 0


if torch.__version__ < "2.13":  # whose compiler does not know the function
    is_transformed = assumed_constant(is_transformed)


def is_exporting() -> bool:
    """Whether torch.export traces. In every graph that torch before 2.12 compiles, torch's own
    function says so."""
    return torch.compiler._is_exporting_flag


def is_dynamic(size: int) -> bool:
    """Whether a traced size may be another one in another call. For dynamo, which strict export
    goes through, no size is a torch.SymInt."""
    from torch.fx.experimental.symbolic_shapes import has_static_value  # sympy: not to import early

    return not has_static_value(size)


def needs_oracle(x: Tensor) -> bool:
    """Whether only plain torch operations will do: inside a function transform, under
    forward-mode differentiation, or for a dtype no backend has or a DTensor."""
    if is_transformed() or forward_ad._current_level >= 0 or x.is_complex():
        return True
    return _is_distributed(x)


def _is_distributed(x: Tensor) -> bool:
    """Whether x is a DTensor, which knows how to share out torch's operations, not ours."""
    if torch.compiler.is_compiling():  # which does not look into that dictionary
        return False
    tensor = sys.modules.get("torch.distributed.tensor")  # whose import takes a while
    return tensor is not None and isinstance(x, tensor.DTensor)


def is_only_forward_mode() -> bool:
    """Whether no transform of torch.func is under way but one `jvp`."""
    depth = _functorch.get_dynamic_layer_stack_depth()
    if depth != 1:
        return depth == 0
    return _functorch.peek_interpreter_stack().key() == _functorch.TransformType.Jvp


def are_batched(grads: Iterable[Tensor | None]) -> bool:
    """Whether backward runs for several gradients at once, is_grads_batched or inside vmap."""
    if torch.compiler.is_compiling():  # which does not know these functions, and has no vmap here
        return False
    is_batched, is_legacy = _functorch.is_batchedtensor, _functorch.is_legacy_batchedtensor
    return any(g is not None and (is_batched(g) or is_legacy(g)) for g in grads)


def is_batched(tensor: Tensor) -> bool:
    """Whether vmap has it in hand, in whichever other transforms."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            return True
        tensor = _functorch.get_unwrapped(tensor)
    return False


def without_transforms(tensor: Tensor) -> Tensor:
    """The numbers that transforms have in hand, of all items of a vmap."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor

"""A layer inside the transforms of torch.func: by the backend, not operation after operation.

Inside `vmap`, `grad`, `vjp` and `jacrev` a layer is an autograd function whose rules for them are
here. A batch of inputs that meets one set of weights becomes one larger batch. Where every item has
weights of its own (ensembles), or wants gradients of the weights of its own (per-sample gradients),
the kernels run item after item: each such call is what the layer costs with a batch as small, where
plain operations take several calls per timestep. Of many small items these take less all the same,
and get them. Nothing but inputs is kept for backward, which runs the layer anew: what kernels save
of one larger batch does not lie item by item.

Gradients of these gradients are plain operations, and so is the layer inside any other transform
(forward mode), or with anything beyond torch.nn's arguments (`needs_oracle`).

Shapes: as in `ops`; V items of a vmap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

from . import direct, dispatch, ops, plain
from .cells import CELLS
from .layer_call import LayerResult, make_problem
from .problem import NO_NOISE, Masks, wants_gradients
from .transformed import is_transformed

_KNOWN = {_functorch.TransformType.Vmap, _functorch.TransformType.Grad}
_Tensors = Sequence[Tensor | None]  # None: absent


class _Costs(NamedTuple):
    """Microseconds, measured with two threads of a Zen 4, for a choice between kernels item by item
    and plain operations on all items. What a kernel computes is left out: it is the least."""

    item: float  # of a call of the kernels
    step: float  # of a timestep of plain operations
    item_step: float  # and of each item in it
    product: float  # and of each multiplication


_MOST_SAVED = 1 << 24  # numbers of all gates
_FORWARD, _BACKWARD = _Costs(20, 70, 0.1, 1e-4), _Costs(55, 250, 0.6, 4e-4)
_Function = Callable[..., tuple[Tensor, ...]]


def layer(
    cell: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None = None,
    masks: Masks | None = None,
    *,
    states: bool = False,
    recompute: bool = False,
) -> LayerResult:
    """`ops.layer`, inside transforms too."""
    is_plain = batch_sizes is None and masks is None and not states
    if is_plain and _are_known() and _has_kernels(cell, x, h0, c0, weights):
        y, h_n, *c_n = _Layer.apply(cell, x, h0, c0, *weights)
        return LayerResult(y, h_n, *c_n or (None,))
    return ops.layer(
        cell, x, h0, c0, weights, batch_sizes, masks, states=states, recompute=recompute
    )


def _are_known() -> bool:
    """Whether there are transforms, and only such as have a rule here."""
    if torch.compiler.is_compiling() or not is_transformed():
        return False
    if forward_ad._current_level >= 0 or torch._C._len_torch_dispatch_stack():
        return False
    return all(level.key() in _KNOWN for level in _functorch.get_interpreter_stack() or ())


def _has_kernels(
    cell: str, x: Tensor, h0: Tensor, c0: Tensor | None, weights: list[Tensor]
) -> bool:
    """Whether the layer outside of transforms would be the cpu backend's."""
    if not x.is_cpu or dispatch.requested() not in ("", "auto", "cpu"):
        return False
    # Whether a tensor requires gradients, a transform outside of this one may hide.
    problem = make_problem(cell, x, h0, c0, weights, None, None, torch.is_grad_enabled())
    taken = (name for name, refusal in dispatch.reasons(problem) if refusal is None)
    return next(taken, None) == "cpu"


class _Layer(torch.autograd.Function):
    """y, h_n and, where the cell has it, c_n."""

    @staticmethod
    def forward(cell, x, h0, c0, *weights):  # where no transform is left
        return _outputs(ops.layer(cell, x, h0, c0, list(weights)))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.cell, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grads):
        needs = ctx.needs_input_grad[1:]
        if all(grad is None for grad in grads):
            return (None,) * (1 + len(needs))
        grads = [*grads, *[None] * (3 - len(grads))]
        found = iter(_Gradients.apply(ctx.cell, needs, *grads, *ctx.saved_tensors))
        return None, *(next(found) if need else None for need in needs)

    @staticmethod
    def vmap(info, in_dims, cell, *tensors):
        def run(x, h0, c0, *weights):
            if not is_transformed() and not wants_gradients(x, h0, c0, *weights):
                outputs = direct.infer_layer(CELLS[cell], x, h0, c0, *weights)
                if outputs is not None:
                    return tuple(outputs)
            return _outputs(layer(cell, x, h0, c0, list(weights)))

        items = _Items(info.batch_size, in_dims[1:], tensors, weights=3)
        if items.share_weights():
            return items.all_at_once(run)
        return items.one_by_one(run, lambda *item: _plain_outputs(cell, item), _FORWARD)


class _Gradients(torch.autograd.Function):
    """The gradients of those inputs of a layer that need one, from the gradients of its outputs."""

    @staticmethod
    def forward(cell, needs, *tensors):  # where no transform is left
        found = ops.gradients_anew(cell, tensors[:3], tensors[3:], needs)
        return tuple(g for g, need in zip(found, needs, strict=True) if need)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.cell, ctx.needs, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *along):
        def gradients(*tensors):
            return _plain_gradients(ctx.cell, ctx.needs, tensors[:3], tensors[3:])

        return None, None, *_pull_back(gradients, ctx.saved_tensors, along)

    @staticmethod
    def vmap(info, in_dims, cell, needs, *tensors):
        def run(*tensors):
            return _Gradients.apply(cell, needs, *tensors)

        items = _Items(info.batch_size, in_dims[2:], tensors, weights=6)
        if items.share_weights() and not any(needs[3:]):
            return items.all_at_once(run, saves=True)

        def plain(*tensors):
            return _plain_gradients(cell, needs, tensors[:3], tensors[3:])

        return items.one_by_one(run, plain, _BACKWARD)


def _outputs(result: LayerResult) -> tuple[Tensor, ...]:
    return tuple(t for t in result if t is not None)


class _Items:
    """The tensors of a vmap: `dims` says where each has its items, None where they share it. From
    `weights` on they are weights; those before have the batch as their second dimension."""

    def __init__(
        self, count: int, dims: Sequence[int | None], tensors: _Tensors, weights: int
    ) -> None:
        self.count, self.dims, self.tensors, self.weights = count, dims, tensors, weights

    def share_weights(self) -> bool:
        return all(dim is None for dim in self.dims[self.weights :])

    def all_at_once(
        self, function: _Function, saves: bool = False
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """The function of one batch of all items' rows; or of as many items as keep what the
        function `saves` of each timestep, for a while, from being too much."""
        states = [
            t if t is None else self._in_dimension_one(t, dim)
            for t, dim in zip(self.tensors[: self.weights], self.dims, strict=False)
        ]
        weights = self.tensors[self.weights :]
        x, h0 = states[self.weights - 3 : self.weights - 1]
        (timesteps, _, rows, _), gates = x.shape, h0.shape[0] * weights[0].shape[0]
        size = max(1, _MOST_SAVED // max(1, timesteps * rows * gates) if saves else self.count)
        parts = []
        for begin in range(0, max(1, self.count), size):
            count = min(size, self.count - begin)
            some = (t if t is None else t.narrow(1, begin, count).flatten(1, 2) for t in states)
            parts.append([o.unflatten(1, (count, rows)) for o in function(*some, *weights)])
        outputs = tuple(
            torch.cat(of_some, 1) if len(of_some) > 1 else of_some[0]
            for of_some in zip(*parts, strict=True)
        )
        return outputs, (1,) * len(outputs)

    def _in_dimension_one(self, t: Tensor, dim: int | None) -> Tensor:
        if dim is not None:
            return t.movedim(dim, 1)
        return t.unsqueeze(1).expand(-1, self.count, *t.shape[1:])

    def one_by_one(
        self, function: _Function, plain: _Function, costs: _Costs
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """The function of each item; or `plain`, the same in plain operations, where that takes
        less: small items, and many."""
        if not self.count or self._takes_less_together(costs):
            outputs = torch.func.vmap(plain, in_dims=tuple(self.dims))(*self.tensors)
            return outputs, (0,) * len(outputs)
        of_items = [
            [t] * self.count
            if t is None or dim is None
            else t.movedim(dim, 0).contiguous().unbind()
            for t, dim in zip(self.tensors, self.dims, strict=True)
        ]
        by_item = [function(*tensors) for tensors in zip(*of_items, strict=True)]
        outputs = tuple(torch.stack(parts) for parts in zip(*by_item, strict=True))
        return outputs, (0,) * len(outputs)

    def _takes_less_together(self, costs: _Costs) -> bool:
        x, w_ih, w_hh = (
            t.shape if dim is None else t.movedim(dim, 0).shape[1:]
            for t, dim in (
                (self.tensors[i], self.dims[i])
                for i in (self.weights - 3, self.weights, self.weights + 1)
            )
        )
        products = x[1] * (w_ih.numel() + w_hh.numel())
        of_step = costs.step + self.count * (costs.item_step + products * costs.product)
        return x[0] * of_step < self.count * costs.item


def _plain_outputs(cell: str, inputs: _Tensors) -> tuple[Tensor, ...]:
    """What `_Layer` gives, in plain operations."""
    x, h0, c0, *weights = inputs
    recurrence = plain.recurrence_of(NO_NOISE, None)
    return _outputs(plain.layer(cell, x, h0, c0, weights, recurrence=recurrence))


def _plain_gradients(
    cell: str, needs: Sequence[bool], grads: _Tensors, inputs: _Tensors
) -> tuple[Tensor, ...]:
    """What `_Gradients` gives, in plain operations."""
    given = [grad is not None for grad in grads]

    def outputs(*inputs):
        found = _plain_outputs(cell, inputs)
        return tuple(o for o, is_given in zip(found, given, strict=False) if is_given)

    found = _pull_back(outputs, inputs, [grad for grad in grads if grad is not None])
    return tuple(g for g, need in zip(found, needs, strict=True) if need)


def _pull_back(function: _Function, inputs: _Tensors, along: _Tensors) -> list[Tensor | None]:
    """The gradients of the inputs from those of the function's outputs, for whoever differentiates
    or transforms them."""

    def of_given(*tensors):
        given = iter(tensors)
        return function(*(t if t is None else next(given) for t in inputs))

    _, pull = torch.func.vjp(of_given, *(t for t in inputs if t is not None))
    found = iter(pull(tuple(along)))
    return [t if t is None else next(found) for t in inputs]

"""A layer's derivatives beyond its gradients, where `second_order` has them: as an autograd
function those of the gradients, and what forward mode gives."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import plain, second_order
from .cells import CELLS
from .layer_call import BackwardCall, LayerCall, LayerResult, no_autocast
from .problem import Masks, wants_gradients
from .transformed import are_batched, is_only_forward_mode, needs_oracle


def _given(call: LayerCall) -> second_order.Given:
    return second_order.Given(call.x, call.h0, call.c0, call.weights)


def are_fast(asked: BackwardCall) -> bool:
    """Whether `gradients` is for these."""
    grads, call, _, _ = asked
    if not call.x.is_cpu and not (call.lengths is None and call.resets is None):
        return False  # the host would have to wait for them
    if call.states or call.noise.names:
        return False
    if any(t is not None for t in (call.reset_h, call.reset_c, grads[3])):
        return False
    if torch.compiler.is_compiling() or are_batched(grads) or needs_oracle(call.x):
        return False
    return second_order.fits(call.cell, _given(call))


def gradients(
    asked: BackwardCall,
    compute: Callable[[], list[Tensor | None]],  # gives their numbers
) -> list[Tensor | None]:
    """The gradients of a call's `differentiable`, as functions of them and of the gradients that
    come in."""
    grads, call, (y, *_), needs = asked
    return list(_Gradients.apply(compute, call, y, needs, *grads[:3], *call.differentiable))


class _Gradients(torch.autograd.Function):
    """A layer's gradients, as a function of those of y, h_n and c_n and of the inputs."""

    @staticmethod
    def forward(ctx, compute, call, y, needs, *given):
        tensors, ctx.rest = call.apart()
        ctx.save_for_backward(y.detach(), *given[:3], *tensors)
        ctx.needs = needs
        ctx.set_materialize_grads(False)
        return tuple(compute())

    @staticmethod
    def backward(ctx, *along):
        y, *tensors = ctx.saved_tensors
        grads, call = tensors[:3], LayerCall.joined(tensors[3:], ctx.rest)
        wanted = ctx.needs_input_grad[4:]
        if torch.is_grad_enabled() or are_batched(along):
            found = _third_order(call, grads, along, ctx.needs, wanted)
            return (None,) * 4 + tuple(found)
        arguments = call.cell, grads, _given(call), y
        of_inputs = second_order.Given(*along[:3], along[5:])
        with no_autocast(call.x.device.type):
            if call.lengths is None and call.resets is None:
                found = second_order.gradients(*arguments, of_inputs, call.batch_sizes)
            else:
                masks = Masks(call.lengths, call.resets)
                found = second_order.gradients_in_pieces(*arguments, of_inputs, masks)
        of_grads, of_inputs = found
        found = *of_grads, *of_inputs[:3], None, None, *of_inputs.weights
        found = [g if want else None for g, want in zip(found, wanted, strict=True)]
        return (None,) * 4 + tuple(found)


def _third_order(call, grads, along, needs, wanted):
    """What `_Gradients` hands back, in plain operations: to be differentiated, or for several
    gradients at once."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        views = [t if t is None else t.view_as(t) for t in (*grads, *call.differentiable)]
        found = plain.gradients(call.at(views[3:]), (*views[:3], None), needs, True)
        return plain.differentiable_grads(found, along, views, wanted, create_graph)


def with_tangents(
    call: LayerCall,
    forward: Callable[[LayerCall], tuple[Tensor, ...]],  # y, h_n, c_n and more, without autograd
) -> LayerResult | None:
    """What a call gives in forward mode, of what nobody differentiates in reverse; or None."""
    if forward_ad._current_level < 0 or torch.compiler.is_compiling():
        return None
    given = [t for t in (call.x, call.h0, call.c0, *call.weights) if t is not None]
    if call.states or call.noise.names or any(m is not None for m in call.masks):
        return None
    if wants_gradients(*given) or not is_only_forward_mode():
        return None
    if not second_order.fits(call.cell, _given(call)):
        return None

    def unpacked(t: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """A tangent that is all zeros is none."""
        if t is None:
            return None, None
        primal, tangent = forward_ad.unpack_dual(t)
        return primal, None if tangent is None or tangent._is_zerotensor() else tangent

    (x, dx), (h0, dh0), (c0, dc0) = map(unpacked, (call.x, call.h0, call.c0))
    weights, along = (list(ts) for ts in zip(*map(unpacked, call.weights), strict=True))
    if are_batched((dx, dh0, dc0, *along)):  # by vectorised jacobians, without torch.func
        return None
    call = call._replace(x=x, h0=h0, c0=c0, weights=weights)
    y, h_n, c_n, *_ = forward(call)
    along = second_order.Given(dx, dh0, dc0, along)
    with torch.no_grad(), no_autocast(x.device.type):
        moves = second_order.tangents(call.cell, _given(call), y, along, call.batch_sizes)
    outputs = y, h_n, c_n if CELLS[call.cell].has_c else None
    return LayerResult(
        *(
            o if o is None else forward_ad.make_dual(o, m)
            for o, m in zip(outputs, moves, strict=True)
        )
    )

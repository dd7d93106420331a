"""States that go from call to call: what `stateful=True` adds to the layer modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .transformed import is_batched, is_exporting, is_transformed


class StatefulLayers:
    """What the layer modules have of it: to be mixed into a torch.nn.RNNBase."""

    # Of the class too, for modules that were made before there was such an option.
    stateful = False

    def _start_carrying(self) -> None:
        """For the constructor, once."""
        self.stateful = True
        # No buffers: DistributedDataParallel gives every process those of the first, and averages
        # of models pair the buffers of two.
        self.state_h: Tensor | None = None
        self.state_c: Tensor | None = None

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        if self._carries():
            self.state_h, self.state_c = (
                None if state is None else _moved(state, fn)
                for state in (self.state_h, self.state_c)
            )
        return self

    def reset_states(self) -> None:
        """Forgets the states that a stateful module carries from call to call."""
        if not self._carries():
            raise RuntimeError(f"{self._get_name()}: reset_states needs stateful=True")
        self.state_h = self.state_c = None

    def _carries(self) -> bool:
        """Whether states go from call to call: an attribute `stateful` alone may have been there
        before `replace`."""
        return self.stateful and "state_h" in self.__dict__

    def _check_carries(self) -> None:
        """States go from call to call here.

        Raises:
            RuntimeError: a program is exported, where they do not; or those of a vmap are left.
        """
        if is_exporting() or torch.jit.is_tracing():
            raise RuntimeError(
                f"{self._get_name()}: expected stateful=False where a program is exported, which "
                "carries no states from call to call; pass hx"
            )
        if self.state_h is None or torch.compiler.is_compiling() or is_transformed():
            return
        if is_batched(self.state_h):
            raise RuntimeError(
                f"{self._get_name()}: expected no states from inside a vmap, which has ended; "
                "reset_states() forgets them"
            )

    def _carried(self, input: Any) -> Any:
        """The states that a stateful module kept, for this input's batch."""
        h, c = self.state_h, self.state_c
        if h is None:
            return None
        if isinstance(input, PackedSequence) and input.batch_sizes.numel() > 0:
            # A number that a graph computes: the operator looks at it.
            unknown = torch.compiler.is_compiling() and h.dim() == 3
            batch = h.shape[1:-1] if unknown else (int(input.batch_sizes[0]),)
        elif isinstance(input, Tensor) and input.dim() in (2, 3):
            batch = (input.shape[0 if self.batch_first else 1],) if input.dim() == 3 else ()
        else:
            return None  # which is an error of its own
        if h.shape[1:-1] != batch:
            kept, got = (f"a batch of {b[0]}" if b else "no batch" for b in (h.shape[1:-1], batch))
            raise RuntimeError(
                f"input: expected {kept} as in the calls before, whose states this stateful "
                f"{self._get_name()} carries on, got {got}; reset_states() forgets them"
            )
        data = input.data if isinstance(input, PackedSequence) else input
        h, *c = (_for_call(state, data) for state in (h, c) if state is not None)
        return (h, *c) if c else h

    def _carry(self, states: Any) -> None:
        h, c = states if isinstance(states, tuple) else (states, None)
        # Copies: what the caller does with h_n must not change the next call.
        self.state_h, self.state_c = (None if s is None else s.detach().clone() for s in (h, c))


def _moved(state: Tensor, fn: Any) -> Tensor | None:
    """A carried state where, and of which dtype, `fn` would leave it. Its numbers are kept, which
    that of `to_empty` does not; None where they cannot be."""
    like = fn(state.new_empty(0))
    return state.to(like) if state.is_meta == like.is_meta else None


def _for_call(state: Tensor, input: Tensor) -> Tensor:
    """A carried state for a call with `input`, whose mode may be another than that of the call it
    comes from: autocast gives another dtype, inference mode tensors that autograd does not keep."""
    # A compiler does not know which tensors are of that mode.
    if torch.compiler.is_compiling() or (
        state.is_inference() and not torch.is_inference_mode_enabled()
    ):
        state = state.clone()
    return state.to(input.dtype)

"""Layers with more in their recurrence than torch.nn's: dropout, zoneout, layer normalisation and
peepholes.

Recurrent dropout alone runs on the kernels that have it. The rest runs step by step in plain torch
operations, by `recurrences` over the scan of `oracle`: on any device, in any dtype (half types run
through time in float32), with all forms of input, and differentiable any number of times.

Shapes: T timesteps, B batch, N rows, I input_size, H hidden_size, P output size, G gates,
D directions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import dispatch, ops
from .cells import Cell, DirectionWeights, state_dtype
from .oracle import Recurrence
from .problem import Masks
from .recurrences import Extras, Noise, general_recurrence


@dataclass(frozen=True)
class GeneralScan:
    """The recurrence of a stack of layers."""

    extras: Sequence[Extras]  # of each layer and direction
    recurrent_dropout: float = 0.0  # 0 unless training
    zoneout: tuple[float, float] = (0.0, 0.0)  # of h, of c
    training: bool = False  # whether zoneout draws masks, or takes the expectation
    traits: tuple[str, ...] = ()  # what to call it all

    def layer(self, index: int) -> Callable[..., ops.LayerResult]:
        """`ops.layer` for the layer of that number."""
        return partial(self._layer, index)

    def _layer(
        self,
        index: int,
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
    ) -> ops.LayerResult:
        compiling = torch.compiler.is_compiling()
        transformed = not compiling and ops.is_transformed()
        dtype, directions = state_dtype(x.dtype), h0.shape[0]
        noise = [self._draw(x, h0[0], c0, batch_sizes, dtype) for _ in range(directions)]
        if not compiling:
            problem = ops.make_problem(
                cell, x, h0, c0, weights, batch_sizes, masks, torch.is_grad_enabled(), states
            )
            problem = dataclasses.replace(problem, extras=self.traits)
            if not ops.needs_oracle(x) and dispatch.choose(problem).extras.issuperset(self.traits):
                factor = torch.stack([drawn.h_factor for drawn in noise])
                return ops.layer(
                    cell, x, h0, c0, weights, batch_sizes, masks,
                    states=states, recompute=recompute, h_factor=factor,
                )  # fmt: skip
            dispatch.select(problem)
        if masks is not None and not transformed:
            masks.check(x.shape[0])
        extras = self.extras[index * directions : (index + 1) * directions]

        def recurrence(cell: Cell, d: int, w: DirectionWeights) -> Recurrence:
            return general_recurrence(cell, w, extras[d].to(dtype), noise[d], self._kept_on_average)

        def run(x, h0, c0, reset_h, reset_c, *weights):
            given = masks and masks._replace(reset_h=reset_h, reset_c=reset_c)
            return ops.oracle(
                cell, x, h0, c0, list(weights), batch_sizes, given,
                states=states, recurrence=recurrence,
            )  # fmt: skip

        reset = (None, None) if masks is None else (masks.reset_h, masks.reset_c)
        tensors = (x, h0, c0, *reset, *weights)
        wide = [None if t is None else t.to(dtype) for t in tensors]
        with _no_autocast(x.device.type):
            if recompute and torch.is_grad_enabled() and not transformed:
                # The masks are drawn already.
                result = checkpoint(run, *wide, use_reentrant=False, preserve_rng_state=False)
            else:
                result = run(*wide)
        y, h_n, c_n, cells = result
        narrow = (None if t is None else t.to(x.dtype) for t in (y, h_n, c_n))
        return ops.LayerResult(*narrow, cells)

    def _draw(
        self,
        x: Tensor,
        h: Tensor,  # [B, P]
        c0: Tensor | None,
        batch_sizes: Tensor | None,
        dtype: torch.dtype,
    ) -> Noise:
        """The mask of recurrent dropout, then those of zoneout for h and for c."""
        factor = None
        if self.recurrent_dropout:
            factor = F.dropout(h.new_ones(h.shape, dtype=dtype), self.recurrent_dropout)
        kept = []
        for p, state in zip(self.zoneout, (h,) if c0 is None else (h, c0[0]), strict=False):
            if not (p and self.training):
                kept.append(None)
                continue
            drawn = torch.rand((*x.shape[:-1], state.shape[-1]), device=x.device) < p
            kept.append(
                drawn.unbind() if batch_sizes is None else drawn.split(batch_sizes.tolist())
            )
        return Noise(factor, tuple(kept))

    @property
    def _kept_on_average(self) -> tuple[float, float]:
        return (0.0, 0.0) if self.training else self.zoneout


def _no_autocast(device_type: str) -> AbstractContextManager:
    """Operands have autocast's dtype already, and run through time in a wider one."""
    if torch._C._is_any_autocast_enabled() and device_type != "meta":
        return torch.autocast(device_type, enabled=False)
    return nullcontext()

"""Layers with more in their recurrence than torch.nn's: dropout, zoneout, layer normalisation and
peepholes.

What kernels have of it runs on them, and compilers get a layer as the one operator that all layers
are. The rest runs step by step in plain torch operations, by `recurrences` over the scan of
`oracle`: on any device, in any dtype (half types run through time in float32), with all forms of
input, and differentiable any number of times.

Shapes: T timesteps, B batch, N rows, I input_size, H hidden_size, P output size, G gates,
D directions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import dispatch, ops, plain
from .cells import Cell, DirectionWeights, equal_parts, state_dtype
from .layer_call import LayerResult, make_problem
from .oracle import Recurrence
from .problem import Masks, Noise, wants_gradients
from .recurrences import Extras, general_recurrence, noise_of_steps
from .transformed import is_transformed, needs_oracle


@dataclass(frozen=True)
class GeneralScan:
    """The recurrence of a stack of layers."""

    extras: Sequence[Extras]  # of each layer and direction
    recurrent_dropout: float = 0.0  # 0 unless training
    zoneout: tuple[float, float] = (0.0, 0.0)  # of h, of c
    training: bool = False  # whether zoneout draws masks, or takes the expectation
    traits: tuple[str, ...] = ()  # what to call it all

    def layer(self, index: int) -> Callable[..., LayerResult]:
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
    ) -> LayerResult:
        transformed = is_transformed()
        dtype, directions = state_dtype(x.dtype), h0.shape[0]
        noise = self._draw(x, h0, c0, dtype)
        extras = self.extras[index * directions : (index + 1) * directions]
        if torch.compiler.is_compiling():
            is_one_call = not transformed
        else:
            saves = wants_gradients(x, h0, c0, *weights, *chain(*extras), *(masks or ()))
            problem = make_problem(
                cell, x, h0, c0, weights, batch_sizes, masks, saves, states, noise
            )
            problem = dataclasses.replace(problem, extras=self.traits)
            is_one_call = not needs_oracle(x) and dispatch.choose(problem).has_extras(problem)
            if not is_one_call:
                dispatch.select(problem)
        if is_one_call:
            return ops.layer(
                cell, x, h0, c0, self._with_extras(weights, extras), batch_sizes, masks,
                states=states, recompute=recompute, noise=noise,
            )  # fmt: skip
        if masks is not None:
            masks.check(x.shape[0])

        # All that somebody else may change is an argument: checkpointing knows whether these are as
        # they were.
        def run(x, h0, c0, batch_sizes, lengths, resets, reset_h, reset_c, *others):
            own, parts = list(others[: len(weights)]), others[len(weights) :]
            of_directions = [
                Extras(*parts[i : i + len(Extras._fields)])
                for i in range(0, len(parts), len(Extras._fields))
            ]

            def recurrence(cell: Cell, d: int, w: DirectionWeights) -> Recurrence:
                steps = noise_of_steps(noise, d, batch_sizes)
                return general_recurrence(cell, w, of_directions[d].to(dtype), steps)

            return plain.layer(
                cell, x, h0, c0, own, batch_sizes,
                None if masks is None else Masks(lengths, resets, reset_h, reset_c),
                states=states, recurrence=recurrence,
            )  # fmt: skip

        tensors = (x, h0, c0, batch_sizes, *(masks or Masks()), *weights, *chain(*extras))
        if recompute and torch.is_grad_enabled() and not transformed:
            # The masks are drawn already.
            return checkpoint(run, *tensors, use_reentrant=False, preserve_rng_state=False)
        return run(*tensors)

    @staticmethod
    def _with_extras(weights: list[Tensor], extras: Sequence[Extras]) -> list[Tensor]:
        """The flat list that `ops.layer` takes, with a direction's extras behind its weights."""
        together = []
        dtype = state_dtype(weights[0].dtype)  # autocast joins no half types but its own
        for own, extra in zip(equal_parts(weights, len(extras)), extras, strict=True):
            together += own + extra.to(dtype).flat()
        return together

    def _draw(
        self,
        x: Tensor,
        h0: Tensor,  # [D, B, P]
        c0: Tensor | None,  # [D, B, H]
        dtype: torch.dtype,
    ) -> Noise:
        """Draws for each direction in turn the mask of recurrent dropout, then those of zoneout for
        h and for c."""
        probabilities = self.zoneout if c0 is not None else (self.zoneout[0], 0.0)
        factors, kept = [], ([], [])
        for h in h0:
            if self.recurrent_dropout:
                ones = h.new_ones(h.shape, dtype=dtype)
                factors.append(F.dropout(ones, self.recurrent_dropout))
            for p, state, into in zip(probabilities, (h0, c0), kept, strict=True):
                if p and self.training:
                    size = *x.shape[:-1], state.shape[-1]
                    into.append(torch.rand(size, dtype=torch.float32, device=x.device) < p)
        masks = (torch.stack(each) if each else None for each in (factors, *kept))
        return Noise(*masks, *((0.0, 0.0) if self.training else map(float, probabilities)))

"""Layers with more in their recurrence than torch.nn's: dropout, zoneout, layer normalisation and
peepholes.

No kernel has these. They run step by step in plain torch operations, over the scan of `oracle`:
on any device, in any dtype (half types run through time in float32), with all forms of input, and
differentiable any number of times.

Shapes: T timesteps, B batch, N rows, I input_size, H hidden_size, P output size, G gates,
D directions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import dispatch, ops
from .cells import CELLS, Cell, DirectionWeights, state_dtype
from .oracle import Recurrence, States
from .problem import Masks

# Added to the variance that a normalisation divides by, as in torch.nn.LayerNorm.
EPS = 1e-5


class Extras(NamedTuple):
    """The parameters of one direction of one layer beyond torch.nn's; None where it has none."""

    peephole: Tensor | None = None  # [3*H] from c to the gates i, f and o; LSTM only
    norm_ih: Tensor | None = None  # [G*H] gains of W_ih x
    norm_hh: Tensor | None = None  # [G*H] gains of W_hh h
    norm_c: Tensor | None = None  # [H] gain of c on its way into h; LSTM only
    norm_c_bias: Tensor | None = None  # [H]

    def to(self, dtype: torch.dtype) -> Extras:
        return Extras(*(None if t is None else t.to(dtype) for t in self))


class _Noise(NamedTuple):
    """What was drawn for one direction of one call."""

    h_factor: Tensor | None  # [B, P] what h is multiplied by before W_hh, at every step
    kept: tuple[Sequence[Tensor] | None, ...]  # for h and c, of each step: bool [b, P], [b, H]


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
        transformed = not compiling and torch._C._functorch.peek_interpreter_stack() is not None
        if not compiling:
            problem = ops.make_problem(
                cell, x, h0, c0, weights, batch_sizes, masks, torch.is_grad_enabled(), states
            )
            dispatch.select(dataclasses.replace(problem, extras=self.traits))
        if masks is not None and not transformed:
            masks.check(x.shape[0])
        dtype, directions = state_dtype(x.dtype), h0.shape[0]
        noise = [self._draw(x, h0[0], c0, batch_sizes, dtype) for _ in range(directions)]
        extras = self.extras[index * directions : (index + 1) * directions]

        def recurrence(cell: Cell, d: int, w: DirectionWeights) -> Recurrence:
            return _recurrence(cell, w, extras[d].to(dtype), noise[d], self._kept_on_average)

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
    ) -> _Noise:
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
        return _Noise(factor, tuple(kept))

    @property
    def _kept_on_average(self) -> tuple[float, float]:
        return (0.0, 0.0) if self.training else self.zoneout


def _no_autocast(device_type: str) -> AbstractContextManager:
    """Operands have autocast's dtype already, and run through time in a wider one."""
    if torch._C._is_any_autocast_enabled() and device_type != "meta":
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


class _Product:
    """W v + b for the gates in groups, each group normalised where there are gains."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, gain: Tensor | None, groups: Sequence[int]
    ):
        self.weights = weight.split(groups)
        self.biases, self.gains = (
            [None] * len(groups) if t is None else t.split(groups) for t in (bias, gain)
        )

    def __call__(self, group: int, v: Tensor) -> Tensor:
        weight, bias, gain = self.weights[group], self.biases[group], self.gains[group]
        if gain is None:
            return F.linear(v, weight, bias)
        return F.layer_norm(F.linear(v, weight), gain.shape, gain, bias, EPS)

    def all(self, v: Tensor) -> Tensor:
        return torch.cat([self(group, v) for group in range(len(self.weights))], -1)


def _recurrence(
    cell: Cell,
    w: DirectionWeights,
    extras: Extras,
    noise: _Noise,
    kept_on_average: tuple[float, float],
) -> Recurrence:
    hidden = w.w_ih.shape[0] // cell.gates
    groups = (2 * hidden, hidden) if "gru" in cell.name else (cell.gates * hidden,)
    of_input = _Product(w.w_ih, w.b_ih, extras.norm_ih, groups)
    product = _Product(w.w_hh, w.b_hh, extras.norm_hh, groups)

    def of_hidden(group: int, h: Tensor) -> Tensor:
        if noise.h_factor is not None:
            h = h * noise.h_factor[: h.shape[0]]
        return product(group, h)

    advance = _STEPS[cell.name]

    def step(t: int, gx: Tensor, before: States) -> States:
        after = advance(gx, before, of_hidden, w, extras)
        return tuple(
            _zoned_out(old, new, None if kept is None else kept[t], p)
            for old, new, kept, p in zip(
                before, after, noise.kept, kept_on_average, strict=False
            )
        )  # fmt: skip

    return Recurrence(of_input.all, step)


def _zoned_out(old: Tensor, new: Tensor, kept: Tensor | None, p: float) -> Tensor:
    """Krueger et al. 2017: the old value where `kept`, and of the expectation a part p."""
    if kept is not None:
        return torch.where(kept, old, new)
    return p * old + (1 - p) * new if p else new


# group number, h [b, P] -> that group of W_hh h + b_hh
_OfHidden = Callable[[int, Tensor], Tensor]


def _rnn_step(activation: Callable[[Tensor], Tensor]):
    def step(gx: Tensor, states: States, of_hidden: _OfHidden, w, extras) -> States:
        return (activation(gx + of_hidden(0, states[0])),)

    return step


def _gru_step(reset_after: bool):
    def step(gx: Tensor, states: States, of_hidden: _OfHidden, w, extras) -> States:
        (h,) = states
        hidden = h.shape[-1]
        gx_rz, gx_n = gx.split((2 * hidden, hidden), -1)
        r, z = torch.sigmoid(gx_rz + of_hidden(0, h)).chunk(2, -1)
        n = torch.tanh(gx_n + (r * of_hidden(1, h) if reset_after else of_hidden(1, r * h)))
        return (n + z * (h - n),)

    return step


def _lstm_step(
    gx: Tensor, states: States, of_hidden: _OfHidden, w: DirectionWeights, extras: Extras
) -> States:
    """With peepholes as in Graves 2013: i and f see the old c, o the new one."""
    h, c = states
    i, f, g, o = (gx + of_hidden(0, h)).chunk(4, -1)
    p_o = None
    if extras.peephole is not None:
        p_i, p_f, p_o = extras.peephole.chunk(3)
        i, f = i + p_i * c, f + p_f * c
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    if p_o is not None:
        o = o + p_o * c
    seen = c
    if extras.norm_c is not None:
        seen = F.layer_norm(c, extras.norm_c.shape, extras.norm_c, extras.norm_c_bias, EPS)
    h = torch.sigmoid(o) * torch.tanh(seen)
    return (h if w.w_hr is None else F.linear(h, w.w_hr), c)


_STEPS = {
    "rnn_tanh": _rnn_step(torch.tanh),
    "rnn_relu": _rnn_step(torch.relu),
    "gru": _gru_step(True),
    "gru_reset_before": _gru_step(False),
    "lstm": _lstm_step,
}
assert _STEPS.keys() == CELLS.keys()

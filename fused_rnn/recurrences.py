"""The steps of layers with more in their recurrence than torch.nn's, in plain torch operations.

What `oracle.run` takes instead of a cell's own step: recurrent dropout, zoneout, layer
normalisation and peepholes.

Shapes: b rows of a timestep, N rows of all, I input_size, H hidden_size, P output size, G gates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .cells import CELLS, Cell, DirectionWeights
from .oracle import Recurrence, States
from .problem import Noise

# Added to the variance that a normalisation divides by, as in torch.nn.LayerNorm.
EPS = 1e-5


class Extras(NamedTuple):
    """The parameters of one direction of one layer beyond torch.nn's; None where it has none."""

    peephole: Tensor | None = None  # [3*H] from c to the gates i, f and o; LSTM only
    norm_ih: Tensor | None = None  # [G*H] gains of W_ih x
    norm_hh: Tensor | None = None  # [G*H] gains of W_hh h
    norm_c: Tensor | None = None  # [H] gain of c on its way into h; LSTM only
    norm_c_bias: Tensor | None = None  # [H]

    @classmethod
    def of_weights(cls, cell: Cell, w: DirectionWeights) -> Extras:
        """The extras among a direction's weights, see `flat`."""
        if w.norm is None:
            return cls(w.peephole)
        rows, hidden = w.w_ih.shape[0], w.w_ih.shape[0] // cell.gates
        sizes = [rows, rows] + [hidden] * ((w.norm.shape[0] - 2 * rows) // hidden)
        return cls(w.peephole, *w.norm.split(sizes))

    def flat(self) -> list[Tensor]:
        """What comes behind a direction's other weights."""
        norms = [t for t in self[1:] if t is not None]
        return [t for t in (self.peephole, torch.cat(norms) if norms else None) if t is not None]

    def to(self, dtype: torch.dtype) -> Extras:
        return Extras(*(None if t is None else t.to(dtype) for t in self))


class StepNoise(NamedTuple):
    """`problem.Noise` of one direction."""

    h_factor: Tensor | None  # [B, P]
    kept: tuple[Sequence[Tensor] | None, ...]  # of h and c, of each step: bool [b, P], [b, H]
    parts: tuple[float, float]  # of h, of c


def noise_of_steps(noise: Noise, direction: int, batch_sizes: Tensor | None) -> StepNoise:
    def by_step(kept: Tensor | None) -> Sequence[Tensor] | None:
        if kept is None:
            return None
        mask = kept[direction]
        return mask.unbind() if batch_sizes is None else mask.split(batch_sizes.tolist())

    return StepNoise(
        None if noise.h_factor is None else noise.h_factor[direction],
        (by_step(noise.kept_h), by_step(noise.kept_c)),
        (noise.part_h, noise.part_c),
    )


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


def general_recurrence(
    cell: Cell,
    w: DirectionWeights,
    extras: Extras,
    noise: StepNoise,
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
            for old, new, kept, p in zip(before, after, noise.kept, noise.parts, strict=False)
        )

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
    """A step of an LSTM, with peepholes as in Graves 2013: i and f see the old c, o the new one."""
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

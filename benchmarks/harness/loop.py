"""A recurrent stack as a Python loop over timesteps in plain torch operations: what papers call
vanilla. It has no fused kernel; what it launches per step is its time.

Also the yardstick for what torch.nn cannot do: resets.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from harness.cases import Case

State = tuple[Tensor, ...]  # h [B, H], and c for LSTM
Step = Callable[[Tensor, State, Tensor, Tensor], State]


def rnn_step(gx: Tensor, state: State, w_hh: Tensor, b_hh: Tensor) -> State:
    """gx [B, H]: the input's part with b_ih; w_hh [H, H]."""
    return (torch.tanh(gx + torch.addmm(b_hh, state[0], w_hh.t())),)


def gru_step(gx: Tensor, state: State, w_hh: Tensor, b_hh: Tensor) -> State:
    """gx [B, 3H], w_hh [3H, H], gates in the order r, z, n."""
    (h,) = state
    xr, xz, xn = gx.chunk(3, 1)
    hr, hz, hn = torch.addmm(b_hh, h, w_hh.t()).chunk(3, 1)
    r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
    n = torch.tanh(xn + r * hn)
    return (n + z * (h - n),)


def lstm_step(gx: Tensor, state: State, w_hh: Tensor, b_hh: Tensor) -> State:
    """gx [B, 4H], w_hh [4H, H], gates in the order i, f, g, o."""
    h, c = state
    i, f, g, o = (gx + torch.addmm(b_hh, h, w_hh.t())).chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


STEPS: dict[str, Step] = {"rnn": rnn_step, "gru": gru_step, "lstm": lstm_step}


class Loop(torch.nn.Module):
    """The parameters of a torch.nn layer, computed step by step. `step` may be a compiled one."""

    def __init__(self, layer: torch.nn.RNNBase, case: Case, step: Step | None = None) -> None:
        super().__init__()
        self.layer, self.case = layer, case
        self.step = step or STEPS[case.cell]

    def forward(
        self, x: Tensor, hx: Tensor | State | None = None, resets: Tensor | None = None
    ) -> tuple[Tensor, Tensor | State]:
        """x [T, B, I], hx as torch.nn's, resets bool [T, B] or None; y [T, B, D*H] and states."""
        case, batch = self.case, x.shape[1]
        count = 2 if case.cell == "lstm" else 1
        if hx is None:
            zeros = x.new_zeros(case.layers * case.directions, batch, case.H)
            hx = (zeros,) * count
        elif count == 1:
            hx = (hx,)
        keep = None if resets is None else (~resets).to(x.dtype).unsqueeze(2)
        finals: list[State] = []
        for number in range(case.layers):
            outputs = []
            for direction in range(case.directions):
                start = tuple(s[number * case.directions + direction] for s in hx)
                y, final = self._scan(x, start, number, direction == 1, keep)
                outputs.append(y)
                finals.append(final)
            x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)
        states = tuple(torch.stack(parts) for parts in zip(*finals, strict=True))
        return x, states if count == 2 else states[0]

    def _scan(
        self, x: Tensor, state: State, number: int, reverse: bool, keep: Tensor | None
    ) -> tuple[Tensor, State]:
        suffix = f"_l{number}" + "_reverse" * reverse
        w_ih, w_hh, b_ih, b_hh = (
            getattr(self.layer, name + suffix)
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        gx = torch.nn.functional.linear(x, w_ih, b_ih).unbind(0)
        steps = range(len(gx))
        outputs = [gx[0]] * len(gx)
        for t in reversed(steps) if reverse else steps:
            if keep is not None:
                state = tuple(s * keep[t] for s in state)
            state = self.step(gx[t], state, w_hh, b_hh)
            outputs[t] = state[0]
        return torch.stack(outputs), state

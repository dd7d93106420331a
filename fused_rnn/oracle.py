"""A layer in plain torch operations, step by step, straight from the equations of `cells`.

Differentiable any number of times, forward and reverse, and under every function transform: what
the operators fall back on there, and what every backend is tested against. Slow.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .cells import Cell, DirectionWeights
from .problem import Masks, Rows

States = tuple[Tensor, ...]  # h, and c where the cell has one


class Histories(NamedTuple):
    """The states of a layer, h and for LSTM c, each through all of time and at its end."""

    rows: States  # [N, D*P] and [D, N, H]; zeros where no step was taken
    finals: States  # [D, B, P] and [D, B, H]


def run(
    cell: Cell, x: Tensor, initial: States, weights: list[DirectionWeights], rows: Rows
) -> Histories:
    """x [N, I]; initial h [D, B, P] and for LSTM c [D, B, H]."""
    masks = rows.masks or Masks()
    taken = masks.taken(rows.timesteps)
    if taken is not None:
        # Whatever lies there must not reach a gradient: zero times NaN is NaN.
        x = torch.where(taken.flatten().unsqueeze(1), x, 0)
    directions = []
    for d, w in enumerate(weights):
        gx = torch.nn.functional.linear(x, w.w_ih, w.b_ih).split(rows.batch_sizes)
        fresh = [
            torch.zeros_like(s[d]) if r is None else r[d]
            for s, r in zip(initial, (masks.reset_h, masks.reset_c), strict=False)
        ]
        course = _Course(rows, d == 1, taken, masks.restarts(d == 1), fresh)
        directions.append(_scan(cell, gx, tuple(s[d] for s in initial), w, course))
    (h, *c), finals = (list(zip(*parts, strict=True)) for parts in zip(*directions, strict=True))
    rows_of = (torch.cat(h, -1), *map(torch.stack, c))
    return Histories(rows_of, tuple(map(torch.stack, finals)))


class _Course(NamedTuple):
    """What happens to the states of one direction between the steps."""

    rows: Rows
    reverse: bool
    taken: Tensor | None  # bool [T, B]
    restarts: Tensor | None  # bool [T, B]
    fresh: list[Tensor]  # [B, P or H] each: the states after a restart


def _scan(
    cell: Cell, gx: tuple[Tensor, ...], initial: States, w: DirectionWeights, course: _Course
) -> tuple[States, States]:
    """The states after each row, and those at the end of each batch row."""
    sizes = course.rows.batch_sizes
    steps = range(len(gx))
    history: list[States] = [()] * len(gx)
    ended: list[States] = []  # states of rows that have ended, last rows first
    states = tuple(s[: sizes[-1 if course.reverse else 0]] for s in initial)
    for t in reversed(steps) if course.reverse else steps:
        size, current = sizes[t], states[0].shape[0]
        if size > current:
            joining = (i[current:size] for i in initial)
            states = tuple(torch.cat(pair) for pair in zip(states, joining, strict=True))
        elif size < current:
            ended.append(tuple(s[size:] for s in states))
            states = tuple(s[:size] for s in states)
        before = states
        if course.restarts is not None:
            restart = course.restarts[t].unsqueeze(1)
            states = tuple(
                torch.where(restart, f, s) for f, s in zip(course.fresh, states, strict=True)
            )
        history[t] = states = cell.step(gx[t], states, w)
        if course.taken is not None:
            taken = course.taken[t].unsqueeze(1)
            history[t] = tuple(torch.where(taken, s, 0) for s in states)
            states = tuple(torch.where(taken, s, b) for s, b in zip(states, before, strict=True))
    ended.append(states)
    return (
        tuple(torch.cat(parts) for parts in zip(*history, strict=True)),
        tuple(torch.cat(parts) for parts in zip(*reversed(ended), strict=True)),
    )

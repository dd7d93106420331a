"""A layer in plain torch operations, step by step, straight from the equations of `cells`.

Differentiable any number of times, forward and reverse, and under every function transform: what
the operators fall back on there, and what every backend is tested against. Slow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .cells import Cell, DirectionWeights
from .problem import Course, Masks, Rows

States = tuple[Tensor, ...]  # h, and c where the cell has one


class Histories(NamedTuple):
    """The states of a layer, h and for LSTM c, each through all of time and at its end."""

    rows: States  # [N, D*P] and [D, N, H]; zeros where no step was taken
    finals: States  # [D, B, P] and [D, B, H]


class Recurrence(NamedTuple):
    """One direction of a layer, as functions of tensors."""

    project: Callable[[Tensor], Tensor]  # x [N, I] -> gx [N, G*H]
    step: Callable[[int, Tensor, States], States]  # t, gx [b, G*H], the states before -> after


def plain_recurrence(cell: Cell, direction: int, w: DirectionWeights) -> Recurrence:
    """What `cells` has for the cell."""
    return Recurrence(
        lambda x: torch.nn.functional.linear(x, w.w_ih, w.b_ih),
        lambda t, gx, states: cell.step(gx, states, w),
    )


def run(
    cell: Cell,
    x: Tensor,
    initial: States,
    weights: list[DirectionWeights],
    rows: Rows,
    recurrence: Callable[[Cell, int, DirectionWeights], Recurrence] = plain_recurrence,
) -> Histories:
    """x [N, I]; initial h [D, B, P] and for LSTM c [D, B, H]."""
    masks = rows.masks or Masks()
    taken = masks.taken(rows.timesteps)
    if taken is not None:
        # Whatever lies there must not reach a gradient: zero times NaN is NaN.
        x = torch.where(taken.flatten().unsqueeze(1), x, 0)
    directions = []
    for d, w in enumerate(weights):
        project, step = recurrence(cell, d, w)
        states = tuple(s[d] for s in initial)
        course = Course.of(masks, rows.timesteps, d, states)
        gx = project(x).split(rows.batch_sizes)
        directions.append(_scan(step, gx, states, course, rows.batch_sizes, d == 1))
    (h, *c), finals = (list(zip(*parts, strict=True)) for parts in zip(*directions, strict=True))
    rows_of = (torch.cat(h, -1), *map(torch.stack, c))
    return Histories(rows_of, tuple(map(torch.stack, finals)))


def _scan(
    step: Callable[[int, Tensor, States], States],
    gx: tuple[Tensor, ...],
    initial: States,
    course: Course,
    sizes: Sequence[int],  # rows of each step
    reverse: bool,
) -> tuple[States, States]:
    """The states after each row, and those at the end of each batch row."""
    steps = range(len(gx))
    history: list[States] = [()] * len(gx)
    ended: list[States] = []  # states of rows that have ended, last rows first
    states = tuple(s[: sizes[-1 if reverse else 0]] for s in initial)
    for t in reversed(steps) if reverse else steps:
        size, current = sizes[t], states[0].shape[0]
        if size > current:
            joining = (i[current:size] for i in initial)
            states = tuple(torch.cat(pair) for pair in zip(states, joining, strict=True))
        elif size < current:
            ended.append(tuple(s[size:] for s in states))
            states = tuple(s[:size] for s in states)
        history[t] = after = step(t, gx[t], course.started(t, states))
        if course.taken is not None:
            history[t] = tuple(torch.where(course.taken[t], s, 0) for s in after)
        states = course.passed(t, states, after)
    ended.append(states)
    return (
        tuple(torch.cat(parts) for parts in zip(*history, strict=True)),
        tuple(torch.cat(parts) for parts in zip(*reversed(ended), strict=True)),
    )

"""Gradients of gradients of a layer, and its tangents, as fast as torch's operations allow.

`ops` has a layer's gradients from a backend. What is differentiated once more is their inner
product with the gradient that comes for them; and that product is the tangent of the layer's
outputs in the direction of what came (x, weights and states each moving along theirs), times the
outputs' own gradients. So there are three scans over time, each with a matrix product and a few
operations per step: the first gradients' (once more, for what they are inside), the tangent's, and
the gradients' of the tangent, whose steps are the first scan's with more coming in. All else, the
second derivatives of the cells among it, is done for all timesteps at once. Forward mode is the
second scan alone.

Sequences are rows as in `problem.Rows`, of a padded batch or packed ones. Plain operations through
autograd, `oracle`, take 1.3 to 2.2 times as long (benchmarks/second_order.py); they remain for the
layers that `fits` refuses, and for third derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .backends.pieces import Pieces, spread
from .cells import equal_parts
from .problem import Masks, Rows
from .transfer import sent

Some = Tensor | None
_Side = tuple[Some, Some, Some]  # rows [N, K], the weight [M, K] that they meet, and a bias [M]


class _Slopes(NamedTuple):
    """The derivatives of a cell's steps, [N, Q, H] by their sums and [N, H] by states."""

    carry_by_sums: Tensor
    carry_by_before: Some = None  # None: zero
    h_by_sums: Some = None  # of an LSTM: its h is another than its carry
    h_by_carry: Some = None


class _Steps(NamedTuple):
    """A cell's step, pointwise: of what its products give, `sums` [N, Q, H], and a state that
    goes past the products, `carry`."""

    columns: int  # Q
    inputs: slice  # the columns to which W_ih's products add,
    hidden: slice  # and W_hh's
    # Of sums and the carry before (of an RNN, of the h that a step gave).
    slopes: Callable[..., _Slopes]
    # The same once more, to be differentiated: the carry after, and h where it is another. Of an
    # RNN, of h and the slopes: the second derivative.
    carry: Callable[[Tensor, Tensor], Tensor] | None = None
    output: Callable[[Tensor, Tensor], Tensor] | None = None
    bend: Callable[[Tensor, Tensor], Tensor] | None = None  # None, and no carry: zero

    @property
    def is_rnn(self) -> bool:
        return self.carry is None


def _tanh_slopes(h: Tensor) -> _Slopes:
    return _Slopes((1 - h * h).unsqueeze(1))


def _tanh_bend(h: Tensor, slope: Tensor) -> Tensor:
    return slope * h * -2


def _relu_slopes(h: Tensor) -> _Slopes:
    return _Slopes((h > 0).to(h.dtype).unsqueeze(1))


def _gru(sums: Tensor, h: Tensor) -> Tensor:
    """The new h, from gx_n, both r's sum, both z's sum, gh_n."""
    gx_n, r, z, gh_n = sums.unbind(1)
    n = torch.tanh(gx_n + torch.sigmoid(r) * gh_n)
    return n + torch.sigmoid(z) * (h - n)


def _gru_slopes(sums: Tensor, h: Tensor) -> _Slopes:
    gx_n, r, z, gh_n = sums.unbind(1)
    r, z = torch.sigmoid(r), torch.sigmoid(z)
    n = torch.tanh(gx_n + r * gh_n)
    by_n = (1 - z) * (1 - n * n)
    by_gh_n = by_n * r
    return _Slopes(
        torch.stack((by_n, by_gh_n * gh_n * (1 - r), (h - n) * z * (1 - z), by_gh_n), 1), z
    )


def _lstm(sums: Tensor, c: Tensor) -> Tensor:
    i, f, g, _ = sums.unbind(1)
    return torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)


def _lstm_output(sums: Tensor, c: Tensor) -> Tensor:
    return torch.sigmoid(sums.unbind(1)[3]) * torch.tanh(c)


def _lstm_slopes(sums: Tensor, c: Tensor) -> _Slopes:
    i, f, g, o = sums.unbind(1)
    i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
    shown = torch.tanh(f * c + i * g)
    nothing = torch.zeros_like(i)
    return _Slopes(
        torch.stack((g * i * (1 - i), c * f * (1 - f), i * (1 - g * g), nothing), 1),
        f,
        torch.stack((nothing, nothing, nothing, shown * o * (1 - o)), 1),
        o * (1 - shown * shown),
    )


_ALL = slice(None)
_STEPS = {
    "rnn_tanh": _Steps(1, _ALL, _ALL, _tanh_slopes, bend=_tanh_bend),
    "rnn_relu": _Steps(1, _ALL, _ALL, _relu_slopes),
    "gru": _Steps(4, slice(0, 3), slice(1, 4), _gru_slopes, _gru),
    "lstm": _Steps(4, _ALL, _ALL, _lstm_slopes, _lstm, _lstm_output),
}


class Given(NamedTuple):
    """Tensors of one kind for the inputs of a layer: the inputs, what they move along, or their
    gradients. Any may be None: zero, or not there."""

    x: Some  # [T, B, I], or [N, I] of packed rows
    h0: Some  # [D, B, H]
    c0: Some  # [D, B, H]
    weights: list[Some]  # of each direction w_ih, w_hh[, b_ih, b_hh]


def fits(cell: str, inputs: Given) -> bool:
    """Whether a layer without masks or noise is one for here."""
    if cell not in _STEPS or inputs.x.dtype not in (torch.float32, torch.float64):
        return False
    if 0 in inputs.x.shape[:-1]:
        return False
    w_ih, w_hh, *others = equal_parts(inputs.weights, inputs.h0.shape[0])[0]
    hidden = w_ih.shape[0] // (3 if cell == "gru" else _STEPS[cell].columns)
    are_biases = len(others) == 2 and all(other.shape == w_ih.shape[:1] for other in others)
    return w_hh.shape[1] == hidden and (are_biases or not others)


def gradients(
    cell: str,
    grads: tuple[Some, Some, Some],  # of y [T, B, D*H] or [N, D*H], h_n and c_n
    inputs: Given,
    y: Tensor,
    along: Given,  # the gradients of the inputs' gradients
    batch_sizes: Some = None,  # int64 [T] on the CPU, of packed rows
) -> tuple[list[Some], Given]:
    """The gradients of `grads` and of the inputs. Nothing here is differentiable."""
    grads = _flat(grads[0]), *grads[1:]
    parts = [
        direction.gradients(grads) for direction in _directions(cell, inputs, y, along, batch_sizes)
    ]
    of_grads, of_inputs = zip(*parts, strict=True)
    y_grads, *of_states = zip(*of_grads, strict=True)
    x, h0, c0, weights = zip(*of_inputs, strict=True)
    return (
        [torch.cat(y_grads, 1).view_as(y), *map(_stacked, of_states)],
        Given(
            sum(x).view_as(inputs.x), _stacked(h0), _stacked(c0), [w for ws in weights for w in ws]
        ),
    )


def tangents(
    cell: str, inputs: Given, y: Tensor, along: Given, batch_sizes: Some = None
) -> tuple[Tensor, Tensor, Some]:
    """How y, h_n and c_n move where the inputs move `along`. Nothing here is differentiable."""
    parts = []
    for direction in _directions(cell, inputs, y, along, batch_sizes):
        _, h, c = direction.scan_tangents()
        finals = direction.order.finals
        parts.append((h, finals(h), None if c is None else finals(c)))
    of_y, *of_states = zip(*parts, strict=True)
    return torch.cat(of_y, 1).view_as(y), *map(_stacked, of_states)


def _directions(
    cell: str, inputs: Given, y: Tensor, along: Given, batch_sizes: Some
) -> Iterator[_Direction]:
    directions, batch, _ = inputs.h0.shape
    timesteps = len(inputs.x if batch_sizes is None else batch_sizes)
    rows = Rows(timesteps, batch, batch_sizes, len(inputs.x))
    inputs, along = (given._replace(x=_flat(given.x)) for given in (inputs, along))
    for d in range(directions):
        order = _Order(rows, d == 1, y.device)
        yield _Direction(_STEPS[cell], d, directions, order, inputs, _flat(y), along)


def gradients_in_pieces(
    cell: str,
    grads: tuple[Some, Some, Some],
    inputs: Given,
    y: Tensor,
    along: Given,
    masks: Masks,
) -> tuple[list[Some], Given]:
    """What `gradients` gives, of a padded batch whose rows end early or start afresh, on the
    CPU."""
    timesteps, batch, _ = inputs.x.shape
    pieces = Pieces(masks, timesteps, batch)

    def rows(sequence: Some) -> Some:
        return None if sequence is None else sequence.flatten(0, 1).index_select(0, pieces.index)

    def initial(states: Some) -> Some:
        return None if states is None else pieces.initial(states, None)

    def initial_grads(grads: Some, like: Some) -> Some:
        return None if grads is None else pieces.initial_grads(grads, torch.zeros_like(like))[0]

    def final(states: Some, initial: Some) -> Some:
        return None if states is None else pieces.final(states, initial)

    def final_grads(grads: Some) -> Some:
        return None if grads is None else pieces.final_grads(grads)[0]

    def packed(given: Given) -> Given:
        return Given(rows(given.x), initial(given.h0), initial(given.c0), given.weights)

    def padded(packed: Tensor, like: Tensor) -> Tensor:
        return spread(packed, pieces.index, timesteps * batch).view_as(like)

    if pieces.count == 0:  # states are handed through, which is linear
        states = [
            a if s is None or a is not None else torch.zeros_like(s)
            for s, a in ((inputs.h0, along.h0), (inputs.c0, along.c0))
        ]
        nothing = [None if t is None else torch.zeros_like(t) for t in inputs[:3]]
        return (
            [torch.zeros_like(y), *states],
            Given(*nothing, [None if w is None else torch.zeros_like(w) for w in inputs.weights]),
        )
    (of_y, of_h_n, of_c_n), result = gradients(
        cell,
        (rows(grads[0]), *map(final_grads, grads[1:])),
        packed(inputs),
        rows(y),
        packed(along),
        pieces.batch_sizes,
    )
    return (
        [padded(of_y, y), final(of_h_n, along.h0), final(of_c_n, along.c0)],
        Given(
            padded(result.x, inputs.x),
            initial_grads(result.h0, inputs.h0),
            initial_grads(result.c0, inputs.c0),
            result.weights,
        ),
    )


def _flat(sequence: Some) -> Some:
    return sequence if sequence is None or sequence.dim() == 2 else sequence.flatten(0, 1)


def _stacked(parts: tuple[Some, ...]) -> Some:
    return None if parts[0] is None else torch.stack(parts)


class _Order:
    """How the scan of one direction goes through the rows: step t has `sizes[t]` of them."""

    def __init__(self, rows: Rows, turned: bool, device: torch.device):
        self.sizes, self.turned, self.batch = rows.batch_sizes, turned, rows.batch_size
        steps = range(rows.timesteps)
        self.steps = list(reversed(steps)) if turned else list(steps)
        self.are_equal = self.sizes[-1] == self.batch
        if self.are_equal:
            return
        # Of each row, which state it started from: a row's, or one of the initial ones behind all.
        before = rows.previous_rows(turned)
        first, final = (self._starts(rows, reverse) for reverse in (turned, not turned))
        self.before, self.first, self.final = (
            sent(index, device, "batch_sizes") for index in (before, first, final)
        )

    def _starts(self, rows: Rows, reverse: bool) -> Tensor:
        """int64 [B]: the rows that start from the initial states of a direction."""
        if not reverse:
            return torch.arange(self.batch)
        before = rows.previous_rows(reverse)
        starts = (before >= rows.count).nonzero().squeeze(1)
        return torch.empty_like(starts).index_copy_(0, before[starts] - rows.count, starts)

    def split(self, rows: Tensor) -> Sequence[Tensor]:
        """The rows of each step. A list of views costs less than as many taken one by one."""
        return rows.split(self.sizes)

    def later(self, rows: Tensor, initial: Some) -> Tensor:
        """The states before each row, of those after, zeros where there are none initially."""
        if initial is None:
            initial = rows.new_zeros((self.batch, *rows.shape[1:]))
        if not self.are_equal:
            return torch.cat((rows, initial)).index_select(0, self.before)
        pair = (rows[self.batch :], initial) if self.turned else (initial, rows[: -self.batch])
        return torch.cat(pair)

    def earlier(self, rows: Tensor) -> Tensor:
        """What reaches the states before each row, where these are; zeros where nothing does."""
        if not self.are_equal:
            both = rows.new_zeros((len(rows) + self.batch, *rows.shape[1:]))
            return both.index_copy_(0, self.before, rows)[: len(rows)]
        nothing = rows.new_zeros((self.batch, *rows.shape[1:]))
        if self.turned:
            return torch.cat((nothing, rows[: -self.batch]))
        return torch.cat((rows[self.batch :], nothing))

    def started(self, rows: Tensor) -> Tensor:
        """[B, ...] the rows that the initial states come before."""
        if not self.are_equal:
            return rows.index_select(0, self.first)
        return rows[-self.batch :] if self.turned else rows[: self.batch]

    def finals(self, rows: Tensor) -> Tensor:
        """The rows' last states [B, ...]."""
        if not self.are_equal:
            return rows.index_select(0, self.final)
        return rows[: self.batch] if self.turned else rows[-self.batch :]

    def add_to_finals(self, rows: Tensor, grad: Some) -> None:
        if grad is None:
            return
        if not self.are_equal:
            rows.index_add_(0, self.final, grad)
        else:
            self.finals(rows).add_(grad)


class _Adjoint(NamedTuple):
    """What comes back to a layer's steps, each [N, ...]."""

    sums: Tensor  # [N, Q, H]
    h: Tensor
    carry: Tensor  # where it is another than h, from later steps alone
    whole: Tensor  # of the carry, from its own step too


class _Direction:
    """One direction of a layer."""

    def __init__(
        self,
        steps: _Steps,
        d: int,
        directions: int,
        order: _Order,
        inputs: Given,
        y: Tensor,
        along: Given,
    ):
        self.steps, self.d, self.order = steps, d, order
        hidden = y.shape[1] // directions
        self.part = slice(d * hidden, (d + 1) * hidden)
        count = len(inputs.weights) // directions
        own = slice(d * count, (d + 1) * count)
        self.w_ih, self.w_hh, b_ih, b_hh = self._in_order(inputs.weights[own])
        self.along = self._in_order(along.weights[own])
        self.has_biases = count == 4
        self.x, self.x_along = inputs.x, along.x
        self.h0_along, self.c0_along = (s if s is None else s[d] for s in (along.h0, along.c0))
        self.h = y[:, self.part]
        self.h_before = order.later(self.h, inputs.h0[d])
        if steps.is_rnn:
            self.slopes = steps.slopes(self.h)
            return
        self.sums = self._sums([(self.x, self.w_ih, b_ih)], [(self.h_before, self.w_hh, b_hh)])
        self.before = self.h_before if inputs.c0 is None else self._cells(inputs.c0[d])
        self.slopes = steps.slopes(self.sums, self.before)

    def _in_order(self, weights: list[Some]) -> list[Some]:
        """w_ih, w_hh, b_ih and b_hh, the first and third in the order of `inputs`."""
        w_ih, w_hh, b_ih, b_hh = (*weights, None, None)[:4]
        return [self._rolled(w_ih, 1), w_hh, self._rolled(b_ih, 1), b_hh]

    def _rolled(self, weight: Some, by: int) -> Some:
        """GRU's n before r and z, or by -1 after them."""
        if weight is None or self.steps.inputs == _ALL:
            return weight
        return torch.roll(weight, by * (weight.shape[0] // 3), 0)

    def _sums(self, of_inputs: list[_Side], of_hidden: list[_Side]) -> Tensor:
        """[N, Q, H] of rows, weights and biases for the inputs' columns and for the hidden ones."""
        hidden, steps = self.h_before.shape[1], self.steps
        both = (steps.inputs, of_inputs), (steps.hidden, of_hidden)
        bias = self.x.new_zeros((steps.columns, hidden))
        for columns, sides in both:
            for _, _, added in sides:
                if added is not None:
                    bias[columns] += added.view(-1, hidden)
        sums = bias.repeat(len(self.x), 1, 1)
        for columns, sides in both:
            into = sums[:, columns].flatten(1)
            for rows, weight, _ in sides:
                if rows is not None and weight is not None:
                    into.addmm_(rows, weight.t())
        return sums

    def _cells(self, c0: Tensor) -> Tensor:
        """LSTM's c before each step."""
        i, f, g, _ = self.sums.unbind(1)
        added, kept = torch.sigmoid(i).mul_(torch.tanh(g)), torch.sigmoid(f)
        cells = torch.empty_like(added)
        added, kept, after = map(self.order.split, (added, kept, cells))
        c = c0[:0]
        for t in self.order.steps:
            c = self._joined(c, c0, self.order.sizes[t])
            c = torch.addcmul(added[t], kept[t], c, out=after[t])
        return self.order.later(cells, c0)

    @staticmethod
    def _joined(states: Some, initial: Some, size: int) -> Some:
        """The states that so many rows start from: those of the step before as far as there are."""
        if states is None or len(states) == size:
            return states if states is not None or initial is None else initial[:size]
        if len(states) > size:
            return states[:size]
        joining = states.new_zeros((size - len(states), states.shape[1]))
        return torch.cat((states, joining if initial is None else initial[len(states) : size]))

    def gradients(self, grads: tuple[Some, Some, Some]) -> tuple[tuple, tuple]:
        """Two groups: gradients of y, h_n, c_n; and of x, h0, c0 and this direction's weights."""
        order, has_output = self.order, self.steps.output is not None
        grad_y, grad_h_n, grad_c_n = grads
        of_h = torch.zeros_like(self.h_before)
        if grad_y is not None:
            of_h.copy_(grad_y[:, self.part])
        order.add_to_finals(of_h, None if grad_h_n is None else grad_h_n[self.d])
        of_c = torch.zeros_like(of_h) if has_output else None
        if grad_c_n is not None:
            order.add_to_finals(of_c, grad_c_n[self.d])
        first = self._scan_back(of_h, of_c)
        tangent_sums, tangent_h, tangent_c = self.scan_tangents()
        of_sums, of_before = self._second_derivatives(first, tangent_sums, tangent_h, tangent_c)

        inputs, hidden = self.steps.inputs, self.steps.hidden
        w_ih_along, w_hh_along, _, _ = self.along
        first_inputs, first_hidden = (first.sums[:, s].flatten(1) for s in (inputs, hidden))
        # What reaches the states before each step but by the sums.
        to_h = torch.zeros_like(of_h) if w_hh_along is None else first_hidden @ w_hh_along
        if of_before is not None and not has_output:
            to_h += of_before
        of_c = order.earlier(of_before) if has_output else None
        second = self._scan_back(order.earlier(to_h), of_c, of_sums)
        second_inputs, second_hidden = (second.sums[:, s].flatten(1) for s in (inputs, hidden))

        x = second_inputs @ self.w_ih
        if w_ih_along is not None:
            x.addmm_(first_inputs, w_ih_along)
        w_ih = second_inputs.t() @ self.x
        if self.x_along is not None:
            w_ih.addmm_(first_inputs.t(), self.x_along)
        w_hh = second_hidden.t() @ self.h_before
        w_hh.addmm_(first_hidden.t(), order.later(tangent_h, self.h0_along))
        weights = [self._rolled(w_ih, -1), w_hh]
        if self.has_biases:
            b_ih, b_hh = second_inputs.sum(0), second_hidden.sum(0)
            weights += [self._rolled(b_ih, -1), b_hh]
        h0, c0 = order.started(second_hidden) @ self.w_hh + order.started(to_h), None
        if self.slopes.carry_by_before is not None:
            past = order.started(self.slopes.carry_by_before) * order.started(second.whole)
            if has_output:
                c0 = past + order.started(of_before)
            else:
                h0 += past
        finals = order.finals(tangent_h), None if tangent_c is None else order.finals(tangent_c)
        return (tangent_h, *finals), (x, h0, c0, weights)

    def _scan_back(self, of_h: Tensor, of_carry: Some, of_sums: Some = None) -> _Adjoint:
        """The scan in reverse, from the gradients of all h, of each c and of all sums."""
        order, has_output = self.order, self.steps.output is not None
        sums, h = torch.empty_like(self.slopes.carry_by_sums), torch.empty_like(of_h)
        carry = torch.empty_like(h) if has_output else h
        whole = torch.empty_like(h) if has_output else h
        split = order.split
        given, h_at, carry_at, whole_at = map(split, (of_h, h, carry, whole))
        hidden = split(sums[:, self.steps.hidden].flatten(1))
        sums_at, by_sums = map(self._by_step, (sums, self.slopes.carry_by_sums))
        past = None if self.slopes.carry_by_before is None else split(self.slopes.carry_by_before)
        if has_output:
            h_by_sums, h_by_carry = split(self.slopes.h_by_sums), split(self.slopes.h_by_carry)
            of_carry = split(of_carry)
        of_sums = None if of_sums is None else self._by_step(of_sums)
        after = None
        for t in reversed(order.steps):
            size = order.sizes[t]
            # How many of the rows have a next step.
            going_on = 0 if after is None else min(size, order.sizes[after])
            if going_on == size:
                torch.addmm(given[t], _first(hidden[after], size), self.w_hh, out=h_at[t])
            else:
                h_at[t].copy_(given[t])
                if going_on:
                    h_at[t][:going_on].addmm_(hidden[after], self.w_hh)
            if has_output:
                carry_at[t].copy_(of_carry[t])
            if past is not None and going_on:
                kept, come = _first(past[after], going_on), _first(whole_at[after], going_on)
                _first(carry_at[t], going_on).addcmul_(kept, come)
            if has_output:
                torch.addcmul(carry_at[t], h_by_carry[t], h_at[t], out=whole_at[t])
            if self.steps.columns == 1:
                torch.mul(by_sums[t], whole_at[t], out=sums_at[t])
            else:
                torch.mul(by_sums[t], whole_at[t].unsqueeze(1), out=sums_at[t])
            if has_output:
                sums_at[t].addcmul_(h_by_sums[t], h_at[t].unsqueeze(1))
            if of_sums is not None:
                sums_at[t].add_(of_sums[t])
            after = t
        return _Adjoint(sums, h, carry, whole)

    def scan_tangents(self) -> tuple[Tensor, Tensor, Some]:
        """The tangents of the sums, h and c of each step."""
        order, has_output = self.order, self.steps.output is not None
        w_ih, w_hh, b_ih, b_hh = self.along
        sums = self._sums(
            [(self.x, w_ih, b_ih), (self.x_along, self.w_ih, None)], [(self.h_before, w_hh, b_hh)]
        )
        carry = torch.empty_like(self.h_before)
        h = torch.empty_like(carry) if has_output else carry
        split, w_hh = order.split, self.w_hh.t()
        hidden = split(sums[:, self.steps.hidden].flatten(1))
        h_at, carry_at = map(split, (h, carry))
        sums_at, by_sums = map(self._by_step, (sums, self.slopes.carry_by_sums))
        past = None if self.slopes.carry_by_before is None else split(self.slopes.carry_by_before)
        if has_output:
            h_by_sums, h_by_carry = split(self.slopes.h_by_sums), split(self.slopes.h_by_carry)
        initial = self.c0_along if has_output else self.h0_along
        h_before = before = None
        for t in order.steps:
            h_before = self._joined(h_before, self.h0_along, order.sizes[t])
            before = self._joined(before, initial, order.sizes[t])
            if h_before is not None:
                hidden[t].addmm_(h_before, w_hh)
            self._weighted_sum(by_sums[t], sums_at[t], carry_at[t])
            if past is not None and before is not None:
                carry_at[t].addcmul_(past[t], before)
            if has_output:
                self._weighted_sum(h_by_sums[t], sums_at[t], h_at[t])
                h_at[t].addcmul_(h_by_carry[t], carry_at[t])
            h_before, before = h_at[t], carry_at[t]
        return sums, h, carry if has_output else None

    def _by_step(self, sums: Tensor) -> Sequence[Tensor]:
        """[N, Q, H] split, or [N, H] where there is one column."""
        return self.order.split(sums.squeeze(1) if self.steps.columns == 1 else sums)

    def _weighted_sum(self, by: Tensor, sums: Tensor, into: Tensor) -> None:
        """Sums over the columns of `sums`, weighted."""
        if self.steps.columns == 1:
            torch.mul(by, sums, out=into)
        else:
            torch.sum(by * sums, 1, out=into)

    def _second_derivatives(
        self, first: _Adjoint, tangent_sums: Tensor, tangent_h: Tensor, tangent_c: Some
    ) -> tuple[Some, Some]:
        """The gradients of sums and of the states past the products, of the steps' tangents times
        what comes back to the steps. None is zero."""
        if not self.steps.is_rnn:
            return self._derivatives_of_slopes(first, tangent_sums, tangent_h, tangent_c)
        if self.steps.bend is None:
            return None, None
        bend = self.steps.bend(self.h, self.slopes.carry_by_sums.squeeze(1)).mul_(first.h)
        return tangent_sums.mul(bend.unsqueeze(1)), None

    @torch.enable_grad()
    def _derivatives_of_slopes(
        self, first: _Adjoint, tangent_sums: Tensor, tangent_h: Tensor, tangent_c: Some
    ) -> tuple[Tensor, Tensor]:
        by = sums, _ = tuple(t.detach().requires_grad_() for t in (self.sums, self.before))
        carry = self.steps.carry(*by)
        if self.steps.output is None:
            outputs, weights = (carry,), (first.h,)
            tangent_before = self.order.later(tangent_h, self.h0_along)
        else:
            outputs, weights = (self.steps.output(sums, carry), carry), (first.h, first.carry)
            tangent_before = self.order.later(tangent_c, self.c0_along)
        slopes = torch.autograd.grad(outputs, by, weights, create_graph=True)
        return torch.autograd.grad(slopes, by, (tangent_sums, tangent_before))


def _first(rows: Tensor, count: int) -> Tensor:
    return rows if len(rows) == count else rows[:count]

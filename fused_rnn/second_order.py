"""Gradients of gradients of a layer, as fast as torch's operations allow.

`ops` has a layer's gradients from a backend. What is differentiated once more is their inner
product with the gradient that comes for them; and that product is the tangent of the layer's
outputs in the direction of what came (x, weights and states each moving along theirs), times the
outputs' own gradients. So there are three scans over time, each with a matrix product and a few
operations per step: the first gradients' (once more, for what they are inside), the tangent's, and
the gradients' of the tangent, whose steps are the first scan's with more coming in. All else, the
second derivatives of the cells among it, is done for all timesteps at once.

Plain operations through autograd, `oracle`, take three to six times as long; they remain for the
layers that `fits` refuses, and for third derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Some = Tensor | None
_Side = tuple[Some, Some, Some]  # rows [T, B, K], the weight [M, K] that they meet, and a bias [M]


class _Steps(NamedTuple):
    """A cell's step, pointwise: of what its products give, `sums` [N, Q, H], and a state that
    goes past the products."""

    columns: int  # Q
    inputs: slice  # the columns to which W_ih's products add,
    hidden: slice  # and W_hh's
    carry: Callable[[Tensor, Tensor], Tensor]  # sums, the state before -> after
    output: Callable[[Tensor, Tensor], Tensor] | None  # sums, that state -> h; None: it is h
    goes_past: bool  # whether the state before matters but for the products


def _rnn_tanh(sums: Tensor, h: Tensor) -> Tensor:
    return torch.tanh(sums.squeeze(1))


def _rnn_relu(sums: Tensor, h: Tensor) -> Tensor:
    return torch.relu(sums.squeeze(1))


def _gru(sums: Tensor, h: Tensor) -> Tensor:
    """Of gx_n, both r's sum, both z's sum, gh_n."""
    gx_n, r, z, gh_n = sums.unbind(1)
    n = torch.tanh(gx_n + torch.sigmoid(r) * gh_n)
    return n + torch.sigmoid(z) * (h - n)


def _lstm(sums: Tensor, c: Tensor) -> Tensor:
    i, f, g, _ = sums.unbind(1)
    return torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)


def _lstm_output(sums: Tensor, c: Tensor) -> Tensor:
    return torch.sigmoid(sums.unbind(1)[3]) * torch.tanh(c)


_ALL = slice(None)
_STEPS = {
    "rnn_tanh": _Steps(1, _ALL, _ALL, _rnn_tanh, None, False),
    "rnn_relu": _Steps(1, _ALL, _ALL, _rnn_relu, None, False),
    "gru": _Steps(4, slice(0, 3), slice(1, 4), _gru, None, True),
    "lstm": _Steps(4, _ALL, _ALL, _lstm, _lstm_output, True),
}


class Given(NamedTuple):
    """Tensors of one kind for the inputs of a layer: the inputs, what they move along, or their
    gradients. Any may be None: zero, or not there."""

    x: Some  # [T, B, I]
    h0: Some  # [D, B, H]
    c0: Some  # [D, B, H]
    weights: list[Some]  # of each direction w_ih, w_hh[, b_ih, b_hh]


def fits(cell: str, inputs: Given) -> bool:
    """Whether a padded layer without masks or noise is one for here."""
    if cell not in _STEPS or inputs.x.dtype not in (torch.float32, torch.float64):
        return False
    if inputs.x.dim() != 3 or 0 in inputs.x.shape[:2]:
        return False
    per_direction = len(inputs.weights) // inputs.h0.shape[0]
    hidden = inputs.weights[0].shape[0] // (3 if cell == "gru" else _STEPS[cell].columns)
    return per_direction in (2, 4) and inputs.weights[1].shape[1] == hidden


def gradients(
    cell: str,
    grads: tuple[Some, Some, Some],  # of y [T, B, D*H], h_n and c_n
    inputs: Given,
    y: Tensor,
    along: Given,  # the gradients of the inputs' gradients
) -> tuple[list[Some], Given]:
    """The gradients of `grads` and of the inputs. Nothing here is differentiable."""
    steps, directions = _STEPS[cell], inputs.h0.shape[0]
    parts = [
        _Direction(steps, d, directions, inputs, y, along).gradients(grads)
        for d in range(directions)
    ]
    of_grads, of_inputs = zip(*parts, strict=True)
    y_grads, *of_states = zip(*of_grads, strict=True)
    x, h0, c0, weights = zip(*of_inputs, strict=True)
    return (
        [torch.cat(y_grads, 2), *map(_stacked, of_states)],
        Given(sum(x), _stacked(h0), _stacked(c0), [w for each in weights for w in each]),
    )


def _stacked(parts: tuple[Some, ...]) -> Some:
    return None if parts[0] is None else torch.stack(parts)


class _Adjoint(NamedTuple):
    """What comes back to a layer's steps, each [T, B, ...]."""

    sums: Tensor  # [T, B, Q, H]
    h: Tensor
    carry: Tensor  # where it is another than h, from later steps alone
    h0: Tensor  # [B, H]
    carry0: Some  # [B, H] where the state that goes past the products is another than h


class _Direction:
    """One direction, in the order in which its scan goes through time."""

    def __init__(
        self, steps: _Steps, d: int, directions: int, inputs: Given, y: Tensor, along: Given
    ):
        self.steps, self.turned = steps, d == 1
        hidden = y.shape[2] // directions
        self.part = slice(d * hidden, (d + 1) * hidden)
        count = len(inputs.weights) // directions
        own = slice(d * count, (d + 1) * count)
        self.w_ih, self.w_hh, b_ih, b_hh = self._in_order(inputs.weights[own])
        self.along = self._in_order(along.weights[own])
        self.has_biases = count == 4
        self.x, self.x_along = self._by_scan(inputs.x), self._by_scan(along.x)
        self.h0_along, self.c0_along = (s if s is None else s[d] for s in (along.h0, along.c0))
        y = self._by_scan(y[..., self.part])
        self.h_before = torch.cat((inputs.h0[d].unsqueeze(0), y[:-1]))
        self.sums = self._sums(
            [(self.x, self.w_ih, b_ih)], [(self.h_before, self.w_hh, b_hh)], y.shape
        )
        self.before = self.h_before if inputs.c0 is None else self._cells(inputs.c0[d])
        self._take_slopes()

    def _in_order(self, weights: list[Some]) -> list[Some]:
        """w_ih, w_hh, b_ih and b_hh, the first and third in the order of `inputs`."""
        w_ih, w_hh, b_ih, b_hh = (*weights, None, None)[:4]
        return [self._rolled(w_ih, 1), w_hh, self._rolled(b_ih, 1), b_hh]

    def _rolled(self, weight: Some, by: int) -> Some:
        """GRU's n before r and z, or by -1 after them."""
        if weight is None or self.steps.inputs == _ALL:
            return weight
        return torch.roll(weight, by * (weight.shape[0] // 3), 0)

    def _by_scan(self, sequence: Some) -> Some:
        return sequence.flip(0) if self.turned and sequence is not None else sequence

    def _sums(self, of_inputs: list[_Side], of_hidden: list[_Side], shape: torch.Size) -> Tensor:
        """[T, B, Q, H] of rows, weights and biases for the inputs' columns and for the hidden
        ones."""
        timesteps, batch, hidden = shape
        steps, both = self.steps, ((self.steps.inputs, of_inputs), (self.steps.hidden, of_hidden))
        bias = self.x.new_zeros((steps.columns, hidden))
        for columns, sides in both:
            for _, _, added in sides:
                if added is not None:
                    bias[columns] += added.view(-1, hidden)
        sums = bias.repeat(timesteps * batch, 1, 1)
        for columns, sides in both:
            into = sums[:, columns].flatten(1)
            for rows, weight, _ in sides:
                if rows is not None and weight is not None:
                    into.addmm_(rows.flatten(0, 1), weight.t())
        return sums.view(timesteps, batch, steps.columns, hidden)

    def _cells(self, c0: Tensor) -> Tensor:
        """LSTM's c before each step."""
        i, f, g, _ = self.sums.unbind(2)
        added, kept = torch.sigmoid(i).mul_(torch.tanh(g)), torch.sigmoid(f)
        before = torch.empty_like(added)
        before[0] = c0
        at = before.unbind()
        for a, k, c, new in zip(added.unbind(), kept.unbind(), at, at[1:], strict=False):
            torch.addcmul(a, k, c, out=new)
        return before

    @torch.enable_grad()
    def _take_slopes(self) -> None:
        """The derivatives of the steps, for all timesteps at once."""
        self.flat_sums = self.sums.flatten(0, 1).requires_grad_()
        self.flat_before = self.before.flatten(0, 1).detach().requires_grad_()
        carry = self.steps.carry(self.flat_sums, self.flat_before)
        by = (self.flat_sums, self.flat_before) if self.steps.goes_past else (self.flat_sums,)
        slopes = torch.autograd.grad(carry.sum(), by)
        self.carry_by_sums = slopes[0].view_as(self.sums)
        self.carry_by_before = slopes[1].view_as(self.before) if self.steps.goes_past else None
        if self.steps.output is not None:
            carry = carry.detach().requires_grad_()
            h = self.steps.output(self.flat_sums, carry)
            by_sums, by_carry = torch.autograd.grad(h.sum(), (self.flat_sums, carry))
            self.h_by_sums = by_sums.view_as(self.sums)
            self.h_by_carry = by_carry.view_as(self.before)

    def gradients(self, grads: tuple[Some, Some, Some]) -> tuple[tuple, tuple]:
        """Of y, h_n, c_n; and of x, h0, c0 and the weights of this direction."""
        d = 1 if self.turned else 0
        grad_y, grad_h_n, grad_c_n = grads
        of_h = torch.zeros_like(self.before)
        if grad_y is not None:
            of_h.copy_(self._by_scan(grad_y[..., self.part]))
        if grad_h_n is not None:
            of_h[-1] += grad_h_n[d]
        first = self._scan_back(of_h, None if grad_c_n is None else grad_c_n[d])
        tangent_sums, tangent_h, tangent_c = self._scan_tangents()
        of_sums, of_before = self._second_derivatives(first, tangent_sums, tangent_h, tangent_c)

        inputs, hidden = self.steps.inputs, self.steps.hidden
        w_ih_along, w_hh_along, _, _ = self.along
        first_inputs, first_hidden = (first.sums[:, :, s].flatten(2) for s in (inputs, hidden))
        # What reaches the states before each step but by the sums.
        to_h = torch.zeros_like(self.before)
        if w_hh_along is not None:
            to_h += first_hidden @ w_hh_along
        if self.steps.output is None and of_before is not None:
            to_h += of_before
        of_c = None if self.steps.output is None else of_before
        second = self._scan_back(
            _earlier(to_h),
            None,
            None if of_c is None else _earlier(of_c).unbind(),
            of_sums.unbind(),
        )
        second_inputs, second_hidden = (second.sums[:, :, s].flatten(2) for s in (inputs, hidden))

        x = second_inputs @ self.w_ih
        if w_ih_along is not None:
            x += first_inputs @ w_ih_along
        w_ih = _product(second_inputs, self.x)
        if self.x_along is not None:
            w_ih += _product(first_inputs, self.x_along)
        h_along = _later(tangent_h, self.h0_along)
        w_hh = _product(second_hidden, self.h_before) + _product(first_hidden, h_along)
        weights = [self._rolled(w_ih, -1), w_hh]
        if self.has_biases:
            b_ih, b_hh = second_inputs.sum((0, 1)), second_hidden.sum((0, 1))
            weights += [self._rolled(b_ih, -1), b_hh]
        h0 = second.h0 + to_h[0]
        c0 = None if of_c is None else second.carry0 + of_c[0]
        c_n = None if tangent_c is None else tangent_c[-1]
        return (
            (self._by_scan(tangent_h), tangent_h[-1], c_n),
            (self._by_scan(x), h0, c0, weights),
        )

    def _scan_back(
        self,
        of_h: Tensor,
        of_c_n: Some,
        of_carry: Sequence[Tensor] | None = None,
        of_sums: Sequence[Tensor] | None = None,
    ) -> _Adjoint:
        """From the gradients of all h, of the last c, of each c and of all sums."""
        has_output = self.steps.output is not None
        sums, h = torch.empty_like(self.sums), torch.empty_like(self.before)
        carry = torch.empty_like(h) if has_output else h
        # A list of views costs less than as many pieces taken one after the other.
        given, hidden = of_h.unbind(), sums[:, :, self.steps.hidden].flatten(2).unbind()
        sums_at, h_at, carry_at = sums.unbind(), h.unbind(), carry.unbind()
        by_sums = self.carry_by_sums.unbind()
        past = None if self.carry_by_before is None else self.carry_by_before.unbind()
        if has_output:
            h_by_sums, h_by_carry = self.h_by_sums.unbind(), self.h_by_carry.unbind()
        last = len(h_at) - 1
        whole = None  # the gradient of the carry of the step after
        for t in range(last, -1, -1):
            if t < last:
                torch.addmm(given[t], hidden[t + 1], self.w_hh, out=h_at[t])
            else:
                h_at[t].copy_(given[t])
            if has_output:
                if t < last:
                    torch.mul(past[t + 1], whole, out=carry_at[t])
                elif of_c_n is None:
                    carry_at[t].zero_()
                else:
                    carry_at[t].copy_(of_c_n)
                if of_carry is not None:
                    carry_at[t].add_(of_carry[t])
                whole = torch.addcmul(carry_at[t], h_by_carry[t], h_at[t])
            else:
                if past is not None and t < last:
                    h_at[t].addcmul_(past[t + 1], whole)
                whole = h_at[t]
            torch.mul(by_sums[t], whole.unsqueeze(1), out=sums_at[t])
            if has_output:
                sums_at[t].addcmul_(h_by_sums[t], h_at[t].unsqueeze(1))
            if of_sums is not None:
                sums_at[t].add_(of_sums[t])
        h0 = hidden[0] @ self.w_hh
        past_first = None if past is None else past[0] * whole
        if past_first is not None and not has_output:
            h0 += past_first
        return _Adjoint(sums, h, carry, h0, past_first if has_output else None)

    def _scan_tangents(self) -> tuple[Tensor, Tensor, Some]:
        """Of the sums, h and c of each step."""
        has_output = self.steps.output is not None
        w_ih, w_hh, b_ih, b_hh = self.along
        sums = self._sums(
            [(self.x, w_ih, b_ih), (self.x_along, self.w_ih, None)],
            [(self.h_before, w_hh, b_hh)],
            self.before.shape,
        )
        carry = torch.empty_like(self.before)
        h = torch.empty_like(carry) if has_output else carry
        w_hh, hidden = self.w_hh.t(), sums[:, :, self.steps.hidden].flatten(2).unbind()
        sums_at, h_at, carry_at = sums.unbind(), h.unbind(), carry.unbind()
        by_sums = self.carry_by_sums.unbind()
        past = None if self.carry_by_before is None else self.carry_by_before.unbind()
        if has_output:
            h_by_sums, h_by_carry = self.h_by_sums.unbind(), self.h_by_carry.unbind()
        h_before, before = self.h0_along, self.c0_along if has_output else self.h0_along
        for t in range(len(h_at)):
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

    def _weighted_sum(self, by: Tensor, sums: Tensor, into: Tensor) -> None:
        """Of the columns."""
        if self.steps.columns == 1:
            torch.mul(by[:, 0], sums[:, 0], out=into)
        else:
            torch.sum(by * sums, 1, out=into)

    @torch.enable_grad()
    def _second_derivatives(
        self, first: _Adjoint, tangent_sums: Tensor, tangent_h: Tensor, tangent_c: Some
    ) -> tuple[Tensor, Some]:
        """The gradients of sums and of the states past the products, of the steps' tangents times
        what comes back to the steps."""
        by = (self.flat_sums, self.flat_before) if self.steps.goes_past else (self.flat_sums,)
        carry = self.steps.carry(self.flat_sums, self.flat_before)
        if self.steps.output is None:
            outputs, weights = (carry,), (first.h.flatten(0, 1),)
            tangent_before = _later(tangent_h, self.h0_along)
        else:
            outputs = self.steps.output(self.flat_sums, carry), carry
            weights = first.h.flatten(0, 1), first.carry.flatten(0, 1)
            tangent_before = _later(tangent_c, self.c0_along)
        slopes = torch.autograd.grad(outputs, by, weights, create_graph=True)
        tangents = (tangent_sums.flatten(0, 1), tangent_before.flatten(0, 1))[: len(by)]
        # Where they are constant, as relu's, they have none.
        bent = [(s, t) for s, t in zip(slopes, tangents, strict=True) if s.requires_grad]
        found = [torch.zeros_like(b) for b in by]
        if bent:
            found = torch.autograd.grad(
                [s for s, _ in bent], by, [t for _, t in bent], materialize_grads=True
            )
        of_before = found[1].view_as(self.before) if self.steps.goes_past else None
        return found[0].view_as(self.sums), of_before


def _earlier(sequence: Tensor) -> Tensor:
    """What reaches the state before each step, at the step that gave it."""
    return torch.cat((sequence[1:], torch.zeros_like(sequence[:1])))


def _later(sequence: Tensor, initial: Some) -> Tensor:
    """The states before each step, of those after."""
    first = torch.zeros_like(sequence[:1]) if initial is None else initial.unsqueeze(0)
    return torch.cat((first, sequence[:-1]))


def _product(grads: Tensor, rows: Tensor) -> Tensor:
    """Of all timesteps and rows: [K, M] from [T, B, K] and [T, B, M]."""
    return grads.flatten(0, 1).t() @ rows.flatten(0, 1)

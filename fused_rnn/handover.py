"""float64 on the CPU by torch's own layers and cells, where nothing of ours is faster.

No kernel of ours takes float64. The reference backend does, with a loop in Python: the operations
are those of torch's loop in C++, so what is small takes up to six times as long. It remains the way
of everything that torch.nn does not have, of wide layers, and of gradients over more than a few
timesteps, which it computes itself instead of recording each operation. A single timestep is
torch's, however wide.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cells import Cell, weight_shapes
from .problem import Problem, wants_gradients

# Of a timestep, rows times units: from here on the reference is as fast, where there are several.
_FEW = 1 << 13
# With gradients, timesteps. Time of torch's layer over the reference's, forward and backward, of
# RNN and GRU: one timestep 0.3 and 0.35, 4 0.5 and 0.6, 12 0.7 and 1.0, 16 0.8 and 1.1.
_FEW_STEPS = 12


def is_of(problem: Problem) -> bool:
    """Whether a call of a module that asks for such a layer would come here."""
    beyond = problem.packed or problem.lengths or problem.resets or problem.states
    plain = not (beyond or problem.extras)
    small = problem.timesteps == 1 or problem.batch_size * problem.hidden_size < _FEW
    if problem.training:
        small = small and problem.timesteps <= _FEW_STEPS
    kind = problem.dtype is torch.float64 and problem.device_type == "cpu"
    return plain and small and kind and problem.cell.in_torch


def layers(
    cell: Cell,
    input: Tensor,
    weights: list[Tensor],  # as in `functional`
    h0: Tensor | None,
    c0: Tensor | None,
    num_layers: int,
    directions: int,
    time_first: bool,
) -> list[Tensor]:
    """y, h_n and c_n of plain tensors; nothing where the call is not for torch, which would object
    to some arguments and broadcast others."""
    if not cell.in_torch or input.dim() not in (2, 3) or num_layers < 1:
        return []
    batched, batch_dim = input.dim() == 3, 1 if time_first else 0
    if not batched:
        input = input.unsqueeze(batch_dim)
        h0, c0 = (None if s is None else s.unsqueeze(1) for s in (h0, c0))
    batch = num_layers * directions, input.shape[batch_dim]
    if input.shape[1 - batch_dim] > _FEW_STEPS and wants_gradients(input, h0, c0, *weights):
        return []
    wide = input.shape[1 - batch_dim] == 1
    states = _states(cell, input, weights, (h0, c0), batch, num_layers, directions, wide)
    if states is None:
        return []
    outputs = getattr(torch._VF, cell.name)(
        input,
        states if cell.has_c else states[0],
        weights,
        len(weights) >= 4 * num_layers * directions,
        num_layers,
        0.0,  # dropout
        False,  # which only dropout asks for
        directions == 2,
        not time_first,
    )
    if batched:
        return list(outputs)
    y, *finals = outputs
    return [y.squeeze(batch_dim), *(final.squeeze(1) for final in finals)]


def step(
    cell: Cell,
    input: Tensor,
    weights: list[Tensor],
    h0: Tensor | None,
    c0: Tensor | None,
    hidden_size: int,
) -> list[Tensor]:
    """h and c of a cell module's call. As `layers` otherwise."""
    if input.dim() not in (1, 2):
        return []
    batched = input.dim() == 2
    if not batched:
        input, h0, c0 = (None if s is None else s.unsqueeze(0) for s in (input, h0, c0))
    states = _states(cell, input, weights, (h0, c0), (input.shape[0],), 1, 1, True)
    if states is None or weights[1].shape[1] != hidden_size:
        return []
    function = getattr(torch._VF, f"{cell.name}_cell")
    outputs = function(input, states if cell.has_c else states[0], *weights)
    outputs = outputs if cell.has_c else (outputs,)
    return [output if batched else output.squeeze(0) for output in outputs]


def _states(
    cell: Cell,
    input: Tensor,
    weights: list[Tensor],
    given: tuple[Tensor | None, Tensor | None],
    batch: tuple[int, ...],  # the shape of states but for their width
    num_layers: int,
    directions: int,
    wide: bool,  # whether there may be any number of rows and units
) -> list[Tensor] | None:
    """The initial states, or None where the arguments are not torch's, or do not fit each other."""
    if len(weights) < 2 or weights[0].dim() != 2 or weights[1].dim() != 2:
        return None
    hidden, output = weights[0].shape[0] // cell.gates, weights[1].shape[1]
    biased = len(weights) >= 4 * num_layers * directions
    sizes = input.shape[-1], hidden, output, num_layers, directions, biased
    if input.numel() == 0 or hidden == 0 or not (wide or batch[-1] * hidden < _FEW):
        return None
    if [w.shape for w in weights] != weight_shapes(cell, *sizes):
        return None
    shapes = [(*batch, output), (*batch, hidden)][: 1 + cell.has_c]
    states = [state for state in given if state is not None]
    if given[0] is None:
        states += [input.new_zeros(shape) for shape in shapes[len(states) :]]
    if [state.shape for state in states] != shapes or not _are_alike([input, *weights, *states]):
        return None
    return states


def _are_alike(tensors: list[Tensor]) -> bool:
    return all(t.dtype is torch.float64 and t.is_cpu and t.layout is torch.strided for t in tensors)

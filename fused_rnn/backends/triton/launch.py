"""From a layer's tensors to launches of the kernels in `scan.py`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator

import torch
import triton
from torch import Tensor

from ...cells import DirectionWeights
from ...problem import LayerInputs, Masks, Noise, Problem, Rows
from ...transfer import sent
from ..base import aligned, allocate_output, hidden_bias
from ..bundles import LayerOutput, OutputGrads, ScanGrads
from . import scan
from .cells import FUNCTIONS
from .plan import PassPlan, Plan, products_of_step


class RefusedLaunchError(RuntimeError):
    """The driver does not let all programs of a launch run at once; nothing has run."""


INTERPRETED = not isinstance(scan.scan_forward, triton.JITFunction)


def forward(
    problem: Problem,
    plan: Plan,
    precision: str,
    gx: Tensor,  # [D, N, G*H]
    inputs: LayerInputs,
    save: bool,
) -> LayerOutput:
    _, weights, h0, c0, rows = inputs
    cell = problem.cell
    out = allocate_output(problem, gx, save)
    h = h0.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    c = None
    if cell.has_c:
        c = c0.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    arguments = {
        "gx": gx,
        "w": stacked([w.w_hh for w in weights]),
        "b_hn": hidden_bias(problem.cell, weights),
        "peephole": _peepholes(weights),
        "h0": aligned(h0),
        **row_arguments(problem, rows, gx.device),
        "y": out.y,
        "h": h,
        "c": c,
        "gates": out.gates if save and cell.saved_gates else None,
        "cells": out.cells if problem.keeps_cells(save) else None,
        **_between_products(problem, plan.forward, gx),
    }
    constants = {
        "CELL": FUNCTIONS[cell.name].forward,
        "G": cell.gates,
        "S": cell.saved_gates,
        "COLUMNS": 2 if resets_before(problem) else cell.saved_gates or 1,
    }
    _run(
        scan.scan_forward, problem, plan.forward, precision, arguments, constants,
        range(problem.timesteps),
    )  # fmt: skip
    c_n = out.c_n if c is None else c.to(problem.dtype)
    return out._replace(h_n=h.to(problem.dtype), c_n=c_n)


def backward(
    problem: Problem,
    plan: Plan,
    precision: str,
    grads: OutputGrads,
    inputs: LayerInputs,
    saved: LayerOutput,
) -> ScanGrads:
    _, weights, h0, c0, rows = inputs
    cell, hidden = problem.cell, problem.hidden_size
    count = saved.y.shape[0]
    grad_gates = saved.y.new_empty((problem.directions, count, cell.grad_gates * hidden))
    grad_h = state_gradient(grads.h_n, h0)
    grad_c = state_gradient(grads.c_n, h0) if cell.has_c else None
    masks = rows.masks or Masks()
    grad_reset_h = None if masks.reset_h is None else torch.zeros_like(grad_h)
    grad_reset_c = None if masks.reset_c is None else torch.zeros_like(grad_h)
    arguments = {
        "y": aligned(saved.y),
        "gates": saved.gates if cell.saved_gates else None,
        "cells": saved.cells if cell.has_c else None,
        "w": stacked([w.w_hh for w in weights]),
        "peephole": _peepholes(weights),
        "h0": aligned(h0),
        "c0": aligned(c0, torch.float32) if cell.has_c else None,
        "grad_y": aligned(grads.y),
        "grad_cells": aligned(grads.cells),
        **row_arguments(problem, rows, h0.device),
        "grad_gates": grad_gates,
        "grad_h": grad_h,
        "grad_c": grad_c,
        "grad_reset_h": grad_reset_h,
        "grad_reset_c": grad_reset_c,
    }
    constants = {
        "CELL": FUNCTIONS[cell.name].backward,
        "G": cell.gates,
        "S": cell.saved_gates,
        "Q": cell.grad_gates,
        "COLUMNS": 2 if resets_before(problem) else cell.grad_gates,
        # The gradients of GRU's gates face W_hh in the order n, r, z.
        "ROTATE": 0 if cell.grads_are_shared else cell.gates - 1,
    }
    _run(
        scan.scan_backward, problem, plan.backward, precision, arguments, constants,
        range(-1, problem.timesteps),
    )  # fmt: skip
    return ScanGrads(
        gates=grad_gates,
        h0=grad_h,
        c0=grad_c if cell.has_c else None,
        reset_h=grad_reset_h,
        reset_c=grad_reset_c,
    )


def _run(
    kernel: Callable,
    problem: Problem,
    plan: PassPlan,
    precision: str,
    arguments: dict,
    constants: dict,
    steps: range,
) -> None:
    """Launches a kernel for all batch tiles and `steps`, backward from the last to the first."""
    if problem.batch_size == 0:
        return
    config = plan.config
    exchange = _exchange(plan)
    constants |= {
        "D": problem.directions,
        "TILES": plan.hidden_tiles,
        "EXCHANGE": exchange,
        "RESIDENT": config.resident,
        "BLOCK_B": config.block_b,
        "BLOCK_H": config.block_h,
        "BLOCK_K": config.block_k,
        "RESET_BEFORE": resets_before(problem),
        "CHUNKS": -(-problem.hidden_size // config.block_k),
        "PRECISION": precision if problem.dtype == torch.float32 else "ieee",
        "SOFT": soft_type(problem.dtype),
    }
    device = arguments["y"].device
    counters = [None] * plan.launches
    if exchange == "grid":
        # Whole 16 bytes for each launch: another alignment would be another kernel.
        count = -(-problem.directions * plan.tiles_per_launch // 4) * 4
        counters = torch.zeros((plan.launches, count), dtype=torch.int32, device=device)
    options = {} if INTERPRETED else launch_options(config, exchange, problem.hidden_size)
    with torch.cuda.device_of(arguments["y"]):
        ranges = _ranges(steps, exchange, kernel is scan.scan_backward)
        firsts = range(0, plan.batch_tiles, plan.tiles_per_launch)
        halves = ("",)
        if exchange == "launch" and resets_before(problem):
            halves = ("first", "second")
        for (s0, s1), half in itertools.product(ranges, halves):
            for launch, first in enumerate(firsts):
                tiles = min(plan.tiles_per_launch, plan.batch_tiles - first)
                try:
                    kernel[(tiles, plan.hidden_tiles, problem.directions)](
                        **arguments,
                        counters=counters[launch],
                        s0=s0,
                        s1=s1,
                        T=problem.timesteps,
                        B=problem.batch_size,
                        N=arguments["y"].shape[0],
                        tile0=first,
                        H=problem.hidden_size,
                        HALF=half,
                        **constants,
                        **options,
                    )
                except RuntimeError as error:
                    if exchange == "grid" and _REFUSALS.search(str(error)):
                        raise RefusedLaunchError(str(error)) from error
                    raise


# What the driver calls too many programs, and a device that cannot say how many are.
_REFUSALS = re.compile("cooperative launch|operation not supported")


def _exchange(plan: PassPlan) -> str:
    """How the programs of a launch get at each other's h; see `scan.py`."""
    config = plan.config
    if config.regime == "steps":
        return "launch"
    if config.regime == "grid":
        # The interpreter runs one program after the other: nobody there could be waited for.
        return "launch" if INTERPRETED else "grid"
    return "registers" if config.block_k == config.block_h and config.resident else "program"


def resets_before(problem: Problem) -> bool:
    return products_of_step(problem) == 2


def _between_products(problem: Problem, plan: PassPlan, like: Tensor) -> dict[str, Tensor | None]:
    """What is kept from the first product of a step forward to the second."""
    shape = problem.directions, problem.batch_size, problem.hidden_size
    exchange = _exchange(plan) if resets_before(problem) else "registers"
    launches = exchange == "launch"
    return {
        "gated_h": None if exchange == "registers" else like.new_empty(shape),
        "z_state": like.new_empty(shape, dtype=torch.float32) if launches else None,
    }


def soft_type(dtype: torch.dtype) -> str:
    """The type whose arithmetic kernels do not leave to the interpreter, "" for none."""
    return "bf16" if INTERPRETED and dtype == torch.bfloat16 else ""


def launch_options(config, exchange: str, hidden_size: int) -> dict:
    """Options of Triton's launch and compiler."""
    options = {
        "num_warps": config.warps,
        # Pipelining would load h ahead of the wait; products that stream W_hh have no wait inside.
        # Triton 3.6 fails to schedule a loop of a single round.
        "num_stages": 1 if config.resident or hidden_size <= config.block_k else 3,
        # The default has changed between versions of Triton.
        "enable_fp_fusion": True,
    }
    if exchange == "grid":
        options["launch_cooperative_grid"] = True
    return options


def _ranges(steps: range, exchange: str, backwards: bool) -> Iterator[tuple[int, int]]:
    if exchange != "launch":
        yield steps.start, steps.stop
        return
    for s in reversed(steps) if backwards else steps:
        yield s, s + 1


def row_arguments(problem: Problem, rows: Rows, device: torch.device) -> dict[str, Tensor | None]:
    """How rows lie in memory and where they end or restart."""
    offsets = None
    if rows.packed:
        ends = torch.cumsum(rows.batch_sizes_tensor, 0)
        offsets = sent(torch.cat((ends.new_zeros(1), ends)), device, "batch_sizes")
    masks = rows.masks or Masks()
    return {
        "offsets": offsets,
        "lengths": aligned(masks.lengths, torch.int64),
        "resets": _bytes(masks.resets),
        "reset_h": aligned(masks.reset_h, problem.dtype),
        "reset_c": aligned(masks.reset_c, torch.float32),
        **_noise_arguments(rows.noise, problem.cell.has_c),
    }


def _noise_arguments(noise: Noise, has_c: bool) -> dict[str, Tensor | float | None]:
    """What recurrent dropout and zoneout do."""
    return {
        "h_factor": aligned(noise.h_factor, torch.float32),
        "kept_h": _bytes(noise.kept_h),
        "kept_c": _bytes(noise.kept_c),
        "part_h": noise.part_h if noise.averaged else None,
        "part_c": noise.part_c if noise.averaged and has_c else None,
    }


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else aligned(mask).view(torch.uint8)


def _peepholes(weights: list[DirectionWeights]) -> Tensor | None:
    """float32 [D, 3*H]"""
    if weights[0].peephole is None:
        return None
    return stacked([w.peephole.to(torch.float32) for w in weights])


def stacked(tensors: list[Tensor]) -> Tensor:
    """[D, ...] contiguous, without a copy where there is one direction."""
    return torch.stack(tensors) if len(tensors) > 1 else aligned(tensors[0]).unsqueeze(0)


def state_gradient(grad: Tensor | None, like: Tensor) -> Tensor:
    """[D, B, H] float32 in memory of its own: the gradient of the last state, zero for None."""
    if grad is None:
        return torch.zeros(like.shape, dtype=torch.float32, device=like.device)
    return grad.to(torch.float32, copy=True, memory_format=torch.contiguous_format)

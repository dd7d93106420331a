"""Long sequences: up to 100,000 steps forward and backward, and what they cost.

First the simple RNN at T = 1,000, 10,000 and 100,000, in three forms: eager, compiled
(torch.compile) and exported (torch.export, with a T that may change). All must give the same
outputs and gradients, finite, with the same types and shapes.

Then three ways to spend less memory on the longest sequence, in three layers of `--cell`, beside
the plain way; the peak of each is measured in a process of its own:

- `recompute=True`: the layers keep their outputs and compute the gates again in backward, one layer
  at a time. Gradients are the same;
- pieces under `torch.utils.checkpoint`: only the state at the start of each piece is kept, and the
  piece runs again in backward. Gradients are the same;
- truncated backpropagation, `fused_rnn.tbptt`: each piece's gradient is taken at once and stops at
  the piece's start. Gradients differ by what would have come across the boundaries: little, in
  layers that forget in some dozens of steps.
"""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import common
import fused_rnn

SIZE = 32
STACK = 3  # layers, where memory is measured
PIECE = 1000


def make_layer(args) -> fused_rnn.RNN:
    layer = fused_rnn.RNN(SIZE, SIZE).to(args.device)
    with torch.no_grad():
        nn.init.orthogonal_(layer.weight_hh_l0).mul_(0.9)
    return layer


def gradients(run: Callable[[Tensor], Tensor], layer: nn.Module, x: Tensor) -> tuple:
    """The output of `run`, and the gradients of its mean square for x and every parameter."""
    x = x.clone().requires_grad_()
    y = run(x)
    grads = torch.autograd.grad(y.square().mean(), [x, *layer.parameters()])
    return y.detach(), *grads


def plain(layer: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """The gradients of the mean square of the outputs for every parameter."""
    return torch.autograd.grad(layer(x)[0].square().mean(), list(layer.parameters()))


def in_pieces(layer: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """The same gradients, saving for backward one piece at a time."""

    def run(piece: Tensor, state) -> tuple:
        y, state = layer(piece, state)
        return y.square().sum(), state

    zeros = x.new_zeros(layer.num_layers, x.shape[1], SIZE)
    state = (zeros, zeros) if isinstance(layer, fused_rnn.LSTM) else zeros
    total = 0.0
    for piece in x.split(PIECE):
        part, state = checkpoint(run, piece, state, use_reentrant=False)
        total = total + part
    return torch.autograd.grad(total / x.numel(), list(layer.parameters()))


def truncated(layer: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """As `plain`, with each piece's gradient stopping where the piece starts."""
    layer.zero_grad()
    for y, _ in fused_rnn.tbptt(layer, x, window=PIECE):
        (y.square().sum() / x.numel()).backward()
    return tuple(p.grad for p in layer.parameters())


# The ways to train on a long sequence: what runs, and the layer's options.
WAYS = {
    "plain": (plain, {}),
    "recompute=True": (plain, {"recompute": True}),
    "in pieces": (in_pieces, {}),
    "truncated": (truncated, {}),
}


def relative_difference(results, expected) -> float:
    """The largest over all tensors; infinite where shape, type or finiteness differ."""
    largest = 0.0
    for got, want in zip(results, expected, strict=True):
        if got.shape != want.shape or got.dtype != want.dtype or not got.isfinite().all():
            return float("inf")
        largest = max(largest, ((got - want).norm() / want.norm()).item())
    return largest


def highest(device: torch.device) -> float:
    """MiB that this process has had at most so far; not a number where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(li.split()[1]) / 2**10 for li in lines if li.startswith("VmHWM:")), math.nan)


def peak(way: str, cell: str, length: int, device: torch.device, threads: int) -> float:
    """By how many MiB memory rises at most; called in a process that has done nothing else.

    What another way had taken and given back would be there for this one, and hide what it needs.
    """
    torch.set_num_threads(threads)
    run, options = WAYS[way]
    layer = common.LAYERS[cell](SIZE, SIZE, STACK, **options).to(device)
    x = torch.randn(length, 4, SIZE, device=device)
    run(layer, x[: 2 * PIECE])  # what a process needs once
    before = highest(device)
    run(layer, x)
    return highest(device) - before


def peaks(args) -> dict[str, float]:
    """The peak of each way, each measured in a fresh process."""
    fresh = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1)
    rest = (args.cell, args.steps, args.device, torch.get_num_threads())
    with fresh:
        return {way: fresh.submit(peak, way, *rest).result() for way in WAYS}


def main(argv: list[str] | None = None) -> int:
    parser = common.Parser(
        __doc__, cell="lstm", steps=(100_000, 4000), steps_help="timesteps of the longest sequence"
    )
    args = parser.parse(argv)
    layer = make_layer(args)
    lengths = [n for n in (1000, 10_000, 100_000) if n < args.steps] + [args.steps]
    compiled = torch.compile(layer, dynamic=True)
    example = torch.randn(8, 4, SIZE, device=args.device)
    shapes = ({0: torch.export.Dim("T", min=2)},)
    exported = torch.export.export(layer, (example,), dynamic_shapes=shapes).module()
    table = common.Table("timesteps", "form", "seconds", "difference from eager")
    apart = 0.0
    gradients(lambda x: compiled(x)[0], layer, example)  # compiles, which is not timed
    for length in lengths:
        x = torch.randn(length, 4, SIZE, device=args.device)
        expected = None
        for name, form in (("eager", layer), ("compiled", compiled), ("exported", exported)):
            start = time.perf_counter()
            results = gradients(lambda x, form=form: form(x)[0], layer, x)
            seconds = time.perf_counter() - start
            expected = results if expected is None else expected
            difference = relative_difference(results, expected)
            apart = max(apart, difference)
            table.add_row(f"{length:,}", name, f"{seconds:.3f}", f"{difference:.1e}")
    common.console.print(table)

    layers = {
        way: common.LAYERS[args.cell](SIZE, SIZE, STACK, **options).to(args.device)
        for way, (_, options) in WAYS.items()
    }
    for layer in layers.values():
        layer.load_state_dict(layers["plain"].state_dict())
    title = f"{STACK} layers of {args.cell}, {len(x):,} timesteps"
    table = common.Table("", "peak, MiB", "difference of gradients", title=title)
    differences, measured = {}, peaks(args)
    expected = plain(layers["plain"], x)
    for name, (way, _) in WAYS.items():
        differences[name] = relative_difference(way(layers[name], x), expected)
        table.add_row(name, f"{measured[name]:.0f}", f"{differences[name]:.1e}")
    common.console.print(table)
    results = [
        common.Result(
            f"{name}: largest relative difference", value, 0.0, "equal", goal,
            higher_is_better=False,
        )
        for name, value, goal in (
            ("eager, compiled and exported", apart, 1e-4),
            ("recompute=True", differences["recompute=True"], 1e-4),
            ("in pieces", differences["in pieces"], 1e-4),
            (f"truncated after {PIECE} steps", differences["truncated"], 0.1),
        )
    ]  # fmt: skip
    if not args.small and math.isfinite(measured["plain"]):
        results += [
            common.Result(
                f"{way}: peak of memory, MiB", measured[way], measured["plain"], "plain",
                goal=part * measured["plain"], higher_is_better=False,
            )
            for way, part in (("recompute=True", 0.9), ("in pieces", 0.75), ("truncated", 0.25))
        ]  # fmt: skip
    return common.report(args, "long_sequences", results)


if __name__ == "__main__":
    raise SystemExit(main())

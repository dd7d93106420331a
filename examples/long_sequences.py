"""Long sequences: up to 100,000 steps forward and backward, and what they cost.

First the simple RNN at T = 1,000, 10,000 and 100,000, in three forms: eager, compiled
(torch.compile) and exported (torch.export, with a T that may change). All must give the same
outputs and gradients, finite, with the same types and shapes.

Then three ways to spend less memory on the longest sequence with `--cell`, each beside the peak of
the plain way:

- `recompute=True`: the layer keeps its output and computes the gates again in backward. Gradients
  are the same;
- pieces under `torch.utils.checkpoint`: only the state at the start of each piece is kept, and the
  piece runs again in backward. Gradients are the same;
- truncated backpropagation: each piece's gradient is taken at once and stops at the piece's start.
  Gradients differ by what would have come across the boundaries: little, in layers that forget in
  some dozens of steps.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import common
import fused_rnn

SIZE = 32
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


def initial(layer: nn.Module, x: Tensor):
    zeros = x.new_zeros(1, x.shape[1], SIZE)
    return (zeros, zeros) if isinstance(layer, fused_rnn.LSTM) else zeros


def in_pieces(layer: nn.Module, x: Tensor) -> Tensor:
    """The same outputs, saving for backward one piece at a time."""
    state, outputs = initial(layer, x), []
    for piece in x.split(PIECE):
        y, state = checkpoint(layer, piece, state, use_reentrant=False)
        outputs.append(y)
    return torch.cat(outputs)


def truncated(layer: nn.Module, x: Tensor) -> tuple:
    """As `gradients`, with each piece's gradient stopping where the piece starts."""
    state, outputs, sums = initial(layer, x), [], None
    grad_x = torch.empty_like(x)
    for number, piece in enumerate(x.split(PIECE)):
        piece = piece.clone().requires_grad_()
        y, state = layer(piece, state)
        loss = y.square().sum() / (len(x) * y[0].numel())
        grad, *grads = torch.autograd.grad(loss, [piece, *layer.parameters()])
        grad_x[number * PIECE :][: len(piece)] = grad
        sums = grads if sums is None else [a.add_(b) for a, b in zip(sums, grads, strict=True)]
        state = common.detach(state)
        outputs.append(y.detach())
    return torch.cat(outputs), grad_x, *sums


def relative_difference(results, expected) -> float:
    """The largest over all tensors; infinite where shape, type or finiteness differ."""
    largest = 0.0
    for got, want in zip(results, expected, strict=True):
        if got.shape != want.shape or got.dtype != want.dtype or not got.isfinite().all():
            return float("inf")
        largest = max(largest, ((got - want).norm() / want.norm()).item())
    return largest


def with_peak(function: Callable, device: torch.device):
    """The function's result, and by how many MiB memory rose at most while it ran."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = function()
        return result, (torch.cuda.max_memory_allocated(device) - before) / 2**20
    pages, done = Path("/proc/self/statm"), threading.Event()
    if not pages.exists():
        return function(), float("nan")

    def resident() -> int:
        return int(pages.read_text().split()[1])

    before = highest = resident()

    def watch():
        nonlocal highest
        while not done.wait(0.0005):
            highest = max(highest, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = function()
        highest = max(highest, resident())
    finally:
        done.set()
        watcher.join()
    return result, (highest - before) * 4096 / 2**20


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
    for length in lengths:
        x = torch.randn(length, 4, SIZE, device=args.device)
        expected = None
        for name, form in (("eager", layer), ("compiled", compiled), ("exported", exported)):
            if name == "compiled":
                gradients(lambda x: compiled(x)[0], layer, x)  # compiles, which is not timed
            start = time.perf_counter()
            results = gradients(lambda x, form=form: form(x)[0], layer, x)
            seconds = time.perf_counter() - start
            expected = results if expected is None else expected
            difference = relative_difference(results, expected)
            apart = max(apart, difference)
            table.add_row(f"{length:,}", name, f"{seconds:.3f}", f"{difference:.1e}")
    common.console.print(table)

    layer = common.LAYERS[args.cell](SIZE, SIZE).to(args.device)
    again = common.LAYERS[args.cell](SIZE, SIZE, recompute=True).to(args.device)
    again.load_state_dict(layer.state_dict())
    ways = {
        "plain": lambda: gradients(lambda x: layer(x)[0], layer, x),
        "recompute=True": lambda: gradients(lambda x: again(x)[0], again, x),
        "in pieces": lambda: gradients(lambda x: in_pieces(layer, x), layer, x),
        "truncated": lambda: truncated(layer, x),
    }
    title = f"{args.cell}, {len(x):,} timesteps"
    table = common.Table("", "peak, MiB", "difference of gradients", title=title)
    differences = {}
    expected = ways["plain"]()
    for name, way in ways.items():
        results, peak = with_peak(way, args.device)
        differences[name] = relative_difference(results, expected)
        table.add_row(name, f"{peak:.0f}", f"{differences[name]:.1e}")
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
    return common.report(args, "long_sequences", results)


if __name__ == "__main__":
    raise SystemExit(main())

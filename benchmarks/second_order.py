"""Times training with a penalty on gradients, which differentiates a layer's backward, and
differentiation in forward mode.

python benchmarks/second_order.py
python benchmarks/second_order.py --part forward
python benchmarks/second_order.py --shape 50,32,128 --cell lstm --json second_order.json

A step with a penalty is forward, the gradient of x with a graph, and backward through the square of
that; forward mode gives how the outputs move where x does, without gradients. All ways take turns:
ours, ours by plain operations as it was before November 29, 2026 and still is for layers that
fused_rnn/second_order.py refuses, and torch.nn's, whose LSTM has no forward mode. Shown are the
median of ours and the others' over it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch.autograd import forward_ad

import fused_rnn
from fused_rnn import ops

CELLS = ("RNN", "GRU", "LSTM")
SHAPES = ("20,16,32", "50,32,128", "100,16,256")
WAYS = ("ours", "plain operations", "torch.nn")


PARTS = ("penalty", "forward")


def ways(
    cell: str, t: int, b: int, h: int, part: str
) -> dict[str, Callable[[], list[torch.Tensor]]]:
    theirs = getattr(torch.nn, cell)(h, h)
    ours = fused_rnn.from_torch(theirs)
    x, along = torch.randn(t, b, h, requires_grad=True), torch.randn(t, b, h)

    def forward(module: torch.nn.Module) -> list[torch.Tensor]:
        with torch.no_grad(), forward_ad.dual_level():
            y, _ = module(forward_ad.make_dual(x.detach(), along))
            return list(forward_ad.unpack_dual(y))

    def penalty(module: torch.nn.Module) -> list[torch.Tensor]:
        y, _ = module(x)
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), [x, *module.parameters()])

    step = penalty if part == "penalty" else forward

    def by_plain_operations() -> list[torch.Tensor]:
        name = "_has_fast_second_order" if part == "penalty" else "_with_tangents"
        with mock.patch.object(ops, name, lambda *_: None):
            return step(ours)

    calls = {
        "ours": lambda: step(ours),
        "plain operations": by_plain_operations,
        "torch.nn": lambda: step(theirs),
    }
    if part == "forward" and cell == "LSTM":
        del calls["torch.nn"]
    results = [call() for call in calls.values()]
    for result in results:
        for a, e in zip(result, results[-1], strict=True):
            assert (a - e).norm() <= 1e-3 * e.norm()
    return calls


def measure(calls: dict[str, Callable], rounds: int) -> dict[str, float]:
    """The median of each way's milliseconds."""
    turns = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            turns[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(times) for name, times in turns.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--cell", action="append", choices=[c.lower() for c in CELLS], help="may be given again")
    add("--shape", action="append", help="T,B,H with I = H; may be given again")
    add("--part", choices=PARTS, default="penalty")
    add("--rounds", type=int, default=15, help="turns of each way")
    add("--threads", type=int, help="torch's own number by default")
    add("--json", type=Path, help="write what was measured to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    torch.manual_seed(0)
    what = "a step with a penalty on gradients" if args.part == "penalty" else "forward mode"
    table = Table(title=f"{what}, {torch.get_num_threads()} thread(s)")
    for column in ("cell", "T,B,H", "ours, ms", *WAYS[1:]):
        table.add_column(column, justify="right")
    rows = []
    for cell in (c for c in CELLS if not args.cell or c.lower() in args.cell):
        for shape in args.shape or SHAPES:
            sizes = tuple(map(int, shape.split(",")))
            found = measure(ways(cell, *sizes, args.part), args.rounds)
            rows.append({"cell": cell, "shape": sizes, "part": args.part, "ms": found})
            ratios = (
                f"{found[way] / found['ours']:.2f}" if way in found else "" for way in WAYS[1:]
            )
            table.add_row(cell, shape, f"{found['ours']:.2f}", *ratios)
            if args.json:
                args.json.write_text(json.dumps(rows, indent=1) + "\n")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()

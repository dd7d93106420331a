"""Times batches whose rows end early or start afresh: what a valid timestep costs more than one of
a full batch.

python benchmarks/ragged.py                              four shapes, all cells, training
python benchmarks/ragged.py --shape 128,32,256 --cell gru --part inference --json ragged.json

Lengths are uniform in 1..T, and a step is reset with probability 0.02. All ways take turns. Shown
are, from the medians, the cost per valid timestep over that of our full batch: of `lengths`, of a
PackedSequence, of `resets`, and of torch.nn's PackedSequence.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import fused_rnn

CELLS = ("RNN", "GRU", "LSTM")
SHAPES = ("50,32,64", "100,32,128", "128,32,256", "50,64,512")
WAYS = ("full", "lengths", "packed", "resets", "nn packed")


def ways(cell: str, t: int, b: int, h: int, training: bool) -> dict[str, tuple[Callable, float]]:
    """Each way as a call, and its valid timesteps."""
    theirs = getattr(torch.nn, cell)(h, h).train(training)
    ours = fused_rnn.from_torch(theirs)
    x = torch.randn(t, b, h)
    lengths = torch.randint(1, t + 1, (b,))
    resets = torch.rand(t, b) < 0.02
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    valid, full = int(lengths.sum()), t * b

    def call(run: Callable[[], tuple]) -> Callable[[], None]:
        def once() -> None:
            with torch.set_grad_enabled(training):
                output = run()[0]
                if training:
                    (output if isinstance(output, Tensor) else output.data).sum().backward()

        return once

    expected, got = theirs(packed)[0].data, ours(packed)[0].data
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    return {
        "full": (call(lambda: ours(x)), full),
        "lengths": (call(lambda: ours(x, lengths=lengths)), valid),
        "packed": (call(lambda: ours(packed)), valid),
        "resets": (call(lambda: ours(x, resets=resets)), full),
        "nn packed": (call(lambda: theirs(packed)), valid),
    }


def measure(calls: dict[str, tuple[Callable, float]], rounds: int) -> dict[str, float]:
    """The median of each way's nanoseconds per valid timestep."""
    for call, _ in calls.values():
        call()
    turns = {name: [] for name in calls}
    for _ in range(rounds):
        for name, (call, steps) in calls.items():
            start = time.perf_counter()
            call()
            turns[name].append((time.perf_counter() - start) / steps * 1e9)
    return {name: statistics.median(times) for name, times in turns.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--cell", action="append", choices=[c.lower() for c in CELLS], help="may be given again")
    add("--shape", action="append", help="T,B,H with I = H; may be given again")
    add("--part", choices=("training", "inference"), default="training")
    add("--rounds", type=int, default=15, help="turns of each way")
    add("--threads", type=int, help="torch's own number by default")
    add("--json", type=Path, help="write what was measured to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    torch.manual_seed(0)
    table = Table(title=f"{args.part}, per valid timestep, {torch.get_num_threads()} thread(s)")
    for column in ("cell", "T,B,H", "full ns", *WAYS[1:]):
        table.add_column(column, justify="right")
    rows = []
    for cell in (c for c in CELLS if not args.cell or c.lower() in args.cell):
        for shape in args.shape or SHAPES:
            sizes = tuple(map(int, shape.split(",")))
            found = measure(ways(cell, *sizes, args.part == "training"), args.rounds)
            rows.append({"cell": cell, "shape": sizes, "part": args.part, "ns": found})
            ratios = (f"{found[way] / found['full']:.2f}" for way in WAYS[1:])
            table.add_row(cell, shape, f"{found['full']:.0f}", *ratios)
            if args.json:
                args.json.write_text(json.dumps(rows, indent=1) + "\n")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()

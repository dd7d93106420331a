"""Times layers with more in their recurrence than torch.nn's: recurrent dropout, zoneout, layer
normalisation and peepholes, by the kernels and by the scan in torch operations.

python benchmarks/regularised.py                         two shapes, all cells, training
python benchmarks/regularised.py --shape 128,32,256 --cell gru --part inference --json file.json
python benchmarks/regularised.py --threads 1 --cpu-time              on a machine that is busy

Forward and backward in training, where masks are drawn; inference has zoneout's expectation, and no
recurrent dropout. All ways take turns. Shown are medians: of a plain layer's call, and of each
other call over that; in brackets how many times as long the backend `reference` takes for the same,
which for all but the plain layer is a scan in torch operations. Both are compared on one seed
first.
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

import fused_rnn

CELLS = ("RNN", "GRU", "LSTM")
HAVE = {"peepholes": ("LSTM",), "layer_norm": ("GRU", "LSTM")}  # others have all options
SHAPES = ("128,32,256", "50,64,512")
WAYS = {
    "plain": {},
    "recurrent dropout": {"recurrent_dropout": 0.2},
    "zoneout": {"zoneout": 0.1},
    "layer norm": {"layer_norm": True},
    "peepholes": {"peepholes": True},
    "all of these": {
        "recurrent_dropout": 0.2,
        "zoneout": 0.1,
        "layer_norm": True,
        "peepholes": True,
    },
}


def ways(cell: str, t: int, b: int, h: int, training: bool) -> dict[tuple[str, str], Callable]:
    """A call for each way that the cell has, and for each backend."""
    calls = {}
    x = torch.randn(t, b, h)
    for name, options in WAYS.items():
        given = options
        options = {key: value for key, value in given.items() if cell in HAVE.get(key, CELLS)}
        if given and not options:
            continue
        if name != "plain" and not training and list(options) == ["recurrent_dropout"]:
            continue
        layer = getattr(fused_rnn, cell)(h, h, **options).train(training)

        def call(backend: str, layer=layer) -> torch.Tensor:
            with torch.set_grad_enabled(training), fused_rnn.backend(backend):
                y, _ = layer(x)
                if training:
                    y.sum().backward()
            return y.detach()

        results = []
        for backend in ("cpu", "reference"):
            torch.manual_seed(0)
            results.append(call(backend))
            calls[name, backend] = lambda call=call, backend=backend: call(backend)
        # Later on a normalised LSTM is chaotic, with the gains it starts with.
        steps = 16 if options.get("layer_norm") else t
        torch.testing.assert_close(*(y[:steps] for y in results), rtol=1e-4, atol=1e-5)
    return calls


def measure(
    calls: dict[tuple[str, str], Callable], rounds: int, clock: Callable[[], float]
) -> dict[tuple[str, str], float]:
    """The median of each way's milliseconds per call."""
    turns = {way: [] for way in calls}
    for _ in range(rounds):
        for way, call in calls.items():
            start = clock()
            call()
            turns[way].append((clock() - start) * 1e3)
    return {way: statistics.median(times) for way, times in turns.items()}


def shown(found: dict[tuple[str, str], float], name: str) -> str:
    if (name, "cpu") not in found:
        return ""
    ours, theirs = found[name, "cpu"], found[name, "reference"]
    first = f"{ours:.1f} ms" if name == "plain" else f"{ours / found['plain', 'cpu']:.2f}"
    return f"{first} ({theirs / ours:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--cell", action="append", choices=[c.lower() for c in CELLS], help="may be given again")
    add("--shape", action="append", help="T,B,H with I = H; may be given again")
    add("--part", choices=("training", "inference"), default="training")
    add("--rounds", type=int, default=9, help="turns of each way")
    add("--threads", type=int, help="torch's own number by default")
    add("--cpu-time", action="store_true", help="not of the clock on the wall; for one thread")
    add("--json", type=Path, help="write what was measured to this file")
    args = parser.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter
    torch.set_num_threads(args.threads or torch.get_num_threads())
    table = Table(title=f"{args.part}, {torch.get_num_threads()} thread(s)")
    for column in ("cell", "T,B,H", *WAYS):
        table.add_column(column, justify="right")
    rows = []
    for cell in (c for c in CELLS if not args.cell or c.lower() in args.cell):
        for shape in args.shape or SHAPES:
            sizes = tuple(map(int, shape.split(",")))
            found = measure(ways(cell, *sizes, args.part == "training"), args.rounds, clock)
            ms = [{"way": way, "backend": on, "ms": taken} for (way, on), taken in found.items()]
            rows.append({"cell": cell, "shape": sizes, "part": args.part, "ms": ms})
            table.add_row(cell, shape, *(shown(found, name) for name in WAYS))
            if args.json:
                args.json.write_text(json.dumps(rows, indent=1) + "\n")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()

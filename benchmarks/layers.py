"""Times one recurrent layer of fused_rnn against torch.nn's, forward and training, on this machine.

    python benchmarks/layers.py                                  every cell, the standing shapes
    python benchmarks/layers.py --backend reference --cell gru --shape 128,32,256

Both run interleaved in one process on the same random data, and their outputs and gradients are
compared before anything is timed. The figures are medians; the ratio is torch.nn's time over
ours. The input projection and all gradients count for both.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import fused_rnn

CELLS = {"rnn": torch.nn.RNN, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}
SHAPES = ("128,1,128", "128,1,512", "128,32,256", "512,64,128", "100,64,512", "50,64,1024")
MODES = ("inference", "training")
SECONDS_PER_CASE = 4.0
LARGEST_ERROR = 1e-4  # relative; float32 and long sums, not a matter of taste


def parse_shape(text: str) -> tuple[int, int, int]:
    sizes = tuple(int(size) for size in text.split(","))
    if len(sizes) != 3 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"expected T,B,H with positive sizes, got {text!r}")
    return sizes


def run(layer: torch.nn.Module, x: torch.Tensor, cotangent: torch.Tensor, mode: str):
    """One call; returns what has to agree between providers."""
    if mode == "inference":
        with torch.inference_mode():
            return [layer(x)[0]]
    y = layer(x)[0]
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], cotangent)]


def check(expected: list[torch.Tensor], actual: list[torch.Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        error = torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b)
        if not error <= LARGEST_ERROR:
            raise SystemExit(f"results differ by {error:.1e} relative: wrong, so not timed")


def interleaved(calls: list[Callable], seconds: float) -> list[list[float]]:
    """Seconds of each call, in turns, for about `seconds` in all and at least seven turns."""
    times: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()
    while len(times[0]) < 7 or time.perf_counter() - start < seconds:
        for call, taken in zip(calls, times, strict=True):
            before = time.perf_counter()
            call()
            taken.append(time.perf_counter() - before)
    return times


def measure(cell: str, shape: tuple[int, int, int], mode: str) -> tuple[float, float, str]:
    """Median milliseconds of torch.nn and of ours, and the backend that ours used."""
    timesteps, batch, hidden = shape
    theirs = CELLS[cell](hidden, hidden)
    ours = fused_rnn.replace(copy.deepcopy(theirs))
    x = torch.randn(timesteps, batch, hidden, requires_grad=mode == "training")
    cotangent = torch.randn(timesteps, batch, hidden)
    calls = [lambda layer=layer: run(layer, x, cotangent, mode) for layer in (theirs, ours)]
    check(*(call() for call in calls))
    interleaved(calls, SECONDS_PER_CASE / 8)  # warm-up
    medians = [statistics.median(t) * 1e3 for t in interleaved(calls, SECONDS_PER_CASE)]
    return *medians, fused_rnn.explain(ours, x).backend


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cell", action="append", choices=CELLS, help="may be given again")
    parser.add_argument("--shape", action="append", type=parse_shape, help="T,B,H; again for more")
    parser.add_argument("--mode", action="append", choices=MODES, help="may be given again")
    parser.add_argument("--backend", default="auto", help="force a backend of fused_rnn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    cases = [
        (cell, shape, mode)
        for cell in args.cell or CELLS
        for shape in args.shape or map(parse_shape, SHAPES)
        for mode in args.mode or MODES
    ]
    title = f"float32, {args.threads} threads, torch {torch.__version__}; milliseconds, medians"
    table = Table(
        "cell", "T,B,I=H", "mode", "torch.nn", "fused_rnn", "ratio", "backend", title=title
    )
    with fused_rnn.backend(args.backend):
        for cell, shape, mode in track(cases, "measuring", transient=True):
            theirs, ours, backend = measure(cell, shape, mode)
            sizes = ",".join(map(str, shape))
            row = (f"{theirs:.3f}", f"{ours:.3f}", f"{theirs / ours:.2f}", backend)
            table.add_row(cell, sizes, mode, *row)
    Console().print(table)


if __name__ == "__main__":
    main()

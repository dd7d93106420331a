"""Peak memory and time of a training step on the CPU: plain, `recompute` and `tbptt`.

python benchmarks/long_sequences.py                  LSTM of 3 layers, T,B,H = 500,16,128
python benchmarks/long_sequences.py --cell gru --layers 1 --shape 4000,32,128 --window 100

Each way runs in a process of its own, which first takes a short step, so that what a process needs
once does not count. Shown is how far the memory of the process then grows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable

import torch

import fused_rnn
from harness.memory import PeakMemory

WAYS = ("torch.nn", "fused_rnn", "recompute", "tbptt", "tbptt overlapped")


def step_of(way: str, args: argparse.Namespace) -> Callable[..., None]:
    """A training step on x [T, B, H]: forward and backward, of windows where the way has them."""
    hidden, library = args.shape[2], torch.nn if way == "torch.nn" else fused_rnn
    options = {"recompute": True} if way == "recompute" else {}
    layer = getattr(library, args.cell.upper())(hidden, hidden, args.layers, **options)

    def whole(x: torch.Tensor) -> None:
        layer(x)[0].sum().backward()

    def windows(x: torch.Tensor) -> None:
        back = args.back if way == "tbptt overlapped" else args.window
        for output, _ in fused_rnn.tbptt(layer, x, window=args.window, back=back):
            output.sum().backward()

    return windows if way.startswith("tbptt") else whole


def measure(way: str, args: argparse.Namespace) -> dict[str, float | None]:
    torch.set_num_threads(args.threads)
    timesteps, batch, hidden = args.shape
    step = step_of(way, args)
    x = torch.randn(timesteps, batch, hidden)
    step(x[: 2 * args.back])
    with PeakMemory("cpu") as memory:
        start = time.perf_counter()
        step(x)
        seconds = time.perf_counter() - start
    return {"MiB": memory.mib, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--cell", choices=("rnn", "gru", "lstm"), default="lstm")
    add(
        "--shape",
        type=lambda text: tuple(map(int, text.split(","))),
        default=(500, 16, 128),
        help="T,B,H",
    )
    add("--layers", type=int, default=3)
    add("--window", type=int, default=50)
    add("--back", type=int, default=100)
    add("--threads", type=int, default=torch.get_num_threads())
    add("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.way, args)))
        return
    shape = ",".join(map(str, args.shape))
    windows = f"window {args.window}, back {args.back}"
    print(f"{args.cell}, {args.layers} layers, T,B,H = {shape}, {windows}")
    for way in WAYS:
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout)
        memory = "unknown" if found["MiB"] is None else f"{found['MiB']:.0f} MiB"
        print(f"{way:17} {memory:>10} {found['seconds']:8.2f} s")


if __name__ == "__main__":
    main()

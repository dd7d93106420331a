"""Times one timestep of a stream: a stepper, with weights in float32, in bfloat16 and of 8 bits,
and the module called with T = 1, against torch.nn.

python benchmarks/streaming.py                        H = I = 64 to 1024, all cells, batch 1
python benchmarks/streaming.py --hidden 128 --cell gru --rounds 400 --json steps.json

Every way is called some hundred times in a row and all ways take turns. Shown are microseconds per
step, the median of the turns and the least, and ratios of the medians and of the least values: on
a machine that others use too, only the second says what the code costs.
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
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
WAYS = ("stepper", "bf16 stepper", "int8 stepper", "layer", "nn layer", "nn cell")
TOLERANCES = {"bf16 stepper": 2e-2, "int8 stepper": 1e-1}
TURN_SECONDS = 2e-3


def ways(cell: str, hidden: int, batch: int) -> dict[str, Callable[[], object]]:
    """One step of each way, from the same weights and states."""
    theirs = getattr(torch.nn, cell)(hidden, hidden).eval()
    ours = fused_rnn.from_torch(theirs)
    single = getattr(torch.nn, f"{cell}Cell")(hidden, hidden).eval()
    single.load_state_dict({k.removesuffix("_l0"): v for k, v in theirs.state_dict().items()})
    step = fused_rnn.stepper(ours)
    half = fused_rnn.stepper(ours, weight_dtype=torch.bfloat16)
    quantised = fused_rnn.stepper(ours, weight_dtype=torch.int8)
    x = torch.randn(batch, hidden)
    states = tuple(torch.randn(1, batch, hidden) for _ in range(1 + (cell == "LSTM")))
    hx = states if cell == "LSTM" else states[0]
    cell_hx = tuple(s[0] for s in states) if cell == "LSTM" else states[0][0]
    sequence = x.unsqueeze(0)
    calls = {
        "stepper": lambda: step(x, hx),
        "bf16 stepper": lambda: half(x, hx),
        "int8 stepper": lambda: quantised(x, hx),
        "layer": lambda: ours(sequence, hx),
        "nn layer": lambda: theirs(sequence, hx),
        "nn cell": lambda: single(x, cell_hx),
    }
    expected = calls["nn layer"]()[0][0]
    for name, call in calls.items():
        result = call()
        got = result[0] if isinstance(result, tuple) else result
        tolerance = TOLERANCES.get(name, 1e-5)
        torch.testing.assert_close(got.view(batch, hidden), expected, rtol=1e-4, atol=tolerance)
    return calls


def measure(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Microseconds per call of every turn."""
    repeats = {}
    for name, call in calls.items():
        start = time.perf_counter()
        for _ in range(5):
            call()
        repeats[name] = max(1, int(TURN_SECONDS / ((time.perf_counter() - start) / 5)))
    turns = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()  # what another way has pushed out of the caches comes back
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            turns[name].append((time.perf_counter() - start) / repeats[name] * 1e6)
    return turns


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--cell", action="append", choices=[c.lower() for c in CELLS], help="may be given again")
    add("--hidden", action="append", type=int, help="H and I; may be given again")
    add("--batch", type=int, default=1)
    add("--rounds", type=int, default=100, help="turns of each way")
    add("--threads", type=int, default=1)
    add("--json", type=Path, help="write what was measured to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    table = Table(title=f"one step, B = {args.batch}, {args.threads} thread(s), median (least) us")
    for column in ("cell", "H", *WAYS, "layer/stepper", "cell/stepper", "weights GB/s"):
        table.add_column(column, justify="right")
    rows = []
    cells = [c for c in CELLS if not args.cell or c.lower() in args.cell]
    with torch.no_grad():
        for cell in cells:
            for hidden in args.hidden or (64, 128, 256, 512, 1024):
                turns = measure(ways(cell, hidden, args.batch), args.rounds)
                median = {name: statistics.median(t) for name, t in turns.items()}
                least = {name: min(t) for name, t in turns.items()}
                bandwidth = 8 * GATES[cell] * hidden**2 / least["stepper"] / 1e3
                rows.append(
                    {"cell": cell, "hidden": hidden, "median_us": median, "least_us": least}
                )
                table.add_row(
                    cell,
                    str(hidden),
                    *(f"{median[name]:.1f} ({least[name]:.1f})" for name in WAYS),
                    *(
                        f"{median[way] / median['stepper']:.1f} "
                        f"({least[way] / least['stepper']:.1f})"
                        for way in ("nn layer", "nn cell")
                    ),
                    f"{bandwidth:.0f}",
                )
                if args.json:
                    args.json.write_text(json.dumps(rows, indent=1) + "\n")
    Console(width=130).print(table)


if __name__ == "__main__":
    main()

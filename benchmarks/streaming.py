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
from collections.abc import Callable, Iterator
from itertools import product

import torch

import fused_rnn
from harness import turns

HIDDEN = (64, 128, 256, 512, 1024)
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


def lines(args: argparse.Namespace) -> Iterator[turns.Line]:
    for cell, hidden in product(turns.cells(args), args.hidden or HIDDEN):
        calls = ways(cell, hidden, args.batch)
        taken = turns.in_rounds(calls, args.rounds, turn=TURN_SECONDS)
        median = {name: s * 1e6 for name, s in turns.medians(taken).items()}
        least = {name: min(s) * 1e6 for name, s in taken.items()}
        times = (f"{median[name]:.1f} ({least[name]:.1f})" for name in WAYS)
        ratios = (
            f"{median[way] / median['stepper']:.1f} ({least[way] / least['stepper']:.1f})"
            for way in ("nn layer", "nn cell")
        )
        bandwidth = 8 * GATES[cell] * hidden**2 / least["stepper"] / 1e3
        found = {"cell": cell, "hidden": hidden, "median_us": median, "least_us": least}
        yield [found], [cell, str(hidden), *times, *ratios, f"{bandwidth:.0f}"]


def main() -> None:
    parser = turns.common_options(__doc__)
    add = parser.add_argument
    add("--hidden", action="append", type=int, help="H and I; may be given again")
    add("--batch", type=int, default=1)
    add("--rounds", type=int, default=100, help="turns of each way")
    add("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    title = f"one step, B = {args.batch}, {args.threads} thread(s), median (least) us"
    columns = ("cell", "H", *WAYS, "layer/stepper", "cell/stepper", "weights GB/s")
    with torch.no_grad():
        turns.show(title, columns, lines(args), args.json, width=130)


if __name__ == "__main__":
    main()

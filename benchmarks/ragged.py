"""Times batches whose rows end early or start afresh: what a valid timestep costs more than one of
a full batch.

python benchmarks/ragged.py                              four shapes, all cells, training
python benchmarks/ragged.py --shape 128,32,256 --cell gru --part inference --json ragged.json

Lengths are uniform in 1..T, and a step is reset with probability 0.02. All ways take turns. Shown
are, from the medians, the cost per valid timestep over that of our full batch: of `lengths`, of a
PackedSequence, of `resets`, and of torch.nn's PackedSequence.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import fused_rnn
from harness import turns

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


def main() -> None:
    args = turns.options(__doc__, ("training", "inference"), rounds=15).parse_args()

    def measure(cell: str, sizes: tuple[int, ...]) -> tuple[dict, list[str]]:
        calls = ways(cell, *sizes, args.part == "training")
        for call, _ in calls.values():
            call()
        taken = turns.in_rounds({way: call for way, (call, _) in calls.items()}, args.rounds)
        seconds = turns.medians(taken)
        # Per valid timestep.
        ns = {way: seconds[way] / steps * 1e9 for way, (_, steps) in calls.items()}
        ratios = (f"{ns[way] / ns['full']:.2f}" for way in WAYS[1:])
        return {"ns": ns}, [f"{ns['full']:.0f}", *ratios]

    what = f"{args.part}, per valid timestep"
    turns.tabulate(args, SHAPES, what, ("full ns", *WAYS[1:]), measure)


if __name__ == "__main__":
    main()

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

import time
from collections.abc import Callable

import torch

import fused_rnn
from harness import turns

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
        options = {key: value for key, value in given.items() if cell in HAVE.get(key, turns.CELLS)}
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


def shown(found: dict[tuple[str, str], float], name: str) -> str:
    if (name, "cpu") not in found:
        return ""
    ours, theirs = found[name, "cpu"], found[name, "reference"]
    first = f"{ours:.1f} ms" if name == "plain" else f"{ours / found['plain', 'cpu']:.2f}"
    return f"{first} ({theirs / ours:.1f})"


def main() -> None:
    parser = turns.options(__doc__, ("training", "inference"), rounds=9)
    parser.add_argument(
        "--cpu-time", action="store_true", help="not of the clock on the wall; for one thread"
    )
    args = parser.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter

    def measure(cell: str, sizes: tuple[int, ...]) -> tuple[dict, list[str]]:
        calls = ways(cell, *sizes, args.part == "training")
        seconds = turns.medians(turns.in_rounds(calls, args.rounds, clock))
        found = {way: taken * 1e3 for way, taken in seconds.items()}
        ms = [{"way": way, "backend": on, "ms": taken} for (way, on), taken in found.items()]
        return {"ms": ms}, [shown(found, name) for name in WAYS]

    turns.tabulate(args, SHAPES, args.part, WAYS, measure)


if __name__ == "__main__":
    main()

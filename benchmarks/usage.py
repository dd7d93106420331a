"""Times small layers and cells in the ways they are called, ours and torch.nn's.

python benchmarks/usage.py                               all ways, all cells, both parts
python benchmarks/usage.py --way "batch first" --cell gru --shape 24,1024,8,64 --json usage.json

A small layer takes tens of microseconds, and so does what a call has to look at before it: input
whose rows do not lie in the order of time, states that are expanded, weights that are computed, a
loop over a cell. All ways take turns. Shown is how many times as long torch.nn takes, from medians.
Both are compared first.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.markup import escape
from torch import Tensor
from torch.nn.utils.parametrizations import weight_norm

import fused_rnn
from fused_rnn.bench import in_turns
from harness import turns

PARTS = ("inference", "training")
SHAPE = "20,16,16,32"


def states(cell: str, h: Tensor) -> Any:
    return (h, h) if cell == "LSTM" else h


def loop(cell: torch.nn.RNNCellBase, steps: tuple[Tensor, ...]) -> tuple[Tensor]:
    state, outputs = None, []
    for x in steps:
        state = cell(x, state)
        outputs.append(state[0] if isinstance(state, tuple) else state)
    return (torch.stack(outputs),)


# Each makes the options of a module and the call of one.
WAYS: dict[str, Callable[[str, int, int, int, int], tuple[dict[str, Any], Callable]]] = {}


def way(name: str) -> Callable:
    def add(make: Callable) -> Callable:
        WAYS[name] = make
        return make

    return add


@way("weight_norm")
@way("time first")
def _(cell, t, b, i, h):
    x = torch.randn(t, b, i)
    return {}, lambda module: module(x)


@way("batch first")
def _(cell, t, b, i, h):
    x = torch.randn(b, t, i)
    return {"batch_first": True}, lambda module: module(x)


@way("transposed")
def _(cell, t, b, i, h):
    x = torch.randn(b, t, i).transpose(0, 1)
    return {}, lambda module: module(x)


@way("one sequence")
def _(cell, t, b, i, h):
    x = torch.randn(t, i)
    return {}, lambda module: module(x)


@way("one timestep")
def _(cell, t, b, i, h):
    x, hx = torch.randn(1, b, i), states(cell, torch.randn(1, b, h))
    return {}, lambda module: module(x, hx)


@way("state expanded")
def _(cell, t, b, i, h):
    x, hx = torch.randn(t, b, i), states(cell, torch.randn(1, 1, h).expand(1, b, h))
    return {}, lambda module: module(x, hx)


@way("cell, x[t]")
def _(cell, t, b, i, h):
    steps = torch.randn(t, b, i).unbind(0)
    return {}, lambda module: loop(module, steps)


@way("cell, x[:, t]")
def _(cell, t, b, i, h):
    steps = torch.randn(b, t, i).unbind(1)
    return {}, lambda module: loop(module, steps)


def add_types(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")

    @way(name)
    def _(cell, t, b, i, h):
        x = torch.randn(t, b, i, dtype=dtype)
        return {"dtype": dtype}, lambda module: module(x)

    @way(f"{name}, one timestep")
    def _(cell, t, b, i, h):
        x = torch.randn(1, b, i, dtype=dtype)
        return {"dtype": dtype}, lambda module: module(x)


for dtype in (torch.bfloat16, torch.float16, torch.float64):
    add_types(dtype)


@way("autocast to bfloat16")
def _(cell, t, b, i, h):
    x = torch.randn(t, b, i)

    def call(module):
        with torch.autocast("cpu", torch.bfloat16):
            return module(x)

    return {}, call


def calls(name: str, cell: str, sizes: tuple[int, ...], training: bool) -> list[Callable]:
    """torch.nn's and ours; none where torch.nn cannot, as its LSTM in float16 on some CPUs."""
    options, call = WAYS[name](cell, *sizes)
    suffix = "Cell" if name.startswith("cell") else ""
    modules = []
    for library in (torch.nn, fused_rnn):
        module = getattr(library, cell + suffix)(*sizes[2:], **options).train(training)
        if modules:
            module.load_state_dict(modules[0].state_dict())
        modules.append(module)
    if name == "weight_norm":
        for module in modules:
            weight_norm(module, "weight_hh_l0")

    def run(module: torch.nn.Module) -> Tensor:
        with torch.set_grad_enabled(training):
            y = call(module)[0]
            if training:
                module.zero_grad()
                y.sum().backward()
        return y.detach()

    ours = run(modules[1])
    try:
        theirs = run(modules[0])
    except RuntimeError as error:
        if "could not create a primitive" not in str(error):
            raise
        return []
    close = 5e-2 if "float16" in name else 1e-4
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=close, atol=close / 10)
    return [lambda module=module: run(module) for module in modules]


def lines(args: argparse.Namespace, columns: list[tuple[str, str]]) -> Iterator[turns.Line]:
    """A line for each way, with a figure for each cell and part."""
    sizes = tuple(map(int, args.shape.split(",")))
    for name in args.way or WAYS:
        rows, shown = [], []
        for cell, part in columns:
            found = calls(name, cell, sizes, part == "training")
            if not found:
                shown.append("torch.nn cannot")
                continue
            theirs, ours = (statistics.median(s) * 1e3 for s in in_turns(found, args.seconds))
            rows.append({"way": name, "cell": cell, "part": part, "nn_ms": theirs, "ms": ours})
            shown.append(f"{theirs / ours:.2f}")
        yield rows, [escape(name), *shown]


def main() -> None:
    parser = turns.common_options(__doc__)
    add = parser.add_argument
    add("--way", action="append", choices=WAYS, help="may be given again")
    add("--part", action="append", choices=PARTS, help="may be given again")
    add("--shape", default=SHAPE, help="T,B,I,H")
    add("--seconds", type=float, default=0.5, help="of each way of a cell")
    args = parser.parse_args()
    columns = [(cell, part) for part in args.part or PARTS for cell in turns.cells(args)]
    threads = torch.get_num_threads()
    title = f"torch.nn's time over ours, (T, B, I, H) = ({args.shape}), {threads} thread(s)"
    shown = ("way", *(f"{cell}, {part}" for cell, part in columns))
    turns.show(title, shown, lines(args, columns), args.json, width=110, words=1)


if __name__ == "__main__":
    main()

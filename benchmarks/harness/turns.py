"""What programs share that time some ways of doing one thing, for each cell and shape.

The ways take turns, so many rounds. `fused_rnn.bench.in_turns` goes by the clock instead.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table

CELLS = ("RNN", "GRU", "LSTM")

Way = TypeVar("Way")
# What is to be written of a case or of several, and the line of the table.
Line = tuple[list[dict[str, Any]], Sequence[str]]


def common_options(doc: str) -> argparse.ArgumentParser:
    """--cell, which `cells` reads, and --json."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--cell", action="append", choices=[c.lower() for c in CELLS], help="may be given again")
    add("--json", type=Path, help="write what was measured to this file")
    return parser


def options(doc: str, parts: Sequence[str], rounds: int) -> argparse.ArgumentParser:
    """Of a program that measures `parts[0]` unless told otherwise, and is tabulated by shapes."""
    parser = common_options(doc)
    add = parser.add_argument
    add("--shape", action="append", help="T,B,H with I = H; may be given again")
    add("--part", choices=parts, default=parts[0])
    add("--rounds", type=int, default=rounds, help="turns of each way")
    add("--threads", type=int, help="torch's own number by default")
    return parser


def cells(args: argparse.Namespace) -> list[str]:
    return [cell for cell in CELLS if not args.cell or cell.lower() in args.cell]


def in_rounds(
    calls: dict[Way, Callable[[], Any]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    turn: float = 0.0,
) -> dict[Way, list[float]]:
    """Each way's seconds per call, of every turn. A turn is one call or, where `turn` says how many
    seconds it has, as many as fit in, after one that does not count."""
    repeats = {way: _calls_within(turn, call) if turn else 1 for way, call in calls.items()}
    taken: dict[Way, list[float]] = {way: [] for way in calls}
    for _ in range(rounds):
        for way, call in calls.items():
            if turn:
                call()  # what another way has pushed out of the caches comes back
            start = clock()
            for _ in range(repeats[way]):
                call()
            taken[way].append((clock() - start) / repeats[way])
    return taken


def _calls_within(seconds: float, call: Callable[[], Any]) -> int:
    start = time.perf_counter()
    for _ in range(5):
        call()
    return max(1, int(seconds / ((time.perf_counter() - start) / 5)))


def agreeing(
    calls: dict[Way, Callable[[], Sequence[torch.Tensor]]],
    tolerance: float = 1e-4,
) -> dict[Way, Callable[[], Sequence[torch.Tensor]]]:
    """The calls, of which each has given what the last one gives, but for a part `tolerance` of
    each tensor's norm."""
    results = [call() for call in calls.values()]
    for result in results:
        for actual, expected in zip(result, results[-1], strict=True):
            assert (actual - expected).norm() <= tolerance * expected.norm()
    return calls


def medians(taken: dict[Way, list[float]]) -> dict[Way, float]:
    return {way: statistics.median(times) for way, times in taken.items()}


def beside_ours(
    calls: dict[str, Callable[[], Any]], others: Sequence[str], rounds: int
) -> tuple[dict[str, Any], list[str]]:
    """What `tabulate` wants: each way's milliseconds; those of "ours", and the others' over them,
    where there is such a way."""
    ms = {way: s * 1e3 for way, s in medians(in_rounds(calls, rounds)).items()}
    ratios = [f"{ms[way] / ms['ours']:.2f}" if way in ms else "" for way in others]
    return {"ms": ms}, [f"{ms['ours']:.2f}", *ratios]


def show(
    title: str,
    columns: Iterable[str],
    lines: Iterable[Line],
    path: Path | None,
    width: int = 120,
    words: int = 0,
) -> None:
    """Prints a table, whose first `words` columns are text and the others numbers. What was
    measured is written to `path` after every line: a program that is stopped leaves what it has."""
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < words else "right")
    written: list[dict[str, Any]] = []
    for found, line in lines:
        written += found
        table.add_row(*line)
        if path:
            path.write_text(json.dumps(written, indent=1) + "\n")
    Console(width=width).print(table)


def tabulate(
    args: argparse.Namespace,
    shapes: Iterable[str],
    what: str,
    columns: Sequence[str],
    measure: Callable[[str, tuple[int, ...]], tuple[dict[str, Any], Iterable[str]]],
) -> None:
    """Shows a line for each cell and shape. `measure`(cell, (T, B, H)) gives what is to be written
    of a case, and what is to be shown in the columns."""
    torch.set_num_threads(args.threads or torch.get_num_threads())
    torch.manual_seed(0)

    def lines() -> Iterator[Line]:
        for cell, shape in product(cells(args), args.shape or shapes):
            sizes = tuple(map(int, shape.split(",")))
            found, shown = measure(cell, sizes)
            facts = {"cell": cell, "shape": sizes, "part": args.part}
            yield [facts | found], [cell, shape, *shown]

    title = f"{what}, {torch.get_num_threads()} thread(s)"
    show(title, ("cell", "T,B,H", *columns), lines(), args.json)

"""What programs share that time some ways of doing one thing, for each cell and shape."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table

CELLS = ("RNN", "GRU", "LSTM")

Way = TypeVar("Way")


def options(doc: str, parts: Sequence[str], rounds: int) -> argparse.ArgumentParser:
    """Of a program that measures `parts[0]` unless told otherwise."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--cell", action="append", choices=[c.lower() for c in CELLS], help="may be given again")
    add("--shape", action="append", help="T,B,H with I = H; may be given again")
    add("--part", choices=parts, default=parts[0])
    add("--rounds", type=int, default=rounds, help="turns of each way")
    add("--threads", type=int, help="torch's own number by default")
    add("--json", type=Path, help="write what was measured to this file")
    return parser


def medians(
    calls: dict[Way, Callable[[], Any]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Way, float]:
    """The median of each way's seconds. All take turns."""
    turns: dict[Way, list[float]] = {way: [] for way in calls}
    for _ in range(rounds):
        for way, call in calls.items():
            start = clock()
            call()
            turns[way].append(clock() - start)
    return {way: statistics.median(times) for way, times in turns.items()}


def beside_ours(
    calls: dict[str, Callable[[], Any]], others: Sequence[str], rounds: int
) -> tuple[dict[str, Any], list[str]]:
    """What `tabulate` wants: each way's milliseconds; those of "ours", and the others' over them,
    where there is such a way."""
    ms = {way: seconds * 1e3 for way, seconds in medians(calls, rounds).items()}
    ratios = [f"{ms[way] / ms['ours']:.2f}" if way in ms else "" for way in others]
    return {"ms": ms}, [f"{ms['ours']:.2f}", *ratios]


def tabulate(
    args: argparse.Namespace,
    shapes: Iterable[str],
    what: str,
    columns: Sequence[str],
    measure: Callable[[str, tuple[int, ...]], tuple[dict[str, Any], Iterable[str]]],
) -> None:
    """Prints a table, and writes --json. `measure`(cell, (T, B, H)) gives what is to be written of
    a case, and what is to be shown in the columns."""
    torch.set_num_threads(args.threads or torch.get_num_threads())
    torch.manual_seed(0)
    table = Table(title=f"{what}, {torch.get_num_threads()} thread(s)")
    for column in ("cell", "T,B,H", *columns):
        table.add_column(column, justify="right")
    rows = []
    for cell in (c for c in CELLS if not args.cell or c.lower() in args.cell):
        for shape in args.shape or shapes:
            sizes = tuple(map(int, shape.split(",")))
            found, shown = measure(cell, sizes)
            rows.append({"cell": cell, "shape": sizes, "part": args.part, **found})
            table.add_row(cell, shape, *shown)
            if args.json:
                args.json.write_text(json.dumps(rows, indent=1) + "\n")
    Console(width=120).print(table)

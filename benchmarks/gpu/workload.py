"""Every kernel of fused_rnn once, on small shapes, results compared: what sanitizers and profilers
run.

python benchmarks/gpu/workload.py                      small shapes, every backend and cell
python benchmarks/gpu/workload.py --profile cuda lstm  one call at a telling size, between
                                                       cudaProfilerStart and cudaProfilerStop
"""

from __future__ import annotations

import argparse
import os
import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from harness.cases import GATES, Case
from harness.data import expected_results, make_data
from harness.providers import PROVIDERS, Setting
from harness.results import Row
from harness.runner import Contender, entrant_of

SHAPES = ((3, 2, 16, 16), (5, 9, 24, 40), (4, 17, 64, 128))  # T, B, I, H
EXCHANGING = (3, 18, 16, 300)  # where several programs or blocks of threads share a layer
DTYPES = ("float32", "bfloat16")
PROFILED = (64, 16, 512, 512)
NOTHING = 4  # exit status: this version has no such backend


def backends(device: str) -> list[str]:
    """Names of fused_rnn's backends for the device; on the CPU, of a dry run, those that exist."""
    wanted = ("triton", "cuda") if device == "cuda" else ("cpu", "reference")
    return [name for name in wanted if f"fused_rnn/{name}" in PROVIDERS]


def cases(small: bool):
    shapes = SHAPES[:1] if small else SHAPES
    for shape, cell, dtype, mode in product(shapes, GATES, DTYPES, ("inference", "training")):
        yield Case(cell, *shape, mode, dtype=dtype)
    for cell in GATES:
        yield Case(cell, *SHAPES[0], "training", bidirectional=True)
        yield Case(cell, *SHAPES[0], "packed")
    yield from exchanging()


def exchanging():
    for cell, dtype in product(GATES, DTYPES):
        yield Case(cell, *EXCHANGING, "training", dtype=dtype)


def prepared(case: Case, backend: str, device: str) -> Contender | Row:
    name = f"fused_rnn/{backend}"
    data = make_data(case, device)
    setting = Setting(device, torch.get_num_threads())
    return entrant_of(
        PROVIDERS[name],
        Row("workload", 0, 0, case, name),
        data,
        expected_results(case, data),
        setting,
    )


def check(device: str, small: bool) -> int:
    """Runs everything; the number of cases that were wrong or failed."""
    bad = 0
    for backend in backends(device):
        ways = [("", cases(small)), *([("steps", exchanging())] if backend == "triton" else [])]
        for regime, chosen in ways:
            os.environ["FUSED_RNN_TRITON_REGIME"] = regime
            for case in chosen:
                entrant = prepared(case, backend, device)
                of_row = isinstance(entrant, Row)
                note = entrant.note if of_row else f"error {entrant.row.error:.1e}"
                bad += note.startswith(("wrong", "failed"))
                print(f"{backend} {regime} | {case} | {note}", flush=True)
    return bad


def profile(backend: str, cell: str, device: str) -> int:
    """One training call between the profiler's marks, warmed up before."""
    sizes = PROFILED if device == "cuda" else SHAPES[0]
    dtype = "bfloat16" if device == "cuda" else "float32"
    entrant = prepared(Case(cell, *sizes, "training", dtype=dtype), backend, device)
    if isinstance(entrant, Row):
        print(f"{backend} {cell}: {entrant.note}")
        return 1
    with entrant.session.active():
        entrant.session.call()
        if device != "cuda":
            return 0
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        entrant.session.call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="the smallest shape only")
    parser.add_argument("--profile", nargs=2, metavar=("BACKEND", "CELL"))
    args = parser.parse_args(argv)
    wanted = args.profile[:1] if args.profile else backends(args.device)
    if not wanted or f"fused_rnn/{wanted[0]}" not in PROVIDERS:
        print("this version has no such backend")
        return NOTHING
    if args.profile:
        return profile(*args.profile, args.device)
    return 1 if check(args.device, args.small) else 0


if __name__ == "__main__":
    sys.exit(main())

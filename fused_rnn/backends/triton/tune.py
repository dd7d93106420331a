"""`python -m fused_rnn tune`: measures configurations on this GPU and keeps the best.

The file it writes goes before the table that comes with the package, from the next process on.
Nothing is ever tuned while a model runs.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from ...cells import CELLS, DirectionWeights
from ...environment import positive
from ...problem import LayerInputs, Problem, Rows
from ..bundles import LayerOutput, OutputGrads
from . import TritonBackend, device_facts, plan
from .plan import PASSES, Config, Device, Plan, Row

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
Timer = Callable[[Callable[[], object]], float]  # a call -> its time, in any unit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cell", nargs="+", choices=list(CELLS), default=["gru", "lstm"])
    parser.add_argument("--hidden", nargs="+", type=positive, default=[64, 128, 256, 512, 1024])
    parser.add_argument("--batch", nargs="+", type=positive, default=[16, 128])
    parser.add_argument("--dtype", nargs="+", choices=list(_DTYPES), default=["bfloat16"])
    parser.add_argument("--timesteps", type=positive, default=128)
    parser.add_argument("--tf32", action="store_true", help="float32 products in TF32")
    parser.add_argument(
        "--output", type=Path, help="instead of " + str(plan.tuning_file()).replace("%", "%%")
    )


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit status."""
    problems = [
        Problem(
            cell_name=cell,
            timesteps=arguments.timesteps,
            batch_size=batch,
            input_size=hidden,
            hidden_size=hidden,
            training=True,
            dtype=dtype,
            device_type="cuda",
        )
        for cell, hidden, batch in itertools.product(
            arguments.cell, arguments.hidden, arguments.batch
        )
        for dtype in map(_DTYPES.get, arguments.dtype)
    ]
    path = arguments.output or plan.tuning_file()
    try:
        # What cannot be read or written is not found out after all has been measured.
        if reason := TritonBackend().unsupported(problems[0]):
            print(f"tune: nothing to measure; triton: {reason}")
            return 1
        _read(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except (OSError, ValueError) as error:
        print(f"tune: nothing was measured; {error}")
        return 1
    device = device_facts(torch.cuda.current_device())
    precision = "tf32" if arguments.tf32 else "ieee"
    count = 0
    for row in tune(problems, device, precision, _gpu_time, torch.device("cuda")):
        write([row], path)  # at once: the next one may fail, or be interrupted
        count += 1
    print(f"{count} configurations in {path}" if count else "tune: nothing could be measured")
    return 0 if count else 1


def _read(path: Path) -> plan.Table:
    return plan.read_rows(path) if path.exists() else ()


def write(found: Iterable[Row], path: Path) -> None:
    """Adds rows to the table in a file, in place of those for the same problems."""
    found = list(found)
    kept = _read(path)

    def key(row: Row) -> tuple:
        return row[: Row._fields.index("config")]

    fresh = set(map(key, found))
    path.parent.mkdir(parents=True, exist_ok=True)
    # Another process, whose layers read the table, sees the old one or the new one.
    written = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        written.write_text(
            plan.dump_rows([*found, *(row for row in kept if key(row) not in fresh)])
        )
        written.replace(path)
    finally:
        written.unlink(missing_ok=True)


def tune(
    problems: Iterable[Problem],
    device: Device,
    precision: str,
    time: Timer,
    where: torch.device,
) -> Iterator[Row]:
    """The fastest configuration of each regime for both passes of each problem; tells of all."""
    for problem in problems:
        kind = plan.kind_of(problem, precision)
        cell = plan.cell_of(problem)
        print(f"{problem.cell_name} {kind} H={problem.hidden_size} B={problem.batch_size}")
        try:
            call = _Call(problem, precision, where)
        except torch.OutOfMemoryError as error:
            print(f"  {str(error)[:100]}")
            continue
        for which in PASSES:
            best: dict[str, tuple[float, Config]] = {}
            for config in candidates(problem, device, which):
                try:
                    call(config, device, which)  # compiles
                    took = time(functools.partial(call, config, device, which))
                except Exception as error:  # what a compiler may raise is not to be listed
                    print(f"  {which} {config}: {type(error).__name__}: {str(error)[:100]}")
                    continue
                print(f"  {which} {config}: {took / problem.timesteps:.3f} per step")
                best[config.regime] = min((took, config), best.get(config.regime, (took, config)))
            for _, config in best.values():
                yield Row(
                    device.family, cell, kind, which, problem.hidden_size, problem.batch_size,
                    config,
                )  # fmt: skip


def candidates(problem: Problem, device: Device, which: str) -> Iterator[Config]:
    """Every configuration worth a try that fits the device."""
    whole = plan.power_of_two(problem.hidden_size)
    for block_b, block_h, block_k, warps, resident in itertools.product(
        (16, 32), sorted({16, 32, 64, whole}), sorted({16, 32, 64, whole}), (4, 8), (True, False)
    ):
        if block_k > 64 and block_k != block_h:  # only where one product holds all of h
            continue
        if resident and block_k * 32 < problem.hidden_size:  # too many tiles to hold apart
            continue
        for regime in plan.REGIMES:
            config = Config(regime, block_b, block_h, block_k, warps, resident)
            useless = regime == "steps" and resident
            if not useless and plan.unfit(config, problem, device, which) is None:
                yield config


class _Call:
    """Both passes of a problem, on random tensors, by any configuration."""

    def __init__(self, problem: Problem, precision: str, where: torch.device):
        self.problem, self.precision = problem, precision
        cell, h, b = problem.cell, problem.hidden_size, problem.batch_size
        d, n = problem.directions, problem.timesteps * problem.batch_size

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=where).to(problem.dtype)

        scale = h**-0.5
        weights = [
            DirectionWeights(
                normal(0), normal(cell.gates * h, h) * scale, *(normal(cell.gates * h),) * 2
            )
            for _ in range(d)
        ]
        h0, c0 = normal(d, b, h), normal(d, b, h) if cell.has_c else None
        self.gx = normal(d, n, cell.gates * h)
        self.grads = OutputGrads(normal(n, d * h), None, None)
        rows = Rows(problem.timesteps, b, None, n)
        self.inputs = LayerInputs(normal(0), weights, h0, c0, rows)
        self.saved: LayerOutput | None = None

    def __call__(self, config: Config, device: Device, which: str) -> None:
        from . import launch

        placed = plan.place(config, self.problem, device, which)
        both = Plan(placed, placed)
        if which == "forward":
            # The gates may overwrite gx, so that later calls compute with other numbers.
            self.saved = launch.forward(
                self.problem, both, self.precision, self.gx, self.inputs, save=True
            )
        else:
            launch.backward(self.problem, both, self.precision, self.grads, self.inputs, self.saved)


def _gpu_time(call: Callable[[], object]) -> float:
    """Microseconds, the median of ten."""
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000)
    return statistics.median(times[2:])

"""How far float32 results of the CPU kernels, of each instruction set, and of torch.nn are from
float64's.

python benchmarks/accuracy.py
python benchmarks/accuracy.py --cell lstm --shape 32,32,512

Shown is the relative error of a whole tensor, ||result - exact|| / ||exact||, in units of float32's
epsilon (1.2e-7): of y, and of gradients for a random linear function of the outputs.
"""

from __future__ import annotations

import argparse
from contextlib import suppress

import torch
from rich.console import Console
from rich.table import Column, Table

import fused_rnn
from fused_rnn import native, testing
from fused_rnn.testing import LayerCase

SHAPES = ("32,32,128", "32,32,512", "16,64,1024")
CELLS = ("rnn_tanh", "gru", "lstm")
EPSILON = torch.finfo(torch.float32).eps
INSTRUCTION_SETS = ("amx", "avx512", "avx2", "portable")
KINDS = ("y", "grad x", "grad h0", "grad w_ih", "grad w_hh", "grad b_ih", "grad b_hh")


def instruction_sets() -> list[str]:
    """Those that this machine has; none without the CPU library."""
    if native.cpu_library_error():
        return []
    found = []
    for name in INSTRUCTION_SETS:
        with testing.cpu_capability(name), suppress(RuntimeError):
            found.append(native.cpu_capability())
    return found


def errors(case: LayerCase) -> dict[str, list[float]]:
    """By who computed it and the tensor, in epsilons."""
    exact = testing.results_of_draws(testing.run_oracle, case, dtype=torch.float64)
    results = {"torch.nn": testing.results_of_draws(testing.run_torch, case)}
    for name in instruction_sets():
        with testing.cpu_capability(name), fused_rnn.backend("cpu"):
            results[name] = testing.results_of_draws(testing.run_layer, case)
    return {
        name: [testing.relative_error(result[kind], exact[kind]) / EPSILON for kind in KINDS]
        for name, result in results.items()
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cell", choices=CELLS, action="append")
    parser.add_argument("--shape", action="append", help="T,B,H")
    options = parser.parse_args(arguments)
    table = Table(*(Column(name, no_wrap=True) for name in ("layer", "by")), *KINDS)
    for cell in options.cell or CELLS:
        for shape in options.shape or SHAPES:
            timesteps, batch, hidden = map(int, shape.split(","))
            case = LayerCase(cell, timesteps, batch, hidden, hidden)
            for name, found in errors(case).items():
                table.add_row(f"{cell} {shape}", name, *(f"{error:.1f}" for error in found))
    Console().print(table)


if __name__ == "__main__":
    main()

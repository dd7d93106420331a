"""How far float32 results of the CPU kernels, of each instruction set, and of torch.nn are from
float64's.

python benchmarks/accuracy.py
python benchmarks/accuracy.py --cell lstm --shape 32,32,512

Shown is the relative error of a whole tensor, ||result - exact|| / ||exact||, in units of float32's
epsilon (1.2e-7): of y and of the gradients for random gradients of y, the worst tensor of each
kind.
"""

from __future__ import annotations

import argparse
import os

import torch
from rich.console import Console
from rich.table import Table

from fused_rnn import native, testing
from fused_rnn.testing import LayerCase

SHAPES = ("32,32,128", "32,32,512", "16,64,1024")
CELLS = ("rnn_tanh", "gru", "lstm")
INSTRUCTION_SETS = ("amx", "avx512", "avx2", "portable")
KINDS = {"y": ("y",), "x, h0, c0": ("grad x", "grad h0", "grad c0"), "weights": ()}


def instruction_sets() -> list[str]:
    """Those that this machine has; none without the CPU library."""
    if native.cpu_library_error():
        return []
    found = []
    for name in INSTRUCTION_SETS:
        os.environ["FUSED_RNN_CPU_CAPABILITY"] = name
        try:
            found.append(native.cpu_capability())
        except RuntimeError:
            continue
        finally:
            del os.environ["FUSED_RNN_CPU_CAPABILITY"]
    return found


def errors(case: LayerCase) -> dict[str, dict[str, float]]:
    """By who computed it and the kind of tensor, in epsilons."""
    inputs = testing.make_inputs(case)
    exact = testing.run_oracle(inputs, torch.float64)
    results = {"torch.nn": testing.run_torch(inputs)}
    for name in instruction_sets():
        os.environ["FUSED_RNN_CPU_CAPABILITY"] = name
        results[name] = testing.run_layer(inputs)
        del os.environ["FUSED_RNN_CPU_CAPABILITY"]
    found = {}
    for name, result in results.items():
        of_kind = dict.fromkeys(KINDS, 0.0)
        for tensor, value in result.items():
            kind = next((k for k, names in KINDS.items() if tensor in names), None)
            if kind is None:
                if not tensor.startswith("grad "):
                    continue
                kind = "weights"
            error = (value.double() - exact[tensor]).norm() / exact[tensor].norm()
            of_kind[kind] = max(of_kind[kind], error.item() / torch.finfo(torch.float32).eps)
        found[name] = of_kind
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cell", choices=CELLS, action="append")
    parser.add_argument("--shape", action="append", help="T,B,H")
    options = parser.parse_args(arguments)
    table = Table("layer", "by", *KINDS)
    for cell in options.cell or CELLS:
        for shape in options.shape or SHAPES:
            timesteps, batch, hidden = map(int, shape.split(","))
            case = LayerCase(cell, timesteps, batch, hidden, hidden)
            for name, kinds in errors(case).items():
                table.add_row(f"{cell} {shape}", name, *(f"{e:.1f}" for e in kinds.values()))
    Console().print(table)


if __name__ == "__main__":
    main()

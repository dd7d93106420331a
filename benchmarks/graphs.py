"""Times loops over cells, and short layers, under torch.compile.

python benchmarks/graphs.py
python benchmarks/graphs.py --part inference
python benchmarks/graphs.py --shape 20,4,64 --cell lstm --json graphs.json

`training` is forward and backward, `inference` forward alone, of T timesteps of a cell in a Python
loop, as decoders and agents write it. All take turns: the loop over our cell in one graph, the same
in eager mode, and torch.nn's cell in one graph. Shown are the median of ours in a graph, and the
others' over it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch

import fused_rnn
from harness import turns

SHAPES = ("10,1,128", "10,4,64", "10,16,128", "10,32,256")
WAYS = ("ours", "ours, eager", "torch.nn")
PARTS = ("training", "inference")


class Loop(torch.nn.Module):
    """The last h of a cell over x [T, B, H]."""

    def __init__(self, cell: torch.nn.RNNCellBase) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = None
        for each in x:
            state = self.cell(each, state)
        return state[0] if isinstance(state, tuple) else state


def ways(cell: str, t: int, b: int, h: int, part: str) -> dict[str, Callable[[], Sequence]]:
    torch._dynamo.reset()
    theirs = Loop(getattr(torch.nn, f"{cell}Cell")(h, h))
    ours = fused_rnn.replace(copy.deepcopy(theirs))
    x = torch.randn(t, b, h)

    def call(model: torch.nn.Module, parameters: list) -> Callable[[], Sequence[torch.Tensor]]:
        def train() -> Sequence[torch.Tensor]:
            return torch.autograd.grad(model(x).square().sum(), parameters)

        def infer() -> Sequence[torch.Tensor]:
            with torch.no_grad():
                return [model(x)]

        return train if part == "training" else infer

    models = torch.compile(ours), ours, torch.compile(theirs)
    owners = ours, ours, theirs
    calls = {
        way: call(model, list(owner.parameters()))
        for way, model, owner in zip(WAYS, models, owners, strict=True)
    }
    return turns.agreeing(calls)


def main() -> None:
    args = turns.options(__doc__, PARTS, rounds=41).parse_args()

    def measure(cell: str, sizes: tuple[int, ...]) -> tuple[dict, list[str]]:
        return turns.beside_ours(ways(cell, *sizes, args.part), WAYS[1:], args.rounds)

    turns.tabulate(args, SHAPES, args.part, ("ours, ms", *WAYS[1:]), measure)


if __name__ == "__main__":
    main()

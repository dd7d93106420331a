"""Times training with a penalty on gradients, which differentiates a layer's backward, and
differentiation in forward mode.

python benchmarks/second_order.py
python benchmarks/second_order.py --part forward
python benchmarks/second_order.py --shape 50,32,128 --cell lstm --json second_order.json

A step with a penalty is forward, the gradient of x with a graph, and backward through the square of
that; forward mode gives how the outputs move where x does, without gradients. All ways take turns:
ours, ours by plain operations as it was before November 29, 2026 and still is for layers that
fused_rnn/second_order.py refuses, and torch.nn's, whose LSTM has no forward mode. Shown are the
median of ours and the others' over it.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import torch
from torch.autograd import forward_ad

import fused_rnn
from fused_rnn import derivatives
from harness import turns

SHAPES = ("20,16,32", "50,32,128", "100,16,256")
WAYS = ("ours", "plain operations", "torch.nn")


PARTS = ("penalty", "forward")


def ways(
    cell: str, t: int, b: int, h: int, part: str
) -> dict[str, Callable[[], list[torch.Tensor]]]:
    theirs = getattr(torch.nn, cell)(h, h)
    ours = fused_rnn.from_torch(theirs)
    x, along = torch.randn(t, b, h, requires_grad=True), torch.randn(t, b, h)

    def forward(module: torch.nn.Module) -> list[torch.Tensor]:
        with torch.no_grad(), forward_ad.dual_level():
            y, _ = module(forward_ad.make_dual(x.detach(), along))
            return list(forward_ad.unpack_dual(y))

    def penalty(module: torch.nn.Module) -> list[torch.Tensor]:
        y, _ = module(x)
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), [x, *module.parameters()])

    step = penalty if part == "penalty" else forward

    def by_plain_operations() -> list[torch.Tensor]:
        name = "are_fast" if part == "penalty" else "with_tangents"
        with mock.patch.object(derivatives, name, lambda *_: None):
            return step(ours)

    calls = {
        "ours": lambda: step(ours),
        "plain operations": by_plain_operations,
        "torch.nn": lambda: step(theirs),
    }
    if part == "forward" and cell == "LSTM":
        del calls["torch.nn"]
    return turns.agreeing(calls, 1e-3)


def main() -> None:
    args = turns.options(__doc__, PARTS, rounds=15).parse_args()

    def measure(cell: str, sizes: tuple[int, ...]) -> tuple[dict, list[str]]:
        return turns.beside_ours(ways(cell, *sizes, args.part), WAYS[1:], args.rounds)

    what = "a step with a penalty on gradients" if args.part == "penalty" else "forward mode"
    turns.tabulate(args, SHAPES, what, ("ours, ms", *WAYS[1:]), measure)


if __name__ == "__main__":
    main()

"""Times layers inside the transforms of torch.func.

python benchmarks/transforms.py
python benchmarks/transforms.py --part ensemble
python benchmarks/transforms.py --shape 50,32,128 --cell lstm --json transforms.json

`samples` are the gradients of all parameters for each of B sequences by itself, as differential
privacy and influence functions want them, `vmap(grad)`; `ensemble` is `vmap` of B layers, each with
its own sequence, in inference. All ways take turns: ours, ours by plain operations as it was before
November 29, 2026 and still is on a GPU and for what fused_rnn/transforms.py does not take, and a
loop over torch.nn's layer, which has neither transform. Shown are the median of ours and the
others' over it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.func import functional_call, grad, stack_module_state, vmap

import fused_rnn
from harness import turns

SHAPES = ("20,16,32", "50,32,128", "100,8,256", "10,1000,16")
WAYS = ("ours", "plain operations", "torch.nn in a loop")
PARTS = ("samples", "ensemble")


def ways(cell: str, t: int, b: int, h: int, part: str) -> dict[str, Callable[[], Sequence]]:
    theirs = [getattr(torch.nn, cell)(h, h) for _ in range(b if part == "ensemble" else 1)]
    ours = fused_rnn.from_torch(theirs[0])
    x = torch.randn(b, t, 1, h)
    of_ours = {name: p.detach() for name, p in ours.named_parameters()}

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return functional_call(ours, parameters, (x,))[0].square().sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))
    stacked, _ = stack_module_state(theirs)
    members = vmap(lambda parameters, x: functional_call(ours, parameters, (x,))[0])

    def by_transforms() -> Sequence[torch.Tensor]:
        if part == "samples":
            return list(per_sample(of_ours, x).values())
        with torch.no_grad():
            return [members(stacked, x)]

    def by_plain_operations() -> Sequence[torch.Tensor]:
        with fused_rnn.backend("reference"):
            return by_transforms()

    def in_a_loop() -> Sequence[torch.Tensor]:
        if part == "ensemble":
            with torch.no_grad():
                return [torch.stack([m(x[i])[0] for i, m in enumerate(theirs)])]
        parameters = list(theirs[0].parameters())
        losses = (theirs[0](each)[0].square().sum() for each in x)
        by_sample = [torch.autograd.grad(each, parameters) for each in losses]
        return [torch.stack(grads) for grads in zip(*by_sample, strict=True)]

    calls = dict(zip(WAYS, (by_transforms, by_plain_operations, in_a_loop), strict=True))
    return turns.agreeing(calls)


def main() -> None:
    args = turns.options(__doc__, PARTS, rounds=11).parse_args()

    def measure(cell: str, sizes: tuple[int, ...]) -> tuple[dict, list[str]]:
        return turns.beside_ours(ways(cell, *sizes, args.part), WAYS[1:], args.rounds)

    what = "gradients of each sample" if args.part == "samples" else "an ensemble"
    turns.tabulate(args, SHAPES, what, ("ours, ms", *WAYS[1:]), measure)


if __name__ == "__main__":
    main()

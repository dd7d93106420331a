"""Several processes: the character model trained with DistributedDataParallel.

    torchrun --standalone --nproc-per-node 2 examples/distributed.py

Each process has a copy of the model and a part of the streams of text. After every backward pass
the gradients are averaged over all processes, so all copies take the same step: what comes out is
the training of one process with all the streams, up to rounding. Nothing about a layer of ours is
special here: its parameters are torch parameters, and its backward fires their hooks as any
other's.

After each tenth of the steps every process writes a checkpoint: with its own streams go the states
that are carried along them. `--resume`, with as many processes, goes on from there and comes out as
if never stopped; `--stop 60` stops early, to try that.

Started without torchrun it is one process. On the CPU the processes talk through gloo, on GPUs
through NCCL, one process to each GPU.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import char_lm
import common
import language_model


def join(args: argparse.Namespace) -> tuple[int, int]:
    """The number of this process, and of how many."""
    if "RANK" not in os.environ:  # not under torchrun
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    elif args.device.type == "cuda":
        args.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(args.device)
        dist.init_process_group("nccl")
    else:
        dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def largest_difference(model: torch.nn.Module) -> float:
    """Between the parameters of this process and those of the first."""
    mine = torch.cat([p.detach().flatten() for p in model.parameters()])
    first = mine.clone()
    dist.broadcast(first, 0)
    difference = (mine - first).abs().max()
    dist.all_reduce(difference, dist.ReduceOp.MAX)
    return difference.item()


def main(argv: list[str] | None = None) -> int:
    parser = common.Parser(
        __doc__, cell="lstm", steps=(500, 120), hidden=(128, 96), characters=(1_000_000, 100_000)
    )
    language_model.add_checkpoint_arguments(parser)
    args = parser.parse(argv)
    rank, count = join(args)
    try:
        checkpoint = args.out / f"distributed.{rank}-of-{count}.pt"
        language_model.expect_checkpoint(parser, args, checkpoint)
        return train(args, rank, count, checkpoint)
    finally:
        dist.destroy_process_group()


def train(args: argparse.Namespace, rank: int, count: int, checkpoint: Path) -> int:
    common.console.quiet = rank > 0
    whole, held_out = language_model.corpora(args.characters, args.device)
    mine = whole.streams[:, rank::count].contiguous()
    training = language_model.Training(args, char_lm.Corpus(whole.alphabet, mine, whole.window))
    model = training.model
    parallel = DistributedDataParallel(model)

    def step() -> float:
        training.model = parallel
        loss = training.step()
        training.model = model  # what is saved is nobody's copy
        return loss

    name = f"training in {count} processes"
    if not language_model.train(args, training, checkpoint, name, step):
        return 0

    apart = largest_difference(model)
    bits = language_model.bits_per_character(model, held_out) if rank == 0 else 0.0
    results = [
        common.Result(
            "bits per character of held-out text",
            bits, language_model.unigram_bits(whole, held_out), "unigram entropy",
            goal=3.9 if args.small else 3.0, higher_is_better=False,
        ),
        common.Result(
            f"parameters of {count} processes: largest difference", apart, 0.0, "equal",
            goal=0.0, higher_is_better=False,
        ),
    ]  # fmt: skip
    if rank > 0:
        return 0
    return common.report(args, "distributed", results)


if __name__ == "__main__":
    raise SystemExit(main())

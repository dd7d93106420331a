"""Bidirectional: what a second layer that reads backwards gives, and that it is no more than that.

First by hand: one layer reads the sequence, another reads it flipped in time, its outputs are
flipped back, and both are joined. With the weights of a bidirectional layer of ours the results are
the same numbers.

Then a task that needs the future: at each step of a series of random numbers, tell whether the sum
of the three before and the three after it is positive. Past and future count alike, so a model that
knows only the past is right in 3 of 4 cases at best: for two independent normal numbers a and b of
equal variance, a and a + b have the same sign with probability 3/4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common

REACH = 3
BEST_WITHOUT_FUTURE = 0.75


class FlippedByHand(nn.Module):
    """Two layers of one direction that together are a bidirectional one."""

    def __init__(self, bidirectional: nn.RNNBase):
        super().__init__()
        cell = type(bidirectional)
        sizes = bidirectional.input_size, bidirectional.hidden_size
        self.ahead, self.back = cell(*sizes), cell(*sizes)
        weights = bidirectional.state_dict()
        forward = {name: w for name, w in weights.items() if not name.endswith("_reverse")}
        self.ahead.load_state_dict(forward)
        self.back.load_state_dict({name: weights[f"{name}_reverse"] for name in forward})
        self.to(bidirectional.weight_ih_l0)

    def forward(self, x: Tensor) -> Tensor:
        # x: [T, B, I] -> [T, B, 2H]
        return torch.cat([self.ahead(x)[0], self.back(x.flip(0))[0].flip(0)], -1)


class Tagger(nn.Module):
    def __init__(self, cell: str, width: int, bidirectional: bool):
        super().__init__()
        self.rnn = common.LAYERS[cell](1, width, bidirectional=bidirectional)
        self.head = nn.Linear(width * (1 + bidirectional), 1)

    def forward(self, x: Tensor) -> Tensor:
        # x: [T, B] -> [T, B] scores, positive for yes
        return self.head(self.rnn(x.unsqueeze(-1))[0]).squeeze(-1)


def series(length: int, batch: int, device) -> tuple[Tensor, Tensor]:
    """Numbers [T, B] and answers [T, B], without the ends, where neighbours are missing."""
    x = torch.randn(length, batch, device=device)
    sums = torch.zeros_like(x)
    for distance in range(1, REACH + 1):
        sums += x.roll(distance, 0) + x.roll(-distance, 0)
    return x, (sums > 0).float()


def accuracy(model: Tagger, x: Tensor, answer: Tensor) -> float:
    with torch.inference_mode():
        right = (model(x) > 0) == (answer > 0.5)
    return right[REACH:-REACH].float().mean().item()


def train(args, bidirectional: bool) -> Tagger:
    torch.manual_seed(args.seed)
    model = Tagger(args.cell, args.hidden, bidirectional).to(args.device)
    trainer = common.Trainer(model, args.steps, lr=1e-2)
    steps = common.Steps(args.steps, "both directions" if bidirectional else "one direction")
    for _ in steps:
        x, answer = series(32, 64, args.device)
        inner = slice(REACH, -REACH)
        loss = F.binary_cross_entropy_with_logits(model(x)[inner], answer[inner])
        steps.note = f"loss {trainer.step(loss):.3f}"
    return model


def main(argv: list[str] | None = None) -> int:
    parser = common.Parser(__doc__, cell="gru", steps=(1500, 200), hidden=(48, 24))
    args = parser.parse(argv)
    built_in = common.LAYERS[args.cell](5, 7, bidirectional=True)
    built_in.to(device=args.device, dtype=torch.float64)
    x = torch.randn(20, 4, 5, dtype=torch.float64, device=args.device)
    difference = (FlippedByHand(built_in)(x) - built_in(x)[0]).abs().max().item()

    test = series(200, 200, args.device)
    one, both = (accuracy(train(args, bidirectional), *test) for bidirectional in (False, True))
    results = [
        common.Result(
            "flipped by hand against built in: largest difference",
            difference, 0.0, "equal", goal=1e-12, higher_is_better=False,
        ),
        common.Result(
            "accuracy of both directions",
            both, BEST_WITHOUT_FUTURE, "the best without the future",
            goal=0.85 if args.small else 0.97,
        ),
        common.Result(
            "accuracy of one direction, which cannot do better",
            one, 0.5, "guessing", goal=0.68 if args.small else 0.73,
        ),
    ]  # fmt: skip
    return common.report(args, "bidirectional", results)


if __name__ == "__main__":
    raise SystemExit(main())

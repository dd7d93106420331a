"""Online learning: a stateful GRU learns from one bit at a time.

Bits come in one by one. After each, the model says what the bit before it was, negated; then it is
told the answer, and makes one update: batch 1, one timestep, the state carried on, which a layer
made with `stateful=True` does by itself.

What makes this hard is not the memory of a single bit but who teaches it. With one step of
backpropagation the gradient stops at the carried state, so nothing ever tells the step before what
it should have kept; the read-out can only use what the state happens to hold (with four units that
is little; with 16 or more, some unit echoes the last input by chance, and all is easy). With a
window of a few steps, `tbptt(layer, bits, window=1, back=4)`, the gradient reaches the step that
saw the bit. The picture has the accuracy over the last 200 updates for windows of 1, 2 and 4 steps;
what is reported is how many updates each took to be right 95 times in 100.

A convolution over time can do without the carried state where the answer lies a fixed number of
steps back. The batch version learns from whole sequences, a layer with a 1-D convolution of width 2
on top of its states.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from fused_rnn import tbptt

WINDOWS = (1, 2, 4)
RECENT = 200


def question(bits: Tensor) -> Tensor:
    """The answers to bits [T, ...]: at each step the bit before it, negated; none at the first."""
    return 1 - bits[:-1]


class Online(nn.Module):
    """Scores of one bit after another; each has a gradient through `window` steps."""

    def __init__(self, cell: str, width: int, window: int):
        super().__init__()
        self.window = window
        # One step of backpropagation is what a stateful layer does when it is called bit by bit.
        self.rnn = common.LAYERS[cell](1, width, stateful=window == 1)
        self.head = nn.Linear(width, 1)

    def forward(self, bits: Tensor) -> Iterator[Tensor]:
        # bits: [T, 1] -> T scores [1]
        x = bits.unsqueeze(-1)
        if self.window == 1:
            outputs = (self.rnn(bit)[0] for bit in x.split(1))
        else:
            outputs = (y for y, _ in tbptt(self.rnn, x, window=1, back=self.window))
        return (self.head(y).flatten() for y in outputs)


def learn_online(args, window: int) -> list[bool]:
    """Whether each prediction was right, made before its update."""
    torch.manual_seed(args.seed)
    model = Online(args.cell, args.hidden, window).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    bits = torch.randint(2, (args.steps, 1), device=args.device).float()
    scores, right = model(bits), []
    next(scores)  # before the first bit there was none to ask about
    steps = common.Steps(args.steps - 1, f"window {window}")
    for step, answer, score in zip(steps, question(bits), scores, strict=True):
        right.append(bool((score > 0) == (answer > 0.5)))
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(score, answer).backward()
        optimizer.step()
        if step % 50 == 0:
            steps.note = f"accuracy {sum(right[-RECENT:]) / len(right[-RECENT:]):.2f}"
    return right


def recent_accuracy(right: list[bool]) -> list[float]:
    values = torch.tensor(right, dtype=torch.float32)
    return values.unfold(0, RECENT, 1).mean(1).tolist()


def updates_until(curve: list[float], level: float) -> int:
    """How many updates until the recent accuracy reaches `level`; all of them if it never does."""
    return next((n for n, value in enumerate(curve) if value >= level), len(curve)) + RECENT


class WithConvolution(nn.Module):
    def __init__(self, cell: str, width: int):
        super().__init__()
        self.rnn = common.LAYERS[cell](1, width)
        self.convolution = nn.Conv1d(width, 1, kernel_size=2)

    def forward(self, bits: Tensor) -> Tensor:
        # bits: [T, B] -> scores [T - 1, B]
        states = self.rnn(bits.unsqueeze(-1))[0]
        return self.convolution(states.permute(1, 2, 0)).squeeze(1).t()


def learn_in_batches(args) -> float:
    """Accuracy on new sequences, ten times as long as those it learned from."""
    torch.manual_seed(args.seed)
    model = WithConvolution(args.cell, 4 * args.hidden).to(args.device)
    count = max(args.steps // 20, 60)
    trainer = common.Trainer(model, count, lr=2e-2)
    for _ in common.Steps(count, "batches"):
        bits = torch.randint(2, (20, 16), device=args.device).float()
        trainer.step(F.binary_cross_entropy_with_logits(model(bits), question(bits)))
    with torch.inference_mode():
        bits = torch.randint(2, (200, 16), device=args.device).float()
        return ((model(bits) > 0) == (question(bits) > 0.5)).float().mean().item()


def draw(args, curves: dict[int, list[float]]) -> None:
    figure, axis = common.plt.subplots(figsize=(8, 4), layout="constrained")
    for window, curve in curves.items():
        axis.plot(range(RECENT, RECENT + len(curve)), curve, label=f"window of {window}")
    axis.axhline(0.5, color="grey", linestyle=":", label="guessing")
    axis.set(xlabel="updates", ylabel=f"accuracy over the last {RECENT}")
    axis.legend()
    common.save_picture(args, "online", figure)


def main(argv: list[str] | None = None) -> int:
    parser = common.Parser(
        __doc__, cell="gru", steps=(3000, 1200), hidden=(4, 4), steps_help="bits, one update each"
    )
    args = parser.parse(argv)
    if args.steps < 2 * RECENT:
        parser.error(f"argument --steps: expected at least {2 * RECENT}, got {args.steps}")
    curves = {window: recent_accuracy(learn_online(args, window)) for window in WINDOWS}
    draw(args, curves)
    for window, curve in curves.items():
        common.console.print(
            f"window of {window}: 95% after {updates_until(curve, 0.95)} updates, "
            f"{curve[-1]:.0%} at the end"
        )
    results = [
        common.Result(
            "accuracy of the last 200 predictions, window of 4", curves[4][-1],
            0.5, "guessing", goal=0.8 if args.small else 0.99,
        ),
        common.Result(
            "updates until 95%, window of 4", updates_until(curves[4], 0.95),
            updates_until(curves[1], 0.95), "window of 1",
            goal=0.8 * updates_until(curves[1], 0.95), higher_is_better=False,
        ),
        common.Result(
            "accuracy of the batch version with a convolution", learn_in_batches(args),
            0.5, "guessing", goal=0.99,
        ),
    ]  # fmt: skip
    return common.report(args, "online", results)


if __name__ == "__main__":
    raise SystemExit(main())

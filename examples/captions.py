"""Caption generator, one to many: a picture of handwritten digits in, a sentence about them out.

A small network turns the picture into a feature, which is the first state of a recurrent cell. The
cell then emits a word at a time, reading the word before, until it emits the stop word: "a seven",
or "a three above a seven". So the sentences differ in length, and only the cell decides where they
end.

The digits are real, from scikit-learn's `load_digits` (1,797 pictures of 8 by 8 pixels); one or two
of them are put on a canvas. Digits of the test pictures never occur in training.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import common

DIGITS = "zero one two three four five six seven eight nine".split()
WORDS = ["<start>", "<stop>", "a", "above", "left-of", *DIGITS]
CODES = {word: code for code, word in enumerate(WORDS)}
START, STOP = 0, 1
LENGTH = 6  # the longest caption: a _ above a _ <stop>


def scenes(images: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`count` pictures [count, 1, 16, 16] and their captions [LENGTH, count], padded with stops."""
    canvas = torch.zeros(count, 1, 16, 16)
    captions = torch.full((LENGTH, count), STOP)
    for number in range(count):
        first, second = torch.randint(len(images), (2,)).tolist()
        words = ["a", DIGITS[labels[first]]]
        relation, *corners = (
            ("", (4, 4)),
            ("above", (0, 4), (8, 4)),
            ("left-of", (4, 0), (4, 8)),
        )[torch.randint(3, ()).item()]
        if relation:
            words += [relation, "a", DIGITS[labels[second]]]
        for (row, column), digit in zip(corners, (first, second), strict=False):
            canvas[number, 0, row : row + 8, column : column + 8] = images[digit]
        captions[: len(words), number] = torch.tensor([CODES[word] for word in words])
    return canvas, captions


class Captioner(nn.Module):
    def __init__(self, cell: str, width: int):
        super().__init__()
        self.width, self.is_lstm = width, cell == "lstm"
        self.look = nn.Sequential(
            nn.Flatten(), nn.Linear(256, 256), nn.ReLU(), nn.Dropout(0.2),
            nn.Linear(256, width), nn.Tanh(),
        )  # fmt: skip
        self.embedding = nn.Embedding(len(WORDS), 32)
        self.cell = common.CELLS[cell](32, width)
        self.head = nn.Linear(width, len(WORDS))

    def start(self, pictures: Tensor):
        feature = self.look(pictures)  # [B, H]
        return (feature, torch.zeros_like(feature)) if self.is_lstm else feature

    def word(self, before: Tensor, state):
        """Logits [B, V] of the word that follows `before` [B], and the state after it."""
        state = self.cell(self.embedding(before), state)
        return self.head(state[0] if self.is_lstm else state), state

    def forward(self, pictures: Tensor, captions: Tensor) -> Tensor:
        # pictures [B, 1, 16, 16], captions [L, B] -> logits [L, B, V]
        state, logits = self.start(pictures), []
        for before in [torch.full_like(captions[0], START), *captions[:-1]]:
            scores, state = self.word(before, state)
            logits.append(scores)
        return torch.stack(logits)

    @torch.inference_mode()
    def describe(self, pictures: Tensor) -> Tensor:
        """[LENGTH, B] captions; what follows a stop is stops."""
        state = self.start(pictures)
        word = torch.full((len(pictures),), START, device=pictures.device)
        stopped, words = torch.zeros_like(word, dtype=torch.bool), []
        while not stopped.all() and len(words) < LENGTH:
            scores, state = self.word(word, state)
            word = scores.argmax(-1).masked_fill(stopped, STOP)
            stopped |= word == STOP
            words.append(word)
        words += [torch.full_like(word, STOP)] * (LENGTH - len(words))
        return torch.stack(words)


def sentence(caption: Tensor) -> str:
    words = [WORDS[code] for code in caption.tolist()]
    return " ".join(words[: words.index("<stop>")] if "<stop>" in words else words)


def draw(args, pictures: Tensor, captions: Tensor) -> None:
    figure, axes = common.plt.subplots(2, 4, figsize=(9, 5), layout="constrained")
    for axis, picture, caption in zip(axes.flat, pictures, captions.t(), strict=False):
        axis.imshow(picture[0].cpu(), cmap="gray_r")
        axis.set_title(sentence(caption), fontsize=9)
        axis.axis("off")
    common.save_picture(args, "captions", figure)


def main(argv: list[str] | None = None) -> int:
    parser = common.Parser(__doc__, cell="gru", steps=(2500, 300), scenes=(20_000, 4000))
    args = parser.parse(argv)
    digits = load_digits()
    images = torch.from_numpy(digits.images).float() / 16
    labels = torch.from_numpy(digits.target)
    order = torch.randperm(len(images))
    test_part, train_part = order[:360], order[360:]
    pictures, captions = scenes(images[train_part], labels[train_part], args.scenes)
    pictures, captions = pictures.to(args.device), captions.to(args.device)
    model = Captioner(args.cell, width=128).to(args.device)
    trainer = common.Trainer(model, args.steps, lr=3e-3)
    steps = common.Steps(args.steps, "training")
    for _ in steps:
        rows = torch.randint(args.scenes, (64,), device=args.device)
        target = captions[:, rows]
        loss = F.cross_entropy(model(pictures[rows], target).flatten(0, 1), target.flatten())
        steps.note = f"loss {trainer.step(loss):.3f}"

    model.eval()
    pictures, captions = scenes(images[test_part], labels[test_part], 1000)
    written = model.describe(pictures.to(args.device)).cpu()
    draw(args, pictures, written)
    training = [sentence(caption) for caption in scenes(images, labels, 2000)[1].t()]
    usual = max(set(training), key=training.count)
    truth = [sentence(caption) for caption in captions.t()]
    result = common.Result(
        "captions right to the last word, digits never seen",
        sum(sentence(w) == t for w, t in zip(written.t(), truth, strict=True)) / len(truth),
        truth.count(usual) / len(truth),
        f'always "{usual}"',
        goal=0.4 if args.small else 0.85,
    )
    return common.report(args, "captions", [result])


if __name__ == "__main__":
    raise SystemExit(main())

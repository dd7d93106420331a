"""Sentiment, many to one: read a review word by word, then say whether its author was pleased.

An embedding feeds a recurrent layer, and a linear read-out turns its final state into one score.
Reviews differ in length, so a batch goes in packed: the layer reads no padding, and each final
state is the state at its review's own end.

The reviews come from a grammar whose meaning hangs on the order of words. "Not" and "hardly" turn
the next opinion around, and of two opinions joined by "but" the later one is what the author ends
up with:

    review  = { aside } opinion [ "but" opinion ] { aside }
    opinion = "the" subject "was" [ "not" | "hardly" | degree ] adjective
    aside   = who "went" "there" when

So a model that counts words (logistic regression on a bag of words, the baseline) cannot tell. No
review of the test set occurs in training.
"""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import common

GOOD = "good great lovely superb tasty charming warm bright fresh clever".split()
BAD = "bad awful bland cold rude noisy stale dull greasy clumsy".split()
SUBJECTS = "food service music room waiter coffee soup bread view menu".split()
DEGREES = "very really quite so rather".split()
TURNS = "not hardly".split()
WHO = "we i they everyone friends".split()
WHEN = "yesterday twice today again late".split()
WORDS = [
    "the", "was", "but", "went", "there",
    *GOOD, *BAD, *SUBJECTS, *DEGREES, *TURNS, *WHO, *WHEN,
]  # fmt: skip
CODES = {word: code for code, word in enumerate(WORDS)}


def opinion(rng: random.Random) -> tuple[list[str], bool]:
    pleased = rng.random() < 0.5
    turned = rng.random() < 0.4
    degree = [rng.choice(TURNS)] if turned else rng.choices(DEGREES, k=rng.random() < 0.5)
    adjective = rng.choice(GOOD if pleased != turned else BAD)
    return ["the", rng.choice(SUBJECTS), "was", *degree, adjective], pleased


def asides(rng: random.Random) -> list[str]:
    count = rng.randrange(4)
    return [w for _ in range(count) for w in (rng.choice(WHO), "went", "there", rng.choice(WHEN))]


def review(rng: random.Random) -> tuple[list[str], bool]:
    words, pleased = opinion(rng)
    if rng.random() < 0.6:
        more, pleased = opinion(rng)
        words += ["but", *more]
    return asides(rng) + words + asides(rng), pleased


def reviews(count: int, seed: int) -> tuple[list[Tensor], Tensor]:
    """`count` different reviews as codes [length], and labels [count] of 0 and 1."""
    rng = random.Random(seed)
    found: dict[tuple[str, ...], bool] = {}
    while len(found) < count:
        words, pleased = review(rng)
        found[tuple(words)] = pleased
    texts = [torch.tensor([CODES[w] for w in words]) for words in found]
    return texts, torch.tensor(list(found.values()), dtype=torch.float32)


class Sentiment(nn.Module):
    def __init__(self, cell: str, width: int):
        super().__init__()
        self.embedding = nn.Embedding(len(WORDS), width)
        self.rnn = common.LAYERS[cell](width, width)
        self.head = nn.Linear(width, 1)

    def read(self, texts: list[Tensor]) -> tuple[PackedSequence, Tensor]:
        """The packed states of all words, and the final state [B, H] of each text."""
        packed = pack_sequence(texts, enforce_sorted=False)
        embedded = packed._replace(data=self.embedding(packed.data))
        states, final = self.rnn(embedded)
        return states, common.last_layer(final)

    def forward(self, texts: list[Tensor]) -> Tensor:
        # texts: B tensors of codes, of any lengths -> scores [B], positive for pleased
        return self.head(self.read(texts)[1]).squeeze(-1)


def accuracy(model: Sentiment, texts: list[Tensor], labels: Tensor) -> float:
    with torch.inference_mode():
        return ((model(texts) > 0) == (labels > 0.5)).float().mean().item()


def bag_of_words_accuracy(train: tuple[list[Tensor], Tensor], test) -> float:
    def counts(texts):
        return torch.stack([torch.bincount(t.cpu(), minlength=len(WORDS)) for t in texts]).numpy()

    model = LogisticRegression(max_iter=1000).fit(counts(train[0]), train[1].cpu().numpy())
    return model.score(counts(test[0]), test[1].cpu().numpy())


def train(args, width: int) -> tuple[Sentiment, tuple, tuple]:
    """A trained model, its training set and its test set."""
    texts, labels = reviews(args.texts, args.seed)
    texts, labels = [t.to(args.device) for t in texts], labels.to(args.device)
    held_out = args.texts // 5
    training = texts[held_out:], labels[held_out:]
    model = Sentiment(args.cell, width).to(args.device)
    trainer = common.Trainer(model, args.steps, lr=1e-2)
    steps = common.Steps(args.steps, "training")
    for _ in steps:
        rows = torch.randint(len(training[0]), (64,)).tolist()
        scores = model([training[0][row] for row in rows])
        loss = F.binary_cross_entropy_with_logits(scores, training[1][rows])
        steps.note = f"loss {trainer.step(loss):.3f}"
    return model, training, (texts[:held_out], labels[:held_out])


def main(argv: list[str] | None = None) -> int:
    parser = common.Parser(__doc__, cell="gru", steps=(600, 150), texts=(10_000, 3000))
    args = parser.parse(argv)
    model, training, test = train(args, width=32 if args.small else 64)
    for text in ("the food was good but the waiter was rude", "the soup was not cold"):
        score = model([torch.tensor([CODES[w] for w in text.split()], device=args.device)])
        common.console.print(f"{'pleased' if score > 0 else 'not pleased'}: {text}")
    result = common.Result(
        "accuracy on reviews never seen",
        accuracy(model, *test),
        bag_of_words_accuracy(training, test),
        "logistic regression on a bag of words",
        goal=0.9 if args.small else 0.98,
    )
    return common.report(args, "sentiment", [result])


if __name__ == "__main__":
    raise SystemExit(main())

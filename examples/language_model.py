"""Character language model: carried state, checkpoints to resume from, and text at the end.

The model of `char_lm.py` (which trains it twice to compare speeds) trained in earnest, once:

- truncated backpropagation through time: the text runs through in windows of 64 characters, and
  each window starts from the state that the one before ended with, detached;
- after each tenth of the steps it writes a checkpoint: weights, optimizer, schedule, carried state
  and the number of the step. `--resume` goes on from there, and comes out as if never stopped;
- what counts is a text that was held out: the last tenth of the source of Python's standard
  library. Its perplexity is given in bits per character, log2 of the number of characters that the
  model hesitates between. One baseline hesitates without looking at context: the unigram entropy.
  The other counts what followed the last few characters wherever they occurred in training, which
  for source code is hard to beat, and is beaten after about a minute. 1,200 steps gave 2.15 bits,
  the default of 2,000 steps 2.03; the rate of learning falls to nothing over `--steps`, so a longer
  training is one that was meant to be longer from the start;
- at the end it writes, at three temperatures: low ones repeat themselves, high ones invent.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import char_lm
import common

BATCH, WINDOW = 32, 64
HELD_OUT_STREAMS = 16
BITS = 1 / math.log(2)  # in a nat
PRIOR = 16  # of 2, 4, 8 and 16 the best for n-grams of this text


def corpora(size: int, device, batch: int = BATCH) -> tuple[char_lm.Corpus, char_lm.Corpus]:
    """Training text as `batch` streams, and held-out text as some, over the same alphabet."""
    text = char_lm.read_stdlib()[:size]
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    alphabet, codes = torch.unique(data, return_inverse=True)
    split = len(codes) * 9 // 10

    def streams(part: torch.Tensor, count: int) -> torch.Tensor:
        return part[: len(part) // count * count].view(count, -1).t().contiguous()

    training, held_out = streams(codes[:split], batch), streams(codes[split:], HELD_OUT_STREAMS)
    characters = bytes(alphabet.tolist())
    return (
        char_lm.Corpus(characters, training.to(device), WINDOW),
        char_lm.Corpus(characters, held_out.to(device), WINDOW),
    )


@torch.inference_mode()
def bits_per_character(model: char_lm.CharLM, corpus: char_lm.Corpus) -> float:
    """Over the whole text, with the state carried through it."""
    total, count, state = 0.0, 0, None
    for window in range(corpus.windows):
        x, target = corpus.batch(window)
        logits, state = model(x, state)
        total += F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum").item()
        count += target.numel()
    return total / count * BITS


def unigram_bits(training: char_lm.Corpus, held_out: char_lm.Corpus) -> float:
    """Bits per character of the held-out text, guessed from the frequencies in training."""
    size = len(training.alphabet)
    seen = torch.bincount(training.streams.flatten(), minlength=size).double() + 1
    return -(seen / seen.sum()).log2()[held_out.streams].mean().item()


def occurrences(keys: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """How often each number that is asked for is among the keys."""
    found, counts = keys.unique(return_counts=True)
    place = torch.searchsorted(found, asked).clamp(max=len(found) - 1)
    return torch.where(found[place] == asked, counts[place], 0).double()


def ngram_bits(training: char_lm.Corpus, held_out: char_lm.Corpus, longest: int = 6) -> float:
    """Bits per character of the held-out text, guessed from up to 6 characters before.

    Each length mixes what it counted with what the length below says, as if that had been seen
    `PRIOR` times more. Of the lengths the best is taken, which flatters this baseline: it is chosen
    on the held-out text itself.
    """
    size, likelihood, bits = len(training.alphabet), 1 / len(training.alphabet), []
    texts = [corpus.streams.t().flatten() for corpus in (training, held_out)]
    contexts = [torch.zeros_like(text) for text in texts]  # the characters before, as one number
    for length in range(longest + 1):
        longer = [c * size + text for c, text in zip(contexts, texts, strict=True)]
        seen = occurrences(*longer) + PRIOR * likelihood
        likelihood = seen / (occurrences(*contexts) + PRIOR)
        bits.append(-likelihood.log2().mean().item())
        contexts = [
            c + size**length * text.roll(length + 1)  # as a ring: the first follows the last
            for c, text in zip(contexts, texts, strict=True)
        ]
    return min(bits)


class Training:
    """A model, its optimizer and where in the text they are; all of it goes into a checkpoint."""

    def __init__(self, args, corpus: char_lm.Corpus) -> None:
        self.corpus = corpus
        model = char_lm.CharLM(args.cell, len(corpus.alphabet), args.hidden, layers=1)
        self.model = common.fused_rnn.replace(model).to(args.device)
        self.trainer = common.Trainer(self.model, args.steps, lr=5e-3)
        self.state, self.number = None, 0

    def step(self) -> float:
        if self.number % self.corpus.windows == 0:  # the streams start again
            self.state = None
        x, target = self.corpus.batch(self.number)
        logits, state = self.model(x, self.state)
        self.state = common.detach(state)
        self.number += 1
        return self.trainer.step(F.cross_entropy(logits.flatten(0, 1), target.flatten()))

    def save(self, path: Path) -> None:
        facts = {
            "model": self.model.state_dict(),
            "optimizer": self.trainer.optimizer.state_dict(),
            "schedule": self.trainer.schedule.state_dict(),
            "state": self.state,
            "number": self.number,
        }
        unfinished = path.with_suffix(".new")
        torch.save(facts, unfinished)
        unfinished.replace(path)  # whoever stops us finds the old one or the new one, whole

    def load(self, path: Path) -> None:
        facts = torch.load(path, map_location=self.corpus.streams.device, weights_only=True)
        self.model.load_state_dict(facts["model"])
        self.trainer.optimizer.load_state_dict(facts["optimizer"])
        self.trainer.schedule.load_state_dict(facts["schedule"])
        self.state, self.number = facts["state"], facts["number"]


def add_checkpoint_arguments(parser: common.Parser) -> None:
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--stop", type=common.positive, help="stop early, after this many steps")


def expect_checkpoint(parser: common.Parser, args: argparse.Namespace, checkpoint: Path) -> None:
    """There is one to go on from, where that is asked for."""
    if args.resume and not checkpoint.exists():
        parser.error(f"argument --resume: there is no {checkpoint}")


def train(
    args: argparse.Namespace,
    training: Training,
    checkpoint: Path,
    name: str,
    step: Callable[[], float],  # takes one of the training's steps, and gives its loss
) -> bool:
    """Goes on from the checkpoint or begins, and writes one after each tenth of the steps. Whether
    it came to the end."""
    if args.resume:
        training.load(checkpoint)
    last = min(args.steps, args.stop or args.steps)
    steps = common.Steps(max(0, last - training.number), name)
    for _ in steps:
        steps.note = f"{step() * BITS:.3f} bits"
        if training.number % max(1, args.steps // 10) == 0 or training.number == last:
            training.save(checkpoint)
    if last < args.steps:
        common.console.print(f"stopped at step {training.number}; --resume goes on")
    return last == args.steps


def main(argv: list[str] | None = None) -> int:
    parser = common.Parser(
        __doc__, cell="lstm", steps=(2000, 120), hidden=(192, 96), batch=(16, 16),
        characters=(2_000_000, 100_000),
    )  # fmt: skip
    add_checkpoint_arguments(parser)
    args = parser.parse(argv)
    checkpoint = args.out / "language_model.pt"
    expect_checkpoint(parser, args, checkpoint)
    corpus, held_out = corpora(args.characters, args.device, args.batch)
    training = Training(args, corpus)
    if not train(args, training, checkpoint, "training", training.step):
        return 0

    for temperature in (0.3, 0.7, 1.0):
        common.console.rule(f"temperature {temperature}")
        text = char_lm.generate(training.model, corpus, 60 if args.small else 200, temperature)
        common.console.print(text, markup=False, highlight=False)
    bits, ngrams = bits_per_character(training.model, held_out), ngram_bits(corpus, held_out)
    results = [
        common.Result(
            "bits per character of held-out text", bits, baseline, name, goal,
            higher_is_better=False,
        )
        for baseline, name, goal in (
            (unigram_bits(corpus, held_out), "unigram entropy", 3.9 if args.small else 2.3),
            (ngrams, "the best n-grams", 0.98 * ngrams),
        )
    ]  # fmt: skip
    return common.report(args, "language_model", results[: 1 if args.small else 2])


if __name__ == "__main__":
    raise SystemExit(main())

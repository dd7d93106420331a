"""Date translator, sequence to sequence: "January 15, 2023" in, "2023-01-15" out.

An encoder reads the date character by character; its final state starts a decoder that writes the
answer character by character. In training the decoder is shown the right character before each one
that it has to predict (teacher forcing), so a whole answer is one call of the layer. In use it
reads its own output: the likeliest character, one call per character (greedy decoding).

Dates are drawn from the 73,049 days of 1900 to 2099, written in one of seven ways. Days of the test
set never occur in training, in any format; an answer counts when all ten characters are right.
"""

from __future__ import annotations

import datetime
import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import common

FIRST_DAY = datetime.date(1900, 1, 1)
DAYS = (datetime.date(2100, 1, 1) - FIRST_DAY).days
MONTHS = (
    "January February March April May June July August September October November December"
).split()
FORMATS = (
    "{month} {d.day}, {d.year}",
    "{d.day} {month} {d.year}",
    "{short} {d.day}, {d.year}",
    "{d.day:02}-{short}-{d.year}",
    "{d.day:02}/{d.month:02}/{d.year}",
    "{d.day}.{d.month}.{d.year}",
    "the {d.day}. of {month} {d.year}",
)
ALPHABET = sorted(set("".join(MONTHS) + "the of 0123456789,-/."))
CODES = {character: code for code, character in enumerate(ALPHABET)}
DIGITS = "0123456789-"
START = len(DIGITS)  # what the decoder reads before the first character


def written(day: int, rng: random.Random) -> str:
    date = FIRST_DAY + datetime.timedelta(day)
    month = MONTHS[date.month - 1]
    return rng.choice(FORMATS).format(d=date, month=month, short=month[:3])


def encode(text: str) -> Tensor:
    return torch.tensor([CODES[character] for character in text])


def answers(days: list[int]) -> Tensor:
    """[10, B] the characters of the ISO dates."""
    texts = [(FIRST_DAY + datetime.timedelta(day)).isoformat() for day in days]
    return torch.tensor([[DIGITS.index(c) for c in text] for text in texts]).t()


class Translator(nn.Module):
    def __init__(self, cell: str, width: int):
        super().__init__()
        self.read = nn.Embedding(len(ALPHABET), 32)
        self.encoder = common.LAYERS[cell](32, width)
        self.write = nn.Embedding(len(DIGITS) + 1, 32)
        self.decoder = common.LAYERS[cell](32, width)
        self.head = nn.Linear(width, len(DIGITS))

    def encode(self, texts: list[Tensor]):
        """The final state after each of B texts."""
        packed = pack_sequence(texts, enforce_sorted=False)
        return self.encoder(packed._replace(data=self.read(packed.data)))[1]

    def forward(self, texts: list[Tensor], answer: Tensor) -> Tensor:
        # B texts, answer [10, B] -> logits [10, B, 11]
        start = torch.full_like(answer[:1], START)
        shown = self.write(torch.cat([start, answer[:-1]]))
        return self.head(self.decoder(shown, self.encode(texts))[0])

    @torch.inference_mode()
    def translate(self, texts: list[Tensor]) -> Tensor:
        """[10, B] the likeliest characters, each chosen knowing those before it."""
        state = self.encode(texts)
        code = torch.full((1, len(texts)), START, device=texts[0].device)
        codes = []
        for _ in range(10):
            y, state = self.decoder(self.write(code), state)
            code = self.head(y).argmax(-1)
            codes.append(code)
        return torch.cat(codes)


def main(argv: list[str] | None = None) -> int:
    parser = common.Parser(__doc__, cell="gru", steps=(1500, 350), hidden=(128, 64))
    args = parser.parse(argv)
    rng = random.Random(args.seed)
    days = rng.sample(range(DAYS), DAYS)
    test, training = days[:2000], days[2000:]
    model = Translator(args.cell, args.hidden).to(args.device)
    trainer = common.Trainer(model, args.steps, lr=5e-3)
    steps = common.Steps(args.steps, "training")
    for _ in steps:
        batch = rng.choices(training, k=128)
        texts = [encode(written(day, rng)).to(args.device) for day in batch]
        answer = answers(batch).to(args.device)
        logits = model(texts, answer)
        loss = F.cross_entropy(logits.flatten(0, 1), answer.flatten())
        steps.note = f"loss {trainer.step(loss):.3f}"

    texts = [written(day, rng) for day in test]
    got = model.translate([encode(text).to(args.device) for text in texts]).cpu()
    right = got == answers(test)
    for number in range(7):
        answer = "".join(DIGITS[code] for code in got[:, number])
        common.console.print(f"{texts[number]:>27}  {answer}", highlight=False)
    # What is known without reading: 5 of 10 characters at best, and never a whole date.
    usual = answers(training[:5000]).mode(1).values[:, None] == answers(test)
    characters = common.Result(
        "characters right on dates never seen",
        right.float().mean().item(),
        usual.float().mean().item(),
        "the usual character of each place",
        goal=0.75 if args.small else 0.99,
    )
    exact = common.Result(
        "exact matches on dates never seen",
        right.all(0).float().mean().item(),
        usual.all(0).float().mean().item(),
        "the usual character of each place",
        goal=0.0 if args.small else 0.95,
    )
    return common.report(args, "dates", [characters, exact][: 1 if args.small else 2])


if __name__ == "__main__":
    raise SystemExit(main())

"""Train a character-level language model twice: with torch.nn, then with fused_rnn.

The model is the classic one: an embedding, a stack of recurrent layers and a linear read-out
that predicts the next byte. What it learns is Python, from the source of the standard library
of the interpreter that runs it.

Moving a model to fused_rnn takes one line, after the model is built and before or after its
optimizer is (the parameters stay the very same objects):

    model = fused_rnn.replace(model)

Everything else here is what any training loop for a recurrent network needs:

- The text is cut into `batch` long streams that run side by side, and each step trains on the
  next `window` characters of every stream (truncated backpropagation through time).
- The state at the end of a window is where the next one starts: it is carried over, but
  detached, so that no gradient flows into windows that are already done.
- Gradients are clipped, since now and then a recurrent network gets a very large one.

Both models start from the same seed and see the same batches, so their losses must be the same
up to rounding; the program fails if they are not. They train in turns, a few steps each, so that
whatever else the machine does slows both alike.

    python examples/char_lm.py --cell gru --hidden 512 --text shakespeare.txt
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
import fused_rnn

CELLS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
STDLIB_BYTES = 2_000_000
TURN = 5  # steps that one model trains before it is the other one's turn
WARM_UP = 10  # steps left out of the speed: allocators fill, threads start, clocks settle
# The learning rate rises over this many steps. At its full height from the start, rounding
# differences of 1e-7 grow to 3e-4 within 100 steps; so, they stay at 2e-7.
LR_RISE = 200
CLOSE_STEPS = 100
# Rounding differences grow along a training run, so the curves must be nearly equal at first
# and still tell the same story at the end.
CLOSE_TOLERANCE = 1e-4
END_TOLERANCE = 1e-2


class CharLM(nn.Module):
    def __init__(self, cell: str, vocabulary: int, hidden: int, layers: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.rnn = CELLS[cell](hidden, hidden, layers)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, x: Tensor, state=None):
        # x: [T, B] codes -> logits: [T, B, V]
        y, state = self.rnn(self.embedding(x), state)
        return self.head(y), state


@dataclass
class Corpus:
    """A text as `batch` parallel streams of codes, each code an index into `alphabet`."""

    alphabet: bytes
    streams: Tensor  # [N, B] int64
    window: int

    @property
    def windows(self) -> int:
        return (len(self.streams) - 1) // self.window

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets [T, B] of a step; the targets are one character ahead."""
        start = step % self.windows * self.window
        stop = start + self.window
        return self.streams[start:stop], self.streams[start + 1 : stop + 1]

    def unigram_entropy(self) -> float:
        """The loss, in nats, of the best guess that ignores all context."""
        p = torch.bincount(self.streams.flatten()).double()
        p = p[p > 0] / p.sum()
        return -(p * p.log()).sum().item()

    def encode(self, text: bytes) -> Tensor:
        codes = [self.alphabet.index(byte) for byte in text if byte in self.alphabet]
        return torch.tensor(codes or [0], device=self.streams.device)


def read_stdlib() -> bytes:
    """The source of Python's own standard library, the same bytes at every call."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = b""
    for path in sorted(folder.glob("*.py")):
        text += path.read_bytes()
        if len(text) >= STDLIB_BYTES:
            break
    return text[:STDLIB_BYTES]


def load_corpus(file: Path | None, batch: int, window: int, device: torch.device) -> Corpus:
    try:
        text = read_stdlib() if file is None else file.read_bytes()
    except OSError as error:
        raise ValueError(f"--text: cannot read {file}: {error.strerror}") from error
    needed = batch * (window + 1)
    if len(text) < needed:
        name = "the standard library's source; give a --text" if file is None else str(file)
        raise ValueError(
            f"--text: a batch of {batch} windows of {window} characters needs at least "
            f"{needed} bytes, got {len(text)} from {name}"
        )
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    alphabet, codes = torch.unique(data, return_inverse=True)
    length = len(codes) // batch
    streams = codes[: batch * length].view(batch, length).t().contiguous()
    return Corpus(bytes(alphabet.tolist()), streams.to(device), window)


@dataclass
class Trainer:
    """One model in training, with what it has measured so far."""

    name: str
    model: CharLM
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    state: Tensor | tuple[Tensor, Tensor] | None = None
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def step(self, corpus: Corpus) -> None:
        number = len(self.losses)
        if number % corpus.windows == 0:  # the streams start again, and so must the state
            self.state = None
        x, target = corpus.batch(number)
        start = time.perf_counter()
        logits, state = self.model(x, self.state)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.state = common.detach(state)
        # .item() waits for the device, so the time is that of finished work.
        self.losses.append(loss.item())
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        self.seconds.append(time.perf_counter() - start)

    def tokens_per_second(self, tokens: int) -> float:
        return tokens / statistics.median(self.seconds[WARM_UP:] or self.seconds)

    def final_loss(self) -> float:
        """The mean over the last tenth: one window's loss depends mostly on its text."""
        return statistics.fmean(self.losses[-max(1, len(self.losses) // 10) :])


def make_trainer(name: str, args: argparse.Namespace, vocabulary: int, fused: bool) -> Trainer:
    torch.manual_seed(args.seed)
    model = CharLM(args.cell, vocabulary, args.hidden, args.layers).to(args.device)
    if fused:
        model = fused_rnn.replace(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1, (n + 1) / LR_RISE))
    return Trainer(name, model, optimizer, schedule)


def train(trainers: list[Trainer], corpus: Corpus, steps: int) -> None:
    progress = common.Steps(steps, "training")
    for step in progress:
        if step % TURN == 0:
            for trainer in trainers:
                for _ in range(min(TURN, steps - step)):
                    trainer.step(corpus)
            losses = (f"{trainer.name} {trainer.losses[-1]:.3f}" for trainer in trainers)
            progress.note = "  ".join(losses)


@torch.inference_mode()
def generate(model: CharLM, corpus: Corpus, length: int, temperature: float) -> str:
    """Let the model continue "def": a high temperature is inventive, a low one repeats itself."""
    model.eval()
    prompt = corpus.encode(b"\ndef ")
    logits, state = model(prompt[:, None])
    codes = prompt.tolist()
    for _ in range(length):
        if temperature == 0:
            code = logits[-1].argmax(-1, keepdim=True)
        else:
            code = torch.multinomial(F.softmax(logits[-1] / temperature, -1), 1)
        codes.append(code.item())
        logits, state = model(code, state)
    return bytes(corpus.alphabet[code] for code in codes).decode(errors="replace").strip("\n")


def relative_difference(a: float, b: float) -> float:
    if math.isfinite(a) and math.isfinite(b):
        return abs(a - b) / max(abs(a), abs(b), 1e-12)
    return math.inf


def differences(plain: Trainer, fused: Trainer) -> tuple[float, float]:
    """The largest relative difference of the losses at first, and that of the final losses."""
    pairs = zip(plain.losses[:CLOSE_STEPS], fused.losses[:CLOSE_STEPS], strict=True)
    at_first = max(relative_difference(a, b) for a, b in pairs)
    return at_first, relative_difference(plain.final_loss(), fused.final_loss())


def plot(args, trainers: list[Trainer], baseline: float, tokens: int) -> None:
    figure, (left, right) = common.plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for trainer, style in zip(trainers, ("-", "--"), strict=True):
        left.plot(trainer.losses, style, label=trainer.name, linewidth=1)
        right.plot([tokens / s for s in trainer.seconds], style, label=trainer.name, linewidth=1)
    left.axhline(baseline, color="grey", linestyle=":", label="unigram entropy")
    left.set(xlabel="step", ylabel="loss, nats per character", title="the same losses")
    right.set(xlabel="step", ylabel="tokens (characters) per second", title="speed of training")
    right.set_ylim(bottom=0)
    left.legend()
    right.legend()
    common.save_picture(args, "char_lm", figure)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = common.Parser(
        __doc__, cell="lstm", steps=(500, 60), hidden=(256, 48), layers=(2, 1), batch=(32, 8),
        window=(64, 32), steps_help="optimizer steps of each model",
    )  # fmt: skip
    add, not_negative = parser.add_argument, common.not_negative
    add("--lr", type=not_negative(float), default=1e-3, help="of Adam (default 0.001)")
    add("--text", type=Path, help="a file to learn, in place of Python's standard library")
    add("--temperature", type=not_negative(float), default=0.7, help="0: always the likeliest")
    add("--generate", type=not_negative(int), default=600, help="characters to write at the end")
    args = parser.parse(argv)
    try:
        args.corpus = load_corpus(args.text, args.batch, args.window, args.device)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    console, corpus = common.console, args.corpus
    baseline = corpus.unigram_entropy()
    console.print(
        f"{corpus.streams.numel():,} characters, {len(corpus.alphabet)} different ones; "
        f"unigram entropy {baseline:.3f} nats; {args.layers}-layer {args.cell}, "
        f"hidden {args.hidden}, batch {args.batch}, window {args.window}"
    )
    plain = make_trainer("torch.nn", args, len(corpus.alphabet), fused=False)
    fused = make_trainer("fused_rnn", args, len(corpus.alphabet), fused=True)
    train([plain, fused], corpus, args.steps)

    if args.generate:
        console.rule(f"written by the model at temperature {args.temperature}")
        sample = generate(fused.model, corpus, args.generate, args.temperature)
        console.print(sample, markup=False, highlight=False)

    tokens = args.batch * args.window
    speeds = [trainer.tokens_per_second(tokens) for trainer in (plain, fused)]
    at_first, at_end = differences(plain, fused)
    table = common.Table("", "torch.nn", "fused_rnn", title="the same model, trained twice")
    table.add_row("final loss", f"{plain.final_loss():.4f}", f"{fused.final_loss():.4f}")
    table.add_row("tokens/s", *(f"{speed:,.0f}" for speed in speeds))
    table.add_row("speed ratio", "1.00", f"{speeds[1] / speeds[0]:.2f}")
    close_steps = min(CLOSE_STEPS, args.steps)
    table.add_row(f"largest difference, first {close_steps} steps", "", f"{at_first:.1e} relative")
    table.add_row("difference at the end", "", f"{at_end:.1e} relative")
    explanation = fused_rnn.explain(fused.model.train(), corpus.batch(0)[0])
    table.add_row("backend", "", explanation.backend)
    console.print(table)
    console.print(explanation, markup=False, highlight=False)

    plot(args, [plain, fused], baseline, tokens)

    # GPU libraries round in another order and in TF32, so only the CPU is held to this.
    agree = at_first <= CLOSE_TOLERANCE and at_end <= END_TOLERANCE
    if args.device.type == "cpu" and not agree:
        print(
            f"error: the losses of torch.nn and fused_rnn differ: {at_first:.1e} over the first "
            f"{close_steps} steps (allowed {CLOSE_TOLERANCE:.0e}), {at_end:.1e} at the end "
            f"(allowed {END_TOLERANCE:.0e})",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

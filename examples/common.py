"""What the examples share: arguments, a progress bar, pictures, and a result that is judged.

Every example states what it measures, the baseline it compares with and the goal it has to reach,
prints them as a table, writes them to `<out>/<name>.json` and exits with 1 when it fell short. With
`--small` an example is the size that the tests run: fewer steps, smaller models, lower goals.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

import fused_rnn

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LAYERS = {"rnn": fused_rnn.RNN, "gru": fused_rnn.GRU, "lstm": fused_rnn.LSTM}
CELLS = {"rnn": fused_rnn.RNNCell, "gru": fused_rnn.GRUCell, "lstm": fused_rnn.LSTMCell}

# What a size that an example may ask for is.
SIZES = {
    "batch": "streams of text that run side by side",
    "budget": "parameters of every model, at most",
    "characters": "length of the text",
    "envs": "environments that run side by side",
    "hidden": "units of a recurrent layer",
    "layers": "recurrent layers on top of each other",
    "piece": "timesteps between two updates",
    "points": "states that the pictures show",
    "samples": "timesteps of the stream",
    "scenes": "pictures to train on",
    "texts": "texts to train on",
    "window": "characters that gradients flow back through",
}

console = Console()


@dataclass
class Result:
    """One measured number, what to compare it with, and what it has to reach."""

    measure: str
    value: float
    baseline: float
    baseline_name: str
    goal: float
    higher_is_better: bool = True

    @property
    def reached(self) -> bool:
        better = self.value >= self.goal if self.higher_is_better else self.value <= self.goal
        return better and math.isfinite(self.value)


class Parser(argparse.ArgumentParser):
    """The arguments of every example; `parse` also makes the folder, the device and the seed.

    Args:
        doc: the example's docstring, whose first line is the description.
        steps: how many steps an example takes at full size, and with --small.
        cell: the cell of a run that does not name one.
        sizes: further whole numbers, of SIZES, each (full, small) and an argument of its own.
    """

    def __init__(
        self,
        doc: str,
        *,
        steps: tuple[int, int],
        cell: str | None = "gru",
        steps_help: str = "optimizer steps",
        **sizes: tuple[int, int],
    ) -> None:
        super().__init__(description=doc.splitlines()[0])
        self.sizes = {"steps": steps, **sizes}
        if cell:
            self.add_argument("--cell", choices=LAYERS, default=cell, help=f"default: {cell}")
        for name, (full, small) in self.sizes.items():
            text = steps_help if name == "steps" else SIZES[name]
            text += f" (default {full}, small {small})"
            self.add_argument(f"--{name.replace('_', '-')}", type=positive, help=text)
        self.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default cpu)")
        self.add_argument("--seed", type=not_negative(int), default=0)
        self.add_argument("--small", action="store_true", help="the size that the tests run")
        self.add_argument(
            "--out", type=Path, default=Path("out"), help="folder for pictures and results"
        )

    def parse(self, argv: list[str] | None) -> argparse.Namespace:
        args = self.parse_args(argv)
        for name, size in self.sizes.items():
            if getattr(args, name) is None:
                setattr(args, name, size[args.small])
        try:
            args.device = torch.device(args.device)
            torch.empty(1, device=args.device).cpu()  # meta has no numbers to train with
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            self.error(f"argument --device: cannot train on {str(args.device)!r}: {reason}")
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self.error(f"argument --out: {error}")
        torch.manual_seed(args.seed)
        return args


def positive(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def not_negative(kind: type) -> Callable[[str], float]:
    """A number from 0 on, for argparse."""

    def convert(text: str) -> float:
        value = kind(text)
        if not (value >= 0 and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"must be finite and not negative, got {text}")
        return value

    convert.__name__ = kind.__name__  # argparse names the type in "invalid int value"
    return convert


class Steps:
    """`for step in Steps(n, "training")` with a progress bar; `note` is shown at its end."""

    def __init__(self, count: int, what: str) -> None:
        self.count, self.what, self.note = count, what, ""

    def __iter__(self) -> Iterator[int]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(self.what, total=self.count, note="")
            for step in range(self.count):
                yield step
                progress.update(task, advance=1, note=self.note)


class Trainer:
    """Adam with a one-cycle learning rate and clipped gradients.

    A model with simple RNN cells trains at a fifth of `lr`: at the rate of gated ones it diverges.
    """

    def __init__(self, model: nn.Module, steps: int, lr: float, clip: float = 1.0) -> None:
        self.model, self.clip = model, clip
        if any(isinstance(m, (fused_rnn.RNN, fused_rnn.RNNCell)) for m in model.modules()):
            lr /= 5
        self.optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, lr, total_steps=max(steps, 2), pct_start=0.2
        )

    def step(self, loss: Tensor) -> float:
        """One update; returns the loss as a number."""
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.schedule.step()
        return loss.item()


def last_layer(state) -> Tensor:
    """[B, H] the last layer's h of a final state, which for an LSTM is a pair."""
    return (state[0] if isinstance(state, tuple) else state)[-1]


def detach(state):
    """The state without its history, so that no gradient flows further back."""
    return tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()


def parameter_count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def save_picture(args: argparse.Namespace, name: str, figure) -> None:
    path = args.out / f"{name}.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    console.print(f"picture: {path}", highlight=False)


def report(args: argparse.Namespace, name: str, results: list[Result]) -> int:
    """Prints and writes the results; returns the exit status, 1 where a goal was not reached."""
    table = Table("", "result", "baseline", "goal", "", title=name)
    for r in results:
        sign = "≥" if r.higher_is_better else "≤"
        table.add_row(
            r.measure,
            f"{r.value:.4g}",
            f"{r.baseline:.4g} ({r.baseline_name})",
            f"{sign} {r.goal:.4g}",
            "reached" if r.reached else "[bold red]not reached",
        )
    console.print(table)
    facts = {
        "name": name,
        "size": "small" if args.small else "full",
        "cell": getattr(args, "cell", None),
        "steps": args.steps,
        "seed": args.seed,
        "device": str(args.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "results": [asdict(r) | {"reached": r.reached} for r in results],
    }
    (args.out / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n")
    return 0 if all(r.reached for r in results) else 1

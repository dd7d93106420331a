"""Time series: an LSTM forecasts a week of Seattle's weather from the month before.

The series is real: 1,461 days of weather from 2012 to 2015, shipped by the package vega_datasets.
The model reads 30 days (highest and lowest temperature, rain, wind, season) and gives the highest
temperature of each of the next seven days. It trains on two years, keeps the weights that did best
on the third, and is tested on the fourth. There are two baselines: naive, which repeats the last
day's temperature, and a linear autoregression on the last 30 days' temperatures, fitted to all
three years before the test. Four years of one place are little to learn from, and the second is
hard to beat: the goal is to equal it, within 2 in 100, and to be well ahead of the first.

`Encoder` is the block that many systems for text and speech have in their middle: two bidirectional
layers with dropout between them, by default from vectors of 300 to states of 128.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vega_datasets import local_data

import common

PAST, AHEAD = 30, 7
YEAR = 365
VARIABLES = ("temp_max", "temp_min", "precipitation", "wind")


class Encoder(nn.Module):
    """Two bidirectional layers with dropout: [T, B, input_size] -> [T, B, 2 * hidden_size]."""

    def __init__(
        self, input_size: int = 300, hidden_size: int = 128, cell: str = "lstm", dropout=0.3
    ):
        super().__init__()
        self.rnn = common.LAYERS[cell](
            input_size, hidden_size, num_layers=2, dropout=dropout, bidirectional=True
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, state=None) -> Tensor:
        return self.dropout(self.rnn(x, state)[0])


class Forecaster(nn.Module):
    """The encoder's two ends, where each direction has read everything, and a linear read-out."""

    def __init__(self, cell: str, hidden: int):
        super().__init__()
        self.hidden = hidden
        self.encoder = Encoder(len(VARIABLES) + 2, hidden, cell)
        self.head = nn.Linear(2 * hidden, AHEAD)

    def forward(self, past: Tensor) -> Tensor:
        # past: [PAST, B, I] -> standardised temperatures [B, AHEAD]
        states = self.encoder(past)
        ends = torch.cat([states[-1, :, : self.hidden], states[0, :, self.hidden :]], -1)
        return self.head(ends)


def weather() -> Tensor:
    """[days, I] the variables and the season as a point on a circle."""
    table = local_data.seattle_weather()
    days = torch.from_numpy(table[list(VARIABLES)].to_numpy()).float()
    days[:, 2] = days[:, 2].log1p()  # most days have no rain, some very much
    angle = torch.arange(len(days)) * (2 * math.pi / 365.25)
    return torch.cat([days, torch.stack([angle.sin(), angle.cos()], 1)], 1)


def windows(days: Tensor) -> tuple[Tensor, Tensor]:
    """Pasts [PAST, N, I] and the temperatures that followed [N, AHEAD]."""
    pieces = days.unfold(0, PAST + AHEAD, 1)  # [N, I, PAST + AHEAD]
    return pieces[..., :PAST].permute(2, 0, 1).contiguous(), pieces[:, 0, PAST:].contiguous()


def autoregression(past: Tensor, future: Tensor, test: Tensor) -> Tensor:
    """Least squares from the past temperatures and a constant: forecasts [N, AHEAD]."""

    def inputs(x):
        lags = x[:, :, 0].t()
        return torch.cat([lags, torch.ones_like(lags[:, :1])], 1)

    return inputs(test) @ torch.linalg.lstsq(inputs(past), future).solution


def draw(args, truth: Tensor, forecasts: dict[str, Tensor]) -> None:
    figure, (days, errors) = common.plt.subplots(1, 2, figsize=(13, 4), layout="constrained")
    three = AHEAD // 2
    days.plot(truth[:120, three], "k", label="measured", linewidth=1)
    for name, forecast in forecasts.items():
        days.plot(forecast[:120, three], label=name, linewidth=1)
        error = (forecast - truth).square().mean(0).sqrt()
        errors.plot(range(1, AHEAD + 1), error, "o-", label=name)
    days.set(xlabel="day of the test year", ylabel="°C", title=f"{three + 1} days ahead")
    errors.set(xlabel="days ahead", ylabel="root mean squared error, °C", ylim=(0, None))
    days.legend()
    errors.legend()
    common.save_picture(args, "forecast", figure)


def main(argv: list[str] | None = None) -> int:
    parser = common.Parser(__doc__, cell="lstm", steps=(300, 120), hidden=(24, 12))
    args = parser.parse(argv)
    block = Encoder(cell=args.cell)
    common.console.print(
        f"the encoder at its usual size: {common.parameter_count(block):,} parameters, "
        f"[T, B, 300] -> {list(block(torch.randn(12, 2, 300)).shape)}",
        highlight=False,
    )
    days = weather()
    training = days[:-YEAR]
    mean, scale = training.mean(0), training.std(0)
    mean[-2:], scale[-2:] = 0, 1
    past, future = (w.to(args.device) for w in windows((training - mean) / scale))
    # The first forecast of the test year reads the last days of the year before.
    test = (days[-YEAR - PAST :] - mean) / scale
    test_past, truth = (w.to(args.device) for w in windows(test))

    model = Forecaster(args.cell, args.hidden).to(args.device)
    trainer = common.Trainer(model, args.steps, lr=3e-3)
    first, third = slice(None, -YEAR - AHEAD), slice(-YEAR, None)  # no day is a target in both
    best = (float("inf"), {})
    steps = common.Steps(args.steps, "training")
    for step in steps:
        rows = torch.randint(len(future[first]), (64,), device=args.device)
        trainer.step(F.mse_loss(model.train()(past[:, rows]), future[rows]))
        if step % 10 == 9:
            with torch.no_grad():
                error = F.mse_loss(model.eval()(past[:, third]), future[third]).item()
            steps.note = f"third year {error:.3f}"
            best = min(best, (error, copy.deepcopy(model.state_dict())), key=lambda pair: pair[0])
    model.load_state_dict(best[1])

    with torch.inference_mode():
        forecasts = {
            "naive": test_past[-1, :, :1].expand_as(truth),
            "autoregression": autoregression(past, future, test_past),
            args.cell: model.eval()(test_past),
        }
    in_degrees = {k: (f * scale[0] + mean[0]).cpu() for k, f in forecasts.items()}
    truth = (truth * scale[0] + mean[0]).cpu()
    draw(args, truth, in_degrees)
    errors = {k: (f - truth).square().mean().sqrt().item() for k, f in in_degrees.items()}
    results = [
        common.Result(
            "error over the next 7 days, °C", errors[args.cell], errors[name], name,
            goal=share * errors[name], higher_is_better=False,
        )
        for name, share in (("naive", 0.9 if args.small else 0.85), ("autoregression", 1.02))
    ]  # fmt: skip
    return common.report(args, "forecast", results[: 1 if args.small else 2])


if __name__ == "__main__":
    raise SystemExit(main())

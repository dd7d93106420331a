"""Gradient flow: how much of a gradient reaches the first input, and what clipping does.

An output t steps after the first input depends on it through t products with the recurrent matrix,
so its gradient there shrinks or grows like a power of that matrix's spectral radius. Four pictures
show it, with no training at all:

- the gradient of every output y_t back to the first input, in RNN, GRU and LSTM as torch
  initialises them, and in an LSTM whose forget gates start open. It takes one forward pass and a
  backward pass per output, over one graph that is retained;
- the same for a simple RNN whose recurrent matrix is scaled to spectral radii from 0.5 to 1.5. With
  inputs near zero tanh is the identity, and the slope of each line must be the logarithm of the
  radius: that is the number reported here. With large inputs tanh saturates and even a radius of
  1.5 vanishes;
- the norms of the parameters' gradients of those networks, before and after `clip_grad_norm_`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import common
import fused_rnn

RADII = (0.5, 0.8, 1.0, 1.2, 1.5)
HIDDEN = 64


def flow(layer: nn.Module, x: Tensor) -> list[float]:
    """Norm of the gradient of each output back to the first input: T numbers, from y_0 on."""
    x = x.requires_grad_()
    y, _ = layer(x)
    # A random direction of each output; all of its elements alike would hide signs.
    direction = torch.randn_like(y[0])
    norms = []
    for output in y:
        (grad,) = torch.autograd.grad((output * direction).sum(), x, retain_graph=True)
        norms.append(grad[0].norm().item())
    return norms


@torch.no_grad()
def scaled_rnn(radius: float, like: Tensor) -> fused_rnn.RNN:
    """A simple RNN whose recurrent matrix has this spectral radius: an orthogonal one, scaled."""
    layer = fused_rnn.RNN(HIDDEN, HIDDEN, bias=False).to(like)
    nn.init.orthogonal_(layer.weight_ih_l0)
    nn.init.orthogonal_(layer.weight_hh_l0)
    layer.weight_hh_l0 *= radius
    return layer


@torch.no_grad()
def remembering_lstm() -> fused_rnn.LSTM:
    """An LSTM that keeps what its cells hold: its forget gates start near 1."""
    layer = fused_rnn.LSTM(HIDDEN, HIDDEN)
    layer.bias_ih_l0[HIDDEN : 2 * HIDDEN] = 3
    return layer


def slope(norms: list[float]) -> float:
    """The mean logarithmic growth per step."""
    return math.log(norms[-1] / norms[0]) / (len(norms) - 1)


def clipped(layer: nn.Module, x: Tensor, limit: float) -> tuple[float, float]:
    """The norm of all parameters' gradients for a loss on the last output, then clipped."""
    layer.zero_grad()
    layer(x)[0][-1].square().sum().backward()
    before = nn.utils.clip_grad_norm_(layer.parameters(), limit).item()
    grads = torch.cat([p.grad.flatten() for p in layer.parameters()])
    return before, grads.norm().item()


def main(argv: list[str] | None = None) -> int:
    parser = common.Parser(__doc__, cell=None, steps=(60, 20), steps_help="timesteps")
    args = parser.parse(argv)
    x = torch.randn(args.steps, 1, HIDDEN, dtype=torch.float64, device=args.device)
    figure, axes = common.plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    (by_cell, by_radius), (saturated, clipping) = axes

    layers = {name: layer(HIDDEN, HIDDEN).to(x) for name, layer in common.LAYERS.items()}
    layers["lstm, forget bias 3"] = remembering_lstm().to(x)
    flows = {name: flow(layer, x) for name, layer in layers.items()}
    for name, norms in flows.items():
        by_cell.semilogy(norms, label=name)
    by_cell.set_title("three cells as torch initialises them")

    errors, before, after = [], [], []
    for radius in RADII:
        layer = scaled_rnn(radius, x)
        near_zero, large = flow(layer, 1e-20 * x), flow(layer, x)
        errors.append(abs(slope(near_zero) - math.log(radius)))
        by_radius.semilogy(near_zero, label=f"radius {radius}")
        saturated.semilogy(large, label=f"radius {radius}")
        norms = clipped(layer, 0.01 * x, limit=1.0)
        before.append(norms[0])
        after.append(norms[1])
    by_radius.set_title("simple RNN, inputs near zero")
    saturated.set_title("simple RNN, inputs of size 1: tanh saturates")
    for axis in (by_cell, by_radius, saturated):
        axis.set(xlabel="t", ylabel="|d y_t / d x_0|")
        axis.legend()
    clipping.semilogy(RADII, before, "o-", label="before clipping")
    clipping.semilogy(RADII, after, "s--", label="after clipping to 1")
    clipping.set(xlabel="spectral radius", ylabel="norm of the parameters' gradients")
    clipping.legend()
    common.save_picture(args, "gradient_flow", figure)

    table = common.Table("", "y_0", f"y_{args.steps - 1}", "per step", title="gradient at x_0")
    for name, norms in flows.items():
        row = (f"{norms[0]:.1e}", f"{norms[-1]:.1e}", f"times {math.exp(slope(norms)):.2f}")
        table.add_row(name, *row)
    common.console.print(table)
    results = [
        common.Result(
            "log of growth per step against log of spectral radius: largest error",
            max(errors), max(abs(math.log(radius)) for radius in RADII), "growth 1 for all",
            goal=1e-6, higher_is_better=False,
        ),
        common.Result(
            "gradient norm after clipping to 1", max(after), max(before), "before clipping",
            goal=1.0001, higher_is_better=False,
        ),
    ]  # fmt: skip
    return common.report(args, "gradient_flow", results)


if __name__ == "__main__":
    raise SystemExit(main())

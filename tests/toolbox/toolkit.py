"""What the tests of PyTorch's toolbox share: modules of every kind, inputs, comparison."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field

import pytest
import torch
from helpers import outcomes
from helpers.outcomes import flat
from torch import Tensor, nn

I, H, P, T, B = 3, 5, 2, 6, 7  # all different, for compilers take equal sizes to be one  # noqa: E741

LAYERS = {
    "rnn_tanh": ("RNN", {"nonlinearity": "tanh"}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "gru": ("GRU", {}),
    "lstm": ("LSTM", {}),
    "lstm_proj": ("LSTM", {"proj_size": P}),
}
CELLS = {
    "rnn_tanh_cell": ("RNNCell", {"nonlinearity": "tanh"}),
    "rnn_relu_cell": ("RNNCell", {"nonlinearity": "relu"}),
    "gru_cell": ("GRUCell", {}),
    "lstm_cell": ("LSTMCell", {}),
}
VARIANTS = LAYERS | CELLS
# Between them they have what the others have: a c or none, a projection, several gates.
REPRESENTATIVE = {"gru", "lstm_proj", "lstm_cell"}
with_and_without_hx = pytest.mark.parametrize(
    "with_hx",
    [pytest.param(False, id="zeros", marks=pytest.mark.slow), pytest.param(True, id="hx")],
)


@dataclass
class Maker:
    """Makes modules of the library under test, and inputs for them."""

    library: object

    def __call__(self, variant: str, **options) -> nn.Module:
        name, extra = VARIANTS[variant]
        torch.manual_seed(1)
        return getattr(self.library, name)(I, H, **extra, **options)

    def pair(self, variant: str, **options) -> tuple[nn.Module, nn.Module]:
        """A module of the library, and torch.nn's with parameters of its own and equal values."""
        module = self(variant, **options)
        return module, twin(module, variant, **options)


def twin(module: nn.Module, variant: str, **options) -> nn.Module:
    name, extra = VARIANTS[variant]
    other = getattr(nn, name)(I, H, **extra, **options)
    other.load_state_dict(copy.deepcopy(module.state_dict()))
    return other.train(module.training)


@dataclass
class Inputs:
    """Random inputs that fit a module: `x` and, if asked for, its states."""

    module: nn.Module
    with_hx: bool = False
    timesteps: int = T
    batch: int = B
    dtype: torch.dtype = torch.float32
    args: tuple = field(init=False)

    def __post_init__(self) -> None:
        m, batch = self.module, self.batch
        if isinstance(m, nn.RNNCellBase):
            leading, layers = (batch,), ()
            widths = [m.hidden_size, m.hidden_size]
        else:
            leading = (batch, self.timesteps) if m.batch_first else (self.timesteps, batch)
            layers = (m.num_layers * (2 if m.bidirectional else 1),)
            widths = [m.proj_size or m.hidden_size, m.hidden_size]
        x = torch.randn(*leading, m.input_size, dtype=self.dtype)
        states = [torch.randn(*layers, batch, width, dtype=self.dtype) for width in widths]
        hx = tuple(states) if "LSTM" in m._get_name() else states[0]
        self.args = (x, hx) if self.with_hx else (x,)


# float32 of one library against that of another.
near = functools.partial(outcomes.near, rtol=1e-4, atol=1e-5)


def loss_of(outputs) -> Tensor:
    """A scalar that every output has its own part in."""
    return sum(((i + 1) * leaf.sin()).sum() for i, leaf in enumerate(flat(outputs)))


def train_step(call, module: nn.Module, *args) -> list[Tensor]:
    """Outputs of `call`, and the gradients of the arguments and of the parameters of `module`."""
    args = torch.utils._pytree.tree_map(lambda t: t.detach().clone().requires_grad_(), args)
    module.zero_grad()
    outputs = call(*args)
    loss_of(outputs).backward()
    grads = [p.grad for _, p in sorted(module.named_parameters())]
    return [leaf.detach() for leaf in flat(outputs)] + [a.grad for a in flat(args)] + grads

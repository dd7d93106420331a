"""The inputs of a case and how a module is called on them, the same for torch.nn and fused_rnn."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from cases import Case

LAYERS = {"rnn": torch.nn.RNN, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}
Results = dict[str, Tensor]  # what providers have to agree on, by name


@dataclass(frozen=True)
class Data:
    """Random inputs of one case: normal values, weights as torch.nn draws them."""

    layer: torch.nn.RNNBase  # torch.nn's; the weights of every provider
    x: Tensor | PackedSequence  # [T, B, I]; packed: [N, I], N the sum of the lengths
    states: tuple[Tensor, ...]  # h0 [layers*D, B, H], and c0 for LSTM, for a step; else empty
    cotangent: Tensor  # the gradient of y, of its shape [T, B, D*H] or [N, D*H]

    @property
    def args(self) -> tuple:
        """What the module is called with: x, and the states as the cell takes them."""
        if not self.states:
            return (self.x,)
        return self.x, self.states if len(self.states) > 1 else self.states[0]

    @property
    def rows(self) -> int:
        """N: input rows over all timesteps, T*B unless packed."""
        return self.cotangent.shape[:-1].numel()


def make_data(case: Case, seed: int = 0) -> Data:
    """Data in the dtype of the case, the same for the same seed."""
    dtype = getattr(torch, case.dtype)
    directions = 1 + case.bidirectional
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = LAYERS[case.cell](
            case.I, case.H, case.layers, bidirectional=case.bidirectional, dtype=dtype
        )
        x = torch.randn(case.T, case.B, case.I, dtype=dtype)
        if case.mode == "packed":
            # Falling, so that packing sorts nothing; the longest is T, as padding has it.
            lengths = torch.randint(1, case.T + 1, (case.B,)).sort(descending=True).values
            lengths[0] = case.T
            packed = pack_padded_sequence(x, lengths)
            x = PackedSequence(packed.data.requires_grad_(), packed.batch_sizes)
            leading = packed.data.shape[:1]
        else:
            x.requires_grad_(case.has_grad)
            leading = x.shape[:2]
        shape = (case.layers * directions, case.B, case.H)
        count = (2 if case.cell == "lstm" else 1) if case.mode == "step" else 0
        states = tuple(torch.randn(shape, dtype=dtype) for _ in range(count))
        cotangent = torch.randn(*leading, directions * case.H, dtype=dtype)
    return Data(layer, x, states, cotangent)


def module_call(
    module: torch.nn.Module, case: Case, data: Data
) -> tuple[Callable[[], object], Callable[[object], Results]]:
    """One call of a module, and what turns that which it returns into named results.

    They are apart so that only the first is timed.
    """
    if case.mode == "step":
        args = data.args
        return (lambda: module(*args)), _step_results
    if case.mode == "inference":
        return (lambda: module(data.x)[0]), lambda y: {"y": y}

    parameters = dict(module.named_parameters())
    x = data.x.data if case.mode == "packed" else data.x
    leaves = [x, *parameters.values()]
    names = ["y", "grad x", *(f"grad {name}" for name in parameters)]

    def train() -> list[Tensor]:
        y = module(data.x)[0]
        y = y.data if case.mode == "packed" else y
        return [y.detach(), *torch.autograd.grad(y, leaves, data.cotangent)]

    return train, lambda results: dict(zip(names, results, strict=True))


def _step_results(output: tuple) -> Results:
    y, state = output
    states = state if isinstance(state, tuple) else (state,)
    return {"y": y} | dict(zip(("h_n", "c_n"), states, strict=False))


def expected_results(case: Case, data: Data) -> Results:
    """torch.nn's results; for a half type, those of float32 arithmetic on the same numbers."""
    if case.dtype != "bfloat16":
        call, results = module_call(data.layer, case, data)
    else:
        x = data.x
        if case.mode == "packed":
            x = PackedSequence(x.data.detach().float().requires_grad_(), x.batch_sizes)
        else:
            x = x.detach().float().requires_grad_(case.has_grad)
        states = tuple(state.float() for state in data.states)
        wide = Data(copy.deepcopy(data.layer).float(), x, states, data.cotangent.float())
        call, results = module_call(wide.layer, case, wide)
    with torch.set_grad_enabled(case.has_grad):
        return results(call())

"""The inputs of a case and how a module is called on them, the same for torch.nn and fused_rnn."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from harness.cases import GATES, Case
from harness.loop import Loop
from harness.precision import gpu_precision

LAYERS = {"rnn": torch.nn.RNN, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}
Results = dict[str, Tensor]  # what providers have to agree on, by name

# Words per sentence of Python's language reference (pydoc_data.topics of 3.11, 4542 sentences):
# every twentieth quantile, and in the last place what stands for T.
SENTENCES = (2, 3, 3, 4, 5, 7, 8, 9, 11, 12, 13, 14, 16, 17, 19, 21, 24, 28, 33, 40)
# Inputs in turn on a GPU, together this many times its L2 cache: as from an earlier layer, they
# come from memory.
ROTATION = 2
MOST_INPUTS = 8


@dataclass(frozen=True)
class Data:
    """Random inputs of one case: normal values, weights as torch.nn draws them."""

    layer: torch.nn.RNNBase  # torch.nn's; the weights of every provider
    xs: tuple[Tensor | PackedSequence, ...]  # [T, B, I]; packed: [N, I], N the sum of the lengths
    states: tuple[Tensor, ...]  # h0 [layers*D, B, H], and c0 for LSTM, for a step; else empty
    cotangent: Tensor  # the gradient of y, of its shape [T, B, D*H] or [N, D*H]
    resets: Tensor | None = None  # bool [T, B]

    @property
    def x(self) -> Tensor | PackedSequence:
        """The input that results are compared on."""
        return self.xs[0]

    @property
    def args(self) -> tuple:
        """What the module is called with: x, and the states as the cell takes them."""
        return self.args_of(self.x)

    def args_of(self, x: Tensor | PackedSequence) -> tuple:
        if not self.states:
            return (x,)
        return x, self.states if len(self.states) > 1 else self.states[0]

    @property
    def kwargs(self) -> dict[str, Tensor]:
        return {} if self.resets is None else {"resets": self.resets}

    @property
    def rows(self) -> int:
        """N: input rows over all timesteps, T*B unless packed."""
        return self.cotangent.shape[:-1].numel()

    def in_turn(self, call: Callable[[Tensor | PackedSequence], object]) -> Callable[[], object]:
        """`call` on the inputs one after the other, beginning with the first."""
        if len(self.xs) == 1:
            return lambda: call(self.xs[0])
        inputs = cycle(self.xs)
        return lambda: call(next(inputs))


def make_data(case: Case, device: str = "cpu", seed: int = 0) -> Data:
    """Data in the dtype of the case, the same for the same seed."""
    dtype = getattr(torch, case.dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = LAYERS[case.cell](
            case.I, case.H, case.layers, bidirectional=case.bidirectional, dtype=dtype
        )
        if case.heads > 1:
            _clear_outside_heads(layer, case)
        lengths = _draw_lengths(case) if case.mode == "packed" else None
        leading = (case.T, case.B) if lengths is None else (int(lengths.sum()),)
        x = torch.randn(case.T, case.B, case.I, dtype=dtype)
        shape = (case.layers * case.directions, case.B, case.H)
        count = (2 if case.cell == "lstm" else 1) if case.mode == "step" else 0
        states = tuple(torch.randn(shape, dtype=dtype) for _ in range(count))
        cotangent = torch.randn(*leading, case.directions * case.H, dtype=dtype)
        resets = torch.rand(case.T, case.B) < case.resets if case.resets else None
    inputs = []
    for number in range(_input_count(x, device)):
        # Rolled over the batch: other addresses, no further drawing of random numbers.
        each = x.roll(number, 1).to(device)
        if lengths is not None:
            packed = pack_padded_sequence(each, lengths)
            inputs.append(PackedSequence(packed.data.requires_grad_(), packed.batch_sizes))
        else:
            inputs.append(each.requires_grad_(case.has_grad))
    return Data(
        layer.to(device),
        tuple(inputs),
        tuple(state.to(device) for state in states),
        cotangent.to(device),
        None if resets is None else resets.to(device),
    )


def _input_count(x: Tensor, device: str) -> int:
    if not device.startswith("cuda"):
        return 1
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
    return min(MOST_INPUTS, 1 + ROTATION * cache // x.nbytes)


def _draw_lengths(case: Case) -> Tensor:
    """Falling, so that packing sorts nothing; the longest is T, as padding has it."""
    if case.lengths == "uniform":
        lengths = torch.randint(1, case.T + 1, (case.B,))
    else:
        words = torch.tensor(SENTENCES)[torch.randint(len(SENTENCES), (case.B,))]
        lengths = (words * case.T / SENTENCES[-1]).round().long().clamp(1, case.T)
    lengths = lengths.sort(descending=True).values
    lengths[0] = case.T
    return lengths


def head_mask(case: Case, device: torch.device) -> Tensor:
    """[G*H, H]: 1 where W_hh has a block of a head, else 0."""
    size = case.H // case.heads
    block = torch.block_diag(*[torch.ones(size, size)] * case.heads)
    return block.repeat(GATES[case.cell], 1).to(device)


def _clear_outside_heads(layer: torch.nn.RNNBase, case: Case) -> None:
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.startswith("weight_hh"):
                parameter.mul_(head_mask(case, parameter.device).to(parameter.dtype))


def module_call(
    module: torch.nn.Module, case: Case, data: Data
) -> tuple[Callable[[], object], Callable[[object], Results]]:
    """One call of a module, and what turns that which it returns into named results.

    They are apart so that only the first is timed. Inputs come in turn, see `Data.in_turn`.
    """
    if case.mode == "step":
        return data.in_turn(lambda x: module(*data.args_of(x), **data.kwargs)), _step_results
    if case.mode == "inference":
        return data.in_turn(lambda x: module(x, **data.kwargs)[0]), lambda y: {"y": y}
    parameters = dict(module.named_parameters())
    names = [name.rsplit(".", 1)[-1] for name in parameters]
    return training_call(
        lambda x: module(x, **data.kwargs)[0], list(parameters.values()), names, data
    )


def training_call(
    forward: Callable[[Tensor | PackedSequence], Tensor | PackedSequence],
    parameters: list[Tensor],
    names: Sequence[str],
    data: Data,
) -> tuple[Callable[[], object], Callable[[object], Results]]:
    """As `module_call`, for anything that torch differentiates: forward, then all gradients."""

    def train(x: Tensor | PackedSequence) -> list[Tensor]:
        y, leaf = forward(x), x
        if isinstance(x, PackedSequence):
            y, leaf = y.data, x.data
        return [y.detach(), *torch.autograd.grad(y, [leaf, *parameters], data.cotangent)]

    def results(tensors: object) -> Results:
        named = dict(zip(["y", "x", *names], tensors, strict=True))
        y = named.pop("y")
        return {"y": y} | {f"grad {name}": grad for name, grad in named.items()}

    return data.in_turn(train), results


def _step_results(output: tuple) -> Results:
    y, state = output
    states = state if isinstance(state, tuple) else (state,)
    return {"y": y} | dict(zip(("h_n", "c_n"), states, strict=False))


def expected_results(case: Case, data: Data) -> Results:
    """What providers are compared with, of the same numbers.

    On a CPU torch.nn's results; for a half type, those of float32 arithmetic. On a GPU those of
    float64 without cuDNN, since cuDNN is one of those compared. Resets, which torch.nn lacks, by
    the plain loop.
    """
    gpu = data.cotangent.is_cuda
    dtype = {"float32": torch.float32, "float64": torch.float64}.get(case.dtype, torch.float32)
    dtype = torch.float64 if gpu else dtype
    wide = _converted(case, data, dtype)
    module = Loop(wide.layer, case) if wide.resets is not None else wide.layer
    call, results = module_call(module, case, wide)
    with torch.set_grad_enabled(case.has_grad), gpu_precision(tf32=False, cudnn=not gpu):
        return masked(case, results(call()))


def masked(case: Case, results: Results) -> Results:
    """Without what heads leave open: gradients of weights outside their blocks."""
    if case.heads > 1:
        for name in [n for n in results if n.startswith("grad weight_hh")]:
            gradient = results[name]
            results[name] = gradient * head_mask(case, gradient.device).to(gradient.dtype)
    return results


def _converted(case: Case, data: Data, dtype: torch.dtype) -> Data:
    """The data with its first input only, in another dtype."""
    x = data.x
    if x.data.dtype == dtype and len(data.xs) == 1:
        return data
    if case.mode == "packed":
        x = PackedSequence(x.data.detach().to(dtype).requires_grad_(), x.batch_sizes)
    else:
        x = x.detach().to(dtype).requires_grad_(case.has_grad)
    return replace(
        data,
        layer=copy.deepcopy(data.layer).to(dtype),
        xs=(x,),
        states=tuple(state.to(dtype) for state in data.states),
        cotangent=data.cotangent.to(dtype),
    )

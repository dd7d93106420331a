"""What tests and benchmarks share: layer inputs, the three ways of computing them, comparison.

The tolerance rule has no numbers chosen per test. A result in some dtype is compared to
`plain.layer` run in float64 on the very same inputs, and may be wrong by at most twice as much as
torch.nn's own result in that dtype is, plus a few roundings of the dtype (see `ROUNDINGS`).
Errors are measured twice: over the whole tensor, and at its worst element, for which twice that
is allowed, since one element of many is a matter of luck.

Importing fused_rnn does not import this module.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import Tensor

from . import dispatch, ops, plain
from .cells import CELLS, state_dtype
from .layer_call import BackwardCall, LayerCall, LayerResult, make_problem
from .modules import make_module as make_module
from .problem import Masks

# How many machine epsilons a result may be off where torch.nn happens to be exact: as much as the
# few roundings between input and output that every algorithm has. Largest seen over 16000 random
# comparisons per backend at the smallest shapes, where torch.nn is lucky most often: 3.0.
ROUNDINGS = 4
# And for each square root of the number of terms in the longest sum, in the precision sums are
# kept in: a matrix product over all rows at once collects so many roundings, at random, where
# torch.nn, which adds up one product per timestep, collects fewer. Largest seen, over the 4257
# rows of a batch of 129 in 33 timesteps: 0.18.
ROUNDINGS_PER_ROOT_TERM = 0.25
# In float64 the oracle rounds as well, and just as torch.nn does, so that torch.nn's error looks
# like zero whatever it is; what is left is the number of roundings along the sequence.
ROUNDINGS_FLOAT64 = 64
# How often a row starts afresh, where it does.
RESET_CHANCE = 0.25
# The cells that torch.nn has too.
TORCH_CELLS = tuple(name for name, cell in CELLS.items() if cell.in_torch)
# Results of small layers are compared over so many draws that every tensor has this many elements:
# in a single number, cancellation can make any relative error large, and luck make it zero.
ELEMENTS_TO_COMPARE = 32

Outputs = tuple[Tensor, ...]  # y, h_n[, c_n]


@dataclass(frozen=True)
class LayerCase:
    """One layer call: which cell, and how large. `make_inputs` draws tensors for it."""

    cell: str
    timesteps: int
    batch_size: int
    input_size: int
    hidden_size: int
    directions: int = 1
    bias: bool = True
    proj_size: int = 0  # 0: no projection
    lengths: tuple[int, ...] = ()  # of each batch row, non-increasing, when packed; else empty
    ends: tuple[int, ...] = ()  # of each batch row, where a padded batch has lengths; else empty
    resets: bool = False  # whether rows start afresh here and there
    reset_states: bool = False  # and with states that are given, not zeros
    states: bool = False  # whether c after each step is an output; LSTM only
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.lengths:
            fits = len(self.lengths) == self.batch_size and self.lengths[0] == self.timesteps
            if not fits or list(self.lengths) != sorted(self.lengths, reverse=True):
                raise ValueError(
                    f"lengths: expected {self.batch_size} non-increasing lengths from "
                    f"{self.timesteps} on, got {list(self.lengths)}"
                )

    @classmethod
    def packed(cls, cell: str, lengths: Sequence[int], *sizes: int, **options) -> LayerCase:
        """The case of packed rows of these `lengths`; `sizes` are input_size and hidden_size."""
        return cls(cell, lengths[0], len(lengths), *sizes, lengths=tuple(lengths), **options)

    @property
    def output_size(self) -> int:
        """P: the width of h, and of y per direction."""
        return self.proj_size or self.hidden_size

    def __str__(self) -> str:
        traits = [
            f"T{self.timesteps}-B{self.batch_size}-I{self.input_size}-H{self.hidden_size}",
            f"P{self.proj_size}" if self.proj_size else "",
            "bidirectional" if self.directions == 2 else "",
            "" if self.bias else "no_bias",
            "packed" + ".".join(map(str, self.lengths)) if self.lengths else "",
            "ends" + ".".join(map(str, self.ends)) if self.ends else "",
            "resets" if self.resets else "",
            "reset_states" if self.reset_states else "",
            "states" if self.states else "",
        ]
        return "-".join(filter(None, traits))


@dataclass(frozen=True)
class LayerInputs:
    """The arguments of `ops.layer`."""

    cell: str
    x: Tensor  # [T, B, I], or [N, I] when packed
    h0: Tensor  # [D, B, P]
    c0: Tensor | None  # [D, B, H], LSTM only
    weights: list[Tensor]
    batch_sizes: Tensor | None  # int64 [T] on the CPU, when packed
    masks: Masks = Masks()  # noqa: RUF009 (an immutable tuple)
    states: bool = False

    @property
    def args(self) -> tuple:
        return self.cell, self.x, self.h0, self.c0, self.weights, self.batch_sizes, self.masks

    def forward_args(self, save: bool, backend: str, recompute: bool = False) -> tuple:
        """The arguments of fused_rnn::layer_forward."""
        return tuple(self._call(save, backend, recompute))

    def _call(self, save: bool, backend: str, recompute: bool) -> LayerCall:
        return LayerCall(
            self.x, self.h0, self.c0, self.weights, self.batch_sizes, *self.masks,
            self.cell, save, self.states, recompute, backend,
        )  # fmt: skip

    def backward_args(
        self,
        grads: Mapping[str, Tensor],  # of the outputs, by their names
        saved: Sequence[Tensor],  # y, gates, cells
        needs: Sequence[bool],  # of x, h0, c0, reset_h, reset_c, *weights
        backend: str,
        recompute: bool = False,
    ) -> tuple:
        """The arguments of fused_rnn::layer_backward."""
        given, call = tuple(map(grads.get, OUTPUT_NAMES)), self._call(True, backend, recompute)
        return BackwardCall(given, call, tuple(saved), needs).arguments

    @property
    def given(self) -> list[bool]:
        """Which of x, h0, c0, reset_h, reset_c, *weights there are."""
        return [t is not None for t in self.differentiable]

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """x, h0, c0, reset_h, reset_c, *weights."""
        return self._call(True, "", False).differentiable

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that can ask for a gradient, by name."""
        named = {"x": self.x, "h0": self.h0}
        optional = {"c0": self.c0, "reset_h": self.masks.reset_h, "reset_c": self.masks.reset_c}
        named |= {name: tensor for name, tensor in optional.items() if tensor is not None}
        names = ["w_ih", "w_hh"]
        per_direction = len(self.weights) // self.h0.shape[0]
        names += ["b_ih", "b_hh"] if per_direction >= 4 else []
        names += ["w_hr"] if per_direction in (3, 5) else []
        for i, weight in enumerate(self.weights):
            reverse = "_reverse" if i >= per_direction else ""
            named[names[i % per_direction] + reverse] = weight
        return named

    def map(self, function: Callable[[Tensor], Tensor]) -> LayerInputs:
        """The same inputs with `function` applied to each of `tensors`."""
        return replace(
            self,
            x=function(self.x),
            h0=function(self.h0),
            c0=None if self.c0 is None else function(self.c0),
            weights=[function(w) for w in self.weights],
            masks=self.masks._replace(
                **{
                    name: None if tensor is None else function(tensor)
                    for name, tensor in self.masks._asdict().items()
                    if name.startswith("reset_")
                }
            ),
        )

    def leaves(self, dtype: torch.dtype | None = None) -> LayerInputs:
        """Copies that ask for gradients, in `dtype` if it is given."""
        return self.map(lambda t: t.detach().to(dtype or t.dtype, copy=True).requires_grad_())


def make_inputs(case: LayerCase, seed: int = 0) -> LayerInputs:
    """Fresh random inputs: normal x and states, weights as torch.nn initialises them."""
    generator = torch.Generator().manual_seed(seed)
    gates = CELLS[case.cell].gates
    rows = sum(case.lengths)
    out, hidden, directions = case.output_size, case.hidden_size, case.directions

    def normal(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.to(case.device, case.dtype)

    def uniform(*shape: int) -> Tensor:
        values = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
        return (values / hidden**0.5).to(case.device, case.dtype)

    weights = []
    for _ in range(directions):
        weights += [uniform(gates * hidden, case.input_size), uniform(gates * hidden, out)]
        if case.bias:
            weights += [uniform(gates * hidden), uniform(gates * hidden)]
        if case.proj_size:
            weights.append(uniform(out, hidden))
    leading = (rows,) if case.lengths else (case.timesteps, case.batch_size)
    has_c = CELLS[case.cell].has_c
    x, h0 = normal(*leading, case.input_size), normal(directions, case.batch_size, out)
    c0 = normal(directions, case.batch_size, hidden) if has_c else None
    masks = Masks()
    if case.ends:
        masks = masks._replace(lengths=torch.tensor(case.ends, device=case.device))
    if case.resets:
        chance = torch.rand(leading, generator=generator)
        masks = masks._replace(resets=(chance < RESET_CHANCE).to(case.device))
    if case.reset_states:
        reset_c = normal(directions, case.batch_size, hidden) if has_c else None
        masks = masks._replace(reset_h=normal(directions, case.batch_size, out), reset_c=reset_c)
    return LayerInputs(
        cell=case.cell,
        x=x,
        h0=h0,
        c0=c0,
        weights=weights,
        batch_sizes=batch_sizes_of(case.lengths) if case.lengths else None,
        masks=masks,
        states=case.states,
    )


def batch_sizes_of(lengths: Sequence[int]) -> Tensor:
    """int64 [T]: how many of the rows, sorted by falling length, each timestep has."""
    return torch.tensor([sum(length > t for length in lengths) for t in range(lengths[0])])


def backends_on(device_type: str) -> list[str]:
    """The names of the backends that may be chosen for tensors there."""
    return [b.name for b in dispatch.BACKENDS.values() if b.device_type in (None, device_type)]


@contextmanager
def cpu_capability(name: str) -> Iterator[None]:
    """The CPU library with the instruction set of that name, or its error where there is none."""
    forget = torch.ops.fused_rnn_cpu.forget_capability  # it asks the environment once
    with mock.patch.dict(os.environ, FUSED_RNN_CPU_CAPABILITY=name):
        forget()
        try:
            yield
        finally:
            forget()


def refusal(backend: str, inputs: LayerInputs, training: bool = True) -> str | None:
    """Why the backend of that name cannot take these inputs, or None if it can."""
    problem = make_problem(*inputs.args, training, inputs.states)
    reason = dispatch.find(backend).unsupported(problem)
    return reason and f"{backend}: {reason}"


def run_layer(inputs: LayerInputs) -> Outputs:
    """What is tested: (y, h_n[, c_n]) by the backend in force."""
    return _outputs(ops.layer(*inputs.args, states=inputs.states))


def run_oracle(inputs: LayerInputs) -> Outputs:
    """The same by the cells' equations as they are written down."""
    return _outputs(plain.layer(*inputs.args, states=inputs.states))


def run_torch(inputs: LayerInputs) -> Outputs:
    """The same by what torch.nn.RNN, GRU and LSTM call, and what they do not have by a plain loop
    over torch operations."""
    if inputs.cell not in TORCH_CELLS or inputs.states or any(m is not None for m in inputs.masks):
        return run_oracle(inputs)
    per_direction = len(inputs.weights) // inputs.h0.shape[0]
    training = inputs.x.is_cuda  # without it cuDNN has no backward
    options = [per_direction >= 4, 1, 0.0, training, inputs.h0.shape[0] == 2]
    hx = inputs.h0 if inputs.c0 is None else (inputs.h0, inputs.c0)
    function = getattr(torch._VF, inputs.cell)
    if inputs.batch_sizes is None:
        return function(inputs.x, hx, inputs.weights, *options, False)
    return function(inputs.x, inputs.batch_sizes, hx, inputs.weights, *options)


def _outputs(result: LayerResult) -> Outputs:
    """A layer's outputs as the operators lay them out: cells [D, N, H]."""
    y, h_n, c_n, cells = result
    if cells is not None and cells.dim() == 4:
        cells = cells.flatten(1, 2)
    return tuple(o for o in (y, h_n, c_n, cells) if o is not None)


OUTPUT_NAMES = ("y", "h_n", "c_n", "cells")


def make_cotangents(case: LayerCase, loss: str = "all", seed: int = 1) -> dict[str, Tensor]:
    """Random gradients of the outputs that the loss reads: of "all" of them, or of one by name."""
    generator = torch.Generator().manual_seed(seed)
    leading = (sum(case.lengths),) if case.lengths else (case.timesteps, case.batch_size)
    shapes = {
        "y": (*leading, case.directions * case.output_size),
        "h_n": (case.directions, case.batch_size, case.output_size),
    }
    if CELLS[case.cell].has_c:
        shapes["c_n"] = (case.directions, case.batch_size, case.hidden_size)
    if case.states:
        rows = sum(case.lengths) or case.timesteps * case.batch_size
        shapes["cells"] = (case.directions, rows, case.hidden_size)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(
            case.device, case.dtype
        )
        for name, shape in shapes.items()
        if loss in ("all", name)
    }


def results_and_grads(
    run: Callable[[LayerInputs], Outputs], inputs: LayerInputs, cotangents: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Outputs of `run`, and the gradients of all its inputs as "grad x" and so on, by name.

    `inputs` must be leaves that ask for gradients.
    """
    outputs = dict(zip(OUTPUT_NAMES, run(inputs), strict=False))
    tensors = inputs.tensors
    grads = torch.autograd.grad(
        [outputs[name] for name in cotangents],
        list(tensors.values()),
        [c.to(outputs[name].dtype) for name, c in cotangents.items()],
        allow_unused=True,
        materialize_grads=True,
    )
    named = {f"grad {name}": grad for name, grad in zip(tensors, grads, strict=True)}
    return {name: out.detach() for name, out in outputs.items()} | named


def results_of_draws(
    run: Callable[[LayerInputs], Outputs],
    case: LayerCase,
    loss: str = "all",
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """`results_and_grads` of `run` for as many random draws as `ELEMENTS_TO_COMPARE` asks for,
    stacked along a new first dimension. `dtype` is what the inputs are converted to."""
    smallest = min(t.numel() for t in make_inputs(case).tensors.values())
    draws = -(-ELEMENTS_TO_COMPARE // smallest) if smallest else 1
    results = [
        results_and_grads(
            run, make_inputs(case, seed).leaves(dtype), make_cotangents(case, loss, draws + seed)
        )
        for seed in range(draws)
    ]
    return {name: torch.stack([result[name] for result in results]) for name in results[0]}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| over the whole tensor, in float64; 0/0 counts as 0."""
    error = torch.linalg.vector_norm(actual.double() - expected.double()).item()
    scale = torch.linalg.vector_norm(expected.double()).item()
    return error / scale if scale else (0.0 if error == 0 else float("inf"))


def worst_element_error(actual: Tensor, expected: Tensor) -> float:
    """The largest |actual - expected| over the largest |expected|, in float64."""
    if expected.numel() == 0:
        return 0.0
    error = (actual.double() - expected.double()).abs().max().item()
    scale = expected.double().abs().max().item()
    return error / scale if scale else (0.0 if error == 0 else float("inf"))


def assert_near(
    name: str, actual: Tensor, expected: Tensor, norm_bound: float, element_bound: float
) -> None:
    """`actual` has the shape of `expected`, NaN and infinities in the same places, and elsewhere
    a `relative_error` and a `worst_element_error` within their bounds.

    The bound on elements finds the single wrong one that a norm over many does not show.
    """
    assert actual.shape == expected.shape, (
        f"{name}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    )
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    for kind, mask in (
        ("NaN", torch.isnan),
        ("+inf", torch.isposinf),
        ("-inf", torch.isneginf),
    ):
        differs = mask(actual) != mask(expected)
        if differs.any():
            where = tuple(differs.nonzero()[0].tolist())
            raise AssertionError(
                f"{name}: {int(differs.sum())} of {differs.numel()} elements differ in being "
                f"{kind}, first at {where}: got {actual[where]}, expected {expected[where]}"
            )
    finite = torch.isfinite(expected)
    actual, expected = (torch.where(finite, t, 0.0) for t in (actual, expected))
    errors = relative_error(actual, expected), worst_element_error(actual, expected)
    if errors[0] <= norm_bound and errors[1] <= element_bound:
        return
    distance = (actual - expected).abs()
    where = tuple(int(i) for i in torch.unravel_index(distance.argmax(), distance.shape))
    raise AssertionError(
        f"{name}: relative error {errors[0]:.3g} (allowed {norm_bound:.3g}), of the worst element "
        f"{errors[1]:.3g} of the largest (allowed {element_bound:.3g}), at {where}: "
        f"got {actual[where]:.9g}, expected {expected[where]:.9g}"
    )


def assert_accurate(
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    torch_own: Mapping[str, Tensor],
    case: LayerCase,
) -> None:
    """The tolerance rule (see the module's docstring) for each tensor of `actual`.

    `expected` is the float64 oracle's and `torch_own` torch.nn's in the dtype of `case`.
    """
    assert actual.keys() == expected.keys() == torch_own.keys()
    slack = _slack(case)
    for name, value in actual.items():
        wanted = state_dtype(case.dtype) if name == "cells" else case.dtype
        assert value.dtype == wanted, f"{name}: {value.dtype}, expected {wanted}"
        norm_bound = 2 * relative_error(torch_own[name], expected[name]) + slack
        element_bound = 2 * (2 * worst_element_error(torch_own[name], expected[name]) + slack)
        assert_near(name, value, expected[name], norm_bound, element_bound)


def assert_draws_accurate(actual: dict[str, Tensor], case: LayerCase) -> None:
    """`assert_accurate` of a case's results as `results_of_draws` gives them."""
    exact = results_of_draws(run_oracle, case, "all", torch.float64)
    assert_accurate(actual, exact, results_of_draws(run_torch, case), case)


def _slack(case: LayerCase) -> float:
    """The relative error allowed where torch.nn has none."""
    if case.dtype == torch.float64:
        return ROUNDINGS_FLOAT64 * torch.finfo(case.dtype).eps
    rows = sum(case.lengths) or case.timesteps * case.batch_size
    terms = max(rows, CELLS[case.cell].gates * case.hidden_size, case.input_size)
    sums = ROUNDINGS_PER_ROOT_TERM * terms**0.5 * torch.finfo(state_dtype(case.dtype)).eps
    return ROUNDINGS * torch.finfo(case.dtype).eps + sums


def assert_same_numbers(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], roundings: float = 1000
) -> None:
    """Each pair agrees up to `roundings` machine epsilons: two good ways of computing one thing.

    For float64, where what can go wrong is many orders of magnitude larger.
    """
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert value.dtype == expected[name].dtype, f"{name}: {value.dtype}"
        bound = roundings * torch.finfo(value.dtype).eps
        assert_near(name, value, expected[name], bound, bound)


def assert_float32_under_autocast(module: torch.nn.RNNBase, x: Tensor) -> None:
    """Asserts, of a layer whose bfloat16 runs through float32, that autocast to bfloat16 rounds
    what goes in and out and nothing between, in a backward that it surrounds neither."""
    plain = copy.deepcopy(module)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if name.startswith(("weight_", "bias_")):
                parameter.copy_(parameter.bfloat16())
    parameters = list(module.parameters())
    with torch.autocast(x.device.type, torch.bfloat16):
        y = module(x)[0]
        inside = torch.autograd.grad(y.float().square().sum(), parameters)
        loss = module(x)[0].float().square().sum()
    assert torch.equal(y, plain(x.bfloat16().float())[0].bfloat16())
    assert all(map(torch.equal, torch.autograd.grad(loss, parameters), inside))


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fills fresh memory with NaN inside the `with` block, so that what stays unwritten shows.

    torch does so for every torch.empty and its relatives while deterministic algorithms are
    asked for. The setting is the whole process's and is put back afterwards.
    """
    fill = torch.utils.deterministic.fill_uninitialized_memory
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill

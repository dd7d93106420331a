"""RNN, GRU and LSTM against torch.nn: the whole cross of options, then everything else a module
of torch.nn can be put through."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import fused_rnn

T, B, I, H, P = 5, 3, 4, 6, 2

# name -> class name, arguments that make the variant
VARIANTS = {
    "rnn_tanh": ("RNN", {"nonlinearity": "tanh"}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "gru": ("GRU", {}),
    "lstm": ("LSTM", {}),
    "lstm_proj": ("LSTM", {"proj_size": P}),
}
FORMS = ("padded", "sorted", "unsorted", "unbatched")
LENGTHS = {"sorted": [5, 3, 2], "unsorted": [2, 5, 3]}

every_variant = pytest.mark.parametrize("variant", VARIANTS)


def pair(variant: str, seed: int = 0, **options) -> tuple[nn.Module, nn.Module]:
    """torch.nn's module and ours, each built from the same seed."""
    name, extra = VARIANTS[variant]
    built = []
    for namespace in (nn, fused_rnn):
        torch.manual_seed(seed)
        built.append(getattr(namespace, name)(I, H, **extra, **options))
    return built[0], built[1]


def copies(value):
    """The same nest with leaf tensors of its own."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, PackedSequence):
        return PackedSequence(copies(value.data), *value[1:])
    if isinstance(value, tuple):
        return tuple(copies(item) for item in value)
    return value


def to(value, dtype: torch.dtype):
    """The same nest as leaves of another dtype."""
    if isinstance(value, Tensor):
        return value.detach().to(dtype).requires_grad_(value.requires_grad)
    if isinstance(value, PackedSequence):
        return PackedSequence(to(value.data, dtype), *value[1:])
    if isinstance(value, tuple):
        return tuple(to(item, dtype) for item in value)
    return value


def tensors(name: str, value) -> dict[str, Tensor]:
    """Every tensor with values in a nest, by name."""
    if isinstance(value, PackedSequence):
        return {f"{name}.data": value.data}
    if isinstance(value, tuple):
        return {k: t for i, item in enumerate(value) for k, t in tensors(f"{name}[{i}]", item).items()}
    return {} if value is None else {name: value}


def make_input(form: str, batch_first: bool = False, dtype=torch.float64, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    shape = (T, I) if form == "unbatched" else (B, T, I) if batch_first else (T, B, I)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if form in LENGTHS:
        x = pack_padded_sequence(x, LENGTHS[form], batch_first, enforce_sorted=form == "sorted")
        x.data.requires_grad_()
        return x
    return x.requires_grad_()


def make_states(module: nn.Module, form: str = "padded", dtype=torch.float64, batch: int = B):
    generator = torch.Generator().manual_seed(2)
    layers = module.num_layers * (2 if module.bidirectional else 1)
    batches = () if form == "unbatched" else (batch,)

    def state(width):
        values = torch.randn((layers, *batches, width), generator=generator, dtype=torch.float64)
        return values.to(dtype).requires_grad_()

    h0 = state(module.proj_size or module.hidden_size)
    return (h0, state(module.hidden_size)) if module.mode == "LSTM" else h0


def run(module: nn.Module, *args, seed: int = 3) -> dict[str, Tensor]:
    """Outputs of one call on copies of `args`, and the gradients of everything that asks."""
    args = copies(args)
    module.zero_grad()
    torch.manual_seed(seed)
    outputs = module(*args)
    found = tensors("result", outputs)
    result = {k: t.detach() for k, t in found.items()}
    generator = torch.Generator().manual_seed(4)
    loss = sum(
        (t * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)).sum()
        for t in found.values()
    )
    if loss.requires_grad:
        loss.backward()
    for name, tensor in [*tensors("args", args).items(), *module.named_parameters()]:
        if tensor.requires_grad and tensor.grad is not None:
            result[f"grad of {name}"] = tensor.grad.detach().clone()
    return result


def worst(actual: Tensor, expected: Tensor) -> tuple[float, str]:
    """The largest difference, and where and between what it is."""
    if actual.numel() == 0:
        return 0.0, "nothing"
    difference = (actual.double() - expected.double()).abs()
    at = int(difference.argmax())
    where = [int(i) for i in torch.unravel_index(torch.tensor(at), actual.shape)]
    values = actual.flatten()[at].item(), expected.flatten()[at].item()
    return difference.flatten()[at].item(), f"at {where}: got {values[0]}, expected {values[1]}"


def assert_agree(
    actual: dict[str, Tensor],
    expected: dict[str, Tensor],
    exact: dict[str, Tensor] | None = None,
    roundings: int = 16,
) -> None:
    """Every tensor agrees in place of NaN and inf, shape, dtype and value.

    With `exact`, the same in float64, the error may be twice that of `expected` and some
    roundings of the largest value; without, the difference may be `roundings` roundings.
    """
    assert actual.keys() == expected.keys()
    for name, ours in actual.items():
        theirs = expected[name]
        assert ours.shape == theirs.shape, name
        assert ours.dtype == theirs.dtype, name
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(ours), kind(theirs)), f"{name}: {kind.__name__} differs"
        finite = torch.isfinite(theirs)
        truth = theirs if exact is None else exact[name]
        truth = torch.where(finite, truth, 0)
        scale = truth.abs().max().item() if truth.numel() else 0.0
        bound = roundings * torch.finfo(ours.dtype).eps * scale
        if exact is not None:
            allowance, where = worst(torch.where(finite, theirs, 0), truth)
            # A reference this far off would let anything pass.
            assert allowance <= 64 * bound, f"{name}: torch itself is far from float64, {where}"
            bound += 2 * allowance
        difference, where = worst(torch.where(finite, ours, 0), truth)
        assert difference <= bound, f"{name}: off by {difference:.3g} > {bound:.3g} {where}"


def assert_same(theirs: nn.Module, ours: nn.Module, *args, roundings: int = 2**12) -> None:
    """Both modules give the same outputs and gradients, up to rounding. Meant for float64,
    where the default still is 1e-12."""
    assert_agree(run(ours, *args), run(theirs, *args), roundings=roundings)


def option_cross():
    for variant, layers, dropout in itertools.product(VARIANTS, (1, 2), (0.0, 0.4)):
        if dropout and layers == 1:
            continue  # torch warns that it does nothing; tested by itself
        for bidirectional, bias, batch_first in itertools.product((False, True), repeat=3):
            options = dict(
                num_layers=layers,
                dropout=dropout,
                bidirectional=bidirectional,
                bias=bias,
                batch_first=batch_first,
            )
            words = [variant, str(layers), f"dropout{dropout}" if dropout else ""]
            words += [k for k, v in options.items() if v is True]
            yield pytest.param(variant, options, id="-".join(filter(None, words)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("variant", "options"), option_cross())
def test_options(variant, options, form):
    theirs, ours = pair(variant, **options)
    exact = pair(variant, **options)[0].double()
    ours64 = copy.deepcopy(ours).double()
    x = make_input(form, options["batch_first"])
    for args in ((x,), (x, make_states(ours, form))):
        truth = run(exact, *args)
        assert_agree(run(ours64, *args), truth, roundings=2**12)
        args = to(args, torch.float32)
        exact32 = run(exact, *to(args, torch.float64))
        assert_agree(run(ours, *args), run(theirs, *args), exact32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("variant", "options"), option_cross())
def test_options_in_half_types(variant, options, form, dtype):
    theirs, ours = (module.to(dtype) for module in pair(variant, **options))
    exact = copy.deepcopy(theirs).double()
    x = make_input(form, options["batch_first"], dtype)
    for args in ((x,), (x, make_states(ours, form, dtype))):
        exact_run = run(exact, *to(args, torch.float64))
        assert_agree(run(ours, *args), run(theirs, *args), exact_run, roundings=4)


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_same_parameters_from_same_seed(variant, dtype, layers, bidirectional, bias):
    name, extra = VARIANTS[variant]
    built, states = [], []
    for namespace in (nn, fused_rnn):
        torch.manual_seed(7)
        built.append(
            getattr(namespace, name)(
                I, H, layers, bidirectional=bidirectional, bias=bias, dtype=dtype, **extra
            )
        )
        states.append(torch.get_rng_state())
    theirs, ours = (list(module.named_parameters()) for module in built)
    assert [n for n, _ in ours] == [n for n, _ in theirs]
    for (_, a), (_, b) in zip(ours, theirs, strict=True):
        assert type(a) is nn.Parameter and a.dtype == b.dtype and a.requires_grad
        assert torch.equal(a, b)
    assert torch.equal(*states)
    assert not list(built[1].buffers())


def test_positional_arguments():
    cases = {
        "RNN": (3, 4, 2, "relu", False, True, 0.5, True, "cpu", torch.float64),
        "GRU": (3, 4, 2, False, True, 0.5, True),
        "LSTM": (3, 4, 2, False, True, 0.5, True, 2, "cpu", torch.float64),
    }
    for name, args in cases.items():
        if name == "GRU":  # torch passes what is left on to a base that has proj_size there
            args = (*args[:7],)
        theirs = getattr(nn, name)(*args[:8]) if name != "GRU" else nn.GRU(*args)
        ours = getattr(fused_rnn, name)(*args)
        assert repr(ours) == repr(theirs)
        assert ours.mode == theirs.mode
        if len(args) > 8:
            assert {p.dtype for p in ours.parameters()} == {torch.float64}

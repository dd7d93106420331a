"""RNNCell, GRUCell and LSTMCell against torch.nn's."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers.inputs import spread
from helpers.modules import seeded_pair
from helpers.named_outcomes import (
    assert_accurate,
    assert_accurate_run,
    assert_same,
    copies,
    doubled,
    run,
    to,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fused_rnn
from fused_rnn.testing import assert_same_numbers

T, B, I, H = 5, 3, 4, 6  # noqa: E741

VARIANTS = {
    "tanh": ("RNNCell", {"nonlinearity": "tanh"}),
    "relu": ("RNNCell", {"nonlinearity": "relu"}),
    "gru": ("GRUCell", {}),
    "lstm": ("LSTMCell", {}),
}

every_variant = pytest.mark.parametrize("variant", VARIANTS)
biases = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])


def pair(variant: str, **options) -> tuple[nn.Module, nn.Module]:
    """torch.nn's cell and ours, each built from the same seed."""
    name, extra = VARIANTS[variant]
    return seeded_pair(name, I, H, **extra, **options)


def arguments(variant: str, form: str, with_hx: bool, dtype=torch.float64) -> tuple:
    generator = torch.Generator().manual_seed(1)
    leading = {"batched": (B,), "unbatched": (), "empty": (0,), "one": (1,)}[form]

    def leaf(width: int) -> Tensor:
        values = torch.randn(*leading, width, generator=generator, dtype=torch.float64)
        return values.to(dtype).requires_grad_()

    x = leaf(I)
    if not with_hx:
        return (x,)
    return (x, (leaf(H), leaf(H)) if variant == "lstm" else leaf(H))


@every_variant
@biases
@pytest.mark.parametrize("with_hx", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("form", ["batched", "unbatched", "empty", "one"])
def test_one_step(variant, bias, form, with_hx):
    theirs, ours = pair(variant, bias=bias)
    args = arguments(variant, form, with_hx)
    assert_same(doubled(ours), doubled(theirs), *args)
    assert_accurate_run(ours, theirs, doubled(theirs), *args)


@pytest.mark.slow
@every_variant
@biases
@pytest.mark.parametrize("form", ["batched", "unbatched", "one"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_one_step_in_half_types(variant, bias, form, dtype):
    theirs, ours = (module.to(dtype) for module in pair(variant, bias=bias))
    args = arguments(variant, form, True)
    assert_accurate_run(ours, theirs, doubled(theirs), *args, dtype=dtype, roundings=2)


class Unrolled(nn.Module):
    """A cell in a loop over time, as people write it."""

    def __init__(self, cell: nn.Module):
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor, hx=None):
        outputs = []
        for step in x:
            hx = self.cell(step, hx)
            outputs.append(hx[0] if isinstance(hx, tuple) else hx)
        return torch.stack(outputs), hx


@every_variant
@biases
@pytest.mark.parametrize("with_hx", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("form", ["batched", "unbatched"])
def test_loop_over_time(variant, bias, form, with_hx):
    theirs, ours = map(Unrolled, pair(variant, bias=bias))
    _, *hx = arguments(variant, form, with_hx)
    generator = torch.Generator().manual_seed(5)
    shape = (T, B, I) if form == "batched" else (T, I)
    x = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    assert_same(doubled(ours), doubled(theirs), x, *hx)
    assert_accurate_run(ours, theirs, doubled(theirs), x, *hx)


@every_variant
def test_loop_is_the_layer(variant):
    """A cell in a loop gives what the layer with the same weights gives."""
    _, cell = pair(variant, dtype=torch.float64)
    name, extra = VARIANTS[variant]
    layer = getattr(fused_rnn, name.removesuffix("Cell"))(I, H, dtype=torch.float64, **extra)
    layer.load_state_dict({f"{k}_l0": v for k, v in cell.state_dict().items()})
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(T, B, I, generator=generator, dtype=torch.float64)
    output, hx = Unrolled(cell)(x)
    expected, states = layer(x)
    hx, states = (v if isinstance(v, tuple) else (v,) for v in (hx, states))
    found = {"output": output} | {f"state {i}": s.unsqueeze(0) for i, s in enumerate(hx)}
    assert_same_numbers(
        found, {"output": expected} | {f"state {i}": s for i, s in enumerate(states)}
    )


@every_variant
@biases
def test_parameters_state_dict_and_repr(variant, bias):
    theirs, ours = pair(variant, bias=bias)
    found, expected = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert list(found) == list(expected)
    assert all(torch.equal(found[n], p) for n, p in expected.items())
    assert repr(ours) == repr(theirs)
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata
    for name in ["input_size", "hidden_size", "bias", "bias_ih", "bias_hh"][
        : None if not bias else 3
    ]:
        assert getattr(ours, name) == getattr(theirs, name), name
    for source, target in ((theirs, ours), (ours, theirs)):
        for parameter in source.parameters():
            nn.init.normal_(parameter)
        target.load_state_dict(source.state_dict(), strict=True)
        assert_same(doubled(ours), doubled(theirs), *arguments(variant, "batched", True))
    assert isinstance(ours, nn.RNNCellBase)


def test_positional_arguments():
    for name, args in {
        "RNNCell": (3, 4, False, "relu", "cpu", torch.float64),
        "GRUCell": (3, 4, False, "cpu", torch.float64),
        "LSTMCell": (3, 4, False, "cpu", torch.float64),
    }.items():
        built = []
        for namespace in (nn, fused_rnn):
            torch.manual_seed(0)
            built.append(getattr(namespace, name)(*args))
        theirs, ours = built
        assert repr(ours) == repr(theirs)
        assert torch.equal(ours.weight_hh, theirs.weight_hh)
        assert ours.weight_hh.dtype == torch.float64


@every_variant
def test_copies_and_conversions(variant):
    theirs, ours = pair(variant, dtype=torch.float64)
    args = arguments(variant, "batched", True)
    for twin in (
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        copy.deepcopy(ours).to("meta").to_empty(device="cpu"),
        nn.utils.skip_init(type(ours), I, H, dtype=torch.float64, **VARIANTS[variant][1]),
    ):
        twin.load_state_dict(theirs.state_dict())
        assert type(twin) is type(ours)
        assert_same(twin, theirs, *args)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        twin = copy.deepcopy(ours).to(dtype)
        assert {t.dtype for t in run(twin, *to(args, dtype)).values()} == {dtype}
    meta = copy.deepcopy(ours).to("meta")
    result = meta(args[0].detach().to("meta"))
    result = result[0] if variant == "lstm" else result
    assert result.is_meta and result.shape == (B, H)


@every_variant
def test_non_contiguous(variant):
    _, ours = pair(variant, dtype=torch.float64)
    args = arguments(variant, "batched", True)
    expected = ours(*args)
    for name, weight in list(ours.named_parameters()):
        setattr(ours, name, nn.Parameter(spread(weight)))
    x, hx = args
    hx = tuple(map(spread, hx)) if variant == "lstm" else spread(hx)
    found = ours(spread(x), hx)
    assert not ours.weight_hh.is_contiguous()
    if variant != "lstm":
        found, expected = (found,), (expected,)
    for a, b in zip(found, expected, strict=True):
        assert_same_numbers({"h": a}, {"h": b})


@every_variant
@pytest.mark.parametrize("kind", ["weight_norm", "prune", "frozen", "tied"])
def test_weights_by_other_means(variant, kind):
    theirs, ours = pair(variant, dtype=torch.float64)
    for module in (theirs, ours):
        torch.manual_seed(3)
        if kind == "weight_norm":
            parametrizations.weight_norm(module, "weight_hh")
        elif kind == "prune":
            prune.random_unstructured(module, "weight_hh", 0.5)
        elif kind == "frozen":
            module.weight_hh.requires_grad_(False)
            module.bias_ih.requires_grad_(False)
        else:
            module.bias_hh = module.bias_ih
    assert_same(ours, theirs, *arguments(variant, "batched", True))


@every_variant
@pytest.mark.parametrize("kind", ["given later", "taken away", "of another word", "unknown"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_biases_count_where_they_are(variant, kind, dtype):
    """As in torch.nn, where a cell's forward does not look at its attribute `bias`."""
    theirs, ours = pair(variant, dtype=dtype, bias=kind != "given later")
    for module in (theirs, ours):
        if kind == "of another word":
            module.bias = False
        elif kind == "unknown":
            del module.bias
        else:
            rows = module.weight_ih.shape[0]
            values = torch.linspace(-1, 1, rows, dtype=dtype)
            for name in ("bias_ih", "bias_hh"):
                given = nn.Parameter(values.clone()) if kind == "given later" else None
                setattr(module, name, given)
    args = arguments(variant, "batched", True, dtype)
    with torch.no_grad():
        assert_same(ours, theirs, *args)
    assert_same(ours, theirs, *args)


@every_variant
def test_functional_call_and_replica(variant):
    theirs, ours = pair(variant, dtype=torch.float64)
    args = arguments(variant, "batched", True)
    weights = {n: p.detach() * 2 for n, p in theirs.named_parameters()}
    results = []
    for module in (theirs, ours):
        found = torch.func.functional_call(module, weights, copies(args))
        replica = module._replicate_for_data_parallel()
        for name, weight in weights.items():
            setattr(replica, name, weight * 1)
        again = replica(*copies(args))
        if variant != "lstm":
            found, again = (found,), (again,)
        results.append({f"{i}": t for i, t in enumerate((*found, *again))})
        assert torch.equal(found[0], again[0])
    assert_same_numbers(results[1], results[0])


@every_variant
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e9], ids=str)
@pytest.mark.parametrize("where", ["input", "hx", "weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_not_a_number_and_infinity_spread_as_in_torch(variant, where, value, dtype):
    theirs, ours = pair(variant, dtype=dtype)
    x, hx = arguments(variant, "batched", True, dtype)
    with torch.no_grad():
        if where == "weight":
            theirs.weight_hh[1, 1] = ours.weight_hh[1, 1] = value
        elif where == "input":
            x[1, 1] = value
        else:
            for state in hx if variant == "lstm" else (hx,):
                state[range(B), range(B)] = value  # one in a row: two may meet as inf - inf
    assert_same(ours, theirs, x, hx)


@every_variant
def test_autocast_follows_the_rule_of_linear(variant):
    _, ours = pair(variant)
    half = copy.deepcopy(ours).bfloat16()
    args = arguments(variant, "batched", True, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = ours(*args)
    rounded = to(args, torch.bfloat16)
    expected, truth = half(*rounded), doubled(half)(*to(rounded, torch.float64))
    if variant != "lstm":
        found, expected, truth = (found,), (expected,), (truth,)
    named = ({str(i): t for i, t in enumerate(v)} for v in (found, truth, expected))
    assert_accurate(*named, torch.bfloat16)
    found[0].float().sum().backward()
    assert {p.grad.dtype for p in ours.parameters()} == {torch.float32}


def test_unknown_nonlinearity_is_refused_at_the_first_call():
    for namespace in (nn, fused_rnn):
        cell = namespace.RNNCell(I, H, nonlinearity="sigmoid")
        with pytest.raises(RuntimeError, match="Unknown nonlinearity: sigmoid"):
            cell(torch.zeros(B, I))


@pytest.mark.parametrize("form", ["batched", "unbatched"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("variant", ["gru", "lstm"])
def test_what_a_step_gave_may_be_changed_in_place(variant, dtype, form):
    """As torch's, before backward: an episode has ended, and its row starts afresh."""
    theirs, ours = (module.to(dtype) for module in pair(variant))
    shape = (B, I) if form == "batched" else (I,)
    xs = torch.randn(3, *shape, dtype=dtype)
    kept = (torch.arange(shape[0]) % 2).unsqueeze(1).to(dtype) if form == "batched" else 0.5

    def run(cell):
        total, state = 0, None
        for x in xs:
            state = cell(x, state)
            for s in state if variant == "lstm" else (state,):
                total = total + (s.float() * torch.linspace(1, 2, s.shape[-1])).sum()
                s *= kept
        return torch.autograd.grad(total, list(cell.parameters()))

    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float64: 1e-12}[dtype]
    for actual, expected in zip(run(ours), run(theirs), strict=True):
        assert (actual - expected).norm() <= tolerance * expected.norm()


@every_variant
def test_double_backward_of_a_step(variant):
    """Whose output was not saved."""
    theirs, ours = pair(variant)
    x = torch.randn(B, I)

    def penalty(cell):
        given = x.clone().requires_grad_()
        found = cell(given)
        total = sum(s.square().sum() for s in (found if variant == "lstm" else (found,)))
        (grad,) = torch.autograd.grad(total, given, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), list(cell.parameters()))

    for actual, expected in zip(penalty(ours), penalty(theirs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_result_of_one_call_is_independent_of_the_next():
    _, ours = pair("lstm")
    x = torch.ones(B, I)
    h, c = ours(x)
    before = h.clone(), c.clone()
    ours(x * 2, (h, c))
    assert torch.equal(h, before[0]) and torch.equal(c, before[1])

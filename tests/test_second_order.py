"""Gradients of gradients by scans (fused_rnn/second_order.py), against autograd through plain
operations, and what is left to these."""

import itertools

import pytest
import torch
from helpers.inputs import states
from helpers.outcomes import flat
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fused_rnn
from fused_rnn import derivatives, second_order
from fused_rnn.modules import make_module
from fused_rnn.testing import TORCH_CELLS

every_cell = pytest.mark.parametrize("cell", TORCH_CELLS)


class Answers:
    """Of `derivatives.are_fast`, which may be told to say no."""

    def __init__(self, monkeypatch):
        self.given, self.enabled = [], True
        ask = derivatives.are_fast

        def answer(*args):
            self.given.append(self.enabled and ask(*args))
            return self.given[-1]

        monkeypatch.setattr(derivatives, "are_fast", answer)

    def taken(self):
        """Since the last time."""
        given, self.given = self.given, []
        return given

    def without(self, function, *args):
        self.enabled = False
        try:
            return function(*args)
        finally:
            self.enabled = True
            self.given.clear()


@pytest.fixture
def answers(monkeypatch):
    return Answers(monkeypatch)


def second(module, x, hx=None, of=("y", "h"), by=None, wanted=None, **masks):
    """Gradients of a function of the first gradients `by` of a function of the outputs `of`, by
    default with respect to everything."""
    is_packed = isinstance(x, PackedSequence)
    everything = [x.data if is_packed else x, *flat(hx), *module.parameters()]
    y, final = module(x, hx, **masks)
    y = y.data if is_packed else y
    outputs = [*([y] if "y" in of else []), *(flat(final) if "h" in of else [])]
    generator = torch.Generator().manual_seed(1)

    def some(tensor):
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)

    loss = sum((o.sin() * some(o)).sum() for o in outputs)
    first = torch.autograd.grad(loss, by or everything, create_graph=True)
    penalty = sum((f * some(f)).sum() + f.square().sum() for f in first)
    return torch.autograd.grad(penalty, wanted or everything)


def assert_near(actual, expected, tolerance=1e-12):
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert torch.isfinite(a).all()
        assert (a - e).norm() <= tolerance * e.norm() + 1e-14, i


@every_cell
@pytest.mark.parametrize(
    ("bidirectional", "bias", "layers", "given"), list(itertools.product((False, True), repeat=4))
)
def test_against_plain_operations(cell, bidirectional, bias, layers, given, answers):
    module = make_module(
        cell, 5, 7, num_layers=1 + layers, bidirectional=bidirectional, bias=bias
    ).double()
    rows = (1 + layers) * (1 + bidirectional)
    hx = states(cell, rows, 3, 7, dtype=torch.float64, requires_grad=True) if given else None
    for timesteps in (6, 1):
        x = torch.randn(timesteps, 3, 5, dtype=torch.float64, requires_grad=True)
        with fused_rnn.backend("reference"):
            actual = second(module, x, hx)
            assert answers.taken() == [True] * (1 + layers)
            assert_near(actual, answers.without(second, module, x, hx))


@every_cell
@pytest.mark.parametrize("lengths", [(3, 6, 1, 6, 4), (1, 1), (2,), (5, 5, 5)], ids=str)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed_rows(cell, lengths, bidirectional, answers):
    module = make_module(cell, 5, 7, num_layers=2, bidirectional=bidirectional).double()
    rows = [torch.randn(n, 5, dtype=torch.float64) for n in lengths]
    packed = pack_sequence(rows, enforce_sorted=False)
    packed = packed._replace(data=packed.data.requires_grad_())
    hx = states(
        cell, 2 * (1 + bidirectional), len(lengths), 7, dtype=torch.float64, requires_grad=True
    )
    for given in (None, hx):
        with fused_rnn.backend("reference"):
            actual = second(module, packed, given)
            assert answers.taken() == [True, True]
            assert_near(actual, answers.without(second, module, packed, given))


MASKS = {
    "lengths": ((3, 6, 1, 6, 4), 0.0),
    "rows without a step": ((0, 5, 0, 6, 2), 0.0),
    "no step at all": ((0, 0, 0, 0, 0), 0.0),
    "resets": (None, 0.3),
    "both": ((3, 6, 0, 1, 4), 0.3),
}


@every_cell
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_masks(cell, name, batch_first, answers):
    module = make_module(cell, 5, 7, bidirectional=True, batch_first=batch_first)
    lengths, part = MASKS[name]
    masks = {} if lengths is None else {"lengths": torch.tensor(lengths)}
    if part:
        masks["resets"] = torch.rand(5, 6) < part
        masks["resets"] = masks["resets"] if batch_first else masks["resets"].t()
    x = torch.randn(5, 6, 5) if batch_first else torch.randn(6, 5, 5)
    # The library's short way, then another backend in float64.
    for dtype, backend, tolerance in (
        (torch.float32, "auto", 1e-4),
        (torch.float64, "reference", 1e-12),
    ):
        module = module.to(dtype)
        x = x.detach().to(dtype).requires_grad_()
        for hx in (None, states(cell, 2, 5, 7, dtype=dtype, requires_grad=True)):
            with fused_rnn.backend(backend):
                actual = second(module, x, hx, **masks)
                assert answers.taken() == [True]
                expected = answers.without(lambda: second(module, x, hx, **masks))  # noqa: B023
                if cell != "rnn_relu" or dtype == torch.float64:
                    assert_near(actual, expected, tolerance)


@every_cell
def test_only_some_gradients(cell, answers):
    module = make_module(cell, 4, 6, bidirectional=True).double()
    x = torch.randn(5, 2, 4, dtype=torch.float64, requires_grad=True)
    hx = states(cell, 2, 2, 6, dtype=torch.float64, requires_grad=True)
    everything = [x, *flat(hx), *module.parameters()]
    with fused_rnn.backend("reference"):
        for of, i, j in itertools.product((("y",), ("h",)), (0, 1, 3), (0, 1, 4)):
            arguments = module, x, hx, of, [everything[i]], [everything[j]]
            actual = second(*arguments)
            assert answers.taken() == [True]
            assert_near(actual, answers.without(second, *arguments))


@every_cell
@pytest.mark.parametrize("sizes", [(9, 3, 5, 17), (4, 1, 1, 1), (12, 33, 20, 100)], ids=str)
def test_no_further_from_float64_than_torch(cell, sizes, answers):
    timesteps, batch, inputs, hidden = sizes
    name, options = (
        (cell[:3].upper(), {"nonlinearity": cell[4:]}) if "rnn" in cell else (cell.upper(), {})
    )
    theirs = getattr(nn, name)(inputs, hidden, bidirectional=True, **options)
    ours = fused_rnn.from_torch(theirs)
    x = torch.randn(timesteps, batch, inputs)
    hx = states(cell, 2, batch, hidden, requires_grad=True)

    def run(module, dtype):
        module = module.to(dtype)
        given = [t.detach().to(dtype).requires_grad_() for t in (x, *flat(hx))]
        return second(module, given[0], tuple(given[1:]) if cell == "lstm" else given[1])

    actual, expected = run(ours, torch.float32), run(theirs, torch.float32)
    assert answers.taken() == [True]
    exact = run(theirs, torch.float64)
    for i, (a, t, e) in enumerate(zip(actual, expected, exact, strict=True)):
        error, torchs = ((v.double() - e).norm() / (e.norm() + 1e-30) for v in (a, t))
        # Where relu jumps a rounding decides.
        allowed = 1e-3 if cell == "rnn_relu" else 2 * torchs + 4 * torch.finfo(torch.float32).eps
        assert error <= allowed, (i, error, torchs)


@every_cell
def test_gradients_in_any_order_of_memory(cell, answers):
    module = make_module(cell, 4, 6, bidirectional=True, batch_first=True)
    x = torch.randn(2, 5, 4, requires_grad=True)

    def twice():
        y, _ = module(x)
        loss = (y.mT.cumsum(1).square() * torch.ones(1, 1).expand_as(y.mT)).sum()
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(grad.mT.square().sum(), [x, *module.parameters()])

    actual = twice()
    assert answers.taken() == [True]
    assert_near(actual, answers.without(twice), 1e-4)


@every_cell
def test_hessian_with_and_without_vmap(cell, answers):
    module = make_module(cell, 2, 3).double()
    x = torch.randn(3, 2, 2, dtype=torch.float64)
    with fused_rnn.backend("reference"):
        hessian = torch.autograd.functional.hessian

        def loss(x):
            return module(x)[0].sin().sum()

        one_by_one = hessian(loss, x)
        assert set(answers.taken()) == {True}
        assert_near([hessian(loss, x, vectorize=True)], [one_by_one])
        assert_near([answers.without(hessian, loss, x)], [one_by_one])


@every_cell
def test_autocast_does_not_reach_it(cell, answers):
    module, x = make_module(cell, 4, 6), torch.randn(5, 2, 4, requires_grad=True)
    y, _ = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        inside = torch.autograd.grad(grad.square().sum(), list(module.parameters()))
    (grad,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
    outside = torch.autograd.grad(grad.square().sum(), list(module.parameters()))
    assert set(answers.taken()) == {True}
    assert_near(inside, outside, 1e-6)
    assert all(g.dtype == torch.float32 for g in inside)


@every_cell
def test_third_derivatives_of_weights(cell, answers):
    module = make_module(cell, 2, 3).double()
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)

    def thrice():
        value, weights = module(x)[0].sin().sum(), list(module.parameters())
        (first,) = torch.autograd.grad(value, x, create_graph=True)
        again = torch.autograd.grad(first.square().sum(), weights, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in again), [x, *weights])

    with fused_rnn.backend("reference"):
        actual = thrice()
        assert answers.taken()[0]
        assert_near(actual, answers.without(thrice))


def test_the_graph_may_be_kept_and_gone_through_again():
    module, x = fused_rnn.GRU(3, 4), torch.randn(4, 2, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
    penalty = grad.square().sum()
    once = torch.autograd.grad(penalty, x, retain_graph=True)
    assert torch.equal(once[0], torch.autograd.grad(penalty, x)[0])
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(penalty, x)


def forward_mode(module, x, v, hx=None, of_weights=False):
    """Outputs and their tangents, where x moves along v and, if asked, the weights along ones."""
    is_packed = isinstance(x, PackedSequence)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x.data if is_packed else x, v)
        if of_weights:
            parameters = {
                name: forward_ad.make_dual(p, torch.ones_like(p)) for name, p in parameters.items()
            }
        given = x._replace(data=dual) if is_packed else dual
        y, final = torch.func.functional_call(module, parameters, (given, hx))
        outputs = (y.data if is_packed else y, *flat(final))
        return [t for o in outputs for t in forward_ad.unpack_dual(o)]


def by_func_jvp(module, x, v, hx=None):
    def outputs(x):
        y, final = module(x, hx)
        return (y, *flat(final))

    with torch.no_grad():
        return [t for pair in zip(*torch.func.jvp(outputs, (x,), (v,)), strict=True) for t in pair]


@pytest.fixture
def tangents(monkeypatch):
    """Whether `derivatives.with_tangents` took each call; `without` calls past it."""

    class Calls(Answers):
        def __init__(self):
            self.given, self.enabled = [], True
            run = derivatives.with_tangents

            def call(*args):
                result = run(*args) if self.enabled else None
                self.given.append(result is not None)
                return result

            monkeypatch.setattr(derivatives, "with_tangents", call)

    return Calls()


@every_cell
@pytest.mark.parametrize(
    ("bidirectional", "bias", "layers", "given"), list(itertools.product((False, True), repeat=4))
)
def test_forward_mode(cell, bidirectional, bias, layers, given, tangents):
    options = {"num_layers": 1 + layers, "bidirectional": bidirectional, "bias": bias}
    module = make_module(cell, 5, 7, **options).double()
    rows = (1 + layers) * (1 + bidirectional)
    hx = states(cell, rows, 3, 7, dtype=torch.float64, requires_grad=True) if given else None
    for timesteps in (6, 1):
        x, v = torch.randn(2, timesteps, 3, 5, dtype=torch.float64)
        for function, options in (
            (forward_mode, (hx,)),
            (forward_mode, (hx, True)),
            (by_func_jvp, (hx,)),
        ):
            with fused_rnn.backend("reference"):
                actual = function(module, x, v, *options)
                assert tangents.taken() == [True] * (1 + layers)
                assert_near(actual, tangents.without(function, module, x, v, *options))


@every_cell
def test_forward_mode_of_packed_rows(cell, tangents):
    module = make_module(cell, 5, 7, num_layers=2, bidirectional=True)
    packed = pack_sequence([torch.randn(n, 5) for n in (3, 6, 1, 6)], enforce_sorted=False)
    v = torch.randn_like(packed.data)
    actual = forward_mode(module, packed, v)
    assert tangents.taken() == [True, True]
    assert_near(actual, tangents.without(forward_mode, module, packed, v), 1e-5)


@every_cell
def test_forward_mode_with_more_around_it_is_plain_operations(cell, tangents):
    """Where gradients are wanted too, in a batch of tangents, and with lengths."""
    module, x = make_module(cell, 3, 4).double(), torch.randn(4, 2, 3, dtype=torch.float64)
    with fused_rnn.backend("reference"):
        with forward_ad.dual_level():
            y, _ = module(forward_ad.make_dual(x, torch.ones_like(x)))
            tangent = forward_ad.unpack_dual(y).tangent
            assert torch.autograd.grad(tangent.sum(), module.weight_hh_l0)[0].abs().sum() > 0
        with torch.no_grad():
            jacobian = torch.func.jacfwd(lambda x: module(x)[0])(x)
            expected = torch.autograd.functional.jacobian(lambda x: module(x)[0], x)
            assert_near([jacobian], [expected])
            lengths = torch.tensor([2, 4])
            torch.func.jvp(lambda x: module(x, lengths=lengths)[0], (x,), (x,))
    assert set(tangents.taken()) == {False}


@every_cell
def test_tangents_of_zeros(cell, tangents):
    """torch gives them without memory."""
    module, x = make_module(cell, 3, 4), torch.randn(4, 2, 3)
    v = torch._efficientzerotensor(x.shape)
    y, tangent, *_ = forward_mode(module, x, v)
    assert tangents.taken() == [True]
    assert torch.equal(y, module(x)[0]) and (tangent is None or not tangent.any())


def refused():
    x = torch.randn(4, 2, 3)
    afresh = {"resets": torch.rand(4, 2) < 0.5, "reset_hx": torch.randn(1, 2, 5)}
    yield "states afresh", fused_rnn.GRU(3, 5), x, afresh
    yield "projection", fused_rnn.LSTM(3, 5, proj_size=2), x, {}
    yield "peepholes", fused_rnn.LSTM(3, 5, peepholes=True), x, {}
    yield "normalised", fused_rnn.GRU(3, 5, layer_norm=True), x, {}
    yield "zoneout", fused_rnn.GRU(3, 5, zoneout=0.3), x, {}
    yield "dropout", fused_rnn.GRU(3, 5, recurrent_dropout=0.3), x, {}
    yield "reset before", fused_rnn.GRU(3, 5, reset_after=False), x, {}
    yield "no rows", fused_rnn.GRU(3, 5), torch.randn(4, 0, 3), {}
    yield "half type", fused_rnn.GRU(3, 5).bfloat16(), x.bfloat16(), {}


@pytest.mark.parametrize("case", [pytest.param(c[1:], id=c[0]) for c in refused()])
def test_plain_operations_do_the_rest(case, answers):
    module, x, masks = case
    x = x.detach().requires_grad_()
    y, *_ = module(x, **masks)
    first = torch.autograd.grad(y.square().sum(), [x, *module.parameters()], create_graph=True)
    found = torch.autograd.grad(sum(g.square().sum() for g in first), list(module.parameters()))
    assert True not in answers.taken()
    assert all(torch.isfinite(g).all() for g in found)


def test_sizes_tell_a_projection():
    x, weights = torch.randn(2, 2, 3), [torch.randn(20, 3), torch.randn(20, 2), torch.randn(2, 5)]
    given = second_order.Given(x, torch.randn(1, 2, 2), torch.randn(1, 2, 5), weights)
    assert not second_order.fits("lstm", given)
    assert not second_order.fits("gru_reset_before", given)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_cell
@pytest.mark.parametrize("rows", ["padded", "packed", "lengths"])
def test_on_a_gpu(cell, rows, answers):
    module, lengths = make_module(cell, 5, 32, bidirectional=True).cuda(), (3, 6, 1, 6, 4)
    x, masks = torch.randn(6, 5, 5, device="cuda", requires_grad=True), {}
    if rows == "packed":
        x = pack_sequence([torch.randn(n, 5) for n in lengths], enforce_sorted=False).to("cuda")
        x = x._replace(data=x.data.requires_grad_())
    elif rows == "lengths":
        masks["lengths"] = torch.tensor(lengths, device="cuda")
    actual = second(module, x, **masks)
    # The host would have to wait for the lengths.
    assert answers.taken() == [rows != "lengths"]
    expected = answers.without(lambda: second(module, x, **masks))
    if cell != "rnn_relu":
        assert_near(actual, expected, 1e-3)

"""float64 on the CPU: torch's own layers where the reference is slower."""

from __future__ import annotations

import pytest
import torch
from helpers.inputs import states
from helpers.outcomes import flat
from helpers.ways import general_way

import fused_rnn
from fused_rnn import handover
from fused_rnn.modules import make_module

TORCH = {"rnn_tanh": "RNN", "rnn_relu": "RNN", "gru": "GRU", "lstm": "LSTM"}


@pytest.fixture
def nothing_is_handed_over():
    """Here it is."""


@pytest.fixture(autouse=True)
def no_choice(monkeypatch):
    monkeypatch.delenv("FUSED_RNN_BACKEND", raising=False)


@pytest.fixture
def taken(monkeypatch):
    """The results of both functions, as they are given."""
    results = []

    def watch(function):
        def watched(*args):
            results.append(function(*args))
            return results[-1]

        return watched

    for name in ("layers", "step"):
        monkeypatch.setattr(handover, name, watch(getattr(handover, name)))
    return results


@pytest.mark.parametrize("cell", TORCH)
@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"num_layers": 3, "bidirectional": True, "batch_first": True}]
)
def test_layers_are_torchs(cell, options, taken):
    module = make_module(cell, 5, 7, **options).double()
    relu = {"nonlinearity": "relu"} if cell == "rnn_relu" else {}
    theirs = getattr(torch.nn, TORCH[cell])(5, 7, **options, **relu).double()
    theirs.load_state_dict(module.state_dict())
    parts = len(module._flat_weights) // len(module._all_weights[0])
    for shape in ((1, 1, 5), (6, 3, 5), (4, 5)):
        x = torch.randn(shape, dtype=torch.float64)
        batch = shape[:1] if module.batch_first else shape[1:2]
        for hx in (None, states(cell, parts, *batch[: len(shape) - 2], 7, dtype=torch.float64)):
            with torch.no_grad():
                actual = flat(module(x, hx))
                assert taken.pop() and not taken
                general, expected = flat(general_way(module, x, hx)), flat(theirs(x, hx))
            assert not taken
            for a, g, e in zip(actual, general, expected, strict=True):
                assert torch.equal(a, e) and a.stride() == e.stride() and not a.requires_grad
                torch.testing.assert_close(a, g, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
def test_cells_are_torchs(name, taken):
    for options in ({}, {"bias": False}):
        module = getattr(fused_rnn, name)(5, 7, **options).double()
        theirs = getattr(torch.nn, name)(5, 7, **options).double()
        theirs.load_state_dict(module.state_dict())
        for batch in ((), (3,)):
            x = torch.randn(*batch, 5, dtype=torch.float64)
            for hx in (None, states(module._cell().name, *batch, 7, dtype=torch.float64)):
                with torch.no_grad():
                    actual, expected = flat(module(x, hx)), flat(theirs(x, hx))
                    assert taken.pop() and not taken
                    general = flat(general_way(module, x, hx))
                assert all(map(torch.equal, actual, expected))
                for a, g in zip(actual, general, strict=True):
                    torch.testing.assert_close(a, g, rtol=1e-12, atol=1e-13)


def test_projected_layers_are_torchs(taken):
    module = fused_rnn.LSTM(5, 9, 2, proj_size=4, bidirectional=True).double()
    theirs = torch.nn.LSTM(5, 9, 2, proj_size=4, bidirectional=True).double()
    theirs.load_state_dict(module.state_dict())
    x = torch.randn(6, 3, 5, dtype=torch.float64)
    with torch.no_grad():
        assert all(map(torch.equal, flat(module(x)), flat(theirs(x))))
    assert taken.pop() and not taken


def trained(module, *args):
    """Outputs and gradients, of gradients too."""
    args = [a.detach().requires_grad_() for a in args]
    outputs = flat(module(*args))
    inputs = [*args, *module.parameters()]
    loss = sum(o.square().sum() for o in outputs)
    grads = torch.autograd.grad(loss, inputs, create_graph=True)
    twice = torch.autograd.grad(sum(g.square().sum() for g in grads), inputs, allow_unused=True)
    return [*outputs, *grads, *(g for g in twice if g is not None)]


@pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=len)
def test_a_few_timesteps_in_training_are_torchs(cell, options, taken):
    theirs = getattr(torch.nn, cell)(5, 7, **options).double()
    module = fused_rnn.from_torch(theirs)
    for shape in ((1, 3, 5), (12, 3, 5), (4, 5)):
        x = torch.randn(shape, dtype=torch.float64)
        actual, expected = trained(module, x), trained(theirs, x)
        assert taken.pop() and not taken
        assert all(map(torch.equal, actual, expected))
        general = general_way(trained, module, x)
        assert not taken and len(general) == len(actual)
        for a, g in zip(actual, general, strict=True):
            torch.testing.assert_close(a, g, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("cell", ["RNNCell", "GRUCell", "LSTMCell"])
def test_cells_in_training_are_torchs(cell, taken):
    theirs = getattr(torch.nn, cell)(5, 7).double()
    module = fused_rnn.from_torch(theirs)
    for shape in ((3, 5), (5,)):
        x = torch.randn(shape, dtype=torch.float64)
        assert all(map(torch.equal, trained(module, x), trained(theirs, x)))
        assert taken.pop() and not taken


def test_gradients_over_more_timesteps_stay_with_the_reference(taken):
    module, x = fused_rnn.GRU(5, 7).double(), torch.randn(13, 3, 5, dtype=torch.float64)
    module(x)[0].sum().backward()
    assert not any(taken)
    handed = "runs on reference, or torch's own layer in a module's call\n"
    assert "runs on reference\n" in str(fused_rnn.explain(module, x))
    assert handed in str(fused_rnn.explain(module, x[:12]))
    with torch.no_grad():
        assert handed in str(fused_rnn.explain(module, x))
    taken.clear()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    module(x)
    assert taken.pop() and not taken


def test_dropout_between_layers_is_ours(taken):
    module = fused_rnn.GRU(5, 7, 2, dropout=0.5).double()
    module(torch.randn(4, 3, 5, dtype=torch.float64))
    assert not any(taken)
    module.eval()(torch.randn(4, 3, 5, dtype=torch.float64))
    assert taken.pop() and not taken


def test_forward_mode_is_ours(taken):
    module, x = fused_rnn.GRU(5, 7).double(), torch.randn(4, 3, 5, dtype=torch.float64)
    with torch.autograd.forward_ad.dual_level():
        module(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
    assert not any(taken)


def test_what_torch_does_not_have_stays_with_the_reference(taken):
    x = torch.randn(6, 3, 5, dtype=torch.float64)
    module = fused_rnn.GRU(5, 7).double()
    with torch.no_grad():
        module(x, lengths=torch.tensor([6, 2, 1]))
        module(x, return_states=True)
        fused_rnn.GRU(5, 7, reset_after=False).double()(x)
        fused_rnn.LSTM(5, 7, peepholes=True).double()(x)
        fused_rnn.GRU(5, 4096).double()(x)
        module(torch.nn.utils.rnn.pack_padded_sequence(x, [6, 2, 1]))
        assert not any(taken)
        taken.clear()
        with fused_rnn.backend("reference"):
            module(x)
        torch.func.vmap(module)(x.unsqueeze(0))
        with fused_rnn.backend("cpu"), pytest.raises(fused_rnn.UnsupportedProblemError):
            module(x)
        assert not any(taken)


def test_arguments_that_do_not_fit_are_not_given_to_torch(taken):
    module, cell = fused_rnn.LSTM(5, 7, 2).double(), fused_rnn.GRUCell(5, 7).double()
    x, h = torch.randn(6, 3, 5, dtype=torch.float64), torch.randn(2, 3, 7, dtype=torch.float64)
    calls = [
        (module, (x[..., :4],)),
        (module, (x.unsqueeze(0),)),
        (module, (x, (h[:1], h))),
        (module, (x, (h, h[:, :1]))),  # torch would broadcast it
        (module, (x, (h.float(), h))),
        (module, (x, (h, h.float()))),
        (module, (x, (h, h[..., :6]))),
        (module, (x[:, 0], (h, h))),
        (cell, (x[0, :, :4],)),
        (cell, (x[0], h[0, :1])),
        (cell, (x[0], h[0].float())),
        (cell, (x,)),
    ]
    with torch.no_grad():
        for called, args in calls:
            with pytest.raises((RuntimeError, ValueError)):
                called(*args)
        for name, changed in (("bias_hh_l1", 1), ("weight_hh_l0", 27), ("weight_ih_l1", 14)):
            kept = getattr(module, name)
            setattr(module, name, torch.nn.Parameter(kept[:changed]))
            with pytest.raises((RuntimeError, ValueError)):
                module(x)
            setattr(module, name, kept)
        assert taken and not any(taken)
        assert module(x)[0].shape == (6, 3, 7)
    assert taken.pop()


def test_empty_batches_are_ours(taken):
    module, cell = fused_rnn.GRU(5, 7).double(), fused_rnn.GRUCell(5, 7).double()
    with torch.no_grad():
        assert module(torch.randn(6, 0, 5, dtype=torch.float64))[0].shape == (6, 0, 7)
        assert cell(torch.randn(0, 5, dtype=torch.float64)).shape == (0, 7)
    assert not any(taken)

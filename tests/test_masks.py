"""Lengths, resets, states of every step, and the other options torch.nn does not have, on modules.

What the scans compute is compared to the oracle in test_scan.py; here that the oracle and the
modules mean the right thing.
"""

import contextlib
import copy
import itertools
import pickle
from functools import partial
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fused_rnn
from fused_rnn import dispatch, native, ops, testing
from fused_rnn.backends import pieces
from fused_rnn.backends.reference import ReferenceBackend
from fused_rnn.cells import CELLS

T, B, I, H = 9, 5, 3, 4  # noqa: E741

every_cell = pytest.mark.parametrize("cell", CELLS)
every_torch_cell = pytest.mark.parametrize("cell", testing.TORCH_CELLS)
both_ways = pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "both ways"])
# The reference takes masks as they are where their values are on a device.
ON_A_DEVICE = "reference, as on a device"
every_backend = pytest.mark.parametrize("backend", ["reference", ON_A_DEVICE, "cpu"])


@pytest.fixture(autouse=True)
def _backend(request, monkeypatch):
    """The backend a test is parametrized with, for the whole test."""
    name = (
        request.node.callspec.params.get("backend") if hasattr(request.node, "callspec") else None
    )
    if name is None:
        yield
        return
    if name == ON_A_DEVICE:
        name = "reference"
        monkeypatch.setattr(ReferenceBackend, "takes_masks", lambda *_: True)
    layer = testing.make_module(request.node.callspec.params.get("cell", "gru"), I, H)
    with torch.no_grad(), fused_rnn.backend("reference"):
        found = fused_rnn.explain(layer, torch.randn(1, 1, I)).layers[0].problem
    if reason := dispatch.BACKENDS[name].unsupported(found):
        pytest.skip(reason)
    with fused_rnn.backend(name):
        yield


def _tuple(states):
    return states if isinstance(states, tuple) else (states,)


def _initial(layer, batch=B, dtype=torch.float32):
    shape = layer.num_layers * (2 if layer.bidirectional else 1), batch
    h = torch.randn(*shape, layer.proj_size or H, dtype=dtype)
    return (h, torch.randn(*shape, H, dtype=dtype)) if isinstance(layer, fused_rnn.LSTM) else h


def _pair(hx, function):
    return tuple(map(function, hx)) if isinstance(hx, tuple) else function(hx)


def _near(actual, expected):
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def _grads(outputs, inputs):
    loss = sum((o * torch.linspace(1, 2, o.numel()).view_as(o)).sum() for o in outputs)
    return torch.autograd.grad(loss, inputs)


@every_backend
@every_torch_cell
@both_ways
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_lengths_are_a_packed_sequence(backend, cell, bidirectional, dtype):
    layer = testing.make_module(cell, I, H, num_layers=2, bidirectional=bidirectional)
    lengths = torch.tensor([4, 9, 1, 6, 9], dtype=dtype)
    x, hx = torch.randn(T, B, I, requires_grad=True), _initial(layer)
    y, states = layer(x, hx, lengths=lengths)
    packed = pack_padded_sequence(x, lengths.long(), enforce_sorted=False)
    packed_y, packed_states = layer(packed, hx)
    padded_y, _ = pad_packed_sequence(packed_y)
    _near(y, padded_y)
    for ours, expected in zip(_tuple(states), _tuple(packed_states), strict=True):
        _near(ours, expected)
    inputs = [x, *layer.parameters()]
    ours = _grads([y, *_tuple(states)], inputs)
    expected = _grads([padded_y, *_tuple(packed_states)], inputs)
    for a, b in zip(ours, expected, strict=True):
        _near(a, b)


@every_backend
@every_cell
@both_ways
def test_padding_is_never_read(backend, cell, bidirectional):
    """Whatever lies past the end: it reaches no result, and no gradient reaches it."""
    layer = testing.make_module(cell, I, H, 2, bidirectional=bidirectional, batch_first=True)
    lengths = torch.tensor([4, 0, 9, 1, 7])
    padding = torch.arange(T) >= lengths.unsqueeze(1)
    x = torch.randn(B, T, I)
    poisoned = torch.where(padding.unsqueeze(2), torch.nan, x).requires_grad_()
    hx = _initial(layer)
    clean_y, clean_states = layer(x, hx, lengths=lengths)
    y, states = layer(poisoned, hx, lengths=lengths)
    assert torch.equal(y, clean_y)
    assert (y[padding] == 0).all() and (y[~padding] != 0).any()
    for ours, expected in zip(_tuple(states), _tuple(clean_states), strict=True):
        assert torch.equal(ours, expected)
        assert torch.isfinite(ours).all()
    # A row without any step ends with what it began with.
    for state, initial in zip(_tuple(states), _tuple(hx), strict=True):
        assert torch.equal(state[:, 1], initial[:, 1])
    grad, *others = _grads([y, *_tuple(states)], [poisoned, *layer.parameters()])
    assert (grad[padding] == 0).all() and (grad[~padding] != 0).any()
    assert all(torch.isfinite(g).all() for g in others)


@every_backend
@every_cell
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "reset_hx"])
def test_resets_are_separate_pieces(backend, cell, given):
    """Each piece of each row through both directions on its own."""
    layer = testing.make_module(cell, I, H, bidirectional=True)
    x, hx, reset_hx = torch.randn(T, B, I), _initial(layer), _initial(layer)
    resets = torch.rand(T, B) < 0.3
    resets[0, 1] = resets[5, 1] = resets[T - 1, 2] = True
    resets[:, 3] = False
    lengths = torch.tensor([9, 7, 9, 4, 0])
    fresh = reset_hx if given else _pair(reset_hx, torch.zeros_like)
    y, states = layer(x, hx, lengths=lengths, resets=resets, reset_hx=reset_hx if given else None)
    for b in range(B):
        end = int(lengths[b])
        starts = [t for t in range(end) if t == 0 or resets[t, b]]
        for start, stop in itertools.pairwise([*starts, end] if end else []):
            forward_from = hx if start == 0 and not resets[0, b] else fresh
            reverse_from = hx if stop == end else fresh
            initial = tuple(
                torch.stack((f[0, b], r[1, b])).unsqueeze(1)
                for f, r in zip(_tuple(forward_from), _tuple(reverse_from), strict=True)
            )
            initial = initial if isinstance(hx, tuple) else initial[0]
            piece_y, piece_states = layer(x[start:stop, b : b + 1], initial)
            _near(y[start:stop, b : b + 1], piece_y)
            for state, piece in zip(_tuple(states), _tuple(piece_states), strict=True):
                if stop == end:
                    _near(state[0, b], piece[0, 0])
                if start == 0:
                    _near(state[1, b], piece[1, 0])


@every_backend
@every_cell
def test_no_gradient_crosses_a_reset(backend, cell):
    layer = testing.make_module(cell, I, H)
    x = torch.randn(T, B, I, requires_grad=True)
    hx = _pair(_initial(layer), torch.Tensor.requires_grad_)
    reset_hx = _pair(_initial(layer), torch.Tensor.requires_grad_)
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[4] = True
    y, _ = layer(x, hx, resets=resets, reset_hx=reset_hx)
    grads = torch.autograd.grad(y[4:].sum(), [x, *_tuple(hx), *_tuple(reset_hx)])
    grad_x, rest = grads[0], grads[1:]
    assert (grad_x[:4] == 0).all() and (grad_x[4:] != 0).any()
    count = len(_tuple(hx))
    assert all((g == 0).all() for g in rest[:count])
    assert all((g != 0).any() for g in rest[count:])


@every_backend
@every_cell
@both_ways
@pytest.mark.parametrize("batch_first", [False, True])
def test_states_of_every_step(backend, cell, bidirectional, batch_first):
    layer = testing.make_module(
        cell, I, H, num_layers=2, bidirectional=bidirectional, batch_first=batch_first
    )
    directions = 2 if bidirectional else 1
    x, hx = torch.randn(*((B, T) if batch_first else (T, B)), I), _initial(layer)
    y, h_n, states = layer(x, hx, return_states=True)
    plain_y, plain_h_n = layer(x, hx)
    _near(y, plain_y)
    for a, b in zip(_tuple(h_n), _tuple(plain_h_n), strict=True):
        _near(a, b)
    assert isinstance(states, tuple) and len(states) == len(_tuple(h_n))
    time = 2 if batch_first else 1
    for history, last in zip(states, _tuple(h_n), strict=True):
        expected = (2 * directions, B, T, H) if batch_first else (2 * directions, T, B, H)
        assert history.shape == expected
        for k in range(2 * directions):
            reverse = bidirectional and k % 2
            _near(history[k].select(time - 1, 0 if reverse else T - 1), last[k])
    top = states[0][-directions:]
    _near(torch.cat(list(top), -1), y)


@every_backend
@every_cell
def test_states_are_differentiable_and_those_of_a_loop(backend, cell):
    layer = testing.make_module(cell, I, H)
    step = layer._cell().step
    x = torch.randn(T, B, I, requires_grad=True)
    _, _, states = layer(x, return_states=True)
    weights = fused_rnn.cells.DirectionWeights(*layer.all_weights[0])
    loop, state = [], tuple(torch.zeros(B, H) for _ in states)
    for t in range(T):
        gx = torch.nn.functional.linear(x[t], weights.w_ih, weights.b_ih)
        state = step(gx, state, weights)
        loop.append(state)
    expected = [torch.stack(parts).unsqueeze(0) for parts in zip(*loop, strict=True)]
    for ours, theirs in zip(states, expected, strict=True):
        _near(ours, theirs)
    inputs = [x, *layer.parameters()]
    for ours, theirs in zip(_grads(states, inputs), _grads(expected, inputs), strict=True):
        _near(ours, theirs)


@every_backend
@pytest.mark.parametrize("masked", [False, True])
def test_states_in_inference_and_with_recompute_save_no_gates(backend, masked):
    layer = fused_rnn.LSTM(I, H, bidirectional=True, recompute=True)
    x = torch.randn(T, B, I)
    masks = {"lengths": torch.tensor([4, 9, 1, 0, 5])} if masked else {}
    seen = []
    forward = ops._run_forward

    def watched(*args):
        outputs, way = forward(*args)
        seen.append(outputs)
        return outputs, way

    with mock.patch.object(ops, "_run_forward", watched):
        y, _, (_, c) = layer(x, return_states=True, **masks)
        with torch.no_grad():
            inferred_y, _, (_, inferred_c) = layer(x, return_states=True, **masks)
    assert len(seen) == 2
    assert all(gates.numel() == 0 and cells.numel() > 0 for *_, gates, cells in seen)
    assert torch.equal(y, inferred_y) and torch.equal(c, inferred_c)
    layer.recompute = False
    kept_y, _, (_, kept_c) = layer(x, return_states=True, **masks)
    assert torch.equal(y, kept_y) and torch.equal(c, kept_c)
    parameters = list(layer.parameters())
    ours, expected = _grads([y, c], parameters), _grads([kept_y, kept_c], parameters)
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)


@every_torch_cell
def test_states_of_packed_and_unbatched_input(cell):
    layer = testing.make_module(cell, I, H, num_layers=2, bidirectional=True)
    x = torch.randn(T, 3, I)
    packed = pack_padded_sequence(x, torch.tensor([4, 9, 1]), enforce_sorted=False)
    y, _, states = layer(packed, return_states=True)
    assert isinstance(y, PackedSequence)
    assert all(s.shape == (4, 14, H) for s in states)
    _near(torch.cat(list(states[0][2:]), -1), y.data)
    y, h_n, states = layer(x[:, 0], return_states=True)
    batched_y, batched_h_n, batched = layer(x[:, :1], return_states=True)
    _near(y, batched_y.squeeze(1))
    for a, b in zip(states, batched, strict=True):
        _near(a, b.squeeze(2))
    for a, b in zip(_tuple(h_n), _tuple(batched_h_n), strict=True):
        _near(a, b.squeeze(1))


WAYS = {
    "short": lambda run: run,
    "without gradients": torch.no_grad(),
    "general": fused_rnn.backend("reference"),
    "compiled": lambda run: torch.compile(run, backend="aot_eager"),
}


@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"num_layers": 2, "dropout": 0.5}])
@pytest.mark.parametrize("return_states", [False, True])
@pytest.mark.parametrize(
    ("way", "cell"),
    [
        (way, cell)
        for way in WAYS
        for cell in testing.TORCH_CELLS
        if way != "compiled" or cell == "lstm"
    ],
)
def test_batch_first_outputs_lie_in_their_own_order(cell, way, return_states, options):
    """Whatever computed them: `view` works with all, or with none."""
    layer = testing.make_module(cell, I, H, batch_first=True, **options)
    lengths, x = torch.randint(1, T + 1, (B,)), torch.randn(B, T, I)

    def run(x):
        return layer(x, lengths=lengths, return_states=return_states)

    y, _, *histories = WAYS[way](run)(x)
    assert all(t.is_contiguous() for t in (y, *itertools.chain(*histories)))


@every_cell
@pytest.mark.parametrize("batch_first", [False, True])
def test_resets_of_unbatched_input(cell, batch_first):
    layer = testing.make_module(cell, I, H, bidirectional=True, batch_first=batch_first)
    x, resets = torch.randn(T, I), torch.rand(T) < 0.3
    hx, reset_hx = _initial(layer, 1), _initial(layer, 1)
    options = {"resets": resets, "reset_hx": _pair(reset_hx, lambda s: s.squeeze(1))}
    y, states = layer(x, _pair(hx, lambda s: s.squeeze(1)), **options)
    dim = 0 if batch_first else 1
    options = {"resets": resets.unsqueeze(dim), "reset_hx": reset_hx}
    batched_y, batched_states = layer(x.unsqueeze(dim), hx, **options)
    _near(y, batched_y.squeeze(dim))
    for a, b in zip(_tuple(states), _tuple(batched_states), strict=True):
        _near(a, b.squeeze(1))


@every_cell
def test_second_derivatives(cell):
    layer = testing.make_module(cell, 2, 3, dtype=torch.float64)
    lengths, resets = torch.tensor([3, 1]), torch.rand(3, 2) < 0.4
    hx = _pair(_initial_of(layer, 2, 3), torch.Tensor.requires_grad_)
    reset_hx = _pair(_initial_of(layer, 2, 3), torch.Tensor.requires_grad_)

    def run(x, *states):
        given = len(_tuple(hx))
        initial, fresh = states[:given], states[given:]
        y, final, history = layer(
            x,
            initial if given == 2 else initial[0],
            lengths=lengths,
            resets=resets,
            reset_hx=fresh if given == 2 else fresh[0],
            return_states=True,
        )
        return (y, *_tuple(final), *history)

    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    inputs = (x, *_tuple(hx), *_tuple(reset_hx))
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def _initial_of(layer, batch, hidden):
    h = torch.randn(1, batch, hidden, dtype=torch.float64)
    return (h, torch.randn_like(h)) if isinstance(layer, fused_rnn.LSTM) else h


@every_cell
def test_masks_under_vmap(cell):
    """Lengths and resets may differ from one batch to the next."""
    layer = testing.make_module(cell, I, H)
    x, lengths = torch.randn(4, T, B, I), torch.randint(0, T + 1, (4, B))
    resets = torch.rand(4, T, B) < 0.3

    def run(x, lengths, resets):
        return layer(x, lengths=lengths, resets=resets)[0]

    ys = torch.func.vmap(run)(x, lengths, resets)
    for i in range(4):
        _near(ys[i], run(x[i], lengths[i], resets[i]))


@every_cell
def test_masks_compile(cell):
    layer = testing.make_module(cell, I, H, 2, bidirectional=True)

    def run(x, lengths, resets):
        y, states, history = layer(x, lengths=lengths, resets=resets, return_states=True)
        return (y, *_tuple(states), *history)

    def with_grads(function, *args):
        outputs = function(*args)
        return (*outputs, *_grads(outputs, [*layer.parameters()]))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(T, B, I, generator=generator)
        lengths = torch.randint(0, T + 1, (B,), generator=generator)
        resets = torch.rand(T, B, generator=generator) < 0.3
        args = (x, lengths, resets)
        for a, b in zip(with_grads(compiled, *args), with_grads(run, *args), strict=True):
            _near(a, b)
    with pytest.raises(RuntimeError, match="lengths: expected values from 0 to 9"):
        compiled(x, lengths + 7, resets)


@every_backend
@every_cell
@both_ways
def test_recompute_gives_the_same_bits_and_saves_nothing(backend, cell, bidirectional):
    options = {"num_layers": 2, "bidirectional": bidirectional}
    layer = testing.make_module(cell, I, H, **options)
    again = testing.make_module(cell, I, H, recompute=True, **options)
    again.load_state_dict(layer.state_dict())
    x, lengths = torch.randn(T, B, I), torch.tensor([9, 3, 1, 7, 2])
    saved = []
    for module in (layer, again):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: (sizes.append(t.untyped_storage().nbytes()), t)[1], lambda t: t
        ):
            y, _ = module(x, lengths=lengths)
        saved.append(sum(sizes))
        y.square().sum().backward()
    for a, b in zip(layer.parameters(), again.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    assert saved[1] < saved[0] or not CELLS[cell].saved_gates
    assert "recompute=True" in repr(again) and "recompute" not in repr(layer)


@pytest.mark.parametrize("options", [{}, {"layer_norm": True}], ids=["plain", "layer_norm"])
def test_lengths_are_checked_under_transforms(options):
    """Where they are not an argument of the transform, which does not tell their values."""
    layer, x = fused_rnn.GRU(I, H, **options), torch.randn(T, 2, I)
    transforms = (
        lambda run: torch.func.vmap(run)(x[None]),
        lambda run: torch.func.grad(lambda x: run(x).sum())(x),
        lambda run: torch.func.jvp(run, (x,), (x,)),
    )
    for transform, wrong in itertools.product(transforms, ([3, T + 1], [-1, 3])):
        with pytest.raises(RuntimeError, match=f"lengths: expected values from 0 to {T}"):
            transform(lambda x, wrong=wrong: layer(x, lengths=torch.tensor(wrong))[0])
    lengths = torch.tensor([[3, T], [0, 1]])
    batched = torch.func.vmap(lambda n: layer(x, lengths=n)[0])(lengths)
    slopes = torch.func.grad(lambda x, n: layer(x, lengths=n)[0].sum())
    assert torch.func.vmap(slopes, (None, 0))(x, lengths).shape == (2, *x.shape)
    for y, n in zip(batched, lengths, strict=True):
        _near(y, layer(x, lengths=n)[0])


@every_cell
@pytest.mark.parametrize("batch_first", [False, True])
def test_stateful_goes_on_where_it_ended(cell, batch_first):
    layer = testing.make_module(cell, I, H, 2, batch_first=batch_first, stateful=True)
    plain = testing.make_module(cell, I, H, 2, batch_first=batch_first)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(*((B, T) if batch_first else (T, B)), I)
    whole, last = plain(x)
    parts = [layer(part)[0] for part in x.split([1, 3, 5], 1 if batch_first else 0)]
    _near(torch.cat(parts, 1 if batch_first else 0), whole)
    # Nothing of an earlier call is differentiated, or saved with the parameters.
    assert not layer.state_h.requires_grad
    assert layer.state_dict().keys() == plain.state_dict().keys()
    for kept, expected in zip((layer.state_h, layer.state_c), (*_tuple(last), None), strict=False):
        if expected is not None:
            _near(kept, expected.detach())
    assert layer.double().state_h.dtype == torch.float64
    layer.float().reset_states()
    _near(layer(x)[0], whole)
    assert "stateful=True" in repr(layer)


def test_stateful_modules_are_copied_and_pickled_with_their_states():
    layer = fused_rnn.LSTM(I, H, stateful=True)
    x = torch.randn(T, B, I)
    layer(x)
    twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    expected = layer(x)[0]
    for twin in twins:
        assert torch.equal(twin(x)[0], expected)


def test_states_are_no_others_where_memory_is_made_anew():
    """`to_empty` leaves parameters to be loaded, which states are not: they stay, or are gone."""
    layer = fused_rnn.LSTM(I, H, stateful=True)
    layer(torch.randn(T, B, I))
    kept, content = (layer.state_h, layer.state_c), copy.deepcopy(layer.state_dict())
    layer.to_empty(device="cpu").load_state_dict(content)
    assert torch.equal(layer.state_h, kept[0]) and torch.equal(layer.state_c, kept[1])
    layer.to("meta").to_empty(device="cpu").load_state_dict(content)
    assert layer.state_h is None and layer.state_c is None
    assert layer(torch.randn(T, B, I))[0].isfinite().all()


@every_cell
@pytest.mark.parametrize("packed", [False, True])
def test_stateful_goes_on_in_another_mode(cell, packed):
    layer = testing.make_module(cell, I, H, 2, stateful=True)
    plain = testing.make_module(cell, I, H, 2)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(T, B, I)
    x = pack_padded_sequence(x, [9, 7, 4, 2, 1]) if packed else x
    autocast, ordinary = partial(torch.autocast, "cpu", torch.bfloat16), contextlib.nullcontext
    inference, hx = torch.inference_mode, None
    for mode in (inference, ordinary, autocast, ordinary, inference, autocast):
        with mode():
            (y, final), (expected, _) = layer(x), plain(x, hx)
        y, expected = (out.data if packed else out for out in (y, expected))
        assert torch.equal(y, expected)
        if y.requires_grad:
            y.float().sum().backward()
        hx = tuple(state.detach().float().clone() for state in _tuple(final))
        hx = hx if CELLS[cell].has_c else hx[0]


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_stateful_goes_on_in_a_graph(cell):
    torch.compiler.reset()
    layer = testing.make_module(cell, I, H, stateful=True)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for mode in (torch.inference_mode, contextlib.nullcontext, torch.no_grad):
        x = torch.randn(T, B, I)
        with mode():
            y, expected = compiled(x)[0], twin(x)[0]
        _near(y, expected)
        if y.requires_grad:
            y.sum().backward()


@pytest.mark.parametrize("called", [False, True], ids=["first call", "with states"])
def test_stateful_modules_are_not_exported(called):
    """A program would begin with the same states at every call."""
    layer, x = fused_rnn.GRU(I, H, stateful=True), torch.randn(T, B, I)
    if called:
        layer(x)
    for export in (
        torch.export.export,
        partial(torch.export.export, strict=True),
        torch.jit.trace,
    ):
        with pytest.raises(Exception, match="GRU: expected stateful=False where a program"):
            export(layer, (x,))
    layer.stateful = False
    hx = torch.randn(1, B, H)
    program = torch.export.export(layer, (x, hx)).module()
    _near(program(x, hx)[0], layer(x, hx)[0])


@every_cell
def test_stateful_after_vmap(cell):
    layer, x = testing.make_module(cell, I, H, stateful=True), torch.randn(2, T, B, I)
    halves = x.split([4, T - 4], 1)

    def run(first, second):
        return torch.cat((layer(first)[0], layer(second)[0]))

    whole = torch.func.vmap(run)(*halves)
    with pytest.raises(RuntimeError, match="expected no states from inside a vmap"):
        layer(x[0])
    for y, row in zip(whole, x, strict=True):
        layer.reset_states()
        _near(y, layer(row)[0])


def test_stateful_with_another_batch_is_an_error():
    layer = fused_rnn.GRU(I, H, stateful=True)
    layer(torch.randn(1, B, I))
    with pytest.raises(RuntimeError, match=r"input: expected a batch of 5 .* got a batch of 2"):
        layer(torch.randn(1, 2, I))
    with pytest.raises(RuntimeError, match=r"input: expected a batch of 5 .* got no batch"):
        layer(torch.randn(1, I))
    with pytest.raises(RuntimeError, match=r"batch_sizes: .* larger than 0"):
        layer(PackedSequence(torch.zeros(0, I), torch.zeros(0, dtype=torch.int64)))
    layer.reset_states()
    layer(torch.randn(1, 2, I))
    with pytest.raises(RuntimeError, match="reset_states needs stateful=True"):
        fused_rnn.GRU(I, H).reset_states()


@pytest.mark.parametrize("cell", CELLS)
def test_stateful_keeps_states_of_its_own(cell):
    module = testing.make_module(cell, I, H, stateful=True)
    x = torch.randn(2, 5, B, I)
    with torch.no_grad():
        module(x[0])
        expected = module(x[1])
        module.reset_states()
        for state in torch.utils._pytree.tree_leaves(module(x[0])[1]):
            state.zero_()
        torch.testing.assert_close(module(x[1]), expected, rtol=0, atol=0)


def test_stateful_learns_online():
    """One step at a time, batch 1, an update after each."""
    layer, x = fused_rnn.GRU(1, 8, stateful=True), torch.randn(5, 1, 1, 1)
    theirs, state = torch.nn.GRU(1, 8), None
    theirs.load_state_dict(layer.state_dict())
    optimizers = [torch.optim.SGD(module.parameters(), 0.1) for module in (layer, theirs)]
    for step in x:
        y, _ = layer(step)
        expected, state = theirs(step, state)
        state = state.detach()
        torch.testing.assert_close(y, expected)
        for optimizer, result in zip(optimizers, (y, expected), strict=True):
            optimizer.zero_grad()
            result.sum().backward()
            optimizer.step()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lengths": [1] * B}, TypeError, "lengths: expected a Tensor, got list"),
        ({"lengths": torch.ones(B)}, TypeError, "lengths: expected an integer dtype, got"),
        ({"lengths": torch.ones(B).bool()}, TypeError, "lengths: expected an integer dtype"),
        ({"lengths": torch.ones(B + 1).int()}, RuntimeError, r"lengths: expected shape \[5\]"),
        ({"lengths": torch.ones(B, 1).int()}, RuntimeError, r"lengths: expected shape \[5\]"),
        ({"lengths": torch.full((B,), -1)}, RuntimeError, "lengths: expected values from 0 to 9"),
        ({"lengths": torch.full((B,), T + 1)}, RuntimeError, r"got 10 to 10"),
        ({"resets": torch.zeros(T, B)}, TypeError, "resets: expected dtype torch.bool"),
        ({"resets": torch.zeros(B, T).bool()}, RuntimeError, r"resets: expected shape \[9, 5\]"),
        ({"resets": "yes"}, TypeError, "resets: expected a Tensor, got str"),
        ({"reset_hx": torch.zeros(1, B, H)}, ValueError, "reset_hx: expected resets to go with"),
        (
            {"resets": torch.zeros(T, B).bool(), "reset_hx": torch.zeros(1, B, H + 1)},
            RuntimeError,
            r"reset_hx: Expected hidden size \(1, 5, 4\), got \[1, 5, 5\]",
        ),
        (
            {"resets": torch.zeros(T, B).bool(), "reset_hx": torch.zeros(1, B, H).double()},
            RuntimeError,
            "reset_hx: expected dtype torch.float32, got torch.float64",
        ),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_bad_masks(options, error, message, training):
    layer = fused_rnn.GRU(I, H)
    with torch.set_grad_enabled(training), pytest.raises(error, match=message):
        layer(torch.randn(T, B, I), **options)


def test_masks_with_the_wrong_kind_of_input():
    layer = fused_rnn.GRU(I, H)
    packed = pack_padded_sequence(torch.randn(T, B, I), torch.full((B,), T))
    for options in ({"lengths": torch.ones(B).int()}, {"resets": torch.zeros(T, B).bool()}):
        with pytest.raises(ValueError, match="expected none with packed input"):
            layer(packed, **options)
    with pytest.raises(ValueError, match="lengths: expected none with unbatched input"):
        layer(torch.randn(T, I), lengths=torch.tensor(3))


def test_bad_options():
    for name in ("recompute", "stateful", "reset_after"):
        with pytest.raises(TypeError, match=f"{name}: expected a bool, got int"):
            fused_rnn.GRU(I, H, **{name: 1})
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        fused_rnn.functional.gru(torch.randn(1, 1, 1), None, [], length=3)


def test_reset_before_the_product_by_hand():
    """Cho et al. 2014 in NumPy's manner, from the weights of the module."""
    layer = fused_rnn.GRU(I, H, reset_after=False, dtype=torch.float64)
    w_ih, w_hh, b_ih, b_hh = (p.detach().numpy() for p in layer.parameters())
    x = torch.randn(T, I, dtype=torch.float64)
    h = torch.zeros(H, dtype=torch.float64).numpy()

    def sigmoid(v):
        return 1 / (1 + torch.from_numpy(-v).exp().numpy())

    for row in x.numpy():
        from_x = w_ih @ row + b_ih + b_hh
        r = sigmoid(from_x[:H] + w_hh[:H] @ h)
        z = sigmoid(from_x[H : 2 * H] + w_hh[H : 2 * H] @ h)
        n = torch.from_numpy(from_x[2 * H :] + w_hh[2 * H :] @ (r * h)).tanh().numpy()
        h = (1 - z) * n + z * h
    y, h_n = layer(x)
    torch.testing.assert_close(h_n[0], torch.from_numpy(h), rtol=1e-12, atol=1e-12)
    assert torch.equal(y[-1], h_n[0])
    assert "reset_after=False" in repr(layer) and not layer.reset_after


def test_reset_before_the_product_keeps_its_meaning():
    layer = fused_rnn.GRU(I, H, 2, reset_after=False)
    x = torch.randn(T, B, I)
    expected = layer(x)[0]
    assert not torch.allclose(expected, _as_reset_after(layer)(x)[0])
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x)[0], expected)
    with torch.no_grad():
        _near(layer(x)[0], expected)
    with pytest.raises(ValueError, match=r"torch\.nn has no reset_after=False"):
        fused_rnn.restore(layer, strict=True)
    with pytest.warns(UserWarning, match=r"torch\.nn has no reset_after=False"):
        fused_rnn.restore(layer)
    assert torch.equal(layer(x)[0], expected)


def _as_reset_after(layer):
    twin = fused_rnn.GRU(I, H, 2)
    twin.load_state_dict(layer.state_dict())
    return twin


def test_stateful_is_not_restored():
    with pytest.raises(ValueError, match=r"torch\.nn has no stateful=True"):
        fused_rnn.restore(torch.nn.Sequential(fused_rnn.RNN(I, H, stateful=True)), strict=True)


def test_masks_may_lie_in_any_way():
    layer, x = fused_rnn.GRU(I, H), torch.randn(T, B, I)
    lengths, resets = torch.randint(0, T + 1, (2 * B,)), torch.rand(2 * B, 2 * T) < 0.2
    strided = {"lengths": lengths[::2], "resets": resets[::2, 1::2].t()}
    dense = {
        name: mask.clone(memory_format=torch.contiguous_format) for name, mask in strided.items()
    }
    for name in strided:
        actual = layer(x, **{name: strided[name]})
        expected = layer(x, **{name: dense[name]})
        assert all(map(torch.equal, actual, expected))
    assert all(map(torch.equal, layer(x, **strided), layer(x, **dense)))


@pytest.mark.skipif(native.cpu_library_error() is not None, reason="no C++ library")
@given(st.integers(0, 9), st.integers(0, 5), st.booleans(), st.data())
def test_the_library_cuts_as_torch_does(timesteps, batch, some_lengths, data):
    lengths = resets = None
    if some_lengths:
        each = st.lists(st.integers(0, timesteps), min_size=batch, max_size=batch)
        lengths = torch.tensor(data.draw(each), dtype=torch.int64)
    if data.draw(st.booleans()):
        resets = torch.rand(timesteps, batch) < data.draw(st.sampled_from((0, 0.3, 1)))
    cut = torch.ops.fused_rnn_cpu.cut(lengths, resets, timesteps, batch)
    expected = pieces._cut(lengths, resets, timesteps, batch)
    assert all(map(torch.equal, cut, expected))


@pytest.mark.skipif(native.cpu_library_error() is not None, reason="no C++ library")
@pytest.mark.parametrize("bad", [[-1, 2], [2, 6], [1], [1.0, 2.0]])
def test_the_library_cuts_nothing_that_does_not_fit(bad):
    with pytest.raises(RuntimeError, match="lengths"):
        torch.ops.fused_rnn_cpu.cut(torch.tensor(bad), None, 5, 2)
    with pytest.raises(RuntimeError, match="resets"):
        torch.ops.fused_rnn_cpu.cut(None, torch.zeros(2, 5, dtype=torch.bool), 5, 2)


def test_values_of_lengths_are_looked_at_inside_a_vmap():
    layer, x = fused_rnn.GRU(I, H), torch.randn(2, T, 3, I)
    lengths = torch.tensor([[1, 2, T], [0, 3, 4]])
    call = torch.func.vmap(lambda x, lengths: layer(x, lengths=lengths)[0])
    for item, of_item, found in zip(x, lengths, call(x, lengths), strict=True):
        torch.testing.assert_close(found, layer(item, lengths=of_item)[0])
    for wrong in (-4, T + 1):
        lengths[1, 2] = wrong
        with pytest.raises(RuntimeError, match=r"lengths: expected values from 0 to 9"):
            call(x, lengths)

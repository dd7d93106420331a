"""Truncated backpropagation through time against a loop written by hand."""

import pytest
import torch

import fused_rnn

LAYERS = {
    "rnn": (fused_rnn.RNN, {}),
    "gru": (fused_rnn.GRU, {}),
    "gru_reset_before": (fused_rnn.GRU, {"reset_after": False}),
    "lstm": (fused_rnn.LSTM, {"num_layers": 2}),
    "torch": (torch.nn.LSTM, {"num_layers": 2}),
}


def detached(state):
    return state.detach() if isinstance(state, torch.Tensor) else tuple(s.detach() for s in state)


def by_hand(layer, x, hx, weight, window, back):
    """One step at a time; every window's loss goes back to the state that `back` steps earlier
    was reached, and no further."""
    steps = x.shape[0]
    with torch.no_grad():
        states = [hx]
        for t in range(steps):
            states.append(layer(x[t : t + 1], states[-1])[1])
    outputs = []
    for begin in range(0, steps, window):
        end = min(begin + window, steps)
        # The last window may be short; it goes back from its own end.
        start = max(0, end - back)
        state = states[start] if start == 0 or states[start] is None else detached(states[start])
        ys = []
        for t in range(start, end):
            y, state = layer(x[t : t + 1], state)
            if t >= begin:
                ys.append(y)
        output = torch.cat(ys)
        (output * weight[begin:end]).sum().backward()
        outputs.append(output.detach())
    return torch.cat(outputs), state


def grads(*tensors):
    found = [t.grad for t in tensors]
    for t in tensors:
        t.grad = None
    return found


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    ("window", "back"),
    [(3, 5), (3, 3), (1, 1), (1, 4), (4, 6), (5, 30), (11, 11), (40, 40), (2, 7)],
)
@pytest.mark.parametrize("given", [False, True])
def test_gradients_are_those_of_the_loop(name, window, back, given):
    cls, options = LAYERS[name]
    layer = cls(3, 4, dtype=torch.float64, **options)
    x = torch.randn(11, 2, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 2, 4, dtype=torch.float64)
    parts = [
        torch.randn(layer.num_layers, 2, 4, dtype=torch.float64, requires_grad=True)
        for _ in range(1 + isinstance(layer, (torch.nn.LSTM, fused_rnn.LSTM)))
    ]
    hx = (tuple(parts) if len(parts) == 2 else parts[0]) if given else None
    wanted = [x, *layer.parameters(), *(parts if given else [])]
    expected, final = by_hand(layer, x, hx, weight, window, back)
    expected_grads = grads(*wanted)
    outputs = []
    windows = fused_rnn.tbptt(layer, x, hx, window=window, back=back)
    for w, (output, reached) in zip(weight.split(window), windows, strict=True):
        state = reached
        assert output.shape == w.shape
        (output * w).sum().backward()
        outputs.append(output.detach())
    torch.testing.assert_close(torch.cat(outputs), expected)
    for got, want in zip(grads(*wanted), expected_grads, strict=True):
        torch.testing.assert_close(got, want)
    pairs = [(state, final)] if isinstance(state, torch.Tensor) else zip(state, final, strict=True)
    for got, want in pairs:
        assert not got.requires_grad
        torch.testing.assert_close(got, want)


def test_without_truncation_it_is_backpropagation():
    layer = fused_rnn.GRU(3, 4, 2, dtype=torch.float64)
    x = torch.randn(7, 2, 3, dtype=torch.float64)
    layer(x)[0].square().sum().backward()
    expected = grads(*layer.parameters())
    for output, _ in fused_rnn.tbptt(layer, x, window=2, back=7):
        output.square().sum().backward()
    for got, want in zip(grads(*layer.parameters()), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_truncation_is_seen():
    """That the gradients above could have differed."""
    layer = fused_rnn.GRU(3, 4, dtype=torch.float64)
    x = torch.randn(9, 2, 3, dtype=torch.float64)
    found = []
    for back in (3, 4, 9):
        for output, _ in fused_rnn.tbptt(layer, x, window=3, back=back):
            output.square().sum().backward()
        found.append(grads(layer.weight_hh_l0)[0])
    assert not torch.allclose(found[0], found[1]) and not torch.allclose(found[1], found[2])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_and_resets(batch_first, dtype):
    layer = fused_rnn.LSTM(3, 4, batch_first=batch_first, dtype=torch.float64)
    shape = (3, 10) if batch_first else (10, 3)
    x = torch.randn(*shape, 3, dtype=torch.float64)
    masks = {
        "lengths": torch.tensor([10, 0, 5], dtype=dtype),
        "resets": torch.rand(shape) < 0.3,
        "reset_hx": tuple(torch.randn(1, 3, 4, dtype=torch.float64) for _ in range(2)),
    }
    expected, final = layer(x, **masks)
    outputs = list(fused_rnn.tbptt(layer, x, window=3, back=5, **masks))
    torch.testing.assert_close(torch.cat([o for o, _ in outputs], int(batch_first)), expected)
    for got, want in zip(outputs[-1][1], final, strict=True):
        torch.testing.assert_close(got, want)


def test_unbatched():
    layer = fused_rnn.GRU(3, 4, batch_first=True)
    x = torch.randn(7, 3)
    outputs = [output for output, _ in fused_rnn.tbptt(layer, x, window=2, back=3)]
    torch.testing.assert_close(torch.cat(outputs), layer(x)[0])


def test_the_optimizer_may_step_between():
    layer, x = fused_rnn.GRU(3, 4), torch.randn(9, 2, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        for output, _ in fused_rnn.tbptt(layer, x, window=2, back=5):
            optimizer.zero_grad()
            output.square().mean().backward()
            optimizer.step()
        losses.append(layer(x)[0].square().mean())
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x: expected a Tensor"),
        ({"x": torch.ones(3)}, ValueError, "x: expected 2 or 3 dimensions"),
        ({"x": torch.ones(0, 2, 3)}, ValueError, "x: expected at least one timestep"),
        ({"window": 0}, ValueError, "window: expected at least 1"),
        ({"window": 2.0}, TypeError, "window: expected an int, got float"),
        ({"window": True}, TypeError, "window: expected an int, got bool"),
        ({"layer": None}, TypeError, "layer: expected a module, got NoneType"),
        ({"back": 1}, ValueError, "back: expected at least the window, 2, got 1"),
        ({"back": "all"}, TypeError, "back: expected an int, got str"),
        ({"resets": torch.ones(4, 2, dtype=torch.bool)}, ValueError, "resets: expected shape"),
        ({"lengths": [1, 2]}, TypeError, "lengths: expected a Tensor"),
        ({"lengths": torch.ones(2)}, TypeError, "lengths: expected an integer dtype"),
        ({"lengths": torch.tensor([5, 6])}, RuntimeError, "lengths: .* 0 to 5, .* got 5 to 6"),
        ({"lengths": torch.tensor([-1, 5])}, RuntimeError, "lengths: .* 0 to 5, .* got -1 to 5"),
        ({"layer": fused_rnn.GRU(3, 4, bidirectional=True)}, ValueError, "layer: .*one direction"),
        ({"layer": fused_rnn.GRU(3, 4, stateful=True)}, ValueError, "layer: .*not stateful"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {"layer": fused_rnn.GRU(3, 4), "x": torch.ones(5, 2, 3), "window": 2} | change
    with pytest.raises(error, match=message):
        fused_rnn.tbptt(**arguments)

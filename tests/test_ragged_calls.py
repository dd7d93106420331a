"""The short way of rows that end early or start afresh (fused_rnn/training.py): the general way's
bits, in training and in inference."""

import pytest
import torch
from helpers.inputs import states
from helpers.masked import HIDDEN, INPUTS, MASKS, OPTIONS, STEPS, Masked, masks_of
from helpers.outcomes import assert_same_bits, flat, run, weighted
from helpers.ways import assert_general, assert_short
from torch.nn.utils.rnn import pack_sequence

import fused_rnn
from fused_rnn import direct
from fused_rnn.backends import pieces
from fused_rnn.cells import CELLS
from fused_rnn.modules import make_module

pytestmark = pytest.mark.usefixtures("cpu_backend")


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ".".join(map(str, map(int, o.values()))))
def test_masked_layers_have_the_general_ways_bits(cell, options, masks, ways):
    module = make_module(cell, INPUTS, HIDDEN, **options)
    batch_first = options["batch_first"]
    masked = Masked(module, **masks_of(masks, batch_first))
    parts = options["num_layers"] * (1 + options["bidirectional"])
    x = torch.randn(*((5, STEPS) if batch_first else (STEPS, 5)), INPUTS)
    for hx in (None, states(cell, parts, 5, HIDDEN)):
        assert_short(ways, run, masked, x, hx)
        with torch.no_grad():
            outputs = assert_short(ways, masked, x, hx)
        assert not any(t.requires_grad for t in flat(outputs))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("options", OPTIONS[::2], ids=lambda o: ".".join(map(str, o.values())))
def test_packed_inference_has_the_general_ways_bits(cell, options, ways):
    module = make_module(cell, INPUTS, HIDDEN, **options)
    parts = options["num_layers"] * (1 + options["bidirectional"])
    packed = pack_sequence([torch.randn(n, INPUTS) for n in (3, 9, 1, 9, 4)], enforce_sorted=False)
    for hx in (None, states(cell, parts, 5, HIDDEN)):
        with torch.inference_mode():
            assert_short(ways, module, packed, hx)


def test_projection(ways):
    module = fused_rnn.LSTM(INPUTS, HIDDEN, num_layers=2, bidirectional=True, proj_size=4)
    for hx in (None, (torch.randn(4, 5, 4), torch.randn(4, 5, HIDDEN))):
        assert_short(
            ways, run, Masked(module, **masks_of("both", False)), torch.randn(STEPS, 5, INPUTS), hx
        )


def test_what_needs_no_gradient_saves_nothing(ways):
    module = fused_rnn.LSTM(INPUTS, HIDDEN).requires_grad_(False)
    y, final = assert_short(
        ways, Masked(module, **masks_of("both", False)), torch.randn(STEPS, 5, INPUTS)
    )
    assert not any(t.requires_grad for t in (y, *final))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_lengths_of_any_integer_type(dtype, ways):
    masked = Masked(fused_rnn.GRU(INPUTS, HIDDEN), **masks_of("lengths", False, dtype))
    assert_short(ways, run, masked, torch.randn(STEPS, 5, INPUTS))


def test_rows_that_do_not_lie_together(ways):
    masked = Masked(fused_rnn.GRU(INPUTS, HIDDEN, batch_first=True), **masks_of("both", True))
    x = torch.randn(STEPS, 5, 2 * INPUTS)[..., ::2].transpose(0, 1)
    assert_short(ways, run, masked, x)
    # A gradient that is not contiguous, and one that every row shares.
    for loss in (lambda y: y[0].mT.sum(1).square().sum(), lambda y: y[0].sum()):
        assert_short(ways, lambda *args, loss=loss: run(*args, loss=loss), masked, x)


def test_many_rows_on_several_threads(ways, num_threads):
    num_threads(2)
    lengths = torch.randint(0, 41, (150,))
    masked = Masked(fused_rnn.LSTM(64, 32), lengths=lengths, resets=torch.rand(40, 150) < 0.1)
    assert_short(ways, run, masked, torch.randn(40, 150, 64))


def test_dropout_states_afresh_and_all_states(ways):
    module, x = fused_rnn.GRU(INPUTS, HIDDEN, 2, dropout=0.5), torch.randn(STEPS, 5, INPUTS)
    masks = masks_of("both", False)

    def call(**options):
        torch.manual_seed(0)
        return module(x, **masks, **options)

    assert_short(ways, call)
    module.batch_first = True
    turned = {name: mask.t() if mask.dim() == 2 else mask for name, mask in masks.items()}
    assert_general(ways, lambda: run(Masked(module, **turned), x.transpose(0, 1)))
    module.batch_first = False
    module.eval()
    assert_short(ways, call)
    assert_short(ways, lambda: call(return_states=True))
    lstm = Masked(fused_rnn.LSTM(INPUTS, HIDDEN), **masks, return_states=True)
    assert_general(ways, lambda: run(lstm, x))
    afresh = torch.randn(2, 5, HIDDEN)
    assert_general(ways, lambda: call(reset_hx=afresh))
    again = fused_rnn.GRU(INPUTS, HIDDEN, recompute=True)
    assert_general(ways, lambda: again(x, **masks))


BAD = {
    "size": {"lengths": torch.tensor([3, 9, 1, 9])},
    "rank": {"lengths": torch.tensor([[3, 9, 1, 9, 4]])},
    "too long": {"lengths": torch.tensor([3, 10, 1, 9, 4])},
    "negative": {"lengths": torch.tensor([3, 9, -1, 9, 4])},
    "float": {"lengths": torch.tensor([3.0, 9.0, 1.0, 9.0, 4.0])},
    "bool": {"lengths": torch.ones(5, dtype=torch.bool)},
    "list": {"lengths": [3, 9, 1, 9, 4]},
    "meta": {"lengths": torch.ones(5, dtype=torch.int64, device="meta")},
    "sparse": {"lengths": torch.tensor([3, 9, 1, 9, 4]).to_sparse()},
    "resets' shape": {"resets": torch.zeros(5, STEPS, dtype=torch.bool)},
    "resets' dtype": {"resets": torch.zeros(STEPS, 5)},
    "resets' type": {"resets": True},
}


@pytest.mark.parametrize("masks", BAD.values(), ids=BAD)
def test_bad_masks_get_the_general_ways_error(masks, ways):
    masked, x = Masked(fused_rnn.GRU(INPUTS, HIDDEN), **masks), torch.randn(STEPS, 5, INPUTS)
    error, message = assert_general(ways, masked, x)
    assert issubclass(error, (TypeError, ValueError, RuntimeError, NotImplementedError)), message


def test_unusual_inputs_take_the_general_way(ways):
    masked = Masked(fused_rnn.GRU(INPUTS, HIDDEN), **masks_of("both", False))
    x, wide = torch.randn(STEPS, 5, INPUTS), torch.randn(STEPS, 5, INPUTS + 1)
    for change in (torch.Tensor.double, torch.Tensor.to_sparse, lambda x: x.to("meta")):
        assert_general(ways, masked, change(x))
        assert_general(ways, masked, change(wide))
    assert_general(ways, masked, wide)


def test_without_the_library(ways, monkeypatch):
    for module in (direct, pieces):
        monkeypatch.setattr(module, "cpu_library_error", lambda: "no library")
    monkeypatch.setattr(direct, "calls", lambda: direct._NoCalls)
    masked = Masked(fused_rnn.GRU(INPUTS, HIDDEN), **masks_of("both", False))
    with fused_rnn.backend("auto"):
        assert_general(ways, masked, torch.randn(STEPS, 5, INPUTS))


def test_masks_of_what_has_no_rows_or_steps_take_the_general_way(ways):
    module = fused_rnn.GRU(INPUTS, HIDDEN)
    for steps, lengths in ((STEPS, [0, 0]), (0, [0, 0]), (STEPS, [])):
        masked = Masked(module, lengths=torch.tensor(lengths, dtype=torch.int64))
        assert_general(ways, masked, torch.randn(steps, len(lengths), INPUTS))
    packed = pack_sequence([torch.randn(2, INPUTS)])
    assert_general(ways, Masked(module, lengths=torch.tensor([2])), packed)
    assert_general(ways, Masked(module, lengths=torch.tensor([2])), torch.randn(2, INPUTS))


@pytest.mark.parametrize("shape", [(1, 4, HIDDEN), (5, HIDDEN), (1, 5, HIDDEN + 1), (2, 5, HIDDEN)])
def test_states_that_do_not_fit(shape, ways):
    masked = Masked(fused_rnn.GRU(INPUTS, HIDDEN), **masks_of("lengths", False))
    error, _ = assert_general(ways, masked, torch.randn(STEPS, 5, INPUTS), torch.randn(shape))
    assert error is RuntimeError


def test_transforms_and_contexts_take_the_general_way(ways):
    masked = Masked(fused_rnn.GRU(INPUTS, HIDDEN), **masks_of("both", False))
    x = torch.randn(STEPS, 5, INPUTS)
    assert_general(ways, lambda: torch.func.grad(lambda x: masked(x)[0].sum())(x))
    with fused_rnn.backend("reference"):
        assert_general(ways, masked, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_short(ways, masked, x)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("masks", MASKS)
def test_double_backward(masks, batch_first, ways):
    options = {"num_layers": 2, "bidirectional": True, "batch_first": batch_first}
    masked = Masked(fused_rnn.LSTM(INPUTS, HIDDEN, **options), **masks_of(masks, batch_first))
    x = torch.randn(*((5, STEPS) if batch_first else (STEPS, 5)), INPUTS, requires_grad=True)

    def penalty():
        (grad,) = torch.autograd.grad(weighted(flat(masked(x))), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), [x, *masked.parameters()])

    before = ways.direct
    actual = penalty()
    assert ways.direct == before + 1
    for a, e in zip(actual, ways.call_generally(penalty), strict=True):
        torch.testing.assert_close(a, e)


def test_a_batch_of_gradients_at_once(ways):
    masked = Masked(fused_rnn.GRU(INPUTS, HIDDEN), **masks_of("both", False))
    x = torch.randn(STEPS, 5, INPUTS, requires_grad=True)
    y = masked(x)[0]
    grads = torch.randn(3, *y.shape)
    (together,) = torch.autograd.grad(y, x, grads, retain_graph=True, is_grads_batched=True)
    for grad, expected in zip(grads, together, strict=True):
        torch.testing.assert_close(torch.autograd.grad(y, x, grad, retain_graph=True)[0], expected)


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("return_states", [False, True])
def test_outputs_may_be_changed_in_place(return_states, masks, ways):
    module = fused_rnn.LSTM(INPUTS, HIDDEN)
    masked = Masked(module, **masks_of(masks, False), return_states=return_states)
    x = torch.randn(STEPS, 5, INPUTS)
    for call in (masked, lambda x: ways.call_generally(masked, x)):
        outputs = flat(call(x))
        assert len(outputs) == (5 if return_states else 3)
        for output in outputs:
            output.add_(1)


def test_zeros_without_memory(ways):
    """torch.sgn's backward gives them, and no `contiguous` makes memory of them."""
    x = torch.randn(STEPS, 5, INPUTS, requires_grad=True)
    for layers in (1, 2):
        masked = Masked(fused_rnn.GRU(INPUTS, HIDDEN, layers), **masks_of("both", False))
        assert_short(ways, lambda m: torch.autograd.grad(m(x)[0].sgn().sum(), x), masked)
        assert_general(ways, masked, torch._efficientzerotensor(x.shape))
    for name, mask in masks_of("both", False).items():
        masks = {name: torch._efficientzerotensor(mask.shape, dtype=mask.dtype)}
        assert_general(ways, Masked(masked.module, **masks), x)


def test_a_stateful_module_goes_on(ways):
    module = fused_rnn.GRU(INPUTS, HIDDEN, stateful=True)
    masked, x = (
        Masked(module, **masks_of("rows without a step", False)),
        torch.randn(STEPS, 5, INPUTS),
    )

    def twice():
        module.reset_states()
        return masked(x), masked(x)

    actual = twice()
    assert ways.direct == 2
    assert_same_bits(flat(actual), flat(ways.call_generally(twice)))


def test_lengths_of_a_sequence_that_no_memory_holds():
    """An error at once, not a walk along the sequence."""
    x, lengths = torch.zeros(1, 1, 4).expand(2**40, 1, 4), torch.tensor([2**40])
    with pytest.raises((MemoryError, RuntimeError)):
        fused_rnn.GRU(4, 4)(x, lengths=lengths)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("masks", MASKS)
def test_operators_have_the_same_bits(masks, batch_first, asked, operators_only):
    """Those of large layers, and of what the extension module cannot be built for."""
    module = fused_rnn.LSTM(INPUTS, HIDDEN, 2, bidirectional=True, batch_first=batch_first)
    masked = Masked(module, **masks_of(masks, batch_first))
    x = torch.randn(*((5, STEPS) if batch_first else (STEPS, 5)), INPUTS)
    actual = run(masked, x)
    calls = [answer for answer in asked if type(answer) is not bool]
    assert len(calls) == (0 if direct.calls() is direct._NoCalls else 4) and None not in calls
    assert_same_bits(actual, operators_only(run, masked, x))


def test_a_large_layer(ways):
    """Too large for the extension module, and moved by several threads."""
    lengths = torch.randint(0, 301, (40,))
    masked = Masked(fused_rnn.GRU(64, 40, batch_first=True), lengths=lengths)
    assert_short(ways, run, masked, torch.randn(40, 300, 64))


@pytest.mark.parametrize("masks", MASKS)
def test_masks_may_be_changed_before_backward(masks, ways):
    """As those of an environment's buffer are: what was cut stays cut."""
    given = masks_of(masks, False)
    masked = Masked(fused_rnn.GRU(INPUTS, HIDDEN), **given)
    x = torch.randn(STEPS, 5, INPUTS, requires_grad=True)
    (expected,) = torch.autograd.grad(masked(x)[0].square().sum(), x)
    y, _ = masked(x)
    for mask in given.values():
        mask.zero_()
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    assert ways.direct == 2 and torch.equal(grad, expected)


def masked_arguments():
    weights = [torch.randn(24, 4), torch.randn(24, 6), torch.randn(24), torch.randn(24)]
    return {
        "cell": 3, "x": torch.randn(5, 3, 4), "weights": weights, "h0": None, "c0": None,
        "batch_sizes": None, "directions": 1, "lengths": torch.tensor([5, 0, 2]),
        "resets": torch.rand(5, 3) < 0.3, "batch_first": False,
    }  # fmt: skip


WRONG = {
    "lengths": [
        torch.tensor([5, 0]), torch.tensor([6, 0, 2]), torch.tensor([5, -1, 2]),
        torch.tensor([5, 0, 2], dtype=torch.int32), torch.tensor([[5, 0, 2]]), torch.tensor(5),
        torch.tensor([5, 9, 0, 9, 2])[::2], torch.tensor([5, 0, 2], device="meta"),
        torch.tensor([0, 0, 0]),
    ],
    "resets": [
        torch.zeros(3, 5, dtype=torch.bool), torch.zeros(5, 3), torch.zeros(15, dtype=torch.bool),
        torch.zeros(3, 5, dtype=torch.bool).t(), torch.zeros(5, 3, 1, dtype=torch.bool),
    ],
    "batch_first": [True],
    "batch_sizes": [torch.tensor([3, 3, 3, 3, 3])],
    "x": [torch.randn(15, 4), torch.randn(5, 4, 4), torch.randn(0, 3, 4)],
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_masks_that_do_not_fit_get_nothing(name):
    good, forward = masked_arguments(), torch.ops.fused_rnn_cpu.train_layer
    calls = direct.calls().train_layer
    assert len(forward(**good)) == 6
    for wrong in WRONG[name]:
        a = good | {name: wrong}
        assert forward(**a) == [], wrong
        rows = a["lengths"], a["resets"], a["batch_first"]
        if name != "batch_sizes":
            arguments = (
                a["cell"],
                a["directions"],
                True,
                False,
                rows,
                a["x"],
                None,
                None,
                *a["weights"],
            )
            assert calls(*arguments) is None
    arguments = (
        good["cell"],
        1,
        True,
        False,
        (None, None, True),
        good["x"],
        None,
        None,
        *good["weights"],
    )
    everything = forward(**good | {"lengths": None, "resets": None})
    assert all(map(torch.equal, calls(*arguments), everything))  # nothing to be first in
    for rows in ((None, None), (None, None, 1), ([5, 0, 2], None, False), (5, None, False)):
        arguments = good["cell"], 1, True, False, rows, good["x"], None, None, *good["weights"]
        assert calls(*arguments) is None


def test_pieces_that_cannot_be_get_nothing():
    """Whoever stores what is saved may give back another thing; memory is safe from it."""
    a = masked_arguments()
    y, h_n, c_n, gates, cells, pieces = torch.ops.fused_rnn_cpu.train_layer(
        **a | {"resets": torch.zeros(5, 3, dtype=torch.bool)}
    )
    assert pieces.tolist() == [[0, 0, 5, 1], [2, 0, 2, 1]]
    layer = {name: a[name] for name in ("cell", "x", "weights", "h0", "c0", "directions")}
    saved = {"y": y, "gates": gates, "cells": cells, "batch_sizes": None, "needs": 1}
    grads = {"grad_y": y, "grad_h_n": h_n, "grad_c_n": c_n}

    def answers(rows):
        tensors = y, gates, cells, rows, a["x"], None, None, *a["weights"]
        needs = (True, *(False,) * 6)
        return (
            torch.ops.fused_rnn_cpu.train_layer_backward(**layer, **saved, **grads, pieces=rows),
            direct.calls().train_layer_backward(3, 1, False, needs, y, h_n, c_n, None, tensors)
            or [],
        )

    (by_operator,), by_call = answers(pieces)
    assert all(torch.equal(grad, by_operator) for grad in by_call)
    for wrong in (
        [[0, 0, 6, 1], [2, 0, 2, 1]], [[0, 1, 5, 1], [2, 0, 2, 1]], [[0, 0, 5, 1], [3, 0, 2, 1]],
        [[0, 0, 5, 1], [-1, 0, 2, 1]], [[0, -1, 5, 1], [2, 0, 2, 1]], [[0, 0, 5, 1]],
        [[0, 0, 5, 1], [2, 0, 0, 1]], [[0, 0, 5, 1], [2, 0, 2, 1], [1, 0, 1, 1]],
        [[0, 0, 2**62, 1], [2, 2**62, 2, 1]], [[0, 0, 5], [2, 0, 2]], [[[0, 0, 5, 1]]],
    ):  # fmt: skip
        assert answers(torch.tensor(wrong)) == ([], []), wrong
    for wrong in (pieces.int(), pieces.to("meta"), pieces[:0], pieces.t().contiguous().t()):
        assert answers(wrong) == ([], [])

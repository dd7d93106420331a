"""The short way of training (fused_rnn/training.py): the general way's bits, forward and backward,
and not taken where the general way has something to say."""

import copy
import itertools

import pytest
import torch
from helpers.inputs import (
    LAID_OUT,
    MISFITS,
    SIZES_THAT_DO_NOT_FIT,
    bad_inputs,
    bad_states,
    operator_arguments,
    plain_input,
    states,
)
from helpers.modules import (
    ALL,
    LAYERS,
    changed,
    every_layer,
    every_module,
    make_pair,
    weight_changes,
    weights_that_are_no_parameters,
)
from helpers.outcomes import assert_same_bits, flat, leaves, run, weighted
from helpers.ways import Nothing, NothingBelow, assert_both_ways, assert_general
from torch.autograd import forward_ad
from torch.nn.utils.rnn import pack_sequence

import fused_rnn
from fused_rnn import direct, testing
from fused_rnn.cells import CELLS
from fused_rnn.modules import make_module

pytestmark = pytest.mark.usefixtures("cpu_backend")


OPTIONS = [
    {"num_layers": layers, "bidirectional": bidirectional, "bias": bias, "batch_first": batch_first}
    for layers, bidirectional, bias, batch_first in itertools.product(
        (1, 3), (False, True), (True, False), (False, True)
    )
]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ".".join(map(str, map(int, o.values()))))
def test_layers_have_the_general_ways_bits(cell, options, ways):
    module = make_module(cell, 5, 18, **options)
    parts = options["num_layers"] * (1 + options["bidirectional"])
    for sizes in ((1, 1), (7, 3), (40, 2)):
        x = torch.randn(*(sizes[::-1] if options["batch_first"] else sizes), 5)
        for hx in (None, states(cell, parts, sizes[1], 18)):
            assert_both_ways(ways, module, x, hx)


LENGTHS = {
    "falling": [7, 7, 4, 1, 1],
    "any order": [1, 4, 7, 1, 7],
    "equal": [3, 3, 3],
    "one": [6],
    "one step": [1, 1],
}


def packed(lengths, enforce_sorted=False):
    rows = [torch.randn(length, 5) for length in lengths]
    return pack_sequence(rows, enforce_sorted=enforce_sorted)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("options", OPTIONS[::2], ids=lambda o: ".".join(map(str, o.values())))
def test_packed_layers_have_the_general_ways_bits(cell, options, ways):
    module = make_module(cell, 5, 18, **options)
    parts = options["num_layers"] * (1 + options["bidirectional"])
    for name, lengths in LENGTHS.items():
        for hx in (None, states(cell, parts, len(lengths), 18)):
            for enforce_sorted in {False, name != "any order"}:
                assert_both_ways(ways, module, packed(lengths, enforce_sorted), hx)


def test_packed_projection_and_dropout_have_the_general_ways_bits(ways):
    sizes = {"proj_size": 4, "num_layers": 2, "bidirectional": True, "dropout": 0.3}
    module = fused_rnn.LSTM(5, 12, **sizes)
    for hx in (None, (torch.randn(4, 5, 4), torch.randn(4, 5, 12))):
        assert_both_ways(ways, module, packed(LENGTHS["any order"]), hx)


@pytest.mark.parametrize("wrong", ["rows", "rank", "double"])
def test_states_that_do_not_fit_packed_rows_take_the_general_way(wrong, ways):
    change = {"rows": lambda h: h[:, 1:], "rank": lambda h: h[0], "double": torch.Tensor.double}
    for enforce_sorted in (True, False):
        x = packed(LENGTHS["falling"], enforce_sorted)
        assert_general(ways, fused_rnn.GRU(5, 6), x, change[wrong](torch.randn(1, 5, 6)))


def test_double_backward_of_packed_rows(ways):
    module = fused_rnn.LSTM(5, 4, num_layers=2, bidirectional=True)

    def penalty():
        x = packed(LENGTHS["any order"])
        x = x._replace(data=x.data.clone().requires_grad_())
        outputs = flat(module(x))
        (grad,) = torch.autograd.grad(weighted(outputs), x.data, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), list(module.parameters()))

    torch.manual_seed(1)
    actual = penalty()
    assert ways.direct > 0
    torch.manual_seed(1)
    expected = ways.call_generally(penalty)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("bias", [True, False])
def test_projection_has_the_general_ways_bits(bias, ways):
    sizes = {"proj_size": 5, "num_layers": 2, "bidirectional": True}
    module = fused_rnn.LSTM(8, 12, bias=bias, **sizes)
    for hx in (None, (torch.randn(4, 3, 5), torch.randn(4, 3, 12))):
        assert_both_ways(ways, module, torch.randn(6, 3, 8), hx)


@every_layer
@pytest.mark.parametrize("bias", [True, False])
def test_cells_have_the_general_ways_bits(cell, bias, ways):
    module, _ = make_pair(cell, "Cell", 5, 17, bias=bias)
    for hx in (None, states(cell, 3, 17)):
        assert_both_ways(ways, module, torch.randn(3, 5), hx)


@every_layer
def test_dropout_between_layers_draws_the_same_masks(cell, ways):
    module, _ = make_pair(cell, "", 5, 9, num_layers=3, dropout=0.4, batch_first=True)
    for mode in (True, False):
        assert_both_ways(ways, module.train(mode), torch.randn(4, 7, 5))


def test_a_large_layer_with_threads(ways, num_threads):
    num_threads(2)
    assert_both_ways(ways, fused_rnn.LSTM(96, 160, bidirectional=True), torch.randn(40, 24, 96))


@pytest.mark.parametrize("batch_first", [False, True])
def test_no_large_copy_is_kept_for_backward(batch_first, ways):
    module = fused_rnn.GRU(1024, 4, batch_first=batch_first)
    for timesteps, taken in ((100, True), (300, not batch_first)):
        x = torch.randn(*((2, timesteps) if batch_first else (timesteps, 2)), 1024)
        saved = set()
        hooks = torch.autograd.graph.saved_tensors_hooks
        with hooks(
            lambda t, saved=saved: saved.add(t.untyped_storage().data_ptr()) or t, lambda t: t
        ):
            before = ways.direct
            module(x)
        assert (ways.direct > before) == taken
        assert taken or x.untyped_storage().data_ptr() in saved


def test_no_timestep_of_a_loop_takes_the_general_way(ways):
    """Cells called in a loop, gradients through all of it."""
    ours, theirs = make_pair("lstm", "Cell", 4, 6)
    x, results = torch.randn(9, 3, 4), []
    for module in (ours, theirs):
        hx, outputs = None, []
        for row in x:
            hx = module(row, hx)
            outputs.append(hx[0])
        torch.stack(outputs).sin().sum().backward()
        results.append([p.grad for p in module.parameters()])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert (ways.direct, ways.general) == (9, 0)


@pytest.mark.parametrize("names", [["weight_hh_l0"], ["bias_ih_l0", "bias_hh_l0"], []])
def test_what_asks_for_no_gradient_gets_none(names, ways):
    module = fused_rnn.LSTM(4, 6).requires_grad_(False)
    for name in names:
        module.get_parameter(name).requires_grad_()
    x, h, c = torch.randn(5, 3, 4), torch.randn(1, 3, 6), torch.randn(1, 3, 6)

    def grads():
        args = [t.clone().requires_grad_(not names) for t in (x, h, c)]
        module(args[0], tuple(args[1:]))[0].square().sum().backward()
        every = [*args, *module.parameters()]
        assert [t.grad is None for t in every] == [not t.requires_grad for t in every]
        found = [t.grad.clone() for t in every if t.requires_grad]
        module.zero_grad()
        return found

    assert_same_bits(grads(), ways.call_generally(grads))
    assert ways.direct == 1


def test_where_nothing_asks_nothing_is_saved(ways):
    module, x = fused_rnn.GRU(4, 6).requires_grad_(False), torch.randn(5, 3, 4)
    y = module(x)[0]
    assert not y.requires_grad and ways.direct == 1
    assert torch.equal(y, ways.call_generally(module, x)[0])


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (1, 2)])
def test_gradients_of_some_outputs(which, ways):
    module = fused_rnn.LSTM(4, 6, bidirectional=True)

    def loss(outputs):
        return sum(outputs[i].sin().sum() for i in which)

    assert_both_ways(ways, module, torch.randn(5, 3, 4), loss=loss)


@pytest.mark.parametrize(("cell", "suffix"), [("gru", ""), ("lstm", "Cell")])
def test_gradients_of_odd_layouts(cell, suffix, ways):
    """What comes back may be one number for all, or lie in another order."""
    module, _ = make_pair(cell, suffix, 4, 6)
    x = torch.randn(3, 4) if suffix else torch.randn(5, 3, 4)
    for loss in (
        lambda outputs: sum(t.sum() for t in outputs),
        lambda outputs: sum((t.transpose(-1, -2) * 2).flatten().cumsum(0).sum() for t in outputs),
    ):
        assert_both_ways(ways, module, x, loss=loss)


def plain_args(cell, suffix):
    x = plain_input(suffix)
    return x, states(cell, *x.shape)


@every_module
@pytest.mark.parametrize("change", weight_changes(), ids=lambda f: f.__name__)
@pytest.mark.parametrize("which", ["weight_ih", "weight_hh"])
def test_unusual_weights_take_the_general_way(cell, suffix, change, which, ways):
    ours = changed(cell, suffix, change, which)
    assert_general(ways, ours, plain_args(cell, suffix)[0])


@every_module
@pytest.mark.parametrize("change", weights_that_are_no_parameters(), ids=lambda f: f.__name__)
@pytest.mark.parametrize("which", ["weight_hh", "bias_ih"])
def test_weights_need_not_be_parameters(cell, suffix, change, which, ways):
    ours = changed(cell, suffix, change, which)
    assert_both_ways(ways, ours, *plain_args(cell, suffix))


@every_module
@pytest.mark.parametrize("layout", LAID_OUT)
def test_arguments_may_lie_in_any_order(cell, suffix, layout, ways):
    ours, _ = make_pair(cell, suffix, 8, 8)
    x = torch.randn(3, 8) if suffix else torch.randn(5, 3, 8)
    hx = states(cell, *(x.shape if suffix else (1, 3, 8)))

    def laid_out(value):
        if isinstance(value, tuple):
            return tuple(map(laid_out, value))
        return value if value is None else LAID_OUT[layout](value)

    def call(x, hx):
        return ours(laid_out(x), laid_out(hx))

    call.parameters = ours.parameters
    assert_both_ways(ways, call, x, hx)
    if not suffix:
        ours.batch_first = True
        assert_both_ways(ways, call, x, None)


def assert_without_batch(ways, ours, theirs, x, hx):
    """The short way, which asks itself once more, and torch.nn's shapes."""
    actual = run(ours, x, hx)
    assert ways.general == 0
    assert_same_bits(actual, ways.call_generally(lambda: run(ours, x, hx)))
    ways.general = 0
    for a, e in zip(actual, run(theirs, x, hx), strict=True):
        assert a.shape == e.shape
        torch.testing.assert_close(a, e)


@every_layer
@pytest.mark.parametrize("batch_first", [False, True])
def test_sequences_without_a_batch(cell, batch_first, ways):
    for options in ({}, {"num_layers": 2, "bidirectional": True}):
        ours, theirs = make_pair(cell, "", 4, 6, batch_first=batch_first, **options)
        parts = len(ours._flat_weights) // 4
        for hx in (None, states(cell, parts, 6)):
            assert_without_batch(ways, ours, theirs, torch.randn(5, 4), hx)
        for wrong in (states(cell, parts, 1, 6), states(cell, parts, 7)):
            assert_general(ways, ours, torch.randn(5, 4), wrong)
            ways.general = 0


@every_layer
def test_a_timestep_without_a_batch(cell, ways):
    ours, theirs = make_pair(cell, "Cell", 4, 6)
    for hx in (None, states(cell, 6)):
        assert_without_batch(ways, ours, theirs, torch.randn(4), hx)
    for wrong in (states(cell, 1, 6), states(cell, 7)):
        assert_general(ways, ours, torch.randn(4), wrong)


@every_module
def test_one_bias_alone_takes_the_general_way(cell, suffix, ways):
    ours, _ = make_pair(cell, suffix, 8, 8)
    setattr(ours, "bias_hh" if suffix else "bias_hh_l0", None)
    assert_general(ways, ours, plain_args(cell, suffix)[0])


@every_module
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", dict(bad_inputs()))
def test_unusual_inputs_take_the_general_way(cell, suffix, kind, ways, monkeypatch):
    monkeypatch.delenv("FUSED_RNN_BACKEND")
    if kind == "packed" and not suffix:
        pytest.skip("layers take it")
    ours, _ = make_pair(cell, suffix, 8, 8)
    assert_general(ways, ours, dict(bad_inputs())[kind](suffix))
    if not suffix:
        ours.batch_first = True
        assert_general(ways, ours, dict(bad_inputs())[kind](suffix))


@every_module
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", dict(bad_states()))
def test_unusual_states_take_the_general_way(cell, suffix, kind, ways):
    ours, _ = make_pair(cell, suffix, 8, 8)
    x, hx = plain_args(cell, suffix)
    assert_general(ways, ours, x, dict(bad_states())[kind](hx))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_layers", 2), ("num_layers", 0), ("num_layers", 1.0), ("dropout", 2.0),
        ("dropout", None), ("bidirectional", True), ("recompute", True),
    ],
)  # fmt: skip
def test_changed_options_take_the_general_way(name, value, ways):
    ours, _ = make_pair("gru", "", 8, 8)
    setattr(ours, name, value)
    assert_general(ways, ours, *plain_args("gru", ""))


@every_layer
def test_changed_size_of_a_cell_takes_the_general_way(cell, ways):
    ours, _ = make_pair(cell, "Cell", 8, 8)
    ours.hidden_size = 9
    assert_general(ways, ours, *plain_args(cell, "Cell"))


@every_module
def test_functional_call_and_data_are_honoured(cell, suffix, ways):
    """Weights that are not the module's own, or were written past autograd."""
    ours, theirs = make_pair(cell, suffix, 8, 8)
    x = plain_args(cell, suffix)[0]
    weights = {name: torch.randn_like(p) / 3 for name, p in ours.named_parameters()}
    theirs.load_state_dict(weights)
    weights = {name: weight.requires_grad_() for name, weight in weights.items()}
    given = flat(torch.func.functional_call(ours, weights, (x,)))
    grads = torch.autograd.grad(weighted(given), list(weights.values()))
    expected = run(theirs, x)
    outputs, expected_grads = expected[: len(given)], expected[-len(grads) :]
    torch.testing.assert_close([*given, *grads], [*outputs, *expected_grads])
    for name, p in ours.named_parameters():
        p.data.copy_(weights[name])
    torch.testing.assert_close(run(ours, x), expected)


@pytest.mark.parametrize(
    "context",
    [
        forward_ad.dual_level,
        lambda: fused_rnn.backend("reference"),
        Nothing,
        NothingBelow,
    ],
    ids=["forward_ad", "backend", "function_mode", "dispatch_mode"],
)
@every_module
def test_contexts_take_the_general_way(cell, suffix, context, ways, monkeypatch):
    monkeypatch.delenv("FUSED_RNN_BACKEND")
    ours, _ = make_pair(cell, suffix, 8, 8)
    x, _ = plain_args(cell, suffix)
    with context():
        assert_general(ways, ours, x)
    ours(x)
    assert ways.direct == 1


@pytest.mark.parametrize(
    ("variable", "block", "taken"),
    [
        ("", None, True), ("auto", None, True), ("cpu", None, True), ("reference", None, False),
        ("nonsense", None, False), ("", "cpu", True), ("", "auto", True),
        ("reference", "cpu", False),
    ],
)  # fmt: skip
def test_the_backend_asked_for_is_the_one(variable, block, taken, ways, monkeypatch):
    monkeypatch.setenv("FUSED_RNN_BACKEND", variable)
    ours, _ = make_pair("gru", "", 8, 8)
    x = torch.randn(3, 1, 8)

    def call():
        if block is None:
            return ours(x)
        with fused_rnn.backend(block):
            return ours(x)

    if taken:
        call()
        assert ways.direct == 1
    else:
        assert_general(ways, call)


@every_module
def test_explain_sees_every_layer(cell, suffix, ways, monkeypatch):
    monkeypatch.delenv("FUSED_RNN_BACKEND")
    ours, _ = make_pair(cell, suffix, 8, 8)
    told = fused_rnn.explain(ours, plain_args(cell, suffix)[0])
    assert told.backend == "cpu" and len(told.layers) == 1 and ways.direct == 0


def test_capability_is_checked(ways, set_capability):
    set_capability("nonsense")
    with pytest.raises(RuntimeError, match="FUSED_RNN_CPU_CAPABILITY"):
        fused_rnn.GRU(4, 6)(torch.randn(5, 3, 4))


def test_without_the_library(ways, monkeypatch):
    monkeypatch.setenv("FUSED_RNN_BACKEND", "reference")
    monkeypatch.setattr(direct, "cpu_library_error", lambda: "it is not there")
    assert_general(ways, fused_rnn.LSTM(8, 8), torch.randn(1, 1, 8))


@every_module
def test_transforms_take_the_general_way(cell, suffix, ways):
    ours, _ = make_pair(cell, suffix, 8, 8)
    x, _ = plain_args(cell, suffix)
    torch.func.vmap(ours)(torch.stack((x, x)))
    torch.func.grad(lambda x: weighted(flat(ours(x))))(x)
    torch.func.jvp(lambda x: flat(ours(x))[0], (x,), (x,))
    torch.jit.trace(ours, (x,), check_trace=False)
    assert ways.direct == 0


# What may be about in backward alone, where forward took the short way.


@every_module
def test_double_backward(cell, suffix, ways):
    ours, theirs = make_pair(cell, suffix, 8, 8)
    x, hx = plain_args(cell, suffix)

    def penalty(module, hx):
        leaf, hx = leaves(x), leaves(hx)
        given = [leaf, *(flat(hx) if hx is not None else []), *module.parameters()]
        loss = sum(t.sin().sum() for t in flat(module(leaf, hx)))
        grads = torch.autograd.grad(loss, given, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), given)
        return [*grads, *second]

    for each in (hx, None):
        actual, expected = penalty(ours, each), penalty(theirs, each)
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    assert ways.direct == 2


@pytest.mark.parametrize(
    "context",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: fused_rnn.backend("reference"),
        lambda: fused_rnn.backend("triton"),
        NothingBelow,
        lambda: torch.autograd.set_detect_anomaly(True),
    ],
    ids=["autocast", "reference", "triton", "dispatch_mode", "anomaly"],
)
@every_module
def test_contexts_around_backward(cell, suffix, context, ways):
    ours, _ = make_pair(cell, suffix, 8, 8)
    x, hx = plain_args(cell, suffix)
    results = []
    for around in (context, torch.enable_grad):
        leaf = leaves(x)
        loss = weighted(flat(ours(leaf, leaves(hx))))
        with around():
            results.append(torch.autograd.grad(loss, [leaf, *ours.parameters()]))
    assert_same_bits(*results)
    assert ways.direct == 2


def test_a_batch_of_gradients_at_once(ways):
    ours, _ = make_pair("gru", "", 8, 8)
    x = leaves(torch.randn(3, 2, 8))
    y = ours(x)[0]
    cotangents = torch.randn(4, *y.shape)
    (batched,) = torch.autograd.grad(y, x, cotangents, is_grads_batched=True, retain_graph=True)
    for cotangent, actual in zip(cotangents, batched, strict=True):
        (expected,) = torch.autograd.grad(y, x, cotangent, retain_graph=True)
        torch.testing.assert_close(actual, expected)
    assert ways.direct == 1


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", testing.TORCH_CELLS)
def test_saved_tensors_may_come_back_in_another_order(cell, bidirectional, ways):
    def strided(t):
        return torch.stack((t, t + 1), -1)[..., 0] if t.is_floating_point() else t

    ours = testing.make_module(cell, 8, 8, bidirectional=bidirectional)
    x = torch.randn(3, 2, 8)
    expected = run(ours, x)
    for order in (strided, lambda t: t.mT.contiguous().mT if t.dim() > 1 else t):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, order):
            torch.testing.assert_close(run(ours, x), expected)


@pytest.mark.parametrize(("cell", "suffix"), ALL, ids="".join)
def test_backward_again_and_of_what_was_changed(cell, suffix, ways):
    ours, _ = make_pair(cell, suffix, 8, 8)
    x = leaves(plain_args(cell, suffix)[0])
    outputs = flat(ours(x))
    loss = weighted(outputs)
    first, second = (torch.autograd.grad(loss, x, retain_graph=True) for _ in range(2))
    assert_same_bits(first, second)
    with torch.no_grad():
        next(ours.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, x)
    assert ways.direct == 1


def test_final_states_may_be_changed(ways):
    ours, _ = make_pair("lstm", "", 8, 8)
    x = leaves(torch.randn(3, 2, 8))
    y, (h_n, c_n) = ours(x)
    (expected,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    h_n.zero_(), c_n.mul_(2)
    (actual,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(actual, expected) and ways.direct == 1


def test_a_stateful_module_goes_on(ways):
    ours = fused_rnn.GRU(4, 6, stateful=True)
    plain = fused_rnn.GRU(4, 6)
    plain.load_state_dict(ours.state_dict())
    hx = None
    for _ in range(3):
        x = torch.randn(2, 3, 4)
        y, hx = plain(x, None if hx is None else hx.detach())
        assert torch.equal(ours(x)[0], y)
    assert ways.direct == 6


def test_copies_train(ways):
    ours, _ = make_pair("lstm", "", 8, 8)
    x = torch.randn(3, 2, 8)
    assert_same_bits(run(copy.deepcopy(ours), x), run(ours, x))


def call_operator(name, arguments):
    """What it returns; to an index that is no cell's, nothing."""
    try:
        return getattr(torch.ops.fused_rnn_cpu, name)(**arguments)
    except RuntimeError as error:
        assert "cell: expected 0 to 4" in str(error)
        return []


@pytest.mark.parametrize("name", MISFITS)
def test_operators_return_nothing_to_what_does_not_fit(name):
    arguments = operator_arguments()
    y, h_n, c_n, gates, cells = torch.ops.fused_rnn_cpu.train_layer(**arguments)
    grads = {"grad_y": y, "grad_h_n": h_n, "grad_c_n": c_n}
    backward = arguments | grads | {"y": y, "gates": gates, "cells": cells, "needs": 0b1111111}
    assert len(torch.ops.fused_rnn_cpu.train_layer_backward(**backward)) == 7
    for value in MISFITS[name]:
        assert call_operator("train_layer", arguments | {name: value}) == []
        assert call_operator("train_layer_backward", backward | {name: value}) == []


@pytest.mark.parametrize("sizes", SIZES_THAT_DO_NOT_FIT, ids=str)
def test_operators_return_nothing_to_sizes_of_steps_that_do_not_fit(sizes):
    arguments = operator_arguments() | {"x": torch.randn(5, 4)}
    good = arguments | {"batch_sizes": torch.tensor([2, 2, 1])}
    y, _, _, gates, cells = torch.ops.fused_rnn_cpu.train_layer(**good)
    assert y.shape == (5, 6)
    backward = {"y": y, "gates": gates, "cells": cells, "needs": 1}
    backward |= {"grad_y": y, "grad_h_n": None, "grad_c_n": None}
    assert len(torch.ops.fused_rnn_cpu.train_layer_backward(**good, **backward)) == 1
    for odd in (torch.tensor(sizes), torch.tensor([2, 9, 2, 9, 1])[::2].clone().to("meta")):
        bad = good | {"batch_sizes": odd}
        assert torch.ops.fused_rnn_cpu.train_layer(**bad) == []
        assert torch.ops.fused_rnn_cpu.train_layer_backward(**bad, **backward) == []


@pytest.mark.parametrize("name", ["grad_y", "grad_h_n", "grad_c_n", "y", "gates", "cells"])
def test_backwards_operator_returns_nothing_to_what_was_not_saved(name):
    arguments = operator_arguments()
    y, h_n, c_n, gates, cells = torch.ops.fused_rnn_cpu.train_layer(**arguments)
    saved = {"grad_y": y, "grad_h_n": h_n, "grad_c_n": c_n, "y": y, "gates": gates, "cells": cells}
    backward = torch.ops.fused_rnn_cpu.train_layer_backward
    for value in (saved[name][:1, :1], saved[name].double(), saved[name].to("meta")):
        assert backward(**arguments, **(saved | {name: value}), needs=1) == []
    found = backward(**arguments, **(saved | {name: None}), needs=1)
    assert len(found) == (1 if name.startswith("grad") else 0)


def test_all_layers_are_here():
    assert LAYERS.keys() | {"gru_reset_before"} == CELLS.keys()

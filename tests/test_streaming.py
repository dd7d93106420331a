"""The direct way of inference (fused_rnn/direct.py): right where it is taken, and not taken where
the general way has something to say."""

import copy
import itertools
import pickle

import pytest
import torch
from helpers.inputs import Named, bad_inputs, bad_states, plain_input, states
from helpers.modules import (
    changed,
    every_layer,
    every_module,
    make_pair,
    weight_changes,
    weights_that_are_no_parameters,
)
from helpers.outcomes import flat
from helpers.ways import Nothing, NothingBelow, assert_general
from torch.autograd import forward_ad

import fused_rnn
from fused_rnn import direct, native, testing

pytestmark = pytest.mark.usefixtures("cpu_backend")


@pytest.fixture
def shortest():
    return direct


def assert_as_good_as_torch(actual, ours, theirs, *args):
    """No further from float64 than twice torch.nn is, and a few roundings."""

    def double(value):
        if isinstance(value, torch.Tensor):
            return value.double()
        return value if value is None else tuple(double(v) for v in value)

    exact = flat(copy.deepcopy(theirs).double()(*map(double, args)))
    for i, (a, t, e) in enumerate(zip(flat(actual), flat(theirs(*args)), exact, strict=True)):
        bound = 2 * testing.relative_error(t, e) + 1e-6
        testing.assert_near(f"output {i}", a, e, bound, 2 * bound)


OPTIONS = [
    {"num_layers": layers, "bidirectional": bidirectional, "bias": bias, "batch_first": batch_first}
    for layers, bidirectional, bias, batch_first in itertools.product(
        (1, 2, 3), (False, True), (True, False), (False, True)
    )
]


@every_layer
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ".".join(map(str, map(int, o.values()))))
def test_layers_agree_with_torch(cell, options, ways):
    directions = 2 if options["bidirectional"] else 1
    parts = options["num_layers"] * directions
    with torch.no_grad():
        for inputs, hidden in ((5, 7), (16, 16), (33, 50)):
            ours, theirs = make_pair(cell, "", inputs, hidden, **options)
            for batch in (1, 2, 3, 16, 17, 20):
                shape = (batch, 1) if options["batch_first"] else (1, batch)
                x, hx = torch.randn(*shape, inputs), states(cell, parts, batch, hidden)
                for given in (None, hx):
                    actual = ours(x, given)
                    assert_as_good_as_torch(actual, ours, theirs, x, given)
                    expected = flat(ways.call_generally(ours, x, given))
                    for a, e in zip(flat(actual), expected, strict=True):
                        torch.testing.assert_close(a, e, rtol=0, atol=0)
            for steps in (1, 3):
                x, hx = torch.randn(steps, inputs), states(cell, parts, hidden)
                for given in (None, hx):
                    assert_as_good_as_torch(ours(x, given), ours, theirs, x, given)
    assert ways.direct == ways.general + 3 * 4


@every_layer
@pytest.mark.parametrize("suffix", ["Cell"])
@pytest.mark.parametrize("bias", [True, False])
def test_cells_agree_with_torch(cell, suffix, bias, ways):
    calls = 0
    with torch.inference_mode():
        for inputs, hidden in ((5, 7), (16, 16), (33, 50), (1, 1)):
            ours, theirs = make_pair(cell, suffix, inputs, hidden, bias=bias)
            for batch in ((), (1,), (2,), (16,), (20,)):
                x, hx = torch.randn(*batch, inputs), states(cell, *batch, hidden)
                for given in (None, hx):
                    assert_as_good_as_torch(ours(x, given), ours, theirs, x, given)
                    calls += 1
    assert (ways.direct, ways.general) == (calls, 0)


@every_layer
@pytest.mark.parametrize("batch_first", [False, True])
def test_sequences_agree_with_torch(cell, batch_first, ways):
    ours, theirs = make_pair(
        cell, "", 6, 9, num_layers=2, batch_first=batch_first, bidirectional=True
    )
    with torch.no_grad():
        for shape in ((4, 3), (1, 5), (7, 1)):
            x = torch.randn(*shape, 6)
            assert_as_good_as_torch(ours(x), ours, theirs, x)
    assert ways.direct == 3


@every_module
def test_outputs_are_tensors_of_their_own(cell, suffix, ways):
    ours, _ = make_pair(cell, suffix, 8, 8)
    x = torch.randn(1, 8) if suffix else torch.randn(1, 1, 8)
    hx = states(cell, *x.shape)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            result = ours(x, hx)
            memory = [t.untyped_storage().data_ptr() for t in flat(result) + flat(hx) + [x]]
            assert len(set(memory)) == len(memory)
            assert all(not t.requires_grad and t._base is None for t in flat(result))
            assert all(t.is_inference() == torch.is_inference_mode_enabled() for t in flat(result))
            flat(result)[0].add_(1)
    assert (ways.direct, ways.general) == (2, 0)


@every_module
def test_nothing_given_is_written_to(cell, suffix, ways):
    ours, _ = make_pair(cell, suffix, 8, 8)
    x = torch.randn(3, 8) if suffix else torch.randn(1, 3, 8)
    hx = states(cell, *x.shape)
    given = [x, *flat(hx), *ours.parameters()]
    before = [(t.clone(), t._version) for t in given]
    with torch.no_grad():
        ours(x, hx)
    for tensor, (values, version) in zip(given, before, strict=True):
        assert torch.equal(tensor, values) and tensor._version == version
    assert ways.direct == 1


@every_layer
def test_streaming_is_the_whole_sequence(cell, ways):
    ours, _ = make_pair(cell, "", 6, 20, num_layers=2)
    x = torch.randn(9, 2, 6)
    with torch.inference_mode():
        whole, final = ours(x)
        hx, pieces = None, []
        for t in range(9):
            y, hx = ours(x[t : t + 1], hx)
            pieces.append(y)
    testing.assert_near("y", torch.cat(pieces), whole, 1e-6, 1e-5)
    for a, e in zip(flat(hx), flat(final), strict=True):
        testing.assert_near("state", a, e, 1e-6, 1e-5)
    assert ways.general == 0


@every_layer
def test_dropout_counts_in_training_only(cell, ways):
    ours, _ = make_pair(cell, "", 4, 4, num_layers=2, dropout=0.5)
    x = torch.randn(1, 1, 4)
    with torch.no_grad():
        ours(x)
        assert ways.direct == 1
        ours.train()(x)
        assert (ways.direct, ways.general) == (1, 1)
        ours.eval().dropout = 2.0
        assert_general(ways, ours, x)


@every_module
@pytest.mark.parametrize("change", weight_changes(), ids=lambda f: f.__name__)
@pytest.mark.parametrize("which", ["weight_ih", "weight_hh"])
def test_unusual_weights_take_the_general_way(cell, suffix, change, which, ways):
    ours = changed(cell, suffix, change, which)
    x = plain_input(suffix)
    with torch.no_grad():
        assert_general(ways, ours, x)


@every_module
@pytest.mark.parametrize("change", weights_that_are_no_parameters(), ids=lambda f: f.__name__)
@pytest.mark.parametrize("which", ["weight_ih", "bias_hh"])
def test_weights_need_not_be_parameters(cell, suffix, change, which, ways):
    ours = changed(cell, suffix, change, which)
    x = plain_input(suffix)
    with torch.no_grad():
        actual, expected = flat(ours(x)), flat(ways.call_generally(ours, x))
    assert ways.direct == 1 and all(map(torch.equal, actual, expected))


@every_module
def test_one_bias_alone_takes_the_general_way(cell, suffix, ways):
    ours, _ = make_pair(cell, suffix, 8, 8)
    setattr(ours, "bias_hh" if suffix else "bias_hh_l0", None)
    with torch.no_grad():
        assert_general(ways, ours, plain_input(suffix))


@every_module
def test_functional_call_is_honoured(cell, suffix, ways):
    ours, theirs = make_pair(cell, suffix, 8, 8)
    x = plain_input(suffix)
    weights = {name: torch.randn_like(p) for name, p in ours.named_parameters()}
    theirs.load_state_dict(weights)
    with torch.no_grad():
        actual = torch.func.functional_call(ours, weights, (x,))
        assert_as_good_as_torch(actual, ours, theirs, x)


@every_module
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", dict(bad_inputs()))
def test_unusual_inputs_take_the_general_way(cell, suffix, kind, ways, monkeypatch):
    monkeypatch.delenv("FUSED_RNN_BACKEND")
    ours, _ = make_pair(cell, suffix, 8, 8)
    with torch.no_grad():
        assert_general(ways, ours, dict(bad_inputs())[kind](suffix))


@every_module
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", dict(bad_states()))
def test_unusual_states_take_the_general_way(cell, suffix, kind, ways):
    ours, _ = make_pair(cell, suffix, 8, 8)
    x = plain_input(suffix)
    with torch.no_grad():
        assert_general(ways, ours, x, dict(bad_states())[kind](states(cell, *x.shape)))


@every_module
def test_changed_sizes_take_the_general_way(cell, suffix, ways):
    """A cell holds its states to hidden_size, whatever its weights are."""
    ours, _ = make_pair(cell, suffix, 8, 8)
    x = plain_input(suffix)
    if suffix:
        ours.hidden_size = 9
    else:
        ours.num_layers = 2
    with torch.no_grad():
        assert_general(ways, ours, x, states(cell, *x.shape))


@pytest.mark.parametrize("bias", [True, False])
def test_projection_agrees_with_torch(bias, ways):
    sizes = {"proj_size": 5, "num_layers": 2, "bidirectional": True}
    ours, theirs = make_pair("lstm", "", 8, 12, bias=bias, **sizes)
    x = torch.randn(1, 3, 8)
    hx = torch.randn(4, 3, 5), torch.randn(4, 3, 12)
    with torch.no_grad():
        for given in (None, hx):
            assert_as_good_as_torch(ours(x, given), ours, theirs, x, given)
        assert ways.direct == 2
        assert_general(ways, ours, x, hx[::-1])


def test_a_subclass_as_input_takes_the_general_way(ways):
    ours, _ = make_pair("gru", "", 8, 8)
    with torch.no_grad():
        assert_general(ways, ours, torch.randn(1, 1, 8).as_subclass(Named))


@every_module
def test_negative_bit_is_resolved(cell, suffix):
    ours, _ = make_pair(cell, suffix, 8, 8)
    x = plain_input(suffix)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            for a, e in zip(flat(ours(torch._neg_view(x))), flat(ours(-x)), strict=True):
                assert torch.equal(a, e)


@every_module
def test_gradients_take_another_way(cell, suffix, ways):
    ours, theirs = make_pair(cell, suffix, 8, 8)
    x = plain_input(suffix)
    for module in (ours, theirs):
        sum(t.sum() for t in flat(module(x))).backward()
    for a, e in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, e.grad)
    assert ways.direct == 0
    with torch.no_grad(), torch.enable_grad():
        assert all(t.requires_grad for t in assert_general(ways, ours, x))


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
    x = plain_input(suffix)
    with torch.no_grad(), context():
        assert_general(ways, ours, x)
    with torch.no_grad():
        ours(x)
    assert ways.direct == 1


@every_module
def test_vmap_takes_the_general_way(cell, suffix, ways):
    ours, _ = make_pair(cell, suffix, 8, 8)
    x = torch.randn(3, 2, 8) if suffix else torch.randn(3, 1, 2, 8)
    with torch.no_grad():
        actual = flat(torch.vmap(ours)(x))
        assert ways.direct == 0
        for i in range(3):
            for a, e in zip(actual, flat(ours(x[i])), strict=True):
                testing.assert_near("vmap", a[i], e, 1e-6, 1e-5)
    assert ways.direct == 3


@every_module
def test_forward_mode_takes_the_general_way(cell, suffix, ways):
    ours, theirs = make_pair(cell, suffix, 8, 8)
    x = plain_input(suffix)
    tangents = []
    for module in (ours, theirs):
        # torch.nn's LSTM through oneDNN has no forward mode.
        plain = torch.backends.mkldnn.flags(enabled=False)
        with torch.no_grad(), forward_ad.dual_level(), plain:
            y = flat(module(forward_ad.make_dual(x, torch.ones_like(x))))[0]
            tangents.append(forward_ad.unpack_dual(y).tangent)
    torch.testing.assert_close(*tangents)
    assert ways.direct == 0


@pytest.mark.parametrize(
    ("variable", "block", "taken"),
    [
        ("", None, True),
        ("auto", None, True),
        ("cpu", None, True),
        ("reference", None, False),
        ("nonsense", None, False),
        ("", "cpu", True),
        ("", "auto", True),
        ("reference", "cpu", False),
    ],
)
def test_the_backend_asked_for_is_the_one(variable, block, taken, ways, monkeypatch):
    monkeypatch.setenv("FUSED_RNN_BACKEND", variable)
    ours, _ = make_pair("gru", "", 8, 8)
    x = torch.randn(1, 1, 8)

    def call():
        if block is None:
            return ours(x)
        with fused_rnn.backend(block):
            return ours(x)

    with torch.no_grad():
        if taken:
            call()
            assert ways.direct == 1
        else:
            assert_general(ways, call)


@every_module
def test_capability_is_checked(cell, suffix, ways, set_capability):
    set_capability("nonsense")
    ours, _ = make_pair(cell, suffix, 8, 8)
    with torch.no_grad(), pytest.raises(RuntimeError, match="FUSED_RNN_CPU_CAPABILITY"):
        ours(plain_input(suffix))


@every_module
def test_explain_sees_every_layer(cell, suffix, ways, monkeypatch):
    monkeypatch.delenv("FUSED_RNN_BACKEND")
    ours, _ = make_pair(cell, suffix, 8, 8)
    with torch.no_grad():
        told = fused_rnn.explain(ours, plain_input(suffix))
    assert told.backend == "cpu" and len(told.layers) == 1 and ways.direct == 0


def test_without_the_library(ways, monkeypatch):
    monkeypatch.setenv("FUSED_RNN_BACKEND", "reference")
    monkeypatch.setattr(direct, "cpu_library_error", lambda: "it is not there")
    ours, _ = make_pair("lstm", "", 8, 8)
    with torch.no_grad():
        assert_general(ways, ours, torch.randn(1, 1, 8))


@every_module
def test_hooks_run(cell, suffix, ways):
    ours, _ = make_pair(cell, suffix, 8, 8)
    seen = []
    ours.register_forward_pre_hook(lambda module, args: seen.append("before"))
    ours.register_forward_hook(lambda module, args, result: seen.append("after"))
    with torch.no_grad():
        ours(plain_input(suffix))
    assert seen == ["before", "after"] and ways.direct == 1


@every_module
def test_copies_work(cell, suffix, ways):
    ours, _ = make_pair(cell, suffix, 8, 8)
    x = plain_input(suffix)
    with torch.no_grad():
        expected = flat(ours(x))
        for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            for a, e in zip(flat(other(x)), expected, strict=True):
                assert torch.equal(a, e)
    assert (ways.direct, ways.general) == (3, 0)


@every_module
def test_traced_and_exported_graphs_have_the_layer(cell, suffix):
    """What sees the calls of operators sees one that it knows: a node per layer, or per stack."""
    ours, _ = make_pair(cell, suffix, 8, 8)
    x = plain_input(suffix)
    targets = []

    def backend(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    with torch.no_grad():
        expected = flat(ours(x))
        compiled = torch.compile(ours, backend=backend, fullgraph=True)
        results = [flat(compiled(x)), flat(torch.export.export(ours, (x,)).module()(x))]
        results.append(flat(torch.export.export(ours, (x,), strict=True).module()(x)))
        exported = torch.export.export(ours, (x,)).graph
    for result in results:
        for a, e in zip(result, expected, strict=True):
            torch.testing.assert_close(a, e)
    in_export = [str(node.target) for node in exported.nodes]
    for nodes, operator in ((targets, "infer_layers"), (in_export, "layer_forward")):
        ours_called = [target for target in nodes if "fused_rnn" in target]
        assert len(ours_called) == 1 and operator in ours_called[0]


@pytest.mark.parametrize("threads", [1, 2])
def test_large_layers_use_threads(threads, num_threads, ways):
    num_threads(threads)
    ours, theirs = make_pair("lstm", "", 300, 400, num_layers=2, bidirectional=True)
    x = torch.randn(1, 5, 300)
    with torch.no_grad():
        assert_as_good_as_torch(ours(x), ours, theirs, x)
    assert ways.direct == 1


def test_operators_return_nothing_to_what_is_not_theirs():
    """Called without Python's guards they still never fail on a tensor."""
    native.cpu_library_error()
    op = torch.ops.fused_rnn_cpu.infer_layers
    x, weights = torch.randn(1, 1, 8), list(make_pair("gru", "", 8, 8)[0].parameters())
    with torch.no_grad():
        assert len(op(2, x, weights, None, None, 1, 1, True)) == 2
        assert op(2, x, weights[:3], None, None, 1, 1, True) == []
        assert op(2, x, [], None, None, 1, 1, True) == []
        assert op(2, x, weights, None, None, 2, 1, True) == []
        assert op(2, x, weights, None, torch.zeros(1, 1, 8), 1, 1, True) == []
        assert op(3, x, weights, None, None, 1, 1, True) == []
        assert op(2, x, weights, None, None, 0, 1, True) == []
        assert op(2, x, weights, None, None, 1, 3, True) == []

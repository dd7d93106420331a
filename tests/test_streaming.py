"""The direct way of inference (fused_rnn/direct.py): right where it is taken, and not taken where
the general way has something to say."""

import copy
import itertools
import pickle

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fused_rnn
from fused_rnn import direct, native, testing
from fused_rnn.cells import CELLS

pytestmark = pytest.mark.usefixtures("cpu_backend")

LAYERS = {
    "rnn_tanh": ("RNN", {}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "gru": ("GRU", {}),
    "lstm": ("LSTM", {}),
}
ALL = [(cell, suffix) for cell in LAYERS for suffix in ("", "Cell")]
every_module = pytest.mark.parametrize(("cell", "suffix"), ALL, ids="".join)
every_layer = pytest.mark.parametrize("cell", LAYERS)


def make(cell, suffix, *sizes, **options):
    """A module of ours and torch.nn's with the same weights, in eval mode."""
    name, extra = LAYERS[cell]
    ours = getattr(fused_rnn, name + suffix)(*sizes, **extra, **options).eval()
    theirs = getattr(torch.nn, name + suffix)(*sizes, **extra, **options).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def flat(result):
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    return [tensor for part in result for tensor in flat(part)]


def states(cell, *shape):
    parts = [torch.randn(shape) for _ in range(1 + CELLS[cell].has_c)]
    return tuple(parts) if CELLS[cell].has_c else parts[0]


class Ways:
    """Counts which way calls of modules took: the one of `shortest`, or the general one."""

    def __init__(self, monkeypatch, shortest=direct):
        self.direct = self.general = 0
        self.enabled = True
        for name in ("layers", "step"):
            monkeypatch.setattr(shortest, name, self._watch(getattr(shortest, name)))

    def _watch(self, function):
        def call(*args):
            result = function(*args) if self.enabled else None
            if result is None:
                self.general += 1
            else:
                self.direct += 1
            return result

        return call

    def call_generally(self, function, *args):
        self.enabled = False
        try:
            return function(*args)
        finally:
            self.enabled = True


@pytest.fixture
def ways(monkeypatch):
    return Ways(monkeypatch)


def outcome(function, *args):
    """The tensors a call returns, or its error's class and message."""
    try:
        return flat(function(*args))
    except Exception as error:
        return type(error), str(error)


def assert_general(ways, function, *args):
    """The call takes the general way, to the same end as if there were no other."""
    before = ways.direct
    actual = outcome(function, *args)
    assert ways.direct == before, "took the direct way"
    expected = outcome(ways.call_generally, function, *args)
    if isinstance(expected, tuple):
        assert actual == expected
    else:
        assert isinstance(actual, list), actual
        for a, e in zip(actual, expected, strict=True):
            assert type(a) is type(e) and a.requires_grad == e.requires_grad
            torch.testing.assert_close(a, e, rtol=0, atol=0, equal_nan=True)
    return actual


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
            ours, theirs = make(cell, "", inputs, hidden, **options)
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
            ours, theirs = make(cell, suffix, inputs, hidden, bias=bias)
            for batch in ((), (1,), (2,), (16,), (20,)):
                x, hx = torch.randn(*batch, inputs), states(cell, *batch, hidden)
                for given in (None, hx):
                    assert_as_good_as_torch(ours(x, given), ours, theirs, x, given)
                    calls += 1
    assert (ways.direct, ways.general) == (calls, 0)


@every_layer
@pytest.mark.parametrize("batch_first", [False, True])
def test_sequences_agree_with_torch(cell, batch_first, ways):
    ours, theirs = make(cell, "", 6, 9, num_layers=2, batch_first=batch_first, bidirectional=True)
    with torch.no_grad():
        for shape in ((4, 3), (1, 5), (7, 1)):
            x = torch.randn(*shape, 6)
            assert_as_good_as_torch(ours(x), ours, theirs, x)
    assert ways.direct == 3


@every_module
def test_outputs_are_tensors_of_their_own(cell, suffix, ways):
    ours, _ = make(cell, suffix, 8, 8)
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
    ours, _ = make(cell, suffix, 8, 8)
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
    ours, _ = make(cell, "", 6, 20, num_layers=2)
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
    ours, _ = make(cell, "", 4, 4, num_layers=2, dropout=0.5)
    x = torch.randn(1, 1, 4)
    with torch.no_grad():
        ours(x)
        assert ways.direct == 1
        ours.train()(x)
        assert (ways.direct, ways.general) == (1, 1)
        ours.eval().dropout = 2.0
        assert_general(ways, ours, x)


def plain_input(suffix):
    return torch.randn(2, 8) if suffix else torch.randn(1, 2, 8)


def changed(cell, suffix, change, which):
    """A module, one of whose weights was changed."""
    ours, _ = make(cell, suffix, 8, 8)
    change(ours, which if suffix else f"{which}_l0")
    return ours


def weight_changes():
    def set_wrong(module, name):
        parameter = getattr(module, name)
        setattr(module, name, torch.nn.Parameter(torch.randn(parameter.shape[0] + 1, 8)))

    def subclass(module, name):
        class Subclass(torch.nn.Parameter):
            pass

        setattr(module, name, Subclass(getattr(module, name).detach()))

    def strided(module, name):
        value = getattr(module, name).detach()
        setattr(module, name, torch.nn.Parameter(value.t().contiguous().t()))

    def missing(module, name):
        delattr(module, name)

    def none(module, name):
        setattr(module, name, None)

    def double(module, name):
        setattr(module, name, torch.nn.Parameter(getattr(module, name).detach().double()))

    def sparse(module, name):
        value = getattr(module, name).detach().to_sparse()
        setattr(module, name, torch.nn.Parameter(value))

    def meta(module, name):
        setattr(module, name, torch.nn.Parameter(getattr(module, name).to("meta")))

    return set_wrong, subclass, strided, missing, none, double, sparse, meta


def weights_that_are_no_parameters():
    def plain_tensor(module, name):
        value = getattr(module, name).detach() * 2
        delattr(module, name)
        setattr(module, name, value)

    def parametrized(module, name):
        class Twice(torch.nn.Module):
            def forward(self, weight):
                return 2 * weight

        parametrize.register_parametrization(module, name, Twice())

    return plain_tensor, parametrized


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
    ours, _ = make(cell, suffix, 8, 8)
    setattr(ours, "bias_hh" if suffix else "bias_hh_l0", None)
    with torch.no_grad():
        assert_general(ways, ours, plain_input(suffix))


@every_module
def test_functional_call_is_honoured(cell, suffix, ways):
    ours, theirs = make(cell, suffix, 8, 8)
    x = plain_input(suffix)
    weights = {name: torch.randn_like(p) for name, p in ours.named_parameters()}
    theirs.load_state_dict(weights)
    with torch.no_grad():
        actual = torch.func.functional_call(ours, weights, (x,))
        assert_as_good_as_torch(actual, ours, theirs, x)


def bad_inputs():
    def shapes(suffix):
        return (2, 8) if suffix else (1, 2, 8)

    yield "double", lambda suffix: torch.randn(shapes(suffix)).double()
    yield "half", lambda suffix: torch.randn(shapes(suffix)).half()
    yield "int", lambda suffix: torch.ones(shapes(suffix), dtype=torch.int64)
    yield "complex", lambda suffix: torch.randn(shapes(suffix)).cfloat()
    yield "wide", lambda suffix: torch.randn(*shapes(suffix)[:-1], 9)
    yield "sparse", lambda suffix: torch.randn(shapes(suffix)).to_sparse()
    yield "csr", lambda suffix: torch.randn(2, 8).to_sparse_csr()
    yield "mkldnn", lambda suffix: torch.randn(shapes(suffix)).to_mkldnn()
    yield "meta", lambda suffix: torch.randn(shapes(suffix), device="meta")
    yield "nested", lambda suffix: torch.nested.nested_tensor([torch.randn(2, 8)])
    yield (
        "quantized",
        lambda suffix: torch.quantize_per_tensor(torch.randn(shapes(suffix)), 0.1, 0, torch.qint8),
    )
    yield "no_rows", lambda suffix: torch.randn(*shapes(suffix)[:-2], 0, 8)
    yield "no_time", lambda suffix: torch.randn(0, *shapes(suffix)[1:])
    yield "scalar", lambda suffix: torch.randn(())
    yield "rank", lambda suffix: torch.randn(1, 1, *shapes(suffix))
    yield "none", lambda suffix: None
    yield "list", lambda suffix: [[1.0] * 8]
    yield "packed", lambda suffix: pack_sequence([torch.randn(1, 8)])


@every_module
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", dict(bad_inputs()))
def test_unusual_inputs_take_the_general_way(cell, suffix, kind, ways, monkeypatch):
    monkeypatch.delenv("FUSED_RNN_BACKEND")
    ours, _ = make(cell, suffix, 8, 8)
    with torch.no_grad():
        assert_general(ways, ours, dict(bad_inputs())[kind](suffix))


def bad_states():
    def each(function):
        """The function on each state of an hx."""
        return lambda hx: tuple(map(function, hx)) if isinstance(hx, tuple) else function(hx)

    yield "double", each(torch.Tensor.double)
    yield "wide", each(lambda h: torch.cat((h, h), -1))
    yield "rows", each(lambda h: torch.cat((h, h), -2))
    yield "rank", each(lambda h: h[0])
    yield "sparse", each(torch.Tensor.to_sparse)
    yield "meta", each(lambda h: h.to("meta"))
    yield "half_a_pair", lambda hx: (hx[0],) if isinstance(hx, tuple) else [hx]
    yield "three", lambda hx: (*hx, hx[0]) if isinstance(hx, tuple) else (hx, hx)
    yield "the_other", lambda hx: hx[0] if isinstance(hx, tuple) else (hx, hx)
    yield "a_none", lambda hx: (hx[0], None) if isinstance(hx, tuple) else 1.0
    yield "subclass", each(lambda h: h.as_subclass(Named))


class Named(torch.Tensor):
    pass


@every_module
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", dict(bad_states()))
def test_unusual_states_take_the_general_way(cell, suffix, kind, ways):
    ours, _ = make(cell, suffix, 8, 8)
    x = plain_input(suffix)
    with torch.no_grad():
        assert_general(ways, ours, x, dict(bad_states())[kind](states(cell, *x.shape)))


@every_module
def test_changed_sizes_take_the_general_way(cell, suffix, ways):
    """A cell holds its states to hidden_size, whatever its weights are."""
    ours, _ = make(cell, suffix, 8, 8)
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
    ours, theirs = make("lstm", "", 8, 12, bias=bias, **sizes)
    x = torch.randn(1, 3, 8)
    hx = torch.randn(4, 3, 5), torch.randn(4, 3, 12)
    with torch.no_grad():
        for given in (None, hx):
            assert_as_good_as_torch(ours(x, given), ours, theirs, x, given)
        assert ways.direct == 2
        assert_general(ways, ours, x, hx[::-1])


def test_a_subclass_as_input_takes_the_general_way(ways):
    ours, _ = make("gru", "", 8, 8)
    with torch.no_grad():
        assert_general(ways, ours, torch.randn(1, 1, 8).as_subclass(Named))


@every_module
def test_negative_bit_is_resolved(cell, suffix):
    ours, _ = make(cell, suffix, 8, 8)
    x = plain_input(suffix)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            for a, e in zip(flat(ours(torch._neg_view(x))), flat(ours(-x)), strict=True):
                assert torch.equal(a, e)


@every_module
def test_gradients_take_another_way(cell, suffix, ways):
    ours, theirs = make(cell, suffix, 8, 8)
    x = plain_input(suffix)
    for module in (ours, theirs):
        sum(t.sum() for t in flat(module(x))).backward()
    for a, e in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, e.grad)
    assert ways.direct == 0
    with torch.no_grad(), torch.enable_grad():
        assert all(t.requires_grad for t in assert_general(ways, ours, x))


class Nothing(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class NothingBelow(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "context",
    [
        forward_ad.dual_level,
        lambda: fused_rnn.backend("reference"),
        lambda: torch.device("cpu"),
        Nothing,
        NothingBelow,
    ],
    ids=["forward_ad", "backend", "device", "function_mode", "dispatch_mode"],
)
@every_module
def test_contexts_take_the_general_way(cell, suffix, context, ways, monkeypatch):
    monkeypatch.delenv("FUSED_RNN_BACKEND")
    ours, _ = make(cell, suffix, 8, 8)
    x = plain_input(suffix)
    with torch.no_grad(), context():
        assert_general(ways, ours, x)
    with torch.no_grad():
        ours(x)
    assert ways.direct == 1


@every_module
def test_vmap_takes_the_general_way(cell, suffix, ways):
    ours, _ = make(cell, suffix, 8, 8)
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
    ours, theirs = make(cell, suffix, 8, 8)
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
    ours, _ = make("gru", "", 8, 8)
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
    ours, _ = make(cell, suffix, 8, 8)
    with torch.no_grad(), pytest.raises(RuntimeError, match="FUSED_RNN_CPU_CAPABILITY"):
        ours(plain_input(suffix))


@every_module
def test_explain_sees_every_layer(cell, suffix, ways, monkeypatch):
    monkeypatch.delenv("FUSED_RNN_BACKEND")
    ours, _ = make(cell, suffix, 8, 8)
    with torch.no_grad():
        told = fused_rnn.explain(ours, plain_input(suffix))
    assert told.backend == "cpu" and len(told.layers) == 1 and ways.direct == 0


def test_without_the_library(ways, monkeypatch):
    monkeypatch.setenv("FUSED_RNN_BACKEND", "reference")
    monkeypatch.setattr(direct, "cpu_library_error", lambda: "it is not there")
    ours, _ = make("lstm", "", 8, 8)
    with torch.no_grad():
        assert_general(ways, ours, torch.randn(1, 1, 8))


@every_module
def test_hooks_run(cell, suffix, ways):
    ours, _ = make(cell, suffix, 8, 8)
    seen = []
    ours.register_forward_pre_hook(lambda module, args: seen.append("before"))
    ours.register_forward_hook(lambda module, args, result: seen.append("after"))
    with torch.no_grad():
        ours(plain_input(suffix))
    assert seen == ["before", "after"] and ways.direct == 1


@every_module
def test_copies_work(cell, suffix, ways):
    ours, _ = make(cell, suffix, 8, 8)
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
    ours, _ = make(cell, suffix, 8, 8)
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
    in_compile = "layer_forward" if suffix else "infer_layers"
    for nodes, operator in ((targets, in_compile), (in_export, "layer_forward")):
        ours_called = [target for target in nodes if "fused_rnn" in target]
        assert len(ours_called) == 1 and operator in ours_called[0]


@pytest.mark.parametrize("threads", [1, 2])
def test_large_layers_use_threads(threads, num_threads, ways):
    num_threads(threads)
    ours, theirs = make("lstm", "", 300, 400, num_layers=2, bidirectional=True)
    x = torch.randn(1, 5, 300)
    with torch.no_grad():
        assert_as_good_as_torch(ours(x), ours, theirs, x)
    assert ways.direct == 1


def test_operators_return_nothing_to_what_is_not_theirs():
    """Called without Python's guards they still never fail on a tensor."""
    native.cpu_library_error()
    op = torch.ops.fused_rnn_cpu.infer_layers
    x, weights = torch.randn(1, 1, 8), list(make("gru", "", 8, 8)[0].parameters())
    with torch.no_grad():
        assert len(op(2, x, weights, None, None, 1, 1, True)) == 2
        assert op(2, x, weights[:3], None, None, 1, 1, True) == []
        assert op(2, x, [], None, None, 1, 1, True) == []
        assert op(2, x, weights, None, None, 2, 1, True) == []
        assert op(2, x, weights, None, torch.zeros(1, 1, 8), 1, 1, True) == []
        assert op(3, x, weights, None, None, 1, 1, True) == []
        assert op(2, x, weights, None, None, 0, 1, True) == []
        assert op(2, x, weights, None, None, 1, 3, True) == []

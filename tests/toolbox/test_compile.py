"""torch.compile: one graph, forward and backward, whatever the sizes; and the errors of eager."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.outcomes import flat
from toolkit import Inputs, loss_of, near, train_step, with_and_without_hx
from torch._dynamo.utils import counters
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils._pytree import tree_map

import fused_rnn

pytestmark = [
    pytest.mark.costly,
    pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning"),
]

BACKENDS = [
    pytest.param("aot_eager", id="aot_eager"),
    pytest.param("inductor", marks=pytest.mark.slow, id="inductor"),
]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
OPTIONS = [
    pytest.param({}, id="plain", marks=pytest.mark.slow),
    pytest.param({"num_layers": 2, "bidirectional": True}, id="bidirectional-2"),
    pytest.param({"batch_first": True, "bias": False}, id="no_bias", marks=pytest.mark.slow),
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    assert not counters["graph_break"], counters["graph_break"]
    return counters["stats"]["unique_graphs"]


@every_backend
@with_and_without_hx
@pytest.mark.parametrize("options", OPTIONS)
def test_training_step(layer, options, with_hx, backend, make):
    """Forward and backward in one graph each, inputs and states among what gets gradients."""
    module, theirs = make.pair(layer, **options)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    args = Inputs(module, with_hx).args
    near(train_step(compiled, module, *args), train_step(theirs, theirs, *args))
    assert graphs() == 1


@every_backend
@with_and_without_hx
def test_cells(cell, with_hx, backend, make):
    module, theirs = make.pair(cell)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    args = Inputs(module, with_hx).args
    near(train_step(compiled, module, *args), train_step(theirs, theirs, *args))


@every_backend
@with_and_without_hx
@pytest.mark.parametrize("is_batched", [True, False], ids=["batched", "unbatched"])
def test_cells_in_inference(cell, is_batched, with_hx, backend, make):
    module, theirs = make.pair(cell)
    compiled = torch.compile(module, fullgraph=True, backend=backend, dynamic=True)
    for mode in (torch.no_grad, torch.inference_mode):
        for batch in (7, 3):
            args = Inputs(module, with_hx, batch=batch).args
            if not is_batched:
                args = tree_map(lambda t: t[0], args)
            with mode():
                near(compiled(*args), theirs(*args))
    with torch.no_grad():
        assert operators(module, *args) == ["fused_rnn.infer_layers"]


@every_backend
@with_and_without_hx
def test_any_sizes_with_one_graph(layer, with_hx, backend, make):
    """dynamic=True: T and B change and nothing is compiled again. Sizes of 1 are constants to
    torch.compile, whatever the model, and are not among them."""
    module, theirs = make.pair(layer, num_layers=2, bidirectional=True)
    compiled = torch.compile(module, fullgraph=True, backend=backend, dynamic=True)
    for timesteps, batch in ((6, 7), (9, 4), (2, 2), (31, 8)):
        args = Inputs(module, with_hx, timesteps, batch).args
        near(train_step(compiled, module, *args), train_step(theirs, theirs, *args))
    assert graphs() == 1


@every_backend
@with_and_without_hx
@pytest.mark.parametrize("batch_first", [False, True])
def test_inference(layer, batch_first, with_hx, backend, make):
    """Any T and B with one graph for each mode, and each of the sizes of 1 once more."""
    options = {"num_layers": 2, "bidirectional": True, "batch_first": batch_first, "dropout": 0.5}
    module, theirs = make.pair(layer, **options)
    module.eval(), theirs.eval()
    compiled = torch.compile(module, fullgraph=True, backend=backend, dynamic=True)
    for number, mode in enumerate((torch.no_grad, torch.inference_mode)):
        for timesteps, batch in ((6, 7), (9, 3), (31, 8)):
            args = Inputs(module, with_hx, timesteps, batch).args
            with mode():
                near(compiled(*args), theirs(*args))
            assert graphs() == number + 1
    for timesteps, batch in ((1, 1), (1, 6), (5, 1)):
        args = Inputs(module, with_hx, timesteps, batch).args
        with torch.inference_mode():
            near(compiled(*args), theirs(*args))


def operators(call, *args) -> list[str]:
    """The names of our operators in the graphs of a call."""
    found = []

    def backend(graph, example_inputs):
        found.extend(str(n.target) for n in graph.graph.nodes if "fused_rnn" in str(n.target))
        return graph

    torch.compile(call, backend=backend, fullgraph=True)(*args)
    return found


def test_inference_is_one_operator():
    """A stack of layers that is nothing out of the ordinary; what is has one for each layer."""
    module = fused_rnn.LSTM(3, 5, 2, bidirectional=True)
    (x,) = Inputs(module).args
    with torch.no_grad():
        assert operators(module, x) == ["fused_rnn.infer_layers"]
        lengths = torch.full((7,), 4)
        assert operators(lambda x: module(x, lengths=lengths), x) == ["fused_rnn.layer_forward"] * 2
    assert operators(module, x) == ["fused_rnn.layer_forward"] * 2


def test_a_stateful_module_is_in_one_graph():
    module = fused_rnn.GRU(3, 5, stateful=True)
    compiled = torch.compile(copy.deepcopy(module), backend="aot_eager", fullgraph=True)
    for x in torch.randn(3, 6, 2, 3):
        for actual, expected in zip(compiled(x), module(x), strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("sort", [True, False])
def test_a_stateful_module_of_packed_rows_is_in_one_graph(sort):
    module = fused_rnn.LSTM(3, 5, stateful=True)
    compiled = torch.compile(copy.deepcopy(module), backend="aot_eager", fullgraph=True)
    for lengths in ((5, 4, 2), (3, 7, 1), (1, 1, 1)):
        packed = packed_batch(lengths, sort)
        (y, actual), (expected_y, expected) = compiled(packed), module(packed)
        torch.testing.assert_close((y.data, actual), (expected_y.data, expected))
    with pytest.raises(RuntimeError, match=r"batch_sizes: expected 3 rows|hx: Expected hidden"):
        compiled(packed_batch((5, 4), sort))


CALLS = {
    "float64": lambda m, x, h: (m.double(), x.double(), h.double()),
    "bfloat16": lambda m, x, h: (m.bfloat16(), x.bfloat16(), h.bfloat16()),
    "unbatched": lambda m, x, h: (m, x[:, 0], h[:, 0]),
    "strides": lambda m, x, h: (m, x.mT.contiguous().mT, h.mT.contiguous().mT),
    "no rows": lambda m, x, h: (m, x[:, :0], h[:, :0]),
    "strided weights": lambda m, x, h: (strided(m), x, h),
}


def strided(module: torch.nn.Module) -> torch.nn.Module:
    for parameter in module.parameters():
        parameter.data = torch.stack((parameter.data,) * 2, -1)[..., 0]
    return module


@every_backend
@pytest.mark.parametrize("call", CALLS)
def test_inference_out_of_the_ordinary(call, backend, make):
    """It takes another way, to the same numbers."""
    module = make("gru", num_layers=2)
    module, *args = CALLS[call](module, *Inputs(module, True).args)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    with torch.no_grad():
        near(compiled(*args), module(*args))


def test_transforms_inside_a_graph(make):
    """torch.func inside torch.compile."""
    module, x = make("gru"), torch.randn(4, 6, 7, 3)

    def mapped(x):
        return torch.vmap(lambda one: module(one)[0])(x)

    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            near(torch.compile(mapped, backend="aot_eager", fullgraph=True)(x), mapped(x))


# Sizes that are equal at first are one symbol to torch.compile, so none is.
def packed_batch(lengths, sort: bool) -> PackedSequence:
    lengths = sorted(lengths, reverse=True) if sort else lengths
    return pack_sequence([torch.randn(n, 3) for n in lengths], enforce_sorted=sort)


@every_backend
@pytest.mark.parametrize("kind", ["hx", "unsorted", "neither"])
def test_packed(layer, kind, backend, make):
    """One graph for any lengths. Where neither states nor a permutation tell the batch size it is
    a number that the graph computes, which torch.compile takes with fullgraph=True only."""
    module, theirs = make.pair(layer, num_layers=2, bidirectional=True)
    compiled = torch.compile(module, fullgraph=kind == "neither", backend=backend, dynamic=True)
    for lengths in ((6, 2, 9, 5, 1, 1), (9, 9, 1, 4, 8, 2, 2), (8, 7)):
        packed = packed_batch(lengths, sort=kind != "unsorted")
        args = Inputs(module, True, batch=len(lengths)).args[1:] if kind == "hx" else ()

        def step(call, owner, data, *hx, packed=packed):
            return train_step(
                lambda data, *hx: leaves_of_packed(call(PackedSequence(data, *packed[1:]), *hx)),
                owner,
                data,
                *hx,
            )

        near(step(compiled, module, packed.data, *args), step(theirs, theirs, packed.data, *args))
    assert graphs() == 1


def leaves_of_packed(outputs):
    output, states = outputs
    return [output.data, *flat(states)]


class Translator(torch.nn.Module):
    """An encoder, an attention that calls a cell per step, and operations around them."""

    def __init__(self, make):
        super().__init__()
        self.embedding = torch.nn.Embedding(13, 3)
        self.encoder = make("lstm", num_layers=2, bidirectional=True, batch_first=True)
        self.bridge = torch.nn.Linear(10, 5)
        self.decoder = make("gru_cell")
        self.head = torch.nn.Linear(5, 13)

    def forward(self, source, target):
        memory = self.bridge(self.encoder(self.embedding(source))[0]).relu()
        state = memory.mean(1)
        logits = []
        for t in range(target.shape[1]):
            scores = torch.softmax((memory @ state.unsqueeze(-1)).squeeze(-1), -1)
            state = state + (scores.unsqueeze(-1) * memory).sum(1)
            state = self.decoder(self.embedding(target[:, t]), state)
            logits.append(self.head(state))
        return torch.stack(logits, 1)


@every_backend
def test_inside_a_model(backend, make):
    model = Translator(make)
    source, target = torch.randint(13, (4, 7)), torch.randint(13, (4, 3))
    results = []
    for call in (model, torch.compile(model, fullgraph=True, backend=backend)):
        model.zero_grad()
        logits = call(source, target)
        logits.square().sum().backward()
        results.append([logits.detach(), *(p.grad for p in model.parameters())])
    near(results[1], results[0])


@every_backend
def test_whole_training_step_compiled(backend, make):
    """Loss, backward and optimizer around a compiled model, several steps."""
    module, theirs = make.pair("gru", num_layers=2)
    losses = []
    for owner, call in ((module, torch.compile(module, fullgraph=True, backend=backend)),
                        (theirs, theirs)):  # fmt: skip
        torch.manual_seed(5)
        optimizer = torch.optim.AdamW(owner.parameters(), lr=0.02)
        losses.append([])
        for _ in range(4):
            loss = loss_of(call(*Inputs(owner).args))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.detach())
    near(*losses)


def test_gradient_penalty_is_refused_by_torch(make):
    """Double backward through a compiled graph is torch's to allow; it must not be wrong."""
    module = make("gru")
    (x,) = Inputs(module).args
    x.requires_grad_()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(loss_of(compiled(x)), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        grad.square().sum().backward()


def test_autocast(layer, make):
    module = make(layer, num_layers=2)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    args = Inputs(module, True).args
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = compiled(*args), module(*args)
    assert flat(actual)[0].dtype == flat(expected)[0].dtype
    near(actual, expected, rtol=0.02, atol=0.02)


WRONG = {
    "features": lambda: (torch.randn(6, 4, 2),),
    "dtype": lambda: (torch.randn(6, 4, 3, dtype=torch.float64),),
    "dimensions": lambda: (torch.randn(6, 4, 3, 1),),
    "states": lambda: (torch.randn(6, 4, 3), torch.randn(1, 3, 5)),
    "no timesteps": lambda: (torch.randn(0, 4, 3),),
    "type": lambda: (torch.randn(6, 4, 3), "zeros"),
}


@pytest.mark.parametrize("what", WRONG)
def test_errors_are_eager_modes(what):
    """The class and the message; with fullgraph=True torch wraps both in an error of its own."""
    module, args = fused_rnn.GRU(3, 5), WRONG[what]()
    with pytest.raises((TypeError, ValueError, RuntimeError)) as eager:
        module(*args)
    with pytest.raises(type(eager.value)) as compiled:
        torch.compile(module, backend="aot_eager")(*args)
    assert type(compiled.value) is type(eager.value)
    assert str(compiled.value) == str(eager.value)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported) as in_full:
        torch.compile(module, backend="aot_eager", fullgraph=True)(*args)
    assert str(eager.value) in str(in_full.value)


@every_backend
@pytest.mark.parametrize("what", WRONG)
def test_errors_of_inference_are_eager_modes(what, backend):
    module, args = fused_rnn.GRU(3, 5), WRONG[what]()
    with torch.no_grad():
        with pytest.raises((TypeError, ValueError, RuntimeError)) as eager:
            module(*args)
        with pytest.raises(type(eager.value)) as compiled:
            torch.compile(module, backend=backend)(*args)
    assert type(compiled.value) is type(eager.value)
    assert str(compiled.value) == str(eager.value)


@pytest.mark.parametrize("sizes", [[2, 1], [2, 3], [4, 1], [5, 0]])
def test_packed_layouts_are_checked_when_the_graph_runs(sizes):
    layer = torch.compile(fused_rnn.GRU(3, 5), fullgraph=True, backend="aot_eager")
    layer(PackedSequence(torch.randn(5, 3), torch.tensor([3, 2])), torch.zeros(1, 3, 5))
    with pytest.raises(RuntimeError, match="batch_sizes: expected"):
        layer(PackedSequence(torch.randn(5, 3), torch.tensor(sizes)), torch.zeros(1, 3, 5))


def test_forced_backend_is_asked_when_the_graph_runs():
    layer = fused_rnn.GRU(3, 5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 4, 3)
    compiled(x)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode(), fused_rnn.backend("reference"):
            assert fused_rnn.explain(compiled, x).backend == "reference"
            near(compiled(x), layer(x))


@pytest.mark.gpu
@pytest.mark.costly
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(
    "mode", ["reduce-overhead", pytest.param("max-autotune", marks=pytest.mark.slow)]
)
def test_modes_with_cuda_graphs(layer, mode, make):
    module, theirs = make.pair(layer, num_layers=2, bidirectional=True)
    module, theirs = module.cuda(), theirs.cuda()
    compiled = torch.compile(module, fullgraph=True, mode=mode)
    for _ in range(4):
        args = [a.cuda() for a in Inputs(module).args]
        torch.compiler.cudagraph_mark_step_begin()
        near(train_step(compiled, module, *args), train_step(theirs, theirs, *args))

"""Which backend runs: by choice, by force, and what the user is told about it."""

import threading
from dataclasses import replace
from unittest import mock

import pytest
import torch

import fused_rnn
from fused_rnn import dispatch, functional, testing
from fused_rnn.backends.base import Backend
from fused_rnn.layer_call import make_problem
from fused_rnn.testing import LayerCase

CASE = LayerCase("gru", 3, 2, 4, 5)


class _Picky(Backend):
    """Takes no layer; its reason can be told from any other."""

    name = "picky"

    def unsupported(self, problem):
        return f"dislikes H={problem.hidden_size}"


class _Spy(type(dispatch.BACKENDS["reference"])):
    """The reference backend, counting its calls."""

    name = "spy"

    def __init__(self):
        self.forwards = self.backwards = 0

    def layer_forward(self, *args):
        self.forwards += 1
        return super().layer_forward(*args)

    def layer_backward(self, *args):
        self.backwards += 1
        return super().layer_backward(*args)


@pytest.fixture(autouse=True)
def backends(monkeypatch):
    """picky before all others, spy after them; nothing forced from outside."""
    monkeypatch.delenv("FUSED_RNN_BACKEND", raising=False)
    table = {"picky": _Picky(), **dispatch.BACKENDS, "spy": _Spy()}
    monkeypatch.setattr(dispatch, "BACKENDS", table)
    return table


def _problem(**changes):
    case = testing.make_inputs(CASE)
    return replace(make_problem(*case.args, True), **changes)


def _run():
    return testing.run_layer(testing.make_inputs(CASE).leaves())


def test_the_first_backend_that_can_is_chosen(backends):
    problem = _problem()
    expected = next(b for b in backends.values() if b.unsupported(problem) is None)
    assert dispatch.select(problem) is expected
    assert dispatch.select(_problem(dtype=torch.float64)) is backends["reference"]


def test_reasons_are_given_for_all_of_the_device_in_order(backends, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reasons = dispatch.reasons(_problem(dtype=torch.float64))
    assert [name for name, _ in reasons] == ["picky", "cpu", "reference", "spy"]
    elsewhere = [name for name, _ in dispatch.reasons(_problem(device_type="cuda"))]
    assert elsewhere == [name for name in backends if name != "cpu"]
    assert dict(reasons)["picky"] == "dislikes H=5"
    assert "float64" in dict(reasons)["cpu"]
    assert dict(reasons)["reference"] is None


def test_none_can():
    with pytest.raises(fused_rnn.UnsupportedProblemError) as error:
        dispatch.select(_problem(dtype=torch.int32))
    for part in ("no backend can take this layer", "picky: dislikes H=5", "cpu: ", "reference: "):
        assert part in str(error.value)


def test_context(backends):
    with fused_rnn.backend("spy"):
        _run()
    assert backends["spy"].forwards == 1
    _run()
    assert backends["spy"].forwards == 1


def test_environment_variable(backends, monkeypatch):
    monkeypatch.setenv("FUSED_RNN_BACKEND", "spy")
    _run()
    assert backends["spy"].forwards == 1
    with fused_rnn.backend("reference"):  # the context wins
        _run()
    assert backends["spy"].forwards == 1
    for automatic in ("auto", ""):
        monkeypatch.setenv("FUSED_RNN_BACKEND", automatic)
        _run()
    assert backends["spy"].forwards == 1


@pytest.mark.parametrize("name", ["cuda_9", "CPU", " reference", "0"])
def test_unknown_names(monkeypatch, name):
    expected = rf"expected one of auto, picky, .*reference, spy, .*; got {name!r}"
    with pytest.raises(ValueError, match=f"^backend: {expected}"), fused_rnn.backend(name):
        pytest.fail("the block was entered")
    monkeypatch.setenv("FUSED_RNN_BACKEND", name)
    with pytest.raises(ValueError, match=f"^FUSED_RNN_BACKEND: {expected}"):
        _run()


@pytest.mark.parametrize("name", [None, 1, b"cpu", torch.device("cpu")])
def test_a_name_that_is_no_string(name):
    with pytest.raises(TypeError, match="backend: expected a str, got"), fused_rnn.backend(name):
        pytest.fail("the block was entered")


def test_a_forced_backend_that_cannot_says_why(monkeypatch):
    with (
        fused_rnn.backend("picky"),
        pytest.raises(fused_rnn.UnsupportedProblemError, match=r"'picky'.*dislikes H=5"),
    ):
        _run()
    monkeypatch.setenv("FUSED_RNN_BACKEND", "cpu")
    with pytest.raises(fused_rnn.UnsupportedProblemError, match=r"'cpu'.*float64"):
        fused_rnn.LSTM(2, 3, dtype=torch.float64)(torch.randn(4, 1, 2, dtype=torch.float64))
    assert issubclass(fused_rnn.UnsupportedProblemError, RuntimeError)


def test_nesting():
    with fused_rnn.backend("reference"):
        assert dispatch.requested() == "reference"
        with fused_rnn.backend("spy"):
            assert dispatch.requested() == "spy"
        assert dispatch.requested() == "reference"
    assert dispatch.requested() == ""


def test_auto_lifts_an_outer_choice():
    with fused_rnn.backend("spy"), fused_rnn.backend("auto"):
        assert dispatch.requested() == ""


def test_auto_lifts_the_environments_choice_too(monkeypatch):
    monkeypatch.setenv("FUSED_RNN_BACKEND", "spy")
    with fused_rnn.backend("auto"):
        assert dispatch.requested() == ""
    assert dispatch.requested() == "spy"


def test_an_exception_puts_the_choice_back():
    with pytest.raises(KeyError), fused_rnn.backend("spy"):
        raise KeyError
    assert dispatch.requested() == ""


def test_as_a_decorator(backends):
    @fused_rnn.backend("spy")
    def decorated():
        return _run()

    decorated()
    decorated()
    assert backends["spy"].forwards == 2
    assert dispatch.requested() == ""


def test_threads_choose_for_themselves():
    inside, done, seen = threading.Event(), threading.Event(), {}

    def forcing():
        with fused_rnn.backend("spy"):
            inside.set()
            assert done.wait(60)
            seen["forcing"] = dispatch.requested()

    def other():
        assert inside.wait(60)
        seen["other"] = dispatch.requested()
        done.set()

    threads = [threading.Thread(target=forcing), threading.Thread(target=other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"forcing": "spy", "other": ""}


def test_backward_uses_the_backend_of_its_forward(backends):
    spy = backends["spy"]
    with fused_rnn.backend("spy"):
        y, *_ = _run()
    with fused_rnn.backend("reference"):
        y.sum().backward()
    assert (spy.forwards, spy.backwards) == (1, 1)
    with fused_rnn.backend("reference"):
        y, *_ = _run()
    with fused_rnn.backend("spy"):
        y.sum().backward()
    assert (spy.forwards, spy.backwards) == (1, 1)


def test_backward_uses_the_environments_choice_at_its_forward(backends, monkeypatch):
    monkeypatch.setenv("FUSED_RNN_BACKEND", "spy")
    y, *_ = _run()
    monkeypatch.setenv("FUSED_RNN_BACKEND", "reference")
    y.sum().backward()
    assert backends["spy"].backwards == 1


def test_automatic_forward_and_backward_choose_alike(backends):
    """What a forward pass saves is for its own backend to read."""
    chosen = []

    def record(problem, backend, forced):
        chosen.append((backend.name, forced))

    with dispatch.recording(record):
        y, *_ = _run()
        assert chosen == [(chosen[0][0], False)]
        y.sum().backward()
    assert set(chosen) == {chosen[0]}


def test_backward_runs_where_forward_ran_whatever_has_changed(backends, monkeypatch):
    with dispatch.recording(lambda *choice: None):  # the general way
        y, *_ = _run()
    monkeypatch.setattr(dispatch, "_first_backend", lambda problem: backends["spy"])
    y.sum().backward()
    assert backends["spy"].backwards == 0
    with dispatch.recording(lambda *choice: None):
        y, *_ = _run()
        y.sum().backward()
    assert (backends["spy"].forwards, backends["spy"].backwards) == (1, 1)


def test_the_slow_path_on_a_gpu_is_told():
    with (
        mock.patch.dict(dispatch.BACKENDS, {"spy": _Picky(), "triton": _Picky()}),
        pytest.warns(RuntimeWarning, match=r"gru on cuda runs on the slow reference.*picky: dis"),
    ):
        assert dispatch.select(_problem(device_type="cuda")).name == "reference"


def test_no_warning_on_the_cpu(recwarn):
    with fused_rnn.backend("reference"):
        _run()
    assert not [w for w in recwarn if "fused_rnn" in str(w.message)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("learns", [False, True])
def test_explain_calls_it_training_where_a_gradient_is_asked_for(dtype, learns):
    layer = fused_rnn.LSTM(3, 4, dtype=dtype, zoneout=0.1).requires_grad_(learns)
    text = str(fused_rnn.explain(layer, torch.randn(5, 2, 3, dtype=dtype)))
    assert ("training" in text) == learns and ("inference" in text) != learns


def test_explain_one_layer():
    layer = fused_rnn.GRU(3, 4, bias=False, bidirectional=True)
    explanation = fused_rnn.explain(layer, torch.randn(5, 2, 3))
    [choice] = explanation.layers
    assert (choice.module, choice.problem.cell_name) == ("", "gru")
    assert choice.backend == explanation.backend == dispatch.select(choice.problem).name
    assert ("picky", "dislikes H=4") in choice.refusals
    text = str(explanation)
    for part in (
        "(module) layer 0: gru", "T=5 B=2 I=3 H=4", "bidirectional", "no bias", "float32", "cpu",
        "training", f"runs on {choice.kernel}", "not on picky: dislikes H=4",
    ):  # fmt: skip
        assert part in text, part
    assert "packed" not in text and "projected" not in text
    assert repr(explanation) == text


def test_explain_tells_packed_projected_and_inference():
    layer = fused_rnn.LSTM(3, 4, proj_size=2)
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(4, 3), torch.randn(2, 3)])
    with torch.no_grad():
        text = str(fused_rnn.explain(layer, packed))
    for part in ("projected to 2", "packed", "inference", "T=4 B=2"):
        assert part in text, part


class _Tagger(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.ModuleDict({"deep": fused_rnn.LSTM(3, 4, num_layers=2)})
        self.step = fused_rnn.GRUCell(4, 5)
        self.unused = fused_rnn.RNN(3, 3)

    def forward(self, x, scale=1.0):
        y, _ = self.encoder["deep"](x * scale)
        return self.step(y[-1])


def test_explain_a_model():
    model = _Tagger()
    explanation = fused_rnn.explain(model, torch.randn(5, 2, 3), scale=0.5)
    names = [layer.module for layer in explanation.layers]
    assert names == ["encoder.deep", "encoder.deep", "step"]
    cells = [layer.problem.cell_name for layer in explanation.layers]
    assert cells == ["lstm", "lstm", "gru"]
    assert [layer.problem.input_size for layer in explanation.layers] == [3, 4, 4]
    for layer in ("encoder.deep layer 0: lstm", "encoder.deep layer 1: lstm", "step layer 0: gru"):
        assert layer in str(explanation)
    assert not any(module._forward_pre_hooks for module in model.modules())


class _Functional(torch.nn.Module):
    """A function of ours before and after a module of ours."""

    def __init__(self):
        super().__init__()
        self.weights = torch.nn.ParameterList([torch.randn(9, 3), torch.randn(9, 3)])
        self.layer = fused_rnn.LSTM(3, 3)

    def forward(self, x):
        x, _ = functional.gru(x, None, list(self.weights))
        x, _ = self.layer(x)
        return functional.gru(x, None, list(self.weights) * 2, num_layers=2)


def test_explain_functions():
    explanation = fused_rnn.explain(_Functional(), torch.randn(5, 2, 3))
    names = [(layer.module, layer.layer) for layer in explanation.layers]
    assert names == [("(function)", 0), ("layer", 0), ("(function)", 0), ("(function)", 1)]
    assert "(function) layer 1: gru" in str(explanation)


def test_explain_a_compiled_model():
    model = torch.nn.Sequential(fused_rnn.GRU(3, 4, num_layers=2))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    layers = fused_rnn.explain(compiled, torch.randn(5, 2, 3)).layers
    assert [layer.problem.input_size for layer in layers] == [3, 4]
    assert not model[0]._forward_hooks and not model[0]._forward_pre_hooks


def test_explain_a_forced_choice(backends):
    with fused_rnn.backend("spy"):
        explanation = fused_rnn.explain(_Tagger(), torch.randn(5, 2, 3))
    assert explanation.backend == "spy"
    assert all(not layer.refusals for layer in explanation.layers)
    assert "not on" not in str(explanation)


def test_explain_several_backends():
    model = torch.nn.ModuleList([fused_rnn.GRU(3, 4), fused_rnn.GRU(3, 4)])

    def forward(x):
        with fused_rnn.backend("spy"):
            model[0](x)
        with fused_rnn.backend("reference"):
            model[1](x)

    model.forward = forward
    explanation = fused_rnn.explain(model, torch.randn(5, 2, 3))
    assert explanation.backend == "spy+reference"
    assert [layer.module for layer in explanation.layers] == ["0", "1"]


def test_explain_a_model_without_our_layers():
    explanation = fused_rnn.explain(torch.nn.LSTM(3, 4), torch.randn(5, 2, 3))
    assert explanation.layers == []
    assert explanation.backend == ""
    assert "no fused_rnn layer ran" in str(explanation)
    assert "replace" in str(explanation)


def test_explain_leaves_no_trace():
    """Neither in the random state, nor in the model, nor where the call raises."""
    layer = fused_rnn.GRU(3, 4, num_layers=2, dropout=0.5)
    state = torch.random.get_rng_state()
    fused_rnn.explain(layer, torch.randn(5, 2, 3, generator=torch.Generator()))
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(RuntimeError, match="input_size"):
        fused_rnn.explain(layer, torch.randn(5, 2, 7))
    assert not layer._forward_pre_hooks
    assert dispatch._recorder.get() is None


def test_explain_asks_only_devices_that_hold_tensors(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", asked.append)
    assert fused_rnn.explain(fused_rnn.GRU(3, 4), torch.randn(5, 2, 3)).layers
    assert asked == []


def test_explain_tells_what_was_asked_for():
    layer = fused_rnn.LSTM(3, 4, layer_norm=True, recurrent_dropout=0.5)
    lengths, resets = torch.tensor([5, 3]), torch.zeros(5, 2, dtype=torch.bool)
    options = {"lengths": lengths, "resets": resets, "return_states": True}
    text = str(fused_rnn.explain(layer, torch.randn(5, 2, 3), **options))
    assert "H=4, lengths, resets, all states, recurrent_dropout, layer_norm, float32" in text


def test_explain_leaves_the_states_of_a_stateful_module():
    layer = fused_rnn.LSTM(3, 4, stateful=True)
    for _ in range(2):  # with no states yet, then with some
        before = layer.state_h, layer.state_c
        fused_rnn.explain(layer, torch.randn(5, 2, 3))
        assert layer.state_h is before[0] and layer.state_c is before[1]
        layer(torch.randn(5, 2, 3))


@pytest.mark.parametrize("what", [None, torch.nn.functional.relu, "LSTM"])
def test_explain_what_is_no_module(what):
    with pytest.raises(TypeError, match=r"module: expected a torch.nn.Module, got"):
        fused_rnn.explain(what, torch.randn(5, 2, 3))

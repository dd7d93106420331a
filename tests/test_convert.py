"""replace, restore and from_torch on models as people build them."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import warnings
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from helpers.modules import NAMES, Output
from helpers.named_outcomes import assert_same, copies, run
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fused_rnn
from fused_rnn import from_torch, replace, restore
from fused_rnn.testing import assert_same_numbers

THEIRS = tuple(getattr(nn, name) for name in NAMES)
OURS = tuple(getattr(fused_rnn, name) for name in NAMES)

every_name = pytest.mark.parametrize("name", NAMES)


class Stack(nn.Module):
    """Recurrent modules in a list and a dict, one of them used twice, and cells."""

    def __init__(self):
        super().__init__()
        shared = nn.GRU(4, 4)
        self.layers = nn.ModuleList([nn.RNN(3, 4, nonlinearity="relu"), shared])
        self.named = nn.ModuleDict({"lstm": nn.LSTM(4, 4, 2, dropout=0.2), "again": shared})
        self.cell = nn.Sequential(nn.GRUCell(4, 5))
        self.cells = nn.ModuleDict({"rnn": nn.RNNCell(5, 5), "lstm": nn.LSTMCell(5, 2)})

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.layers, self.named["lstm"], self.named["again"]):
            x, _ = layer(x)
        h = self.cells["rnn"](self.cell(x[-1]))
        return self.cells["lstm"](h)[0]


class Attention(nn.Module):
    def forward(self, query: Tensor, keys: Tensor) -> Tensor:
        # query [B, K], keys [T, B, K]
        weights = torch.softmax((keys * query).sum(-1), 0)
        return (weights.unsqueeze(-1) * keys).sum(0)


class Translator(nn.Module):
    """An encoder over packed sequences, and a decoder of cells that attends to it."""

    def __init__(self, words: int = 11, size: int = 6):
        super().__init__()
        self.embedding = nn.Embedding(words, size)
        self.encoder = nn.GRU(size, size // 2, num_layers=2, bidirectional=True, dropout=0.1)
        self.attention = Attention()
        self.first = nn.LSTMCell(2 * size, size)
        self.second = nn.LSTMCell(size, size)
        self.out = nn.Linear(size, words)

    def forward(self, source: Tensor, lengths: list[int], target: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embedding(source), lengths, enforce_sorted=False)
        encoded, final = self.encoder(packed)
        keys, _ = pad_packed_sequence(encoded)
        h = torch.cat((final[-2], final[-1]), -1)
        one, two = (h, torch.zeros_like(h)), None
        loss = h.new_zeros(())
        for before, word in pairwise(target):
            context = self.attention(one[0], keys)
            one = self.first(torch.cat((self.embedding(before), context), -1), one)
            two = self.second(one[0], two)
            loss = loss + F.cross_entropy(self.out(two[0]), word)
        return loss


def translation() -> tuple[Tensor, list[int], Tensor]:
    generator = torch.Generator().manual_seed(1)
    source = torch.randint(0, 11, (7, 3), generator=generator)
    return source, [4, 7, 2], torch.randint(0, 11, (5, 3), generator=generator)


def a_sequence(width: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, 2, width, generator=generator, dtype=torch.float64, requires_grad=True)


def make(kind: str) -> tuple[nn.Module, tuple]:
    """A model in float64, and the arguments of a call."""
    torch.manual_seed(0)
    if kind == "sequential":
        model = nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 4), Output(), nn.Linear(4, 2))
    elif kind == "itself":
        model = nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2)
    elif kind == "itself_cell":
        return nn.GRUCell(3, 4).double(), (a_sequence()[0].detach().requires_grad_(),)
    elif kind == "stack":
        model = Stack()
    elif kind == "deep":
        inner = nn.Sequential(nn.GRU(3, 3, batch_first=True), Output())
        model = nn.Sequential(nn.Sequential(nn.Sequential(inner)), Stack())
    elif kind == "data_parallel":
        model = nn.DataParallel(nn.Sequential(nn.RNN(3, 4), Output()))
    else:
        return Translator().double(), translation()
    return model.double(), (a_sequence(),)


KINDS = ("sequential", "itself", "itself_cell", "stack", "deep", "data_parallel", "translator")
every_kind = pytest.mark.parametrize("kind", KINDS)


def recurrent(model: nn.Module, classes: tuple[type, ...] = THEIRS) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, classes)}


@every_kind
def test_replace_in_place(kind):
    model, args = make(kind)
    before = run(model, *args)
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    names = {n: type(m).__name__ for n, m in recurrent(model).items()}
    assert names
    keys, metadata = list(model.state_dict()), model.state_dict()._metadata
    assert replace(model) is model
    assert not recurrent(model)
    assert {n: type(m).__name__ for n, m in recurrent(model, OURS).items()} == names
    assert list(dict(model.named_modules())) == list(modules)
    assert all(m is modules[n] for n, m in model.named_modules())
    assert list(dict(model.named_parameters())) == list(parameters)
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert list(model.state_dict()) == keys and model.state_dict()._metadata == metadata
    assert_same_numbers(run(model, *args), before)


@every_kind
def test_round_trip(kind):
    model, args = make(kind)
    before = run(model, *args)
    classes = {n: type(m) for n, m in model.named_modules()}
    attributes = {n: dict(vars(m)) for n, m in model.named_modules()}
    assert restore(replace(model)) is model
    assert {n: type(m) for n, m in model.named_modules()} == classes
    for name, module in model.named_modules():
        assert vars(module).keys() == attributes[name].keys()
        assert all(v is attributes[name][k] for k, v in vars(module).items()), name
    after = run(model, *args)
    assert all(torch.equal(after[k], t) for k, t in before.items())


@every_kind
def test_replace_and_restore_are_idempotent(kind):
    model, args = make(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        restore(model, strict=True)
        assert recurrent(model) and not recurrent(model, OURS)
        replace(replace(model, strict=True), strict=True)
        assert not recurrent(model) and recurrent(model, OURS)
        run(model, *args)


@every_kind
def test_copies_of_a_replaced_model(kind):
    model, args = make(kind)
    expected = run(replace(model), *args)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert not recurrent(twin)
        found = run(twin, *args)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[k], t) for k, t in expected.items())
        # Restoring the copy leaves the original alone.
        assert recurrent(restore(twin)) and not recurrent(model)


@every_kind
def test_state_dict_across(kind):
    model, args = make(kind)
    other = replace(copy.deepcopy(model))
    for parameter in other.parameters():
        nn.init.uniform_(parameter, -0.3, 0.3)
    model.load_state_dict(other.state_dict(), strict=True)
    assert_same(other, model, *args)


def test_the_same_module_in_two_places_stays_one():
    model, _ = make("stack")
    replace(model)
    assert model.layers[1] is model.named["again"]
    assert isinstance(model.layers[1], fused_rnn.GRU)


def losses(model: nn.Module, optimizer, args: tuple, steps: range) -> list[float]:
    found = []
    for step in steps:
        torch.manual_seed(step)
        result = model(*copies(args))
        loss = result if result.dim() == 0 else result.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("kind", ["sequential", "stack", "translator", "deep"])
@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=0.01),
    ],
    ids=["sgd", "adam"],
)
def test_an_optimizer_made_before_goes_on(kind, make_optimizer):
    """Training goes on in the middle, there and back, as if nothing had happened."""
    model, args = make(kind)
    optimizer = make_optimizer(model.parameters())
    expected = losses(model, optimizer, args, range(15))
    model, args = make(kind)
    optimizer = make_optimizer(model.parameters())
    found = losses(model, optimizer, args, range(5))
    replace(model)
    found += losses(model, optimizer, args, range(5, 10))
    restore(model)
    found += losses(model, optimizer, args, range(10, 15))
    assert found == pytest.approx(expected, rel=1e-10)
    assert expected[-1] < expected[0]


def test_train_and_eval_and_frozen_parameters_are_kept():
    model, _ = make("stack")
    model.named["lstm"].eval()
    model.cells["rnn"].eval()
    model.layers[0].weight_hh_l0.requires_grad_(False)
    flags = {n: m.training for n, m in model.named_modules()}
    asked = {n: p.requires_grad for n, p in model.named_parameters()}
    for convert in (replace, restore):
        convert(model)
        assert {n: m.training for n, m in model.named_modules()} == flags
        assert {n: p.requires_grad for n, p in model.named_parameters()} == asked


@every_name
def test_hooks_are_kept(name):
    """Every kind of hook set before still runs after, with the same effect."""
    cell = name.endswith("Cell")
    results = []
    for convert in (lambda m: m, replace, lambda m: restore(replace(m))):
        torch.manual_seed(0)
        module = getattr(nn, name)(3, 4).double()
        seen: list[str] = []

        def note(kind, result=None, seen=seen):
            def hook(*args, **kwargs):
                seen.append(kind)
                return result(*args) if result else None

            return hook

        module.register_forward_pre_hook(note("pre", lambda m, a: (a[0] * 2,)))
        module.register_forward_hook(note("forward"))
        module.register_forward_hook(note("forward with kwargs"), with_kwargs=True)
        module.register_full_backward_pre_hook(note("backward pre"))
        module.register_full_backward_hook(note("backward", lambda m, gi, go: (gi[0] * 3,)))
        module.register_state_dict_pre_hook(note("state pre"))
        module.register_state_dict_post_hook(note("state post"))
        module.register_load_state_dict_pre_hook(note("load pre"))
        module.register_load_state_dict_post_hook(note("load post"))
        next(module.parameters()).register_hook(note("parameter", lambda g: g * 5))
        module = convert(module)
        result = run(module, a_sequence()[0].detach().requires_grad_() if cell else a_sequence())
        module.load_state_dict(module.state_dict())
        results.append((result, seen))
    assert len(results[0][1]) == 10
    for result, seen in results[1:]:
        assert seen == results[0][1]
        assert_same_numbers(result, results[0][0])


@every_name
def test_forward_that_was_wrapped_is_kept(name):
    """As libraries do that move weights to a device before a call: torch.nn's is called then."""
    torch.manual_seed(0)
    module = getattr(nn, name)(3, 4).double()
    x = a_sequence()[0].detach().requires_grad_() if name.endswith("Cell") else a_sequence()
    expected, calls, before = run(module, x), [], module.forward

    def forward(*args):
        calls.append(args)
        return before(*args)

    module.forward = forward
    assert_same_numbers(run(replace(module), x), expected)
    assert len(calls) == 1


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("attribute", ["stateful", "reset_after", "zoneout", "layer_norm"])
def test_attributes_called_as_options_of_ours_are_their_owners(attribute):
    """Keras' names, for one, mean something to those who write them on a layer of torch.nn."""
    layer, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    value = attribute != "reset_after"
    setattr(layer, attribute, value)
    expected, original = layer(x)[0], repr(layer)
    replace(layer)
    for _ in range(2):
        torch.testing.assert_close(layer(x)[0], expected)
    assert repr(layer.double().float()) == original
    assert fused_rnn.explain(layer, x).layers
    assert getattr(layer, attribute) is value
    assert type(restore(layer)) is nn.LSTM


@pytest.mark.parametrize("weight", ["weight_hh_l0", "bias_ih_l1"])
def test_parametrized_module(weight):
    model, args = make("sequential")
    model[1] = nn.LSTM(3, 4, num_layers=2).double()
    parametrize.register_parametrization(model[1], weight, Doubled())
    parametrize.register_parametrization(model[1], "weight_ih_l0", Doubled())
    theirs_class = type(model[1])
    before = run(model, *args)
    parameters = dict(model.named_parameters())
    replace(model, strict=True)
    assert isinstance(model[1], fused_rnn.LSTM) and not isinstance(model[1], nn.LSTM)
    assert parametrize.is_parametrized(model[1], weight)
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert list(dict(model.named_parameters())) == list(parameters)
    assert_same_numbers(run(model, *args), before)
    # A second parametrization, and taking one away, work as on any module.
    parametrize.register_parametrization(model[1], "weight_hh_l1", Doubled())
    parametrize.remove_parametrizations(model[1], "weight_hh_l1", leave_parametrized=False)
    assert_same_numbers(run(model, *args), before)
    restore(model, strict=True)
    assert isinstance(model[1], nn.LSTM) and theirs_class.__name__ == type(model[1]).__name__
    assert_same_numbers(run(model, *args), before)
    replace(model)
    for name in (weight, "weight_ih_l0"):
        parametrize.remove_parametrizations(model[1], name)
    assert type(model[1]) is fused_rnn.LSTM
    assert repr(model[1]) == "LSTM(3, 4, num_layers=2)"
    result, expected = run(model, *args)["result"], before["result"]
    assert_same_numbers({"result": result}, {"result": expected})


def test_parametrized_modules_do_not_share_a_class():
    model = nn.ModuleList([nn.GRU(3, 4), nn.GRU(3, 4)])
    parametrize.register_parametrization(model[0], "weight_hh_l0", Doubled())
    parametrize.register_parametrization(model[1], "weight_ih_l0", Doubled())
    replace(model)
    assert type(model[0]) is not type(model[1])
    parametrize.remove_parametrizations(model[0], "weight_hh_l0")
    assert type(model[0]) is fused_rnn.GRU
    assert parametrize.is_parametrized(model[1], "weight_ih_l0")


NORMS = {
    "weight_norm": lambda m, n: parametrizations.weight_norm(m, n),
    "orthogonal": lambda m, n: parametrizations.orthogonal(m, n),
    "old_weight_norm": lambda m, n: torch.nn.utils.weight_norm(m, n),
    "old_spectral_norm": lambda m, n: torch.nn.utils.spectral_norm(m, n),
    "prune": lambda m, n: prune.random_unstructured(m, n, 0.5),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", NORMS)
@every_name
def test_reparametrized_before_replace(kind, name):
    cell = name.endswith("Cell")
    x = a_sequence()[0].detach().requires_grad_() if cell else a_sequence()
    modules = []
    for _ in range(2):
        torch.manual_seed(0)
        module = getattr(nn, name)(3, 4).double()
        NORMS[kind](module, "weight_hh" if cell else "weight_hh_l0")
        modules.append(module)
    ours = replace(modules[1], strict=True)
    assert_same(ours, modules[0], x)
    assert isinstance(ours, getattr(fused_rnn, name))


@every_name
def test_from_torch(name):
    cell = name.endswith("Cell")
    x = a_sequence()[0].detach().requires_grad_() if cell else a_sequence()
    torch.manual_seed(0)
    theirs = getattr(nn, name)(3, 4).double().eval()
    before = dict(vars(theirs))
    ours = from_torch(theirs)
    assert type(ours) is getattr(fused_rnn, name) and type(theirs) is getattr(nn, name)
    assert all(vars(theirs)[k] is v for k, v in before.items())
    assert not ours.training
    assert repr(ours) == repr(theirs)
    for (a, p), (b, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert a == b and p is q
    assert_same(ours, theirs, x)


def hook_all(module: nn.Module) -> list[str]:
    """Registers hooks of every kind; the list that is returned grows as they are called."""
    calls: list[str] = []
    module.register_forward_hook(lambda *_: calls.append("forward"))
    module.register_forward_pre_hook(lambda *_, **__: calls.append("pre"), with_kwargs=True)
    module.register_full_backward_hook(lambda *_: calls.append("backward"))
    module.register_state_dict_pre_hook(lambda *_: calls.append("state"))
    module.register_load_state_dict_post_hook(lambda *_: calls.append("load"))
    return calls


@every_name
def test_from_torch_is_independent_of_the_original(name):
    cell = name.endswith("Cell")
    weight = "weight_hh" if cell else "weight_hh_l0"
    x = a_sequence()[0].detach().requires_grad_() if cell else a_sequence()
    for changed, kept in (("ours", "theirs"), ("theirs", "ours")):
        torch.manual_seed(0)
        theirs = getattr(nn, name)(3, 4).double()
        modules = {"theirs": theirs, "ours": from_torch(theirs)}
        one, other = modules[changed], modules[kept]
        before = run(other, x)
        state = dict(other.state_dict())
        attributes = set(vars(other))
        flat = list(getattr(other, "_flat_weights", []))
        calls = hook_all(one)
        one.register_buffer("extra", torch.zeros(1))
        one.register_parameter("more", nn.Parameter(torch.zeros(1)))
        one.add_module("child", nn.Linear(1, 1))
        one.note = "mine"
        setattr(one, weight, nn.Parameter(torch.zeros_like(getattr(one, weight))))
        one.eval()
        assert set(vars(other)) == attributes
        assert other.training
        assert list(other.state_dict()) == list(state)
        assert all(torch.equal(other.state_dict()[k], v) for k, v in state.items())
        assert all(a is b for a, b in zip(getattr(other, "_flat_weights", []), flat, strict=True))
        after = run(other, x)
        other.load_state_dict(other.state_dict())
        assert not calls
        assert after.keys() == before.keys()
        assert all(torch.equal(after[k], t) for k, t in before.items())
        run(one, x)
        assert "forward" in calls and "backward" in calls


def test_from_torch_of_a_parametrized_module_is_independent_too():
    theirs = nn.GRU(3, 4).double()
    parametrize.register_parametrization(theirs, "weight_hh_l0", Doubled())
    before = run(theirs, a_sequence())
    ours = from_torch(theirs)
    assert isinstance(ours, fused_rnn.GRU)
    assert_same_numbers(run(ours, a_sequence()), before)
    # Left parametrized, the value would be written into the Parameter that both share.
    parametrize.remove_parametrizations(ours, "weight_hh_l0", leave_parametrized=False)
    assert type(ours) is fused_rnn.GRU
    assert parametrize.is_parametrized(theirs, "weight_hh_l0")
    assert_same_numbers(run(theirs, a_sequence()), before)


def test_from_torch_of_a_compiled_module_calls_ours():
    """Not the compiled call of the original."""
    theirs = nn.GRU(3, 4).double()
    theirs.compile(backend="eager")
    ours = from_torch(theirs)
    calls = hook_all(ours)
    assert_same_numbers(run(ours, a_sequence()), run(theirs, a_sequence()))
    assert calls.count("forward") == 1


def test_from_torch_takes_one_module_of_torchs():
    for other in (nn.Linear(2, 3), nn.Sequential(nn.GRU(2, 3)), fused_rnn.GRU(2, 3), Own(2, 3)):
        with pytest.raises(TypeError, match=r"module: expected one of torch\.nn\.RNN"):
            from_torch(other)


class Own(nn.LSTM):
    """A user's subclass."""

    def forward(self, x, hx=None):
        output, state = super().forward(x, hx)
        return output + 1, state


class OwnCell(nn.GRUCell):
    pass


class OwnFused(fused_rnn.LSTM):
    pass


def refused() -> dict[str, tuple[nn.Module, list[str]]]:
    """Models with something that cannot be converted beside a GRU that can, and what a report
    must say of it: the module's name, its class, and why."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantization and TorchScript are deprecated
        quantized = torch.ao.quantization.quantize_dynamic(
            nn.Sequential(nn.LSTM(3, 4)), {nn.LSTM}, dtype=torch.qint8
        )
        scripted = torch.jit.script(nn.Sequential(nn.LSTM(3, 4)))
    found = {
        "subclass": (Own(3, 4), ["'a'", "Own", "subclass"]),
        "cell": (OwnCell(3, 4), ["'a'", "OwnCell", "subclass"]),
        "deep": (nn.Sequential(nn.ReLU(), Own(3, 4)), ["'a.1'", "Own", "subclass"]),
        "quantized": (quantized, ["'a.0'", "quantized.dynamic", "LSTM"]),
        "scripted": (scripted, ["'a.0'", "scripted", "convert"]),
    }
    return {
        kind: (nn.ModuleDict({"a": module, "b": nn.GRU(3, 4)}), words)
        for kind, (module, words) in found.items()
    }


@pytest.fixture(scope="module")
def refused_models():
    return refused()


@pytest.mark.parametrize("kind", ["subclass", "cell", "deep", "quantized", "scripted"])
def test_what_cannot_be_converted_is_reported(kind, refused_models):
    model, words = refused_models[kind]
    model["b"] = nn.GRU(3, 4)
    classes = {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(ValueError) as error:
        replace(model, strict=True)
    assert {n: type(m) for n, m in model.named_modules()} == classes  # nothing has changed
    with pytest.warns(UserWarning) as caught:
        assert replace(model) is model
    (warning,) = caught
    assert warning.filename == __file__  # it points at the caller
    for text in (str(error.value), str(warning.message)):
        assert text.startswith("replace: cannot convert")
        assert [w for w in words if w not in text] == []
    changed = {n for n, m in model.named_modules() if type(m) is not classes[n]}
    assert changed == {"b"}


@pytest.mark.parametrize("kind", ["subclass", "cell", "deep", "quantized", "scripted"])
def test_restore_has_nothing_to_say_of_torchs_modules(kind, refused_models):
    model, _ = refused_models[kind]
    model["b"] = fused_rnn.GRU(3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        restore(model, strict=True)
    assert type(model["b"]) is nn.GRU


def test_the_model_itself_may_be_what_is_refused():
    model = Own(3, 4)
    with pytest.warns(UserWarning, match=r"the model .*Own.*subclass"):
        assert replace(model) is model
    assert type(model) is Own
    with pytest.raises(ValueError, match="the model"):
        replace(model, strict=True)


def test_several_refusals_make_one_report():
    model = nn.Sequential(Own(3, 4), Own(3, 4), nn.LSTM(3, 4))
    with pytest.warns(UserWarning) as caught:
        replace(model)
    (warning,) = caught
    assert "'0'" in str(warning.message) and "'1'" in str(warning.message)
    assert "'2'" not in str(warning.message)
    assert type(model[2]) is fused_rnn.LSTM


def test_restore_reports_too():
    model = nn.Sequential(OwnFused(3, 4), fused_rnn.GRU(3, 4))
    with pytest.raises(ValueError, match=r"restore: cannot convert '0' .*OwnFused"):
        restore(model, strict=True)
    assert type(model[1]) is fused_rnn.GRU
    with pytest.warns(UserWarning, match=r"restore: cannot convert '0' .*OwnFused"):
        restore(model)
    assert type(model[0]) is OwnFused and type(model[1]) is nn.GRU


def test_parametrized_subclass_is_reported():
    model = nn.Sequential(Own(3, 4))
    parametrize.register_parametrization(model[0], "weight_hh_l0", Doubled())
    with pytest.raises(ValueError, match="'0'"):
        replace(model, strict=True)


def test_bound_to_torchs_names(tmp_path):
    """As docs/drop-in.md has it for libraries that derive from torch.nn's classes, or look for
    them."""
    script = tmp_path / "library.py"
    script.write_text(
        f"""
import torch, fused_rnn
from torch.nn.modules.rnn import GRU, GRUCell

for name in {NAMES}:
    setattr(torch.nn, name, getattr(fused_rnn, name))

class Tagger(torch.nn.LSTM):
    pass

torch.manual_seed(0)
tagger, layer, x = Tagger(3, 4, bidirectional=True), torch.nn.LSTM(3, 4), torch.randn(5, 2, 3)
assert isinstance(tagger, torch.nn.LSTM) and isinstance(layer, fused_rnn.LSTM)
plain = fused_rnn.restore(fused_rnn.LSTM(3, 4, bidirectional=True))
plain.load_state_dict(tagger.state_dict())
assert type(plain).__module__ == "torch.nn.modules.rnn" and not isinstance(plain, torch.nn.LSTM)
torch.testing.assert_close(tagger(x), plain(x))
assert isinstance(fused_rnn.replace(torch.nn.Sequential(plain))[0], torch.nn.LSTM)
step = fused_rnn.stepper(fused_rnn.restore(torch.nn.GRU(3, 4)))
assert step(x)[0].shape == (5, 2, 4)
for theirs in (GRU(3, 4), GRUCell(3, 4)):
    fused_rnn.flip_update_gate(theirs)
from fused_rnn.interop.onnx_weights import to_onnx
assert to_onnx(GRU(3, 4))[0].operator == "GRU"
"""
    )
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_a_model_without_recurrent_modules_is_left_in_peace():
    model = nn.Sequential(nn.Linear(2, 3), nn.Conv1d(2, 3, 1), nn.MultiheadAttention(4, 2))
    classes = [type(m) for m in model.modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert replace(model, strict=True) is model
        assert restore(model, strict=True) is model
    assert [type(m) for m in model.modules()] == classes


def test_strict_is_by_name_only():
    for convert in (replace, restore):
        with pytest.raises(TypeError):
            convert(nn.GRU(2, 3), True)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"init": "orthogonal"}, {"recompute": True}, {"zoneout": 0.1}, {"dropout": 0.5},
        {"stateful": True},
    ],
)  # fmt: skip
def test_what_restore_leaves_is_anybodys(options):
    """Whoever unpickles it needs no fused_rnn, and nothing of ours is kept alive."""
    module = fused_rnn.LSTM(3, 4, num_layers=2, **options)
    if "zoneout" in options:
        module.zoneout = 0.0
    if "stateful" in options:
        module(torch.randn(2, 1, 3))
        module.stateful = False
    restored = fused_rnn.restore(module)
    assert vars(restored).keys() == vars(nn.LSTM(3, 4, num_layers=2)).keys()
    assert b"fused_rnn" not in pickle.dumps(restored)

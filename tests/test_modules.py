"""RNN, GRU and LSTM against torch.nn: the whole cross of options, then everything else a module
of torch.nn can be put through."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import warnings

import numpy as np
import pytest
import torch
from helpers.inputs import spread
from helpers.modules import Output, seeded_pair
from helpers.named_outcomes import (
    assert_accurate,
    assert_accurate_run,
    assert_same,
    copies,
    doubled,
    run,
    tensors,
    to,
)
from helpers.outcomes import flat
from helpers.pairs import pairs
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import fused_rnn
from fused_rnn import ops
from fused_rnn.testing import (
    TORCH_CELLS,
    assert_same_numbers,
    make_module,
)

T, B, I, H, P = 5, 3, 4, 6, 2  # noqa: E741

# name -> class name, arguments that make the variant
VARIANTS = {
    "rnn_tanh": ("RNN", {"nonlinearity": "tanh"}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "gru": ("GRU", {}),
    "lstm": ("LSTM", {}),
    "lstm_proj": ("LSTM", {"proj_size": P}),
}
# torch.nn falls back where oneDNN has no projection, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")

FORMS = ("padded", "sorted", "unsorted", "unbatched")
LENGTHS = {"sorted": [5, 3, 2], "unsorted": [2, 5, 3]}

every_variant = pytest.mark.parametrize("variant", VARIANTS)


def pair(variant: str, seed: int = 0, **options) -> tuple[nn.Module, nn.Module]:
    """torch.nn's module and ours, each built from the same seed."""
    name, extra = VARIANTS[variant]
    return seeded_pair(name, I, H, seed=seed, **extra, **options)


def to_absolute(value):
    """The same nest with the absolute value of every tensor."""
    if isinstance(value, Tensor):
        return value.detach().abs().requires_grad_(value.requires_grad)
    if isinstance(value, PackedSequence):
        return PackedSequence(to_absolute(value.data), *value[1:])
    return tuple(to_absolute(item) for item in value)


def make_input(form: str, batch_first: bool = False, dtype=torch.float64, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    shape = (T, I) if form == "unbatched" else (B, T, I) if batch_first else (T, B, I)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if form in LENGTHS:
        x = pack_padded_sequence(x, LENGTHS[form], batch_first, enforce_sorted=form == "sorted")
        x.data.requires_grad_()
        return x
    return x.requires_grad_()


def make_states(module: nn.Module, form: str = "padded", dtype=torch.float64, batch: int = B):
    generator = torch.Generator().manual_seed(2)
    layers = module.num_layers * (2 if module.bidirectional else 1)
    batches = () if form == "unbatched" else (batch,)

    def state(width):
        values = torch.randn((layers, *batches, width), generator=generator, dtype=torch.float64)
        return values.to(dtype).requires_grad_()

    h0 = state(module.proj_size or module.hidden_size)
    return (h0, state(module.hidden_size)) if module.mode == "LSTM" else h0


def option_cross() -> list:
    cases = []
    for variant, layers, dropout in itertools.product(VARIANTS, (1, 2), (0.0, 0.4)):
        if dropout and layers == 1:
            continue  # torch warns that it does nothing; tested by itself
        for bidirectional, bias, batch_first in itertools.product((False, True), repeat=3):
            options = dict(
                num_layers=layers,
                dropout=dropout,
                bidirectional=bidirectional,
                bias=bias,
                batch_first=batch_first,
            )
            words = [variant, str(layers), f"dropout{dropout}" if dropout else ""]
            words += [k for k, v in options.items() if v is True]
            cases.append(pytest.param(variant, options, id="-".join(filter(None, words))))
    return cases


@pytest.mark.parametrize(
    ("variant", "options", "form", "with_hx"),
    pairs(
        option_cross(),
        [
            pytest.param(form, with_hx, id=f"{form}-{'hx' if with_hx else 'zeros'}")
            for form, with_hx in itertools.product(FORMS, (False, True))
        ],
        one_in=3,
    ),
)
def test_options(variant, options, form, with_hx):
    theirs, ours = pair(variant, **options)
    exact = doubled(theirs)
    args = (make_input(form, options["batch_first"]),)
    if with_hx:
        args += (make_states(ours, form),)
    assert_same(doubled(ours), exact, *args)
    assert_accurate_run(ours, theirs, exact, *args)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("with_hx", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("variant", "options"), option_cross())
def test_options_in_half_types(variant, options, form, with_hx, dtype):
    theirs, ours = pair(variant, **options)
    args = (make_input(form, options["batch_first"]),)
    if with_hx:
        args += (make_states(ours, form),)
    if variant == "rnn_relu":
        # At relu's kink a rounding flips a whole gradient. Rows that are all positive and rows
        # that are all negative, over states that are never negative, keep clear of it.
        for module in (theirs, ours):
            for weight in module.parameters():
                weight.data.abs_()[1::2] *= -1 if weight.shape[0] == H else 1
        args = to_absolute(args)
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    exact = doubled(theirs)
    assert_accurate_run(ours, theirs, exact, *args, dtype=dtype, roundings=2)


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_same_parameters_from_same_seed(variant, dtype, layers, bidirectional, bias):
    name, extra = VARIANTS[variant]
    built, states = [], []
    for namespace in (nn, fused_rnn):
        torch.manual_seed(7)
        built.append(
            getattr(namespace, name)(
                I, H, layers, bidirectional=bidirectional, bias=bias, dtype=dtype, **extra
            )
        )
        states.append(torch.get_rng_state())
    theirs, ours = (list(module.named_parameters()) for module in built)
    assert [n for n, _ in ours] == [n for n, _ in theirs]
    for (_, a), (_, b) in zip(ours, theirs, strict=True):
        assert type(a) is nn.Parameter and a.dtype == b.dtype and a.requires_grad
        assert torch.equal(a, b)
    assert torch.equal(*states)
    assert not list(built[1].buffers())


def test_positional_arguments():
    cases = {
        "RNN": (3, 4, 2, "relu", False, True, 0.5, True, "cpu", torch.float64),
        "GRU": (3, 4, 2, False, True, 0.5, True),
        "LSTM": (3, 4, 2, False, True, 0.5, True, 2, "cpu", torch.float64),
    }
    for name, args in cases.items():
        if name == "GRU":  # torch passes what is left on to a base that has proj_size there
            args = (*args[:7],)
        theirs = getattr(nn, name)(*args[:8]) if name != "GRU" else nn.GRU(*args)
        ours = getattr(fused_rnn, name)(*args)
        assert repr(ours) == repr(theirs)
        assert ours.mode == theirs.mode
        if len(args) > 8:
            assert {p.dtype for p in ours.parameters()} == {torch.float64}


@every_variant
def test_dropout_drops_what_torch_drops(variant):
    """Dropout of everything between layers, of nothing, and off in eval."""
    for p in (0.0, 0.3, 1.0):
        theirs, ours = pair(variant, num_layers=3, dropout=p, dtype=torch.float64)
        assert_same(ours, theirs, make_input("padded"))
    theirs, ours = pair(variant, num_layers=2, dropout=0.5, dtype=torch.float64)
    x = make_input("padded")
    assert not torch.equal(run(ours, x, seed=1)["result[0]"], run(ours, x, seed=2)["result[0]"])
    ours.eval(), theirs.eval()
    assert torch.equal(run(ours, x, seed=1)["result[0]"], run(ours, x, seed=2)["result[0]"])
    assert_same(ours, theirs, x)
    with torch.no_grad():  # dropout follows train(), not gradients
        ours.train()
        torch.manual_seed(1)
        first = ours(x)[0]
        assert not first.requires_grad
        assert not torch.equal(first, ours(x)[0])


def test_dropout_that_does_nothing_warns_as_torch_does():
    for namespace in (nn, fused_rnn):
        with pytest.warns(UserWarning, match="num_layers greater than 1, but got dropout=0.5"):
            namespace.GRU(I, H, dropout=0.5)


def option_modules(variant: str, **more):
    """torch.nn's module and ours for each of some telling options."""
    for options in (
        {},
        dict(num_layers=2, bidirectional=True),
        dict(num_layers=2, bias=False, batch_first=True, dropout=0.25),
    ):
        yield pair(variant, **options, **more)


@every_variant
def test_methods_around_forward(variant):
    """Those torch.nn's forward calls, which subclasses and wrappers may call too."""
    theirs, ours = pair(variant, num_layers=2, bidirectional=True)
    x, hx = make_input("padded", dtype=torch.float32), make_states(ours, dtype=torch.float32)
    order = torch.tensor([2, 0, 1])
    for module in (theirs, ours):
        module.check_forward_args(x, hx, None)
        with pytest.raises(RuntimeError, match=r"Expected hidden.* size"):
            module.check_forward_args(x[:, :1], hx, None)
    permuted = [tensors("hx", module.permute_hidden(hx, order)) for module in (ours, theirs)]
    assert_same_numbers(*permuted)
    public = {name for name in dir(theirs) if not name.startswith("_")}
    assert public <= set(dir(ours))


@every_variant
@pytest.mark.parametrize("form", FORMS)
def test_numbers_of_numpy(variant, form):
    """torch.nn takes them, as they come out of a table of hyperparameters, say."""
    theirs, ours = pair(variant, num_layers=np.int64(2), dtype=torch.float64)
    theirs.dropout = ours.dropout = np.float32(0.5)
    args = make_input(form), make_states(ours, form)
    assert_same(ours, theirs, *args)
    assert_same(ours.eval(), theirs.eval(), *args)
    with torch.no_grad():
        assert_same(ours.float(), theirs.float(), *to(args, torch.float32))


@every_variant
def test_state_dict_both_ways(variant):
    for theirs, ours in option_modules(variant):
        for source, target in ((theirs, ours), (ours, theirs)):
            for parameter in target.parameters():
                nn.init.zeros_(parameter)
            state = source.state_dict()
            assert list(state) == list(target.state_dict())
            assert state._metadata == target.state_dict()._metadata
            target.load_state_dict(state, strict=True)
            assert all(torch.equal(v, state[k]) for k, v in target.state_dict().items())
            assert_same(doubled(ours), doubled(theirs), make_input("padded"))
        with pytest.raises(RuntimeError, match="Missing key"):
            ours.load_state_dict({}, strict=True)
        ours.load_state_dict(theirs.double().state_dict(), assign=True)
        assert ours.weight_hh_l0.dtype == torch.float64
        assert_same(ours, theirs, make_input("padded"))


@every_variant
def test_attributes_and_repr(variant):
    names = ["mode", "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout"]
    names += ["bidirectional", "proj_size", "training"]
    names += ["nonlinearity"] * variant.startswith("rnn")
    for theirs, ours in option_modules(variant):
        assert repr(ours) == repr(theirs)
        for name in names:
            assert getattr(ours, name) == getattr(theirs, name), name
        assert isinstance(ours, nn.RNNBase)


@every_variant
def test_all_weights_and_flatten_parameters(variant):
    for theirs, ours in option_modules(variant):
        before = [p.data_ptr() for p in ours.parameters()]
        assert ours.flatten_parameters() is None
        assert [p.data_ptr() for p in ours.parameters()] == before
        assert ours._flat_weights_names == theirs._flat_weights_names
        for ours_layer, theirs_layer in zip(ours.all_weights, theirs.all_weights, strict=True):
            for a, b in zip(ours_layer, theirs_layer, strict=True):
                assert torch.equal(a, b)
        assert ours.all_weights[0][1] is ours.weight_hh_l0


def saved_and_loaded(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_variant
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded],
    ids=["deepcopy", "copy", "pickle", "save"],
)
def test_copies(variant, copied):
    for theirs, ours in option_modules(variant, dtype=torch.float64):
        run(ours, make_input("padded"))  # a module that has been used, with gradients
        twin = copied(ours.eval())
        assert type(twin) is type(ours) and repr(twin) == repr(ours) and not twin.training
        assert_same(twin.train(), theirs, make_input("padded"))
        if copied is not copy.copy:
            with torch.no_grad():
                twin.weight_ih_l0.zero_()
            assert ours.weight_ih_l0.abs().sum() > 0
            assert_same(ours.train(), theirs, make_input("padded"))


@every_variant
def test_conversions_of_dtype(variant):
    for convert in (
        lambda m: m.to(torch.float64),
        lambda m: m.double(),
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.half().float(),
        lambda m: m.to("cpu", torch.float64, non_blocking=True),
    ):
        theirs, ours = (convert(m) for m in pair(variant, num_layers=2, bidirectional=True))
        dtype = theirs.weight_ih_l0.dtype
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b), name
            assert a is getattr(ours, name)
        x = make_input("padded", dtype=dtype)
        result, expected = run(ours, x), run(theirs, x)
        assert result.keys() == expected.keys()
        assert {t.dtype for t in result.values()} == {dtype}
        if dtype in (torch.float32, torch.float64):
            assert_same_numbers(result, expected, roundings=256)


@every_variant
@pytest.mark.parametrize("form", FORMS)
def test_meta_device(variant, form):
    """Shapes without memory, then memory."""
    name, extra = VARIANTS[variant]
    options = dict(num_layers=2, bidirectional=True, device="meta", **extra)
    theirs, ours = getattr(nn, name)(I, H, **options), getattr(fused_rnn, name)(I, H, **options)
    x = make_input(form, dtype=torch.float32)
    real = pair(variant, num_layers=2, bidirectional=True)[1]
    if isinstance(x, PackedSequence):
        meta = PackedSequence(x.data.detach().to("meta"), x.batch_sizes)
        x = PackedSequence(x.data.detach(), x.batch_sizes)
    else:
        x = x.detach()
        meta = x.to("meta")
    found, expected = tensors("result", ours(meta)), tensors("result", real(x))
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert tensor.is_meta, key
        assert (tensor.shape, tensor.dtype) == (expected[key].shape, expected[key].dtype), key
        assert tensor.requires_grad
    ours, theirs = ours.to_empty(device="cpu"), theirs.to_empty(device="cpu")
    for module in (ours, theirs):
        torch.manual_seed(5)
        module.reset_parameters()
    assert_same(ours.double(), theirs.double(), make_input(form))


@every_variant
def test_skip_init(variant):
    name, extra = VARIANTS[variant]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    ours = nn.utils.skip_init(
        getattr(fused_rnn, name), I, H, num_layers=2, dtype=torch.float64, **extra
    )
    assert torch.equal(torch.get_rng_state(), before)
    theirs = pair(variant, num_layers=2, dtype=torch.float64)[0]
    ours.load_state_dict(theirs.state_dict())
    assert_same(ours, theirs, make_input("padded"))


def turned(tensor: Tensor) -> Tensor:
    """Equal values with the first and last dimensions swapped in memory."""
    return tensor.detach().transpose(0, -1).contiguous().transpose(0, -1)


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", [spread, turned])
@pytest.mark.parametrize("which", ["input", "hx", "weights", "all"])
def test_non_contiguous(variant, dtype, layout, which):
    _, ours = pair(variant, num_layers=2, bidirectional=True, dtype=dtype)
    x, hx = make_input("padded", dtype=dtype), make_states(ours, dtype=dtype)
    expected = run(ours, x, hx)
    ours.zero_grad()
    if which in ("weights", "all"):
        for name, weight in list(ours.named_parameters()):
            setattr(ours, name, nn.Parameter(layout(weight)))
        assert not ours.weight_hh_l1.is_contiguous()

    def relaid(value, wanted):
        if not wanted:
            return copies(value)
        if isinstance(value, tuple):
            return tuple(relaid(v, wanted) for v in value)
        return layout(value).requires_grad_()

    x, hx = relaid(x, which in ("input", "all")), relaid(hx, which in ("hx", "all"))
    outputs = ours(x, hx)
    assert which not in ("input", "all") or not x.is_contiguous()
    found = tensors("result", outputs)
    generator = torch.Generator().manual_seed(4)
    sum(
        (t * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(dtype)).sum()
        for t in found.values()
    ).backward()
    result = {k: t.detach() for k, t in found.items()}
    for name, tensor in [*tensors("args", (x, hx)).items(), *ours.named_parameters()]:
        result[f"grad of {name}"] = tensor.grad
    assert_same_numbers(result, expected)


def test_weight_set_from_a_transposed_tensor():
    theirs, ours = pair("gru", dtype=torch.float64)
    generator = torch.Generator().manual_seed(6)
    weight = torch.randn(H, 3 * H, generator=generator, dtype=torch.float64)
    for module in (theirs, ours):
        module.weight_hh_l0 = nn.Parameter(weight.t())
    assert ours._flat_weights[1] is ours.weight_hh_l0
    assert_same(ours, theirs, make_input("padded"), make_states(ours))


@every_variant
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("shape", [(1, 3), (5, 0), (1, 0), (1, 1), (60, 1)], ids=str)
def test_extreme_shapes(variant, batch_first, shape):
    timesteps, batch = shape
    options = dict(num_layers=2, bidirectional=True, batch_first=batch_first, dtype=torch.float64)
    theirs, ours = pair(variant, **options)
    generator = torch.Generator().manual_seed(1)
    size = (batch, timesteps, I) if batch_first else (timesteps, batch, I)
    x = torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()
    assert_same(ours, theirs, x)
    assert_same(ours, theirs, x, make_states(ours, batch=batch))
    ours, theirs = ours.float(), theirs.float()
    assert_accurate_run(ours, theirs, doubled(theirs), x)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "lstm_proj"])
def test_one_input_feature_and_one_hidden_unit(variant):
    name, extra = VARIANTS[variant]
    modules = []
    for namespace in (nn, fused_rnn):
        torch.manual_seed(0)
        modules.append(getattr(namespace, name)(1, 1, 2, bidirectional=True, **extra).double())
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 2, 1, generator=generator, dtype=torch.float64, requires_grad=True)
    assert_same(modules[1], modules[0], x)


class Symmetric(nn.Module):
    """Something of the shape of its argument."""

    def forward(self, weight: Tensor) -> Tensor:
        return torch.sin(weight) + weight.flip(0)


def old_weight_norm(module: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(module, "weight_hh_l0")


REPARAMETRIZATIONS = {
    "parametrize": lambda m: parametrize.register_parametrization(m, "weight_hh_l0", Symmetric()),
    "parametrize_bias": lambda m: parametrize.register_parametrization(
        m, "bias_ih_l1_reverse", Symmetric()
    ),
    "two": lambda m: [
        parametrize.register_parametrization(m, name, Symmetric())
        for name in ("weight_hh_l0", "weight_ih_l0", "weight_hh_l0")
    ],
    "weight_norm": lambda m: parametrizations.weight_norm(m, "weight_hh_l0"),
    "old_weight_norm": old_weight_norm,
    "spectral_norm": lambda m: parametrizations.spectral_norm(m, "weight_hh_l0"),
    "old_spectral_norm": lambda m: torch.nn.utils.spectral_norm(m, "weight_hh_l0"),
    "prune_l1": lambda m: prune.l1_unstructured(m, "weight_ih_l0", 0.5),
    "prune_rows": lambda m: prune.ln_structured(m, "weight_hh_l0", 0.5, n=2, dim=0),
}


@every_variant
@pytest.mark.parametrize("kind", REPARAMETRIZATIONS)
def test_reparametrized_weights(variant, kind):
    theirs, ours = pair(variant, num_layers=2, bidirectional=True, dtype=torch.float64)
    args = make_input("padded"), make_states(ours)
    plain = ours(*args)[0]
    for module in (theirs, ours):
        torch.manual_seed(9)
        REPARAMETRIZATIONS[kind](module)
    names = [n for n, _ in ours.named_parameters()]
    assert names == [n for n, _ in theirs.named_parameters()]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    if kind == "spectral_norm":
        # In training torch.nn reads each weight several times a call, and each time the power
        # iteration takes a step; we read it once. In eval it does not move.
        ours.load_state_dict(theirs.state_dict())
        ours.eval(), theirs.eval()
    for _ in range(2):  # twice: the weights are computed anew, the old spectral_norm steps on
        assert_same(ours, theirs, *args)
    changed = next(p for n, p in ours.named_parameters() if "_g" in n or "orig" in n)
    assert changed.grad is not None and changed.grad.abs().sum() > 0
    # A step on the underlying parameters is seen by the next call.
    stepped = [module.eval()(*args)[0] for module in (theirs, ours)][1]
    for module in (theirs, ours):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter -= 0.1 * parameter.grad
    assert_same(ours, theirs, *args)
    if "weight_norm" not in kind:  # which at first gives the very same weights
        assert not torch.allclose(stepped, plain)
    assert not torch.equal(ours(*args)[0], stepped)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [8, 300])
@pytest.mark.parametrize("gradients", [False, True])
def test_spectral_norm_takes_one_step_a_call(gradients, width, dtype, autocast, backend):
    for ours, name in (
        (fused_rnn.LSTM(4, width), "weight_hh_l0"),
        (fused_rnn.GRU(4, width, batch_first=True), "weight_hh_l0"),
        (fused_rnn.GRU(4, width, zoneout=0.5, layer_norm=True), "weight_hh_l0"),
        (fused_rnn.GRUCell(4, width), "weight_hh"),
    ):
        parametrizations.spectral_norm(ours.to(dtype), name)
        twin = copy.deepcopy(ours)
        shape = (3, 4) if isinstance(ours, nn.RNNCellBase) else (5, 3, 4)
        heeded = torch.autocast("cpu", torch.float16, enabled=autocast), fused_rnn.backend(backend)
        with torch.set_grad_enabled(gradients):
            with heeded[0], heeded[1]:
                ours(torch.randn(shape, dtype=dtype))
            assert getattr(twin, name) is not None
        found, expected = (m.parametrizations[name][0]._u for m in (ours, twin))
        assert torch.equal(found, expected)


def test_removed_reparametrizations():
    for add, remove in (
        (parametrizations.weight_norm, parametrize.remove_parametrizations),
        (lambda m, n: prune.random_unstructured(m, n, 0.5), prune.remove),
        (torch.nn.utils.spectral_norm, torch.nn.utils.remove_spectral_norm),
    ):
        theirs, ours = pair("lstm", dtype=torch.float64)
        for module in (theirs, ours):
            torch.manual_seed(9)
            add(module, "weight_hh_l0")
            remove(module, "weight_hh_l0")
        assert type(ours) is fused_rnn.LSTM
        assert isinstance(ours.weight_hh_l0, nn.Parameter)
        assert_same(ours, theirs, make_input("padded"))


@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_copies_of_a_compiled_module(cell):
    """They run their own weights, not the compiled call of the original."""
    module, x = make_module(cell, input_size=3, hidden_size=4), torch.randn(5, 2, 3)
    module.compile(backend="eager")
    expected = module(x)[0]
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x)[0], expected)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert not torch.equal(twin(x)[0], expected)
    assert torch.equal(module(x)[0], expected)


@every_variant
def test_deepcopy_of_a_used_parametrized_module(variant):
    _, ours = pair(variant, dtype=torch.float64)
    parametrize.register_parametrization(ours, "weight_hh_l0", Symmetric())
    expected = run(ours, make_input("padded"))
    found = run(copy.deepcopy(ours), make_input("padded"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], t) for k, t in expected.items())


@every_variant
def test_cached_parametrization_is_one_tensor(variant):
    theirs, ours = pair(variant, dtype=torch.float64)
    for module in (theirs, ours):
        parametrize.register_parametrization(module, "weight_hh_l0", Symmetric())
    with parametrize.cached():
        assert_same(ours, theirs, make_input("padded"))


def replica_of(module: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """What nn.DataParallel makes of a module for one device: parameters become plain tensors
    that are no leaves (torch.nn.parallel.replicate needs CUDA, so by hand)."""
    replica = module._replicate_for_data_parallel()
    replica._former_parameters = {}
    moved = {}
    for name, parameter in module._parameters.items():
        moved[name] = parameter * 1
        setattr(replica, name, moved[name])
        replica._former_parameters[name] = moved[name]
    return replica, moved


@every_variant
def test_data_parallel_replica(variant):
    theirs, ours = pair(variant, num_layers=2, bidirectional=True, dtype=torch.float64)
    results = []
    for module in (theirs, ours):
        replica, _ = replica_of(module)
        assert type(replica) is type(module)
        assert list(replica.parameters()) == []
        # A gradient through the replica arrives at the module's own parameters.
        x = copies(make_input("padded"))
        output, states = replica(x)
        output.square().sum().backward()
        results.append(
            {"output": output.detach(), **tensors("state", copies(states))}
            | {n: p.grad for n, p in module.named_parameters()}
        )
    assert_same_numbers(results[1], results[0])
    assert_same(ours, theirs, make_input("padded"))  # the module itself is as it was


def test_data_parallel_on_no_device_is_the_module():
    theirs, ours = pair("gru", dtype=torch.float64)
    assert_same(nn.DataParallel(ours), nn.DataParallel(theirs), make_input("padded"))


@every_variant
def test_tied_weights(variant):
    theirs, ours = pair(variant, num_layers=3, bidirectional=True, dtype=torch.float64)
    for module in (theirs, ours):
        module.weight_hh_l1 = module.weight_hh_l0
        module.weight_hh_l2_reverse = module.weight_hh_l0
        module.bias_hh_l0 = module.bias_ih_l0
    assert ours.weight_hh_l1 is ours.weight_hh_l0
    assert len(list(ours.parameters())) == len(list(theirs.parameters()))
    assert_same(ours, theirs, make_input("padded"), make_states(ours))


def test_one_parameter_in_two_roles_and_two_modules():
    results = []
    for namespace in (nn, fused_rnn):
        torch.manual_seed(0)
        first, second = namespace.GRU(H, H).double(), namespace.GRU(H, H).double()
        first.weight_hh_l0 = first.weight_ih_l0
        second.weight_ih_l0 = first.weight_ih_l0
        model = nn.Sequential(first, Output(), second)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(T, B, H, generator=generator, dtype=torch.float64, requires_grad=True)
        results.append(run(model, x))
    assert_same_numbers(results[1], results[0])


@every_variant
def test_frozen_parameters(variant):
    theirs, ours = pair(variant, num_layers=2, bidirectional=True, dtype=torch.float64)
    names = [n for n, _ in ours.named_parameters()]
    for frozen in (names[::2], names[1::2], names[:1], names):
        for module in (theirs, ours):
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(name not in frozen)
        x, hx = make_input("padded"), make_states(ours)
        assert_same(ours, theirs, x, hx)
        x = x.detach()
        assert_same(ours, theirs, x)
        grads = {k for k in run(ours, x) if k.startswith("grad")}
        assert grads == {f"grad of {n}" for n in names if n not in frozen}
    assert not ours(make_input("padded").detach())[0].requires_grad


def tuple_of(value) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def test_no_gradient_is_computed_for_what_asks_for_none(monkeypatch):
    """What the operator runs returns an empty tensor in place of each gradient nobody wants."""
    seen = []
    original = ops._backward

    def spy(*args):
        seen.append(original(*args))
        return seen[-1]

    monkeypatch.setattr(ops, "_backward", spy)
    ours = fused_rnn.LSTM(I, H, dtype=torch.float64).requires_grad_(False)
    ours.bias_hh_l0.requires_grad_()
    ours(torch.ones(T, B, I, dtype=torch.float64))[0].sum().backward()
    (grads,) = seen
    assert [g.numel() > 0 for g in grads] == [False] * 8 + [True]


@every_variant
def test_functional_call(variant):
    theirs, ours = pair(variant, num_layers=2, dtype=torch.float64)
    source = pair(variant, num_layers=2, dtype=torch.float64, seed=8)[0]
    other = {n: (p * 2).detach() for n, p in source.named_parameters()}
    x = make_input("padded").detach()
    results = []
    for module in (theirs, ours):
        weights = copies_of(other)
        output, states = torch.func.functional_call(module, weights, (x,))
        output.sum().backward()
        results.append(
            {"output": output.detach(), **tensors("state", copies(states))}
            | {n: w.grad for n, w in weights.items()}
        )
        assert all(p.grad is None for p in module.parameters())
    assert_same_numbers(results[1], results[0])
    assert_same(ours, theirs, x)  # the module's own weights are back

    def loss(weights):
        return torch.func.functional_call(ours, weights, (x,))[0].sum()

    grads = torch.func.grad(loss)(other)
    assert_same_numbers(grads, {n: results[0][n] for n in grads})


def copies_of(named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.clone().requires_grad_() for n, t in named.items()}


@every_variant
@pytest.mark.parametrize("form", ["sorted", "unsorted"])
def test_packed_sequence_comes_back_with_its_own_index_tensors(variant, form):
    _, ours = pair(variant, num_layers=2, bidirectional=True, dtype=torch.float64)
    x = make_input(form)
    output, _ = ours(x)
    assert type(output) is PackedSequence
    assert output.batch_sizes is x.batch_sizes
    assert output.sorted_indices is x.sorted_indices
    assert output.unsorted_indices is x.unsorted_indices


@every_variant
def test_packed_rows_are_as_each_sequence_alone(variant):
    _, ours = pair(variant, num_layers=2, bidirectional=True, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    sequences = [
        torch.randn(n, I, generator=generator, dtype=torch.float64) for n in (2, 7, 1, 7, 3)
    ]
    output, states = ours(pack_sequence(sequences, enforce_sorted=False))
    for i, rows in enumerate(nn.utils.rnn.unpack_sequence(output)):
        alone, alone_states = ours(sequences[i])
        packed = {"output": rows} | tensors("state", tuple(s[:, i] for s in tuple_of(states)))
        expected = {"output": alone} | tensors("state", tuple_of(alone_states))
        assert_same_numbers(packed, expected)


@every_variant
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("form", ["padded", "unbatched"])
def test_layout_of_results(variant, batch_first, bidirectional, form):
    """With batch_first the output is a transposed view, as torch.nn's is."""
    theirs, ours = pair(variant, num_layers=2, batch_first=batch_first, bidirectional=bidirectional)
    x = make_input(form, batch_first, torch.float32)
    for training in (True, False):
        with torch.set_grad_enabled(training):
            found, expected = tensors("result", ours(x)), tensors("result", theirs(x))
        for name, tensor in found.items():
            assert tensor.stride() == expected[name].stride(), name


@every_variant
def test_names_of_our_options_are_free_for_subclasses(variant):
    """As they are in torch.nn: only given to the constructor they mean something to ours."""
    name, extra = VARIANTS[variant]
    results = []
    for namespace in (nn, fused_rnn):

        class Normed(getattr(namespace, name)):
            def __init__(self, *args, **options):
                super().__init__(*args, **options)
                self.layer_norm = nn.LayerNorm(self.proj_size or self.hidden_size)

            def forward(self, input, hx=None):
                output, states = super().forward(input, hx)
                return self.layer_norm(output), states

        torch.manual_seed(0)
        module = Normed(I, H, **extra, dtype=torch.float64)
        module.layer_norm.double()
        results.append(run(module, make_input("padded")))
    assert_same_numbers(results[1], results[0])


@every_variant
def test_attributes_from_before_replace_stay(variant):
    theirs, ours = pair(variant)[0], pair(variant)[0]
    for module in (theirs, ours):
        module.zoneout, module.init = 0.5, "mine"
        module.peepholes = nn.Parameter(torch.ones(2))
    fused_rnn.replace(ours)
    assert (ours.zoneout, ours.init) == (0.5, "mine")
    assert torch.equal(ours.peepholes, torch.ones(2))
    ours.zoneout, ours.init = theirs.zoneout, theirs.init = 0.25, "mine too"
    assert (ours.zoneout, ours.init) == (0.25, "mine too")
    x = make_input("padded", dtype=torch.float32)
    del theirs.peepholes, ours.peepholes
    assert_same(ours, theirs, x)
    assert repr(fused_rnn.restore(ours)) == repr(theirs)


@every_variant
def test_inside_sequential_with_hooks(variant):
    """Hooks run in torch.nn's order, on values of the same kind, and may change them."""
    records = []
    for namespace in (nn, fused_rnn):
        name, extra = VARIANTS[variant]
        torch.manual_seed(0)
        recurrent = getattr(namespace, name)(I, H, dtype=torch.float64, **extra)
        linear = nn.Linear(recurrent.proj_size or H, 2, dtype=torch.float64)
        model = nn.Sequential(recurrent, Output(), linear)
        seen = []

        def note(kind, seen=seen, change=None):
            def hook(module, *values):
                shapes = [list(t.shape) for t in flat(values)]
                seen.append((kind, type(module).__name__, shapes))
                return change(*values) if change else None

            return hook

        recurrent.register_forward_pre_hook(note("before", change=lambda args: (args[0] * 2,)))
        recurrent.register_forward_hook(note("after", change=lambda a, r: (r[0] + 1, r[1])))
        recurrent.register_full_backward_pre_hook(note("backward before"))
        recurrent.register_full_backward_hook(
            note("backward after", change=lambda gi, go: (gi[0] * 3,))
        )
        recurrent.weight_hh_l0.register_hook(lambda g: g * 5)
        records.append((run(model, make_input("padded")), seen))
    (theirs, theirs_seen), (ours, ours_seen) = records
    assert ours_seen == theirs_seen and len(ours_seen) == 4
    assert_same_numbers(ours, theirs)


@every_variant
@pytest.mark.parametrize("cache", [False, True], ids=["uncached", "cached"])
def test_autocast_follows_the_rule_of_linear(variant, cache):
    """Every cell computes in autocast's dtype, as nn.Linear does, and float32 weights get
    float32 gradients."""
    _, ours = pair(variant, num_layers=2, bidirectional=True)
    half = copy.deepcopy(ours).bfloat16()
    exact = doubled(half)
    x, hx = make_input("padded", dtype=torch.float32), make_states(ours, dtype=torch.float32)

    def under_autocast(*args):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
            return ours(*args)

    def reference(*args):
        return half(*to(args, torch.bfloat16))

    for args in ((x,), (x, hx)):
        found = tensors("result", under_autocast(*args))
        expected = tensors("result", reference(*args))
        truth = tensors("result", exact(*to(to(args, torch.bfloat16), torch.float64)))
        assert_accurate(found, truth, expected, torch.bfloat16)
        found["result[0]"].float().sum().backward()
        assert {p.grad.dtype for p in ours.parameters()} == {torch.float32}
        expected["result[0]"].float().sum().backward()
        for (name, p), q in zip(ours.named_parameters(), half.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad.float()), name
        ours.zero_grad(), half.zero_grad()
    linear = nn.Linear(I, H)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        module, layer = copy.deepcopy(ours).to(dtype), copy.deepcopy(linear).to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            output, _ = module(x.to(dtype))
            assert output.dtype == layer(x.to(dtype)).dtype
            with torch.autocast("cpu", enabled=False):
                assert module(x.to(dtype))[0].dtype == dtype
    with torch.autocast("cpu", torch.float16):
        assert ours(x)[0].dtype == torch.float16
        mixed = ours(x.bfloat16(), to(hx, torch.float16))[0]
        assert mixed.dtype == torch.float16


SPECIAL = {"nan": float("nan"), "inf": float("inf"), "-inf": -float("inf"), "huge": 1e9}


@every_variant
@pytest.mark.parametrize("value", SPECIAL)
@pytest.mark.parametrize("where", ["input", "hx", "weight_ih_l0", "weight_hh_l0", "bias_hh_l1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_not_a_number_and_infinity_spread_as_in_torch(variant, value, where, dtype):
    theirs, ours = pair(variant, num_layers=2, bidirectional=True, dtype=dtype)
    x, hx = make_input("padded", dtype=dtype).detach(), make_states(ours, dtype=dtype)
    hx = tuple(s.detach() for s in tuple_of(hx))
    if where == "input":
        x[1, 1, 0] = SPECIAL[value]
    elif where == "hx":
        for state in hx:
            # One in a row: two would often meet as inf - inf.
            state[:, range(B), range(B) if state.shape[-1] >= B else 0] = SPECIAL[value]
    else:
        for module in (theirs, ours):
            module.get_parameter(where).data.view(-1)[1] = SPECIAL[value]
    x.requires_grad_()
    hx = tuple(s.requires_grad_() for s in hx)
    assert_same(ours, theirs, x, hx if len(hx) == 2 else hx[0])


@every_variant
@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_that_are_no_numbers_spread_as_in_torch(variant, value, dtype):
    """A unit that relu has switched off stops them, for one."""
    results = []
    for module in pair(variant, num_layers=2, dtype=dtype):
        x = make_input("padded", dtype=dtype)
        output, _ = module(x)
        gradient = torch.ones_like(output)
        gradient[3, 1, :2] = SPECIAL[value]
        gradient[2, 0, 1] = SPECIAL[value]
        output.backward(gradient)
        results.append({"x": x.grad} | {n: p.grad for n, p in module.named_parameters()})
    assert_same_numbers(results[1], results[0])


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "rnn_relu"])
def test_extreme_but_finite_float32(variant):
    """Saturated gates are exact zeros and ones, with zero gradients and no NaN."""
    theirs, ours = pair(variant, num_layers=2)
    x = (make_input("padded", dtype=torch.float32).detach() * 1e4).requires_grad_()
    found, expected = run(ours, x), run(theirs, x)
    truth = run(doubled(theirs), to(x, torch.float64))
    assert all(torch.isfinite(t).all() for t in found.values())
    assert_accurate(found, truth, expected, torch.float32)


@every_variant
def test_weights_changed_between_calls_are_seen(variant):
    theirs, ours = pair(variant, num_layers=2, dtype=torch.float64)
    x = make_input("padded")
    for change in (
        lambda m: nn.init.constant_(m.weight_ih_l0, 0.1),
        lambda m: setattr(m, "weight_hh_l1", nn.Parameter(m.weight_hh_l1.detach() * 2)),
        lambda m: m.bias_ih_l0.data.fill_(0.3),
        lambda m: setattr(m.bias_hh_l0, "data", m.bias_hh_l0.data * 2),
        lambda m: m._parameters.__setitem__("bias_ih_l1", nn.Parameter(m.bias_ih_l1.detach() + 1)),
        lambda m: m.apply(
            lambda s: [nn.init.constant_(p, 0.05) for p in s.parameters(recurse=False)]
        ),
    ):
        before = run(ours, x)["result[0]"]
        for module in (theirs, ours):
            change(module)
        assert not torch.equal(run(ours, x)["result[0]"], before)
        assert_same(ours, theirs, x)


@every_variant
def test_modifying_results_in_place(variant):
    """What a caller writes into outputs or arguments is noticed by autograd, not computed with."""
    results = []
    for module in pair(variant, num_layers=2, dtype=torch.float64):
        x = make_input("padded")
        output, states = module(x)
        tuple_of(states)[0].mul_(2)
        (output.sum() + tuple_of(states)[0].sum()).backward()
        results.append({"grad": x.grad})
    assert_same_numbers(results[1], results[0])
    _, ours = pair(variant, dtype=torch.float64)
    x = make_input("padded") * 1
    output, _ = ours(x)
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
    x = make_input("padded")
    output, _ = ours(x)
    with torch.no_grad():
        ours.weight_hh_l0.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@every_variant
def test_argument_tensors_stay_as_they_were(variant):
    for dtype in (torch.float32, torch.float64):
        _, ours = pair(variant, num_layers=2, bidirectional=True, dtype=dtype)
        x, hx = make_input("unsorted", dtype=dtype), make_states(ours, dtype=dtype)
        given = {**tensors("x", x), **tensors("hx", hx), **dict(ours.named_parameters())}
        before = {k: t.detach().clone() for k, t in given.items()}
        output, _ = ours(x, hx)
        output.data.sum().backward()
        for name, tensor in given.items():
            assert torch.equal(tensor, before[name]), name


@every_variant
def test_state_carried_over_chunks(variant):
    """A sequence in pieces, with the state passed on, is the sequence: values and gradients."""
    _, ours = pair(variant, num_layers=2, dtype=torch.float64)
    whole, pieces = make_input("padded"), make_input("padded")
    output, states = ours(whole)
    (output.square().sum() + sum(s.sum() for s in tuple_of(states))).backward()
    expected = {"output": output.detach(), "grad": whole.grad}
    expected |= {n: p.grad.clone() for n, p in ours.named_parameters()}
    ours.zero_grad()
    outputs, hx = [], None
    for chunk in pieces.split([2, 1, 2]):
        part, hx = ours(chunk, hx)
        outputs.append(part)
    output = torch.cat(outputs)
    (output.square().sum() + sum(s.sum() for s in tuple_of(hx))).backward()
    found = {"output": output.detach(), "grad": pieces.grad}
    found |= {n: p.grad for n, p in ours.named_parameters()}
    assert_same_numbers(found, expected)


@every_variant
def test_shared_memory_and_inference_mode(variant):
    theirs, ours = pair(variant, num_layers=2, dtype=torch.float64)
    ours.share_memory()
    assert all(p.is_shared() for p in ours.parameters())
    x = make_input("padded").detach()
    expected = tensors("result", theirs(x))
    with torch.inference_mode():
        found = tensors("result", ours(x))
    assert all(t.is_inference() for t in found.values())
    found = {k: t.clone() for k, t in found.items()}
    assert_same_numbers(found, {k: t.detach() for k, t in expected.items()})

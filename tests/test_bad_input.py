"""Bad input: an error of torch's own class whose message names what was wrong, and never a crash.

Each case is run on torch.nn too. Where torch.nn raises on purpose, ours has the same class.
Where it stumbles (an AttributeError, say) or computes something all the same, ours raises
TypeError for what is not a tensor and RuntimeError for what does not fit, and the case says so
in `instead`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from helpers.modules import seeded_pair
from helpers.named_outcomes import assert_same, copies
from torch import Tensor, nn, zeros
from torch.nn.utils.rnn import PackedSequence

import fused_rnn
from fused_rnn import functional
from fused_rnn.testing import assert_same_numbers

I, H = 4, 6  # noqa: E741
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}

every_class = pytest.mark.parametrize("name", GATES)

# Both may complain that LSTM falls back, or that a tensor type is a prototype.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@dataclass(frozen=True)
class Bad:
    """A call that must fail, on a module of a class name."""

    id: str
    call: Callable[[str, nn.Module], object]
    words: tuple[str, ...]  # in our message
    instead: type[Exception] | None = None  # our class, where torch.nn's is not one to copy
    only: tuple[str, ...] = tuple(GATES)  # classes of module
    instead_only: tuple[str, ...] = tuple(GATES)  # classes of module that `instead` is for


def raised(function: Callable[[], object]) -> Exception | None:
    try:
        function()
    except Exception as error:
        return error
    return None


def check(bad: Bad, name: str, theirs: nn.Module, ours: nn.Module) -> None:
    error = raised(lambda: bad.call(name, ours))
    assert error is not None, "nothing was raised"
    if bad.instead is not None and name in bad.instead_only:
        assert type(error) is bad.instead, f"{type(error).__name__}: {error}"
    else:
        expected = raised(lambda: bad.call(name, theirs))
        assert type(error) is type(expected), (
            f"got {type(error).__name__}: {error}; "
            f"torch.nn has {type(expected).__name__}: {expected}"
        )
    missing = [word for word in bad.words if word not in str(error)]
    assert not missing, f"no {missing} in: {error}"


def both(name: str, suffix: str = "", **options) -> tuple[nn.Module, nn.Module]:
    return seeded_pair(name + suffix, I, H, **options)


def cases(table: list[Bad]):
    return pytest.mark.parametrize(
        ("bad", "name"),
        [pytest.param(bad, name, id=f"{bad.id}-{name}") for bad in table for name in bad.only],
    )


def states(name: str, *shape: int, **options):
    """Zero states of a shape: one tensor, or two for an LSTM."""
    state = zeros(shape, **options)
    return (state, state.clone()) if name == "LSTM" else state


x = zeros(5, 3, I)
one = ("RNN", "GRU")
two = ("LSTM",)
batched = PackedSequence(zeros(5, I), torch.tensor([3, 2]))
permuted = PackedSequence(
    zeros(5, I), torch.tensor([3, 2]), torch.tensor([2, 0, 1]), torch.tensor([1, 2, 0])
)
ragged = torch.nested.nested_tensor([zeros(2, I), zeros(3, I)])
jagged = torch.nested.nested_tensor([zeros(2, I), zeros(3, I)], layout=torch.jagged)


def packed(rows: int, sizes, width: int = I, **options) -> PackedSequence:
    return PackedSequence(zeros(rows, width, **options), torch.tensor(sizes))


LAYER_INPUT = [
    # rank and size
    Bad("0-D", lambda n, m: m(zeros(())), ("2D or 3D", "0D")),
    Bad("1-D", lambda n, m: m(zeros(I)), ("2D or 3D", "1D")),
    Bad("4-D", lambda n, m: m(zeros(2, 2, 2, I)), ("2D or 3D", "4D")),
    Bad("features", lambda n, m: m(zeros(5, 3, I + 1)), ("input", "4", "5")),
    Bad("no_features", lambda n, m: m(zeros(5, 3, 0)), ("input", "4", "0")),
    Bad("features_unbatched", lambda n, m: m(zeros(5, I + 1)), ("input", "4", "5")),
    Bad("no_time", lambda n, m: m(zeros(0, 3, I)), ("sequence length", "larger than 0")),
    Bad("no_time_unbatched", lambda n, m: m(zeros(0, I)), ("sequence length", "larger than 0")),
    Bad("no_time_no_batch", lambda n, m: m(zeros(0, 0, I)), ("sequence length", "larger than 0")),
    # type
    Bad("None", lambda n, m: m(None), ("input", "Tensor", "NoneType"), TypeError),
    Bad("string", lambda n, m: m("abc"), ("input", "Tensor", "str"), TypeError),
    Bad("list", lambda n, m: m([[1.0]]), ("input", "Tensor", "list"), TypeError),
    Bad("tuple", lambda n, m: m((x,)), ("input", "Tensor", "tuple"), TypeError),
    Bad("number", lambda n, m: m(1.0), ("input", "Tensor", "float"), TypeError),
    Bad("array", lambda n, m: m(x.numpy()), ("input", "Tensor", "ndarray"), TypeError),
    Bad("missing", lambda n, m: m(), ("input",)),
    Bad("unknown_keyword", lambda n, m: m(x, hidden=None), ("hidden",)),
    # dtype and device
    Bad("float64", lambda n, m: m(x.double()), ("input", "torch.float64", "torch.float32")),
    Bad("integer", lambda n, m: m(x.long()), ("input", "torch.int64", "torch.float32")),
    Bad("bool", lambda n, m: m(x.bool()), ("input", "torch.bool", "torch.float32")),
    Bad("complex", lambda n, m: m(x + 0j), ("input", "torch.complex64", "torch.float32")),
    Bad("half", lambda n, m: m(x.half()), ("input", "torch.float16", "torch.float32")),
    Bad("float64_unbatched", lambda n, m: m(zeros(5, I).double()), ("input", "torch.float64")),
    Bad("other_device", lambda n, m: m(x.to("meta")), ("nput", "meta", "cpu")),
    Bad(
        "quantized",
        lambda n, m: m(torch.quantize_per_tensor(x, 0.1, 0, torch.quint8)),
        ("input", "torch.quint8", "torch.float32"),
        ValueError,
    ),
    # layout
    Bad("sparse", lambda n, m: m(x.to_sparse()), ("input", "dense", "sparse_coo")),
    Bad("sparse_csr", lambda n, m: m(zeros(5, I).to_sparse_csr()), ("input", "dense", "csr")),
    Bad("nested", lambda n, m: m(ragged), ("input", "dense", "nested")),
    Bad("jagged", lambda n, m: m(jagged), ("input", "dense", "nested")),
    Bad("mkldnn", lambda n, m: m(x.to_mkldnn()), ("input", "dense", "mkldnn"), RuntimeError),
]

LAYER_STATES = [
    Bad("layers", lambda n, m: m(x, states(n, 2, 3, H)), ("hidden", "(1, 3, 6)", "[2, 3, 6]")),
    Bad("batch", lambda n, m: m(x, states(n, 1, 2, H)), ("hidden", "(1, 3, 6)", "[1, 2, 6]")),
    Bad("broadcast", lambda n, m: m(x, states(n, 1, 1, H)), ("hidden", "(1, 3, 6)", "[1, 1, 6]")),
    Bad("size", lambda n, m: m(x, states(n, 1, 3, 7)), ("hidden", "(1, 3, 6)", "[1, 3, 7]")),
    Bad("2-D", lambda n, m: m(x, states(n, 1, H)), ("hx", "3-D", "2-D")),
    Bad("4-D", lambda n, m: m(x, states(n, 1, 1, 3, H)), ("hx", "3-D", "4-D")),
    Bad("3-D_unbatched", lambda n, m: m(zeros(5, I), states(n, 1, 1, H)), ("hx", "2-D", "3-D")),
    Bad("layers_unbatched", lambda n, m: m(zeros(5, I), states(n, 2, H)), ("hidden", "[2, 1, 6]")),
    Bad("second_size", lambda n, m: m(x, (zeros(1, 3, H), zeros(1, 3, 5))),
        ("hidden[1]", "(1, 3, 6)", "[1, 3, 5]"), only=two),
    Bad("second_batch", lambda n, m: m(x, (zeros(1, 3, H), zeros(1, 2, H))),
        ("hidden[1]", "(1, 3, 6)", "[1, 2, 6]"), only=two),
    Bad("second_rank", lambda n, m: m(x, (zeros(1, 3, H), zeros(1, H))), ("hx", "2-D"), only=two),
    Bad("string", lambda n, m: m(x, "zeros"), ("hx", "Tensor", "str"), TypeError),
    Bad("number", lambda n, m: m(x, 0), ("hx", "Tensor", "int"), TypeError),
    Bad("list", lambda n, m: m(x, [zeros(1, 3, H)] * 2), ("hx", "list"), TypeError, only=one),
    Bad("pair", lambda n, m: m(x, (zeros(1, 3, H),) * 2), ("hx", "tuple"), TypeError, only=one),
    Bad("tensor", lambda n, m: m(x, zeros(2, 1, 3, H)), ("hx", "tuple", "Tensor"), only=two),
    Bad("single", lambda n, m: m(x, zeros(1, 3, H)), ("hx", "tuple"), TypeError, only=two),
    Bad("pair_of_None", lambda n, m: m(x, (None, None)), ("hx",), TypeError),
    Bad("pair_of_lists", lambda n, m: m(x, ([1.0], [1.0])), ("hx", "list"), TypeError, only=two),
    # torch.nn: "lstm expects two hidden states", a RuntimeError, for three; IndexError for one
    Bad("three", lambda n, m: m(x, (zeros(1, 3, H),) * 3), ("hx", "3"), only=two),
    Bad("one", lambda n, m: m(x, (zeros(1, 3, H),)), ("hx", "1"), RuntimeError, only=two),
    Bad("dtype", lambda n, m: m(x, states(n, 1, 3, H, dtype=torch.float64)),
        ("hx", "torch.float32", "torch.float64")),
    Bad("integer", lambda n, m: m(x, states(n, 1, 3, H, dtype=torch.int64)),
        ("hx", "torch.float32", "torch.int64")),
    Bad("device", lambda n, m: m(x, states(n, 1, 3, H, device="meta")), ("hx", "cpu", "meta")),
    Bad("sparse", lambda n, m: m(x, states(n, 1, 3, H).to_sparse()),
        ("hx", "dense", "sparse"), RuntimeError, only=one),
    Bad("sparse_pair", lambda n, m: m(x, tuple(s.to_sparse() for s in states(n, 1, 3, H))),
        ("hx[0]", "dense", "sparse"), only=two),
    Bad("nested", lambda n, m: m(x, torch.nested.nested_tensor([zeros(3, H)])),
        ("hx", "dense", "nested"), only=one),
]  # fmt: skip

LAYER_PACKED = [
    Bad("features", lambda n, m: m(packed(5, [3, 2], I + 1)), ("input", "4", "5")),
    Bad("3-D", lambda n, m: m(PackedSequence(zeros(5, 1, I), torch.tensor([3, 2]))),
        ("input", "2", "3")),
    Bad("1-D", lambda n, m: m(PackedSequence(zeros(5), torch.tensor([3, 2]))),
        ("input", "2", "1")),
    # LSTM checks its packed input only when it is given hx, and fails in a multiplication.
    Bad("float64", lambda n, m: m(packed(5, [3, 2], dtype=torch.float64)),
        ("input", "torch.float64"), ValueError, instead_only=two),
    Bad("integer", lambda n, m: m(packed(5, [3, 2], dtype=torch.int64)),
        ("input", "torch.int64"), ValueError, instead_only=two),
    Bad("growing", lambda n, m: m(packed(5, [2, 3])), ("batch_sizes", "non-increasing", "[2, 3]")),
    Bad("growing_again", lambda n, m: m(packed(7, [3, 1, 3])), ("batch_sizes", "[3, 1, 3]")),
    Bad("zero_first", lambda n, m: m(packed(3, [0, 3])), ("batch_sizes", "positive", "0")),
    Bad("negative", lambda n, m: m(packed(3, [4, -1])), ("batch_sizes", "positive", "[4, -1]")),
    Bad("negative_first", lambda n, m: m(packed(3, [-1, 4])), ("batch_sizes", "positive", "-1")),
    Bad("sum_too_large", lambda n, m: m(packed(5, [4, 4])), ("batch_sizes", "5 rows", "8")),
    # torch.nn computes something in these
    Bad("zero", lambda n, m: m(packed(3, [3, 0])), ("batch_sizes", "[3, 0]"), RuntimeError),
    Bad("all_zero", lambda n, m: m(packed(0, [0])), ("batch_sizes", "0"), RuntimeError),
    Bad("sum_too_small", lambda n, m: m(packed(5, [2, 1])),
        ("batch_sizes", "5 rows", "3"), RuntimeError),
    # of a batch that no memory would hold zero states for, nor a sum of 64 bits
    Bad("huge", lambda n, m: m(packed(5, [2**62] * 4 + [5])),
        ("batch_sizes", "5 rows", str(2**62)), RuntimeError),
    # torch.nn stumbles over these
    Bad("no_time", lambda n, m: m(PackedSequence(zeros(0, I), zeros(0, dtype=torch.int64))),
        ("batch_sizes", "larger than 0"), RuntimeError),
    Bad("float_sizes", lambda n, m: m(packed(5, [3.0, 2.0])),
        ("batch_sizes", "int64", "float32"), RuntimeError),
    Bad("2-D_sizes", lambda n, m: m(packed(5, [[3, 2]])),
        ("batch_sizes", "1-D", "2-D"), RuntimeError),
    Bad("0-D_sizes", lambda n, m: m(packed(5, 5)), ("batch_sizes", "1-D", "0-D"), RuntimeError),
    Bad("int32_sizes",
        lambda n, m: m(PackedSequence(zeros(5, I), torch.tensor([3, 2], dtype=torch.int32))),
        ("batch_sizes", "int64", "int32")),
    # states that do not fit the packed batch
    Bad("hx_batch", lambda n, m: m(batched, states(n, 1, 2, H)), ("hidden", "(1, 3, 6)", "2")),
    Bad("hx_rank", lambda n, m: m(batched, states(n, 3, H)),
        ("hx", "3-D", "2-D"), RuntimeError, instead_only=two),
    Bad("hx_batch_permuted", lambda n, m: m(permuted, states(n, 1, 2, H)), ("hx", "3", "2")),
    Bad("hx_too_large_permuted", lambda n, m: m(permuted, states(n, 1, 5, H)),
        ("hx", "3", "5"), RuntimeError),
    Bad("hx_string", lambda n, m: m(batched, "zeros"), ("hx", "str"), TypeError),
    Bad("hx_pair_of_None", lambda n, m: m(batched, (None, None)), ("hx",), TypeError),
    # indices of a PackedSequence made by hand
    Bad("index_out_of_range",
        lambda n, m: m(batched._replace(sorted_indices=torch.tensor([7, 0, 1])),
                       states(n, 1, 3, H)), ("7", "3")),
    Bad("inverse_out_of_range",
        lambda n, m: m(batched._replace(unsorted_indices=torch.tensor([1, 2, 9]))), ("9", "3")),
    Bad("index_negative",
        lambda n, m: m(batched._replace(sorted_indices=torch.tensor([-1, 0, 1])),
                       states(n, 1, 3, H)), ("-1", "3")),
    Bad("index_float",
        lambda n, m: m(batched._replace(sorted_indices=torch.tensor([2.0, 0.0, 1.0])),
                       states(n, 1, 3, H)), ("index", "int64")),
    Bad("index_too_short",
        lambda n, m: m(batched._replace(sorted_indices=torch.tensor([1, 0])),
                       states(n, 1, 3, H)), ("hx", "2", "3")),
]  # fmt: skip


@cases(LAYER_INPUT)
def test_layer_input(bad, name):
    check(bad, name, *both(name))


@cases(LAYER_STATES)
def test_layer_states(bad, name):
    check(bad, name, *both(name))


@cases(LAYER_PACKED)
def test_layer_packed_input(bad, name):
    check(bad, name, *both(name))


@every_class
def test_layer_errors_in_deeper_forms(name):
    """The sizes in a message are those of the whole stack."""
    options = dict(num_layers=2, bidirectional=True, batch_first=True)
    theirs, ours = both(name, **options)
    bad = Bad("", lambda n, m: m(zeros(3, 5, I), states(n, 1, 3, H)), ("(4, 3, 6)", "[1, 3, 6]"))
    check(bad, name, theirs, ours)
    # hx is [layers, batch, ...] even with batch_first
    bad = Bad("", lambda n, m: m(zeros(3, 5, I), states(n, 3, 4, H)), ("(4, 3, 6)", "[3, 4, 6]"))
    check(bad, name, theirs, ours)


@every_class
@pytest.mark.parametrize("form", ["padded", "packed", "permuted"])
@pytest.mark.parametrize("shape", [(3, 3, H), (1, 3, H), (0, 3, H), ()], ids=str)
def test_states_of_other_layers(name, form, shape):
    """Those of a deeper stack, too, which has states enough."""
    sequence = {"padded": x, "packed": batched, "permuted": permuted}[form]
    # torch.nn stumbles over a number's missing dimensions.
    for module in both(name, num_layers=2)[0 if shape else 1 :]:
        for is_enabled in (True, False):
            with torch.set_grad_enabled(is_enabled), pytest.raises(RuntimeError, match=r"h[xi]"):
                module(sequence, states(name, *shape))


@every_class
def test_states_of_other_layers_with_lengths(name):
    _, ours = both(name, num_layers=2)
    with pytest.raises(RuntimeError, match=r"hidden.* size \(2, 3, 6\), got \[3, 3, 6\]"):
        ours(x, states(name, 3, 3, H), lengths=torch.tensor([5, 2, 1]))


def test_projected_states():
    theirs, ours = both("LSTM", proj_size=2)
    for h, c in ((H, H), (2, 2), (H, 2)):
        bad = Bad("", lambda n, m, h=h, c=c: m(x, (zeros(1, 3, h), zeros(1, 3, c))), ("hidden[",))
        check(bad, "LSTM", theirs, ours)


def with_weight(weight: str, make: Callable[[int], Tensor]):
    """A call after a parameter was replaced by `make(rows)`."""

    def call(name: str, module: nn.Module):
        value = make(GATES[name] * H)
        setattr(module, weight, nn.Parameter(value) if isinstance(value, Tensor) else value)
        if not isinstance(value, (Tensor, type(None))):
            raise AssertionError("torch.nn.Module should have refused the value")
        return module(zeros(5, 3, I))

    return call


# torch's LSTM takes some of these to oneDNN, which reads what it finds: memory that is not there.
WEIGHTS = [
    Bad("weight_hh_columns", with_weight("weight_hh_l0", lambda r: zeros(r, 5)),
        ("expected", str(H), "5"), RuntimeError),
    Bad("weight_hh_rows", with_weight("weight_hh_l0", lambda r: zeros(r + 1, H)),
        ("expected", "got"), RuntimeError),
    Bad("weight_ih_columns", with_weight("weight_ih_l0", lambda r: zeros(r, 5)),
        ("xpected", "5", "4"), RuntimeError),
    Bad("weight_ih_rows", with_weight("weight_ih_l0", lambda r: zeros(r + 1, I)),
        ("expected", "got"), RuntimeError),
    Bad("weight_ih_1-D", with_weight("weight_ih_l0", zeros), ("2 dim", "1"), RuntimeError),
    Bad("weight_hh_1-D", with_weight("weight_hh_l0", zeros), ("expected", "got"), RuntimeError),
    Bad("weight_hh_3-D", with_weight("weight_hh_l0", lambda r: zeros(r, H, 1)),
        ("expected", "got"), RuntimeError),
    Bad("weight_hh_no_rows", with_weight("weight_hh_l0", lambda r: zeros(0, H)),
        ("expected", "got"), RuntimeError),
    Bad("weight_hh_dtype", with_weight("weight_hh_l0", lambda r: zeros(r, H).double()),
        ("torch.float32", "torch.float64"), RuntimeError),
    Bad("weight_ih_dtype", with_weight("weight_ih_l0", lambda r: zeros(r, I).double()),
        ("torch.float32", "torch.float64")),
    Bad("weight_hh_device", with_weight("weight_hh_l0", lambda r: zeros(r, H, device="meta")),
        ("cpu", "meta"), RuntimeError),
    Bad("weight_bias_size", with_weight("bias_ih_l0", lambda r: zeros(r + 1)),
        ("expected", "got"), RuntimeError),
    # torch.nn broadcasts it
    Bad("weight_bias_of_one", with_weight("bias_ih_l0", lambda r: zeros(1)),
        ("expected", "[1]"), RuntimeError),
    Bad("weight_bias_2-D", with_weight("bias_hh_l0", lambda r: zeros(r, 1)),
        ("expected", "got"), RuntimeError),
    Bad("weight_bias_dtype", with_weight("bias_hh_l0", lambda r: zeros(r).double()),
        ("torch.float32", "torch.float64"), RuntimeError),
    Bad("weight_sparse", with_weight("weight_hh_l0", lambda r: zeros(r, H).to_sparse()),
        ("dense", "sparse"), RuntimeError),
    Bad("weight_None", with_weight("weight_hh_l0", lambda r: None), ("Tensor", "NoneType")),
    Bad("weight_bias_None", with_weight("bias_hh_l0", lambda r: None), ("Tensor", "NoneType")),
    Bad("weight_string", lambda n, m: setattr(m, "weight_hh_l0", "w"), ("weight_hh_l0", "str")),
]  # fmt: skip


@cases(WEIGHTS)
def test_replaced_weights(bad, name):
    check(bad, name, *both(name))


@every_class
def test_deleted_weight(name):
    _, ours = both(name)
    del ours.weight_hh_l0
    with pytest.raises(AttributeError, match="weight_hh_l0"):
        ours(x)


CONSTRUCTION = {
    "input_size negative": ((-1, H), {}, "input_size must be greater than zero"),
    "input_size zero": ((0, H), {}, "input_size must be greater than zero"),
    "input_size string": (("4", H), {}, "input_size should be of type int, got: str"),
    "input_size None": ((None, H), {}, "input_size should be of type int, got: NoneType"),
    "input_size float": ((4.0, H), {}, "input_size should be of type int, got: float"),
    "input_size tensor": ((torch.tensor(4), H), {}, "input_size should be of type int"),
    "hidden_size negative": ((I, -6), {}, "hidden_size must be greater than zero"),
    "hidden_size zero": ((I, 0), {}, "hidden_size must be greater than zero"),
    "hidden_size string": ((I, "6"), {}, "hidden_size should be of type int, got: str"),
    "hidden_size None": ((I, None), {}, "hidden_size should be of type int, got: NoneType"),
    "num_layers negative": ((I, H, -1), {}, "num_layers must be greater than zero"),
    "num_layers zero": ((I, H, 0), {}, "num_layers must be greater than zero"),
    "num_layers string": ((I, H, "1"), {}, "str"),
    "num_layers None": ((I, H, None), {}, "NoneType"),
    "num_layers float": ((I, H, 1.5), {}, "float"),
    "dropout negative": ((I, H, 2), dict(dropout=-0.1), r"dropout .* range \[0, 1\]"),
    "dropout above one": ((I, H, 2), dict(dropout=1.1), r"dropout .* range \[0, 1\]"),
    "dropout nan": ((I, H, 2), dict(dropout=float("nan")), r"dropout .* range \[0, 1\]"),
    "dropout bool": ((I, H, 2), dict(dropout=True), r"dropout .* range \[0, 1\]"),
    "dropout text of a number": ((I, H, 2), dict(dropout="0.5"), r"dropout .* range \[0, 1\]"),
    "dropout string": ((I, H, 2), dict(dropout="half"), "half"),
    "dropout None": ((I, H, 2), dict(dropout=None), "NoneType"),
    "bias None": ((I, H), dict(bias=None), "bias should be of type bool, got: NoneType"),
    "bias string": ((I, H), dict(bias="yes"), "bias should be of type bool, got: str"),
    "bias int": ((I, H), dict(bias=1), "bias should be of type bool, got: int"),
    "batch_first None": ((I, H), dict(batch_first=None), "batch_first should be of type bool"),
    "dtype integer": ((I, H), dict(dtype=torch.int64), "floating point"),
    "dtype string": ((I, H), dict(dtype="float32"), "dtype"),
    "device unknown": ((I, H), dict(device="nowhere"), "nowhere"),
    "nothing": ((), {}, "input_size"),
    "hidden_size missing": ((I,), {}, "hidden_size"),
    "input_size twice": ((I, H), dict(input_size=3), "input_size"),
    "unknown keyword": ((I, H), dict(banana=1), "banana"),
    "unknown keyword mode": ((I, H), dict(mode="GRU"), "mode"),
    "proj_size equal": ((I, H), dict(proj_size=H), "proj_size"),
    "proj_size greater": ((I, H), dict(proj_size=H + 1), "proj_size"),
    "proj_size negative": ((I, H), dict(proj_size=-1), "proj_size"),
    "nonlinearity unknown": ((I, H), dict(nonlinearity="sigmoid"), "nonlinearity"),
    "nonlinearity None": ((I, H), dict(nonlinearity=None), "nonlinearity"),
    "nonlinearity list": ((I, H), dict(nonlinearity=["tanh"]), "nonlinearity"),
}


@every_class
@pytest.mark.parametrize("kind", CONSTRUCTION)
def test_construction(kind, name):
    args, options, pattern = CONSTRUCTION[kind]
    expected = raised(lambda: getattr(nn, name)(*args, **options))
    if torch.__version__ < "2.11" and not re.search(pattern, str(expected)):
        pytest.skip("torch.nn has that check since 2.11, and ours ask it")
    assert expected is not None
    with pytest.raises(type(expected), match=pattern) as found:
        getattr(fused_rnn, name)(*args, **options)
    assert found.type is type(expected)


@every_class
@pytest.mark.parametrize("value", ["False", 1, None, 0.5, [True], torch.tensor(True)], ids=repr)
def test_directions_are_a_flag(value, name):
    """torch.nn's layers say so when they are called."""
    layer = getattr(nn, name)(I, H, bidirectional=value)
    with pytest.raises(TypeError):
        layer(torch.randn(5, 3, I))
    with pytest.raises(TypeError, match="bidirectional: expected a bool, got"):
        getattr(fused_rnn, name)(I, H, bidirectional=value)
    layer = getattr(fused_rnn, name)(I, H, bidirectional=np.bool_(True))
    assert layer(torch.randn(5, 3, I))[0].shape == (5, 3, 2 * H)


@pytest.mark.parametrize("name", ["RNN", "GRU"])
@pytest.mark.parametrize("size", [0, 2])
def test_projection_is_for_lstm_only(name, size):
    for namespace in (nn, fused_rnn):
        with pytest.raises(ValueError, match="proj_size argument is only supported for LSTM"):
            getattr(namespace, name)(I, H, proj_size=size)


y = zeros(3, I)

CELL_CALLS = [
    Bad("0-D", lambda n, m: m(zeros(())), ("1D or 2D", "0D")),
    Bad("3-D", lambda n, m: m(zeros(1, 3, I)), ("1D or 2D", "3D")),
    Bad("features", lambda n, m: m(zeros(3, 5)), ("input", "5", "4")),
    Bad("features_unbatched", lambda n, m: m(zeros(5)), ("input", "5", "4")),
    Bad("None", lambda n, m: m(None), ("input", "Tensor", "NoneType"), TypeError),
    Bad("string", lambda n, m: m("x"), ("input", "Tensor", "str"), TypeError),
    Bad("packed", lambda n, m: m(batched), ("input", "Tensor", "PackedSequence"), TypeError),
    Bad("missing", lambda n, m: m(), ("input",)),
    Bad("float64", lambda n, m: m(y.double()), ("input", "torch.float32", "torch.float64")),
    Bad("integer", lambda n, m: m(y.long()), ("input", "torch.float32", "torch.int64")),
    Bad("complex", lambda n, m: m(y + 0j), ("input", "torch.float32", "torch.complex64")),
    Bad("device", lambda n, m: m(y.to("meta")), ("input", "cpu", "meta")),
    # torch.nn multiplies by it
    Bad("sparse", lambda n, m: m(y.to_sparse()), ("input", "dense", "sparse"), RuntimeError),
    # torch.nn counts a nested tensor of rows as 3-D
    Bad("nested", lambda n, m: m(ragged), ("input", "dense", "nested"), RuntimeError),
    Bad("hx_size", lambda n, m: m(y, states(n, 3, 7)), ("hidden0", "7", "6")),
    Bad("hx_batch", lambda n, m: m(y, states(n, 2, H)), ("batch size 3", "hidden0", "2")),
    Bad("hx_broadcast", lambda n, m: m(y, states(n, 1, H)), ("batch size 3", "hidden0", "1")),
    Bad("hx_1-D", lambda n, m: m(y, states(n, H)), ("h", "2-D", "1-D")),
    Bad("hx_2-D_unbatched", lambda n, m: m(zeros(I), states(n, 1, H)), ("h", "1-D", "2-D")),
    Bad("hx_0-D", lambda n, m: m(y, states(n)), ("1D or 2D", "0D")),
    Bad("hx_4-D", lambda n, m: m(y, states(n, 3, 1, 1, H)), ("1D or 2D", "4D")),
    Bad("hx_string", lambda n, m: m(y, "ab"), ("hx", "str"), TypeError),
    Bad("hx_number", lambda n, m: m(y, 1), ("hx", "int"), TypeError),
    Bad("hx_pair_of_None", lambda n, m: m(y, (None, None)), ("hx",), TypeError),
    Bad("hx_pair", lambda n, m: m(y, (zeros(3, H),) * 2), ("hx", "tuple"), TypeError, only=one),
    Bad("hx_tensor", lambda n, m: m(y, zeros(2, 3, H)), ("hx", "tuple", "Tensor"), only=two),
    Bad("hx_single", lambda n, m: m(y, (zeros(3, H),)), ("hx", "1"), only=two),
    Bad("hx_three", lambda n, m: m(y, (zeros(3, H),) * 3), ("hx", "3"), only=two),
    Bad("c_size", lambda n, m: m(y, (zeros(3, H), zeros(3, 7))), ("hidden1", "7", "6"), only=two),
    Bad("c_batch", lambda n, m: m(y, (zeros(3, H), zeros(2, H))), ("hidden1", "2"), only=two),
    # torch.nn computes with c of another dtype
    Bad("c_dtype", lambda n, m: m(y, (zeros(3, H), zeros(3, H).double())),
        ("hx[1]", "torch.float32", "torch.float64"), RuntimeError, only=two),
    Bad("hx_dtype", lambda n, m: m(y, states(n, 3, H, dtype=torch.float64)),
        ("hx", "torch.float32", "torch.float64")),
    Bad("hx_integer", lambda n, m: m(y, states(n, 3, H, dtype=torch.int64)),
        ("hx", "torch.float32", "torch.int64")),
    Bad("hx_device", lambda n, m: m(y, states(n, 3, H, device="meta")), ("hx", "cpu", "meta")),
]  # fmt: skip


@cases(CELL_CALLS)
def test_cell_call(bad, name):
    check(bad, name, *both(name, "Cell"))


def with_cell_weight(weight: str, make: Callable[[int], Tensor]):
    def call(name: str, module: nn.Module):
        value = make(GATES[name] * H)
        setattr(module, weight, None if value is None else nn.Parameter(value))
        return module(y)

    return call


CELL_WEIGHTS = [
    Bad("weight_hh", with_cell_weight("weight_hh", lambda r: zeros(r, 5)), ("6", "5")),
    Bad("weight_ih_rows", with_cell_weight("weight_ih", lambda r: zeros(r + 1, I)),
        ("expected", "got")),
    Bad("weight_ih_1-D", with_cell_weight("weight_ih", zeros), ("2 dim", "1"), RuntimeError),
    Bad("weight_hh_1-D", with_cell_weight("weight_hh", zeros), ("expected", "got"), RuntimeError),
    Bad("weight_dtype", with_cell_weight("weight_hh", lambda r: zeros(r, H).double()),
        ("torch.float32", "torch.float64")),
    Bad("weight_sparse", with_cell_weight("weight_hh", lambda r: zeros(r, H).to_sparse()),
        ("dense", "sparse"), RuntimeError),
    Bad("weight_bias", with_cell_weight("bias_ih", lambda r: zeros(5)), ("5",)),
    Bad("weight_hh_None", with_cell_weight("weight_hh", lambda r: None), ("Tensor", "NoneType")),
    Bad("weight_ih_None", with_cell_weight("weight_ih", lambda r: None), ("Tensor", "NoneType")),
]  # fmt: skip


@cases(CELL_WEIGHTS)
def test_cell_with_replaced_weights(bad, name):
    check(bad, name, *both(name, "Cell"))


@every_class
@pytest.mark.parametrize("missing", ["bias_ih", "bias_hh"])
def test_cell_with_one_bias(name, missing):
    """torch.nn adds the bias there is. Ours may do so too or refuse, but not leave it out."""
    theirs, ours = both(name, "Cell", dtype=torch.float64)
    for module in (theirs, ours):
        setattr(module, missing, None)
    error = raised(lambda: ours(y.double()))
    if error is None:
        assert_same(ours, theirs, y.double())
    else:
        assert isinstance(error, (TypeError, RuntimeError)) and "bias" in str(error)


@pytest.mark.parametrize(
    "sizes",
    [(-1, H), (I, -6), ("4", H), (None, H), (I, None), (4.0, H), (I,), ()],
    ids=str,
)
@every_class
def test_cell_construction(name, sizes):
    expected = raised(lambda: getattr(nn, name + "Cell")(*sizes))
    assert expected is not None
    found = raised(lambda: getattr(fused_rnn, name + "Cell")(*sizes))
    assert type(found) is type(expected)
    assert str(found) == str(expected)


@every_class
@pytest.mark.parametrize("options", [dict(num_layers=2), dict(proj_size=2), dict(batch_first=True)])
def test_cell_does_not_take_a_layers_options(name, options):
    with pytest.raises(TypeError, match=next(iter(options))):
        getattr(fused_rnn, name + "Cell")(I, H, **options)


@every_class
@pytest.mark.parametrize("sizes", [(0, H), (I, 0)], ids=str)
def test_cell_without_features_or_units(name, sizes):
    """torch.nn's constructor of cells takes zero sizes, and the cell then computes."""
    modules = []
    for namespace in (nn, fused_rnn):
        torch.manual_seed(0)
        modules.append(getattr(namespace, name + "Cell")(*sizes))
    assert_same(modules[1], modules[0], torch.ones(3, sizes[0]))


def weights(gates: int, layers: int = 1, bias: bool = True, dtype=torch.float32) -> list[Tensor]:
    result = []
    for layer in range(layers):
        result += [zeros(gates * H, H if layer else I), zeros(gates * H, H)]
        result += [zeros(gates * H)] * 2 if bias else []
    return [w.to(dtype) for w in result]


rows = zeros(5, I)
gru, lstm = functional.gru, functional.lstm

# call, classes that will do, words in the message
FUNCTIONS = {
    "no such cell": (
        lambda: fused_rnn.functional.recurrent("gruu", x, None, weights(3)), ValueError,
        ("cell_name", "gru_reset_before", "'gruu'")),
    "no weights": (lambda: gru(x, None, []), ValueError, ("weights", "4", "0")),
    "one weight": (lambda: gru(x, None, weights(3)[:1]), ValueError, ("weights", "4", "1")),
    "three weights": (lambda: gru(x, None, weights(3)[:3]), ValueError, ("weights", "4", "3")),
    "six for an lstm": (
        lambda: lstm(x, None, [*weights(4), *weights(4)[:2]]), ValueError, ("weights", "6")),
    "weights of two layers": (lambda: gru(x, None, weights(3, 2)), ValueError, ("weights", "8")),
    "weights of one layer": (
        lambda: gru(x, None, weights(3), num_layers=2), (ValueError, RuntimeError), ("weights",)),
    "weights of one direction": (
        lambda: gru(x, None, weights(3), bidirectional=True), (ValueError, RuntimeError),
        ("weights",)),
    "weights None": (lambda: gru(x, None, None), TypeError, ("weights", "NoneType")),
    "weights string": (lambda: gru(x, None, "abcd"), TypeError, ("weights", "str")),
    "weights of None": (lambda: gru(x, None, [None] * 4), TypeError, ("weights[0]", "NoneType")),
    "weight 0-D": (lambda: gru(x, None, [zeros(())] * 4), RuntimeError, ("weights[0]", "2")),
    "weights of integers": (
        lambda: gru(x, None, weights(3, dtype=torch.int64)), ValueError, ("int64", "float")),
    "all of integers": (
        lambda: gru(x.long(), None, weights(3, dtype=torch.int64)), RuntimeError, ("int64",)),
    "rows no multiple of gates": (
        lambda: gru(x, None, [zeros(17, I), zeros(17, H)]), RuntimeError, ("weights[0]", "17")),
    "later weight": (
        lambda: gru(x, None, [*weights(3, 2)[:5], zeros(18, 5), *weights(3)[2:]], num_layers=2),
        RuntimeError, ("weights[5]", "[18, 6]", "[18, 5]")),
    "num_layers zero": (
        lambda: gru(x, None, weights(3), num_layers=0), ValueError, ("num_layers", "0")),
    "num_layers negative": (
        lambda: gru(x, None, weights(3), num_layers=-1), ValueError, ("num_layers", "-1")),
    "num_layers string": (
        lambda: gru(x, None, weights(3), num_layers="1"), TypeError, ("num_layers", "str")),
    "num_layers None": (
        lambda: gru(x, None, weights(3), num_layers=None), TypeError, ("num_layers", "NoneType")),
    "bidirectional string": (
        lambda: gru(x, None, weights(3), bidirectional="no"), TypeError, ("bidirectional", "str")),
    "training string": (
        lambda: gru(x, None, weights(3), training="no"), TypeError, ("training", "bool", "str")),
    "batch_first int": (
        lambda: gru(x, None, weights(3), batch_first=2), TypeError, ("batch_first", "int")),
    "return_states string": (
        lambda: gru(x, None, weights(3), return_states="n"), TypeError, ("return_states", "str")),
    "recompute None": (
        lambda: gru(x, None, weights(3), recompute=None), TypeError, ("recompute", "NoneType")),
    "reset_after string": (
        lambda: gru(x, None, weights(3), reset_after="no"), TypeError, ("reset_after", "str")),
    "dropout negative": (
        lambda: gru(x, None, weights(3, 2), num_layers=2, dropout=-1.0, training=True),
        ValueError, ("dropout", "-1")),
    "dropout above one": (
        lambda: gru(x, None, weights(3, 2), num_layers=2, dropout=2.0, training=True),
        ValueError, ("dropout", "2")),
    "dropout above one in eval": (
        lambda: gru(x, None, weights(3, 2), num_layers=2, dropout=2.0), ValueError,
        ("dropout", "2")),
    "dropout string": (
        lambda: gru(x, None, weights(3, 2), num_layers=2, dropout="a", training=True),
        (TypeError, ValueError), ("dropout",)),
    "batch_sizes list": (
        lambda: gru(rows, None, weights(3), batch_sizes=[3, 2]), TypeError,
        ("batch_sizes", "list")),
    "batch_sizes negative": (
        lambda: gru(rows, None, weights(3), batch_sizes=torch.tensor([-2, 7])), RuntimeError,
        ("batch_sizes", "-2")),
    "batch_sizes meta": (
        lambda: gru(rows, None, weights(3), batch_sizes=torch.tensor([3, 2], device="meta")),
        RuntimeError, ("batch_sizes", "meta")),
    "batch_sizes float": (
        lambda: gru(rows, None, weights(3), batch_sizes=torch.tensor([3.0, 2.0])), RuntimeError,
        ("batch_sizes", "int64", "float32")),
    "batch_sizes of padded": (
        lambda: gru(x, None, weights(3), batch_sizes=torch.tensor([3, 2])), RuntimeError,
        ("input", "2", "3")),
    "input None": (lambda: gru(None, None, weights(3)), TypeError, ("input", "NoneType")),
    "input packed": (lambda: gru(batched, None, weights(3)), TypeError, ("input", "Packed")),
    "input 0-D": (lambda: gru(zeros(()), None, weights(3)), RuntimeError, ("input", "3", "0")),
    "input 2-D": (lambda: gru(rows, None, weights(3)), RuntimeError, ("input", "3", "2")),
    "input 4-D": (
        lambda: gru(x.unsqueeze(0), None, weights(3)), RuntimeError, ("input", "3", "4")),
    "no time": (lambda: gru(x[:0], None, weights(3)), RuntimeError, ("sequence length",)),
    "hx pair": (
        lambda: gru(x, (zeros(1, 3, H),) * 2, weights(3)), TypeError, ("hx", "tuple")),
    "hx 2-D": (lambda: gru(x, zeros(3, H), weights(3)), RuntimeError, ("hx", "[3, 6]")),
    "hx tensor": (
        lambda: lstm(x, zeros(1, 3, H), weights(4)), TypeError, ("hx", "tuple", "Tensor")),
    "hx three": (
        lambda: lstm(x, (zeros(1, 3, H),) * 3, weights(4)), RuntimeError, ("hx", "3")),
    "projection columns": (
        lambda: lstm(x, None, [zeros(24, I), zeros(24, 2), zeros(2, 5)]), RuntimeError,
        ("weights[2]", "[2, 6]", "[2, 5]")),
    "projection and w_hh": (
        lambda: lstm(x, None, [zeros(24, I), zeros(24, 3), zeros(2, H)]), RuntimeError,
        ("weights[1]", "[24, 2]", "[24, 3]")),
    "projection 1-D": (
        lambda: lstm(x, None, [zeros(24, I), zeros(24, 2), zeros(2)]), RuntimeError,
        ("weights[2]", "[2]")),
    "projection 0-D": (
        lambda: lstm(x, None, [zeros(24, I), zeros(24, 2), zeros(())]), RuntimeError,
        ("weights[2]",)),
    # torch.nn allows proj_size < hidden_size only, and so can tell one from no projection.
    "projection to hidden_size": (
        lambda: lstm(x, None, [zeros(24, I), zeros(24, H), zeros(H, H)]),
        (ValueError, RuntimeError), ("weights[2]", "6")),
    "projection to more": (
        lambda: lstm(x, None, [zeros(24, I), zeros(24, 7), zeros(7, H)]),
        (ValueError, RuntimeError), ("weights[2]", "7")),
    "projection to nothing": (
        lambda: lstm(x, None, [zeros(24, I), zeros(24, 0), zeros(0, H)]),
        (ValueError, RuntimeError), ("weights[2]",)),
}  # fmt: skip


@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize("autocast", [False, True])
def test_function(autocast, kind):
    call, classes, words = FUNCTIONS[kind]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        error = raised(call)
    assert isinstance(error, classes), f"{type(error).__name__}: {error}"
    missing = [word for word in words if word not in str(error)]
    assert not missing, f"no {missing} in: {error}"
    assert "csrc" not in str(error)


@pytest.mark.parametrize(
    "function", [fused_rnn.replace, fused_rnn.restore, fused_rnn.from_torch, fused_rnn.explain]
)
@pytest.mark.parametrize("value", [None, "model", 3, nn.LSTM, torch.zeros(2), [nn.LSTM(2, 3)]])
def test_what_is_no_module(function, value):
    with pytest.raises(TypeError, match=r"module|model"):
        function(value)


def expanded(tensor: Tensor) -> Tensor:
    """The first slice over and over: stride zero."""
    return tensor[:1].expand(tensor.shape)


def overlapping(tensor: Tensor) -> Tensor:
    """A window that moves on by one or a few elements a row."""
    return tensor.flatten().as_strided(tensor.shape, tuple(range(tensor.dim(), 0, -1)))


def offset(tensor: Tensor) -> Tensor:
    """Unaligned: one element into a longer storage."""
    storage = tensor.new_empty(tensor.numel() + 1)
    storage[1:] = tensor.flatten()
    return storage[1:].view(tensor.shape)


def backwards(tensor: Tensor) -> Tensor:
    """Dimensions in the opposite order in memory."""
    order = tuple(reversed(range(tensor.dim())))
    return tensor.permute(order).contiguous().permute(order)


def lazily_negated(tensor: Tensor) -> Tensor:
    return torch._neg_view(tensor)


@every_class
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("storage", [expanded, overlapping, offset, backwards, lazily_negated])
def test_odd_storage(name, storage, dtype):
    """Values count, not how they lie in memory."""
    torch.manual_seed(0)
    theirs, ours = both(name, num_layers=2, bidirectional=True, dtype=dtype)
    tensor = torch.randn(5, 3, I, dtype=dtype)
    state = tuple(torch.randn(4, 3, H, dtype=dtype) for _ in range(2))
    values = {k: torch.randn_like(p) for k, p in ours.named_parameters()}
    for module, lay in ((theirs, lambda t: storage(t).clone()), (ours, storage)):
        for key, value in values.items():
            setattr(module, key, nn.Parameter(lay(value.clone())))
    odd = storage(tensor), tuple(map(storage, state))
    plain = odd[0].clone(), tuple(s.clone() for s in odd[1])
    results = []
    for module, (sequence, hx) in ((ours, odd), (theirs, plain)):
        output, final = module(sequence, hx if name == "LSTM" else hx[0])
        output.square().sum().backward()
        found = {"output": output.detach()} | {
            f"state {i}": s.detach() for i, s in enumerate(final if name == "LSTM" else (final,))
        }
        # A parameter of stride zero gets the gradient of each of its elements.
        found |= {k: p.grad.clone() for k, p in module.named_parameters()}
        results.append(found)
    assert_same_numbers(*results)


def weight_of(module):
    return module.weight_hh_l0


def bias_of(module):
    return module.bias_ih_l0


@every_class
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("which", [weight_of, bias_of, None])
def test_freed_storage(name, which, grad, cpu_backend):
    """FSDP frees the memory of weights that are not in use: no crash, and no layer without them."""
    module, tensor = getattr(fused_rnn, name)(I, H), torch.randn(5, 3, I)
    odd = tensor if which is None else which(module).data
    odd.untyped_storage().resize_(0)
    words = ("x",) if which is None else ("weights", str(list(odd.shape)))
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError) as raised:
        module(tensor)
    assert all(w in str(raised.value) for w in (*words, "memory")), raised.value
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="memory"):
        module(tensor, lengths=torch.tensor([5, 2, 3]))


@every_class
def test_freed_sizes_of_steps(name, cpu_backend):
    sizes = torch.tensor([3, 2])
    sequence = PackedSequence(zeros(5, I), sizes)
    sizes.untyped_storage().resize_(0)
    with pytest.raises((RuntimeError, IndexError)):
        getattr(fused_rnn, name)(I, H)(sequence)


@every_class
def test_odd_gradients(name):
    """Gradients that arrive expanded, or not at all for some outputs."""
    theirs, ours = both(name, num_layers=2, dtype=torch.float64)
    torch.manual_seed(0)
    tensor = torch.randn(5, 3, I, dtype=torch.float64, requires_grad=True)
    results = []
    for module in (theirs, ours):
        sequence = copies(tensor)
        output, final = module(sequence)
        final = final if name == "LSTM" else (final,)
        output.sum().backward(retain_graph=True)  # stride zero everywhere
        final[-1][1, :2].mean().backward(retain_graph=True)
        output[-1, 0, :1].backward(torch.ones(1, dtype=torch.float64))
        results.append({"x": sequence.grad} | {k: p.grad for k, p in module.named_parameters()})
    assert_same_numbers(results[1], results[0])


@every_class
def test_long_sequence_of_one_unit(name):
    theirs, ours = (getattr(ns, name)(1, 1, dtype=torch.float64) for ns in (nn, fused_rnn))
    ours.load_state_dict(theirs.state_dict())
    torch.manual_seed(0)
    assert_same(ours, theirs, torch.randn(2000, 1, 1, dtype=torch.float64, requires_grad=True))
    with torch.no_grad():
        tensor = torch.randn(100_000, 1, 1)
        found, expected = ours.float()(tensor)[0], theirs.float()(tensor)[0]
    assert_same_numbers({"output": found}, {"output": expected})


def test_input_without_features_is_a_function_still():
    """torch.nn has no input_size of 0, but the function underneath does."""
    torch.manual_seed(0)
    given = [torch.randn(18, 0), torch.randn(18, H), torch.randn(18), torch.randn(18)]
    found = gru(zeros(5, 3, 0), torch.ones(1, 3, H), given)
    expected = torch._VF.gru(
        zeros(5, 3, 0), torch.ones(1, 3, H), given, True, 1, 0.0, False, False, False
    )
    found, expected = (dict(zip(("output", "h_n"), r, strict=True)) for r in (found, expected))
    assert_same_numbers(found, expected)


@every_class
@pytest.mark.parametrize("suffix", ["", "Cell"], ids=["layer", "cell"])
def test_after_an_error_the_module_works(name, suffix):
    theirs, ours = both(name, suffix, dtype=torch.float64)
    good = torch.ones((3, I) if suffix else (5, 3, I), dtype=torch.float64)
    for bad in (None, good.float(), good[..., :1]):
        assert raised(lambda bad=bad: ours(bad)) is not None
    assert_same(ours, theirs, good)


class TestZerosWithoutMemory:
    """The backward of torch.sgn gives them, and whoever learns from gradients feeds them on."""

    @pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float64], ids=str)
    def zeros(self, request):
        def make(*shape):
            zeros = torch._efficientzerotensor(shape, dtype=request.param)
            assert zeros._is_zerotensor()
            return zeros

        return make

    @pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
    def test_layers(self, name, zeros):
        options = {} if name == "RNN" else {"layer_norm": True}
        for module in (
            getattr(fused_rnn, name)(5, 8, 2, bidirectional=True),
            getattr(fused_rnn, name)(5, 8, **options),
        ):
            x, parts = zeros(6, 3, 5), 2 * module.num_layers if module.bidirectional else 1
            module.to(x.dtype)
            h = zeros(parts, 3, 8)
            hx = (h, h) if name == "LSTM" else h
            full = torch.randn(6, 3, 5, dtype=x.dtype)
            for given in ((x,), (x, hx), (full, hx)):
                with torch.no_grad():
                    expected = module(given[0] + torch.zeros_like(full))[0]
                    assert torch.equal(module(*given)[0], expected)
                y = module(*given)[0]
                assert torch.equal(y, expected)
                y.sum().backward()

    @pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
    def test_cells(self, name, zeros):
        cell, x = getattr(fused_rnn, name)(5, 8), zeros(3, 5)
        cell.to(x.dtype)
        actual, expected = cell(x), cell(torch.zeros(3, 5, dtype=x.dtype))
        assert all(map(torch.equal, *map(torch.utils._pytree.tree_leaves, (actual, expected))))

    @pytest.mark.parametrize("name", ["GRU", "LSTM"])
    def test_steppers(self, name):
        step = fused_rnn.stepper(getattr(fused_rnn, name)(5, 8))
        x, h = torch._efficientzerotensor((3, 5)), torch._efficientzerotensor((1, 3, 8))
        state = (h, h) if name == "LSTM" else h
        assert torch.equal(step(x, state)[0], step(torch.zeros(3, 5))[0])

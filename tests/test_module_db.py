"""torch's own module database, which its test-suite is generated from, run on our six classes.

For each entry of `module_db` for a recurrent module or cell: its sample inputs (ours against
torch.nn's from the same seed, and against the entry's reference function), its error inputs, and
those of the generic checks of torch's test/test_modules.py that apply to one device: slow where
test_modules.py, test_autograd.py and toolbox/test_transforms.py have tests of their own.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from helpers.modules import NAMES
from helpers.named_outcomes import (
    assert_accurate_run,
    assert_same,
    copies,
    doubled,
    run,
    tensors,
    to,
)
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import fused_rnn
from fused_rnn.testing import assert_same_numbers

pytest.importorskip("expecttest", reason="torch's own test modules need expecttest")
from torch.testing._internal.common_modules import ModuleErrorEnum, ModuleInfo, module_db

INFOS = [info for info in module_db if info.module_cls in {getattr(nn, name) for name in NAMES}]

# torch.nn says where oneDNN has no projection.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")

every_info = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def training_flags(info: ModuleInfo) -> tuple[bool, ...]:
    return (True, False) if info.train_and_eval_differ else (True,)


def every_mode():
    return pytest.mark.parametrize(
        ("info", "training"),
        [
            pytest.param(info, flag, id=f"{info.name}-{'train' if flag else 'eval'}")
            for info in INFOS
            for flag in training_flags(info)
        ],
    )


def our_class(info: ModuleInfo) -> type[nn.Module]:
    return getattr(fused_rnn, info.module_cls.__name__)


def samples(
    info: ModuleInfo, dtype: torch.dtype, training: bool = True, requires_grad: bool = True
) -> list:
    torch.manual_seed(0)
    return list(
        info.module_inputs_func(
            info, device="cpu", dtype=dtype, requires_grad=requires_grad, training=training
        )
    )


def build(cls: type[nn.Module], sample, dtype: torch.dtype, training: bool = True) -> nn.Module:
    torch.manual_seed(1)
    given = sample.constructor_input
    module = cls(*given.args, **given.kwargs, dtype=dtype)
    return module.train(training)


def built(
    info: ModuleInfo, dtype: torch.dtype, training: bool = True
) -> Iterator[tuple[nn.Module, nn.Module, tuple]]:
    """torch.nn's module, ours, and the arguments of the call, of each sample."""
    for sample in samples(info, dtype, training):
        assert not sample.forward_input.kwargs
        theirs = build(info.module_cls, sample, dtype, training)
        ours = build(our_class(info), sample, dtype, training)
        yield theirs, ours, sample.forward_input.args


def test_there_is_an_entry_for_each_class():
    assert {info.module_cls.__name__ for info in INFOS} == set(NAMES)
    assert all(samples(info, torch.float32) for info in INFOS)


@every_mode()
@dtypes
def test_forward_and_gradients(info, training, dtype):
    for theirs, ours, args in built(info, dtype, training):
        if dtype == torch.float64:
            assert_same(ours, theirs, *args)
        else:
            # The samples reach from -9 to 9: 1 - y*y of a saturated y is all rounding.
            assert_accurate_run(ours, theirs, doubled(theirs), *args, roundings=128)


@every_mode()
@dtypes
def test_reference_function(info, training, dtype):
    """What the entry says the module computes."""
    checked = 0
    for sample in samples(info, dtype, training):
        if sample.reference_fn is None:
            continue
        ours = build(our_class(info), sample, dtype, training)
        args = sample.forward_input.args
        found = tensors("result", ours(*copies(args)))
        expected = tensors("result", sample.reference_fn(ours, *copies(args)))
        assert_same_numbers(found, expected)
        checked += 1
    assert checked


# The database has packed samples for these two, and torch leaves them out by default.
@pytest.mark.parametrize("name", ["RNN", "GRU"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@dtypes
def test_packed_sequences(name, training, dtype):
    info = next(info for info in INFOS if info.module_cls is getattr(nn, name))
    torch.manual_seed(0)
    found = info.module_inputs_func(
        info,
        device="cpu",
        dtype=dtype,
        requires_grad=True,
        training=training,
        with_packed_sequence=True,
    )
    packed = [s for s in found if isinstance(s.forward_input.args[0], nn.utils.rnn.PackedSequence)]
    assert packed
    for sample in packed:
        theirs = build(info.module_cls, sample, dtype, training)
        ours = build(our_class(info), sample, dtype, training)
        if dtype == torch.float64:
            assert_same(ours, theirs, *sample.forward_input.args)
        else:
            args = sample.forward_input.args
            assert_accurate_run(ours, theirs, doubled(theirs), *args, roundings=128)


def error_cases():
    cases = []
    for info in INFOS:
        for dtype in (torch.float32, torch.float64):
            for training in training_flags(info):
                torch.manual_seed(0)
                found = info.module_error_inputs_func(
                    info, device="cpu", dtype=dtype, requires_grad=False, training=training
                )
                mode = "train" if training else "eval"
                cases += [
                    pytest.param(info, case, training, id=f"{info.name}-{dtype}-{mode}-{i}")
                    for i, case in enumerate(found)
                ]
    return pytest.mark.parametrize(("info", "case", "training"), cases)


@error_cases()
def test_errors(info, case, training):
    given = case.module_error_input.constructor_input
    if case.error_on is ModuleErrorEnum.CONSTRUCTION_ERROR:
        with pytest.raises(case.error_type, match=case.error_regex) as found:
            our_class(info)(*given.args, **given.kwargs)
    else:
        module = our_class(info)(*given.args, **given.kwargs).train(training)
        call = case.module_error_input.forward_input
        with pytest.raises(case.error_type, match=case.error_regex) as found:
            module(*call.args, **call.kwargs)
    assert found.type is case.error_type


@every_info
@dtypes
def test_factory_arguments(info, dtype):
    """Device and dtype reach every parameter, and may be given by position too."""
    for sample in samples(info, dtype):
        given = sample.constructor_input
        for device in ("cpu", "meta"):
            module = our_class(info)(*given.args, **given.kwargs, device=device, dtype=dtype)
            for name, parameter in module.named_parameters():
                assert parameter.dtype == dtype, name
                assert parameter.device.type == device, name
            with torch.device(device):
                module = our_class(info)(*given.args, **given.kwargs)
            assert {p.device.type for p in module.parameters()} == {device}
        default = our_class(info)(*given.args, **given.kwargs)
        assert {p.dtype for p in default.parameters()} == {torch.get_default_dtype()}
    parameters = inspect.signature(our_class(info)).parameters
    assert list(parameters)[:2] == ["input_size", "hidden_size"]
    assert {"device", "dtype"} <= set(parameters)


@every_info
def test_default_dtype(info):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        for sample in samples(info, torch.float64):
            given = sample.constructor_input
            module = our_class(info)(*given.args, **given.kwargs)
            assert {p.dtype for p in module.parameters()} == {torch.float64}
            module(*sample.forward_input.args)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.slow
@every_mode()
def test_pickle(info, training):
    for _, ours, args in built(info, torch.float64, training):
        twins = [pickle.loads(pickle.dumps(ours))]
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        twins.append(torch.load(file, weights_only=False))
        expected = run(ours, *args)
        for twin in twins:
            found = run(twin, *args)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[k], t) for k, t in expected.items())


@every_info
def test_repr(info):
    for theirs, ours, _ in built(info, torch.float32):
        assert repr(ours) == repr(theirs)
        assert str(ours) == str(theirs)


@pytest.mark.slow
@every_mode()
def test_save_load_state_dict_between_both(info, training):
    for theirs, ours, args in built(info, torch.float64, training):
        for parameter in ours.parameters():
            nn.init.uniform_(parameter, -0.3, 0.3)
        theirs.load_state_dict(ours.state_dict())
        assert_same(ours, theirs, *args)


@every_info
def test_state_dict_hooks(info):
    """Every kind of hook around saving and loading runs, once, as on torch.nn's module."""
    for pair_and_args in list(built(info, torch.float64))[:1]:
        logs = []
        for module in pair_and_args[:2]:
            log = []
            module.register_state_dict_pre_hook(lambda m, *_, log=log: log.append("state pre"))
            module.register_state_dict_post_hook(
                lambda m, state, *_, log=log: log.append(("state post", list(state)))
            )
            module._register_load_state_dict_pre_hook(
                lambda state, *_, log=log: log.append(("load pre", list(state)))
            )
            module.register_load_state_dict_post_hook(
                lambda m, keys, log=log: log.append(("load post", *keys))
            )
            module.load_state_dict(copy.deepcopy(module.state_dict()))
            logs.append(log)
        assert logs[1] == logs[0] and len(logs[1]) == 4


@pytest.mark.slow
@every_mode()
def test_module_hooks(info, training):
    """torch's test_hooks: each kind of hook sees the same and may replace the same."""
    for modules_and_args in list(built(info, torch.float64, training))[:4]:
        *modules, args = modules_and_args
        logs, results = [], []
        for module in modules:
            log: list = []
            module.register_forward_pre_hook(lambda m, a, log=log: log.append(("pre", shapes(a))))
            module.register_forward_hook(
                lambda m, a, r, log=log: log.append(("forward", shapes(a), shapes(r)))
            )
            module.register_full_backward_pre_hook(
                lambda m, g, log=log: log.append(("backward pre", shapes(g)))
            )
            module.register_full_backward_hook(
                lambda m, gi, go, log=log: log.append(("backward", shapes(gi), shapes(go)))
            )
            results.append(run(module, *args))
            logs.append(log)
        assert logs[1] == logs[0] and [entry[0] for entry in logs[1]] == [
            "pre",
            "forward",
            "backward pre",
            "backward",
        ]
        assert_same_numbers(results[1], results[0])


def shapes(value):
    if isinstance(value, Tensor):
        return list(value.shape)
    return [shapes(v) for v in value] if isinstance(value, tuple) else value


@pytest.mark.slow
@every_mode()
def test_non_contiguous_tensors(info, training):
    for _, ours, args in built(info, torch.float64, training):
        expected = run(ours, *args)
        for odd in (interleaved(args), args):
            if odd is args:
                for name, parameter in list(ours.named_parameters()):
                    setattr(ours, name, nn.Parameter(interleaved(parameter)))
            found = run_in_place(ours, odd)
            assert_same_numbers(found, expected)


def interleaved(value):
    """The same values with other numbers in between."""
    if isinstance(value, Tensor):
        spread = torch.stack((value.detach(), value.detach() + 1), -1)[..., 0]
        return spread.requires_grad_(value.requires_grad)
    return tuple(map(interleaved, value)) if isinstance(value, tuple) else value


def run_in_place(module: nn.Module, args: tuple) -> dict[str, Tensor]:
    """`run`, but on the tensors themselves: a copy would be contiguous."""
    for tensor in [*tensors("args", args).values(), *module.parameters()]:
        tensor.grad = None
    found = tensors("result", module(*args))
    generator = torch.Generator().manual_seed(4)
    sum(
        (t * torch.randn(t.shape, generator=generator, dtype=torch.float64)).sum()
        for t in found.values()
    ).backward()
    result = {k: t.detach() for k, t in found.items()}
    for name, tensor in [*tensors("args", args).items(), *module.named_parameters()]:
        result[f"grad of {name}"] = tensor.grad.clone()
    return result


@pytest.mark.slow
@every_mode()
def test_conversion_of_dtype_in_place(info, training):
    """torch's test_to and test_cpu_gpu_parity in what a CPU can tell."""
    for theirs, ours, args in built(info, torch.float32, training):
        parameters = dict(ours.named_parameters())
        ours.double(), theirs.double()
        assert all(dict(ours.named_parameters())[k] is p for k, p in parameters.items())
        assert_same(ours, theirs, *to(args, torch.float64))


def check_gradients(info: ModuleInfo, training: bool, check) -> None:
    for sample in samples(info, torch.float64, training):
        ours = build(our_class(info), sample, torch.float64, training)
        args = sample.forward_input.args
        flat = list(tensors("args", args).values()) + list(ours.parameters())
        names = [name for name, _ in ours.named_parameters()]

        def call(*values, ours=ours, args=args, names=names):
            inputs, weights = values[: -len(names)], values[-len(names) :]
            rest = iter(inputs)
            call_args = tuple(
                tuple(next(rest) for _ in a) if isinstance(a, tuple) else next(rest) for a in args
            )
            result = torch.func.functional_call(
                ours, dict(zip(names, weights, strict=True)), call_args
            )
            return tuple(tensors("result", result).values())

        assert check(call, [t.detach().clone().requires_grad_() for t in flat])


@pytest.mark.slow
@every_info
def test_gradcheck(info):
    check_gradients(info, True, partial(gradcheck, fast_mode=True))


@pytest.mark.slow
@every_mode()
def test_gradcheck_of_every_element(info, training):
    check_gradients(info, training, gradcheck)


@pytest.mark.slow
@every_info
def test_gradgradcheck(info):
    check_gradients(info, True, partial(gradgradcheck, fast_mode=True))

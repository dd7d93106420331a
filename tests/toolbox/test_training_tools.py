"""What stands around a model in training: reparametrizations, optimizers, averages, files."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from helpers.outcomes import flat
from toolkit import Inputs, loss_of, near, train_step
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import fused_rnn

WEIGHT = {True: "weight_hh", False: "weight_hh_l0"}  # of a cell, of a layer


def weight_of(variant: str) -> str:
    return WEIGHT[variant.endswith("_cell")]


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


@pytest.mark.parametrize("kind", ["parametrize", "weight_norm", "orthogonal", "prune", "removed"])
def test_reparametrized(variant, kind, make):
    """Values, and gradients of what the weight is made from."""
    name, results = weight_of(variant), []
    for module in make.pair(variant):
        if kind == "parametrize":
            parametrize.register_parametrization(module, name, Halved())
        elif kind == "weight_norm":
            parametrizations.weight_norm(module, name)
        elif kind == "orthogonal":
            torch.manual_seed(7)
            parametrizations.orthogonal(module, name)
        else:
            prune.l1_unstructured(module, name, amount=0.4)
            if kind == "removed":
                prune.remove(module, name)
        args = Inputs(module, True).args if not results else results[0][0]
        results.append((args, train_step(module, module, *args)))
    near(results[0][1], results[1][1])


OPTIMIZERS = {
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "adam foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adagrad fused": lambda p: torch.optim.Adagrad(p, lr=0.01, fused=True),
    "rmsprop foreach": lambda p: torch.optim.RMSprop(p, lr=0.01, foreach=True),
    "adam for loop": lambda p: torch.optim.Adam(p, lr=0.01, foreach=False, fused=False),
    "lbfgs": lambda p: torch.optim.LBFGS(p, max_iter=3),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizers(kind, layer, make):
    weights = []
    for module in make.pair(layer, num_layers=2):
        module = module.double()
        torch.manual_seed(2)
        optimizer = OPTIMIZERS[kind](module.parameters())
        for _ in range(3):
            args = Inputs(module, dtype=torch.float64).args

            def closure(module=module, args=args, optimizer=optimizer):
                optimizer.zero_grad()
                loss = loss_of(module(*args))
                loss.backward()
                return loss

            optimizer.step(closure)
        weights.append([p.detach() for p in module.parameters()])
    near(*weights, rtol=1e-6, atol=1e-8)


def test_optimizer_in_backward(layer, make):
    """A step inside backward, parameter by parameter, after which the gradient is dropped."""
    weights = []
    for module in make.pair(layer):
        optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in module.parameters()}

        def step(p, optimizers=optimizers):
            optimizers[p].step()
            optimizers[p].zero_grad()

        for p in module.parameters():
            p.register_post_accumulate_grad_hook(step)
        torch.manual_seed(2)
        for _ in range(3):
            loss_of(module(*Inputs(module).args)).backward()
        assert all(p.grad is None for p in module.parameters())
        weights.append([p.detach() for p in module.parameters()])
    near(*weights)


@pytest.mark.parametrize("kind", ["swa", "ema"])
def test_averaged_models(variant, kind, make):
    results = []
    for module in make.pair(variant):
        multi = get_ema_multi_avg_fn(0.9) if kind == "ema" else None
        average = AveragedModel(module, multi_avg_fn=multi)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        torch.manual_seed(2)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(module(*Inputs(module).args)).backward()
            optimizer.step()
            average.update_parameters(module)
        args = Inputs(module, True).args
        update_bn([args[0]], average)
        results.append([average(*args), *average.parameters()])
        assert type(average.module) is type(module)
    near(*results)


def test_copy_by_hand_as_an_exponential_average(make):
    """A copy whose parameters are written to in place, between two calls of the copy."""
    module = make("lstm")
    (x,) = Inputs(module).args
    average = copy.deepcopy(module)
    before = flat(average(x))
    with torch.no_grad():
        for mine, new in zip(average.parameters(), module.parameters(), strict=True):
            mine.lerp_(new * 3, 0.5)
            mine.data.add_(0.1)
    after = flat(average(x))
    assert not torch.allclose(before[0], after[0])
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(2).add_(0.1)
    near(module(x), after)


def test_averages_do_not_pair_states_with_buffers():
    """The average, which is called at other times, has others."""
    model = nn.Sequential(fused_rnn.GRU(3, 5, stateful=True), nn.Module())
    model[1].register_buffer("mean", torch.ones(2))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    model[0](torch.randn(6, 7, 3))
    for _ in range(2):
        average.update_parameters(model)
    assert torch.equal(average.module[1].mean, torch.ones(2))


def test_safetensors(variant, make, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    module, theirs = make.pair(variant)
    path = tmp_path / "model.safetensors"
    safetensors.save_model(module, path)
    with torch.no_grad():
        for p in theirs.parameters():
            p.zero_()
    assert safetensors.load_model(theirs, path) == (set(), [])
    args = Inputs(module, True).args
    near(module(*args), theirs(*args))
    assert safetensors.load_file(path).keys() == module.state_dict().keys()


def test_state_dict_hooks(variant, make):
    """Keys renamed on the way out and back on the way in, as checkpoints of other programs need."""
    module, theirs = make.pair(variant)

    def rename_out(owner, state, prefix, _metadata):
        for key in list(state):
            if key.startswith(prefix):
                state["old." + key] = state.pop(key)

    def rename_in(owner, state, prefix, *_rest):
        for key in list(state):
            state[key.removeprefix("old.")] = state.pop(key)

    module.register_state_dict_post_hook(rename_out)
    theirs.register_load_state_dict_pre_hook(rename_in)
    seen = []
    theirs.register_load_state_dict_post_hook(lambda owner, keys: seen.append(keys))
    state = {key: value + 1 for key, value in module.state_dict().items()}
    assert all(key.startswith("old.") for key in state)
    theirs.load_state_dict(state)
    assert len(seen) == 1
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1)
    args = Inputs(module).args
    near(module(*args), theirs(*args))


def test_load_state_dict_by_assignment(variant, make):
    """From the meta device: the tensors of the file become the parameters, and are what runs."""
    module, theirs = make.pair(variant)
    name = type(module).__name__
    options = {"nonlinearity": module.nonlinearity} if name.startswith("RNN") else {}
    if getattr(module, "proj_size", 0):
        options["proj_size"] = module.proj_size
    empty = type(module)(3, 5, device="meta", **options)
    state = {k: v.clone() for k, v in theirs.state_dict().items()}
    empty.load_state_dict(state, assign=True)
    assert all(p.data_ptr() == state[n].data_ptr() for n, p in empty.named_parameters())
    args = Inputs(module, True).args
    near(train_step(empty, empty, *args), train_step(theirs, theirs, *args))


def test_torch_save(variant, make):
    """A state with weights_only=True; a whole module where its class is declared safe."""
    module, theirs = make.pair(variant)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    theirs.load_state_dict(torch.load(file, weights_only=True))
    args = Inputs(module, True).args
    near(module(*args), theirs(*args))
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    near(torch.load(file, weights_only=False)(*args), theirs(*args))
    file.seek(0)
    with torch.serialization.safe_globals([type(module)]):
        near(torch.load(file, weights_only=True)(*args), theirs(*args))


@pytest.mark.filterwarnings("ignore")  # torch.ao is deprecated
def test_dynamic_quantization_leaves_our_layers_alone():
    """torch's eager quantization knows torch.nn's classes: restore first. Ours stay as they are."""
    model = nn.Sequential(fused_rnn.LSTM(3, 5))
    x = torch.randn(6, 7, 3)
    expected = model(x)[0]
    untouched = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model))
    assert type(untouched[0]) is fused_rnn.LSTM
    near(untouched(x)[0], expected)
    quantized = torch.ao.quantization.quantize_dynamic(fused_rnn.restore(model))
    assert type(quantized[0]).__module__.startswith("torch.ao.nn.quantized")
    near(quantized(x)[0], expected, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_profiler_sees_a_layer(dtype):
    """Tools that watch operators see ours, by name."""
    from torch.profiler import ProfilerActivity, profile

    layer = fused_rnn.LSTM(3, 5, dtype=dtype)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        layer(torch.randn(6, 7, 3, dtype=dtype))[0].sum().backward()
    names = {event.key for event in seen.key_averages()}
    general = {"fused_rnn::layer_forward", "fused_rnn::layer_backward"}
    of_library = {"fused_rnn_cpu::train_layer", "fused_rnn_cpu::train_layer_backward"}
    assert general <= names or (dtype == torch.float32 and of_library <= names)


@pytest.mark.parametrize("kind", ["LSTM", "GRUCell", "stepper"])
def test_profiler_sees_inference(kind):
    """Though short calls go past the dispatcher where nobody looks."""
    from torch.profiler import ProfilerActivity, profile

    module = getattr(fused_rnn, "GRU" if kind == "stepper" else kind)(3, 5)
    call = fused_rnn.stepper(module) if kind == "stepper" else module
    x = torch.randn(*([] if kind == "stepper" or "Cell" in kind else [6]), 7, 3)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as seen:
        call(x)
    names = {event.key for event in seen.key_averages()}
    assert any(name.startswith(("fused_rnn::", "fused_rnn_cpu::")) for name in names), names

"""torch.func and torch.autograd: every derivative, over batches, ensembles and samples."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.modules import parameters_of
from helpers.outcomes import flat
from toolkit import Inputs, loss_of, near, train_step
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.autograd.functional import jacobian
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import PackedSequence
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import fused_rnn

EXACT = {"rtol": 1e-9, "atol": 1e-11}
# What the kernels of a device take, and what only the reference has.
SINGLE_AND_DOUBLE = [torch.float32, torch.float64]
every_dtype = pytest.mark.parametrize("dtype", SINGLE_AND_DOUBLE, ids=["float32", "float64"])
every_hx = pytest.mark.parametrize("with_hx", [False, True], ids=["zeros", "hx"])
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_forward_mode_jacobian_of_a_frozen_layer(name, packed):
    """Whose tangents come several at a time, and not by torch.func."""
    layer = getattr(fused_rnn, name)(2, 3).double().requires_grad_(False)

    def output(x):
        y, _ = layer(PackedSequence(x, torch.tensor([3, 2])) if packed else x)
        return y.data if packed else y

    x = torch.randn(*((5,) if packed else (3, 2)), 2, dtype=torch.float64)
    expected = jacobian(output, x)
    found = jacobian(output, x, vectorize=True, strategy="forward-mode")
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM", "GRUCell", "LSTMCell"])
def test_traced_with_symbolic_sizes(name):
    """By make_fx, of weights as well."""
    module = getattr(fused_rnn, name)(4, 5)

    def output(parameters, x):
        return flat(functional_call(module, parameters, (x,)))[0]

    parameters, size = dict(module.named_parameters()), () if name.endswith("Cell") else (6,)
    traced = make_fx(output, tracing_mode="symbolic")(parameters, torch.randn(*size, 7, 4))
    x = torch.randn(*(9 for _ in size), 2, 4)
    torch.testing.assert_close(traced(parameters, x), output(parameters, x))


def options_of(variant: str) -> dict:
    return {} if variant.endswith("_cell") else {"num_layers": 2, "bidirectional": True}


def pair_of(make, variant: str, dtype: torch.dtype = torch.float64, **options):
    module, theirs = make.pair(variant, **(options or options_of(variant)))
    return module.to(dtype), theirs.to(dtype)


def args_of(module, with_hx: bool = False, **sizes):
    dtype = next(module.parameters()).dtype
    return Inputs(module, with_hx, dtype=dtype, **sizes).args


def exactly(dtype: torch.dtype) -> dict[str, float]:
    return EXACT if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}


def loss_function(module):
    """(parameters, arguments...) -> the loss."""
    return lambda parameters, *args: loss_of(functional_call(module, parameters, args))


def grads_of(module, *args) -> dict[str, Tensor]:
    module.zero_grad()
    loss_of(module(*args)).backward()
    return {name: p.grad.clone() for name, p in module.named_parameters()}


@every_hx
def test_vmap_over_a_batch(variant, with_hx, make):
    module, theirs = pair_of(make, variant)
    batch = [args_of(module, with_hx) for _ in range(3)]
    stacked = torch.utils._pytree.tree_map(lambda *t: torch.stack(t), *batch)
    results = vmap(lambda *args: tuple(flat(module(*args))))(*stacked)
    for i, args in enumerate(batch):
        near([r[i] for r in results], theirs(*args), **EXACT)


def test_vmap_over_parameters(variant, make):
    """An ensemble: stack_module_state, and one call for all of its members."""
    members = [make(variant).double() for _ in range(3)]
    for i, member in enumerate(members):
        with torch.no_grad():
            for p in member.parameters():
                p.mul_(1 + i / 4)
    parameters, buffers = stack_module_state(members)
    skeleton = copy.deepcopy(members[0]).to("meta")
    args = args_of(members[0])

    def call(parameters, buffers):
        return tuple(flat(functional_call(skeleton, (parameters, buffers), args)))

    results = vmap(call)(parameters, buffers)
    for i, member in enumerate(members):
        near([r[i] for r in results], member(*args), **EXACT)


def test_vmap_with_randomness(make):
    """Dropout between layers under vmap: torch's rules for it hold."""
    module = make("gru", num_layers=2, dropout=0.5).double()
    batch = torch.randn(3, 6, 7, 3, dtype=torch.float64)[:1].expand(3, -1, -1, -1)
    different = vmap(lambda x: module(x)[0], randomness="different")(batch)
    same = vmap(lambda x: module(x)[0], randomness="same")(batch)
    assert not torch.equal(different[0], different[1])
    assert torch.equal(same[0], same[1])


@every_hx
def test_grad_with_respect_to_parameters(variant, with_hx, make):
    module, theirs = pair_of(make, variant)
    args = args_of(module, with_hx)
    actual = grad(loss_function(module))(parameters_of(module), *args)
    near(actual, grads_of(theirs, *args), **EXACT)


def test_per_sample_gradients(variant, make):
    module, theirs = pair_of(make, variant)
    batch = [args_of(module, batch=1) for _ in range(3)]
    stacked = torch.stack([args[0] for args in batch])
    function = vmap(grad(loss_function(module)), in_dims=(None, 0))
    actual = function(parameters_of(module), stacked)
    for i, args in enumerate(batch):
        near({k: v[i] for k, v in actual.items()}, grads_of(theirs, *args), **EXACT)


@every_hx
def test_vjp(variant, with_hx, make):
    module, theirs = pair_of(make, variant)
    args = args_of(module, with_hx)
    outputs, pull_back = vjp(lambda *args: tuple(flat(module(*args))), *args)
    cotangents = tuple(torch.randn_like(o) for o in outputs)
    actual = pull_back(cotangents)
    inputs = torch.utils._pytree.tree_map(lambda t: t.clone().requires_grad_(), args)
    expected = torch.autograd.grad(flat(theirs(*inputs)), flat(inputs), cotangents)
    near(actual, expected, **EXACT)


def differences(function, args, tangents, step: float = 1e-6):
    """The directional derivative, by central differences."""
    parts, spec = torch.utils._pytree.tree_flatten(args)

    def at(sign):
        moved = [a + sign * step * t for a, t in zip(parts, tangents, strict=True)]
        return flat(function(*torch.utils._pytree.tree_unflatten(moved, spec)))

    with torch.no_grad():
        return [(a - b) / (2 * step) for a, b in zip(at(1), at(-1), strict=True)]


def test_jvp(variant, make):
    """Compared with differences: torch.nn has no forward mode for some cells."""
    module, theirs = pair_of(make, variant)
    args = args_of(module, True)
    parts, spec = torch.utils._pytree.tree_flatten(args)
    tangents = [torch.randn_like(a) for a in parts]
    outputs, actual = jvp(
        lambda *args: tuple(flat(module(*args))),
        args,
        torch.utils._pytree.tree_unflatten(tangents, spec),
    )
    near(outputs, theirs(*args), **EXACT)
    near(actual, differences(theirs, args, tangents), rtol=1e-5, atol=1e-7)


def test_forward_ad(variant, make):
    module, theirs = pair_of(make, variant)
    (x,) = args_of(module)
    tangent = torch.randn_like(x)
    with forward_ad.dual_level():
        outputs = flat(module(forward_ad.make_dual(x, tangent)))
        actual = [forward_ad.unpack_dual(o).tangent for o in outputs]
    near(actual, differences(theirs, (x,), [tangent]), rtol=1e-5, atol=1e-7)


def test_jacrev_and_jacfwd(variant, make):
    """The whole Jacobian, row by row by backward, and column by column forward."""
    module, theirs = pair_of(make, variant)
    (x,) = args_of(module, timesteps=2, batch=2)
    expected = torch.autograd.functional.jacobian(lambda x: flat(theirs(x))[0], x)
    near(jacrev(lambda x: flat(module(x))[0])(x), expected, **EXACT)
    near(jacfwd(lambda x: flat(module(x))[0])(x), expected, **EXACT)


def test_hessian(variant, make):
    module, theirs = pair_of(make, variant, **({} if variant.endswith("_cell") else {"bias": True}))
    (x,) = args_of(module, timesteps=2, batch=1)
    expected = torch.autograd.functional.hessian(lambda x: loss_of(theirs(x)), x)
    near(hessian(lambda x: loss_of(module(x)))(x), expected, **EXACT)


@pytest.mark.parametrize("with_hx", [False, True], ids=["zeros", "hx"])
def test_gradcheck_and_gradgradcheck(variant, with_hx, make):
    module, _ = pair_of(make, variant)
    args = args_of(module, with_hx, timesteps=3, batch=2)
    parts, spec = torch.utils._pytree.tree_flatten(args)
    parts = [t.requires_grad_() for t in parts]

    def function(*parts):
        return tuple(flat(module(*torch.utils._pytree.tree_unflatten(parts, spec))))

    assert gradcheck(function, parts, fast_mode=True)
    assert gradgradcheck(function, parts, fast_mode=True)


def test_functional_call_under_grad_of_grad(layer, make):
    """A step of meta-learning: gradients through a gradient step."""
    module, theirs = pair_of(make, layer)
    args = args_of(module)
    results = []
    for owner in (module, theirs):
        parameters = {k: p.requires_grad_() for k, p in copy.deepcopy(parameters_of(owner)).items()}
        loss = loss_of(functional_call(owner, parameters, args))
        first = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
        moved = {k: p - 0.1 * g for (k, p), g in zip(parameters.items(), first, strict=True)}
        loss = loss_of(functional_call(owner, moved, args))
        results.append(torch.autograd.grad(loss, list(parameters.values())))
    near(*results, **EXACT)


@every_dtype
@every_hx
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(variant, use_reentrant, with_hx, dtype, make):
    module, theirs = pair_of(make, variant, dtype)
    args = args_of(module, with_hx)

    def call(*args):
        parts, spec = torch.utils._pytree.tree_flatten(args)
        return checkpoint(
            lambda *parts: tuple(flat(module(*torch.utils._pytree.tree_unflatten(parts, spec)))),
            *parts,
            use_reentrant=use_reentrant,
        )

    near(train_step(call, module, *args), train_step(theirs, theirs, *args), **exactly(dtype))


@every_dtype
def test_selective_checkpoint(layer, dtype, make):
    """What is saved is chosen operator by operator; a layer is one of them."""
    module, theirs = pair_of(make, layer, dtype)
    (x,) = args_of(module)

    def contexts():
        return create_selective_checkpoint_contexts([torch.ops.fused_rnn.layer_forward.default])

    def call(x):
        return checkpoint(
            lambda x: tuple(flat(module(x * 2))), x, use_reentrant=False, context_fn=contexts
        )

    near(
        train_step(call, module, x),
        train_step(lambda x: theirs(x * 2), theirs, x),
        **exactly(dtype),
    )


@every_dtype
@every_hx
def test_save_on_cpu(variant, with_hx, dtype, make):
    module, theirs = pair_of(make, variant, dtype)
    args = args_of(module, with_hx)

    def call(*args):
        with torch.autograd.graph.save_on_cpu():
            return module(*args)

    near(train_step(call, module, *args), train_step(theirs, theirs, *args), **exactly(dtype))


@every_dtype
@every_hx
def test_saved_tensor_hooks(variant, with_hx, dtype, make):
    """What is saved goes out as other bytes, and comes back as another tensor."""
    module, theirs = pair_of(make, variant, dtype)
    args = args_of(module, with_hx)
    packed = []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor.detach().numpy().copy() if tensor.numel() else tensor

    def unpack(value):
        return value if isinstance(value, Tensor) else torch.from_numpy(value.copy())

    def call(*args):
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return module(*args)

    near(train_step(call, module, *args), train_step(theirs, theirs, *args), **exactly(dtype))
    assert packed


def times(factor, grads):
    """A pair of states inside the outputs is no tensor, and its place in `grads` is None."""
    return tuple(None if g is None else factor * g for g in grads)


@every_dtype
@every_hx
def test_full_backward_hooks(variant, with_hx, dtype, make):
    """What they see, and what they put in its place."""
    module, theirs = pair_of(make, variant, dtype)
    args = args_of(module, with_hx)
    results = []
    for owner in (module, theirs):
        seen = []

        def pre_hook(owner, after, seen=seen):
            seen.extend(after)
            return times(2, after)

        def hook(owner, before, after, seen=seen):
            seen.extend([*before, *after])
            return times(3, before)

        owner.register_full_backward_pre_hook(pre_hook)
        owner.register_full_backward_hook(hook)
        results.append([*train_step(owner, owner, *args), *flat(seen)])
    assert len(results[0]) > len(flat(module(*args))) + 1
    near(*results, **exactly(dtype))


@every_dtype
@every_hx
def test_gradient_hooks_and_retained_gradients(variant, with_hx, dtype, make):
    module, theirs = pair_of(make, variant, dtype)
    args = args_of(module, with_hx)
    results = []
    for owner in (module, theirs):
        seen = []
        for p in owner.parameters():
            p.register_hook(lambda g: 2 * g)
            p.register_post_accumulate_grad_hook(lambda p, seen=seen: seen.append(p.grad.clone()))
        outputs = flat(owner(*args))
        # torch.nn's LSTMCell computes h from the very c that it returns: another gradient.
        watched = outputs[:1] if variant == "lstm_cell" else outputs
        for output in watched:
            output.retain_grad()
            output.register_hook(lambda g: g + 1)
        loss_of(outputs).backward()
        seen.sort(key=lambda t: (t.shape, t.sum().item()))
        results.append([*seen, *(o.grad for o in watched), *(p.grad for p in owner.parameters())])
    doubled = {"rtol": 1e-8, "atol": 1e-10}  # the sums of gradients lose a digit
    near(*results, **(doubled if dtype == torch.float64 else exactly(dtype)))


@every_dtype
@every_hx
def test_partial_inputs(variant, with_hx, dtype, make):
    """torch.autograd.grad for one tensor at a time, others left without."""
    module, theirs = pair_of(make, variant, dtype)
    args = torch.utils._pytree.tree_map(lambda t: t.requires_grad_(), args_of(module, with_hx))
    for name in ("args", *dict(module.named_parameters())):
        wanted = [
            flat(args) if name == "args" else [owner.get_parameter(name)]
            for owner in (module, theirs)
        ]
        results = [
            torch.autograd.grad(loss_of(owner(*args)), each)
            for owner, each in zip((module, theirs), wanted, strict=True)
        ]
        near(*results, **exactly(dtype))
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("how", ["is_grads_batched", "vmap"])
def test_several_gradients_at_once(variant, how, dtype, make):
    """A Jacobian by one backward for many cotangents, of an output from outside of vmap."""
    module, theirs = (each.to(dtype) for each in make.pair(variant))
    args = torch.utils._pytree.tree_map(
        lambda t: t.requires_grad_(), Inputs(module, True, dtype=dtype).args
    )
    results = []
    for owner in (module, theirs):
        y = flat(owner(*args))[0]
        cotangents = torch.eye(y.numel(), dtype=dtype)[:5].view(-1, *y.shape)
        wanted = [*flat(args), *owner.parameters()]

        def pull(g, y=y, wanted=wanted, **options):
            return torch.autograd.grad(y, wanted, g, True, allow_unused=True, **options)

        if owner is theirs:
            each = [pull(g) for g in cotangents]
            results.append(
                [None if g[0] is None else torch.stack(g) for g in zip(*each, strict=True)]
            )
        elif how == "vmap":
            results.append(vmap(pull)(cotangents))
        else:
            results.append(pull(cotangents, is_grads_batched=True))
    near(*results)


@every_dtype
def test_repeated_backward_per_timestep(layer, dtype, make):
    """retain_graph: the gradient of every timestep's output by itself."""
    module, theirs = pair_of(make, layer, dtype, num_layers=2)
    (x,) = args_of(module)
    results = []
    for owner in (module, theirs):
        leaf = x.clone().requires_grad_()
        y = owner(leaf)[0]
        results.append(
            [torch.autograd.grad(step.sin().sum(), leaf, retain_graph=True)[0] for step in y]
        )
    near(*results, **exactly(dtype))


@every_dtype
@every_hx
def test_anomaly_mode_and_determinism(variant, with_hx, dtype, make):
    module, theirs = pair_of(make, variant, dtype)
    args = args_of(module, with_hx)
    expected = train_step(theirs, theirs, *args)
    with torch.autograd.set_detect_anomaly(True):
        near(train_step(module, module, *args), expected, **exactly(dtype))
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (train_step(module, module, *args) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    near(first, expected, **exactly(dtype))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_dtype
@every_hx
def test_inference_mode(variant, with_hx, dtype, make):
    module, theirs = pair_of(make, variant, dtype)
    args = args_of(module, with_hx)
    with torch.inference_mode():
        outputs = module(*args)
    assert all(leaf.is_inference() for leaf in flat(outputs))
    near(outputs, theirs(*args), **exactly(dtype))

"""Mixed precision: autocast by the rule of nn.Linear, GradScaler, modules in a half type."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.inputs import HALVES
from helpers.outcomes import flat
from toolkit import Inputs, loss_of, near
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from fused_rnn.testing import assert_near, relative_error

every_half = pytest.mark.parametrize("half", HALVES, ids=["bfloat16", "float16"])
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")


def layer_options(variant: str) -> dict:
    return {} if variant.endswith("_cell") else {"num_layers": 2, "bidirectional": True}


def no_worse_than_rounding(actual, exact, half: torch.dtype) -> None:
    """`actual` is what rounding inputs, weights and results to `half` explains: the states run in
    float32, so that errors do not grow with time."""
    eps = torch.finfo(half).eps
    for got, expected in zip(flat(actual), flat(exact), strict=True):
        assert_near("result", got, expected, 8 * eps, 16 * eps)


@every_half
@pytest.mark.parametrize("with_hx", [False, True], ids=["zeros", "hx"])
def test_autocast(variant, half, with_hx, make):
    """Outputs and states come in autocast's dtype, gradients in the parameters'."""
    module = make(variant, **layer_options(variant))
    exact = copy.deepcopy(module).double()
    inputs = Inputs(module, with_hx, timesteps=20)
    with torch.autocast("cpu", half):
        outputs = module(*inputs.args)
        linear = torch.nn.functional.linear(inputs.args[0], torch.ones(1, 3))
    assert {leaf.dtype for leaf in flat(outputs)} == {half, linear.dtype}
    truth = exact(*torch.utils._pytree.tree_map(lambda t: t.double(), inputs.args))
    no_worse_than_rounding(outputs, truth, half)
    loss_of([leaf.float() for leaf in flat(outputs)]).backward()
    loss_of(truth).backward()
    for (name, p), q in zip(module.named_parameters(), exact.parameters(), strict=True):
        assert p.grad.dtype == torch.float32
        assert relative_error(p.grad, q.grad) < 32 * torch.finfo(half).eps, name


@every_half
def test_autocast_of_packed_rows(layer, half, make):
    module = make(layer, bidirectional=True)
    exact = copy.deepcopy(module).double()
    packed = pack_sequence([torch.randn(n, 3) for n in (9, 4, 1)])
    with torch.autocast("cpu", half):
        output, states = module(packed)
    assert output.data.dtype == half
    truth, exact_states = exact(PackedSequence(packed.data.double(), packed.batch_sizes))
    no_worse_than_rounding([output.data, states], [truth.data, exact_states], half)


def test_autocast_leaves_float64_alone(variant, make):
    module, theirs = make.pair(variant)
    module, theirs = module.double(), theirs.double()
    args = Inputs(module, True, dtype=torch.float64).args
    with torch.autocast("cpu", torch.bfloat16):
        outputs = module(*args)
    near(outputs, theirs(*args), rtol=1e-10, atol=1e-12)


@every_half
def test_module_in_a_half_type(variant, half, make):
    """Cast outright, forward and backward; the states still run in float32."""
    module = make(variant, **layer_options(variant)).to(half)
    exact = copy.deepcopy(module).double()
    args = Inputs(module, True, timesteps=50, dtype=half).args
    outputs = module(*args)
    assert {leaf.dtype for leaf in flat(outputs)} == {half}
    no_worse_than_rounding(
        outputs, exact(*torch.utils._pytree.tree_map(lambda t: t.double(), args)), half
    )
    loss_of([leaf.float() for leaf in flat(outputs)]).backward()
    assert {p.grad.dtype for p in module.parameters()} == {half}
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_float64(variant, make):
    module, theirs = make.pair(variant, **layer_options(variant))
    module, theirs = module.double(), theirs.double()
    args = Inputs(module, True, dtype=torch.float64).args
    near(module(*args), theirs(*args), rtol=1e-10, atol=1e-12)


def test_grad_scaler(layer, make):
    """Scaled losses, unscaled gradients, and steps left out when a gradient overflows."""
    module, theirs = make.pair(layer, num_layers=2)
    weights = []
    for owner, scaled in ((module, True), (theirs, False)):
        torch.manual_seed(4)
        optimizer = torch.optim.SGD(owner.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, enabled=scaled)
        for step in range(4):
            (x,) = Inputs(owner).args
            with torch.autocast("cpu", torch.bfloat16, enabled=False):
                loss = loss_of(owner(x)) / 100
            if step == 2 and scaled:
                before = [p.detach().clone() for p in owner.parameters()]
                scaler.scale(loss * torch.inf).backward()
                scaler.step(optimizer)
                scaler.update()
                assert scaler.get_scale() == 2.0**13
                near(list(owner.parameters()), before, rtol=0, atol=0)
                optimizer.zero_grad()
                loss = loss_of(owner(x)) / 100
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(owner.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        weights.append([p.detach() for p in owner.parameters()])
    near(*weights)


@pytest.mark.costly
@every_half
def test_training_under_autocast_learns(layer, half, make):
    """The sum of a sequence, as well as in float32."""
    losses = []
    for enabled in (False, True):
        module = make(layer)
        head = torch.nn.Linear(module.proj_size or 5, 1)
        parameters = [*module.parameters(), *head.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=0.02)
        scaler = torch.amp.GradScaler("cpu", enabled=enabled and half == torch.float16)
        torch.manual_seed(9)
        for _ in range(60):
            x = torch.randn(5, 32, 3)
            with torch.autocast("cpu", half, enabled=enabled):
                prediction = head(module(x)[0][-1]).float()
            loss = (prediction.squeeze(-1) - x.sum((0, 2)).tanh()).square().mean()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        losses.append(loss.item())
    assert losses[1] < 1.2 * losses[0] + 0.02


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@every_half
def test_autocast_on_cuda(variant, half, make):
    module = make(variant, **layer_options(variant)).cuda()
    exact = copy.deepcopy(module).double()
    args = torch.utils._pytree.tree_map(lambda t: t.cuda(), Inputs(module, True).args)
    with torch.autocast("cuda", half):
        outputs = module(*args)
    assert {leaf.dtype for leaf in flat(outputs)} == {half}
    truth = exact(*torch.utils._pytree.tree_map(lambda t: t.double(), args))
    no_worse_than_rounding(outputs, truth, half)

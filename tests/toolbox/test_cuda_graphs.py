"""CUDA: graphs, streams, no synchronisation with the host, several devices, 64-bit offsets.

Not run by CI, which has no GPU.
"""

from __future__ import annotations

import pytest
import torch
from helpers.outcomes import flat
from toolkit import Inputs, loss_of, near, train_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture
def on_gpu(make):
    def build(variant: str, **options):
        module, theirs = make.pair(variant, **options)
        return module.cuda(), theirs.cuda()

    return build


def gpu_args(module, with_hx: bool = False, **sizes):
    args = Inputs(module, with_hx, **sizes).args
    return torch.utils._pytree.tree_map(lambda t: t.cuda(), args)


def test_captured_forward_and_backward(variant, on_gpu):
    """Replayed on new inputs, a graph gives what a call gives."""
    module, theirs = on_gpu(variant)
    args = torch.utils._pytree.tree_map(lambda t: t.requires_grad_(), gpu_args(module, True))

    def step():
        for t in (*flat(args), *module.parameters()):
            t.grad = None
        outputs = module(*args)
        loss_of(outputs).backward()
        return flat(outputs)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    grads = [t.grad for t in flat(args)] + [p.grad for _, p in sorted(module.named_parameters())]
    for _ in range(3):
        with torch.no_grad():
            for t in flat(args):
                t.normal_()
        graph.replay()
        near([*outputs, *grads], train_step(theirs, theirs, *args))


def test_make_graphed_callables(layer, on_gpu):
    module, theirs = on_gpu(layer, num_layers=2)
    (x,) = gpu_args(module)
    graphed = torch.cuda.make_graphed_callables(module, (x.clone().requires_grad_(),))
    for _ in range(3):
        x = torch.randn_like(x)
        near(train_step(graphed, module, x), train_step(theirs, theirs, x))


def test_no_synchronisation_with_the_host(variant, on_gpu):
    module, _ = on_gpu(variant)
    args = gpu_args(module, True)
    train_step(module, module, *args)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(module, module, *args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_no_synchronisation_where_masks_are_on_the_device(layer, on_gpu):
    """Nobody waits to learn what lengths and resets say."""
    module, _ = on_gpu(layer, bidirectional=True)
    (x,) = gpu_args(module)
    masks = {
        "lengths": torch.arange(x.shape[1], device="cuda").clamp(max=x.shape[0]),
        "resets": torch.rand(x.shape[:2], device="cuda") < 0.3,
    }
    train_step(lambda x: module(x, **masks), module, x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(lambda x: module(x, **masks), module, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_sync_debug_mode_finds_what_waits(on_gpu):
    """So that the tests above can fail."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones(1, device="cuda").item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_side_streams(variant, on_gpu):
    """Work waits for its inputs on whatever stream it is given, and on no other."""
    module, theirs = on_gpu(variant)
    streams = [torch.cuda.Stream() for _ in range(3)]
    expected, actual = [], []
    for stream in streams:
        args = gpu_args(module, True)
        expected.append(train_step(theirs, theirs, *args))
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            late = torch.utils._pytree.tree_map(lambda t: t * 1, args)
            actual.append([t.clone() for t in train_step(module, module, *late)])
        torch.cuda.synchronize()
    near(actual, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one(variant, on_gpu):
    module, theirs = on_gpu(variant)
    module, theirs = module.to("cuda:1"), theirs.to("cuda:1")
    args = torch.utils._pytree.tree_map(lambda t: t.to("cuda:1"), gpu_args(module, True))
    assert torch.cuda.current_device() == 0
    near(train_step(module, module, *args), train_step(theirs, theirs, *args))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hidden", "batch", "timesteps"),  # of 4 * hidden * batch * timesteps gates, 2.3e9
    [pytest.param(1024, 512, 1100, id="wide"), pytest.param(128, 4096, 1100, id="many_rows")],
)
def test_64_bit_offsets(library, hidden, batch, timesteps):
    """Gates of more than 2^31 elements: the last rows are what a short run of them gives."""
    needed = 60 * 2**30
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip("needs 60 GiB of GPU memory")
    module = library.LSTM(8, hidden).cuda()
    x = torch.randn(timesteps, batch, 8, device="cuda", requires_grad=True)
    y, _ = module(x)
    y[-1].sum().backward()
    with torch.no_grad():
        _, hx = module(x[: timesteps - 10])
    tail = x[timesteps - 10 :].detach().requires_grad_()
    y_tail, _ = module(tail, hx)
    y_tail[-1].sum().backward()
    near([y[-10:], x.grad[timesteps - 10 :]], [y_tail, tail.grad])

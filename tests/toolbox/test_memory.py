"""No leaks, no reference cycles around activations; Python threads; loaders that fork and spawn."""

from __future__ import annotations

import gc
import os
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers.outcomes import flat
from toolkit import Inputs, loss_of


@pytest.fixture
def no_collector():
    """What is not freed by counting references stays."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_nothing_holds_activations(variant, make, no_collector):
    """Saved tensors go with the outputs, without the garbage collector, after backward or none."""
    module = make(variant)
    for with_backward in (True, False):
        args = torch.utils._pytree.tree_map(lambda t: t.requires_grad_(), Inputs(module, True).args)
        watched = []

        def watch(tensor, watched=watched):
            held = tensor.detach()  # an output itself would hold its own graph
            watched.append(weakref.ref(held))
            return held

        with torch.autograd.graph.saved_tensors_hooks(watch, lambda tensor: tensor):
            outputs = flat(module(*args))
        assert watched
        watched += [weakref.ref(t) for t in (*outputs, *flat(args))]
        if with_backward:
            loss_of(outputs).backward()
        del args, outputs
        assert not [ref() for ref in watched if ref() is not None]


def test_nothing_holds_activations_after_an_error(layer, make, no_collector):
    module = make(layer)
    (x,) = Inputs(module).args
    x.requires_grad_()
    y = flat(module(x))[0]
    y.register_hook(lambda grad: (_ for _ in ()).throw(KeyError("stop")))
    with pytest.raises(KeyError):
        y.sum().backward()
    watched = [weakref.ref(x), weakref.ref(y)]
    del x, y
    gc.collect()  # a traceback is a cycle of its own
    assert not [ref() for ref in watched if ref() is not None]


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.costly
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    "steps", [pytest.param(150, id="150"), pytest.param(10_000, id="10000", marks=pytest.mark.slow)]
)
def test_no_leak_in_training(variant, steps, make):
    """What many steps would leave behind is tens of megabytes; the allocator's noise is less."""
    module = make(variant)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)

    def step():
        # 40 KB and more a step for each of x, y, and what is saved.
        args = torch.utils._pytree.tree_map(
            lambda t: t.repeat(*[1] * (t.dim() - 2), 50, 1), Inputs(module, True).args
        )
        optimizer.zero_grad()
        loss_of(module(*args)).backward()
        optimizer.step()

    for _ in range(50):
        step()
    gc.collect()
    objects, before = len(gc.get_objects()), resident()
    for _ in range(steps):
        step()
    gc.collect()
    assert len(gc.get_objects()) - objects < 100
    assert resident() - before < 8 * 2**20


def test_eight_python_threads(layer, make):
    """Forward and backward at once, on one module: to each thread the bits it gets alone."""
    module = make(layer, num_layers=2, bidirectional=True)

    def step(seed):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(20, 9, 3, generator=generator, requires_grad=True)
        outputs = flat(module(x))
        return [*outputs, *torch.autograd.grad(loss_of(outputs), [x, *module.parameters()])]

    alone = [step(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for actual, expected in zip(pool.map(step, range(8)), alone, strict=True):
                assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


class Windows(torch.utils.data.Dataset):
    """Runs a layer in the worker, as one that makes features does."""

    def __init__(self, layer):
        self.layer = layer

    def __len__(self):
        return 6

    def __getitem__(self, index):
        with torch.no_grad():
            return self.layer(torch.full((5, 2, 3), float(index)))[0]


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_data_loader_workers(start, num_threads, library):
    """Workers made after the library was used, with several threads, in this process."""
    layer = library.GRU(3, 64)
    num_threads(2)
    big = torch.randn(30, 64, 3)
    layer(big)[0].sum().backward()
    dataset = Windows(layer)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=2, num_workers=2, multiprocessing_context=start, timeout=600
    )
    batches = list(loader)
    assert len(batches) == 3
    torch.testing.assert_close(torch.cat(batches), torch.stack([dataset[i] for i in range(6)]))
    layer(big)[0].sum().backward()

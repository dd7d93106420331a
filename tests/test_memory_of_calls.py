"""The memory of calls: written before it is read, and kept from one to the next."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from helpers.outcomes import assert_same_bits

pytestmark = pytest.mark.usefixtures("cpu_backend")
needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc")


def output_of(script, **environment):
    """What a fresh process prints."""
    folder = os.path.dirname(__file__)
    path = os.pathsep.join((os.path.dirname(folder), folder))
    environment = os.environ | {"PYTHONPATH": path} | environment
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def large_layer(timesteps):
    """One whose gates are of 32 MiB from 1024 timesteps on: memory that waits for the next."""
    shapes = {"x": (timesteps, 32, 8), "h0": (1, 32, 64), "c0": (1, 32, 64)}
    arguments = {name: torch.randn(shape) for name, shape in shapes.items()}
    weights = [torch.randn(256, 8), torch.randn(256, 64) / 8, torch.randn(256), torch.randn(256)]
    return arguments | {"cell": 3, "weights": weights, "batch_sizes": None, "directions": 1}


def large_gradients(arguments, saved):
    y, h_n, c_n, gates, cells = saved
    grads = {"grad_y": y, "grad_h_n": h_n, "grad_c_n": c_n, "needs": 0b1111111}
    return torch.ops.fused_rnn_cpu.train_layer_backward(
        **arguments, **grads, y=y, gates=gates, cells=cells
    )


@pytest.mark.skipif(
    torch.__version__ < "2.11", reason="torch 2.10 makes no tensor of memory that comes back"
)
def test_memory_of_large_gates_comes_back():
    forward = torch.ops.fused_rnn_cpu.train_layer
    large, smaller, small = map(large_layer, (1100, 1024, 900))
    saved = forward(**large)
    address = saved[3].data_ptr()
    expected = large_gradients(large, saved)
    other = forward(**large)
    assert other[3].data_ptr() != address, "the gates of a step whose backward is to come"
    assert_same_bits(large_gradients(large, saved), expected)
    del other
    saved[3].fill_(float("nan"))  # what a call leaves there the next one must not read
    del saved
    addresses = set()
    for arguments in (smaller, large):
        saved = forward(**arguments)
        addresses.add(saved[3].data_ptr())
        grads = large_gradients(arguments, saved)
        assert all(torch.isfinite(g).all() for g in grads)
        del saved
    assert_same_bits(grads, expected)
    assert address in addresses
    assert forward(**small)[3].data_ptr() not in addresses


UNWRITTEN = """
import torch, fused_rnn
from helpers.inputs import states
from helpers.outcomes import run
for cell, suffix, sizes in (("gru", "", (7, 3)), ("lstm", "", (7, 3)), ("rnn_tanh", "", (7, 3)),
                            ("lstm", "Cell", (3,)), ("gru", "Cell", (3,))):
    torch.manual_seed(0)
    name = cell.split("_")[0].upper() + suffix
    module = getattr(fused_rnn, name)(5, 17)
    x = torch.randn(*sizes, 5)
    hx = states(cell, *(() if suffix else (1,)), 3, 17)
    for each in (None, hx):
        for t in run(module, x, each):
            print(hash(t.detach().numpy().tobytes()))
"""


def test_all_memory_is_written():
    """The same bits whatever fresh memory holds: glibc fills it with a byte that it is told."""
    found = {
        output_of(UNWRITTEN, MALLOC_PERTURB_=byte, PYTHONHASHSEED="0") for byte in ("85", "170")
    }
    assert len(found) == 1 and "\n" in found.pop()


# y and the gradient of x are 16 MiB each, 8192 pages of 4 KiB in all.
STEPS = """
import resource, torch, fused_rnn
layer = fused_rnn.RNN(128, 128)
x, grad_y = torch.randn(2, 512, 64, 128)
x.requires_grad_()
for step in range(13):
    if step == 3:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.autograd.grad(layer(x)[0], [x, *layer.parameters()], grad_y)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@needs_glibc
def test_freed_memory_stays_for_the_next_step():
    pages = int(output_of(STEPS)) / 10
    assert pages < 4000, "every step took fresh memory"

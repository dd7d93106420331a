"""Nobody waits for a device to learn what lengths, resets or packed rows are.

Without a GPU, on torch's meta device: its tensors have no values, so that whoever asks for one
gets an error. What meta allows and a GPU waits for is a copy from the host that is not told to be
asynchronous: `Asynchronous` sees those. With a GPU, CUDA says what waits.
"""

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import fused_rnn
from fused_rnn import ops, testing
from fused_rnn.backends import cuda_arguments
from fused_rnn.cells import CELLS
from fused_rnn.layer_call import make_problem
from fused_rnn.problem import Masks, Rows
from fused_rnn.testing import LayerCase


class Asynchronous(TorchDispatchMode):
    """Within it a copy between the host and a device is an error, unless the host goes on."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [t for t in (*args, result) if isinstance(t, torch.Tensor)]
        copies = function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        if copies and len({t.device.type for t in tensors}) > 1:
            in_place = function.overloadpacket is torch.ops.aten.copy_ and len(args) > 2
            assert args[2] if in_place else (kwargs or {}).get("non_blocking"), "the host waits"
        return result


def on_meta(tree):
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), tree)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x, mask: x.sum().item(),
        lambda x, mask: bool(mask.any()),
        lambda x, mask: x[mask],
        lambda x, mask: mask.nonzero(),
        lambda x, mask: x.cpu(),
        lambda x, mask: torch.ones(3).to(x.device),
        lambda x, mask: x.copy_(torch.ones(3)),
        lambda x, mask: torch.repeat_interleave(x, mask.long()),
    ],
)
def test_what_waits_is_seen(wait):
    """So that the tests below can fail."""
    with pytest.raises((AssertionError, RuntimeError)), Asynchronous():
        wait(torch.ones(3, device="meta"), torch.ones(3, dtype=torch.bool, device="meta"))


def test_what_does_not_wait_is_not_taken_for_it():
    with Asynchronous():
        torch.ones(3).to("meta", non_blocking=True)
        torch.ones(3, device="meta").copy_(torch.ones(3), True)


CASES = {
    "lengths": {"ends": (4, 0, 2)},
    "resets": {"resets": True},
    "all": {"ends": (4, 0, 2), "resets": True, "reset_states": True, "directions": 2},
    "packed": {"lengths": (4, 2, 2), "directions": 2},
    "projected": {"proj_size": 2, "ends": (4, 0, 2), "resets": True, "states": True},
}


@pytest.mark.parametrize("form", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda t: str(t)[6:])
@pytest.mark.parametrize("cell", CELLS)
def test_reference(cell, dtype, form):
    """Its scans, and the products around them, which are every backend's."""
    if form == "projected" and not CELLS[cell].has_c:
        pytest.skip("a projection is LSTM's")
    case = LayerCase(cell, 4, 3, 5, 6, dtype=dtype, **CASES[form])
    inputs, grads = testing.make_inputs(case), on_meta(testing.make_cotangents(case))
    sizes = inputs.batch_sizes
    args = on_meta(inputs.forward_args(True, "reference"))
    args = (*args[:4], sizes, *args[5:])  # which are on the CPU wherever the rows are
    with Asynchronous():
        y, _, _, gates, cells = ops._forward_impl(*args)
        needs = inputs.given
        found = ops._backward_impl(
            *map(grads.get, testing.OUTPUT_NAMES), *args[:9], y, gates, cells, cell, needs,
            case.states, False, "reference",
        )  # fmt: skip
    assert y.is_meta
    assert [grad.numel() > 0 for grad in found] == needs


def test_lengths_that_are_on_the_cpu_are_sent():
    layer = fused_rnn.GRU(3, 4, bidirectional=True, device="meta")
    x, lengths = torch.randn(5, 3, 3, device="meta"), torch.tensor([5, 0, 2], dtype=torch.int32)
    with Asynchronous():
        y, _ = layer(x, lengths=lengths, resets=torch.zeros(5, 3, dtype=torch.bool))
        y.sum().backward()


OPTIONS = [
    {"layer_norm": True},
    {"peepholes": True},
    {"recurrent_dropout": 0.3, "zoneout": (0.1, 0.2)},
    {"layer_norm": True, "recompute": True, "zoneout": 0.1, "num_layers": 2},
]


@pytest.mark.parametrize("form", ["lengths", "resets", "packed"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o))
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_more_in_the_recurrence(options, form, training):
    layer = fused_rnn.LSTM(3, 4, bidirectional=True, device="meta", **options).train(training)
    x, given = torch.randn(5, 3, 3, device="meta", requires_grad=True), {}
    if form == "lengths":
        given = {"lengths": torch.tensor([5, 0, 2]).to("meta")}
    if form == "resets":
        given = {"resets": torch.zeros(5, 3, dtype=torch.bool, device="meta")}
        given["reset_hx"] = (torch.zeros(layer.num_layers * 2, 3, 4, device="meta"),) * 2
    rows = packed_on("meta", x) if form == "packed" else x
    with Asynchronous():
        y, (h, c) = layer(rows, **given)
        loss = (y.data if form == "packed" else y).sum() + h.sum() + c.sum()
        loss.backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def packed_on(device, x):
    """Rows of other lengths than the padded ones, in any order, with a gradient."""
    host = pack_sequence([torch.zeros(n, 1) for n in (2, 5, 4)], enforce_sorted=False)
    data = x.flatten(0, 1)[: host.data.shape[0]]
    orders = (order.to(device) for order in (host.sorted_indices, host.unsorted_indices))
    return PackedSequence(data, host.batch_sizes, *orders)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("form", ["lengths", "packed"])
def test_arguments_of_the_kernels(cell, form):
    """What the host makes for a launch."""
    pytest.importorskip("triton")
    from fused_rnn.backends.triton import launch

    like, cells = torch.zeros(9, 4, device="meta"), CELLS[cell]
    masks = None
    if form == "lengths":
        resets = torch.zeros(3, 3, dtype=torch.bool, device="meta")
        masks = Masks(torch.ones(3, dtype=torch.int64, device="meta"), resets)
    sizes = torch.tensor([4, 3, 2]) if form == "packed" else None
    rows = Rows(3, 4 if form == "packed" else 3, sizes, 9, masks)
    problem = make_problem(
        cell, like[:3, None], like[:1, None], like[:1, None] if cells.has_c else None,
        [like[:1]] * 2, sizes, masks, True,
    )  # fmt: skip
    with Asynchronous():
        cuda_arguments.row_tensors(rows, like, torch.float32)
        launch.row_arguments(problem, rows, like.device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("form", ["lengths", "resets", "packed"])
@pytest.mark.parametrize("options", [{}, *OPTIONS], ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_on_a_gpu(backend, options, form):
    layer = fused_rnn.LSTM(3, 4, bidirectional=True, device="cuda", **options)
    x, given = torch.randn(5, 3, 3, device="cuda", requires_grad=True), {}
    if form == "lengths":
        given = {"lengths": torch.tensor([5, 0, 2], device="cuda")}
    if form == "resets":
        given = {"resets": torch.rand(5, 3, device="cuda") < 0.3}
    rows = packed_on("cuda", x) if form == "packed" else x

    def step():
        y, (h, c) = layer(rows, **given)
        ((y.data if form == "packed" else y).sum() + h.sum() + c.sum()).backward()

    with fused_rnn.backend(backend):
        step()  # compiles, and tells once of a slow backend
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(mode)

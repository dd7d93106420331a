"""What the host sends to a device: nobody waits, and a graph reads nothing that is gone."""

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

import fused_rnn
from fused_rnn import native
from fused_rnn.transfer import sent

TIMESTEPS, BATCH, INPUT, HIDDEN = 6, 3, 4, 5
CUDA = torch.device("cuda")


@pytest.fixture
def capture(monkeypatch):
    """A function that says whether a graph is captured. Tensors stay where they are."""
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, non_blocking: self)
    capturing = [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    return lambda on: capturing.__setitem__(0, on)


def test_a_copy_of_what_is_pinned_is_sent(capture, monkeypatch):
    mask = torch.tensor([3, 1])
    assert sent(mask, CUDA, "lengths") is mask  # the driver takes a copy of pageable memory
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: True)
    copy = sent(mask, CUDA, "lengths")
    assert copy is not mask and torch.equal(copy, mask)
    assert sent(mask, torch.device("cpu"), "lengths") is mask
    capture(True)
    assert sent(mask, CUDA, "lengths") is mask


def test_a_graph_reads_no_memory_that_may_be_gone(capture, monkeypatch):
    capture(True)
    mask = torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(RuntimeError, match=r"resets: a CUDA graph .* the host's pageable memory"):
        sent(mask, CUDA, "resets")
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: True)
    with pytest.raises(RuntimeError, match=r"resets: a CUDA graph .* the host's strided memory"):
        sent(mask.t()[1:], CUDA, "resets")
    on_device = torch.ones(2, device="meta")  # as where a tensor is on the GPU already
    assert sent(on_device, CUDA, "lengths") is on_device


gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@gpu
@needs_gpu
def test_masks_in_pinned_memory_may_change_after_the_call():
    layer = fused_rnn.GRU(INPUT, HIDDEN).cuda()
    x = torch.randn(TIMESTEPS, BATCH, INPUT, device="cuda")
    masks = {"lengths": torch.tensor([6, 2, 4]), "resets": torch.rand(TIMESTEPS, BATCH) < 0.3}
    expected, _ = layer(x, **masks)
    masks = {name: mask.pin_memory() for name, mask in masks.items()}
    torch.cuda._sleep(100_000_000)  # what is sent waits behind this
    y, _ = layer(x, **masks)
    for mask in masks.values():
        mask.zero_()
    assert torch.equal(y, expected)


@gpu
@needs_gpu
def test_a_captured_layer_follows_pinned_lengths():
    layer = fused_rnn.GRU(INPUT, HIDDEN).cuda()
    x = torch.randn(TIMESTEPS, BATCH, INPUT, device="cuda")
    lengths = torch.tensor([6, 2, 4]).pin_memory()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        layer(x, lengths=lengths)
        with torch.cuda.graph(graph):
            y, _ = layer(x, lengths=lengths)
        lengths.copy_(torch.tensor([1, 0, 3]))
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(y, layer(x, lengths=lengths)[0])


@gpu
@needs_gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_packed_sequences_are_not_captured(backend):
    if backend == "cuda" and (error := native.cuda_library_error()):
        pytest.skip(error)
    layer = fused_rnn.LSTM(INPUT, HIDDEN).cuda()
    rows = pack_sequence([torch.randn(n, INPUT, device="cuda") for n in (5, 3, 1)])
    with torch.no_grad(), fused_rnn.backend(backend):
        expected = layer(rows)[0].data
        graph = torch.cuda.graph(torch.cuda.CUDAGraph())
        with pytest.raises(RuntimeError, match="batch_sizes: a CUDA graph"), graph:
            layer(rows)
        assert torch.equal(layer(rows)[0].data, expected)

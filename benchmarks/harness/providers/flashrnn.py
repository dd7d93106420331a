"""FlashRNN (PyPI `flashrnn`): its alternating, fused and Triton kernels, and on the CPU its loop.

Its functions take Wx, so that the input projection is a matrix product here, in the memory layout
that the kernels want: what FlashRNN permutes then is a view. Its CUDA kernels are compiled at the
first call, for every head size, number of heads, batch size and dtype anew.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from harness.cases import Case
from harness.data import Data, Results, training_call
from harness.providers.base import (
    CannotDoError,
    Provider,
    Session,
    Setting,
    require_plain,
    torch_settings,
)

FUNCTIONS = {"rnn": "elman", "gru": "gru", "lstm": "lstm"}
# Of a GRU, R has the gates n, r, z where torch's weight_hh has r, z, n; Wx has torch's order.
RECURRENT_ORDER = {"rnn": (0,), "gru": (2, 0, 1), "lstm": (0, 1, 2, 3)}
# How each backend wants Wx in memory, as FlashRNN names dimensions: heads H of D units, G gates.
MEMORY = {
    "vanilla": "TBGHD",
    "cuda": "TBHGD",
    "cuda_fused": "TBHDG",
    "triton_fused": "BTGHD",
}
LARGEST_TRITON_HEAD = 128  # one program holds the whole of a head's R


@dataclass(frozen=True)
class _Layer:
    """The weights of a case in FlashRNN's layouts, and back."""

    case: Case
    memory: str

    @property
    def gates(self) -> int:
        return len(RECURRENT_ORDER[self.case.cell])

    @property
    def head_size(self) -> int:
        return self.case.H // self.case.heads

    @property
    def _sizes(self) -> dict[str, int]:
        return {"G": self.gates, "H": self.case.heads, "D": self.head_size}

    def input_weight(self, w_ih: Tensor) -> Tensor:
        """[G*H, I] with its rows in the order of the last three dimensions of Wx in memory."""
        wanted = self.memory[2:]
        by_gate = w_ih.detach().view(*self._sizes.values(), self.case.I)
        return by_gate.permute(*("GHD".index(d) for d in wanted), 3).reshape(w_ih.shape)

    def torch_input_weight(self, weight: Tensor) -> Tensor:
        stored = self.memory[2:]
        shaped = weight.view(*(self._sizes[d] for d in stored), self.case.I)
        return shaped.permute(*(stored.index(d) for d in "GHD"), 3).reshape(weight.shape)

    def projected(self, x: Tensor, weight: Tensor) -> Tensor:
        """Wx as a view [T, B, G, heads, D] (batch first where memory is) of its memory."""
        stored = self.memory[2:]
        wx = torch.nn.functional.linear(x, weight).unflatten(2, [self._sizes[d] for d in stored])
        return wx.permute(0, 1, *(2 + stored.index(d) for d in "GHD"))

    def recurrent(self, w_hh: Tensor) -> Tensor:
        """R [G, heads, D, D], the last dimension summed over."""
        n, d = self.case.heads, self.head_size
        blocks = w_hh.detach().view(self.gates, n, d, n, d).diagonal(dim1=1, dim2=3)
        return blocks.permute(0, 3, 1, 2)[list(RECURRENT_ORDER[self.case.cell])].contiguous()

    def torch_recurrent(self, r: Tensor) -> Tensor:
        order = RECURRENT_ORDER[self.case.cell]
        by_gate = r[[order.index(k) for k in range(len(order))]]
        return torch.cat([torch.block_diag(*heads) for heads in by_gate])

    def bias(self, b_ih: Tensor, b_hh: Tensor) -> Tensor:
        """[G, heads, D]; GRU: [4, heads, D], n of the recurrent side, r, z, n of the input's."""
        b_ih, b_hh = b_ih.detach(), b_hh.detach()
        parts = list((b_ih + b_hh).chunk(self.gates))
        if self.case.cell == "gru":
            parts = [b_hh.chunk(3)[2], *parts[:2], b_ih.chunk(3)[2]]
        return torch.stack(parts).unflatten(1, (self.case.heads, self.head_size))

    def torch_biases(self, b: Tensor) -> tuple[Tensor, Tensor]:
        flat = b.flatten(1)
        if self.case.cell != "gru":
            return flat.flatten(), flat.flatten()
        n_hh, r, z, n_ih = flat
        return torch.cat((r, z, n_ih)), torch.cat((r, z, n_hh))


def _flashrnn(case: Case, data: Data, setting: Setting, backend: str) -> Session:
    require_plain(case, heads=True)
    layer = _Layer(case, MEMORY[backend])
    if backend == "triton_fused":
        if case.cell != "lstm":
            raise CannotDoError("its Triton kernels have no GRU and no RNN")
        d = layer.head_size
        if d > LARGEST_TRITON_HEAD or d & (d - 1):
            raise CannotDoError("its Triton kernels take heads of 16, 32, 64 and 128 units")
    if backend == "cuda_fused" and case.cell == "gru":
        raise CannotDoError("it runs GRU with its alternating kernels, which have a row")
    from flashrnn import FlashRNNConfig, flashrnn

    batch_first = layer.memory.startswith("BT")
    config = FlashRNNConfig(
        backend=backend,
        function=FUNCTIONS[case.cell],
        num_heads=case.heads,
        head_dim=layer.head_size,
        hidden_dim=case.H,
        batch_size=case.B,
        dtype=case.dtype,
        input_shape="BTGHD" if batch_first else "TBGHD",
        output_shape="SBTHD" if batch_first else "STBHD",
    )
    w_ih, w_hh, b_ih, b_hh = data.layer.parameters()
    leaves = [
        tensor.contiguous().requires_grad_(case.has_grad)
        for tensor in (layer.input_weight(w_ih), layer.recurrent(w_hh), layer.bias(b_ih, b_hh))
    ]

    def forward(x: Tensor) -> Tensor:
        weight, r, b = leaves
        states, _ = flashrnn(layer.projected(x, weight), r, b, config=config)
        return states[0].flatten(2)  # [T, B, H], or batch first

    def time_first(tensor: Tensor) -> Tensor:
        return tensor.transpose(0, 1) if batch_first else tensor

    own = data
    if batch_first:
        own = replace(
            data,
            xs=tuple(_swapped(x).requires_grad_(case.has_grad) for x in data.xs),
            cotangent=_swapped(data.cotangent),
        )

    def active():
        return torch_settings(case, setting, tf32=case.dtype == "float32")

    if not case.has_grad:
        return Session(own.in_turn(forward), lambda y: {"y": time_first(y)}, active)
    call, results = training_call(forward, leaves, ("weight", "r", "b"), own)

    def as_torch(output: object) -> Results:
        named = results(output)
        d_ih, d_hh = layer.torch_biases(named["grad b"])
        return {
            "y": time_first(named["y"]),
            "grad x": time_first(named["grad x"]),
            "grad weight_ih_l0": layer.torch_input_weight(named["grad weight"]),
            "grad weight_hh_l0": layer.torch_recurrent(named["grad r"]),
            "grad bias_ih_l0": d_ih,
            "grad bias_hh_l0": d_hh,
        }

    return Session(call, as_torch, active)


def _swapped(tensor: Tensor) -> Tensor:
    return tensor.detach().transpose(0, 1).contiguous()


def _provider(name: str, backend: str, device: str) -> Provider:
    return Provider(
        name,
        partial(_flashrnn, backend=backend),
        ("flashrnn",),
        (device,),
        wants=lambda case: case.dtype != "float64",
        default_on=("cuda",),
        slow=True,
        tf32=device == "cuda",  # its float32 products always are
        install="pip install",
    )


FLASHRNN = (
    _provider("flashrnn vanilla", "vanilla", "cpu"),
    _provider("flashrnn alternating", "cuda", "cuda"),
    _provider("flashrnn fused", "cuda_fused", "cuda"),
    _provider("flashrnn triton", "triton_fused", "cuda"),
)

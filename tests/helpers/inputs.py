"""Inputs and states as tests give them, of every kind, layout and type."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from fused_rnn.cells import CELLS

HALVES = [torch.bfloat16, torch.float16]


def states(cell, *shape, **like):
    """Random states of a shape: one tensor, or two for an LSTM."""
    parts = [torch.randn(shape, **like) for _ in range(1 + CELLS[cell].has_c)]
    return tuple(parts) if CELLS[cell].has_c else parts[0]


def plain_input(suffix):
    return torch.randn(2, 8) if suffix else torch.randn(1, 2, 8)


def bad_inputs():
    def shapes(suffix):
        return (2, 8) if suffix else (1, 2, 8)

    yield "double", lambda suffix: torch.randn(shapes(suffix)).double()
    yield "half", lambda suffix: torch.randn(shapes(suffix)).half()
    yield "int", lambda suffix: torch.ones(shapes(suffix), dtype=torch.int64)
    yield "complex", lambda suffix: torch.randn(shapes(suffix)).cfloat()
    yield "wide", lambda suffix: torch.randn(*shapes(suffix)[:-1], 9)
    yield "sparse", lambda suffix: torch.randn(shapes(suffix)).to_sparse()
    yield "csr", lambda suffix: torch.randn(2, 8).to_sparse_csr()
    yield "mkldnn", lambda suffix: torch.randn(shapes(suffix)).to_mkldnn()
    yield "meta", lambda suffix: torch.randn(shapes(suffix), device="meta")
    yield "nested", lambda suffix: torch.nested.nested_tensor([torch.randn(2, 8)])
    yield (
        "quantized",
        lambda suffix: torch.quantize_per_tensor(torch.randn(shapes(suffix)), 0.1, 0, torch.qint8),
    )
    yield "no_rows", lambda suffix: torch.randn(*shapes(suffix)[:-2], 0, 8)
    yield "no_time", lambda suffix: torch.randn(0, *shapes(suffix)[1:])
    yield "scalar", lambda suffix: torch.randn(())
    yield "rank", lambda suffix: torch.randn(1, 1, *shapes(suffix))
    yield "none", lambda suffix: None
    yield "list", lambda suffix: [[1.0] * 8]
    yield "packed", lambda suffix: pack_sequence([torch.randn(1, 8)])


class Named(torch.Tensor):
    pass


def bad_states():
    def each(function):
        """The function on each state of an hx."""
        return lambda hx: tuple(map(function, hx)) if isinstance(hx, tuple) else function(hx)

    yield "double", each(torch.Tensor.double)
    yield "wide", each(lambda h: torch.cat((h, h), -1))
    yield "rows", each(lambda h: torch.cat((h, h), -2))
    yield "rank", each(lambda h: h[0])
    yield "sparse", each(torch.Tensor.to_sparse)
    yield "meta", each(lambda h: h.to("meta"))
    yield "half_a_pair", lambda hx: (hx[0],) if isinstance(hx, tuple) else [hx]
    yield "three", lambda hx: (*hx, hx[0]) if isinstance(hx, tuple) else (hx, hx)
    yield "the_other", lambda hx: hx[0] if isinstance(hx, tuple) else (hx, hx)
    yield "a_none", lambda hx: (hx[0], None) if isinstance(hx, tuple) else 1.0
    yield "subclass", each(lambda h: h.as_subclass(Named))


# Of a tensor with any number of dimensions, the same numbers in another order of memory.
LAID_OUT = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "reversed": lambda x: (
        x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))
    ),
    "every other": lambda x: torch.stack((x, torch.full_like(x, torch.nan)), -1)[..., 0],
    "part of wider": lambda x: torch.cat((x, torch.full_like(x, torch.nan)), -1)[
        ..., : x.shape[-1]
    ],
    "part of longer": lambda x: torch.cat((torch.full_like(x, torch.nan), x))[x.shape[0] :],
    "expanded": lambda x: x[:1].expand(x.shape),
    "expanded elements": lambda x: x[..., :1].expand(x.shape),
    "real part": lambda x: torch.complex(x, torch.full_like(x, torch.nan)).real,
}


def spread(tensor: Tensor) -> Tensor:
    """Equal values, no two neighbours in memory, a storage offset."""
    parent = tensor.new_full([2 * n + 1 for n in tensor.shape], float("nan"))
    view = parent[tuple(slice(1, None, 2) for _ in tensor.shape)]
    view.copy_(tensor.detach())
    return view


# Of the operators that train: arguments, and sizes of steps, that do not fit those below.
MISFITS = {
    "cell": [5, -1],
    "x": [torch.randn(2, 4), torch.randn(5, 2, 3), torch.randn(5, 2, 4).double(),
          torch.randn(2, 5, 4).transpose(0, 1), torch.randn(5, 0, 4), torch.randn(0, 2, 4)],
    "weights": [[], [torch.randn(24, 4)], [torch.randn(24, 4), torch.randn(24, 5)]],
    "h0": [torch.randn(1, 2, 5), torch.randn(2, 6), torch.randn(1, 2, 6).half()],
    "c0": [None, torch.randn(1, 1, 6)],
    "directions": [0, 2, 3],
    "batch_sizes": [torch.tensor([2] * 5)],
}  # fmt: skip
SIZES_THAT_DO_NOT_FIT = [
    [], [3, 2], [2, 2, 1, 0], [2, 3], [1, 1, 1, 1, 1], [2, 2, 2], [2, 2, 1, -1, 1], [[2, 2, 1]],
    [5], 5, [2.0, 2.0, 1.0], [2**62, 2**62, 2**62, 2**62, 5],
]  # fmt: skip


def operator_arguments():
    weights = [torch.randn(24, 4), torch.randn(24, 6), torch.randn(24), torch.randn(24)]
    forward = {"cell": 3, "x": torch.randn(5, 2, 4), "weights": weights}
    states = {"h0": torch.randn(1, 2, 6), "c0": torch.randn(1, 2, 6)}
    return forward | states | {"batch_sizes": None, "directions": 1}

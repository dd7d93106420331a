"""Layers whose rows end early or start afresh."""

from __future__ import annotations

import itertools

import torch
from torch import nn

INPUTS, HIDDEN, STEPS = 5, 18, 9
OPTIONS = [
    {"num_layers": layers, "bidirectional": bidirectional, "batch_first": batch_first}
    for layers, bidirectional, batch_first in itertools.product(
        (1, 2), (False, True), (False, True)
    )
]
MASKS = {
    "lengths": ((3, 9, 1, 9, 4), 0.0),
    "rows without a step": ((0, 5, 0, 9, 2), 0.0),
    "resets": (None, 0.3),
    "both": ((3, 9, 0, 1, 4), 0.3),
}


def masks_of(name, batch_first, dtype=torch.int64):
    lengths, part = MASKS[name]
    masks = {} if lengths is None else {"lengths": torch.tensor(lengths, dtype=dtype)}
    if part:
        resets = torch.rand(STEPS, 5) < part
        masks["resets"] = resets.t() if batch_first else resets
    return masks


class Masked(nn.Module):
    """A layer with its masks, called as one without."""

    def __init__(self, module, **masks):
        super().__init__()
        self.module, self.masks = module, masks

    def forward(self, *args):
        return self.module(*args, **self.masks)

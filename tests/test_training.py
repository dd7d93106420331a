"""A model of every recurrent module trains alike before and after `replace`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.pairs import pairs, params
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fused_rnn

# torch.nn says where oneDNN has no projection.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")

STEPS, BATCH, FEATURES, SIZE, CLASSES = 50, 4, 5, 8, 3


class Everything(nn.Module):
    """All six modules, padded and packed, with dropout between layers, a projection, initial
    states that are learnt, and cells in a loop."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.RNN(FEATURES, SIZE, num_layers=2, dropout=0.2)
        self.relu = nn.RNN(SIZE, SIZE, nonlinearity="relu", bias=False)
        self.gru = nn.GRU(SIZE, SIZE, num_layers=2, dropout=0.3, bidirectional=True)
        self.lstm = nn.LSTM(2 * SIZE, SIZE, num_layers=2, dropout=0.1, batch_first=True)
        self.projected = nn.LSTM(SIZE, SIZE, proj_size=SIZE // 2, bidirectional=True)
        self.h0 = nn.Parameter(torch.zeros(4, 1, SIZE))
        self.rnn_cell = nn.RNNCell(SIZE, SIZE)
        self.gru_cell = nn.GRUCell(SIZE, SIZE)
        self.lstm_cell = nn.LSTMCell(SIZE, SIZE)
        self.out = nn.Linear(8 * SIZE, CLASSES)

    def forward(self, x: Tensor, lengths: list[int]) -> Tensor:
        x, h = self.rnn(x)  # [T, B, I]
        seen = [h[-1]]  # of each module, so that every one learns at once
        x, h = self.relu(x, h[-1:])
        seen.append(h[-1])
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        packed, h = self.gru(packed, self.h0.expand(-1, BATCH, -1))
        seen.append(h[-1])
        packed, (_, c) = self.lstm(packed)
        assert isinstance(packed, PackedSequence)
        seen.append(c[-1])
        x, _ = pad_packed_sequence(packed)
        x, _ = self.projected(x)
        seen.append(x.mean(0))
        one, two, three = c[-1], None, None
        for step in x:
            one = self.rnn_cell(step, one)
            two = self.gru_cell(one, two)
            three = self.lstm_cell(two, three)
        return self.out(torch.cat([*seen, one, two, three[1]], -1))


def train(optimizer_of, dtype: torch.dtype, prepare, packed_lengths: list[int]) -> list[float]:
    torch.manual_seed(0)
    model = Everything().to(dtype)
    optimizer = optimizer_of(model.parameters())
    model = prepare(model)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, BATCH, FEATURES, generator=generator, dtype=torch.float64).to(dtype)
    target = torch.randint(0, CLASSES, (BATCH,), generator=generator)
    losses = []
    for step in range(STEPS):
        loss = F.cross_entropy(model(x, packed_lengths), target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert step or all(p.grad.abs().max() > 1e-6 for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    return losses


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.002),
}


@pytest.mark.parametrize(
    ("dtype", "tolerance", "lengths", "optimizer"),
    pairs(
        params({"f64": (torch.float64, 1e-11), "f32": (torch.float32, 5e-5)}),
        [
            pytest.param(lengths, optimizer, id=f"{name}-{optimizer}")
            for name, lengths in {"sorted": [7, 6, 3, 1], "unsorted": [2, 7, 1, 5]}.items()
            for optimizer in OPTIMIZERS
        ],
        one_in=2,
    ),
)
def test_same_losses_after_replace(dtype, tolerance, lengths, optimizer):
    before = train(OPTIMIZERS[optimizer], dtype, lambda model: model, lengths)
    after = train(OPTIMIZERS[optimizer], dtype, fused_rnn.replace, lengths)
    assert after == pytest.approx(before, rel=tolerance)
    assert before[-1] < 0.5 * before[0]  # it has learnt


def test_everything_is_converted():
    model = fused_rnn.replace(Everything(), strict=True)
    ours = [m for m in model.modules() if type(m).__module__.startswith("fused_rnn.")]
    assert len(ours) == 8


def test_another_seed_gives_other_losses():
    """The dropout that both share matters: without it the comparison would be weaker."""
    torch.manual_seed(0)
    model = fused_rnn.replace(Everything())
    x = torch.randn(7, BATCH, FEATURES)
    first, second = model(x, [7, 6, 3, 1]), model(x, [7, 6, 3, 1])
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(x, [7, 6, 3, 1]), model(x, [7, 6, 3, 1]))

"""Fused recurrent layers and cells: drop-in replacements for torch.nn.RNN, GRU and LSTM."""

from . import export as export
from . import functional as functional
from . import interop as interop
from .cell_modules import GRUCell, LSTMCell, RNNCell
from .convert import flip_update_gate, from_torch, replace, restore
from .dispatch import UnsupportedProblemError, backend
from .explanation import Explanation, LayerChoice, explain
from .modules import GRU, LSTM, RNN
from .streaming import Stepper, stepper
from .truncated import tbptt

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Explanation",
    "GRUCell",
    "LSTMCell",
    "LayerChoice",
    "RNNCell",
    "Stepper",
    "UnsupportedProblemError",
    "backend",
    "explain",
    "flip_update_gate",
    "from_torch",
    "replace",
    "restore",
    "stepper",
    "tbptt",
]

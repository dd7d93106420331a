"""The tests of PyTorch's toolbox run on modules of one library, ours unless told otherwise.

With `--library torch.nn` they run on torch.nn's: how docs/compatibility.md knows what works there.
"""

from __future__ import annotations

import pytest
import torch
from toolkit import CELLS, LAYERS, REPRESENTATIVE, VARIANTS, Maker
from torch import nn

import fused_rnn


def pytest_configure(config):
    config.addinivalue_line("markers", "costly: fast for representative modules only")


def pytest_generate_tests(metafunc):
    costly = metafunc.definition.get_closest_marker("costly") is not None
    for argument, names in (("layer", LAYERS), ("cell", CELLS), ("variant", VARIANTS)):
        if argument in metafunc.fixturenames:
            slow = [costly and name not in REPRESENTATIVE for name in names]
            marks = [[pytest.mark.slow] if each else [] for each in slow]
            metafunc.parametrize(
                argument, [pytest.param(n, marks=m) for n, m in zip(names, marks, strict=True)]
            )


@pytest.fixture(autouse=True)
def _products_in_full():
    """Unless told not to, cuDNN's recurrent layers round the factors of float32 to 10 bits."""
    # Not by the attribute: torch's own test modules, which another test imports, lock that.
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        yield


@pytest.fixture(scope="session")
def library(pytestconfig):
    return {"fused_rnn": fused_rnn, "torch.nn": nn}[pytestconfig.getoption("--library")]


@pytest.fixture
def make(library):
    return Maker(library)

"""Fixtures and settings that every test file may use."""

import os

import pytest
import torch
from hypothesis import settings

from fused_rnn import testing

# Shared machines make any deadline a coin toss. The same examples every time in CI, new ones at
# a developer's desk; a failing example is remembered only there, so that runs leave no state.
settings.register_profile("default", deadline=None, max_examples=100, print_blob=True)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """Memory that nobody wrote reads as NaN."""
    with testing.poisoned_memory():
        yield


@pytest.fixture
def num_threads():
    """Sets the number of threads torch computes with; put back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)

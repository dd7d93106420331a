"""The small standing set for pytest-benchmark, and for those who track its results:

pytest benchmarks/ --benchmark-only
"""

import pytest
import torch

from harness.cases import GATES, Case
from harness.data import expected_results, make_data
from harness.providers import PROVIDERS, Setting
from harness.results import Row
from harness.runner import Contender, entrant_of

CASES = [
    Case(cell, *shape, mode)
    for cell in GATES
    for shape, mode in (
        ((1, 1, 128, 128), "step"),
        ((128, 1, 128, 128), "inference"),
        ((128, 32, 128, 128), "inference"),
        ((64, 32, 128, 128), "training"),
    )
]
WHO = ("fused_rnn", "torch.nn")


@pytest.mark.parametrize("name", WHO)
@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case).replace(" ", "-"))
def test_standing(benchmark, case, name):
    benchmark.group = str(case)
    data = make_data(case)
    entrant = entrant_of(
        PROVIDERS[name],
        Row("standing", 0, 0, case, name),
        data,
        expected_results(case, data),
        Setting("cpu", torch.get_num_threads()),
    )
    assert isinstance(entrant, Contender), entrant.note
    with entrant.session.active():
        benchmark(entrant.session.call)
    benchmark.extra_info["kernel"] = entrant.session.kernel

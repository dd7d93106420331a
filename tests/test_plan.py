"""The planner of the CUDA kernels: plain C++, so every choice can be seen without a GPU."""

import itertools
import re

import pytest

from fused_rnn.cells import CELLS
from fused_rnn.testing import TORCH_CELLS

_C = pytest.importorskip("fused_rnn._C", reason="the C++ parts were not built")

# capability, SMs, shared memory of one CTA, CTAs of a cluster
H200 = {"capability": 90, "processors": 132, "shared_bytes": 232448, "max_cluster": 16}
A100 = {"capability": 80, "processors": 108, "shared_bytes": 166912, "max_cluster": 1}
RTX_4090 = {"capability": 89, "processors": 128, "shared_bytes": 101376, "max_cluster": 1}
H100_PCIE = {**H200, "processors": 114}
B200 = {"capability": 100, "processors": 148, "shared_bytes": 232448, "max_cluster": 16}
DEVICES = {"H200": H200, "A100": A100, "RTX 4090": RTX_4090, "B200": B200}
DEVICES["H100 PCIe"] = H100_PCIE
KERNELS = TORCH_CELLS  # the cells that have their own


def plan(cell, element_bytes, hidden, batch=8, directions=1, device=H200, **options):
    sizes = (CELLS[cell].index, element_bytes, hidden, batch, directions)
    return _C.plan(*sizes, **device, **options)


def tile(part):
    return part["hidden"], part["cluster"], part["row_blocks"]


@pytest.mark.parametrize(
    ("cell", "element_bytes", "hidden", "batch", "directions", "device", "forward", "backward"),
    [
        ("lstm", 2, 1, 1, 1, "H200", (64, 1, 1), (64, 1, 1)),
        ("lstm", 2, 64, 8, 1, "RTX 4090", (64, 1, 1), (64, 1, 1)),
        ("lstm", 2, 100, 3, 1, "A100", (128, 1, 1), (128, 1, 1)),
        ("lstm", 2, 128, 2000, 2, "H200", (128, 1, 2), (128, 1, 2)),
        ("lstm", 2, 129, 8, 1, "H200", (256, 4, 1), (256, 4, 1)),
        ("lstm", 2, 512, 16, 1, "H200", (512, 16, 1), (512, 16, 1)),
        ("lstm", 2, 512, 128, 2, "H200", (512, 16, 2), (512, 16, 2)),
        ("lstm", 2, 768, 64, 1, "B200", (768, 16, 1), (768, 16, 1)),
        ("lstm", 4, 256, 8, 2, "H200", (256, 8, 1), (256, 8, 1)),
        ("gru", 2, 650, 8, 1, "H200", (768, 16, 1), (768, 16, 1)),
        ("gru", 4, 512, 8, 1, "H200", (512, 16, 1), (512, 16, 1)),
        ("rnn_tanh", 2, 1024, 8, 1, "H200", (1024, 16, 1), (1024, 16, 1)),
        ("rnn_relu", 4, 200, 8, 1, "H200", (256, 2, 1), (256, 2, 1)),
        # Across the grid: what no cluster can hold, and most of what a device without clusters has.
        ("lstm", 2, 769, 8, 1, "H200", (1024, 64, 1), (1024, 64, 1)),
        ("lstm", 2, 1024, 64, 2, "H200", (1024, 64, 4), (1024, 64, 4)),
        ("lstm", 2, 2048, 16, 1, "H200", (2048, 128, 1), (2048, 128, 1)),
        ("lstm", 2, 2112, 16, 1, "H200", (2112, 132, 1), (2112, 132, 1)),
        ("lstm", 2, 2300, 16, 1, "B200", (2304, 144, 1), (2304, 144, 1)),
        ("lstm", 4, 400, 8, 1, "H200", (512, 16, 1), (512, 32, 1)),
        ("lstm", 4, 1024, 1, 1, "B200", (1024, 128, 1), (1024, 64, 1)),
        ("lstm", 2, 129, 8, 1, "A100", (512, 32, 1), (512, 32, 1)),
        ("gru", 2, 1500, 8, 1, "A100", (1536, 96, 1), (1536, 96, 1)),
        ("gru", 4, 512, 8, 1, "RTX 4090", (512, 64, 1), (512, 32, 1)),
        ("rnn_tanh", 2, 2048, 8, 2, "RTX 4090", (2048, 64, 1), (2048, 64, 1)),
    ],
)
def test_choices(cell, element_bytes, hidden, batch, directions, device, forward, backward):
    chosen = plan(cell, element_bytes, hidden, batch, directions, DEVICES[device])
    assert chosen["refusal"] == ""
    assert tile(chosen["forward"]) == forward
    assert tile(chosen["backward"]) == backward


@pytest.mark.parametrize(
    ("cell", "element_bytes", "hidden", "device", "regime", "words"),
    [
        ("lstm", 2, 769, "H200", "cluster", "needs hidden_size up to 768 .* got 769"),
        ("lstm", 2, 129, "A100", "cluster", "needs hidden_size up to 128 .* got 129"),
        ("lstm", 4, 385, "H200", "cluster", "needs hidden_size up to 384"),
        ("rnn_tanh", 4, 1024, "H200", "cluster", "needs hidden_size up to 768"),
        ("gru_reset_before", 2, 8, "H200", "cluster", "clusters have no GRU with the reset gate"),
        ("lstm", 2, 2113, "H200", "grid", "needs hidden_size up to 2112 .* got 2113"),
        ("lstm", 2, 2305, "B200", "grid", "needs hidden_size up to 2304 .* got 2305"),
        ("lstm", 2, 2049, "H100 PCIe", "grid", "needs hidden_size up to 1536 .* got 2049"),
        ("lstm", 2, 1537, "A100", "grid", "needs hidden_size up to 1536 .* got 1537"),
        ("lstm", 4, 513, "RTX 4090", "grid", "needs hidden_size up to 512"),
        ("rnn_tanh", 4, 3000, "H200", "grid", "needs hidden_size up to 2048"),
        ("gru_reset_before", 4, 8, "H200", "grid", "across the grid have no GRU with the reset"),
    ],
)
def test_refusals_say_what_would_fit(cell, element_bytes, hidden, device, regime, words):
    chosen = plan(cell, element_bytes, hidden, device=DEVICES[device], regime=regime)
    assert chosen["forward"] is None or chosen["backward"] is None
    assert re.search(words, chosen["refusal"]), chosen["refusal"]


@pytest.mark.parametrize(
    ("cell", "element_bytes", "hidden", "device", "forward", "backward"),
    [
        ("lstm", 2, 768, "H200", "cluster", "cluster"),
        ("lstm", 2, 769, "H200", "grid", "grid"),
        ("lstm", 2, 2049, "H200", "grid", "grid"),
        ("lstm", 2, 2113, "H200", "steps", "steps"),
        ("gru", 2, 2049, "H200", "steps", "steps"),
        ("lstm", 4, 384, "H200", "cluster", "cluster"),
        ("lstm", 4, 400, "H200", "cluster", "grid"),
        ("lstm", 4, 1025, "H200", "steps", "steps"),
        ("lstm", 2, 128, "A100", "cluster", "cluster"),
        ("lstm", 2, 129, "A100", "grid", "grid"),
        ("lstm", 4, 600, "RTX 4090", "grid", "steps"),
        ("rnn_tanh", 2, 5000, "B200", "steps", "steps"),
        ("gru_reset_before", 2, 8, "H200", "steps", "steps"),
    ],
)
def test_each_regime_takes_what_the_one_before_cannot(
    cell, element_bytes, hidden, device, forward, backward
):
    chosen = plan(cell, element_bytes, hidden, device=DEVICES[device])
    assert chosen["refusal"] == ""
    assert chosen["forward"]["regime"] == forward
    assert chosen["backward"]["regime"] == backward
    assert ("a product per step" in chosen["kernels"]) == ("steps" in (forward, backward))


def test_steps_can_be_forced_and_have_a_thread_for_two_units():
    for hidden, batch in itertools.product((1, 8, 255, 256, 257, 2304), (1, 7, 3000)):
        part = plan("gru", 2, hidden, batch, 2, regime="steps")["backward"]
        assert part["regime"] == "steps"
        assert part["shared_bytes"] == 0
        pairs_of_a_row = part["ctas"] // batch * part["threads"]
        assert 0 <= 2 * pairs_of_a_row - hidden < 2 * part["threads"] + 8


@pytest.mark.parametrize(
    ("hidden", "batch", "words"),
    [(2**20, 1, "hidden_size 1048576 is too large"), (4096, 2**30, "batch size .* is too large")],
)
def test_what_no_grid_is_large_enough_for(hidden, batch, words):
    assert re.search(words, plan("lstm", 2, hidden, batch)["refusal"])


def test_old_devices_are_refused():
    turing = {"capability": 75, "processors": 40, "shared_bytes": 65536, "max_cluster": 1}
    assert "8.0 or newer, got 7.5" in plan("gru", 2, 64, device=turing)["refusal"]


@pytest.mark.parametrize("device", DEVICES)
def test_every_plan_fits_its_device(device):
    facts = DEVICES[device]
    sizes = itertools.product(KERNELS, (2, 4), (1, 8, 64, 65, 200, 384, 500, 640, 1000), (1, 500))
    for cell, element_bytes, hidden, batch in sizes:
        chosen = plan(cell, element_bytes, hidden, batch, 2, facts)
        for part in (chosen["forward"], chosen["backward"]):
            if part["regime"] == "steps":
                continue
            where = f"{cell} {element_bytes} bytes H={hidden} B={batch}: {part}"
            assert part["hidden"] >= hidden, where
            assert part["shared_bytes"] <= facts["shared_bytes"], where
            assert part["threads"] <= 1024 and part["threads"] % 32 == 0, where
            assert part["ctas"] % part["cluster"] == 0, where
            if part["regime"] == "grid":  # resident at once, in as many launches as it takes
                assert 0 < part["ctas"] * part["directions"] <= facts["processors"], where
                continue
            assert part["cluster"] <= facts["max_cluster"], where
            assert part["directions"] == 2, where
            assert part["ctas"] // part["cluster"] * part["row_blocks"] * 8 >= batch, where


def test_a_batch_in_too_many_pieces_is_left_to_products():
    chosen = [plan("lstm", 2, 1024, batch)["forward"] for batch in (8, 64, 384, 385)]
    assert [part["regime"] for part in chosen] == ["grid", "grid", "grid", "steps"]
    assert plan("lstm", 2, 1024, 10**6, regime="grid")["forward"]["regime"] == "grid"


def test_directions_take_turns_where_both_do_not_fit():
    one, two = (plan("lstm", 2, hidden, 8, 2)["forward"] for hidden in (2048, 1024))
    assert (one["ctas"], one["directions"]) == (128, 1)
    assert (two["ctas"], two["directions"]) == (64, 2)


@pytest.mark.parametrize(
    ("cell", "hidden", "regime"),
    [("lstm", 64, ""), ("lstm", 512, ""), ("gru", 256, ""), ("lstm", 1024, "grid")],
)
def test_the_order_of_sums_does_not_depend_on_the_batch(cell, hidden, regime):
    layouts = set()
    for batch in (1, 8, 9, 100, 1000, 10**6):
        for directions in (1, 2):
            chosen = plan(cell, 2, hidden, batch, directions, regime=regime)
            forward, backward = chosen["forward"], chosen["backward"]
            layouts.add(
                (*tile(forward)[:2], forward["split_k"], *tile(backward)[:2])
            )  # all but row_blocks
    assert len(layouts) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"cell": 5}, {"cell": -1}, {"element_bytes": 8}, {"regime": "a"}, {"directions": 0},
        {"directions": 3}, {"hidden_size": 0}, {"batch_size": -8}, {"processors": -132},
        {"shared_bytes": 0}, {"max_cluster": 0}, {"layers": 0}, {"timesteps": 2**62},
    ],
)  # fmt: skip
def test_bad_arguments(changes):
    arguments = {
        "cell": 0, "element_bytes": 2, "hidden_size": 8, "batch_size": 1, "directions": 1, **H200,
    }  # fmt: skip
    with pytest.raises(ValueError, match=next(iter(changes))):
        _C.plan(**arguments | changes)


def test_a_gpu_that_others_share_is_not_spread_over():
    """Whose CTAs run at once nobody promises then."""
    alone, shared = (plan("lstm", 2, 1024, is_shared=is_shared) for is_shared in (False, True))
    assert alone["forward"]["regime"] == "grid"
    assert shared["forward"]["regime"] == shared["backward"]["regime"] == "steps"
    assert shared["refusal"] == ""
    assert plan("lstm", 2, 512, is_shared=True)["forward"]["regime"] == "cluster"
    forced = plan("lstm", 2, 1024, regime="grid", is_shared=True)
    assert forced["forward"] is None
    assert "other processes share (MPS)" in forced["refusal"]


# ---- Stacks of layers side by side.


@pytest.mark.parametrize(
    ("cell", "element_bytes", "hidden", "batch", "device", "layers", "timesteps", "together"),
    [
        # Those of docs/cuda-kernels.md.
        ("lstm", 2, 256, 16, "H200", 4, 1024, True),
        ("lstm", 2, 512, 16, "H200", 4, 1024, True),
        ("lstm", 2, 512, 64, "H200", 4, 1024, False),
        ("lstm", 2, 512, 16, "H200", 2, 1024, True),
        # In time too short to be cut, or so many rows that one layer fills the device.
        ("lstm", 2, 256, 16, "H200", 4, 32, False),
        ("lstm", 2, 256, 16, "H200", 2, 64, False),
        ("lstm", 2, 256, 1000, "H200", 2, 1024, False),
        ("gru", 2, 256, 8, "H200", 2, 1024, True),
        ("gru", 4, 512, 8, "H200", 8, 1024, False),
        ("gru", 4, 512, 8, "B200", 8, 1024, True),
        ("lstm", 2, 128, 256, "A100", 3, 1024, True),
        ("lstm", 2, 128, 800, "A100", 3, 1024, False),
        # Across the grid or step by step one layer has all SMs.
        ("lstm", 2, 1024, 8, "H200", 2, 1024, False),
        ("lstm", 2, 4096, 8, "H200", 2, 1024, False),
        ("lstm", 2, 256, 8, "A100", 2, 1024, False),
    ],
)
def test_which_stacks_run_side_by_side(
    cell, element_bytes, hidden, batch, device, layers, timesteps, together
):
    chosen = plan(
        cell, element_bytes, hidden, batch,
        device=DEVICES[device], layers=layers, timesteps=timesteps,
    )  # fmt: skip
    forward, backward = chosen["chunks"]
    assert [forward > 0, backward > 0] == [together, together]
    assert forward % 8 == backward % 8 == 0
    assert 2 * max(forward, backward) <= timesteps


def test_a_chunk_is_as_long_as_the_model_has_it():
    """sqrt(10 us * T / ((L - 1) t)), with what the host needs."""
    forward, backward = plan("lstm", 2, 256, 16, layers=4, timesteps=1024)["chunks"]
    assert 56 <= forward <= 104
    assert backward <= forward
    longer, _ = plan("lstm", 2, 256, 16, layers=4, timesteps=8 * 1024)["chunks"]
    assert 2 * forward < longer < 4 * forward


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"directions": 2}, "the end of the reverse direction first"),
        ({"hidden": 100}, "a multiple of 8, got 100"),
        ({"hidden": 1024}, "layers that run on clusters"),
        ({"hidden": 256, "regime": "steps"}, "layers that run on clusters"),
    ],
)
def test_stacks_that_cannot(options, words):
    options = {"hidden": 256, "layers": 2, "timesteps": 1024} | options
    chosen = plan("lstm", 2, **options)
    assert chosen["chunks"] == (0, 0)
    assert words in chosen["stack_refusal"]


def test_layers_side_by_side_add_up_as_each_does_alone():
    """A tile may have more rows; the order of its sums stays."""
    for batch in (1, 8, 16, 40):
        alone, four = (plan("lstm", 2, 512, batch, layers=n, timesteps=1024) for n in (1, 4))
        assert tile(alone["forward"])[:2] == tile(four["forward"])[:2]
        assert tile(alone["backward"])[:2] == tile(four["backward"])[:2]

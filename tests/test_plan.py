"""The planner of the CUDA kernels: plain C++, so every choice can be seen without a GPU."""

import itertools
import re

import pytest

from fused_rnn.cells import CELLS

_C = pytest.importorskip("fused_rnn._C", reason="the C++ parts were not built")

# capability, SMs, shared memory of one CTA, CTAs of a cluster
H200 = {"capability": 90, "processors": 132, "shared_bytes": 232448, "max_cluster": 16}
A100 = {"capability": 80, "processors": 108, "shared_bytes": 166912, "max_cluster": 1}
RTX_4090 = {"capability": 89, "processors": 128, "shared_bytes": 101376, "max_cluster": 1}
B200 = {"capability": 100, "processors": 148, "shared_bytes": 232448, "max_cluster": 16}
DEVICES = {"H200": H200, "A100": A100, "RTX 4090": RTX_4090, "B200": B200}
KERNELS = ("rnn_tanh", "rnn_relu", "gru", "lstm")


def plan(cell, element_bytes, hidden, batch=8, directions=1, device=H200):
    return _C.plan(CELLS[cell].index, element_bytes, hidden, batch, directions, **device)


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
    ("cell", "element_bytes", "hidden", "device", "words"),
    [
        ("lstm", 2, 2049, "H200", "needs hidden_size up to 2048 .* got 2049"),
        ("lstm", 2, 1537, "A100", "needs hidden_size up to 1536 .* got 1537"),
        ("lstm", 4, 513, "RTX 4090", "needs hidden_size up to 512"),
        ("rnn_tanh", 4, 3000, "H200", "needs hidden_size up to 2048"),
    ],
)
def test_refusals_say_what_would_fit(cell, element_bytes, hidden, device, words):
    chosen = plan(cell, element_bytes, hidden, device=DEVICES[device])
    assert chosen["forward"] is None or chosen["backward"] is None
    assert re.search(words, chosen["refusal"]), chosen["refusal"]


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
            if part is None:
                continue
            where = f"{cell} {element_bytes} bytes H={hidden} B={batch}: {part}"
            assert part["hidden"] >= hidden, where
            assert part["shared_bytes"] <= facts["shared_bytes"], where
            assert part["threads"] <= 1024 and part["threads"] % 32 == 0, where
            assert part["ctas"] % part["cluster"] == 0, where
            if part["grid"]:  # resident at once, in as many launches as it takes
                assert 0 < part["ctas"] * part["directions"] <= facts["processors"], where
                continue
            assert part["cluster"] <= facts["max_cluster"], where
            assert part["directions"] == 2, where
            assert part["ctas"] // part["cluster"] * part["row_blocks"] * 8 >= batch, where


@pytest.mark.parametrize("device", DEVICES)
def test_the_grid_is_for_what_clusters_cannot_hold(device):
    """And only for that; below it, steps are shorter."""
    in_clusters = {2: (768, 128), 4: (384, 64)}
    for element_bytes, (with_clusters, without) in in_clusters.items():
        limit = with_clusters if DEVICES[device]["max_cluster"] > 1 else without
        for hidden, grid in ((limit, False), (limit + 1, True)):
            assert (
                plan("lstm", element_bytes, hidden, device=DEVICES[device])["backward"]["grid"]
                == grid
            )


def test_directions_take_turns_where_both_do_not_fit():
    one, two = (plan("lstm", 2, hidden, 8, 2)["forward"] for hidden in (2048, 1024))
    assert (one["ctas"], one["directions"]) == (128, 1)
    assert (two["ctas"], two["directions"]) == (64, 2)


@pytest.mark.parametrize(
    ("cell", "hidden"), [("lstm", 64), ("lstm", 512), ("gru", 256), ("lstm", 1024)]
)
def test_the_order_of_sums_does_not_depend_on_the_batch(cell, hidden):
    layouts = set()
    for batch in (1, 8, 9, 100, 1000, 10**6):
        for directions in (1, 2):
            chosen = plan(cell, 2, hidden, batch, directions)
            forward, backward = chosen["forward"], chosen["backward"]
            layouts.add(
                (*tile(forward)[:2], forward["split_k"], *tile(backward)[:2])
            )  # all but row_blocks
    assert len(layouts) == 1


@pytest.mark.parametrize("changes", [{"cell": 4}, {"cell": -1}, {"element_bytes": 8}])
def test_bad_arguments(changes):
    arguments = {
        "cell": 0, "element_bytes": 2, "hidden_size": 8, "batch_size": 1, "directions": 1, **H200,
    }  # fmt: skip
    with pytest.raises(ValueError, match=next(iter(changes))):
        _C.plan(**arguments | changes)

"""More than one process: DistributedDataParallel and fully_shard over gloo, on the CPU."""

from __future__ import annotations

import importlib
import os
import socket
from contextlib import nullcontext, suppress
from queue import Empty

import pytest
import torch
import torch.distributed as dist
from helpers.outcomes import flat
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fused_rnn

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
)
WORLD, BATCH, STEPS = 2, 6, 4
CONTEXT = torch.multiprocessing.get_context("spawn")


class Model(nn.Module):
    """A character model: every kind of layer, one of them with packed rows."""

    def __init__(self, library):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.first = library.LSTM(6, 8, num_layers=2, bidirectional=True, proj_size=3)
        self.second = library.GRU(6, 8)
        self.third = library.RNN(8, 8)
        self.cell = library.LSTMCell(8, 8)
        self.head = nn.Linear(8, 11)

    def forward(self, tokens):  # [T, B]
        x = self.third(self.second(self.first(self.embedding(tokens))[0])[0])[0]
        return self.head(x + self.cell(x[-1])[0])


def make_model(library) -> Model:
    torch.manual_seed(0)
    return Model(library).double()


def batch_of(step: int) -> torch.Tensor:
    return torch.randint(11, (7, BATCH), generator=torch.Generator().manual_seed(step))


def loss_of(model, tokens) -> torch.Tensor:
    return nn.functional.cross_entropy(model(tokens[:-1]).flatten(0, 1), tokens[1:].flatten())


def train(model, batches, accumulate: int = 1, rank: int | None = None) -> dict:
    """Losses and parameters after a few steps, each of `accumulate` backward passes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for step in range(0, STEPS, accumulate):
        optimizer.zero_grad()
        for i in range(accumulate):
            tokens = batches(step + i)
            if rank is not None:
                tokens = tokens.chunk(WORLD, 1)[rank]
            last = i == accumulate - 1
            # FSDP2 has its own way of saying so, and one process has none.
            quiet = model.no_sync() if not last and hasattr(model, "no_sync") else nullcontext()
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(last)
            with quiet:
                loss = loss_of(model, tokens)
                (loss / accumulate).backward()
            losses.append(mean_over_ranks(loss.detach(), rank))
        optimizer.step()
    return {"losses": torch.stack(losses), "parameters": full_parameters(model)}


def mean_over_ranks(value, rank):
    value = value.clone()
    if rank is not None:
        dist.all_reduce(value)
        value /= WORLD
    return value


def full_parameters(model) -> list[torch.Tensor]:
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return [p.detach().clone() for p in whole]


def work(rank: int, port: int, library: str, queue) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    try:
        module = importlib.import_module(library)
        results = {kind: job(rank, module) for kind, job in JOBS.items()}
        # As arrays: tensors would be shared through this process, which is about to end.
        queue.put((rank, torch.utils._pytree.tree_map(lambda t: t.numpy(), results)))
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(library) -> list[dict]:
    """What the jobs of each rank give. A rank that dies is an error here, and how long the others
    wait is gloo's to say: on a busy machine two processes need minutes to begin."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    queue = CONTEXT.Queue()
    processes = [
        CONTEXT.Process(target=work, args=(rank, port, library.__name__, queue))
        for rank in range(WORLD)
    ]
    for process in processes:
        process.start()
    try:
        # Taken out before the processes are waited for, which cannot end while they hold results.
        results = {}
        while len(results) < WORLD:
            assert not any(process.exitcode for process in processes)
            with suppress(Empty):
                rank, value = queue.get(timeout=1)
                results[rank] = value
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * WORLD
    finally:
        for process in processes:
            process.kill()
    return [torch.utils._pytree.tree_map(torch.from_numpy, results[rank]) for rank in range(WORLD)]


def ddp_job(rank, library):
    """The same training with and without accumulation, gradient buckets as views."""
    results = {}
    for accumulate in (1, 2):
        model = DistributedDataParallel(
            make_model(library), gradient_as_bucket_view=accumulate == 2
        )
        results[str(accumulate)] = train(model, batch_of, accumulate, rank)
    return results


def fsdp_job(rank, library):
    """Each layer a unit of its own, and the model around them; then a checkpoint, and on."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))

    def sharded():
        model = make_model(library)
        for layer in (model.first, model.second, model.third, model.cell):
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    results = {}
    for accumulate in (1, 2):
        model = sharded()
        shard = model.first.weight_hh_l0.to_local()
        assert shard.shape[0] * WORLD == model.first.weight_hh_l0.shape[0]
        results[str(accumulate)] = train(model, batch_of, accumulate, rank)
    again = sharded()
    set_model_state_dict(again, get_model_state_dict(model))
    results["resumed"] = {"parameters": full_parameters(again)}
    return results


class Stateful(nn.Module):
    """Beside a buffer: where there is one, DistributedDataParallel sends all that it finds."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = fused_rnn.LSTM(3, 4, stateful=True)
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        return self.layer(x)[0]


def stateful_job(rank, library):
    """Two windows of a text of its own."""
    model = DistributedDataParallel(Stateful())
    return [model(x).detach() for x in text_of(rank)]


def text_of(rank: int) -> torch.Tensor:
    return torch.randn(2, 5, 1 + rank, 3, generator=torch.Generator().manual_seed(rank))


JOBS = {"ddp": ddp_job, "fsdp": fsdp_job, "stateful": stateful_job}


def in_one_process(accumulate: int, library) -> dict:
    return train(make_model(library), batch_of, accumulate)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_losses_of_two_processes_are_those_of_one(kind, library, ranks):
    """The same global batch: the same losses and parameters, with and without accumulation."""
    ranks = [results[kind] for results in ranks]
    for accumulate in (1, 2):
        expected = in_one_process(accumulate, library)
        for results in ranks:
            torch.testing.assert_close(results[str(accumulate)], expected, rtol=1e-7, atol=1e-9)
    if kind == "fsdp":
        for results in ranks:
            assert all(
                torch.equal(a, b)
                for a, b in zip(
                    results["resumed"]["parameters"], results["2"]["parameters"], strict=True
                )
            )


def test_each_process_carries_states_of_its_own(ranks):
    for rank, results in enumerate(ranks):
        model = Stateful()
        for window, y in zip(text_of(rank), results["stateful"], strict=True):
            torch.testing.assert_close(y, model(window))


def test_layers_within_a_wrapper_are_restored():
    """As DistributedDataParallel has them: as its attribute `module`."""
    holder = nn.Module()
    holder.module = nn.Sequential(fused_rnn.GRU(3, 4))
    assert type(fused_rnn.restore(holder).module[0]) is nn.GRU


def lightning_module(lightning, library):
    class Lit(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = make_model(library)
            self.losses = []

        def training_step(self, batch, _index):
            loss = loss_of(self.model, batch[0].t())
            self.losses.append(loss.detach())
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    return Lit()


def expected_losses(library) -> torch.Tensor:
    return in_one_process(1, library)["losses"]


@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path, library):
    """A Trainer's losses are a plain loop's, and a checkpoint loads."""
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")
    module = lightning_module(lightning, library)
    rows = torch.cat([batch_of(step).t() for step in range(STEPS)])
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(rows), batch_size=BATCH, shuffle=False
    )
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, loader)
    torch.testing.assert_close(torch.stack(module.losses), expected_losses(library))
    path = tmp_path / "model.ckpt"
    trainer.save_checkpoint(path)
    state = torch.load(path, weights_only=False)["state_dict"]
    other = lightning_module(lightning, library)
    other.load_state_dict(state)


@pytest.mark.filterwarnings("ignore")
def test_accelerate(library):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True)
    model = make_model(library)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for step in range(STEPS):
        with accelerator.accumulate(model):
            loss = loss_of(model, batch_of(step))
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
    torch.testing.assert_close(torch.stack(losses), expected_losses(library))
    assert isinstance(accelerator.unwrap_model(model).first, library.LSTM)


@pytest.fixture
def mesh():
    """One of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.device_mesh.init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell"])
def test_distributed_tensors(name, mesh):
    """A layer whose parameters and arguments are DTensors computes as on plain tensors."""
    from torch.distributed.tensor import DTensor, Replicate, distribute_module  # not in every torch

    def shared(tensor):
        return DTensor.from_local(tensor, mesh, [Replicate()])

    def of(tensors, function):
        return tuple(map(function, tensors)) if isinstance(tensors, tuple) else function(tensors)

    module, of_layer = getattr(fused_rnn, name)(4, 6), not name.endswith("Cell")
    x, h = (torch.randn(*([n] if of_layer else []), 3, size) for n, size in ((5, 4), (1, 6)))
    hx = (h, torch.randn_like(h)) if name.startswith("LSTM") else h
    expected = flat(module(x, hx))
    grads = torch.autograd.grad(sum(y.sum() for y in expected), list(module.parameters()))
    distributed = distribute_module(module, mesh)
    outputs = flat(distributed(shared(x), of(hx, shared)))
    found = torch.autograd.grad(sum(y.sum() for y in outputs), list(distributed.parameters()))
    for ours, plain in zip((*outputs, *found), (*expected, *grads), strict=True):
        torch.testing.assert_close(ours.to_local(), plain)

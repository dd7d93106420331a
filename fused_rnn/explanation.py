"""`explain`: which backend runs each recurrent layer of a module, and why the others do not."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from . import dispatch
from .cell_modules import _RecurrentCell
from .modules import _RecurrentLayers
from .problem import Problem

_FUNCTION = "(function)"


@dataclass(frozen=True)
class LayerChoice:
    """What was chosen for one layer."""

    # The module's name in the model, "" for the model itself; "(function)" where the layer is one
    # of `functional`, or of a compiled graph, which does not tell.
    module: str
    layer: int  # of the module, from 0
    problem: Problem
    backend: str
    kernel: str
    refusals: list[tuple[str, str]]  # (backend, why it cannot take the layer)

    def __str__(self) -> str:
        p = self.problem
        traits = [
            f"T={p.timesteps} B={p.batch_size} I={p.input_size} H={p.hidden_size}",
            f"projected to {p.proj_size}" if p.proj_size else "",
            "bidirectional" if p.directions == 2 else "",
            "" if p.bias else "no bias",
            "packed" if p.packed else "",
            "lengths" if p.lengths else "",
            "resets" if p.resets else "",
            "all states" if p.states else "",
            *p.extras,
            str(p.dtype).removeprefix("torch."),
            p.device_type,
            "training" if p.training else "inference",
        ]
        where = f"{self.module or '(module)'} layer {self.layer}"
        lines = [f"{where}: {p.cell_name} {', '.join(filter(None, traits))}"]
        lines.append(f"  runs on {self.kernel}")
        lines += [f"  not on {name}: {reason}" for name, reason in self.refusals]
        return "\n".join(lines)


@dataclass(frozen=True)
class Explanation:
    """The choices for every layer that ran, in order. Prints itself."""

    layers: list[LayerChoice]

    @property
    def backend(self) -> str:
        """The backends that ran, each once, joined by "+"."""
        return "+".join(dict.fromkeys(layer.backend for layer in self.layers))

    def __str__(self) -> str:
        if not self.layers:
            return "no fused_rnn layer ran (fused_rnn.replace(model) turns torch.nn's into ours)"
        return "\n".join(map(str, self.layers))

    __repr__ = __str__


def explain(module: torch.nn.Module, *args, **kwargs) -> Explanation:
    """Runs `module(*args, **kwargs)` once and tells which backend and kernel each layer got.

    Random numbers and the states of stateful modules are afterwards as they were before.

    Args:
        module: one of our modules, or any model that holds some.
        args, kwargs: what the module is called with. The choice depends on shapes, dtypes,
            devices and on whether gradients are on, not on values.

    Returns:
        An Explanation: `.layers`, `.backend`, and as a string the whole story.

    Raises:
        TypeError: `module` is not a module. Whatever the call itself raises.

    Example:
        >>> import fused_rnn
        >>> layer = fused_rnn.LSTM(3, 4)
        >>> with fused_rnn.backend("reference"):
        ...     print(explain(layer, torch.randn(5, 2, 3)))
        (module) layer 0: lstm T=5 B=2 I=3 H=4, float32, cpu, training
          runs on reference
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    # Each call of a module of ours, by name, and what runs between them.
    calls: list[tuple[str, list[LayerChoice]]] = [(_FUNCTION, [])]
    handles, carried = [], []
    for name, child in module.named_modules():
        if isinstance(child, (_RecurrentLayers, _RecurrentCell)):
            handles += (
                child.register_forward_pre_hook(lambda *_, name=name: calls.append((name, []))),
                child.register_forward_hook(lambda *_: calls.append((_FUNCTION, []))),
            )
        if isinstance(child, _RecurrentLayers) and child._carries():
            carried.append((child, child.state_h, child.state_c))

    def record(problem: Problem, chosen: dispatch.Backend, forced: bool) -> None:
        refusals = [] if forced else [(n, why) for n, why in dispatch.reasons(problem) if why]
        name, layers = calls[-1]
        kernel = chosen.describe(problem)
        layers.append(LayerChoice(name, len(layers), problem, chosen.name, kernel, refusals))

    try:
        with _random_state_kept(module, args, kwargs), dispatch.recording(record):
            module(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
        for child, *states in carried:
            child.state_h, child.state_c = states
    return Explanation([layer for _, layers in calls for layer in layers])


def _random_state_kept(module: torch.nn.Module, *arguments: Any) -> AbstractContextManager:
    """A `with` block that leaves what the call may draw from as it was: the CPU's generator, and
    those of devices that hold its tensors. torch's own choice, all devices, would initialise every
    one."""
    accelerator = torch.accelerator.current_accelerator()
    kind = "cuda" if accelerator is None else accelerator.type
    tensors = [*module.parameters(), *module.buffers(), *tree_leaves(arguments)]
    devices = (getattr(tensor, "device", None) for tensor in tensors)
    used = {d.index or 0 for d in devices if isinstance(d, torch.device) and d.type == kind}
    return torch.random.fork_rng(sorted(used), device_type=kind)

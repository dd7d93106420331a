"""Who computes a layer: the registry of providers, each with its best setting."""

from __future__ import annotations

from harness.providers.base import CannotDoError, Provider, Session, Setting
from harness.providers.flashrnn import FLASHRNN
from harness.providers.gpu_libraries import GPU_LIBRARIES
from harness.providers.jax_layers import JAX_LAYERS
from harness.providers.keras_layers import KERAS_LAYERS
from harness.providers.onnx_runtimes import ONNX_RUNTIMES
from harness.providers.torch_layers import TORCH_LAYERS

__all__ = ["PROVIDERS", "CannotDoError", "Provider", "Session", "Setting", "default", "is_ours"]

PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for group in (
        TORCH_LAYERS,
        ONNX_RUNTIMES,
        KERAS_LAYERS,
        JAX_LAYERS,
        FLASHRNN,
        GPU_LIBRARIES,
    )
    for provider in group
}


def is_ours(name: str) -> bool:
    return name.replace(" ", "/").split("/")[0] == "fused_rnn"


def default(device: str) -> tuple[str, ...]:
    """Who takes part on a kind of device unless providers are named."""
    return tuple(
        name
        for name, provider in PROVIDERS.items()
        if device in provider.devices
        and (provider.default_on is None or device in provider.default_on)
    )

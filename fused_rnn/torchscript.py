"""What torch.jit sees of our modules: torch.nn's.

TorchScript knows neither our operators nor most of the Python they are reached by. So a trace
records torch.nn's own operators, on the same parameters; a script, which torch would make by
changing the user's model, is refused with the way out.
"""

from __future__ import annotations

from typing import Any

import torch


def traced(
    module: torch.nn.Module, torch_class: type[torch.nn.Module], values: dict[str, Any], *args: Any
) -> Any:
    """What `torch_class.forward` gives for the options of `module` and its parameters by name, of
    this call: a parametrization, which the twin does not have, may make them."""
    twin = torch_class.__new__(torch_class)
    object.__setattr__(twin, "__dict__", vars(module) | values)
    return torch_class.forward(twin, *args)


class NotScriptable:
    """Makes torch.jit.script say what to do."""

    def __prepare_scriptable__(self):
        raise RuntimeError(
            f"torch.jit.script cannot compile fused_rnn.{self._torch_class.__name__}: call "
            "fused_rnn.restore(model) first, which makes it torch.nn's again, with the same "
            "parameters. torch.jit.trace, torch.compile and torch.export work as it is"
        )

"""What torch.fx sees of our modules: one node each, as of torch.nn's.

A symbolic trace runs a model's Python on proxies of tensors. Modules of torch.nn it leaves alone,
by the name of the Python module they come from; into ours it goes, and meets this.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Proxy
from torch.fx.proxy import TraceError


def is_proxy(value: Any) -> bool:
    return isinstance(value, Proxy)


def node(module: torch.nn.Module, input: Proxy, options: dict[str, Any]) -> Proxy:
    """The call of a module with those options that are not None, as a node in the graph of `input`.

    Raises:
        TraceError: there are hooks, or nothing around the module.
    """
    name = module._get_name()
    # They have been called already, with proxies, and what they did is in the graph.
    if module._forward_pre_hooks or module._forward_hooks:
        raise TraceError(
            f"torch.fx: expected no forward hooks on {name}, which the graph would call again; "
            "use a Tracer whose is_leaf_module says True of it"
        )
    path = input.tracer.path_of_module(module)
    if not path:
        raise TraceError(f"torch.fx: expected a model with {name} in it, got that alone")
    given = {option: value for option, value in options.items() if value is not None}
    return input.tracer.create_proxy("call_module", path, (input,), given)

"""What is made at the first call, made once though several threads come first."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])

_lock = threading.RLock()  # one of them may need another


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()


# The thread that held it is not in a forked child.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def once(function: _Function) -> _Function:
    """`functools.cache` for what must not run twice: that one lets threads that come while the
    first call runs call the function too, with the GIL as without it. A later call costs the same.
    """
    made = cache(function)

    @cache
    @wraps(function)
    def found(*args: Any) -> Any:
        with _lock:
            return made(*args)

    return found

"""Triton's interpreter for the tests: in a process of its own, and a little faster.

The interpreter is switched on by the environment before triton is imported, and it leaves
triton.language changed; so its tests skip in the common process, and `test_triton.py` runs them.
"""

import inspect

import pytest

from fused_rnn.backends import triton as backend


def interpreter_or_skip():
    """For the first lines of a test file."""
    if not backend.interpreting():
        pytest.skip(
            "test_triton.py runs this file with TRITON_INTERPRET=1", allow_module_level=True
        )
    _patch_once()


def _patch_once():
    """Every call of one @triton.jit function by another patches triton.language anew, for more
    than half of the time that a test takes. Once is enough: nothing undoes it."""
    import triton.language as tl
    from triton.runtime import interpreter

    patched = set()

    def call(self, *args, **kwargs):
        scope = self.fn.__globals__
        if id(scope) not in patched:
            patched.add(id(scope))
            modules = [v for v in scope.values() if inspect.ismodule(v)]
            if tl not in modules:  # that one is patched for each launch
                interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call

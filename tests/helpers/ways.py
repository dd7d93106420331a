"""Which way calls of modules take: the direct or the short one, or the general one."""

from __future__ import annotations

import torch

from fused_rnn import dispatch
from helpers.outcomes import assert_same_bits, flat, run


class Ways:
    """Counts which way calls of modules took: the one of `shortest`, or the general one."""

    def __init__(self, monkeypatch, shortest):
        self.direct = self.general = 0
        self.enabled = True
        for name in ("layers", "step"):
            monkeypatch.setattr(shortest, name, self._watch(getattr(shortest, name)))

    def _watch(self, function):
        def call(*args):
            result = function(*args) if self.enabled else None
            if result is None:
                self.general += 1
            else:
                self.direct += 1
            return result

        return call

    def call_generally(self, function, *args):
        self.enabled = False
        try:
            return function(*args)
        finally:
            self.enabled = True


def general_way(module, *args):
    """A call that somebody watches is not for the short ones."""
    with dispatch.recording(lambda *choice: None):
        return module(*args)


def outcome(function, *args):
    """The tensors a call returns, or its error's class and message."""
    try:
        return flat(function(*args))
    except Exception as error:
        return type(error), str(error)


def assert_general(ways, function, *args):
    """The call takes the general way, to the same end as if there were no other."""
    before = ways.direct
    actual = outcome(function, *args)
    assert ways.direct == before, "took the direct way"
    expected = outcome(ways.call_generally, function, *args)
    if isinstance(expected, tuple):
        assert actual == expected
    else:
        assert isinstance(actual, list), actual
        for a, e in zip(actual, expected, strict=True):
            assert type(a) is type(e) and a.requires_grad == e.requires_grad
            torch.testing.assert_close(a, e, rtol=0, atol=0, equal_nan=True)
    return actual


def assert_short(ways, function, *args):
    """The bits of the general way, and not by it."""
    before = ways.direct
    actual = function(*args)
    assert ways.direct == before + 1, "took the general way"
    assert_same_bits(flat(actual), flat(ways.call_generally(function, *args)))
    return actual


def assert_both_ways(ways, module, *args, **options):
    before = ways.direct
    actual = run(module, *args, **options)
    assert ways.direct == before + 1, "took the general way"
    assert_same_bits(actual, ways.call_generally(lambda: run(module, *args, **options)))


class Nothing(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class NothingBelow(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))

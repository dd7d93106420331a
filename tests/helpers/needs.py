"""What tests need of the machine and of the build: where it is not there, they skip."""

import pytest

from fused_rnn import direct, native, testing

INSTRUCTION_SETS = ("amx", "avx512", "avx2", "portable")
# The fixture, above the parameters of a case: it changes fastest, and what is expected of the case
# is computed once.
each_instruction_set = pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)

needs_library = pytest.mark.skipif(
    native.cpu_library_error() is not None, reason=str(native.cpu_library_error())
)
has_direct_calls = pytest.mark.skipif(
    direct.calls() is direct._NoCalls,
    reason=native.cpu_library_error() or "no extension module, or torch has no exchange of tensors",
)


def skip_unless_supported(backend: str, inputs: testing.LayerInputs, training: bool = True) -> None:
    if reason := testing.refusal(backend, inputs, training):
        pytest.skip(reason)

"""What several test files share. No test file imports another: tests/test_repository.py sees to it.

Fixtures are in conftest.py; what is of PyTorch's toolbox alone is in toolbox/toolkit.py.
"""

import pkgutil

import pytest

# Assertions here are to say as much as those of a test file.
pytest.register_assert_rewrite(*(f"{__name__}.{m.name}" for m in pkgutil.iter_modules(__path__)))

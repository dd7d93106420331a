"""The table in docs/compatibility.md names tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "compatibility.md").read_text()


def test_every_row_names_tests_that_exist():
    rows = [line for line in TEXT.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 30
    file, checked = None, 0
    for row in rows:
        for reference in re.findall(r"`([^`]+)`", row.split("|")[-2]):
            name, _, test = reference.partition("::")
            if name:
                path = ROOT / name if "/" in name else ROOT / "tests" / "toolbox" / name
                assert path.exists(), row
                file = path.read_text()
            assert not test or f"def {test}(" in file, f"{reference}: {row}"
            checked += bool(test)
    assert checked > 50

"""The repository and its files."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def tracked_files():
    """What git has or would add; in an unpacked archive, every file but those that tools make."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if (ROOT / ".git").exists() and shutil.which("git"):
        names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
        paths = [ROOT / os.fsdecode(name) for name in names.split(b"\0") if name]
    else:
        made = {".venv", ".hypothesis", ".benchmarks", "build", "dist", "out", "__pycache__"}
        paths = [
            path
            for path in ROOT.rglob("*")
            if not any(
                part in made or part.endswith((".egg-info", "_cache"))
                for part in path.relative_to(ROOT).parts
            )
        ]
    return [path for path in paths if path.is_file()]

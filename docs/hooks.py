"""What mkdocs adds while it builds: the gallery of examples, and pages the navigation lacks."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from run_all import EXAMPLES, RESULTS  # noqa: E402

TABLE_MARK = "<!-- results of the examples -->"
GALLERY_MARK = "<!-- the examples -->"


def on_config(config, **_):
    config.nav = complete(config.nav)
    return config


def complete(nav: list[dict]) -> list[dict]:
    """The navigation with every page of docs: one that nobody listed comes at the end of Inside."""
    listed = str(nav)
    pages = sorted((ROOT / "docs").rglob("*.md"))
    names = [page.relative_to(ROOT / "docs").as_posix() for page in pages]
    missing = [name for name in names if f"'{name}'" not in listed]
    nav = [dict(entry) for entry in nav]
    nav[-1]["Inside"] = [*nav[-1]["Inside"], *(n for n in missing if n != "performance.md")]
    if "performance.md" in missing:
        before = next(n for n, entry in enumerate(nav) if "Troubleshooting" in entry)
        nav.insert(before, {"Performance": "performance.md"})
    return nav


def on_page_markdown(markdown: str, page, **_) -> str:
    if page.file.src_uri == "examples.md":
        markdown = markdown.replace(TABLE_MARK, results_table())
        markdown = markdown.replace(GALLERY_MARK, gallery())
    return markdown


def on_page_content(html: str, **_) -> str:
    """Long names in tables may break behind a dot, an underscore or a colon, and nowhere else."""
    return re.sub(r"(?<=<td)([^>]*>)(.*?)(?=</td>)", _breakable, html, flags=re.DOTALL)


def _breakable(cell: re.Match) -> str:
    def code(name: re.Match) -> str:
        return re.sub(r"(::|[_.=/](?=\w))", r"\1<wbr>", name[0])

    return cell[1] + re.sub(r"(?<=<code>)[^<]+", code, cell[2])


def published(name: str) -> dict:
    """What the last full-size run of an example wrote, {} where there is none."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def row(result: dict) -> list[str]:
    sign = "at least" if result["higher_is_better"] else "at most"
    value, baseline, goal = (
        f"{result[name]:.4g}".replace("-", "\N{NON-BREAKING HYPHEN}")
        for name in ("value", "baseline", "goal")
    )
    return [
        result["measure"],
        value,
        f"{baseline} ({result['baseline_name']})",
        f"{sign} {goal}" + ("" if result["reached"] else ", **not reached**"),
    ]


def threads(facts: dict) -> str:
    return "1 thread" if facts["threads"] == 1 else f"{facts['threads']} threads"


def results_table() -> str:
    lines = [
        "| example | cell | seconds | measured | result | baseline | goal |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, title in EXAMPLES.items():
        facts = published(name)
        if not facts:
            lines.append(f"| [{title}](#{name}) | | | not yet run at full size | | | |")
        for number, result in enumerate(facts.get("results", [])):
            first = [f"[{title}](#{name})", facts["cell"] or "all", f"{facts['cpu_seconds']:.0f}"]
            first = [""] * len(first) if number else first
            cells = [*first, *row(result)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gallery() -> str:
    """A section for each example: its docstring, how it was run, its picture."""
    parts = []
    for name, title in EXAMPLES.items():
        source = (ROOT / "examples" / f"{name}.py").read_text()
        text = ast.get_docstring(ast.parse(source)).partition("\n\n")[2]
        facts = published(name)
        parts.append(f"## {title} {{: #{name} }}\n\n`python examples/{name}.py`\n\n{text}")
        if facts:
            parts.append(
                f"*The published run: {facts['steps']:,} steps, seed {facts['seed']}, on "
                f"{facts['device']} with {threads(facts)}: {facts['cpu_seconds']:.0f} s of CPU "
                f"time in {facts['seconds']:.0f} s, torch {facts['torch']}.*"
            )
        if (ROOT / "docs" / "pictures" / f"{name}.png").exists():
            parts.append(f"![{title}](pictures/{name}.png)")
    return "\n\n".join(parts)

"""The documentation: its code runs, its links lead somewhere, its list of errors is complete."""

import ast
import importlib.util
import operator
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import fused_rnn
from fused_rnn import dispatch, native
from fused_rnn.cells import CELLS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
VARIABLE = "…"


def page_id(path):
    return str(path.relative_to(ROOT))


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def tables(monkeypatch):
    """A page may add a cell or a backend; what it added is gone after the test."""
    monkeypatch.setattr(dispatch, "BACKENDS", dict(dispatch.BACKENDS))
    before = dict(CELLS)
    yield
    CELLS.clear()
    CELLS.update(before)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=page_id)
def test_code_of_pages_runs(page, tmp_path, monkeypatch, tables):
    """A page's blocks run one after the other, as a reader would type them."""
    if "export.cpu_library()" in page.read_text() and (reason := native.cpu_library_error()):
        pytest.skip(reason)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    for number, block in enumerate(blocks(page), 1):
        exec(compile(block, f"{page.name}, python block {number}", "exec"), names)


def test_what_explain_prints_in_the_guide(cpu_backend, monkeypatch):
    monkeypatch.setenv("FUSED_RNN_BACKEND", "auto")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    page = ROOT / "docs" / "backends.md"
    printed = []
    names = {"print": lambda text: printed.append(str(text)), "__name__": "page"}
    for block in blocks(page)[:2]:
        exec(compile(block, page.name, "exec"), names)
    assert len(printed) == 2
    for text in printed:
        as_there = text.replace(f"cpu/{native.cpu_capability()} ", "cpu/avx512 ")
        assert textwrap.indent(as_there, "    ") + "\n" in page.read_text()


def test_pages_with_code_are_found():
    assert {"README.md", "index.md", "drop-in.md", "extending.md"} <= {
        page.name for page in PAGES if blocks(page)
    }


def anchors(page):
    """As the site and as GitHub make them from headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    plain = (re.sub(r"[`*]|\{.*\}", "", heading).strip().lower() for heading in headings)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading)) for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page):
    """Links within the repository."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name}: {target} is not there"
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), f"{page.name}: {target} has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_table_has_a_head(page):
    """A row behind an empty line is no row: it is shown as text."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, rule, *_ = [*table.splitlines(), ""]
        assert re.fullmatch(r"\|(\s*:?-+:?\s*\|)+", rule), f"{page.name}: {head}"


def test_architectures_in_the_docs_are_those_of_the_build():
    setup = (ROOT / "setup.py").read_text()
    built = re.search(r'^CUDA_ARCHITECTURES = "(.*)"', setup, re.MULTILINE)[1]
    assert f"`{built}` unless set" in (ROOT / "docs" / "backends.md").read_text()


def template(node):
    """A message as text with `…` where something is filled in; None where all of it is."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = (p.value if isinstance(p, ast.Constant) else VARIABLE for p in node.values)
        return re.sub(f"{VARIABLE}+", VARIABLE, "".join(parts))
    return None


def messages():
    """Every message that the package raises or warns with, except in the tools for tests."""
    for path in sorted((ROOT / "fused_rnn").rglob("*.py")):
        if path.stem in ("testing", "__main__"):
            continue
        tree = ast.parse(path.read_text())
        constants = {
            target.id: template(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(tree):
            call = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(call, ast.Call) or not call.args:
                continue
            if isinstance(node, ast.Raise) or ast.unparse(call.func) == "warnings.warn":
                first = call.args[0]
                found = template(first)
                if isinstance(first, ast.Name):
                    found = constants.get(first.id)
                if found:
                    yield found


def test_troubleshooting_has_every_message():
    """A message that is missing here needs a row in docs/troubleshooting.md, with its cure."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    listed = set(re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE))
    missing = set(messages()) - listed
    assert not missing, "\n".join(sorted(missing))


def test_troubleshooting_has_no_message_of_the_past():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    ours = page.partition("## Other things that happen")[0]
    listed = set(re.findall(r"^\| `([^`]+)` \|", ours, re.MULTILINE))
    built_up = {f"{VARIABLE}: cannot convert {VARIABLE}"}  # put together before it is raised
    assert listed - set(messages()) <= built_up
    assert len(listed) > 50


def load_hooks():
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def hooks(monkeypatch):
    pytest.importorskip("PIL")  # which publishing pictures takes
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield load_hooks()
    sys.modules.pop("run_all", None)


def test_every_page_is_in_the_navigation(hooks):
    nav = [{"Start here": "index.md"}, {"Troubleshooting": "no.md"}, {"Inside": ["design.md"]}]
    found = str(hooks.complete(nav))
    for page in (ROOT / "docs").rglob("*.md"):
        assert found.count(f"'{page.relative_to(ROOT / 'docs').as_posix()}'") == 1, page
    assert nav[-1] == {"Inside": ["design.md"]}


def test_results_in_the_docs_are_those_of_runs(hooks):
    """What is published was run at full size and reached its goals; the table has it all, and says
    what was not run."""
    table = hooks.results_table().splitlines()[2:]
    for name in hooks.EXAMPLES:
        facts = hooks.published(name)
        assert any(f"(#{name})" in line for line in table)
        if not facts:
            assert any(f"(#{name}) | | not yet run" in line for line in table)
            continue
        assert facts["size"] == "full"
        for result in facts["results"]:
            assert result["reached"], f"{name}: {result['measure']}"
            assert any(result["measure"] in line for line in table)


def test_gallery_has_a_section_for_every_example(hooks):
    text = hooks.gallery()
    for name in hooks.EXAMPLES:
        assert f"{{: #{name} }}" in text and f"python examples/{name}.py" in text


def test_names_in_the_pages_are_there_after_import():
    """`import fused_rnn` is all that a reader was told to write."""
    pages = "".join(page.read_text() for page in PAGES)
    names = sorted(set(re.findall(r"`(fused_rnn(?:\.\w+)+)\b", pages)))
    assert "fused_rnn.interop.keras.from_keras" in names
    code = "import fused_rnn, sys\nfor name in sys.argv[1:]: eval(name)"
    command = [sys.executable, "-c", code, *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_in_the_api_pages():
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    described = set(re.findall(r"^::: fused_rnn\.(\S+)$", pages, re.MULTILINE))
    assert set(fused_rnn.__all__) <= described
    for name in described:
        operator.attrgetter(name)(fused_rnn)  # what is described is there


def test_names_in_tables_break_where_a_reader_would(hooks):
    html = "<p><code>a_b</code></p><table><td class='x'>see <code>t.py::test_a</code></td></table>"
    broken = hooks.on_page_content(html)
    assert "<code>t.<wbr>py::<wbr>test_<wbr>a</code>" in broken
    assert "<code>a_b</code>" in broken
    assert broken.replace("<wbr>", "") == html


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fused_rnn.LSTM" in (tmp_path / "api" / "modules.html").read_text()

"""What holds for the repository as a whole: its layers, its style, its documentation."""

import ast
import doctest
import importlib
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
from helpers.repository import ROOT, tracked_files

import fused_rnn
from fused_rnn import native

PACKAGE = ROOT / "fused_rnn"

# From the bottom to the top. A module imports from layers below its own, and within its own only
# where that is a package (backends).
LAYERS = [
    {"_C"},
    {"environment"},
    {"cells", "looks", "native", "once", "symbolic", "torchscript", "transfer", "transformed"},
    {"problem", "checks", "onnx_node"},
    {"oracle", "handover", "layer_call"},
    {"recurrences", "flops"},
    {"plain"},
    {"backends", "onnx"},
    {"dispatch"},
    {"direct", "second_order"},
    {"derivatives"},
    {"ops"},
    {"general_scan", "stack", "transforms"},
    {"functional", "regularised", "stateful"},
    {"compiled", "training"},
    {"cell_modules", "modules"},
    {"convert", "explanation", "export", "testing"},
    {"bench", "interop", "streaming", "truncated"},
    {"__init__"},
    {"__main__"},
]
HEIGHT = {name: height for height, layer in enumerate(LAYERS) for name in layer}


def package_part(path):
    """The module of a file, or the subpackage it belongs to: a name of LAYERS."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """The parts of the package that a file imports, with the lines that do."""
    package = ("fused_rnn", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = list(package[: len(package) - node.level + 1]) if node.level else []
            module = above + (node.module.split(".") if node.module else [])
            # In `from . import dispatch` the module is among the names.
            targets = [[*module, alias.name] for alias in node.names]
        else:
            continue
        for target in targets:
            if target[0] == "fused_rnn":
                part = target[1] if len(target) > 1 and target[1] in HEIGHT else "__init__"
                yield part, node.lineno


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_imports_go_down(path):
    part = package_part(path)
    assert part in HEIGHT, f"{path.name}: say in LAYERS where {part} belongs"
    for imported, line in imports(path):
        allowed = HEIGHT[imported] < HEIGHT[part] or imported == part in ("backends", "interop")
        assert allowed, f"{path}:{line}: {part} imports {imported}, which is not below it"


def test_import_scan_sees_every_form():
    """The test above is only as good as this: names of known imports, in each written form."""
    found = {part for part, _ in imports(PACKAGE / "ops.py")}
    assert {"dispatch", "backends", "cells", "problem"} <= found


def names_of_torch(tree):
    """Every dotted name that begins with torch, with its line; the longest of each only."""
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in inner:
            name = ast.unparse(node)
            if re.fullmatch(r"torch(\.\w+)+", name):
                yield name, node.lineno


def is_missing(name):
    """Whether torch has no such name, as far down as its modules go."""
    module, *rest = name.split(".")
    found = importlib.import_module(module)
    for part in rest:
        if type(found) is not types.ModuleType or part.startswith("_"):  # not torch.ops
            return False
        if not hasattr(found, part):
            return True
        found = getattr(found, part)
    return False


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_torch_has_what_is_asked_of_it(path):
    """What runs on a GPU only is run by no test here: a name misspelt there shows in this one."""
    tree = ast.parse(path.read_text())
    missing = [f"{path}:{line}: {n}" for n, line in names_of_torch(tree) if is_missing(n)]
    assert not missing, "\n".join(missing)


def test_a_misspelt_name_of_torch_is_seen():
    tree = ast.parse("torch.cuda.current_streams(x).cuda_stream + torch.cuda.current_stream(x).id")
    assert [n for n, _ in names_of_torch(tree) if is_missing(n)] == ["torch.cuda.current_streams"]


def test_no_macro_names_the_operators():
    """Torch 2.10 makes a string of the name as it stands: the CUDA operators, of which a macro is
    the name, were nowhere to be found where it had compiled them."""
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    pattern = re.compile(r"^STABLE_TORCH_LIBRARY\w*\(([^)]*), m\)", re.M)
    names = [name for path in sources for name in pattern.findall(path.read_text())]
    assert names
    assert not [name for name in names if re.search(r"\b[A-Z]+_", name)], names


def test_nothing_imports_a_test_file():
    """What two of them need is in tests/helpers. Programs that tests write down count, too."""
    files = sorted((ROOT / "tests").rglob("*.py"))
    names = "|".join(path.stem for path in files if path.stem.startswith("test_"))
    pattern = re.compile(rf"^[ \t]*(?:from|import)\b.*\b(?:{names})\b", re.M)
    found = [
        f"{path.name}: {m[0].strip()}" for path in files for m in pattern.finditer(path.read_text())
    ]
    assert not found, "\n".join(found)


def test_no_paths_of_one_machine():
    # Split, so that this file does not find itself.
    pattern = re.compile(r"(?<![\w.])/(?:ho" + r"me|Use" + r"rs|ro" + r"ot|t" + r"mp)/\w")
    found = []
    for path in tracked_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", fused_rnn.__all__)
def test_public_names_are_documented(name):
    value = getattr(fused_rnn, name)
    # Not inspect.getdoc: it would find the docstring of torch's base class.
    assert (value.__doc__ or "").strip(), f"fused_rnn.{name} has no docstring"


def public_modules():
    top = [
        "fused_rnn" if part == "__init__" else f"fused_rnn.{part}"
        for part in (path.stem for path in sorted(PACKAGE.glob("*.py")))
        if part != "__main__"
    ]
    return [*top, "fused_rnn.interop.keras", "fused_rnn.interop.onnx_weights"]


@pytest.mark.parametrize("name", public_modules())
def test_docstring_examples_run(name):
    if name == "fused_rnn.export" and (reason := native.cpu_library_error()):
        pytest.skip(reason)  # one of its tables is of the library's operator
    result = doctest.testmod(
        importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    )
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples failed, see stdout"


@pytest.mark.parametrize("arguments", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff(arguments):
    beside = Path(sys.executable).with_name("ruff")
    ruff = str(beside) if beside.exists() else shutil.which("ruff")
    if ruff is None:
        pytest.skip("ruff is not installed")
    # Named one by one: ruff skips whole folders that an outer .gitignore names.
    files = [str(path) for path in tracked_files() if path.suffix == ".py"]
    done = subprocess.run(
        [ruff, *arguments, "--no-cache", *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_linter_versions_are_one():
    """pre-commit cannot read constraints.txt, so its versions are compared here."""
    pinned = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.M))
    config = (ROOT / ".pre-commit-config.yaml").read_text()
    used = re.findall(r"additional_dependencies: \[([\w-]+)==([\w.]+)\]", config)
    assert used
    for name, version in used:
        assert pinned[name] == version, f"{name}: {version} in pre-commit, {pinned[name]} pinned"

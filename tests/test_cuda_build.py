"""The CUDA library compiles without a GPU, its kernels keep to their registers, and it does no harm
where there is none."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.cuda import scan_arguments
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only

import fused_rnn
from fused_rnn import dispatch, native, testing
from fused_rnn.backends.cuda import CudaEmulatedBackend
from fused_rnn.cells import CELLS
from fused_rnn.layer_call import make_problem
from fused_rnn.testing import LayerCase

ROOT = Path(__file__).parents[1]
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not on the PATH")
MAX_REGISTERS, MAX_SHARED = 255, 227 << 10
# Those the build compiles for, as nvcc calls them.
_NUMBERS = re.search(r'^CUDA_ARCHITECTURES = "(.*)"', (ROOT / "setup.py").read_text(), re.M)[1]
ARCHITECTURES = [
    "sm_" + number.removesuffix("+PTX").replace(".", "") for number in _NUMBERS.split(";")
]


def compile_kernels(folder: Path, source: str, arch: str, *options: str) -> dict[str, str]:
    """What ptxas says of each kernel, by its mangled name."""
    command = [
        *("nvcc", "-std=c++20", "-O3", "--expt-relaxed-constexpr", f"-arch={arch}", "-cubin"),
        *("-Xptxas", "-v", *options, "-o", str(folder / "kernels.cubin"), source),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    parts = re.split(r"Compiling entry function '(\w+)'", done.stderr)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def check_resources(reports: dict[str, str]) -> None:
    assert reports
    for name, report in reports.items():
        stack = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        assert set(re.search(stack, report).groups()) == {"0"}, f"{name}: {report}"
        registers = int(re.search(r"Used (\d+) registers", report)[1])
        assert registers <= MAX_REGISTERS, f"{name}: {registers} registers"


ONE_OF_EACH = """
#include "csrc/cuda/launch.h"
namespace fused_rnn {
constexpr int number(const auto& tiles) {  // of the first tile that is on one CTA, or on the grid
  for (size_t i = 0; i < tiles.size(); i++) if (tiles[i].grid == GRID) return static_cast<int>(i);
  return -1;
}
constexpr CellKind kKind = GRID ? CellKind::rnn_tanh : CellKind::lstm;
using Cell = CellOf<kKind, Bfloat16Math>::Type;
using Forward = ForwardTileAt<kKind, 2, number(forward_tiles<kKind, 2>())>;
using Backward = BackwardTileAt<kKind, 2, number(backward_tiles<kKind, 2>())>;
template __global__ void scan_forward<Cell, Bfloat16Element, Forward>(ForwardParams);
template __global__ void scan_backward<Cell, Bfloat16Element, Backward, kKind>(BackwardParams);
}
"""


@needs_nvcc
@pytest.mark.parametrize(("arch", "grid"), [("sm_90a", 0), ("sm_80", 1)])
def test_a_kernel_of_each_direction_compiles(arch, grid, tmp_path):
    """The quick part of the matrix below: a small tile of one CTA, one across the grid."""
    source = tmp_path / "kernels.cu"
    source.write_text(ONE_OF_EACH)
    options = ["-I", str(ROOT), f"-DGRID={grid}"]
    reports = compile_kernels(tmp_path, str(source), arch, *options)
    assert len(reports) == 2
    check_resources(reports)


def cuobjdump() -> str:
    """The toolkit's or the one that comes with Triton."""
    if found := shutil.which("cuobjdump"):
        return found
    if spec := importlib.util.find_spec("triton"):
        found = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if found.exists():
            return str(found)
    pytest.skip("there is no cuobjdump")


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_90a", "sm_80"])
def test_products_of_a_timestep_are_nothing_but_products(arch, tmp_path):
    """Whose weights are all in registers, as in a small tile's forward scan: between the first and
    the last product the machine at most reads h, which it does behind the step's barrier, and does
    not load weights, test or branch."""
    source = tmp_path / "kernels.cu"
    source.write_text(ONE_OF_EACH)
    tool = cuobjdump()
    compile_kernels(tmp_path, str(source), arch, "-I", str(ROOT), "-DGRID=0")
    done = subprocess.run(
        [tool, "-sass", str(tmp_path / "kernels.cubin")], capture_output=True, text=True, check=True
    )
    forward = next(f for f in done.stdout.split("Function : ") if "scan_forward" in f[:80])
    operation = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?\s*([A-Z0-9]+)"
    operations = re.findall(operation, forward, re.MULTILINE)
    products = [i for i, name in enumerate(operations) if name == "HMMA"]
    assert len(products) == 8  # 32 gate rows of a warp by 64 units
    between = set(operations[products[0] : products[-1] + 1])
    behind_barrier = max(i for i in range(products[0]) if operations[i] == "BAR")
    assert "LDS" in operations[behind_barrier : products[-1]]
    assert not between & {"LD", "LDG", "LDL", "STL", "ISETP", "UISETP", "BRA", "BAR"}, between


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("params", ["ForwardParams", "BackwardParams"])
@pytest.mark.parametrize("element", ["bfloat16", "float16", "float32", "tf32"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_no_kernel_spills(cell, element, params, arch, tmp_path):
    defines = [f"-DFUSED_RNN_ELEMENT={element}", f"-DFUSED_RNN_PARAMS={params}"]
    check_resources(compile_kernels(tmp_path, f"csrc/cuda/scan_{cell}.cu", arch, *defines))


@needs_nvcc
@pytest.mark.parametrize(
    "arch",
    [pytest.param(a, marks=[] if a == "sm_90a" else pytest.mark.slow) for a in ARCHITECTURES],
)
def test_no_kernel_of_a_step_spills(arch, tmp_path):
    check_resources(compile_kernels(tmp_path, "csrc/cuda/steps.cu", arch))


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("name", ["microbenchmarks", "tiles"])
def test_benchmarks_of_kernels_compile(name, tmp_path):
    source = str(ROOT / "benchmarks" / "gpu" / f"{name}.cu")
    compile_kernels(tmp_path, source, "sm_90a")


TABLE = """
#include <cstdio>
#include "csrc/cuda/instances.h"
using namespace fused_rnn;
template <CellKind kind, int bytes>
int check(int limit) {
  int wrong = 0;
  for (const auto& tile : forward_tiles<kind, bytes>()) {
    const int gates = static_cast<int>(cell_sizes(kind).gates);
    const auto l = layout_of(tile, gates, bytes);
    if (is_whole(tile, gates, bytes) && l.shared_bytes <= limit && l.threads <= 1024) continue;
    std::printf("forward %d, %d, %d: %d bytes\\n", tile.hidden, tile.cluster, tile.row_blocks,
                l.shared_bytes);
    wrong++;
  }
  for (const auto& tile : backward_tiles<kind, bytes>()) {
    const auto l = layout_of(tile, kind, bytes);
    if (is_whole(tile, kind, bytes) && l.shared_bytes <= limit && l.threads <= 1024) continue;
    std::printf("backward %d, %d, %d: %d bytes\\n", tile.hidden, tile.cluster, tile.row_blocks,
                l.shared_bytes);
    wrong++;
  }
  return wrong;
}
int main() {
  return check<CellKind::lstm, 2>(LIMIT) + check<CellKind::gru, 2>(LIMIT) +
         check<CellKind::rnn_tanh, 2>(LIMIT) + check<CellKind::lstm, 4>(LIMIT) +
         check<CellKind::gru, 4>(LIMIT) + check<CellKind::rnn_tanh, 4>(LIMIT);
}
"""


def test_every_tile_of_the_table_is_whole_and_fits(tmp_path):
    """With any C++ compiler: shared memory of the largest device, threads, divisibility."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if not compiler:
        pytest.skip("needs a C++ compiler")
    source = tmp_path / "table.cpp"
    source.write_text(TABLE)
    program = tmp_path / "table"
    command = [compiler, "-std=c++20", f"-DLIMIT={MAX_SHARED}", "-I", str(ROOT), str(source)]
    subprocess.run([*command, "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def cuda_library():
    if reason := native.cuda_library_error():
        pytest.skip(reason)
    return torch.ops.fused_rnn_cuda


def test_the_library_loads_beside_any_torch(cuda_library):
    names = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
    assert {"fused_rnn_cuda::scan_forward", "fused_rnn_cuda::scan_backward"} <= set(names)


def test_it_has_the_operators_of_the_emulation(cuda_library):
    if reason := native.cuda_emulated_library_error():
        pytest.skip(reason)
    for name in ("scan_forward", "scan_backward", "refusal", "describe"):
        real, emulated = (
            str(getattr(library, name).default._schema).partition("::")[2]
            for library in (cuda_library, torch.ops.fused_rnn_cuda_emulated)
        )
        assert real == emulated


def test_cpu_tensors_do_not_get_as_far_as_a_kernel(cuda_library):
    with pytest.raises(NotImplementedError, match=r"fused_rnn_cuda::scan_forward.* 'CPU' backend"):
        cuda_library.scan_forward(*scan_arguments().values())


@pytest.mark.parametrize("cell", CELLS)
def test_a_compiler_knows_the_shapes_of_a_layer_on_cuda(cell):
    """Without a GPU, too: neither the library nor the device is asked."""
    inputs = testing.make_inputs(LayerCase(cell, 3, 2, 4, 5, directions=2))
    real = torch.ops.fused_rnn.layer_forward(*inputs.forward_args(True, "reference"))
    with FakeTensorMode():
        on_cuda = tree_map_only(
            torch.Tensor,
            lambda t: torch.empty(t.shape, device="cuda"),
            inputs.forward_args(True, "cuda"),
        )
        fake = torch.ops.fused_rnn.layer_forward(*on_cuda)
    for ours, theirs in zip(fake, real, strict=True):
        assert ours.device.type == "cuda"
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_backend_has_a_reason(cuda_library):
    problem = make_problem(*testing.make_inputs(LayerCase("gru", 3, 2, 4, 5)).args, True)
    reason = dispatch.find("cuda").unsupported(replace(problem, device_type="cuda"))
    assert reason == "torch finds no GPU"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(cuda_library):
    with pytest.raises(RuntimeError, match="CUDA: "):
        cuda_library.refusal(3, 2, 64, 8, 1, True, "", 0)
    with pytest.raises(RuntimeError, match="device: expected an index"):
        cuda_library.refusal(3, 2, 64, 8, 1, True, "", -1)


def test_cpu_tensors_are_none_of_its_business():
    layer = fused_rnn.LSTM(3, 4)
    with (
        fused_rnn.backend("cuda"),
        pytest.raises(fused_rnn.UnsupportedProblemError, match="needs tensors on cuda, got cpu"),
    ):
        layer(torch.randn(2, 1, 3))


def test_a_library_that_does_not_load_is_a_reason(tmp_path, monkeypatch):
    broken = tmp_path / "libfused_rnn_cuda.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(native, "_CUDA_LIBRARY", broken)
    native.cuda_library_error.cache_clear()
    try:
        assert "cannot be loaded" in native.cuda_library_error()
    finally:
        native.cuda_library_error.cache_clear()


def test_a_device_that_cannot_be_used_is_a_reason():
    class BrokenOps:
        @staticmethod
        def refusal(*arguments):
            raise RuntimeError("CUDA: driver version is insufficient\nfrom somewhere")

    class Backend(CudaEmulatedBackend):
        ops = BrokenOps

        def library_error(self):
            return None

    problem = make_problem(*testing.make_inputs(LayerCase("gru", 3, 2, 4, 5)).args, True)
    reason = Backend().unsupported(problem)
    assert reason == "the device cannot be used: CUDA: driver version is insufficient"


@pytest.mark.parametrize(
    ("variables", "path", "message"),
    [
        ({"FORCE_CUDA": "1"}, "empty", "FORCE_CUDA is set, but there is no nvcc"),
        ({"FUSED_RNN_CUDA": "1"}, "empty", "NO NVCC on the PATH"),
        ({"FUSED_RNN_CUDA": "yes"}, "", "expected 0, 1 or auto, got 'yes'"),
    ],
)
def test_what_a_build_says_without_nvcc(variables, path, message, tmp_path):
    """setup.py only has to look around: `--name` builds nothing."""
    env = {k: v for k, v in os.environ.items() if k not in ("FORCE_CUDA", "FUSED_RNN_CUDA")}
    env |= variables
    if path:
        compiler = shutil.which("c++") or shutil.which("g++")
        if not compiler:
            pytest.skip("needs a C++ compiler")
        env |= {"PATH": str(tmp_path), "CXX": compiler}
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "--name"],
        cwd=ROOT, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert message in done.stderr
    assert (done.returncode != 0) == ("NO NVCC" not in message)

// fused_rnn._C: how the package was built and what this CPU has, for the doctor; the planner of the
// CUDA kernels, which needs no GPU; and direct calls (direct_calls.h).
//
// Torch-free, so that it can be imported where the library itself cannot be loaded.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>

#include "../cpu/features.h"
#include "../plan.h"
#include "direct_calls.h"

namespace py = pybind11;

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "gcc " __VERSION__;
#else
constexpr const char* kCompiler = "unknown";
#endif

py::list compiled_capabilities() {
  py::list names;
#if defined(FUSED_RNN_X86)
  names.append("amx");
  names.append("avx512");
  names.append("avx2");
#endif
  names.append("portable");
  return names;
}

py::dict build_facts() {
  py::dict facts;
  facts["compiler"] = kCompiler;
  facts["cxx_flags"] = FUSED_RNN_CXX_FLAGS;
  facts["built_against_torch"] = FUSED_RNN_TORCH_VERSION;
  facts["capabilities"] = compiled_capabilities();
  return facts;
}

py::dict cpu_features() {
  py::dict features;
#if defined(__aarch64__)
  features["dotprod"] = fused_rnn::cpu_has_dot_products();
#else
  features["amx"] = fused_rnn::cpu_has_amx();
  features["avx512bf16"] = fused_rnn::cpu_has_avx512bf16();
  features["avx512vnni"] = fused_rnn::cpu_has_avx512vnni();
  features["avx512"] = fused_rnn::cpu_has_avx512();
  features["avx2"] = fused_rnn::cpu_has_avx2();
#endif
  return features;
}

py::dict tile_facts(const fused_rnn::ForwardTile& tile) {
  py::dict facts;
  facts["hidden"] = tile.hidden;
  facts["cluster"] = tile.cluster;
  facts["row_blocks"] = tile.row_blocks;
  facts["split_k"] = tile.split_k;
  return facts;
}

py::dict tile_facts(const fused_rnn::BackwardTile& tile) {
  py::dict facts;
  facts["hidden"] = tile.hidden;
  facts["cluster"] = tile.cluster;
  facts["row_blocks"] = tile.row_blocks;
  return facts;
}

template <class Tile>
py::object plan_facts(const fused_rnn::Plan<Tile>& plan) {
  using fused_rnn::Regime;
  if (plan.regime == Regime::none) return py::none();
  const bool steps = plan.regime == Regime::steps;
  py::dict facts = steps ? py::dict() : tile_facts(plan.tile);
  facts["regime"] = steps ? "steps" : plan.regime == Regime::grid ? "grid" : "cluster";
  facts["ctas"] = plan.shape.ctas;
  facts["directions"] = plan.shape.directions;
  facts["threads"] = plan.shape.threads;
  facts["shared_bytes"] = plan.shape.shared_bytes;
  return facts;
}

py::dict plan(int cell, int element_bytes, int64_t hidden_size, int64_t batch_size,
              int64_t directions, int capability, int processors, int shared_bytes, int max_cluster,
              const std::string& regime, bool is_shared, int64_t layers, int64_t timesteps) {
  if (cell < 0 || cell >= fused_rnn::kCellKinds) {
    throw py::value_error("cell: expected 0 to " + std::to_string(fused_rnn::kCellKinds - 1));
  }
  if (element_bytes != 2 && element_bytes != 4) {
    throw py::value_error("element_bytes: expected 2 or 4");
  }
  if (directions < 1 || directions > 2) throw py::value_error("directions: expected 1 or 2");
  for (const auto& [name, value] :
       std::initializer_list<std::pair<const char*, int64_t>>{{"hidden_size", hidden_size},
                                                              {"batch_size", batch_size},
                                                              {"processors", processors},
                                                              {"shared_bytes", shared_bytes},
                                                              {"max_cluster", max_cluster},
                                                              {"layers", layers},
                                                              {"timesteps", timesteps}}) {
    // So that nothing is divided by zero, and no product of two of them overflows.
    if (value < 1 || value > INT32_MAX) {
      throw py::value_error(std::string(name) + ": expected 1 to 2^31 - 1, got " +
                            std::to_string(value));
    }
  }
  const fused_rnn::ScanProblem problem{static_cast<fused_rnn::CellKind>(cell), element_bytes,
                                       hidden_size, batch_size, directions};
  const fused_rnn::Device device{capability, processors, shared_bytes, max_cluster, is_shared};
  py::dict facts;
  const fused_rnn::ForcedRegime forced = fused_rnn::regime_called(regime);
  facts["forward"] = plan_facts(plan_forward(problem, device, forced, layers));
  facts["backward"] = plan_facts(plan_backward(problem, device, forced, layers));
  facts["refusal"] = plan_refusal(problem, device, true, forced);
  facts["kernels"] = describe_plan(problem, device, true, forced);
  const fused_rnn::StackProblem stack{problem, layers, timesteps, true};
  facts["stack_refusal"] = stack_refusal(stack, device, forced);
  const fused_rnn::StackPlan chunks = plan_stack(stack, device, forced);
  facts["chunks"] = py::make_tuple(chunks.forward, chunks.backward);
  return facts;
}

}  // namespace

// All that is ever written to is what `connect` fills, which direct.py calls once: Python without
// the GIL is not to turn it on for this module.
PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  if (fused_rnn::add_direct_calls(m.ptr()) != 0) throw py::error_already_set();
  m.doc() = "Build facts, the planner of the CUDA kernels, and direct calls of the CPU library.";
  m.def("build_facts", &build_facts, "Compiler, flags, torch version and instruction sets.");
  m.def("cpu_features", &cpu_features, "Which instruction sets this CPU can run.");
  m.def(
      "plan", &plan,
      "The CUDA kernels for a layer on a device: of each pass its regime and tile, or None; why a "
      "layer in training is refused, or ''; and the kernels in words. Of `layers` of them side by "
      "side, in training: the timesteps of a chunk in each pass, 0 where they had better follow "
      "one "
      "another, and why they cannot be.",
      py::arg("cell"), py::arg("element_bytes"), py::arg("hidden_size"), py::arg("batch_size"),
      py::arg("directions"), py::arg("capability"), py::arg("processors"), py::arg("shared_bytes"),
      py::arg("max_cluster"), py::arg("regime") = "", py::arg("is_shared") = false,
      py::arg("layers") = 1, py::arg("timesteps") = 1);
}

// fused_rnn._C: how the package was built and what this CPU has, for the doctor.
//
// Torch-free, so that it can be imported where the library itself cannot be loaded.
#include <pybind11/pybind11.h>

#include "cpu/features.h"

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
  features["avx512bf16"] = fused_rnn::cpu_has_avx512bf16();
  features["avx512"] = fused_rnn::cpu_has_avx512();
  features["avx2"] = fused_rnn::cpu_has_avx2();
  return features;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts of fused_rnn's compiled parts.";
  m.def("build_facts", &build_facts, "Compiler, flags, torch version and instruction sets.");
  m.def("cpu_features", &cpu_features, "Which instruction sets this CPU can run.");
}

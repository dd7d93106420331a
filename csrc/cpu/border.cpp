#include "border.h"

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>

#include "../tensor_checks.h"
#include "../torch_compat.h"
#include "features.h"

namespace fused_rnn {

namespace {

std::atomic<const KernelsOf<float>*> known_kernels{nullptr};

const KernelsOf<float>& find_kernels() {
  struct Candidate {
    const KernelsOf<float>* kernels;
    bool runs;
  };
  const Candidate candidates[] = {
#if defined(FUSED_RNN_X86)
      {&amx_kernels, cpu_has_amx()},
      {&avx512_kernels, cpu_has_avx512()},
      {&avx2_kernels, cpu_has_avx2()},
#endif
      {&portable_kernels, true},
  };
  const char* wanted = std::getenv("FUSED_RNN_CPU_CAPABILITY");
  const bool automatic = wanted == nullptr || *wanted == '\0';
  std::string known;
  for (const Candidate& candidate : candidates) {
    const char* name = candidate.kernels->name;
    if (automatic ? candidate.runs : std::strcmp(wanted, name) == 0) {
      STD_TORCH_CHECK(candidate.runs, "FUSED_RNN_CPU_CAPABILITY=", name,
                      ": this CPU does not have it");
      return *candidate.kernels;
    }
    known += (known.empty() ? "" : ", ") + std::string(name);
  }
  STD_TORCH_CHECK(false, "FUSED_RNN_CPU_CAPABILITY: expected one of ", known, "; got '", wanted,
                  "'");
}

void run_in_parallel(int64_t items, int64_t grain,
                     const std::function<void(int64_t, int64_t)>& body) {
  // torch keeps nothing of an exception but that there was one.
  std::mutex mutex;
  std::exception_ptr failure;
  torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
    try {
      body(begin, end);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      failure = std::current_exception();
    }
  });
  if (failure) std::rethrow_exception(failure);
}

}  // namespace

// The environment is read once: while another thread changes it, that is not safe.
const KernelsOf<float>& kernels() {
  const KernelsOf<float>* known = known_kernels.load(std::memory_order_relaxed);
  if (known != nullptr) return *known;
  const KernelsOf<float>& found = find_kernels();
  known_kernels.store(&found, std::memory_order_relaxed);
  return found;
}

const KernelsOf<BFloat16>* bfloat16_kernels() {
#if defined(FUSED_RNN_X86)
  if (&kernels() == &amx_kernels) return &amxbf16_kernels;
  if (&kernels() == &avx512_kernels && cpu_has_avx512bf16()) return &avx512bf16_kernels;
#endif
  return nullptr;
}

void forget_kernels() { known_kernels.store(nullptr, std::memory_order_relaxed); }

Threads torch_threads() {
  return {static_cast<int64_t>(torch::stable::get_num_threads()), run_in_parallel};
}

int32_t dtype_of(NumberType type) {
  switch (type) {
    case NumberType::bfloat16:
      return aoti_torch_dtype_bfloat16();
    case NumberType::float16:
      return aoti_torch_dtype_float16();
    case NumberType::int64:
      return aoti_torch_dtype_int64();
    default:
      return aoti_torch_dtype_float32();
  }
}

// Not scalar_type() and layout(), which throw for kinds they do not know.
Array strided_array_of(const Tensor& tensor) {
  int32_t dtype = 0, layout = 0;
  FUSED_RNN_TORCH_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  FUSED_RNN_TORCH_CHECK(aoti_torch_get_layout(tensor.get(), &layout));
  const bool fits = layout == aoti_torch_layout_strided() && tensor.is_cpu() && has_memory(tensor);
  for (NumberType type : kNumberTypes) {
    if (!fits || dtype != dtype_of(type)) continue;
    return Array::of(tensor.const_data_ptr(), type, tensor.dim(), tensor.sizes().data(),
                     tensor.is_contiguous() ? nullptr : tensor.strides().data());
  }
  return {};
}

Array array_of(const Tensor& tensor) {
  const Array array = strided_array_of(tensor);
  return array.is_dense() ? array : Array{};
}

Tensor empty(const int64_t* sizes, int64_t dimensions, int32_t dtype, bool swapped) {
  int64_t strides[3];
  set_strides(sizes, dimensions, swapped, strides);
  AtenTensorHandle handle = nullptr;
  FUSED_RNN_TORCH_CHECK(aoti_torch_empty_strided(dimensions, sizes, strides, dtype,
                                                 aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

int64_t find_offsets(const int64_t* batch_sizes, int64_t timesteps, int64_t batch,
                     std::vector<int64_t>& offsets, int64_t& total) {
  offsets.resize(static_cast<size_t>(timesteps));
  total = 0;
  for (int64_t t = 0; t < timesteps; t++) {
    if (batch_sizes[t] < 0 || batch_sizes[t] > batch) return t;
    offsets[static_cast<size_t>(t)] = total;
    total += batch = batch_sizes[t];
  }
  return -1;
}

}  // namespace fused_rnn

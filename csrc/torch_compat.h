// What only newer releases have in torch's stable headers; the package takes torch from 2.10 on.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <stdexcept>
#include <string>

// Null where torch is older than 2.13.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace fused_rnn {

// What torch says of the call that has just failed in this thread, as that memory ran out, before
// what is known without it.
inline std::string said_by_torch(const std::string& text) {
  if (torch_exception_get_what_without_backtrace == nullptr) return text;
  const std::string said = torch_exception_get_what_without_backtrace();
  if (said.empty() || text.find(said) != std::string::npos) return text;
  return said + " (" + text + ")";
}

}  // namespace fused_rnn

#define FUSED_RNN_TORCH_CHECK(call)                                                    \
  if ((call) != TORCH_SUCCESS) {                                                       \
    throw std::runtime_error(fused_rnn::said_by_torch("torch's call failed: " #call)); \
  }

// Null where torch is older than 2.11.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes_ptr, const int64_t* strides_ptr,
    int64_t storage_offset, int32_t dtype, int32_t device_type, int32_t device_index,
    AtenTensorHandle* ret, int32_t layout, const uint8_t* opaque_metadata,
    int64_t opaque_metadata_size, void (*deleter)(void* data, void* ctx), void* deleter_ctx);

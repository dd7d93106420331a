// What only newer releases have in torch's stable headers; the package takes torch from 2.10 on.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#if !defined(STABLE_TORCH_ERROR_CODE_CHECK)  // 2.11 does not have it, 2.13 does
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

// Null where torch is older than 2.11.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes_ptr, const int64_t* strides_ptr,
    int64_t storage_offset, int32_t dtype, int32_t device_type, int32_t device_index,
    AtenTensorHandle* ret, int32_t layout, const uint8_t* opaque_metadata,
    int64_t opaque_metadata_size, void (*deleter)(void* data, void* ctx), void* deleter_ctx);

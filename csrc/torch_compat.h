// What torch's stable headers have had for some releases only; the package takes torch from 2.10 on.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#if !defined(STABLE_TORCH_ERROR_CODE_CHECK)  // 2.11 does not have it, 2.13 does
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

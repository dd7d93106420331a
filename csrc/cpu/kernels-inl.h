// All kernels for one instruction set.
//
// The including file defines FUSED_RNN_ISA, a namespace of its own for everything here, and
// FUSED_RNN_VECTOR_WIDTH. No std templates, and no function that the linker might share: a copy
// compiled for AVX-512 could be the one it keeps for everybody.

#include "../cells.h"
#include "kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fused_rnn::FUSED_RNN_ISA {

// clang-format off: in the order of use
#include "vec.h"
#include "tile-inl.h"
#include "rows-inl.h"
#include "pack-inl.h"
#include "forward-inl.h"
#include "backward-inl.h"
#include "products-inl.h"
#include "step-inl.h"
// clang-format on

constexpr Kernels table(const char* name) {
  return {name,    kWidth,   kGradRows, pack_gates, pack_columns,    pack_rows,
          forward, backward, step,      input_grad, transpose_grads, weight_grad};
}

}  // namespace fused_rnn::FUSED_RNN_ISA

// All kernels for one instruction set.
//
// The including file defines FUSED_RNN_ISA, a namespace of its own for everything here,
// FUSED_RNN_VECTOR_WIDTH and FUSED_RNN_ELEMENT, the type of matrix elements; FUSED_RNN_BFLOAT16
// where that is BFloat16, and FUSED_RNN_AMX where AMX multiplies. No std templates, and
// no function that the linker might share: a copy compiled for AVX-512 could be the one it keeps
// for everybody.

#include "../cells.h"
#include "features.h"
#include "kernels.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace fused_rnn::FUSED_RNN_ISA {

typedef FUSED_RNN_ELEMENT Element;
using Weights = WeightsOf<Element>;
using StepParams = StepParamsOf<Element>;
using BackwardCall = BackwardCallOf<Element>;
using PackGatesParams = PackGatesParamsOf<Element>;
using PackColumnsParams = PackColumnsParamsOf<Element>;
using PackRowsParams = PackRowsParamsOf<Element>;
using ForwardParams = ForwardParamsOf<Element>;
using BackwardParams = BackwardParamsOf<Element>;
using InputGradParams = InputGradParamsOf<Element>;
using TransposeParams = TransposeParamsOf<Element>;
using WeightGradParams = WeightGradParamsOf<Element>;
using PeepholeGradParams = PeepholeGradParamsOf<Element>;
using NormGradParams = NormGradParamsOf<Element>;

// clang-format off: in the order of use
#include "vec.h"
#include "element.h"
#include "tile-inl.h"
#include "rows-inl.h"
#include "zoneout-inl.h"
#include "amx-inl.h"
#include "operand-inl.h"
#include "one-row-inl.h"
#include "pack-inl.h"
#include "reset-before-inl.h"
#include "units-inl.h"
#include "normalise-inl.h"
#include "normed-inl.h"
#include "forward-inl.h"
#include "backward-inl.h"
#include "products-inl.h"
#include "unpacked-inl.h"
#include "peephole-inl.h"
#include "norm-grad-inl.h"
#include "step-inl.h"
#include "bytes-inl.h"
#include "stepper-inl.h"
// clang-format on

constexpr KernelsOf<Element> table(const char* name) {
  KernelsOf<Element> kernels{};
  kernels.name = name;
  kernels.width = kWidth;
  kernels.grad_rows = kGradRows;
  kernels.parts = kParts;
  kernels.chunk_bytes = kChunkBytes;
  kernels.chunk_rows = kChunkRows;
  kernels.small_chunk_bytes = kSmallChunkBytes;
  kernels.small_chunk_rows = kSmallChunkRows;
  kernels.input_side_bytes = kInputSideBytes;
  kernels.input_side_rows = kInputSideRows;
  kernels.column_words = column_words;
  kernels.row_words = row_words;
  kernels.pack_gates = pack_gates;
  kernels.pack_columns = pack_columns;
  kernels.pack_rows = pack_rows;
  kernels.forward = forward;
  kernels.backward = backward;
  kernels.step = step;
  kernels.few_steps = few_steps;
  kernels.input_grad = input_grad;
  kernels.unpacked_rows = kMostUnpackedRows;
  kernels.unpacked_columns = kUnpackedColumns * kWidth;
  kernels.unpacked_input = unpacked_product<Element>;
  kernels.unpacked_state = unpacked_product<float>;
  kernels.transpose = transpose_grads;
  kernels.weight_grad = weight_grad;
  kernels.peephole_grad = peephole_grad;
#if !defined(FUSED_RNN_BFLOAT16)
  kernels.packed_step = packed_step;
  kernels.project_step = project_step;
  kernels.packed_input = packed_input;
  kernels.quantise_rows = quantise_rows;
  kernels.quantised_words = quantised_words;
  kernels.norm_grad = norm_grad;
#endif
  return kernels;
}

}  // namespace fused_rnn::FUSED_RNN_ISA

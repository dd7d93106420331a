// All kernels for one instruction set.
//
// The including file defines FUSED_RNN_ISA, a namespace of its own for everything here,
// FUSED_RNN_VECTOR_WIDTH and FUSED_RNN_ELEMENT, the type of matrix elements. No std templates, and
// no function that the linker might share: a copy compiled for AVX-512 could be the one it keeps
// for everybody.

#include "../cells.h"
#include "kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
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

// clang-format off: in the order of use
#include "vec.h"
#include "element.h"
#include "tile-inl.h"
#include "rows-inl.h"
#include "zoneout-inl.h"
#include "pack-inl.h"
#include "reset-before-inl.h"
#include "forward-inl.h"
#include "backward-inl.h"
#include "products-inl.h"
#include "peephole-inl.h"
#include "step-inl.h"
#include "stepper-inl.h"
// clang-format on

constexpr KernelsOf<Element> table(const char* name) {
  return {name,         kWidth,     kGradRows,       pack_gates,  pack_columns,
          pack_rows,    forward,    backward,        step,        packed_step,
          project_step, input_grad, transpose_grads, weight_grad, peephole_grad};
}

}  // namespace fused_rnn::FUSED_RNN_ISA

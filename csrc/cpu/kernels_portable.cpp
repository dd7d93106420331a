#define FUSED_RNN_ISA portable
#define FUSED_RNN_VECTOR_WIDTH 4
#include "kernels-inl.h"

namespace fused_rnn {

const Kernels portable_kernels = portable::table("portable");

}  // namespace fused_rnn

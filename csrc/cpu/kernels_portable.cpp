#define FUSED_RNN_ISA portable
#define FUSED_RNN_VECTOR_WIDTH 4
#define FUSED_RNN_ELEMENT float
#include "kernels-inl.h"

namespace fused_rnn {

const KernelsOf<float> portable_kernels = portable::table("portable");

}  // namespace fused_rnn

#define FUSED_RNN_ISA avx2
#define FUSED_RNN_VECTOR_WIDTH 8
#define FUSED_RNN_ELEMENT float
#include "kernels-inl.h"

namespace fused_rnn {

const KernelsOf<float> avx2_kernels = avx2::table("avx2");

}  // namespace fused_rnn

#define FUSED_RNN_ISA avx512
#define FUSED_RNN_VECTOR_WIDTH 16
#define FUSED_RNN_ELEMENT float
#include "kernels-inl.h"

namespace fused_rnn {

const KernelsOf<float> avx512_kernels = avx512::table("avx512");

}  // namespace fused_rnn

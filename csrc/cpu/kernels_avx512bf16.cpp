#define FUSED_RNN_ISA avx512bf16
#define FUSED_RNN_VECTOR_WIDTH 16
#define FUSED_RNN_ELEMENT BFloat16
#define FUSED_RNN_BFLOAT16
#include "kernels-inl.h"

namespace fused_rnn {

const KernelsOf<BFloat16> avx512bf16_kernels = avx512bf16::table("avx512bf16");

}  // namespace fused_rnn

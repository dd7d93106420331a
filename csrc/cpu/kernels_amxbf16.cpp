#define FUSED_RNN_ISA amxbf16
#define FUSED_RNN_VECTOR_WIDTH 16
#define FUSED_RNN_ELEMENT BFloat16
#define FUSED_RNN_BFLOAT16
#define FUSED_RNN_AMX
#include "kernels-inl.h"

namespace fused_rnn {

const KernelsOf<BFloat16> amxbf16_kernels = amxbf16::table("amxbf16");

}  // namespace fused_rnn

#define FUSED_RNN_ISA amx
#define FUSED_RNN_VECTOR_WIDTH 16
#define FUSED_RNN_ELEMENT float
#define FUSED_RNN_AMX
#include "kernels-inl.h"

namespace fused_rnn {

const KernelsOf<float> amx_kernels = amx::table("amx");

}  // namespace fused_rnn

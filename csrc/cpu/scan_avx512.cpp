#define FUSED_RNN_ISA avx512
#define FUSED_RNN_VECTOR_WIDTH 16
#include "scan-inl.h"

namespace fused_rnn {

const ScanKernels avx512_kernels = {
    "avx512",        avx512::kWidth,   avx512::pack_forward, avx512::pack_backward,
    avx512::forward, avx512::backward,
};

}  // namespace fused_rnn

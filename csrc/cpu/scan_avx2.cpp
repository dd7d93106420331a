#define FUSED_RNN_ISA avx2
#define FUSED_RNN_VECTOR_WIDTH 8
#include "scan-inl.h"

namespace fused_rnn {

const ScanKernels avx2_kernels = {
    "avx2", avx2::kWidth, avx2::pack_forward, avx2::pack_backward, avx2::forward, avx2::backward,
};

}  // namespace fused_rnn

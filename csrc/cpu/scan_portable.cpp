#define FUSED_RNN_ISA portable
#define FUSED_RNN_VECTOR_WIDTH 4
#include "scan-inl.h"

namespace fused_rnn {

const ScanKernels portable_kernels = {
    "portable",        portable::kWidth,   portable::pack_forward, portable::pack_backward,
    portable::forward, portable::backward,
};

}  // namespace fused_rnn

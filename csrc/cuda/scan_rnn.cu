#include "launch.h"

namespace fused_rnn {
FUSED_RNN_INSTANTIATE(rnn_tanh)
FUSED_RNN_INSTANTIATE(rnn_relu)
}  // namespace fused_rnn

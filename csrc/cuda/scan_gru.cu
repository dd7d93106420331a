#include "launch.h"

namespace fused_rnn {
FUSED_RNN_INSTANTIATE(gru)
}  // namespace fused_rnn

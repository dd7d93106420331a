#include "launch.h"

namespace fused_rnn {
FUSED_RNN_INSTANTIATE(lstm)
}  // namespace fused_rnn

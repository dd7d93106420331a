#pragma once

#include <Python.h>

namespace fused_rnn {

// Adds connect, the functions that infer and train, and prepare_step to `module`, or nothing where
// the headers that this was compiled with do not have what it takes. 0, or -1 with an error set.
int add_direct_calls(PyObject* module);

}  // namespace fused_rnn

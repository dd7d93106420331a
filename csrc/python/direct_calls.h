// Inference, and the two passes of training, from Python past torch's dispatcher, which takes
// longer than a small step does.
//
// Every function returns None to a call that is out of the ordinary; then the operator of the same
// arguments is to be called, which may take it or says what is wrong.
#pragma once

#include <Python.h>

namespace fused_rnn {

// Adds connect and the functions below to `module`, or nothing where the headers that this was
// compiled with do not have what it takes. 0, or -1 with an error set.
int add_direct_calls(PyObject* module);

// Methods by METH_FASTCALL; their arguments are in the table of direct_calls.cpp.
using FastMethod = PyObject*(PyObject* self, PyObject* const* args, Py_ssize_t count);
FastMethod infer_module, infer_layers, infer_cell, prepare_step;  // direct_inference.cpp
FastMethod train_layer, train_layer_backward;                     // direct_training.cpp

inline PyCFunction method(FastMethod* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

}  // namespace fused_rnn

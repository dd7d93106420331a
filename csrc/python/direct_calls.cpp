#include "direct_calls.h"

#include "connection.h"

#if defined(FUSED_RNN_DIRECT_CALLS)

#include <algorithm>
#include <cstdint>

namespace fused_rnn {

namespace {

PyObject* connect(PyObject*, PyObject* args) {
  unsigned long long address = 0;
  PyObject *exchange = nullptr, *tensor = nullptr, *parameter = nullptr, *guards = nullptr;
  PyObject *is_excused = nullptr, *cells = nullptr, *any_autocast = nullptr,
           *autocast_type = nullptr;
  Py_ssize_t step_guards = 0;
  if (!PyArg_ParseTuple(args, "KOOOO!nOO!OO", &address, &exchange, &tensor, &parameter,
                        &PyTuple_Type, &guards, &step_guards, &is_excused, &PyDict_Type, &cells,
                        &any_autocast, &autocast_type)) {
    return nullptr;
  }
  const int is_connected = connect_tensors(exchange, tensor, parameter);
  if (is_connected < 0) return nullptr;
  if (is_connected == 0) Py_RETURN_FALSE;
  connected.guards = Py_NewRef(guards);
  connected.is_excused = Py_NewRef(is_excused);
  connected.cells = Py_NewRef(cells);
  connected.any_autocast = Py_NewRef(any_autocast);
  connected.autocast_type = Py_NewRef(autocast_type);
  connected.step_guards = std::min(step_guards, PyTuple_GET_SIZE(guards));
  connected.calls = reinterpret_cast<const DirectCalls*>(static_cast<uintptr_t>(address));
  Py_RETURN_TRUE;
}

PyObject* is_welcome(PyObject*, PyObject*) { return PyBool_FromLong(cpu_is_welcome()); }

PyMethodDef methods[] = {
    {"connect", connect, METH_VARARGS,
     "connect(address of the library's calls, torch's exchange API, Tensor, Parameter, guards, how "
     "many of them matter to a step, the cells' numbers by torch.nn's modes, "
     "torch._C._is_any_autocast_enabled, direct.autocast_type): whether the calls work from now "
     "on."},
    {"infer_module", method(infer_module), METH_FASTCALL,
     "infer_module(module, input, hx): infer_layers of a torch.nn.RNNBase's weights and sizes"},
    {"infer_layers", method(infer_layers), METH_FASTCALL,
     "infer_layers(cell, input, weights, hx, layers, directions, time_first)"},
    {"infer_cell", method(infer_cell), METH_FASTCALL,
     "infer_cell(cell, input, weights, hx, hidden_size)"},
    {"train_layer", method(train_layer), METH_FASTCALL,
     "train_layer(cell, directions, save, all_cells, rows, x, h0, c0, *weights): a list, see "
     "csrc/cpu/direct.h; rows are None, batch_sizes or (lengths, resets, batch_first)"},
    {"train_layer_backward", method(train_layer_backward), METH_FASTCALL,
     "train_layer_backward(cell, directions, batch_first, needs, grad_y, grad_h_n, grad_c_n, "
     "grad_cells, saved): a list of the gradients needed of x, h0, c0 and the weights, from what "
     "fused_rnn/training.py saved"},
    {"cpu_is_welcome", is_welcome, METH_NOARGS,
     "cpu_is_welcome(): whether FUSED_RNN_BACKEND leaves the choice open, or asks for the CPU's."},
    {"prepare_step", method(prepare_step), METH_FASTCALL,
     "prepare_step(packed, cell, layers, input, hidden, output, bias, per_word): a function of x "
     "and state"},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

int add_direct_calls(PyObject* module) { return PyModule_AddFunctions(module, methods); }

}  // namespace fused_rnn

#else

namespace fused_rnn {

int add_direct_calls(PyObject*) { return 0; }

}  // namespace fused_rnn

#endif

#include <cstddef>
#include <iterator>
#include <new>
#include <vector>

#include "connection.h"
#include "direct_calls.h"
#include "module_facts.h"

#if defined(FUSED_RNN_DIRECT_CALLS)

namespace fused_rnn {

namespace {

// hx as torch.nn takes it: None, a tensor, or (h, c).
struct GivenStates {
  Array h{}, c{};
  bool any = false, pair = false, fits = true;

  explicit GivenStates(PyObject* hx) {
    if (hx == Py_None) return;
    any = true;
    pair = PyTuple_CheckExact(hx) && PyTuple_GET_SIZE(hx) == 2;
    h = strided_array_of(pair ? PyTuple_GET_ITEM(hx, 0) : hx);
    if (pair) c = strided_array_of(PyTuple_GET_ITEM(hx, 1));
    fits = h.exists() && (!pair || c.exists());
  }

  States given() const { return {any ? &h : nullptr, pair ? &c : nullptr}; }
};

// Takes both references; null where one is.
PyObject* pair(PyObject* first, PyObject* second) {
  PyObject* both = first == nullptr || second == nullptr ? nullptr : PyTuple_New(2);
  if (both == nullptr) {
    Py_XDECREF(first);
    Py_XDECREF(second);
    return nullptr;
  }
  PyTuple_SET_ITEM(both, 0, first);
  PyTuple_SET_ITEM(both, 1, second);
  return both;
}

// (y, h), (y, (h, c)), h or (h, c): whatever was allocated.
PyObject* results(Outputs& outputs, bool has_c) {
  const size_t states = has_c ? 2 : 1, count = outputs.count();
  PyObject* y = nullptr;
  if (count > states && (y = outputs.take()) == nullptr) return nullptr;
  PyObject* state = outputs.take();
  if (state != nullptr && has_c) state = pair(state, outputs.take());
  return count > states ? pair(y, state) : state;
}

// What an inference call returns.
template <class Call>
PyObject* infer(bool (*function)(const Call&, const Allocator&), const Call& call) {
  Outputs outputs;
  if (!run(function, call, outputs)) Py_RETURN_NONE;
  return results(outputs, cell_sizes(static_cast<CellKind>(call.cell)).has_c);
}

// Of a list that is the caller's own: no other thread changes it meanwhile.
bool read_weights(PyObject* list, std::vector<Array>& arrays) {
  return PyList_CheckExact(list) &&
         read_weights(PySequence_Fast_ITEMS(list), PyList_GET_SIZE(list), arrays);
}

// What infer_layers and infer_cell have in common: cell, input, weights, hx.
template <class Call, class... Values>
PyObject* infer(bool (*function)(const Call&, const Allocator&), Call& call, PyObject* const* args,
                Py_ssize_t count, Values&... values) {
  constexpr Py_ssize_t kShared = 4;
  if (connected.calls == nullptr || count != kShared + static_cast<Py_ssize_t>(sizeof...(values)) ||
      !read_all(args, call.cell) || !read_all(args + kShared, values...)) {
    Py_RETURN_NONE;
  }
  const int time = is_time();
  if (time <= 0) return time < 0 ? nullptr : Py_NewRef(Py_None);
  if (!cpu_is_welcome() || !read_autocast(call)) Py_RETURN_NONE;
  call.x = strided_array_of(args[1]);
  if (!call.autocast) call.type = call.x.type;
  std::vector<Array> arrays;
  const GivenStates states(args[3]);
  if (!call.x.exists() || !states.fits || !read_weights(args[2], arrays)) Py_RETURN_NONE;
  call.weights = arrays.data();
  call.weight_count = static_cast<int64_t>(arrays.size());
  call.states = states.given();
  return infer(function, call);
}

}  // namespace

PyObject* infer_layers(PyObject*, PyObject* const* args, Py_ssize_t count) {
  LayersCall call{};
  return infer(connected.calls ? connected.calls->infer_layers : nullptr, call, args, count,
               call.layers, call.directions, call.time_first);
}

PyObject* infer_module(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  if (connected.calls == nullptr || count != 3) Py_RETURN_NONE;
  const ModuleFacts module(args[0]);
  bool both = false, batch_first = false;
  int64_t layers = 0;
  if (!module.are_complete() || !read(module.layers(), layers) || !module.drops_nothing(layers) ||
      !read(module.bidirectional(), both) || !read(module.batch_first(), batch_first)) {
    Py_RETURN_NONE;
  }
  const py::object cell = value_of(connected.cells, module.mode()), weights = module.weights(),
                   directions = py::int_(both ? 2 : 1);
  if (!cell || !weights) Py_RETURN_NONE;
  PyObject* const all[] = {cell.ptr(),
                           args[1],
                           weights.ptr(),
                           args[2],
                           module.layers(),
                           directions.ptr(),
                           batch_first ? Py_False : Py_True};
  return infer_layers(self, all, std::size(all));
}

PyObject* infer_cell(PyObject*, PyObject* const* args, Py_ssize_t count) {
  CellCall call{};
  return infer(connected.calls ? connected.calls->infer_cell : nullptr, call, args, count,
               call.hidden_size);
}

namespace {

// A step's weights and sizes; the capsule's context is the packed tensor, which it owns.
constexpr char kPreparedStep[] = "fused_rnn.prepared_step";

// (x, state), of what the capsule holds.
PyObject* step(PyObject* capsule, PyObject* const* args, Py_ssize_t count) {
  if (count != 2) Py_RETURN_NONE;
  const void* prepared = PyCapsule_GetPointer(capsule, kPreparedStep);
  if (prepared == nullptr) return nullptr;
  const int time = is_time(connected.step_guards);
  if (time <= 0) return time < 0 ? nullptr : Py_NewRef(Py_None);
  StepCall call = *static_cast<const StepCall*>(prepared);
  // Every time anew: torch.multiprocessing moves a tensor's memory to where processes share it.
  DLTensor packed;
  if (!read_tensor(static_cast<PyObject*>(PyCapsule_GetContext(capsule)), packed) ||
      packed.ndim != 1 || packed.shape[0] != call.packed.sizes[0]) {
    Py_RETURN_NONE;
  }
  call.packed.data = reinterpret_cast<const float*>(data_of(packed));
  call.x = array_of(args[0]);
  const GivenStates states(args[1]);
  if (!states.fits) Py_RETURN_NONE;
  call.states = states.given();
  return infer(connected.calls->step, call);
}

PyMethodDef step_method = {"step", method(step), METH_FASTCALL, "step(x, state)"};

}  // namespace

PyObject* prepare_step(PyObject*, PyObject* const* args, Py_ssize_t count) {
  StepCall call{};
  if (connected.calls == nullptr || count != 8 ||
      !read_all(args + 1, call.cell, call.layers, call.input, call.hidden, call.output, call.bias,
                call.per_word)) {
    Py_RETURN_NONE;
  }
  call.packed = array_of(args[0]);
  if (!call.packed.is_plain() || call.packed.dimensions != 1) Py_RETURN_NONE;
  struct Prepared {
    StepCall call;
    int64_t size;
  };
  auto* prepared = new (std::nothrow) Prepared{call, call.packed.sizes[0]};
  if (prepared == nullptr) return PyErr_NoMemory();
  prepared->call.packed.sizes = &prepared->size;
  static_assert(offsetof(Prepared, call) == 0);
  PyObject* capsule = PyCapsule_New(prepared, kPreparedStep, [](PyObject* self) {
    Py_XDECREF(static_cast<PyObject*>(PyCapsule_GetContext(self)));
    delete static_cast<Prepared*>(PyCapsule_GetPointer(self, kPreparedStep));
  });
  if (capsule == nullptr) {
    delete prepared;
    return nullptr;
  }
  PyCapsule_SetContext(capsule, Py_NewRef(args[0]));
  PyObject* function = PyCFunction_New(&step_method, capsule);
  Py_DECREF(capsule);
  return function;
}

}  // namespace fused_rnn

#endif

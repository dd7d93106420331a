#include "connection.h"

#if defined(FUSED_RNN_DIRECT_CALLS)

#include <cstdlib>
#include <cstring>
#include <iterator>

#include "objects.h"

namespace fused_rnn {

Connection connected;

bool read(PyObject* object, int64_t& value) {
  if (!PyLong_CheckExact(object)) return false;
  value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) {
    PyErr_Clear();
    return false;
  }
  return true;
}

bool read(PyObject* object, bool& value) {
  value = object == Py_True;
  return value || object == Py_False;
}

namespace {

// Takes the reference: 1 or 0, or -1 where there is an error.
int truth_of(PyObject* object) {
  if (object == nullptr) return -1;
  const int is_true = PyObject_IsTrue(object);
  Py_DECREF(object);
  return is_true;
}

}  // namespace

int is_time(Py_ssize_t guards) {
  for (Py_ssize_t i = 0; i < guards; i++) {
    PyObject* guard = PyTuple_GET_ITEM(connected.guards, i);
    PyObject* found = PyObject_CallNoArgs(guard);
    const int is_true = truth_of(found);
    if (is_true < 0) return -1;
    if (is_true == 0) continue;
    const int is_excused = truth_of(PyObject_CallOneArg(connected.is_excused, guard));
    if (is_excused != 1) return is_excused;
  }
  return 1;
}

bool cpu_is_welcome() {
#if defined(Py_GIL_DISABLED)
  return true;
#endif
  const char* name = std::getenv("FUSED_RNN_BACKEND");
  return name == nullptr || *name == '\0' || std::strcmp(name, "auto") == 0 ||
         std::strcmp(name, "cpu") == 0;
}

bool read_autocast(InferCall& call) {
  const py::object enabled = owned(PyObject_CallNoArgs(connected.any_autocast));
  if (enabled.ptr() == Py_False) return true;
  const py::object type = owned(PyObject_CallNoArgs(connected.autocast_type));
  int64_t number = 0;
  if (!type || !read(type.ptr(), number)) return false;
  if (number < 0 || number >= static_cast<int64_t>(std::size(kNumberTypes))) return false;
  call.type = kNumberTypes[number];
  call.autocast = call.type != NumberType::float32;
  return true;
}

double flops_of(const InferCall& call) {
  int64_t weights = 0;
  for (int64_t i = 0; i < call.weight_count; i++) weights += call.weights[i].count();
  const int64_t width = call.x.dimensions > 0 ? call.x.sizes[call.x.dimensions - 1] : 0;
  const int64_t rows = width > 0 ? call.x.count() / width : 1;
  return 2.0 * static_cast<double>(weights) * static_cast<double>(rows);
}

double flops_of(const StepCall& call) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < call.x.dimensions; i++) rows *= call.x.sizes[i];
  const auto weights = static_cast<double>(call.packed.count() * call.per_word);
  return 2.0 * weights * static_cast<double>(rows);
}

}  // namespace fused_rnn

#endif

// What inference needs to know of a module, a torch.nn.RNNBase: read from Python, a module's
// attributes take as long as a small step.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "objects.h"

namespace fused_rnn {

class ModuleFacts {
 public:
  // Empty objects where an attribute is not there.
  explicit ModuleFacts(PyObject* module) {
    // Made once, and never given back.
    static const std::array<PyObject*, kCount> names = interned();
    for (size_t i = 0; i < kCount; i++) found_[i] = owned(PyObject_GetAttr(module, names[i]));
  }

  PyObject* mode() const { return found_[kMode].ptr(); }
  PyObject* layers() const { return found_[kLayers].ptr(); }
  PyObject* bidirectional() const { return found_[kBidirectional].ptr(); }
  PyObject* batch_first() const { return found_[kBatchFirst].ptr(); }

  bool are_complete() const {
    for (const py::object& object : found_) {
      if (!object) return false;
    }
    return true;
  }

  // Whether nothing is dropped between so many layers: `dropout_of` of fused_rnn/looks.py is 0.
  bool drops_nothing(int64_t layers) const {
    PyObject* p = found_[kDropout].ptr();
    if (!PyFloat_CheckExact(p)) return false;
    const double dropout = PyFloat_AS_DOUBLE(p);
    const bool is_active = layers > 1 && found_[kTraining].ptr() != Py_False;
    return dropout == 0 || (dropout > 0 && dropout <= 1 && !is_active);
  }

  // The parameters in a list of the caller's own, or an empty object. What is parametrized or was
  // replaced by a plain attribute is not among them.
  py::object weights() const {
    const py::object &names = found_[kNames], &parameters = found_[kParameters];
    if (!PyList_CheckExact(names.ptr()) || !PyDict_Check(parameters.ptr())) return {};
    const Py_ssize_t count = PyList_GET_SIZE(names.ptr());
    py::object weights = owned(PyList_New(count));
    for (Py_ssize_t i = 0; weights && i < count; i++) {
      const py::object name = item_of(names.ptr(), i);
      py::object weight = name ? value_of(parameters.ptr(), name.ptr()) : name;
      if (!weight) return {};
      PyList_SET_ITEM(weights.ptr(), i, weight.release().ptr());
    }
    return weights;
  }

 private:
  enum Attribute : size_t {
    kMode,
    kLayers,
    kDropout,
    kBidirectional,
    kBatchFirst,
    kTraining,
    kNames,
    kParameters,
    kCount
  };

  static std::array<PyObject*, kCount> interned() {
    constexpr std::array<const char*, kCount> names = {
        "mode",     "num_layers",          "dropout",    "bidirectional", "batch_first",
        "training", "_flat_weights_names", "_parameters"};
    std::array<PyObject*, kCount> strings{};
    for (size_t i = 0; i < kCount; i++) strings[i] = PyUnicode_InternFromString(names[i]);
    return strings;
  }

  std::array<py::object, kCount> found_;
};

}  // namespace fused_rnn

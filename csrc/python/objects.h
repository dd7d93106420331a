// Python objects that are given back by themselves.
#pragma once

#include <pybind11/pybind11.h>

namespace fused_rnn {

namespace py = pybind11;

// Takes the reference; an error is not passed on.
inline py::object owned(PyObject* found) {
  if (found == nullptr) PyErr_Clear();
  return py::reinterpret_steal<py::object>(found);
}

// Without Python's lock another thread may change what the module holds: the references are own.
inline py::object item_of(PyObject* list, Py_ssize_t index) {
#if PY_VERSION_HEX >= 0x030D0000
  return owned(PyList_GetItemRef(list, index));
#else
  return owned(Py_XNewRef(PyList_GetItem(list, index)));
#endif
}

inline py::object value_of(PyObject* dict, PyObject* key) {
#if PY_VERSION_HEX >= 0x030D0000
  PyObject* found = nullptr;
  PyDict_GetItemRef(dict, key, &found);
  return owned(found);
#else
  return owned(Py_XNewRef(PyDict_GetItemWithError(dict, key)));
#endif
}

}  // namespace fused_rnn

// torch's tensors past torch's dispatcher: they come and go by DLPack's exchange of C structs, so
// that nothing here depends on a torch version.
#pragma once

#include <Python.h>

#if __has_include(<ATen/dlpack.h>)
#include <ATen/dlpack.h>
#endif

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "../cpu/direct.h"

#if defined(DLPACK_MINOR_VERSION) && \
    (DLPACK_MAJOR_VERSION > 1 || (DLPACK_MAJOR_VERSION == 1 && DLPACK_MINOR_VERSION >= 3))
#define FUSED_RNN_DIRECT_CALLS 1
#endif

#if defined(FUSED_RNN_DIRECT_CALLS)

namespace fused_rnn {

// Before all else here: torch's exchange API, in its capsule, and the classes Tensor and Parameter.
// 1, 0 where that API is of another version, or -1 with an error set.
int connect_tensors(PyObject* exchange, PyObject* tensor, PyObject* parameter);

// Whether a tensor has memory on the CPU, which then is told.
bool read_tensor(PyObject* object, DLTensor& tensor);
const char* data_of(const DLTensor& tensor);

// Of a Tensor or Parameter, no subclass, that has numbers of an array's types; live no longer than
// the object.
Array strided_array_of(PyObject* object);
Array array_of(PyObject* object);  // dense

// The numbers of a dense Tensor of that type and with so many dimensions, or null.
const int64_t* integers_of(PyObject* object, int32_t dimensions, DLTensor& tensor);
const bool* booleans_of(PyObject* object, int32_t dimensions, DLTensor& tensor);

// An argument that may be None, dense or strided.
struct GivenArray {
  Array array{};
  bool given = false, fits = true;

  GivenArray() = default;
  explicit GivenArray(PyObject* object) {
    if (object == Py_None) return;
    given = true;
    array = strided_array_of(object);
    fits = array.exists();
  }
  const Array* get() const { return given ? &array : nullptr; }
};

// Whether all are arrays, and dense.
bool read_weights(PyObject* const* objects, Py_ssize_t count, std::vector<Array>& arrays);

// The outputs of a call until they become Python's.
class Outputs {
 public:
  Outputs() = default;
  Outputs(const Outputs&) = delete;
  Outputs& operator=(const Outputs&) = delete;
  ~Outputs() {
    for (size_t i = taken_; i < count_; i++) tensors_[i]->deleter(tensors_[i]);
  }

  Allocator allocator() { return {allocate, this}; }
  size_t count() const { return count_; }

  // A new reference to the next output; null with an error set.
  PyObject* take();
  // A list of all.
  PyObject* take_all();

 private:
  static void* allocate(void* context, NumberType type, const int64_t* sizes, int64_t dimensions,
                        bool swapped);

  // The most are gradients: of x, two states and, in two directions, five weights.
  std::array<DLManagedTensorVersioned*, 13> tensors_{};
  size_t count_ = 0, taken_ = 0;
};

}  // namespace fused_rnn

#endif

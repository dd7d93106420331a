#include "tensors.h"

#if defined(FUSED_RNN_DIRECT_CALLS)

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <new>

#include "objects.h"

namespace fused_rnn {

namespace {

// Set once; the objects are never given back.
struct {
  const DLPackExchangeAPI* exchange;
  PyObject* types[2];  // Tensor and Parameter: a subclass may have a meaning of its own
  PyObject* is_neg;    // Tensor's
} torch_tensors;

constexpr DLDataType kInt64 = {kDLInt, 64, 1}, kBool = {kDLBool, 8, 1};

DLDataType dtype_of(NumberType type) {
  if (type == NumberType::int64) return kInt64;
  const auto code = static_cast<uint8_t>(type == NumberType::bfloat16 ? kDLBfloat : kDLFloat);
  return {code, static_cast<uint8_t>(type == NumberType::float32 ? 32 : 16), 1};
}

bool operator==(const DLDataType& a, const DLDataType& b) {
  return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
}

// An output and, behind it, its memory. torch's own way from a shape to a Python object takes twice
// as long.
struct Owned {
  DLManagedTensorVersioned tensor;
  int64_t sizes[3], strides[3];

  static constexpr size_t kLine = 64;

  static Owned* make(NumberType type, const int64_t* sizes, int64_t dimensions, bool swapped) {
    const DLDataType dtype = dtype_of(type);
    const int64_t count = count_of(sizes, dimensions);
    const size_t bytes = static_cast<size_t>(count) * (dtype.bits / 8);
    // Its blocks of the sizes that were just freed cost a tenth of aligned ones.
    void* memory = std::malloc(sizeof(Owned) + kLine + bytes);
    if (memory == nullptr) throw std::bad_alloc();
    Owned* self = new (memory) Owned{};
    std::copy_n(sizes, dimensions, self->sizes);
    set_strides(sizes, dimensions, swapped, self->strides);
    self->tensor.version = {DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION};
    self->tensor.deleter = [](DLManagedTensorVersioned* tensor) { std::free(tensor); };
    DLTensor& t = self->tensor.dl_tensor;
    const auto behind = reinterpret_cast<uintptr_t>(self + 1);
    t.data = reinterpret_cast<void*>((behind + kLine - 1) / kLine * kLine);
    t.device = {kDLCPU, 0};
    t.dtype = dtype;
    t.ndim = static_cast<int32_t>(dimensions);
    t.shape = self->sizes;
    t.strides = self->strides;
    return self;
  }
};
static_assert(offsetof(Owned, tensor) == 0);

// Whether the sign of all numbers is a note on the tensor, which DLPack does not tell.
bool is_negated(PyObject* tensor) {
  PyObject* found = PyObject_CallOneArg(torch_tensors.is_neg, tensor);
  if (found == nullptr) PyErr_Clear();
  const bool negated = found != Py_False;
  Py_XDECREF(found);
  return negated;
}

bool is_dense(const DLTensor& tensor) {
  int64_t stride = 1;
  for (int32_t i = tensor.ndim - 1; i >= 0; i--) {
    const bool matters = tensor.shape[i] != 1 && tensor.strides != nullptr;
    if (matters && tensor.strides[i] != stride) return false;
    stride *= tensor.shape[i];
  }
  return true;
}

template <class T>
const T* numbers_of(PyObject* object, DLDataType type, int32_t dimensions, DLTensor& tensor) {
  if (reinterpret_cast<PyObject*>(Py_TYPE(object)) != torch_tensors.types[0]) return nullptr;
  if (!read_tensor(object, tensor) || !(tensor.dtype == type) || tensor.ndim != dimensions) {
    return nullptr;
  }
  return is_dense(tensor) ? reinterpret_cast<const T*>(data_of(tensor)) : nullptr;
}

}  // namespace

int connect_tensors(PyObject* exchange, PyObject* tensor, PyObject* parameter) {
  void* found = PyCapsule_GetPointer(exchange, "dlpack_exchange_api");
  if (found == nullptr) return -1;
  const auto* api = static_cast<const DLPackExchangeAPI*>(found);
  if (api->header.version.major != DLPACK_MAJOR_VERSION ||
      api->dltensor_from_py_object_no_sync == nullptr) {
    return 0;
  }
  PyObject* is_neg = PyObject_GetAttrString(tensor, "is_neg");
  if (is_neg == nullptr) return -1;
  torch_tensors.exchange = api;
  torch_tensors.types[0] = Py_NewRef(tensor);
  torch_tensors.types[1] = Py_NewRef(parameter);
  torch_tensors.is_neg = is_neg;
  return 1;
}

bool read_tensor(PyObject* object, DLTensor& tensor) {
  if (torch_tensors.exchange->dltensor_from_py_object_no_sync(object, &tensor) != 0) {
    PyErr_Clear();  // is sparse, fake, or what a transform wraps
    return false;
  }
  return tensor.device.device_type == kDLCPU;
}

const char* data_of(const DLTensor& tensor) {
  return tensor.data ? static_cast<const char*>(tensor.data) + tensor.byte_offset : nullptr;
}

Array strided_array_of(PyObject* object) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (type != torch_tensors.types[0] && type != torch_tensors.types[1]) return {};
  DLTensor tensor;
  if (!read_tensor(object, tensor)) return {};
  const NumberType* number =
      std::find_if(std::begin(kNumberTypes), std::end(kNumberTypes),
                   [&](NumberType candidate) { return tensor.dtype == dtype_of(candidate); });
  if (number == std::end(kNumberTypes)) return {};
  if (is_negated(object)) return {};
  return Array::of(data_of(tensor), *number, tensor.ndim, tensor.shape,
                   is_dense(tensor) ? nullptr : tensor.strides);
}

Array array_of(PyObject* object) {
  const Array array = strided_array_of(object);
  return array.is_dense() ? array : Array{};
}

const int64_t* integers_of(PyObject* object, int32_t dimensions, DLTensor& tensor) {
  return numbers_of<int64_t>(object, kInt64, dimensions, tensor);
}

const bool* booleans_of(PyObject* object, int32_t dimensions, DLTensor& tensor) {
  return numbers_of<bool>(object, kBool, dimensions, tensor);
}

bool read_weights(PyObject* const* objects, Py_ssize_t count, std::vector<Array>& arrays) {
  arrays.reserve(static_cast<size_t>(count));
  for (Py_ssize_t i = 0; i < count; i++) {
    arrays.push_back(array_of(objects[i]));
    if (!arrays.back().exists()) return false;
  }
  return true;
}

PyObject* Outputs::take() {
  void* object = nullptr;
  DLManagedTensorVersioned* tensor = tensors_[taken_++];
  if (torch_tensors.exchange->managed_tensor_to_py_object_no_sync(tensor, &object) != 0) {
    return nullptr;
  }
  return static_cast<PyObject*>(object);
}

PyObject* Outputs::take_all() {
  py::object list = owned(PyList_New(static_cast<Py_ssize_t>(count())));
  for (size_t i = 0; list && i < count(); i++) {
    PyObject* output = take();
    if (output == nullptr) return nullptr;
    PyList_SET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i), output);
  }
  return list.release().ptr();
}

void* Outputs::allocate(void* context, NumberType type, const int64_t* sizes, int64_t dimensions,
                        bool swapped) {
  auto& self = *static_cast<Outputs*>(context);
  DLManagedTensorVersioned* tensor = &Owned::make(type, sizes, dimensions, swapped)->tensor;
  self.tensors_[self.count_++] = tensor;
  return tensor->dl_tensor.data;
}

}  // namespace fused_rnn

#endif

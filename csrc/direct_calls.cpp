// Inference, and the two passes of training, from Python past torch's dispatcher, which takes
// longer than a small step does: tensors come and go by DLPack's exchange of C structs, so that
// nothing here depends on a torch version.
//
// Every function returns None to a call that is out of the ordinary; then the operator of the same
// arguments is to be called, which may take it or says what is wrong.
#include "direct_calls.h"

#if __has_include(<ATen/dlpack.h>)
#include <ATen/dlpack.h>
#endif

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "cpu/direct.h"
#include "cpu/layer_plan.h"
#include "module_facts.h"

#if defined(DLPACK_MINOR_VERSION) && \
    (DLPACK_MAJOR_VERSION > 1 || (DLPACK_MAJOR_VERSION == 1 && DLPACK_MINOR_VERSION >= 3))
#define FUSED_RNN_DIRECT_CALLS 1
#endif

namespace fused_rnn {

#if defined(FUSED_RNN_DIRECT_CALLS)

namespace {

// Set once by `connect`; the objects are never given back.
struct {
  const DirectCalls* calls;
  const DLPackExchangeAPI* torch;
  PyObject* tensor_types[2];  // Tensor and Parameter: a subclass may have a meaning of its own
  PyObject* is_neg;           // Tensor's
  // Functions that give something true where a call is to do more than compute numbers; first those
  // that matter to a step of packed weights too.
  PyObject* guards;
  Py_ssize_t step_guards;
  PyObject* is_excused;    // whether what a guard has found changes nothing
  PyObject* cells;         // from torch.nn's modes to the cells' numbers
  PyObject* any_autocast;  // whether it is on for any device
  // The place in kNumberTypes of what it makes CPU tensors, 0 for nothing; -1 for another type.
  PyObject* autocast_type;
} connected;

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
  PyObject* take() {
    void* object = nullptr;
    DLManagedTensorVersioned* tensor = tensors_[taken_++];
    if (connected.torch->managed_tensor_to_py_object_no_sync(tensor, &object) != 0) {
      return nullptr;
    }
    return static_cast<PyObject*>(object);
  }

 private:
  static void* allocate(void* context, NumberType type, const int64_t* sizes, int64_t dimensions,
                        bool swapped) {
    auto& self = *static_cast<Outputs*>(context);
    DLManagedTensorVersioned* tensor = &Owned::make(type, sizes, dimensions, swapped)->tensor;
    self.tensors_[self.count_++] = tensor;
    return tensor->dl_tensor.data;
  }

  // The most are gradients: of x, two states and, in two directions, five weights.
  std::array<DLManagedTensorVersioned*, 13> tensors_{};
  size_t count_ = 0, taken_ = 0;
};

// Whether the sign of all numbers is a note on the tensor, which DLPack does not tell.
bool is_negated(PyObject* tensor) {
  PyObject* found = PyObject_CallOneArg(connected.is_neg, tensor);
  if (found == nullptr) PyErr_Clear();
  const bool negated = found != Py_False;
  Py_XDECREF(found);
  return negated;
}

// Whether a tensor has memory on the CPU, which then is told.
bool read_tensor(PyObject* object, DLTensor& tensor) {
  if (connected.torch->dltensor_from_py_object_no_sync(object, &tensor) != 0) {
    PyErr_Clear();  // is sparse, fake, or what a transform wraps
    return false;
  }
  return tensor.device.device_type == kDLCPU;
}

const char* data_of(const DLTensor& tensor) {
  return tensor.data ? static_cast<const char*>(tensor.data) + tensor.byte_offset : nullptr;
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

// Live no longer than the object.
Array strided_array_of(PyObject* object) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (type != connected.tensor_types[0] && type != connected.tensor_types[1]) return {};
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

// Whether the next arguments are numbers or flags, which `values` then hold.
template <class... Values>
bool read_all(PyObject* const* args, Values&... values) {
  return (read(*args++, values) && ...);
}

// Takes the reference: 1 or 0, or -1 where there is an error.
int truth_of(PyObject* object) {
  if (object == nullptr) return -1;
  const int is_true = PyObject_IsTrue(object);
  Py_DECREF(object);
  return is_true;
}

// Whether none of the first guards has anything against it: 1, 0, or -1 with an error set.
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

// Whether FUSED_RNN_BACKEND leaves the choice open, or asks for this library. Only with Python's
// lock, which whoever changes os.environ has, too; where there is none a guard asks in Python.
bool cpu_is_welcome() {
#if defined(Py_GIL_DISABLED)
  return true;
#endif
  const char* name = std::getenv("FUSED_RNN_BACKEND");
  return name == nullptr || *name == '\0' || std::strcmp(name, "auto") == 0 ||
         std::strcmp(name, "cpu") == 0;
}

// Whether autocast leaves CPU tensors alone or makes them a type that there is here.
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

// Floating-point operations, about: every weight meets every row.
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

// The arguments keep all arrays alive. Where one thread does all, which takes some 10 us, other
// threads of Python may wait: giving its lock away and getting it back takes a tenth of a
// microsecond. A parallel region's threads might want that lock.
template <class Call>
bool run(bool (*function)(const Call&, const Allocator&), const Call& call, Outputs& outputs) {
  if (flops_of(call) < kSerialFlops) return function(call, outputs.allocator());
  bool done = false;
  Py_BEGIN_ALLOW_THREADS;
  done = function(call, outputs.allocator());
  Py_END_ALLOW_THREADS;
  return done;
}

// What an inference call returns.
template <class Call>
PyObject* infer(bool (*function)(const Call&, const Allocator&), const Call& call) {
  Outputs outputs;
  if (!run(function, call, outputs)) Py_RETURN_NONE;
  return results(outputs, cell_sizes(static_cast<CellKind>(call.cell)).has_c);
}

// Whether all are arrays, and dense.
bool read_weights(PyObject* const* objects, Py_ssize_t count, std::vector<Array>& arrays) {
  arrays.reserve(static_cast<size_t>(count));
  for (Py_ssize_t i = 0; i < count; i++) {
    arrays.push_back(array_of(objects[i]));
    if (!arrays.back().exists()) return false;
  }
  return true;
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
  const int time = is_time(PyTuple_GET_SIZE(connected.guards));
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

// Larger calls of training are the operators': a few microseconds are nothing to them, and memory
// to be saved is kept for the next step there (csrc/cpu/saved.h).
constexpr int64_t kMostSaved = 1 << 20;  // floats of all gates

// The numbers of a dense tensor of that type and with so many dimensions, or null.
template <class T>
const T* numbers_of(PyObject* object, DLDataType type, int32_t dimensions, DLTensor& tensor) {
  if (reinterpret_cast<PyObject*>(Py_TYPE(object)) != connected.tensor_types[0]) return nullptr;
  if (!read_tensor(object, tensor) || !(tensor.dtype == type) || tensor.ndim != dimensions) {
    return nullptr;
  }
  return is_dense(tensor) ? reinterpret_cast<const T*>(data_of(tensor)) : nullptr;
}

// Which rows there are: None for all, the sizes of packed ones' steps, or (lengths, resets,
// batch_first) of a padded batch; in a backward call its pieces instead. False where it is another
// thing, or does not fit x.
bool read_rows(PyObject* rows, TrainCall& call) {
  if (rows == Py_None) return true;
  DLTensor tensor;
  if (PyTuple_Check(rows) && PyTuple_GET_SIZE(rows) == 3) {
    PyObject *lengths = PyTuple_GET_ITEM(rows, 0), *resets = PyTuple_GET_ITEM(rows, 1);
    Masks& masks = call.masks;
    if (!read(PyTuple_GET_ITEM(rows, 2), masks.batch_first) || call.x.dimensions != 3) return false;
    const int64_t* sizes = call.x.sizes;
    if (lengths != Py_None) {
      masks.lengths = numbers_of<int64_t>(lengths, kInt64, 1, tensor);
      if (!masks.lengths || tensor.shape[0] != sizes[masks.batch_first ? 0 : 1]) return false;
    }
    if (resets != Py_None) {
      masks.resets = numbers_of<bool>(resets, kBool, 2, tensor);
      if (!masks.resets || !std::equal(sizes, sizes + 2, tensor.shape)) return false;
    }
    return true;
  }
  call.batch_sizes = numbers_of<int64_t>(rows, kInt64, 1, tensor);
  if (call.batch_sizes) {
    call.timesteps = tensor.shape[0];
    return call.timesteps > 0;
  }
  call.masks.pieces = numbers_of<int64_t>(rows, kInt64, 2, tensor);
  if (!call.masks.pieces) return false;
  call.masks.piece_count = tensor.shape[0];
  return tensor.shape[1] == kPieceNumbers;
}

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

// What both passes of training are called with: which rows there are, x, h0, c0 and, one after the
// other, the weights, which are dense.
struct TrainedArrays {
  GivenArray h0, c0;
  std::vector<Array> weights;

  // Whether they are in order.
  bool read(PyObject* const* args, Py_ssize_t count, TrainCall& call) {
    constexpr Py_ssize_t kWeights = 4;
    call.x = array_of(args[1]);
    if (!read_rows(args[0], call)) return false;
    h0 = GivenArray(args[2]);
    c0 = GivenArray(args[3]);
    if (!call.x.exists() || call.x.dimensions < 2 || !h0.fits || !c0.fits) return false;
    if (!read_weights(args + kWeights, count - kWeights, weights)) return false;
    call.weights = weights.data();
    call.weight_count = static_cast<int64_t>(weights.size());
    call.states = {h0.get(), c0.get()};
    return call.weight_count >= 2 && weights[1].dimensions == 2 && call.gates() <= kMostSaved;
  }
};

// A list of all outputs.
PyObject* take_all(Outputs& outputs) {
  py::object list = owned(PyList_New(static_cast<Py_ssize_t>(outputs.count())));
  for (size_t i = 0; list && i < outputs.count(); i++) {
    PyObject* output = outputs.take();
    if (output == nullptr) return nullptr;
    PyList_SET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i), output);
  }
  return list.release().ptr();
}

PyObject* train_layer(PyObject*, PyObject* const* args, Py_ssize_t count) {
  TrainCall call{};
  constexpr Py_ssize_t kShared = 4;
  if (connected.calls == nullptr || count < kShared + 6 ||
      !read_all(args, call.cell, call.directions, call.save, call.all_cells)) {
    Py_RETURN_NONE;
  }
  const int time = is_time(PyTuple_GET_SIZE(connected.guards));
  if (time <= 0) return time < 0 ? nullptr : Py_NewRef(Py_None);
  TrainedArrays arrays;
  if (!cpu_is_welcome() || !read_autocast(call) ||
      !arrays.read(args + kShared, count - kShared, call)) {
    Py_RETURN_NONE;
  }
  if (!call.autocast) call.type = call.x.type;
  Outputs outputs;
  if (!run(connected.calls->train_layer, call, outputs)) Py_RETURN_NONE;
  return take_all(outputs);
}

// A tuple of booleans as bits, -1 where it is another thing.
int64_t read_needs(PyObject* needs) {
  constexpr Py_ssize_t kBits = 62;
  if (!PyTuple_CheckExact(needs) || PyTuple_GET_SIZE(needs) > kBits) return -1;
  int64_t bits = 0;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(needs); i++) {
    bool need = false;
    if (!read(PyTuple_GET_ITEM(needs, i), need)) return -1;
    bits |= int64_t{need} << i;
  }
  return bits;
}

PyObject* train_layer_backward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  TrainBackwardCall call{};
  constexpr Py_ssize_t kGrads = 4, kSaved = 8;
  if (connected.calls == nullptr || count != kSaved + 1 ||
      !read_all(args, call.cell, call.directions, call.masks.batch_first) ||
      (call.needs = read_needs(args[kGrads - 1])) < 0 || !PyTuple_CheckExact(args[kSaved]) ||
      PyTuple_GET_SIZE(args[kSaved]) < 9) {
    Py_RETURN_NONE;
  }
  const int time = is_time(PyTuple_GET_SIZE(connected.guards));
  if (time <= 0) return time < 0 ? nullptr : Py_NewRef(Py_None);
  if (!cpu_is_welcome()) Py_RETURN_NONE;
  std::vector<PyObject*> saved;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args[kSaved]); i++) {
    saved.push_back(PyTuple_GET_ITEM(args[kSaved], i));
  }
  TrainedArrays arrays;
  constexpr Py_ssize_t kTrained = 3;  // y, gates and cells come first
  if (!arrays.read(saved.data() + kTrained, static_cast<Py_ssize_t>(saved.size()) - kTrained,
                   call)) {
    Py_RETURN_NONE;
  }
  const GivenArray others[] = {GivenArray(args[kGrads]),     GivenArray(args[kGrads + 1]),
                               GivenArray(args[kGrads + 2]), GivenArray(args[kGrads + 3]),
                               GivenArray(saved[0]),         GivenArray(saved[1]),
                               GivenArray(saved[2])};
  if (!std::all_of(std::begin(others), std::end(others),
                   [](const GivenArray& other) { return other.fits; })) {
    Py_RETURN_NONE;
  }
  call.grad_y = others[0].get();
  call.grad_h_n = others[1].get();
  call.grad_c_n = others[2].get();
  call.grad_cells = others[3].get();
  call.y = others[4].get();
  call.gates = others[5].get();
  // They are what autocast made of the others, if it did; whether it is on now says nothing.
  const Array* made = call.y ? call.y : call.gates;
  if (!made) Py_RETURN_NONE;
  call.type = made->type;
  call.autocast = call.type != NumberType::float32;
  call.cells = others[6].get();
  Outputs outputs;
  if (!run(connected.calls->train_layer_backward, call, outputs)) Py_RETURN_NONE;
  return take_all(outputs);
}

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

template <class Function>
PyCFunction method(Function* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef step_method = {"step", method(step), METH_FASTCALL, "step(x, state)"};

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
  void* found = PyCapsule_GetPointer(exchange, "dlpack_exchange_api");
  if (found == nullptr) return nullptr;
  const auto* torch = static_cast<const DLPackExchangeAPI*>(found);
  if (torch->header.version.major != DLPACK_MAJOR_VERSION ||
      torch->dltensor_from_py_object_no_sync == nullptr) {
    Py_RETURN_FALSE;
  }
  PyObject* is_neg = PyObject_GetAttrString(tensor, "is_neg");
  if (is_neg == nullptr) return nullptr;
  connected.is_neg = is_neg;
  connected.torch = torch;
  connected.tensor_types[0] = Py_NewRef(tensor);
  connected.tensor_types[1] = Py_NewRef(parameter);
  connected.guards = Py_NewRef(guards);
  connected.is_excused = Py_NewRef(is_excused);
  connected.cells = Py_NewRef(cells);
  connected.any_autocast = Py_NewRef(any_autocast);
  connected.autocast_type = Py_NewRef(autocast_type);
  connected.step_guards = std::min(step_guards, PyTuple_GET_SIZE(guards));
  connected.calls = reinterpret_cast<const DirectCalls*>(static_cast<uintptr_t>(address));
  Py_RETURN_TRUE;
}

PyObject* cpu_is_welcome(PyObject*, PyObject*) { return PyBool_FromLong(cpu_is_welcome()); }

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
    {"cpu_is_welcome", cpu_is_welcome, METH_NOARGS,
     "cpu_is_welcome(): whether FUSED_RNN_BACKEND leaves the choice open, or asks for the CPU's."},
    {"prepare_step", method(prepare_step), METH_FASTCALL,
     "prepare_step(packed, cell, layers, input, hidden, output, bias, per_word): a function of x "
     "and state"},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

int add_direct_calls(PyObject* module) { return PyModule_AddFunctions(module, methods); }

#else

int add_direct_calls(PyObject*) { return 0; }

#endif

}  // namespace fused_rnn

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <vector>

#include "connection.h"
#include "direct_calls.h"

#if defined(FUSED_RNN_DIRECT_CALLS)

namespace fused_rnn {

namespace {

// Larger calls of training are the operators': a few microseconds are nothing to them, and memory
// to be saved is kept for the next step there (csrc/cpu/saved.h).
constexpr int64_t kMostSaved = 1 << 20;  // floats of all gates

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
      masks.lengths = integers_of(lengths, 1, tensor);
      if (!masks.lengths || tensor.shape[0] != sizes[masks.batch_first ? 0 : 1]) return false;
    }
    if (resets != Py_None) {
      masks.resets = booleans_of(resets, 2, tensor);
      if (!masks.resets || !std::equal(sizes, sizes + 2, tensor.shape)) return false;
    }
    return true;
  }
  call.batch_sizes = integers_of(rows, 1, tensor);
  if (call.batch_sizes) {
    call.timesteps = tensor.shape[0];
    return call.timesteps > 0;
  }
  call.masks.pieces = integers_of(rows, 2, tensor);
  if (!call.masks.pieces) return false;
  call.masks.piece_count = tensor.shape[0];
  return tensor.shape[1] == kPieceNumbers;
}

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

}  // namespace

PyObject* train_layer(PyObject*, PyObject* const* args, Py_ssize_t count) {
  TrainCall call{};
  constexpr Py_ssize_t kShared = 4;
  if (connected.calls == nullptr || count < kShared + 6 ||
      !read_all(args, call.cell, call.directions, call.save, call.all_cells)) {
    Py_RETURN_NONE;
  }
  const int time = is_time();
  if (time <= 0) return time < 0 ? nullptr : Py_NewRef(Py_None);
  TrainedArrays arrays;
  if (!cpu_is_welcome() || !read_autocast(call) ||
      !arrays.read(args + kShared, count - kShared, call)) {
    Py_RETURN_NONE;
  }
  if (!call.autocast) call.type = call.x.type;
  Outputs outputs;
  if (!run(connected.calls->train_layer, call, outputs)) Py_RETURN_NONE;
  return outputs.take_all();
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
  const int time = is_time();
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
  return outputs.take_all();
}

}  // namespace fused_rnn

#endif

// A layer in training: a forward call with memory for what its backward needs, and that backward.
// For float32 that fits, padded or packed, as infer.cpp: every other call gets no outputs, and
// Python takes the general way (fused_rnn/ops.py).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <optional>
#include <utility>
#include <vector>

#include "../tensor_checks.h"
#include "border.h"
#include "calls.h"
#include "dense.h"
#include "weights.h"

namespace fused_rnn {
namespace {

// [T, B, width] or [D, B, width]; of packed rows and of a cell's one timestep, [N, width] or
// [B, width], which have no leading dimension.
struct Shape {
  bool is_flat;
  int64_t leading, batch, width;

  bool fits(const Array& array) const {
    return is_flat ? array.has_shape({batch, width}) : array.has_shape({leading, batch, width});
  }
  bool is_of(const Array& array) const { return array.is_plain() && fits(array); }
  float* allocate(const Allocator& allocate) const {
    return is_flat ? allocate({batch, width}) : allocate({leading, batch, width});
  }
  int64_t count() const { return (is_flat ? 1 : leading) * batch * width; }
};

struct Shapes {
  Shape x, y, h, c;
};

// What both passes need of the arguments.
struct Layer {
  ForwardCallOf<float> call;
  CellSizes sizes;
  Shapes shapes;
  bool is_step;
  Memory zeros;                  // in the place of initial states that are not given
  std::vector<int64_t> offsets;  // of packed rows

  const float* h0(const States& given) const { return zeros ? zeros.get() : given.h->data; }
  const float* c0(const States& given) const { return zeros ? zeros.get() : given.c->data; }
};

// Or nothing where the call's sizes of steps are not the layout of so many rows.
std::optional<RowLayout> read_packed(const TrainCall& given, int64_t count,
                                     std::vector<int64_t>& offsets) {
  const RowLayout rows{given.timesteps, given.batch_sizes[0], given.batch_sizes, nullptr};
  if (rows.batch > count) return {};  // sums of them might overflow
  int64_t total = 0;
  if (find_offsets(rows.batch_sizes, rows.timesteps, rows.batch, offsets, total) >= 0) return {};
  if (total != count || rows.batch_sizes[rows.timesteps - 1] < 1) return {};
  return RowLayout{rows.timesteps, rows.batch, rows.batch_sizes, offsets.data()};
}

// Or nothing where the arguments do not fit each other.
std::optional<Layer> read_layer(const TrainCall& given) {
  const Array& x = given.x;
  const int64_t directions = given.directions;
  const bool is_packed = given.batch_sizes != nullptr;
  const bool is_flat = x.dimensions == 2, is_step = is_flat && !is_packed;
  if (!x.is_plain() || x.dimensions != (is_packed || is_step ? 2 : 3)) return {};
  if (directions < 1 || directions > (is_step ? 1 : 2)) return {};
  RowLayout rows{is_step ? 1 : x.sizes[0], x.sizes[is_step ? 0 : 1], nullptr, nullptr};
  int64_t count = rows.timesteps * rows.batch;
  std::vector<int64_t> offsets;
  if (is_packed) {
    count = x.sizes[0];
    const std::optional<RowLayout> packed = read_packed(given, count, offsets);
    if (!packed) return {};
    rows = *packed;
  }
  LayerShape s = stack_shape(given, directions, rows.timesteps, rows.batch);
  s.count = count;
  s.rows = rows;
  const std::vector<ForwardCallOf<float>> calls = stack_calls(s, 1, given);
  if (calls.empty()) return {};
  Layer layer{calls[0], cell_sizes(s.cell), {}, is_step, nullptr, std::move(offsets)};
  const int64_t of_step = is_packed ? count : rows.batch;
  layer.shapes = {{is_flat, rows.timesteps, of_step, s.input},
                  {is_flat, rows.timesteps, of_step, directions * s.output},
                  {is_step, directions, rows.batch, s.output},
                  {is_step, directions, rows.batch, s.hidden}};
  const Array *h = given.states.h, *c = given.states.c;
  if ((h && !layer.shapes.h.is_of(*h)) || (c && !layer.shapes.c.is_of(*c)) ||
      (c != nullptr) != (layer.sizes.has_c && h != nullptr)) {
    return {};
  }
  if (h == nullptr) {
    layer.zeros = memory(layer.shapes.c.count());
    std::fill_n(layer.zeros.get(), layer.shapes.c.count(), 0.0f);
  }
  return layer;
}

// Memory for gradients: those that are wanted become outputs, in the order of the bits of `needs`.
class Gradients {
 public:
  Gradients(int64_t needs, const Allocator& allocate) : needs_(needs), allocate_(allocate) {}

  bool next_is_wanted() {
    const bool wanted = (needs_ & 1) != 0;
    needs_ >>= 1;
    return wanted;
  }
  // Null where it is not wanted.
  float* next(const Shape& shape) {
    return next_is_wanted() ? shape.allocate(allocate_) : nullptr;
  }
  float* next(const Array& like) {
    if (!next_is_wanted()) return nullptr;
    return static_cast<float*>(allocate_.allocate(allocate_.context, NumberType::float32,
                                                  like.sizes, like.dimensions, false));
  }
  // What kernels write in any case.
  float* next_or_scratch(const Shape& shape) {
    if (float* wanted = next(shape)) return wanted;
    scratch_.push_back(memory(shape.count()));
    return scratch_.back().get();
  }

 private:
  int64_t needs_;
  const Allocator& allocate_;
  std::vector<Memory> scratch_;
};

// Whether an array is not given, or has that shape; then `data` are its numbers, or null.
bool read(const Array* array, const Shape& shape, const float*& data) {
  if (array == nullptr) return true;
  data = array->data;
  return shape.is_of(*array);
}

// As `read`, of numbers that may lie anywhere: `dense` keeps the copy then.
bool read_strided(const Array* array, const Shape& shape, Dense& dense, const float*& data) {
  if (array == nullptr) return true;
  if (array->data == nullptr || !shape.fits(*array)) return false;
  dense = Dense(array);
  data = dense.data();
  return true;
}

}  // namespace

bool train_layer(const TrainCall& given, const Allocator& allocate) {
  std::optional<Layer> layer = read_layer(given);
  if (!layer) return false;
  ForwardCallOf<float>& call = layer->call;
  const Shapes& shapes = layer->shapes;
  const LayerShape& s = call.shape;
  Memory h_n;
  call.x = given.x.data;
  call.h0 = layer->h0(given.states);
  call.y = shapes.y.allocate(allocate);
  if (layer->is_step) {
    h_n = memory(shapes.h.count());  // y once more
    call.h_n = h_n.get();
  } else {
    call.h_n = shapes.h.allocate(allocate);
  }
  if (layer->sizes.has_c) {
    call.c0 = layer->c0(given.states);
    call.c_n = shapes.c.allocate(allocate);
  }
  if (const int64_t width = layer->sizes.saved_gates * s.hidden; given.save && width > 0) {
    call.gates = allocate.saved(s.directions, s.count, width);
  }
  if (given.save && layer->sizes.has_c) {
    call.cells = allocate.saved(s.directions, s.count, s.hidden);
  }
  layer_forward(kernels(), call, torch_threads());
  return true;
}

bool train_layer_backward(const TrainBackwardCall& given, const Allocator& allocate) {
  const std::optional<Layer> layer = read_layer(given);
  if (!layer) return false;
  const Shapes& shapes = layer->shapes;
  const CellSizes sizes = layer->sizes;
  BackwardCallOf<float> call{};
  LayerShape& s = call.shape;
  s = layer->call.shape;
  std::copy_n(layer->call.weights, 2, call.weights);
  const Shape gates_shape{false, s.directions, s.count, sizes.saved_gates * s.hidden};
  const Shape cells_shape{false, s.directions, s.count, s.hidden};
  Dense grad_y, grad_h_n, grad_c_n;
  if (!read_strided(given.grad_y, shapes.y, grad_y, call.grad_y) ||
      !read_strided(given.grad_h_n, shapes.h, grad_h_n, call.grad_h_n) ||
      !read_strided(given.grad_c_n, shapes.c, grad_c_n, call.grad_c_n) || !read(given.y, shapes.y, call.y) ||
      !read(given.gates, gates_shape, call.gates) || !read(given.cells, cells_shape, call.cells) ||
      (call.gates != nullptr) != (sizes.saved_gates > 0) ||
      (call.cells != nullptr) != sizes.has_c || call.y == nullptr) {
    return false;
  }
  // What else may be wanted there is not.
  constexpr int64_t kOfC0 = 4;
  if (!sizes.has_c && (given.needs & kOfC0) != 0) return false;
  Gradients grads(given.needs, allocate);
  call.x = given.x.data;
  call.h0 = layer->h0(given.states);
  call.grad_x = grads.next(shapes.x);
  call.grad_h0 = grads.next_or_scratch(shapes.h);
  if (sizes.has_c) {
    call.c0 = layer->c0(given.states);
    call.grad_c0 = grads.next_or_scratch(shapes.c);
  } else {
    grads.next_is_wanted();
  }
  const int64_t per_direction = given.weight_count / s.directions;
  for (int64_t i = 0; i < given.weight_count; i++) {
    WeightGrads& g = call.grads[i / per_direction];
    float** fields[] = {&g.w_ih, &g.w_hh, &g.b_ih, &g.b_hh, &g.w_hr};
    const int64_t which = i % per_direction;
    const bool is_projection = projected(s) && which == per_direction - 1;
    *fields[is_projection ? kProjection : which] = grads.next(given.weights[i]);
  }
  layer_backward(kernels(), call, torch_threads());
  return true;
}

namespace {

// Whether a tensor can be the sizes of steps.
bool are_sizes(const Tensor& sizes) {
  return sizes.is_cpu() && sizes.dim() == 1 && sizes.size(0) > 0 &&
         sizes.scalar_type() == torch::headeronly::ScalarType::Long && sizes.is_contiguous() &&
         has_memory(sizes);
}

// The arguments that both operators have.
struct Arguments {
  std::vector<Array> weights;
  StateArrays states;
  TrainBackwardCall call{};
  bool fit = true;

  Arguments(int64_t cell, const Tensor& x, const std::vector<Tensor>& w,
            const std::optional<Tensor>& h0, const std::optional<Tensor>& c0,
            const std::optional<Tensor>& batch_sizes, int64_t directions)
      : weights(arrays_of(w)), states(h0, c0) {
    call.cell = cell;
    call.x = array_of(x);
    call.weights = weights.data();
    call.weight_count = static_cast<int64_t>(weights.size());
    call.states = states.given();
    call.directions = directions;
    if (batch_sizes && (fit = are_sizes(*batch_sizes))) {
      call.batch_sizes = batch_sizes->const_data_ptr<int64_t>();
      call.timesteps = batch_sizes->size(0);
    }
  }
};

std::vector<Tensor> train_layer_op(int64_t cell, const Tensor& x, std::vector<Tensor> weights,
                                   std::optional<Tensor> h0, std::optional<Tensor> c0,
                                   std::optional<Tensor> batch_sizes, int64_t directions,
                                   bool save) {
  Arguments given(cell, x, weights, h0, c0, batch_sizes, directions);
  given.call.save = save;
  NewTensors outputs;
  if (given.fit) train_layer(given.call, outputs.allocator());
  return outputs.take();
}

std::vector<Tensor> train_layer_backward_op(
    int64_t cell, std::optional<Tensor> grad_y, std::optional<Tensor> grad_h_n,
    std::optional<Tensor> grad_c_n, const Tensor& x, std::vector<Tensor> weights,
    std::optional<Tensor> h0, std::optional<Tensor> c0, std::optional<Tensor> batch_sizes,
    std::optional<Tensor> y, std::optional<Tensor> gates, std::optional<Tensor> cells,
    int64_t directions, int64_t needs) {
  Arguments given(cell, x, weights, h0, c0, batch_sizes, directions);
  TrainBackwardCall& call = given.call;
  call.needs = needs;
  const std::optional<Tensor>* tensors[] = {&grad_y, &grad_h_n, &grad_c_n, &y, &gates, &cells};
  const Array** places[] = {&call.grad_y, &call.grad_h_n, &call.grad_c_n,
                            &call.y,      &call.gates,    &call.cells};
  Array arrays[std::size(tensors)];
  for (size_t i = 0; i < std::size(tensors); i++) {
    if (!*tensors[i]) continue;
    arrays[i] = array_of(**tensors[i]);
    *places[i] = &arrays[i];
  }
  NewTensors outputs;
  if (given.fit) train_layer_backward(call, outputs.allocator());
  return outputs.take();
}

}  // namespace
}  // namespace fused_rnn

// x [T, B, I], or [N, I] with the sizes of steps, states [D, B, P] and [D, B, H] or none for zeros,
// weights as in ForwardCallOf; or a cell's timestep, x [B, I] and states [B, H]. train_layer gives
// y, h_n (not of a timestep), c_n and, to be saved, gates and cells, those that the cell has; its
// backward the gradients of x, h0, c0 and the weights whose bits are set in `needs`, from the
// lowest on. Both give nothing to a call that is not for them.
STABLE_TORCH_LIBRARY_FRAGMENT(fused_rnn_cpu, m) {
  m.def(
      "train_layer(int cell, Tensor x, Tensor[] weights, Tensor? h0, Tensor? c0, "
      "Tensor? batch_sizes, int directions, bool save=True) -> Tensor[]");
  m.def(
      "train_layer_backward(int cell, Tensor? grad_y, Tensor? grad_h_n, Tensor? grad_c_n, "
      "Tensor x, Tensor[] weights, Tensor? h0, Tensor? c0, Tensor? batch_sizes, Tensor? y, "
      "Tensor? gates, Tensor? cells, int directions, int needs) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(fused_rnn_cpu, CompositeExplicitAutograd, m) {
  m.impl("train_layer", TORCH_BOX(&fused_rnn::train_layer_op));
  m.impl("train_layer_backward", TORCH_BOX(&fused_rnn::train_layer_backward_op));
}

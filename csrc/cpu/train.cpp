// A layer in training: a forward call with memory for what its backward needs, and that backward.
// For what fits, padded or packed, of float32 and, if small, of a half type: every other call gets
// no outputs, and Python takes the general way (fused_rnn/ops.py).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "../tensor_checks.h"
#include "border.h"
#include "calls.h"
#include "dense.h"
#include "operands.h"
#include "weights.h"

namespace fused_rnn {
namespace {

// [T, B, width] or [D, B, width]; of packed rows and of a cell's one timestep, [N, width] or
// [B, width], which have no leading dimension.
struct Shape {
  bool is_flat;
  int64_t all[3];

  int64_t dimensions() const { return is_flat ? 2 : 3; }
  const int64_t* sizes() const { return is_flat ? all + 1 : all; }
  int64_t count() const { return (is_flat ? 1 : all[0]) * all[1] * all[2]; }
  bool fits(const Array& array) const {
    return array.exists() && array.dimensions == dimensions() &&
           std::equal(sizes(), sizes() + dimensions(), array.sizes);
  }
};

// A call's arrays as kernels over elements of E take them, and memory for its results. Those of a
// half type are computed in E and in floats, and `finish` makes of these what is returned: with
// autocast, gradients are of the type of what they belong to, rounded to the call's.
template <class E>
class Border {
 public:
  Border(const TrainCall& call, const Allocator& allocate)
      : type_(call.type), autocast_(call.autocast), allocate_(allocate), operands_(call.type) {}

  // Whether an array is not given, or has that shape and the call's type, and lies together where
  // it may not be strided; then `to` are its numbers, or null.
  template <class To>
  bool read(const Array* array, const Shape& shape, const To*& to, bool strided = false) {
    if (array == nullptr) return true;
    if (!takes(*array) || !shape.fits(*array) || (array->strides && !strided)) return false;
    to = numbers<To>(*array);
    return true;
  }

  bool takes(const Array& array) const {
    return array.exists() &&
           (array.type == type_ || (autocast_ && array.type == NumberType::float32));
  }

  template <class To>
  const To* numbers(const Array& array) {
    if constexpr (std::is_same_v<To, float>) {
      if (type_ != NumberType::float32) return operands_.floats(array);
      if (array.is_plain()) return array.data;
      dense_.emplace_back(&array);
      return dense_.back().data();
    } else {
      return operands_.elements(array);
    }
  }

  // Of the call's type, or of another that is one of its arrays'.
  template <class To>
  To* result(const int64_t* sizes, int64_t dimensions, NumberType of) {
    void* output = allocate_.allocate(allocate_.context, of, sizes, dimensions, false);
    constexpr bool kElements = !std::is_same_v<To, float>;
    if (type_ == NumberType::float32 || (kElements && of == type_)) return static_cast<To*>(output);
    const int64_t count = count_of(sizes, dimensions);
    unfinished_.push_back({memory(count), count, output, kElements, of != type_});
    return reinterpret_cast<To*>(unfinished_.back().from.get());
  }
  template <class To>
  To* result(const Shape& shape) {
    return result<To>(shape.sizes(), shape.dimensions(), type_);
  }
  // The gradient of an array.
  template <class To>
  To* result_for(const Array& array) {
    return result<To>(array.sizes, array.dimensions, array.type);
  }

  // [D, N, width] for backward.
  E* saved(int64_t directions, int64_t count, int64_t width) {
    const int64_t sizes[] = {directions, count, width};
    if constexpr (std::is_same_v<E, float>) {
      if (type_ == NumberType::float32) return allocate_.saved(directions, count, width);
    }
    return result<E>(sizes, 3, type_);
  }

  // To be called when the kernels are done.
  void finish() const {
    for (const Unfinished& u : unfinished_) {
      if (u.is_wide) {
        const auto* halves = reinterpret_cast<const uint16_t*>(u.from.get());
        Memory narrowed;
        if (!u.elements) {
          narrowed = memory((u.count + 1) / 2);
          narrow(type_, u.from.get(), u.count, reinterpret_cast<uint16_t*>(narrowed.get()));
          halves = reinterpret_cast<const uint16_t*>(narrowed.get());
        }
        widen(type_, halves, u.count, static_cast<float*>(u.to));
      } else {
        narrow(type_, u.from.get(), u.count, static_cast<uint16_t*>(u.to));
      }
    }
  }

 private:
  struct Unfinished {
    Memory from;
    int64_t count;
    void* to;
    bool elements;  // whether `from` has elements, else floats
    bool is_wide;   // whether `to` is of float32
  };

  const NumberType type_;
  const bool autocast_;
  const Allocator& allocate_;
  Operands<E> operands_;
  std::vector<Dense> dense_;
  std::vector<Unfinished> unfinished_;
};

struct Shapes {
  Shape x, y, h, c;
};

// What both passes need of the arguments.
template <class E>
struct Layer {
  ForwardCallOf<E> call;  // shape, weights, x, h0 and c0
  CellSizes sizes;
  Shapes shapes;
  bool is_step;
  Memory zeros;                  // in the place of initial states that are not given
  std::vector<int64_t> offsets;  // of packed rows
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
template <class E>
std::optional<Layer<E>> read_layer(const TrainCall& given, Border<E>& border) {
  const Array& x = given.x;
  const int64_t directions = given.directions;
  const bool is_packed = given.batch_sizes != nullptr;
  const bool is_flat = x.dimensions == 2, is_step = is_flat && !is_packed;
  if (x.dimensions != (is_packed || is_step ? 2 : 3)) return {};
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
  const std::vector<ForwardCallOf<E>> calls =
      read_stack<E>(s, 1, given, [&](const Array& weight) -> const void* {
        if (!border.takes(weight)) return nullptr;
        if (weight.dimensions == 1) return border.template numbers<float>(weight);
        return border.template numbers<E>(weight);
      });
  if (calls.empty()) return {};
  Layer<E> layer{calls[0], cell_sizes(s.cell), {}, is_step, nullptr, std::move(offsets)};
  const int64_t of_step = is_packed ? count : rows.batch;
  layer.shapes = {{is_flat, {rows.timesteps, of_step, s.input}},
                  {is_flat, {rows.timesteps, of_step, directions * s.output}},
                  {is_step, {directions, rows.batch, s.output}},
                  {is_step, {directions, rows.batch, s.hidden}}};
  const Array *h = given.states.h, *c = given.states.c;
  ForwardCallOf<E>& call = layer.call;
  if (!border.read(&x, layer.shapes.x, call.x) || !border.read(h, layer.shapes.h, call.h0) ||
      !border.read(c, layer.shapes.c, call.c0) ||
      (c != nullptr) != (layer.sizes.has_c && h != nullptr)) {
    return {};
  }
  if (h == nullptr) {
    layer.zeros = memory(layer.shapes.c.count());
    std::fill_n(layer.zeros.get(), layer.shapes.c.count(), 0.0f);
    call.h0 = reinterpret_cast<const E*>(layer.zeros.get());
    if (layer.sizes.has_c) call.c0 = layer.zeros.get();
  }
  return layer;
}

template <class E>
bool forward(const KernelsOf<E>& isa, const TrainCall& given, const Allocator& allocate) {
  Border<E> border(given, allocate);
  std::optional<Layer<E>> layer = read_layer(given, border);
  if (!layer) return false;
  ForwardCallOf<E>& call = layer->call;
  const Shapes& shapes = layer->shapes;
  const LayerShape& s = call.shape;
  Memory h_n;
  call.y = border.template result<E>(shapes.y);
  if (layer->is_step) {
    h_n = memory(shapes.h.count());  // y once more
    call.h_n = h_n.get();
  } else {
    call.h_n = border.template result<float>(shapes.h);
  }
  if (layer->sizes.has_c) call.c_n = border.template result<float>(shapes.c);
  if (const int64_t width = layer->sizes.saved_gates * s.hidden; given.save && width > 0) {
    call.gates = border.saved(s.directions, s.count, width);
  }
  if (given.save && layer->sizes.has_c) {
    call.cells = allocate.saved(s.directions, s.count, s.hidden);
  }
  layer_forward(isa, call, torch_threads());
  border.finish();
  return true;
}

// Memory for gradients: those that are wanted become outputs, in the order of the bits of `needs`.
template <class E>
class Gradients {
 public:
  Gradients(int64_t needs, Border<E>& border) : needs_(needs), border_(border) {}

  bool next_is_wanted() {
    const bool wanted = (needs_ & 1) != 0;
    needs_ >>= 1;
    return wanted;
  }
  // Null where it is not wanted.
  template <class To>
  To* next(const Array& like) {
    return next_is_wanted() ? border_.template result_for<To>(like) : nullptr;
  }
  // What kernels write in any case, of an initial state that may not be given.
  float* next_or_scratch(const Array* like, const Shape& shape) {
    if (next_is_wanted()) {
      return like ? border_.template result_for<float>(*like)
                  : border_.template result<float>(shape);
    }
    scratch_.push_back(memory(shape.count()));
    return scratch_.back().get();
  }

 private:
  int64_t needs_;
  Border<E>& border_;
  std::vector<Memory> scratch_;
};

template <class E>
bool backward(const KernelsOf<E>& isa, const TrainBackwardCall& given, const Allocator& allocate) {
  Border<E> border(given, allocate);
  const std::optional<Layer<E>> layer = read_layer(given, border);
  if (!layer) return false;
  const Shapes& shapes = layer->shapes;
  const CellSizes sizes = layer->sizes;
  BackwardCallOf<E> call{};
  LayerShape& s = call.shape;
  s = layer->call.shape;
  std::copy_n(layer->call.weights, 2, call.weights);
  const Shape gates_shape{false, {s.directions, s.count, sizes.saved_gates * s.hidden}};
  const Shape cells_shape{false, {s.directions, s.count, s.hidden}};
  const Array* cells = given.cells;
  if (!border.read(given.grad_y, shapes.y, call.grad_y, true) ||
      !border.read(given.grad_h_n, shapes.h, call.grad_h_n, true) ||
      !border.read(given.grad_c_n, shapes.c, call.grad_c_n, true) ||
      !border.read(given.y, shapes.y, call.y) ||
      !border.read(given.gates, gates_shape, call.gates) ||
      (call.gates != nullptr) != (sizes.saved_gates > 0) || (cells != nullptr) != sizes.has_c ||
      (cells && !(cells->is_plain() && cells_shape.fits(*cells))) || call.y == nullptr) {
    return false;
  }
  constexpr int64_t kOfC0 = 4;
  if (!sizes.has_c && (given.needs & kOfC0) != 0) return false;
  Gradients<E> grads(given.needs, border);
  if (cells) call.cells = cells->data;
  call.x = layer->call.x;
  call.h0 = layer->call.h0;
  call.c0 = layer->call.c0;
  call.grad_x = grads.template next<E>(given.x);
  call.grad_h0 = grads.next_or_scratch(given.states.h, shapes.h);
  if (sizes.has_c) {
    call.grad_c0 = grads.next_or_scratch(given.states.c, shapes.c);
  } else {
    grads.next_is_wanted();
  }
  const int64_t per_direction = given.weight_count / s.directions;
  for (int64_t i = 0; i < given.weight_count; i++) {
    WeightGrads& g = call.grads[i / per_direction];
    float** fields[] = {&g.w_ih, &g.w_hh, &g.b_ih, &g.b_hh, &g.w_hr};
    const int64_t which = i % per_direction;
    const bool is_projection = projected(s) && which == per_direction - 1;
    *fields[is_projection ? kProjection : which] = grads.template next<float>(given.weights[i]);
  }
  layer_backward(isa, call, torch_threads());
  border.finish();
  return true;
}

// Whether so much of a half type would become floats, or be made of them, that torch does it
// better.
bool is_much(const TrainCall& given) {
  int64_t converted = given.x.count() + given.gates();
  for (int64_t i = 0; i < given.weight_count; i++) converted += given.weights[i].count();
  return converted > kMostConverted;
}

// Calls function(kernels) with those for the call's type, or says that it is not for here.
template <class Function>
bool with_kernels(const TrainCall& given, const Function& function) {
  if (given.type == NumberType::float32) return function(kernels());
  if (is_much(given)) return false;
  const auto* native = kernels_of_half(given.type, cell_kind(given.cell));
  return native ? function(*native) : function(kernels());
}

}  // namespace

bool train_layer(const TrainCall& given, const Allocator& allocate) {
  return with_kernels(given, [&](const auto& isa) { return forward(isa, given, allocate); });
}

bool train_layer_backward(const TrainBackwardCall& given, const Allocator& allocate) {
  return with_kernels(given, [&](const auto& isa) { return backward(isa, given, allocate); });
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

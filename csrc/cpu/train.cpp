// A layer in training: a forward call with memory for what its backward needs, and that backward.
// For what fits, padded, with masks or without, or packed, of float32 and, if small, of a half
// type: every other call gets no outputs, and Python takes the general way (fused_rnn/ops.py).
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
#include "pieces.h"
#include "weights.h"
#include "workspace.h"

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
      return wide(array);
    } else {
      return operands_.elements(array);
    }
  }

  // Of an array that is of float32 whatever the call's type is.
  const float* wide(const Array& array) {
    dense_.emplace_back(&array);
    return dense_.back().data();
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

  // Memory for kernels, of E or of floats.
  template <class To>
  To* scratch(int64_t count) {
    constexpr auto kSize = static_cast<int64_t>(sizeof(float) / sizeof(To));
    return reinterpret_cast<To*>(workspace_.take(ceil_div(count, kSize)));
  }
  // Rows of a padded batch as kernels take them: packed, if there are pieces. Null stays null.
  const E* packed(const std::optional<Pieces>& pieces, const E* rows, int64_t width) {
    if (!pieces || rows == nullptr) return rows;
    E* to = scratch<E>(pieces->steps() * width);
    pieces->gather(rows, width, to);
    return to;
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
  Workspace workspace_;
  std::vector<Dense> dense_;
  std::vector<Unfinished> unfinished_;
};

struct Shapes {
  Shape x, y, h, c;
};

// What both passes need of the arguments. A padded batch with masks is computed as packed rows, its
// pieces; shapes are those of the batch.
template <class E>
struct Layer {
  ForwardCallOf<E> call;  // shape, weights, x, h0 and c0
  CellSizes sizes;
  Shapes shapes;
  bool is_step;
  std::vector<int64_t> offsets;  // of packed rows
  std::optional<Pieces> pieces;
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

// Or nothing where no step is left, or masks do not fit so many rows.
std::optional<Pieces> read_pieces(const Masks& masks, const PaddedRows& rows) {
  if (masks.pieces) return Pieces::saved(rows, masks.pieces, masks.piece_count);
  for (int64_t row = 0; masks.lengths && row < rows.batch; row++) {
    if (masks.lengths[row] < 0 || masks.lengths[row] > rows.timesteps) return {};
  }
  return Pieces(rows, masks.lengths, masks.resets);
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
  const bool batch_first = given.masks.any() && given.masks.batch_first;
  RowLayout rows{is_step ? 1 : x.sizes[batch_first], x.sizes[is_step || batch_first ? 0 : 1],
                 nullptr, nullptr};
  int64_t count = rows.timesteps * rows.batch;
  std::vector<int64_t> offsets;
  if (is_packed) {
    count = x.sizes[0];
    const std::optional<RowLayout> packed = read_packed(given, count, offsets);
    if (!packed) return {};
    rows = *packed;
  }
  const int64_t leading = x.sizes[0], batch = rows.batch;
  std::optional<Pieces> pieces;
  if (given.masks.any()) {
    if (is_flat) return {};
    pieces = read_pieces(given.masks, PaddedRows(rows.timesteps, batch, batch_first));
    if (!pieces || pieces->steps() == 0) return {};
    rows = pieces->layout();
    count = pieces->steps();
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
  Layer<E> layer{calls[0], cell_sizes(s.cell), {}, is_step, std::move(offsets), {}};
  layer.shapes = {{is_flat, {leading, x.sizes[x.dimensions - 2], s.input}},
                  {is_flat, {leading, x.sizes[x.dimensions - 2], directions * s.output}},
                  {is_step, {directions, batch, s.output}},
                  {is_step, {directions, batch, s.hidden}}};
  const Array *h = given.states.h, *c = given.states.c;
  ForwardCallOf<E>& call = layer.call;
  if (!border.read(&x, layer.shapes.x, call.x) || !border.read(h, layer.shapes.h, call.h0) ||
      !border.read(c, layer.shapes.c, call.c0) ||
      (c != nullptr) != (layer.sizes.has_c && h != nullptr)) {
    return {};
  }
  const int64_t states = directions * rows.batch;
  if (h == nullptr) {
    float* zeros = border.template scratch<float>(states * s.hidden);
    std::fill_n(zeros, states * s.hidden, 0.0f);
    call.h0 = reinterpret_cast<const E*>(zeros);
    if (layer.sizes.has_c) call.c0 = zeros;
  } else if (pieces) {
    E* h0 = border.template scratch<E>(states * s.output);
    pieces->initial(call.h0, directions, s.output, h0);
    call.h0 = h0;
    if (c != nullptr) {
      float* c0 = border.template scratch<float>(states * s.hidden);
      pieces->initial(call.c0, directions, s.hidden, c0);
      call.c0 = c0;
    }
  }
  call.x = border.packed(pieces, call.x, s.input);
  layer.pieces = std::move(pieces);
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
  const std::optional<Pieces>& pieces = layer->pieces;
  const int64_t width = s.directions * s.output, states = s.directions * s.rows.batch;
  if (given.all_cells && pieces) return false;
  E* y = border.template result<E>(shapes.y);
  // Of a step it is y once more.
  float* h_n = layer->is_step ? border.template scratch<float>(shapes.h.count())
                              : border.template result<float>(shapes.h);
  float* c_n = layer->sizes.has_c ? border.template result<float>(shapes.c) : nullptr;
  call.y = pieces ? border.template scratch<E>(s.count * width) : y;
  call.h_n = pieces ? border.template scratch<float>(states * s.output) : h_n;
  call.c_n = pieces && c_n ? border.template scratch<float>(states * s.hidden) : c_n;
  if (const int64_t saved = layer->sizes.saved_gates * s.hidden; given.save && saved > 0) {
    call.gates = border.saved(s.directions, s.count, saved);
  }
  if ((given.save || given.all_cells) && layer->sizes.has_c) {
    call.cells = allocate.saved(s.directions, s.count, s.hidden);
  }
  if (given.save && pieces) pieces->save(allocate.integers({pieces->count(), kPieceNumbers}));
  layer_forward(isa, call, torch_threads());
  if (pieces) {
    const Array *h = given.states.h, *c = given.states.c;
    pieces->spread(call.y, width, y);
    pieces->final(call.h_n, h ? border.template numbers<float>(*h) : nullptr, s.directions,
                  s.output, h_n);
    if (c_n) {
      pieces->final(call.c_n, c ? border.template numbers<float>(*c) : nullptr, s.directions,
                    s.hidden, c_n);
    }
  }
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
    return border_.template scratch<float>(shape.count());
  }

 private:
  int64_t needs_;
  Border<E>& border_;
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
  const Array *cells = given.cells, *grad_cells = given.grad_cells;
  // A single step's rows start from h0.
  const bool needs_y = s.rows.timesteps > 1 || sizes.saved_gates == 0;
  if (!border.read(given.grad_y, shapes.y, call.grad_y, true) ||
      !border.read(given.grad_h_n, shapes.h, call.grad_h_n, true) ||
      !border.read(given.grad_c_n, shapes.c, call.grad_c_n, true) ||
      !border.read(given.y, shapes.y, call.y) ||
      !border.read(given.gates, gates_shape, call.gates) ||
      (call.gates != nullptr) != (sizes.saved_gates > 0) || (cells != nullptr) != sizes.has_c ||
      (cells && !(cells->is_plain() && cells_shape.fits(*cells))) ||
      (needs_y && call.y == nullptr)) {
    return false;
  }
  if (grad_cells) {
    if (!cells || layer->pieces || !grad_cells->data || !cells_shape.fits(*grad_cells))
      return false;
    call.grad_cells = border.wide(*grad_cells);
  }
  constexpr int64_t kOfH0 = 2, kOfC0 = 4;
  if (!sizes.has_c && (given.needs & kOfC0) != 0) return false;
  Gradients<E> grads(given.needs, border);
  if (cells) call.cells = cells->data;
  call.x = layer->call.x;
  call.h0 = layer->call.h0;
  call.c0 = layer->call.c0;
  E* grad_x = grads.template next<E>(given.x);
  float* grad_h0 = grads.next_or_scratch(given.states.h, shapes.h);
  float* grad_c0 = nullptr;
  if (sizes.has_c) {
    grad_c0 = grads.next_or_scratch(given.states.c, shapes.c);
  } else {
    grads.next_is_wanted();
  }
  const std::optional<Pieces>& pieces = layer->pieces;
  const float *grad_h_n = call.grad_h_n, *grad_c_n = call.grad_c_n;
  call.y = border.packed(pieces, call.y, s.directions * s.output);
  call.grad_y = border.packed(pieces, call.grad_y, s.directions * s.output);
  // The gradient of the pieces' states, of that of the rows'.
  const auto of_pieces = [&](const float* grad, int64_t width) -> const float* {
    if (!pieces || !grad) return grad;
    float* to = border.template scratch<float>(s.directions * s.rows.batch * width);
    pieces->final_grads(grad, s.directions, width, to);
    return to;
  };
  call.grad_h_n = of_pieces(grad_h_n, s.output);
  call.grad_c_n = of_pieces(grad_c_n, s.hidden);
  const auto for_kernels = [&](auto* result, int64_t count) {
    using T = std::remove_pointer_t<decltype(result)>;
    return pieces && result ? border.template scratch<T>(count) : result;
  };
  call.grad_x = for_kernels(grad_x, s.count * s.input);
  call.grad_h0 = for_kernels(grad_h0, s.directions * s.rows.batch * s.output);
  call.spares_h0 = (given.needs & kOfH0) == 0;
  call.grad_c0 = for_kernels(grad_c0, s.directions * s.rows.batch * s.hidden);
  const int64_t per_direction = given.weight_count / s.directions;
  for (int64_t i = 0; i < given.weight_count; i++) {
    const int64_t number = i % per_direction;
    const bool is_projection = projected(s) && number == per_direction - 1;
    const size_t which = is_projection ? kProjection : static_cast<size_t>(number);
    const Array& weight = given.weights[i];
    void* grad = weight.dimensions == 1 ? grads.template next<float>(weight)
                                        : static_cast<void*>(grads.template next<E>(weight));
    set_field(call.grads[i / per_direction], which, grad);
  }
  layer_backward(isa, call, torch_threads());
  if (pieces) {
    if (grad_x) pieces->spread(call.grad_x, s.input, grad_x);
    if (!call.spares_h0) {
      pieces->initial_grads(call.grad_h0, grad_h_n, s.directions, s.output, grad_h0);
    }
    if (grad_c0) pieces->initial_grads(call.grad_c0, grad_c_n, s.directions, s.hidden, grad_c0);
  }
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

using torch::headeronly::ScalarType;

// Of one of the tensors that say which rows there are; null where it is another thing.
template <class T>
const T* layout_numbers(const Tensor& tensor, ScalarType type, int64_t dimensions) {
  const bool fits = tensor.is_cpu() && tensor.dim() == dimensions && tensor.size(0) > 0 &&
                    tensor.scalar_type() == type && tensor.is_contiguous() && has_memory(tensor);
  return fits ? static_cast<const T*>(tensor.const_data_ptr()) : nullptr;
}

// The arguments that both operators have.
struct Arguments {
  std::vector<Array> weights;
  StateArrays states;
  TrainBackwardCall call{};
  bool fit = true;

  Arguments(int64_t cell, const Tensor& x, const std::vector<Tensor>& w,
            const std::optional<Tensor>& h0, const std::optional<Tensor>& c0, int64_t directions)
      : weights(arrays_of(w)), states(h0, c0) {
    call.cell = cell;
    call.x = array_of(x);
    call.weights = weights.data();
    call.weight_count = static_cast<int64_t>(weights.size());
    call.states = states.given();
    call.directions = directions;
  }

  void read_batch_sizes(const std::optional<Tensor>& sizes) {
    if (!sizes) return;
    call.batch_sizes = layout_numbers<int64_t>(*sizes, ScalarType::Long, 1);
    fit = fit && call.batch_sizes;
    if (fit) call.timesteps = sizes->size(0);
  }

  void read_masks(const std::optional<Tensor>& lengths, const std::optional<Tensor>& resets,
                  bool batch_first) {
    if (!lengths && !resets) return;
    Masks& masks = call.masks;
    masks.batch_first = batch_first;
    fit = fit && call.x.dimensions == 3;
    const int64_t of_batch = batch_first ? 0 : 1;
    if (fit && lengths) {
      masks.lengths = layout_numbers<int64_t>(*lengths, ScalarType::Long, 1);
      fit = masks.lengths && lengths->size(0) == call.x.sizes[of_batch];
    }
    if (fit && resets) {
      masks.resets = layout_numbers<bool>(*resets, ScalarType::Bool, 2);
      fit =
          masks.resets && resets->size(0) == call.x.sizes[0] && resets->size(1) == call.x.sizes[1];
    }
  }

  void read_pieces(const std::optional<Tensor>& pieces, bool batch_first) {
    if (!pieces) return;
    call.masks.batch_first = batch_first;
    call.masks.pieces = layout_numbers<int64_t>(*pieces, ScalarType::Long, 2);
    fit = fit && call.masks.pieces && pieces->size(1) == kPieceNumbers;
    if (fit) call.masks.piece_count = pieces->size(0);
  }
};

std::vector<Tensor> train_layer_op(int64_t cell, const Tensor& x, std::vector<Tensor> weights,
                                   std::optional<Tensor> h0, std::optional<Tensor> c0,
                                   std::optional<Tensor> batch_sizes, int64_t directions, bool save,
                                   std::optional<Tensor> lengths, std::optional<Tensor> resets,
                                   bool batch_first) {
  Arguments given(cell, x, weights, h0, c0, directions);
  given.read_batch_sizes(batch_sizes);
  given.read_masks(lengths, resets, batch_first);
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
    int64_t directions, int64_t needs, std::optional<Tensor> pieces, bool batch_first) {
  Arguments given(cell, x, weights, h0, c0, directions);
  given.read_batch_sizes(batch_sizes);
  given.read_pieces(pieces, batch_first);
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
// weights as in ForwardCallOf; or a cell's timestep, x [B, I] and states [B, H]. A padded batch may
// have lengths int64 [B] and resets bool [T, B]; with batch_first these, x and y have the batch
// first. train_layer gives y, h_n (not of a timestep), c_n and, to be saved, gates and cells, those
// that the cell has, and the pieces that masks cut a batch into, int64 [K, 4]; its backward the
// gradients of x, h0, c0 and the weights whose bits are set in `needs`, from the
// lowest on. Both give nothing to a call that is not for them.
STABLE_TORCH_LIBRARY_FRAGMENT(fused_rnn_cpu, m) {
  m.def(
      "train_layer(int cell, Tensor x, Tensor[] weights, Tensor? h0, Tensor? c0, "
      "Tensor? batch_sizes, int directions, bool save=True, Tensor? lengths=None, "
      "Tensor? resets=None, bool batch_first=False) -> Tensor[]");
  m.def(
      "train_layer_backward(int cell, Tensor? grad_y, Tensor? grad_h_n, Tensor? grad_c_n, "
      "Tensor x, Tensor[] weights, Tensor? h0, Tensor? c0, Tensor? batch_sizes, Tensor? y, "
      "Tensor? gates, Tensor? cells, int directions, int needs, Tensor? pieces=None, "
      "bool batch_first=False) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(fused_rnn_cpu, CompositeExplicitAutograd, m) {
  m.impl("train_layer", TORCH_BOX(&fused_rnn::train_layer_op));
  m.impl("train_layer_backward", TORCH_BOX(&fused_rnn::train_layer_backward_op));
}

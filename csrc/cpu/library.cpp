// The CPU library's border: checks every argument, fills the plain structs, lends torch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "../tensor_checks.h"
#include "border.h"
#include "features.h"
#include "layer.h"
#include "weights.h"
#include "workspace.h"

namespace fused_rnn {
namespace {

using torch::headeronly::ScalarType;

// The kernels for an element type.
template <class E>
const KernelsOf<E>& kernels_of();

template <>
const KernelsOf<float>& kernels_of() {
  return kernels();
}

template <>
const KernelsOf<BFloat16>& kernels_of() {
  const KernelsOf<BFloat16>* found = bfloat16_kernels();
  STD_TORCH_CHECK(found != nullptr, "x: expected dtype Float, got BFloat16, for which ",
                  kernels().name, " has no kernels on this CPU");
  return *found;
}

std::string capability() { return kernels().name; }

// Empty where there are no kernels for bfloat16.
std::string bfloat16_capability() {
  const KernelsOf<BFloat16>* found = bfloat16_kernels();
  return found ? found->name : "";
}

template <class E>
constexpr ScalarType kScalarType = ScalarType::Float;
template <>
constexpr ScalarType kScalarType<BFloat16> = ScalarType::BFloat16;

// A dense CPU tensor of just this type and shape.
void check(const Tensor& tensor, const char* name, ScalarType type,
           std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, ": expected a CPU tensor");
  check_dense(tensor, name, type, shape);
}

template <class E = float>
const E* input(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) {
  check(tensor, name, kScalarType<E>, shape);
  return static_cast<const E*>(tensor.const_data_ptr());
}

template <class E = float>
const E* input(const std::optional<Tensor>& tensor, const char* name,
               std::initializer_list<int64_t> shape) {
  return tensor ? input<E>(*tensor, name, shape) : nullptr;
}

template <class E = float>
E* output(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) {
  check(tensor, name, kScalarType<E>, shape);
  return static_cast<E*>(tensor.mutable_data_ptr());
}

// Sizes of a call, from arguments that other checks will confirm. An LSTM whose c is wider than h
// is projected.
LayerShape layer_shape(int64_t cell, const Tensor& x, const Tensor& h0,
                       const std::optional<Tensor>& c0) {
  STD_TORCH_CHECK(x.dim() == 2, "x: expected [N, I], got shape ", shape_text(x.sizes()));
  STD_TORCH_CHECK(h0.dim() == 3, "h0: expected [D, B, P], got shape ", shape_text(h0.sizes()));
  STD_TORCH_CHECK(h0.size(0) == 1 || h0.size(0) == 2, "h0: expected 1 or 2 directions, got ",
                  h0.size(0));
  STD_TORCH_CHECK(h0.size(2) > 0, "h0: expected at least one hidden unit, got shape ",
                  shape_text(h0.sizes()));
  LayerShape s{};
  s.cell = cell_kind(cell);
  s.directions = h0.size(0);
  s.input = x.size(1);
  s.output = h0.size(2);
  s.hidden = s.output;
  STD_TORCH_CHECK(c0.has_value() == cell_sizes(s.cell).has_c, "c0: expected ",
                  c0 ? "None for this cell" : "a tensor for lstm");
  if (c0) {
    STD_TORCH_CHECK(c0->dim() == 3 && c0->size(2) >= s.output,
                    "c0: expected [D, B, H] with H >= ", s.output, ", the width of h0, got shape ",
                    shape_text(c0->sizes()));
    s.hidden = c0->size(2);
  }
  s.count = x.size(0);
  s.rows.batch = h0.size(1);
  return s;
}

// Checks batch_sizes and fills `offsets`, which must live as long as the result.
RowLayout row_layout(const LayerShape& s, const std::optional<Tensor>& batch_sizes,
                     std::vector<int64_t>& offsets) {
  const int64_t count = s.count, batch = s.rows.batch;
  if (!batch_sizes) {
    STD_TORCH_CHECK(batch == 0 ? count == 0 : count % batch == 0,
                    "x: expected a multiple of the batch size ", batch, " as its rows, got ",
                    count);
    return {batch == 0 ? 0 : count / batch, batch, nullptr, nullptr};
  }
  STD_TORCH_CHECK(batch_sizes->is_cpu() && batch_sizes->dim() == 1 &&
                      batch_sizes->scalar_type() == ScalarType::Long &&
                      batch_sizes->is_contiguous() && has_memory(*batch_sizes),
                  "batch_sizes: expected a contiguous int64 CPU tensor [T], got shape ",
                  shape_text(batch_sizes->sizes()), " or another dtype, device or storage");
  const int64_t timesteps = batch_sizes->size(0);
  const int64_t* at = batch_sizes->const_data_ptr<int64_t>();
  int64_t total = 0;
  const int64_t wrong = find_offsets(at, timesteps, batch, offsets, total);
  STD_TORCH_CHECK(wrong < 0, "batch_sizes: expected 0 to ", wrong > 0 ? at[wrong - 1] : batch,
                  " rows at step ", wrong, ", never more than the step before or the batch, got ",
                  at[wrong]);
  STD_TORCH_CHECK(total == count, "batch_sizes: expected a sum of ", count, " rows, got ", total);
  return {timesteps, batch, at, offsets.data()};
}

// Gains of normalisations come last, and are longer than any bias. An RNN has none.
bool is_normed(const LayerShape& s, const std::vector<Tensor>& weights) {
  const int64_t gates = cell_sizes(s.cell).gates;
  return gates > 1 && !weights.empty() && weights.back().dim() == 1 &&
         weights.back().size(0) > gates * s.hidden;
}

// layer_shape with all that it leaves open; see row_layout.
template <class E>
LayerShape whole_shape(int64_t cell, const Tensor& x, const std::vector<Tensor>& weights,
                       const Tensor& h0, const std::optional<Tensor>& c0,
                       const std::optional<Tensor>& batch_sizes, std::vector<int64_t>& offsets) {
  LayerShape s = layer_shape(cell, x, h0, c0);
  s.rows = row_layout(s, batch_sizes, offsets);
  s.normed = is_normed(s, weights);
  STD_TORCH_CHECK(!s.normed || (std::is_same_v<E, float>),
                  "x: expected dtype Float for a layer that normalises, got BFloat16");
  return s;
}

template <class E>
void read_weights(const LayerShape& s, const std::vector<Tensor>& tensors,
                  WeightsOf<E> weights[2]) {
  for_each_weight(s, tensors.size(), "weights",
                  [&](size_t i, size_t d, size_t which, std::initializer_list<int64_t> shape) {
                    const ScalarType type = shape.size() == 1 ? ScalarType::Float : kScalarType<E>;
                    check(tensors[i], "weights", type, shape);
                    const void* data = tensors[i].const_data_ptr();
                    if (which == kNorm) {
                      weights[d].norm =
                          norm_gains(s, static_cast<const float*>(data), *shape.begin());
                    } else {
                      set_field(weights[d], which, data);
                    }
                  });
}

// Empty tensors stand for gradients that are not wanted.
template <class E>
void read_grads(const LayerShape& s, const std::vector<Tensor>& tensors,
                WeightGradsOf<E> grads[2]) {
  for_each_weight(s, tensors.size(), "grad_weights",
                  [&](size_t i, size_t d, size_t which, std::initializer_list<int64_t> shape) {
                    if (tensors[i].dim() != static_cast<int64_t>(shape.size())) return;
                    void* data =
                        shape.size() == 1
                            ? output(tensors[i], "grad_weights", shape)
                            : static_cast<void*>(output<E>(tensors[i], "grad_weights", shape));
                    if (which == kNorm) {
                      grads[d].norm = norm_gains(s, static_cast<float*>(data), *shape.begin());
                    } else {
                      set_field(grads[d], which, data);
                    }
                  });
}

// Floats beyond the gates that a layer which normalises saves of a row.
int64_t norm_columns(const LayerShape& s) {
  const CellSizes sizes = cell_sizes(s.cell);
  return s.normed ? (2 * sizes.gates + (sizes.has_c ? 1 : 0)) * s.hidden + kNormScales : 0;
}

// `gates` [D, N, columns]: those of all rows, then what normalisations save of all rows.
int64_t saved_columns(const LayerShape& s) {
  return cell_sizes(s.cell).saved_gates * s.hidden + norm_columns(s);
}

// From behind the gates, in the order that every backend keeps (`Problem.saved_columns`).
template <class T>
NormValuesOf<T> norm_values(const LayerShape& s, T* gates) {
  const CellSizes sizes = cell_sizes(s.cell);
  const int64_t units = s.directions * s.count * s.hidden;
  T* hh = gates + sizes.saved_gates * units;
  T* c = hh + sizes.gates * units;
  T* ih = sizes.has_c ? c + units : c;
  return {ih, hh, sizes.has_c ? c : nullptr, ih + sizes.gates * units};
}

// What is random in the recurrence: the last arguments of the operators.
struct Noise {
  const std::optional<Tensor>& h_factor;
  const std::optional<Tensor>& kept_h;
  const std::optional<Tensor>& kept_c;
  double part_h, part_c;

  // Fills what forward and backward calls have of it.
  template <class Call>
  void read(Call& call) const {
    const LayerShape& s = call.shape;
    call.h_factor = input(h_factor, "h_factor", {s.directions, s.rows.batch, s.output});
    call.zoneout_h = zoneout(kept_h, "kept_h", part_h, {s.directions, s.count, s.output});
    call.zoneout_c = zoneout(kept_c, "kept_c", part_c, {s.directions, s.count, s.hidden});
  }

 private:
  static Zoneout zoneout(const std::optional<Tensor>& kept, const char* name, double part,
                         std::initializer_list<int64_t> shape) {
    if (kept) check(*kept, name, ScalarType::Bool, shape);
    return {kept ? static_cast<const uint8_t*>(kept->const_data_ptr()) : nullptr,
            static_cast<float>(part)};
  }
};

template <class E>
void forward_of(int64_t cell, const Tensor& x, const std::vector<Tensor>& weights, const Tensor& h0,
                const std::optional<Tensor>& c0, const std::optional<Tensor>& batch_sizes,
                const Tensor& y, const Tensor& h_n, const Tensor& c_n, const Tensor& gates,
                const Tensor& cells, const Noise& noise) {
  std::vector<int64_t> offsets;
  ForwardCallOf<E> call{};
  LayerShape& s = call.shape;
  s = whole_shape<E>(cell, x, weights, h0, c0, batch_sizes, offsets);
  const CellSizes sizes = cell_sizes(s.cell);
  read_weights(s, weights, call.weights);
  call.x = input<E>(x, "x", {s.count, s.input});
  call.h0 = input<E>(h0, "h0", {s.directions, s.rows.batch, s.output});
  call.y = output<E>(y, "y", {s.count, s.directions * s.output});
  call.h_n = output(h_n, "h_n", {s.directions, s.rows.batch, s.output});
  if (sizes.has_c) {
    call.c0 = input(c0, "c0", {s.directions, s.rows.batch, s.hidden});
    call.c_n = output(c_n, "c_n", {s.directions, s.rows.batch, s.hidden});
  }
  if (gates.dim() == 3 && gates.size(2) > 0) {
    call.gates = output<E>(gates, "gates", {s.directions, s.count, saved_columns(s)});
    if constexpr (std::is_same_v<E, float>) {
      if (s.normed) call.normed = norm_values(s, call.gates);
    }
    advise_huge_pages_if_fresh(call.gates, static_cast<size_t>(gates.numel()) * sizeof(E));
  }
  if (cells.dim() == 3 && cells.size(2) > 0) {
    call.cells = output(cells, "cells", {s.directions, s.count, s.hidden});
  }
  noise.read(call);
  layer_forward(kernels_of<E>(), call, torch_threads());
}

void forward_op(int64_t cell, const Tensor& x, std::vector<Tensor> weights, const Tensor& h0,
                std::optional<Tensor> c0, std::optional<Tensor> batch_sizes, Tensor y, Tensor h_n,
                Tensor c_n, Tensor gates, Tensor cells, std::optional<Tensor> h_factor,
                std::optional<Tensor> kept_h, std::optional<Tensor> kept_c, double part_h,
                double part_c) {
  const bool half = x.scalar_type() == ScalarType::BFloat16;
  (half ? forward_of<BFloat16> : forward_of<float>)(cell, x, weights, h0, c0, batch_sizes, y, h_n,
                                                    c_n, gates, cells,
                                                    {h_factor, kept_h, kept_c, part_h, part_c});
}

template <class E>
void backward_of(int64_t cell, const std::optional<Tensor>& grad_y,
                 const std::optional<Tensor>& grad_h_n, const std::optional<Tensor>& grad_c_n,
                 const std::optional<Tensor>& grad_cells, const Tensor& x,
                 const std::vector<Tensor>& weights, const Tensor& h0,
                 const std::optional<Tensor>& c0, const std::optional<Tensor>& batch_sizes,
                 const Tensor& y, const Tensor& gates, const Tensor& cells, const Tensor& grad_x,
                 const Tensor& grad_h0, const Tensor& grad_c0,
                 const std::vector<Tensor>& grad_weights, const Noise& noise, bool spares_h0) {
  std::vector<int64_t> offsets;
  BackwardCallOf<E> call{};
  call.spares_h0 = spares_h0;
  LayerShape& s = call.shape;
  s = whole_shape<E>(cell, x, weights, h0, c0, batch_sizes, offsets);
  const CellSizes sizes = cell_sizes(s.cell);
  read_weights(s, weights, call.weights);
  call.grad_y = input<E>(grad_y, "grad_y", {s.count, s.directions * s.output});
  call.grad_h_n = input(grad_h_n, "grad_h_n", {s.directions, s.rows.batch, s.output});
  call.x = input<E>(x, "x", {s.count, s.input});
  call.h0 = input<E>(h0, "h0", {s.directions, s.rows.batch, s.output});
  call.y = input<E>(y, "y", {s.count, s.directions * s.output});
  if (sizes.saved_gates > 0) {
    call.gates = input<E>(gates, "gates", {s.directions, s.count, saved_columns(s)});
    if constexpr (std::is_same_v<E, float>) {
      if (s.normed) call.normed = norm_values(s, call.gates);
    }
  }
  call.grad_h0 = output(grad_h0, "grad_h0", {s.directions, s.rows.batch, s.output});
  if (sizes.has_c) {
    call.grad_c_n = input(grad_c_n, "grad_c_n", {s.directions, s.rows.batch, s.hidden});
    call.grad_cells = input(grad_cells, "grad_cells", {s.directions, s.count, s.hidden});
    call.c0 = input(c0, "c0", {s.directions, s.rows.batch, s.hidden});
    call.grad_c0 = output(grad_c0, "grad_c0", {s.directions, s.rows.batch, s.hidden});
  }
  if (sizes.has_c || (cells.dim() == 3 && cells.size(2) > 0)) {
    call.cells = input(cells, "cells", {s.directions, s.count, s.hidden});
  }
  if (grad_x.dim() == 2) call.grad_x = output<E>(grad_x, "grad_x", {s.count, s.input});
  read_grads(s, grad_weights, call.grads);
  noise.read(call);
  layer_backward(kernels_of<E>(), call, torch_threads());
}

void backward_op(int64_t cell, std::optional<Tensor> grad_y, std::optional<Tensor> grad_h_n,
                 std::optional<Tensor> grad_c_n, std::optional<Tensor> grad_cells, const Tensor& x,
                 std::vector<Tensor> weights, const Tensor& h0, std::optional<Tensor> c0,
                 std::optional<Tensor> batch_sizes, const Tensor& y, const Tensor& gates,
                 const Tensor& cells, Tensor grad_x, Tensor grad_h0, Tensor grad_c0,
                 std::vector<Tensor> grad_weights, std::optional<Tensor> h_factor,
                 std::optional<Tensor> kept_h, std::optional<Tensor> kept_c, double part_h,
                 double part_c, bool spares_h0) {
  const bool half = x.scalar_type() == ScalarType::BFloat16;
  (half ? backward_of<BFloat16>
        : backward_of<float>)(cell, grad_y, grad_h_n, grad_c_n, grad_cells, x, weights, h0, c0,
                              batch_sizes, y, gates, cells, grad_x, grad_h0, grad_c0, grad_weights,
                              {h_factor, kept_h, kept_c, part_h, part_c}, spares_h0);
}

// Inference on the CPU in one call, for what needs neither a choice nor an error message: every
// call that is not plain gets no outputs, and Python takes the general way (fused_rnn/direct.py).

std::vector<Tensor> infer_layers_op(int64_t cell, const Tensor& x, std::vector<Tensor> weights,
                                    std::optional<Tensor> h0, std::optional<Tensor> c0,
                                    int64_t layers, int64_t directions, bool time_first) {
  const std::vector<Array> arrays = arrays_of(weights);
  const StateArrays states(h0, c0);
  const Array input = strided_array_of(x);
  NewTensors outputs;
  infer_layers({{cell, input, arrays.data(), static_cast<int64_t>(arrays.size()), states.given(),
                 input.type, false},
                layers,
                directions,
                time_first},
               outputs.allocator());
  return outputs.take();
}

std::vector<Tensor> infer_cell_op(int64_t cell, const Tensor& x, std::vector<Tensor> weights,
                                  std::optional<Tensor> h0, std::optional<Tensor> c0,
                                  int64_t hidden_size) {
  const std::vector<Array> arrays = arrays_of(weights);
  const StateArrays states(h0, c0);
  const Array input = strided_array_of(x);
  NewTensors outputs;
  infer_cell({{cell, input, arrays.data(), static_cast<int64_t>(arrays.size()), states.given(),
               input.type, false},
              hidden_size},
             outputs.allocator());
  return outputs.take();
}

std::tuple<Tensor, Tensor, Tensor> layer_op(int64_t cell, const Tensor& x,
                                            std::vector<Tensor> weights, const Tensor& h0,
                                            std::optional<Tensor> c0) {
  const LayerShape s = layer_shape(cell, x, h0, c0);
  const int64_t c_width = c0 ? s.hidden : 0;
  Tensor y = empty({s.count, s.directions * s.output});
  Tensor h_n = empty({s.directions, s.rows.batch, s.output});
  Tensor c_n = empty({s.directions, s.rows.batch, c_width});
  const Tensor nothing = empty({s.directions, s.count, 0});
  forward_op(cell, x, std::move(weights), h0, c0, std::nullopt, y, h_n, c_n, nothing, nothing,
             std::nullopt, std::nullopt, std::nullopt, 0, 0);
  return {y, h_n, c_n};
}

}  // namespace
}  // namespace fused_rnn

// The shapes of all arguments are in kernels.h, ForwardCallOf and BackwardCallOf; `weights` is the
// flat list of weights.h. Outputs are written in place. Zero columns in `gates` or `cells` mean
// that they are not saved; a gradient that is not wanted comes as a tensor of another rank.
// Elements have the dtype of x, Float or BFloat16, all others are Float. `layer` is the forward
// operator of padded rows in Float with outputs of its own, for programs that run without the
// package. The operators of inference take x and states as torch.nn's modules do, in Float,
// BFloat16 or Half, and return y, h_n and c_n, those that the module has; or nothing, when the call
// is not for them.
STABLE_TORCH_LIBRARY(fused_rnn_cpu, m) {
  m.def(
      "layer_forward(int cell, Tensor x, Tensor[] weights, Tensor h0, Tensor? c0, "
      "Tensor? batch_sizes, Tensor(a!) y, Tensor(b!) h_n, Tensor(c!) c_n, Tensor(d!) gates, "
      "Tensor(e!) cells, Tensor? h_factor=None, Tensor? kept_h=None, Tensor? kept_c=None, "
      "float part_h=0, float part_c=0) -> ()");
  m.def(
      "layer_backward(int cell, Tensor? grad_y, Tensor? grad_h_n, Tensor? grad_c_n, "
      "Tensor? grad_cells, Tensor x, "
      "Tensor[] weights, Tensor h0, Tensor? c0, Tensor? batch_sizes, Tensor y, Tensor gates, "
      "Tensor cells, Tensor(a!) grad_x, Tensor(b!) grad_h0, Tensor(c!) grad_c0, "
      "Tensor(d!)[] grad_weights, Tensor? h_factor=None, Tensor? kept_h=None, Tensor? kept_c=None, "
      "float part_h=0, float part_c=0, bool spares_h0=False) -> ()");
  m.def(
      "layer(int cell, Tensor x, Tensor[] weights, Tensor h0, Tensor? c0) -> "
      "(Tensor y, Tensor h_n, Tensor c_n)");
  m.def(
      "infer_layers(int cell, Tensor x, Tensor[] weights, Tensor? h0, Tensor? c0, int layers, "
      "int directions, bool time_first) -> Tensor[]");
  m.def(
      "infer_cell(int cell, Tensor x, Tensor[] weights, Tensor? h0, Tensor? c0, int hidden_size) "
      "-> Tensor[]");
  m.def("capability() -> str");
  m.def("forget_capability() -> ()");
  m.def("bfloat16_capability() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fused_rnn_cpu, CPU, m) {
  m.impl("layer_forward", TORCH_BOX(&fused_rnn::forward_op));
  m.impl("layer", TORCH_BOX(&fused_rnn::layer_op));
  m.impl("layer_backward", TORCH_BOX(&fused_rnn::backward_op));
}

// For tensors of every kind, most of which the operators of inference then decline.
STABLE_TORCH_LIBRARY_IMPL(fused_rnn_cpu, CompositeExplicitAutograd, m) {
  m.impl("infer_layers", TORCH_BOX(&fused_rnn::infer_layers_op));
  m.impl("infer_cell", TORCH_BOX(&fused_rnn::infer_cell_op));
  m.impl("capability", TORCH_BOX(&fused_rnn::capability));
  m.impl("forget_capability", TORCH_BOX(&fused_rnn::forget_kernels));
  m.impl("bfloat16_capability", TORCH_BOX(&fused_rnn::bfloat16_capability));
}

// The CPU library's border: checks every argument, fills the plain structs, lends torch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../tensor_checks.h"
#include "border.h"
#include "features.h"
#include "layer.h"
#include "workspace.h"

namespace fused_rnn {
namespace {

using torch::headeronly::ScalarType;

// Where the chosen instruction set has none of its own for bfloat16, null.
const KernelsOf<BFloat16>* bfloat16_kernels() {
#if defined(FUSED_RNN_X86)
  if (&kernels() == &avx512_kernels && cpu_has_avx512bf16()) return &avx512bf16_kernels;
#endif
  return nullptr;
}

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

CellKind cell_kind(int64_t index) {
  STD_TORCH_CHECK(index >= 0 && index < 5, "cell: expected 0 to 4, got ", index);
  return static_cast<CellKind>(index);
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
                      batch_sizes->is_contiguous(),
                  "batch_sizes: expected a contiguous int64 CPU tensor [T], got shape ",
                  shape_text(batch_sizes->sizes()), " or another dtype or device");
  const int64_t timesteps = batch_sizes->size(0);
  const int64_t* at = batch_sizes->const_data_ptr<int64_t>();
  offsets.resize(static_cast<size_t>(timesteps));
  int64_t total = 0, limit = batch;
  for (int64_t t = 0; t < timesteps; t++) {
    STD_TORCH_CHECK(at[t] >= 0 && at[t] <= limit, "batch_sizes: expected 0 to ", limit,
                    " rows at step ", t, ", never more than the step before or the batch, got ",
                    at[t]);
    offsets[static_cast<size_t>(t)] = total;
    total += at[t];
    limit = at[t];
  }
  STD_TORCH_CHECK(total == count, "batch_sizes: expected a sum of ", count, " rows, got ", total);
  return {timesteps, batch, at, offsets.data()};
}

// The place of w_hr among the fields of Weights.
constexpr size_t kProjection = 4;

// Calls function(number in the list, direction, field of Weights, shape it must have) for a flat
// list of w_ih, w_hh[, b_ih, b_hh][, w_hr] per direction.
template <class F>
void for_each_weight(const LayerShape& s, size_t given, const char* name, const F& function) {
  const auto directions = static_cast<size_t>(s.directions);
  const size_t least = projected(s) ? 3 : 2;
  STD_TORCH_CHECK(given == least * directions || given == (least + 2) * directions, name,
                  ": expected ", least, " tensors, or ", least + 2, " with biases, for each of ",
                  s.directions, " directions, got ", given);
  const int64_t rows = cell_sizes(s.cell).gates * s.hidden;
  const size_t per_direction = given / directions;
  for (size_t i = 0; i < given; i++) {
    const size_t d = i / per_direction, which = i % per_direction;
    if (projected(s) && which == per_direction - 1) {
      function(i, d, kProjection, {s.output, s.hidden});
    } else if (which < 2) {
      function(i, d, which, {rows, which == 0 ? s.input : s.output});
    } else {
      function(i, d, which, {rows});
    }
  }
}

template <class E>
void set_weight(WeightsOf<E>& w, size_t which, const Tensor& tensor) {
  switch (which) {
    case 0:
      w.w_ih = static_cast<const E*>(tensor.const_data_ptr());
      break;
    case 1:
      w.w_hh = static_cast<const E*>(tensor.const_data_ptr());
      break;
    case 2:
      w.b_ih = tensor.const_data_ptr<float>();
      break;
    case 3:
      w.b_hh = tensor.const_data_ptr<float>();
      break;
    default:
      w.w_hr = static_cast<const E*>(tensor.const_data_ptr());
  }
}

template <class E>
void read_weights(const LayerShape& s, const std::vector<Tensor>& tensors,
                  WeightsOf<E> weights[2]) {
  for_each_weight(s, tensors.size(), "weights",
                  [&](size_t i, size_t d, size_t which, std::initializer_list<int64_t> shape) {
                    const ScalarType type = shape.size() == 1 ? ScalarType::Float : kScalarType<E>;
                    check(tensors[i], "weights", type, shape);
                    set_weight(weights[d], which, tensors[i]);
                  });
}

// Empty tensors stand for gradients that are not wanted.
void read_grads(const LayerShape& s, const std::vector<Tensor>& tensors, WeightGrads grads[2]) {
  for_each_weight(s, tensors.size(), "grad_weights",
                  [&](size_t i, size_t d, size_t which, std::initializer_list<int64_t> shape) {
                    WeightGrads& g = grads[d];
                    float** fields[] = {&g.w_ih, &g.w_hh, &g.b_ih, &g.b_hh, &g.w_hr};
                    const bool wanted = tensors[i].dim() == static_cast<int64_t>(shape.size());
                    *fields[which] = wanted ? output(tensors[i], "grad_weights", shape) : nullptr;
                  });
}

template <class E>
void forward_of(int64_t cell, const Tensor& x, const std::vector<Tensor>& weights, const Tensor& h0,
                const std::optional<Tensor>& c0, const std::optional<Tensor>& batch_sizes,
                const Tensor& y, const Tensor& h_n, const Tensor& c_n, const Tensor& gates,
                const Tensor& cells) {
  std::vector<int64_t> offsets;
  ForwardCallOf<E> call{};
  LayerShape& s = call.shape;
  s = layer_shape(cell, x, h0, c0);
  s.rows = row_layout(s, batch_sizes, offsets);
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
    call.gates = output<E>(gates, "gates", {s.directions, s.count, sizes.saved_gates * s.hidden});
    advise_huge_pages_if_fresh(call.gates, static_cast<size_t>(gates.numel()) * sizeof(E));
  }
  if (sizes.has_c && cells.dim() == 3 && cells.size(2) > 0) {
    call.cells = output(cells, "cells", {s.directions, s.count, s.hidden});
  }
  layer_forward(kernels_of<E>(), call, torch_threads());
}

void forward_op(int64_t cell, const Tensor& x, std::vector<Tensor> weights, const Tensor& h0,
                std::optional<Tensor> c0, std::optional<Tensor> batch_sizes, Tensor y, Tensor h_n,
                Tensor c_n, Tensor gates, Tensor cells) {
  const bool half = x.scalar_type() == ScalarType::BFloat16;
  (half ? forward_of<BFloat16> : forward_of<float>)(cell, x, weights, h0, c0, batch_sizes, y, h_n,
                                                    c_n, gates, cells);
}

template <class E>
void backward_of(int64_t cell, const std::optional<Tensor>& grad_y,
                 const std::optional<Tensor>& grad_h_n, const std::optional<Tensor>& grad_c_n,
                 const std::optional<Tensor>& grad_cells, const Tensor& x,
                 const std::vector<Tensor>& weights, const Tensor& h0,
                 const std::optional<Tensor>& c0, const std::optional<Tensor>& batch_sizes,
                 const Tensor& y, const Tensor& gates, const Tensor& cells, const Tensor& grad_x,
                 const Tensor& grad_h0, const Tensor& grad_c0,
                 const std::vector<Tensor>& grad_weights) {
  std::vector<int64_t> offsets;
  BackwardCallOf<E> call{};
  LayerShape& s = call.shape;
  s = layer_shape(cell, x, h0, c0);
  s.rows = row_layout(s, batch_sizes, offsets);
  const CellSizes sizes = cell_sizes(s.cell);
  read_weights(s, weights, call.weights);
  call.grad_y = input<E>(grad_y, "grad_y", {s.count, s.directions * s.output});
  call.grad_h_n = input(grad_h_n, "grad_h_n", {s.directions, s.rows.batch, s.output});
  call.x = input<E>(x, "x", {s.count, s.input});
  call.h0 = input<E>(h0, "h0", {s.directions, s.rows.batch, s.output});
  call.y = input<E>(y, "y", {s.count, s.directions * s.output});
  if (sizes.saved_gates > 0) {
    call.gates = input<E>(gates, "gates", {s.directions, s.count, sizes.saved_gates * s.hidden});
  }
  call.grad_h0 = output(grad_h0, "grad_h0", {s.directions, s.rows.batch, s.output});
  if (sizes.has_c) {
    call.grad_c_n = input(grad_c_n, "grad_c_n", {s.directions, s.rows.batch, s.hidden});
    call.grad_cells = input(grad_cells, "grad_cells", {s.directions, s.count, s.hidden});
    call.c0 = input(c0, "c0", {s.directions, s.rows.batch, s.hidden});
    call.cells = input(cells, "cells", {s.directions, s.count, s.hidden});
    call.grad_c0 = output(grad_c0, "grad_c0", {s.directions, s.rows.batch, s.hidden});
  }
  if (grad_x.dim() == 2) call.grad_x = output<E>(grad_x, "grad_x", {s.count, s.input});
  read_grads(s, grad_weights, call.grads);
  layer_backward(kernels_of<E>(), call, torch_threads());
}

void backward_op(int64_t cell, std::optional<Tensor> grad_y, std::optional<Tensor> grad_h_n,
                 std::optional<Tensor> grad_c_n, std::optional<Tensor> grad_cells, const Tensor& x,
                 std::vector<Tensor> weights, const Tensor& h0, std::optional<Tensor> c0,
                 std::optional<Tensor> batch_sizes, const Tensor& y, const Tensor& gates,
                 const Tensor& cells, Tensor grad_x, Tensor grad_h0, Tensor grad_c0,
                 std::vector<Tensor> grad_weights) {
  const bool half = x.scalar_type() == ScalarType::BFloat16;
  (half ? backward_of<BFloat16>
        : backward_of<float>)(cell, grad_y, grad_h_n, grad_c_n, grad_cells, x, weights, h0, c0,
                              batch_sizes, y, gates, cells, grad_x, grad_h0, grad_c0, grad_weights);
}

// Inference on the CPU in one call, for what needs neither a choice nor an error message: every
// call that is not plain gets no outputs, and Python takes the general way (fused_rnn/direct.py).

using Outputs = std::vector<Tensor>;

bool cpu_is_welcome() {
  const char* name = std::getenv("FUSED_RNN_BACKEND");
  return name == nullptr || *name == '\0' || std::strcmp(name, "auto") == 0 ||
         std::strcmp(name, "cpu") == 0;
}

// Of the first layer, padded, from arguments that other checks will confirm.
LayerShape stack_shape(int64_t cell, int64_t directions, int64_t timesteps, int64_t batch,
                       int64_t input, const std::vector<Tensor>& weights) {
  LayerShape s{};
  s.cell = cell_kind(cell);
  s.directions = directions;
  s.input = input;
  s.count = timesteps * batch;
  s.rows = {timesteps, batch, nullptr, nullptr};
  if (weights.size() >= 2 && weights[1].dim() == 2) {
    s.hidden = weights[1].size(0) / cell_sizes(s.cell).gates;
    s.output = weights[1].size(1);
  }
  return s;
}

// A call per layer with its shape and weights, or none where these do not fit.
std::vector<ForwardCallOf<float>> stack_calls(const LayerShape& first, int64_t layers,
                                              const std::vector<Tensor>& weights) {
  const bool is_projected = projected(first);
  if (first.count < 1 || first.input < 1 || first.output < 1 || first.output > first.hidden ||
      (is_projected && !cell_sizes(first.cell).has_c)) {
    return {};
  }
  const size_t parts = static_cast<size_t>(layers * first.directions), least = is_projected ? 3 : 2;
  if (weights.size() != least * parts && weights.size() != (least + 2) * parts) return {};
  const size_t per_layer = weights.size() / static_cast<size_t>(layers);
  std::vector<ForwardCallOf<float>> calls(static_cast<size_t>(layers));
  bool fit = true;
  for (size_t layer = 0; layer < calls.size(); layer++) {
    ForwardCallOf<float>& call = calls[layer];
    call.shape = first;
    if (layer > 0) call.shape.input = first.directions * first.output;
    const Tensor* tensors = &weights[layer * per_layer];
    for_each_weight(call.shape, per_layer, "weights",
                    [&](size_t i, size_t d, size_t which, Shape shape) {
                      fit = fit && is_plain(tensors[i], shape);
                      if (fit) set_weight(call.weights[d], which, tensors[i]);
                    });
  }
  if (!fit) calls.clear();
  return calls;
}

// h0, c0, h_n and c_n as in kernels.h, one layer after the other. Initial states that are null
// stand for zeros; y may be null.
void run_stack(std::vector<ForwardCallOf<float>>& calls, const float* x, const float* h0,
               const float* c0, float* y, float* h_n, float* c_n) {
  const LayerShape& first = calls[0].shape;
  const int64_t rows = first.directions * first.rows.batch;
  const int64_t h_size = rows * first.output, c_size = rows * first.hidden;  // of a layer
  Memory zeros;
  if (h0 == nullptr) {
    zeros = memory(c_size);
    std::fill_n(zeros.get(), c_size, 0.0f);
  }
  const KernelsOf<float>& isa = kernels();
  const Threads threads = torch_threads();
  Memory input;  // keeps a layer's output until the next has read it
  for (size_t i = 0; i < calls.size(); i++) {
    const auto layer = static_cast<int64_t>(i);
    ForwardCallOf<float>& call = calls[i];
    Memory output;
    call.x = i == 0 ? x : input.get();
    call.y = y;
    if (y == nullptr || i + 1 < calls.size()) {
      output = memory(first.count * first.directions * first.output);
      call.y = output.get();
    }
    call.h0 = h0 ? h0 + layer * h_size : zeros.get();
    call.h_n = h_n + layer * h_size;
    if (c_n) {
      call.c0 = c0 ? c0 + layer * c_size : zeros.get();
      call.c_n = c_n + layer * c_size;
    }
    layer_forward(isa, call, threads);
    input = std::move(output);
  }
}

// y, where y_shape is not empty, h_n and, where the cell has it, c_n; or nothing.
Outputs infer(const LayerShape& first, int64_t layers, const Tensor& x,
              const std::vector<Tensor>& weights, const std::optional<Tensor>& h0,
              const std::optional<Tensor>& c0, Shape y_shape, Shape h_shape, Shape c_shape) {
  const bool has_c = cell_sizes(first.cell).has_c;
  const bool states_fit = (!h0 || is_plain(*h0, h_shape)) && (!c0 || is_plain(*c0, c_shape)) &&
                          c0.has_value() == (has_c && h0.has_value());
  if (!states_fit) return {};
  std::vector<ForwardCallOf<float>> calls = stack_calls(first, layers, weights);
  if (calls.empty()) return {};
  Outputs outputs;
  outputs.reserve(3);
  float* data[3] = {};
  const Shape shapes[] = {y_shape, h_shape, has_c ? c_shape : Shape{}};
  for (size_t i = 0; i < 3; i++) {
    if (shapes[i].size() == 0) continue;
    outputs.push_back(empty(shapes[i]));
    data[i] = outputs.back().mutable_data_ptr<float>();
  }
  run_stack(calls, x.const_data_ptr<float>(), h0 ? h0->const_data_ptr<float>() : nullptr,
            c0 ? c0->const_data_ptr<float>() : nullptr, data[0], data[1], data[2]);
  return outputs;
}

Outputs infer_layers_op(int64_t cell, const Tensor& x, std::vector<Tensor> weights,
                        std::optional<Tensor> h0, std::optional<Tensor> c0, int64_t layers,
                        int64_t directions, bool time_first) {
  if (!cpu_is_welcome() || !is_plain(x) || x.dim() < 2 || x.dim() > 3) return {};
  if (layers < 1 || directions < 1 || directions > 2) return {};
  const bool batched = x.dim() == 3;
  const int64_t timesteps = x.size(batched && !time_first ? 1 : 0);
  const int64_t batch = batched ? x.size(time_first ? 1 : 0) : 1;
  // Rows must lie in the order of time.
  if (!time_first && timesteps > 1 && batch > 1) return {};
  const LayerShape s =
      stack_shape(cell, directions, timesteps, batch, x.size(x.dim() - 1), weights);
  const int64_t parts = layers * directions, width = directions * s.output;
  return batched ? infer(s, layers, x, weights, h0, c0, {x.size(0), x.size(1), width},
                         {parts, batch, s.output}, {parts, batch, s.hidden})
                 : infer(s, layers, x, weights, h0, c0, {timesteps, width}, {parts, s.output},
                         {parts, s.hidden});
}

Outputs infer_cell_op(int64_t cell, const Tensor& x, std::vector<Tensor> weights,
                      std::optional<Tensor> h0, std::optional<Tensor> c0, int64_t hidden_size) {
  if (!cpu_is_welcome() || !is_plain(x) || x.dim() < 1 || x.dim() > 2) return {};
  const bool batched = x.dim() == 2;
  const int64_t batch = batched ? x.size(0) : 1;
  const LayerShape s = stack_shape(cell, 1, 1, batch, x.size(x.dim() - 1), weights);
  if (s.output != hidden_size || projected(s)) return {};
  return batched ? infer(s, 1, x, weights, h0, c0, {}, {batch, s.output}, {batch, s.hidden})
                 : infer(s, 1, x, weights, h0, c0, {}, {s.output}, {s.hidden});
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
  forward_op(cell, x, std::move(weights), h0, c0, std::nullopt, y, h_n, c_n, nothing, nothing);
  return {y, h_n, c_n};
}

}  // namespace
}  // namespace fused_rnn

// The shapes of all arguments are in kernels.h, ForwardCallOf and BackwardCallOf; `weights` is the
// flat list w_ih, w_hh[, b_ih, b_hh][, w_hr] of each direction. Outputs are written in place. Zero
// columns in `gates` or `cells` mean that they are not saved; a gradient that is not wanted comes
// as an empty 0-d or 3-d tensor. Elements have the dtype of x, Float or BFloat16, all others are
// Float. `layer` is the forward operator of padded rows in Float with outputs of its own, for
// programs that run without the package. The operators of inference take x and states as
// torch.nn's modules do, in Float, and return y, h_n and c_n, those that the module has; or
// nothing, when the call is not for them.
STABLE_TORCH_LIBRARY(fused_rnn_cpu, m) {
  m.def(
      "layer_forward(int cell, Tensor x, Tensor[] weights, Tensor h0, Tensor? c0, "
      "Tensor? batch_sizes, Tensor(a!) y, Tensor(b!) h_n, Tensor(c!) c_n, Tensor(d!) gates, "
      "Tensor(e!) cells) -> ()");
  m.def(
      "layer_backward(int cell, Tensor? grad_y, Tensor? grad_h_n, Tensor? grad_c_n, "
      "Tensor? grad_cells, Tensor x, "
      "Tensor[] weights, Tensor h0, Tensor? c0, Tensor? batch_sizes, Tensor y, Tensor gates, "
      "Tensor cells, Tensor(a!) grad_x, Tensor(b!) grad_h0, Tensor(c!) grad_c0, "
      "Tensor(d!)[] grad_weights) -> ()");
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
  m.impl("bfloat16_capability", TORCH_BOX(&fused_rnn::bfloat16_capability));
}

// Whole calls of torch.nn's modules in inference: a stack of layers, or a cell.
#include <utility>
#include <vector>

#include "border.h"
#include "calls.h"
#include "dense.h"

namespace fused_rnn {

LayerShape stack_shape(const InferCall& call, int64_t directions, int64_t timesteps,
                       int64_t batch) {
  LayerShape s{};
  s.cell = cell_kind(call.cell);
  s.directions = directions;
  s.input = call.x.sizes[call.x.dimensions - 1];
  s.count = timesteps * batch;
  s.rows = {timesteps, batch, nullptr, nullptr};
  if (call.weight_count >= 2 && call.weights[1].is_dense() && call.weights[1].dimensions == 2) {
    s.hidden = call.weights[1].sizes[0] / cell_sizes(s.cell).gates;
    s.output = call.weights[1].sizes[1];
  }
  return s;
}

int64_t weights_per_layer(const LayerShape& first, int64_t layers, const InferCall& call) {
  const bool is_projected = projected(first);
  if (first.count < 1 || first.input < 1 || first.output < 1 || first.output > first.hidden ||
      (is_projected && !cell_sizes(first.cell).has_c)) {
    return 0;
  }
  const int64_t parts = layers * first.directions, least = is_projected ? 3 : 2;
  const bool fit = call.weight_count == least * parts || call.weight_count == (least + 2) * parts;
  return fit ? call.weight_count / layers : 0;
}

std::vector<ForwardCallOf<float>> stack_calls(const LayerShape& first, int64_t layers,
                                              const InferCall& call) {
  return read_stack<float>(first, layers, call, [](const Array& array) { return array.data; });
}

namespace {

struct Inputs {
  const float *x, *h0, *c0;  // states are null for zeros
};

struct Results {
  float *y, *h_n, *c_n;  // y may be null, and c_n is where there is no c
};

void run_stack(std::vector<ForwardCallOf<float>>& calls, const Inputs& given,
               const Results& results) {
  const LayerShape& first = calls[0].shape;
  const int64_t rows = first.directions * first.rows.batch;
  const int64_t h_size = rows * first.output, c_size = rows * first.hidden;  // of a layer
  Memory zeros;
  if (given.h0 == nullptr) {
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
    call.x = i == 0 ? given.x : input.get();
    call.y = results.y;
    if (results.y == nullptr || i + 1 < calls.size()) {
      output = memory(first.count * first.directions * first.output);
      call.y = output.get();
    }
    call.h0 = zeros ? zeros.get() : given.h0 + layer * h_size;
    call.h_n = results.h_n + layer * h_size;
    if (results.c_n) {
      call.c0 = zeros ? zeros.get() : given.c0 + layer * c_size;
      call.c_n = results.c_n + layer * c_size;
    }
    layer_forward(isa, call, threads);
    input = std::move(output);
  }
}

bool infer(const LayerShape& first, int64_t layers, const InferCall& call, bool swapped,
           const OutputShapes& shapes, const Allocator& allocate) {
  const bool has_c = cell_sizes(first.cell).has_c;
  const Array *h = call.states.h, *c = call.states.c;
  const bool states_fit = (!h || h->has_shape(shapes.h)) && (!c || c->has_shape(shapes.c)) &&
                          (c != nullptr) == (has_c && h != nullptr);
  if (!states_fit) return false;
  if (call.type != NumberType::float32) {
    return infer_half(first, layers, call, swapped, shapes, allocate);
  }
  if (!call.x.data || (h && !h->data) || (c && !c->data)) return false;
  std::vector<ForwardCallOf<float>> calls = stack_calls(first, layers, call);
  if (calls.empty()) return false;
  const Dense x(&call.x, swapped), h0(h), c0(c);
  float* y = shapes.y.size() > 0 ? allocate(shapes.y, swapped) : nullptr;
  float* h_n = allocate(shapes.h);
  float* c_n = has_c ? allocate(shapes.c) : nullptr;
  run_stack(calls, {x.data(), h0.data(), c0.data()}, {y, h_n, c_n});
  return true;
}

}  // namespace

bool infer_layers(const LayersCall& call, const Allocator& allocate) {
  const Array& x = call.x;
  if (!x.exists() || x.dimensions < 2 || x.dimensions > 3) return false;
  // No more layers than weights, so that no product of theirs overflows.
  if (call.layers < 1 || call.layers > call.weight_count) return false;
  if (call.directions < 1 || call.directions > 2) return false;
  const bool batched = x.dimensions == 3, time_first = call.time_first || !batched;
  const int64_t timesteps = x.sizes[time_first ? 0 : 1];
  const int64_t batch = batched ? x.sizes[time_first ? 1 : 0] : 1;
  const LayerShape s = stack_shape(call, call.directions, timesteps, batch);
  const int64_t parts = call.layers * call.directions, width = call.directions * s.output;
  return batched ? infer(s, call.layers, call, !time_first,
                         {{x.sizes[0], x.sizes[1], width},
                          {parts, batch, s.output},
                          {parts, batch, s.hidden}},
                         allocate)
                 : infer(s, call.layers, call, false,
                         {{timesteps, width}, {parts, s.output}, {parts, s.hidden}}, allocate);
}

bool infer_cell(const CellCall& call, const Allocator& allocate) {
  const Array& x = call.x;
  if (!x.exists() || x.dimensions < 1 || x.dimensions > 2) return false;
  const bool batched = x.dimensions == 2;
  const int64_t batch = batched ? x.sizes[0] : 1;
  const LayerShape s = stack_shape(call, 1, 1, batch);
  if (s.output != call.hidden_size || projected(s)) return false;
  return batched ? infer(s, 1, call, false, {{}, {batch, s.output}, {batch, s.hidden}}, allocate)
                 : infer(s, 1, call, false, {{}, {s.output}, {s.hidden}}, allocate);
}

}  // namespace fused_rnn

// One timestep of a stack of layers whose weights were packed in advance
// (fused_rnn/streaming.py). What it costs beyond the products is what the operator's call costs.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "border.h"
#include "layer_plan.h"

namespace fused_rnn {
namespace {

// Where the parts of a layer begin among its packed weights, in floats.
struct Offsets {
  int64_t w_hh, w_hr, bias, hidden_bias, end;

  Offsets(const StepCall& s, int64_t input) {
    const auto padded = [](int64_t units) { return ceil_div(units, kStepWidth) * kStepWidth; };
    const auto cell = static_cast<CellKind>(s.cell);
    const int64_t gates = cell_sizes(cell).gates;
    const auto words = [&s](int64_t depth) { return s.half ? ceil_div(depth, 2) : depth; };
    w_hh = gates * padded(s.hidden) * words(input);
    w_hr = w_hh + gates * padded(s.hidden) * words(s.output);
    bias = w_hr + (s.output == s.hidden ? 0 : padded(s.output) * words(s.hidden));
    hidden_bias = bias + (s.bias ? padded(gates * s.hidden) : 0);
    end = hidden_bias + (s.bias && cell == CellKind::gru ? padded(s.hidden) : 0);
  }
};

void check(const StepCall& s) {
  STD_TORCH_CHECK(s.cell >= 0 && s.cell < 4, "cell: expected 0 to 3, got ", s.cell);
  for (int64_t size : {s.layers, s.input, s.hidden, s.output}) {
    // So that no product of three of them overflows.
    STD_TORCH_CHECK(size > 0 && size < int64_t(1) << 19,
                    "layers, input, hidden, output: expected 1 to 2^19 - 1, got ", size);
  }
  const bool has_projection = cell_sizes(static_cast<CellKind>(s.cell)).has_c;
  STD_TORCH_CHECK(s.output == s.hidden || (has_projection && s.output < s.hidden),
                  "output: expected ", s.hidden, " as hidden", has_projection ? ", or less" : "",
                  ", got ", s.output);
}

// h [L, B, P] or c [L, B, H], or null where there is none.
const float* state(const Array* array, const char* name, int64_t layers, int64_t batch,
                   int64_t width) {
  if (array == nullptr) return nullptr;
  STD_TORCH_CHECK(array->is_plain({layers, batch, width}), name,
                  ": expected a contiguous float32 tensor on the CPU of shape [", layers, ", ",
                  batch, ", ", width, "]");
  return array->data;
}

}  // namespace

void step(const StepCall& s, const Allocator& allocate) {
  check(s);
  const auto cell_kind = static_cast<CellKind>(s.cell);
  const CellSizes cell = cell_sizes(cell_kind);
  const Offsets first(s, s.input), others(s, s.output);
  STD_TORCH_CHECK(s.packed.is_plain({first.end + (s.layers - 1) * others.end}), "packed: expected ",
                  first.end + (s.layers - 1) * others.end,
                  " contiguous float32 numbers on the CPU");
  STD_TORCH_CHECK(s.x.is_plain() && s.x.dimensions == 2 && s.x.sizes[1] == s.input,
                  "x: expected a contiguous float32 tensor on the CPU of shape [B, ", s.input,
                  "] with B of at least 1");
  const int64_t batch = s.x.sizes[0];
  const int64_t h_size = batch * s.output, c_size = batch * s.hidden;  // of a layer
  const float* h_prev = state(s.states.h, "h", s.layers, batch, s.output);
  const float* c_prev = state(s.states.c, "c", s.layers, batch, s.hidden);
  STD_TORCH_CHECK((c_prev != nullptr) == (cell.has_c && h_prev != nullptr), "c: expected ",
                  c_prev ? "None here" : "a tensor beside h for an LSTM");

  float* y = allocate({batch, s.output});
  float* h = allocate({s.layers, batch, s.output});
  float* c = cell.has_c ? allocate({s.layers, batch, s.hidden}) : nullptr;

  Memory zeros, unprojected;
  if (h_prev == nullptr) {
    zeros = memory(c_size);
    std::fill_n(zeros.get(), c_size, 0.0f);
  }
  const bool projected = s.output != s.hidden;
  if (projected) unprojected = memory(c_size);

  const KernelsOf<float>& isa = kernels();
  const float* data = s.packed.data;
  PackedStepParams p{};
  p.cell = cell_kind;
  p.half = s.half;
  p.batch = batch;
  p.hidden = s.hidden;
  p.output = s.output;
  p.unprojected = unprojected.get();
  for (int64_t layer = 0; layer < s.layers; layer++) {
    const Offsets& at = layer == 0 ? first : others;
    p.input = layer == 0 ? s.input : s.output;
    p.x = layer == 0 ? s.x.data : p.h;
    p.x_stride = p.input;
    p.h_prev = zeros ? zeros.get() : h_prev + layer * h_size;
    p.h = h + layer * h_size;
    if (cell.has_c) {
      p.c_prev = zeros ? zeros.get() : c_prev + layer * c_size;
      p.c = c + layer * c_size;
    }
    p.w_ih = data;
    p.w_hh = data + at.w_hh;
    p.w_hr = data + at.w_hr;
    p.bias = s.bias ? data + at.bias : nullptr;
    p.hidden_bias = s.bias && cell_kind == CellKind::gru ? data + at.hidden_bias : nullptr;
    data += at.end;

    const double flops = 2.0 * static_cast<double>(batch * cell.gates * s.hidden) *
                         static_cast<double>(p.input + s.output);
    const Threads threads = flops > kSerialFlops ? torch_threads() : Threads{1, nullptr};
    const auto over_panels = [&](auto kernel, int64_t units, int64_t gates) {
      const int64_t panels = ceil_div(units, kStepWidth * step_vectors(gates));
      if (threads.count > 1 && panels > 1) {
        threads.run(panels, 1, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
      } else {
        kernel(p, 0, panels);
      }
    };
    over_panels(isa.packed_step, s.hidden, cell.gates);
    if (projected) over_panels(isa.project_step, s.output, 1);
  }
  std::copy_n(p.h, h_size, y);
}

namespace {

std::vector<Tensor> step_tensors(StepCall call, const Tensor& packed, const Tensor& x,
                                 const std::optional<Tensor>& h, const std::optional<Tensor>& c) {
  const StateArrays states(h, c);
  NewTensors outputs;
  call.packed = array_of(packed);
  call.x = array_of(x);
  call.states = states.given();
  step(call, outputs.allocator());
  return outputs.take();
}

std::tuple<Tensor, Tensor> step_op(const Tensor& packed, int64_t cell, int64_t layers,
                                   int64_t input, int64_t hidden, int64_t output, bool bias,
                                   bool half, const Tensor& x, std::optional<Tensor> h) {
  const std::vector<Tensor> out = step_tensors(
      {{}, cell, layers, input, hidden, output, bias, half}, packed, x, h, std::nullopt);
  return {out.at(0), out.at(1)};
}

std::tuple<Tensor, Tensor, Tensor> step_lstm_op(const Tensor& packed, int64_t layers, int64_t input,
                                                int64_t hidden, int64_t output, bool bias,
                                                bool half, const Tensor& x, std::optional<Tensor> h,
                                                std::optional<Tensor> c) {
  constexpr auto kLstm = static_cast<int64_t>(CellKind::lstm);
  const std::vector<Tensor> out =
      step_tensors({{}, kLstm, layers, input, hidden, output, bias, half}, packed, x, h, c);
  return {out.at(0), out.at(1), out.at(2)};
}

}  // namespace
}  // namespace fused_rnn

// x [B, I]; h [L, B, P] and c [L, B, H], or none for zeros. The results are y [B, P], h and c.
STABLE_TORCH_LIBRARY_FRAGMENT(fused_rnn_cpu, m) {
  m.def(
      "step(Tensor packed, int cell, int layers, int input, int hidden, int output, bool bias, "
      "bool half, Tensor x, Tensor? h) -> (Tensor, Tensor)");
  m.def(
      "step_lstm(Tensor packed, int layers, int input, int hidden, int output, bool bias, "
      "bool half, Tensor x, Tensor? h, Tensor? c) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fused_rnn_cpu, CPU, m) {
  m.impl("step", TORCH_BOX(&fused_rnn::step_op));
  m.impl("step_lstm", TORCH_BOX(&fused_rnn::step_lstm_op));
}

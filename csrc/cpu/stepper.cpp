// One timestep of a stack of layers whose weights were packed in advance
// (fused_rnn/streaming.py). What it costs beyond the products is what the operator's call costs.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>

#include "border.h"

namespace fused_rnn {
namespace {

// Below this many floating-point operations one thread is faster than two, as in layer.cpp.
constexpr double kSerialFlops = 4e5;

struct Sizes {
  CellKind cell;
  int64_t layers, input, hidden, output;
  bool bias;
};

// Where the parts of a layer begin among its packed weights, in floats.
struct Offsets {
  int64_t w_hh, w_hr, bias, hidden_bias, end;

  Offsets(const Sizes& s, int64_t input) {
    const auto padded = [](int64_t units) { return ceil_div(units, kStepWidth) * kStepWidth; };
    const int64_t gates = cell_sizes(s.cell).gates;
    w_hh = gates * padded(s.hidden) * input;
    w_hr = w_hh + gates * padded(s.hidden) * s.output;
    bias = w_hr + (s.output == s.hidden ? 0 : padded(s.output) * s.hidden);
    hidden_bias = bias + (s.bias ? padded(gates * s.hidden) : 0);
    end = hidden_bias + (s.bias && s.cell == CellKind::gru ? padded(s.hidden) : 0);
  }
};

void check(const Sizes& s) {
  const auto cell = static_cast<int64_t>(s.cell);
  STD_TORCH_CHECK(cell >= 0 && cell < 4, "cell: expected 0 to 3, got ", cell);
  for (int64_t size : {s.layers, s.input, s.hidden, s.output}) {
    // So that no product of three of them overflows.
    STD_TORCH_CHECK(size > 0 && size < int64_t(1) << 19,
                    "layers, input, hidden, output: expected 1 to 2^19 - 1, got ", size);
  }
}

// h [L, B, P] or c [L, B, H], or null where there is none.
const float* state(const std::optional<Tensor>& tensor, const char* name, int64_t layers,
                   int64_t batch, int64_t width) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(is_plain(*tensor, {layers, batch, width}), name,
                  ": expected a contiguous float32 tensor on the CPU of shape ",
                  shape_text(Shape{layers, batch, width}));
  return tensor->const_data_ptr<float>();
}

struct Stepped {
  Tensor y, h;
  std::optional<Tensor> c;
};

Stepped run(const Tensor& packed, const Sizes& s, const Tensor& x, const std::optional<Tensor>& h0,
            const std::optional<Tensor>& c0) {
  check(s);
  const CellSizes cell = cell_sizes(s.cell);
  const Offsets first(s, s.input), others(s, s.output);
  STD_TORCH_CHECK(is_plain(packed, {first.end + (s.layers - 1) * others.end}), "packed: expected ",
                  first.end + (s.layers - 1) * others.end,
                  " contiguous float32 numbers on the CPU");
  STD_TORCH_CHECK(is_plain(x) && x.dim() == 2 && x.size(1) == s.input && x.size(0) > 0,
                  "x: expected a contiguous float32 tensor on the CPU of shape [B, ", s.input, "]");
  const int64_t batch = x.size(0);
  const int64_t h_size = batch * s.output, c_size = batch * s.hidden;  // of a layer
  const float* h_prev = state(h0, "h", s.layers, batch, s.output);
  const float* c_prev = state(c0, "c", s.layers, batch, s.hidden);
  STD_TORCH_CHECK(c0.has_value() == (cell.has_c && h0.has_value()), "c: expected ",
                  c0 ? "None here" : "a tensor beside h for an LSTM");

  Stepped out{empty({batch, s.output}), empty({s.layers, batch, s.output}), std::nullopt};
  if (cell.has_c) out.c = empty({s.layers, batch, s.hidden});
  float* h = out.h.mutable_data_ptr<float>();
  float* c = out.c ? out.c->mutable_data_ptr<float>() : nullptr;

  Memory zeros, unprojected;
  if (h_prev == nullptr) {
    zeros = memory(c_size);
    std::fill_n(zeros.get(), c_size, 0.0f);
  }
  const bool projected = s.output != s.hidden;
  if (projected) unprojected = memory(c_size);

  const KernelsOf<float>& isa = kernels();
  const Threads threads = torch_threads();
  const float* data = packed.const_data_ptr<float>();
  PackedStepParams p{};
  p.cell = s.cell;
  p.batch = batch;
  p.hidden = s.hidden;
  p.output = s.output;
  p.unprojected = unprojected.get();
  for (int64_t layer = 0; layer < s.layers; layer++) {
    const Offsets& at = layer == 0 ? first : others;
    p.input = layer == 0 ? s.input : s.output;
    p.x = layer == 0 ? x.const_data_ptr<float>() : p.h;
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
    p.hidden_bias = s.bias && s.cell == CellKind::gru ? data + at.hidden_bias : nullptr;
    data += at.end;

    const double flops = 2.0 * static_cast<double>(batch * cell.gates * s.hidden) *
                         static_cast<double>(p.input + s.output);
    const bool parallel = threads.count > 1 && flops > kSerialFlops;
    const auto over_panels = [&](auto kernel, int64_t units, int64_t gates) {
      const int64_t panels = ceil_div(units, kStepWidth * step_vectors(gates));
      if (parallel && panels > 1) {
        threads.run(panels, 1, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
      } else {
        kernel(p, 0, panels);
      }
    };
    over_panels(isa.packed_step, s.hidden, cell.gates);
    if (projected) over_panels(isa.project_step, s.output, 1);
  }
  std::copy_n(p.h, h_size, out.y.mutable_data_ptr<float>());
  return out;
}

std::tuple<Tensor, Tensor> step_op(const Tensor& packed, int64_t cell, int64_t layers,
                                   int64_t input, int64_t hidden, int64_t output, bool bias,
                                   const Tensor& x, std::optional<Tensor> h) {
  const Sizes sizes{static_cast<CellKind>(cell), layers, input, hidden, output, bias};
  Stepped out = run(packed, sizes, x, h, std::nullopt);
  return {std::move(out.y), std::move(out.h)};
}

std::tuple<Tensor, Tensor, Tensor> step_lstm_op(const Tensor& packed, int64_t layers, int64_t input,
                                                int64_t hidden, int64_t output, bool bias,
                                                const Tensor& x, std::optional<Tensor> h,
                                                std::optional<Tensor> c) {
  const Sizes sizes{CellKind::lstm, layers, input, hidden, output, bias};
  Stepped out = run(packed, sizes, x, h, c);
  return {std::move(out.y), std::move(out.h), std::move(*out.c)};
}

}  // namespace
}  // namespace fused_rnn

// x [B, I]; h [L, B, P] and c [L, B, H], or none for zeros. The results are y [B, P], h and c.
STABLE_TORCH_LIBRARY_FRAGMENT(fused_rnn_cpu, m) {
  m.def(
      "step(Tensor packed, int cell, int layers, int input, int hidden, int output, bool bias, "
      "Tensor x, Tensor? h) -> (Tensor, Tensor)");
  m.def(
      "step_lstm(Tensor packed, int layers, int input, int hidden, int output, bool bias, "
      "Tensor x, Tensor? h, Tensor? c) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fused_rnn_cpu, CPU, m) {
  m.impl("step", TORCH_BOX(&fused_rnn::step_op));
  m.impl("step_lstm", TORCH_BOX(&fused_rnn::step_lstm_op));
}

// One timestep of a stack of layers whose weights were packed in advance, or several
// (fused_rnn/streaming.py). What one costs beyond the products is what the operator's call costs.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "border.h"
#include "features.h"
#include "layer_plan.h"

namespace fused_rnn {
namespace {

// Above it a sum of products of bytes might not fit its 32 bits.
constexpr int64_t kMaxBytesDepth = int64_t(1) << 17;
// The input side is computed for so many rows at a time, if there are several timesteps: as many as
// read the weights from cache a few times over.
constexpr int64_t kInputRows = 96;

StepWord word_of(int64_t per_word) {
  STD_TORCH_CHECK(per_word == 1 || per_word == 2 || per_word == 4,
                  "per_word: expected 1, 2 or 4, got ", per_word);
  return per_word == 1   ? StepWord::one_float
         : per_word == 2 ? StepWord::two_halves
                         : StepWord::four_bytes;
}

// Where the parts of a layer begin among its packed weights, in floats; w_ih is at 0.
struct Offsets {
  int64_t w_hh, w_hr, scale_ih, scale_hh, scale_hr, bias, hidden_bias, end;

  Offsets(const StepCall& s, int64_t input) {
    const auto padded = [](int64_t units) { return ceil_div(units, kStepWidth) * kStepWidth; };
    const auto cell = static_cast<CellKind>(s.cell);
    const int64_t gates = cell_sizes(cell).gates;
    const auto words = [&s](int64_t depth) { return ceil_div(depth, s.per_word); };
    const bool projected = s.output != s.hidden, scaled = s.per_word == 4;
    const int64_t of_gates = padded(gates * s.hidden);
    w_hh = gates * padded(s.hidden) * words(input);
    w_hr = w_hh + gates * padded(s.hidden) * words(s.output);
    scale_ih = w_hr + (projected ? padded(s.output) * words(s.hidden) : 0);
    scale_hh = scale_ih + (scaled ? of_gates : 0);
    scale_hr = scale_hh + (scaled ? of_gates : 0);
    bias = scale_hr + (scaled && projected ? padded(s.output) : 0);
    hidden_bias = bias + (s.bias ? of_gates : 0);
    end = hidden_bias + (s.bias && cell == CellKind::gru ? padded(s.hidden) : 0);
  }
};

void check(const StepCall& s) {
  STD_TORCH_CHECK(s.cell >= 0 && s.cell < 4, "cell: expected 0 to 3, got ", s.cell);
  const bool of_bytes = word_of(s.per_word) == StepWord::four_bytes;
  for (int64_t size : {s.layers, s.input, s.hidden, s.output}) {
    // So that no product of three of them overflows.
    STD_TORCH_CHECK(size > 0 && size < int64_t(1) << 19,
                    "layers, input, hidden, output: expected 1 to 2^19 - 1, got ", size);
    STD_TORCH_CHECK(!of_bytes || size < kMaxBytesDepth,
                    "layers, input, hidden, output: expected less than 2^17 of bytes, got ", size);
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

const KernelsOf<float>& step_kernels(StepWord word) {
  const KernelsOf<float>& found = kernels();
#if defined(FUSED_RNN_X86)
  // AVX-512's multiply bytes by VNNI.
  const bool narrower = word == StepWord::four_bytes && found.width == 16 && !cpu_has_avx512vnni();
  if (narrower) return avx2_kernels;
#else
  (void)word;
#endif
  return found;
}

// Of a thread's steps. Every other one takes the panels backwards, whose last ones the one before
// has left in the cache.
thread_local unsigned turn = 0;

// Runs the layers of one call.
class Steps {
 public:
  Steps(const StepCall& call, int64_t timesteps, int64_t batch)
      : call_(call),
        timesteps_(timesteps),
        batch_(batch),
        word_(word_of(call.per_word)),
        isa_(step_kernels(word_)),
        cell_(cell_sizes(static_cast<CellKind>(call.cell))),
        projected_(call.output != call.hidden),
        // A single step's is computed with its hidden side.
        chunk_(timesteps == 1 ? 1 : std::clamp(kInputRows / batch, int64_t(1), timesteps)) {
    const int64_t deepest = std::max({call.input, call.output, call.hidden});
    p_.cell = static_cast<CellKind>(call.cell);
    p_.word = word_;
    p_.hidden = call.hidden;
    p_.output = call.output;
    kept_.reserve(8);
    if (projected_) p_.unprojected = take(batch * call.hidden);
    if (timesteps > 1) p_.input_side = take(chunk_ * batch * cell_.gates * call.hidden);
    if (word_ == StepWord::four_bytes) {
      const int64_t rows = chunk_ * batch, words = isa_.quantised_words(deepest);
      for (StepRows* each : {&p_.x, &p_.h_prev, &p_.cells}) {
        const int64_t own = each == &p_.x ? rows : batch;
        each->numbers = take(own * (words + 2));
        each->scales = each->numbers + own * words;
        each->sums = reinterpret_cast<int32_t*>(each->scales + own);
      }
    }
  }

  // x [T, B, input] -> y [T, B, P]; h_prev and c_prev are before the first step, c after the last.
  void run_layer(const float* weights, const float* x, int64_t input, const float* h_prev,
                 const float* c_prev, float* y, float* c) {
    const Offsets at(call_, input);
    const bool scaled = word_ == StepWord::four_bytes;
    p_.input = input;
    p_.w_ih = weights;
    p_.w_hh = weights + at.w_hh;
    p_.w_hr = weights + at.w_hr;
    p_.scale_ih = scaled ? weights + at.scale_ih : nullptr;
    p_.scale_hh = scaled ? weights + at.scale_hh : nullptr;
    p_.scale_hr = scaled ? weights + at.scale_hr : nullptr;
    p_.bias = call_.bias ? weights + at.bias : nullptr;
    p_.hidden_bias = call_.bias && p_.cell == CellKind::gru ? weights + at.hidden_bias : nullptr;
    p_.c = c;
    float* const input_side = p_.input_side;
    for (int64_t begin = 0; begin < timesteps_; begin += chunk_) {
      const int64_t steps = std::min(chunk_, timesteps_ - begin), rows = steps * batch_;
      p_.x.first = x + begin * batch_ * input;
      p_.x.stride = input;
      quantise(p_.x, input, rows);
      if (input_side) {
        p_.batch = rows;
        over_panels(isa_.packed_input, call_.hidden, cell_.gates, rows * input);
      }
      p_.batch = batch_;
      for (int64_t t = begin; t < begin + steps; t++) {
        p_.h = y + t * batch_ * call_.output;
        p_.h_prev.first = t ? p_.h - batch_ * call_.output : h_prev;
        p_.h_prev.stride = call_.output;
        p_.c_prev = t ? c : c_prev;
        p_.backwards = turn++ % 2;
        quantise(p_.h_prev, call_.output, batch_);
        const int64_t depth = call_.output + (input_side ? 0 : input);
        over_panels(isa_.packed_step, call_.hidden, cell_.gates, batch_ * depth);
        if (input_side) p_.input_side += batch_ * cell_.gates * call_.hidden;
        if (!projected_) continue;
        p_.cells.first = p_.unprojected;
        p_.cells.stride = call_.hidden;
        quantise(p_.cells, call_.hidden, batch_);
        over_panels(isa_.project_step, call_.output, 1, batch_ * call_.hidden);
      }
      p_.input_side = input_side;
    }
  }

  float* take(int64_t floats) {
    kept_.push_back(memory(floats));
    return kept_.back().get();
  }

 private:
  void quantise(const StepRows& rows, int64_t depth, int64_t count) {
    if (word_ == StepWord::four_bytes) isa_.quantise_rows(rows, depth, 0, count);
  }

  // `products` of a unit and gate.
  void over_panels(void (*kernel)(const PackedStepParams&, int64_t, int64_t), int64_t units,
                   int64_t gates, int64_t products) {
    const double flops = 2.0 * static_cast<double>(units * gates) * static_cast<double>(products);
    const int64_t panels = ceil_div(units, kStepWidth * step_vectors(gates));
    if (flops > kSerialFlops && panels > 1) {
      const Threads threads = torch_threads();
      if (threads.count > 1) {
        return threads.run(panels, 1, [&](int64_t begin, int64_t end) { kernel(p_, begin, end); });
      }
    }
    kernel(p_, 0, panels);
  }

  const StepCall& call_;
  const int64_t timesteps_, batch_;
  const StepWord word_;
  const KernelsOf<float>& isa_;
  const CellSizes cell_;
  const bool projected_;
  const int64_t chunk_;  // timesteps whose input side is computed at a time
  PackedStepParams p_{};
  std::vector<Memory> kept_;
};

}  // namespace

void step(const StepCall& s, const Allocator& allocate) {
  check(s);
  const CellSizes cell = cell_sizes(static_cast<CellKind>(s.cell));
  const Offsets first(s, s.input), others(s, s.output);
  STD_TORCH_CHECK(s.packed.is_plain({first.end + (s.layers - 1) * others.end}), "packed: expected ",
                  first.end + (s.layers - 1) * others.end,
                  " contiguous float32 numbers on the CPU");
  const int64_t dimensions = s.x.dimensions;
  STD_TORCH_CHECK(s.x.is_plain() && (dimensions == 2 || dimensions == 3) && s.x.count() > 0 &&
                      s.x.sizes[dimensions - 1] == s.input,
                  "x: expected a contiguous float32 tensor on the CPU of shape [B, ", s.input,
                  "] or [T, B, ", s.input, "], of at least one row");
  const int64_t batch = s.x.sizes[dimensions - 2];
  const int64_t timesteps = dimensions == 3 ? s.x.sizes[0] : 1;
  const int64_t h_size = batch * s.output, c_size = batch * s.hidden;  // of a layer
  const float* h_prev = state(s.states.h, "h", s.layers, batch, s.output);
  const float* c_prev = state(s.states.c, "c", s.layers, batch, s.hidden);
  STD_TORCH_CHECK((c_prev != nullptr) == (cell.has_c && h_prev != nullptr), "c: expected ",
                  c_prev ? "None here" : "a tensor beside h for an LSTM");

  float* y = dimensions == 3 ? allocate({timesteps, batch, s.output}) : allocate({batch, s.output});
  float* h = allocate({s.layers, batch, s.output});
  float* c = cell.has_c ? allocate({s.layers, batch, s.hidden}) : nullptr;

  Steps steps(s, timesteps, batch);
  const float* zeros = nullptr;
  if (h_prev == nullptr) {
    float* fresh = steps.take(c_size);
    std::fill_n(fresh, c_size, 0.0f);
    zeros = fresh;
  }
  // What lies between the layers, one reading what the other wrote.
  float* between[2] = {};
  const float *weights = s.packed.data, *x = s.x.data;
  for (int64_t layer = 0; layer < s.layers; layer++) {
    const bool is_last = layer == s.layers - 1;
    float*& scratch = between[layer % 2];
    if (!is_last && scratch == nullptr) scratch = steps.take(timesteps * h_size);
    float* out = is_last ? y : scratch;
    steps.run_layer(weights, x, layer ? s.output : s.input, zeros ? zeros : h_prev + layer * h_size,
                    zeros ? zeros : c_prev + layer * c_size, out,
                    cell.has_c ? c + layer * c_size : nullptr);
    std::copy_n(out + (timesteps - 1) * h_size, h_size, h + layer * h_size);
    weights += (layer ? others : first).end;
    x = out;
  }
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
                                   int64_t per_word, const Tensor& x, std::optional<Tensor> h) {
  const std::vector<Tensor> out = step_tensors(
      {{}, cell, layers, input, hidden, output, bias, per_word}, packed, x, h, std::nullopt);
  return {out.at(0), out.at(1)};
}

std::tuple<Tensor, Tensor, Tensor> step_lstm_op(const Tensor& packed, int64_t layers, int64_t input,
                                                int64_t hidden, int64_t output, bool bias,
                                                int64_t per_word, const Tensor& x,
                                                std::optional<Tensor> h, std::optional<Tensor> c) {
  constexpr auto kLstm = static_cast<int64_t>(CellKind::lstm);
  const std::vector<Tensor> out =
      step_tensors({{}, kLstm, layers, input, hidden, output, bias, per_word}, packed, x, h, c);
  return {out.at(0), out.at(1), out.at(2)};
}

}  // namespace
}  // namespace fused_rnn

// x [B, I] or [T, B, I]; h [L, B, P] and c [L, B, H], or none for zeros. The results are y [B, P]
// or [T, B, P], h and c.
STABLE_TORCH_LIBRARY_FRAGMENT(fused_rnn_cpu, m) {
  m.def(
      "step(Tensor packed, int cell, int layers, int input, int hidden, int output, bool bias, "
      "int per_word, Tensor x, Tensor? h) -> (Tensor, Tensor)");
  m.def(
      "step_lstm(Tensor packed, int layers, int input, int hidden, int output, bool bias, "
      "int per_word, Tensor x, Tensor? h, Tensor? c) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fused_rnn_cpu, CPU, m) {
  m.impl("step", TORCH_BOX(&fused_rnn::step_op));
  m.impl("step_lstm", TORCH_BOX(&fused_rnn::step_lstm_op));
}

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
thread_local unsigned next_turn = 0;

// x [T, B, input] -> y [T, B, P]; h_prev and c_prev are before the first step, c after the last.
struct LayerArrays {
  const float* x;
  int64_t input;
  const float *h_prev, *c_prev;
  float *y, *c;
};

// A thread's part of everything, in [0, members).
struct Part {
  int64_t begin, end, members;
  Meeting* meeting;  // null where there is one thread

  void wait() const {
    if (meeting) meeting->wait();
  }
};

// Runs the layers of one call.
class Steps {
 public:
  Steps(const StepCall& call, int64_t timesteps, int64_t batch)
      : call_(call),
        timesteps_(timesteps),
        batch_(batch),
        word_(word_of(call.per_word)),
        of_bytes_(word_ == StepWord::four_bytes),
        isa_(step_kernels(word_)),
        gates_(cell_sizes(static_cast<CellKind>(call.cell)).gates),
        projected_(call.output != call.hidden),
        // A single step's is computed with its hidden side.
        chunk_(timesteps == 1 ? 1 : std::clamp(kInputRows / batch, int64_t(1), timesteps)) {
    kept_.reserve(8);
    p_.cell = static_cast<CellKind>(call.cell);
    p_.word = word_;
    p_.batch = batch;
    p_.hidden = call.hidden;
    p_.output = call.output;
    if (projected_) p_.unprojected = take(batch * call.hidden);
    if (timesteps > 1) p_.input_side = take(chunk_ * batch * gates_ * call.hidden);
    if (of_bytes_) {
      make_room(p_.x, std::max(call.input, call.output), chunk_ * batch);
      make_room(p_.h_prev, call.output, batch);
      if (projected_) make_room(p_.cells, call.hidden, batch);
    }
    p_.h_prev.stride = call.output;
    p_.cells.first = p_.unprojected;
    p_.cells.stride = call.hidden;
  }

  void run_layer(const float* weights, const LayerArrays& layer) {
    const Offsets at(call_, layer.input);
    p_.input = p_.x.stride = layer.input;
    p_.w_ih = weights;
    p_.w_hh = weights + at.w_hh;
    p_.w_hr = weights + at.w_hr;
    p_.scale_ih = of_bytes_ ? weights + at.scale_ih : nullptr;
    p_.scale_hh = of_bytes_ ? weights + at.scale_hh : nullptr;
    p_.scale_hr = of_bytes_ ? weights + at.scale_hr : nullptr;
    p_.bias = call_.bias ? weights + at.bias : nullptr;
    p_.hidden_bias = call_.bias && p_.cell == CellKind::gru ? weights + at.hidden_bias : nullptr;
    p_.c = layer.c;
    const int64_t members = members_of(layer.input);
    if (timesteps_ == 1) {
      run_step(layer, members);
    } else if (members == 1 || !run_together(layer, members)) {
      run_part(layer, {0, 1, 1, nullptr});
    }
    next_turn = turn_ += static_cast<unsigned>(timesteps_);
  }

  float* take(int64_t floats) {
    kept_.push_back(memory(floats));
    return kept_.back().get();
  }

 private:
  void make_room(StepRows& rows, int64_t depth, int64_t count) {
    const int64_t words = isa_.quantised_words(depth);
    rows.numbers = take(count * (words + 2));
    rows.scales = rows.numbers + count * words;
    rows.sums = reinterpret_cast<int32_t*>(rows.scales + count);
  }

  // How many threads are worth their meetings, or for one step the region.
  int64_t members_of(int64_t input) const {
    const double at_once = of_bytes_ ? 4 : 1;  // multiply-adds, of float32's
    const auto flops = [&](int64_t depth) {
      const int64_t products =
          gates_ * call_.hidden * depth + (projected_ ? call_.output * call_.hidden : 0);
      return 2.0 * static_cast<double>(batch_ * products) / at_once;
    };
    const double all = flops(input + call_.output) * static_cast<double>(timesteps_);
    if (all <= kSerialFlops || panels(call_.hidden, gates_) == 1) return 1;
    const int64_t threads = torch_threads().count;
    if (timesteps_ == 1) return threads;
    const double meetings = (of_bytes_ ? 2 : 1) * (projected_ ? 2 : 1);
    const auto worth = static_cast<int64_t>(flops(call_.output) / (meetings * kFlopsPerMeeting));
    return std::clamp(worth, int64_t(1), threads);
  }

  static int64_t panels(int64_t units, int64_t gates) {
    return ceil_div(units, kStepWidth * step_vectors(gates));
  }

  void quantise(const StepRows& rows, int64_t depth, int64_t count, const Part& part) const {
    if (!of_bytes_) return;
    isa_.quantise_rows(rows, depth, count * part.begin / part.members,
                       count * part.end / part.members);
  }

  // What follows the input side in step t, or computes it too; over_panels(kernel, units, gates)
  // does the part's panels.
  template <class OverPanels>
  void take_step(PackedStepParams& p, const LayerArrays& layer, int64_t t, const Part& part,
                 const OverPanels& over_panels) const {
    p.h = layer.y + t * batch_ * call_.output;
    p.h_prev.first = t ? p.h - batch_ * call_.output : layer.h_prev;
    p.c_prev = t ? layer.c : layer.c_prev;
    p.backwards = (turn_ + static_cast<unsigned>(t)) % 2;
    quantise(p.h_prev, call_.output, batch_, part);
    if (of_bytes_) part.wait();
    over_panels(isa_.packed_step, call_.hidden, gates_);
    part.wait();
    if (!projected_) return;
    quantise(p.cells, call_.hidden, batch_, part);
    if (of_bytes_) part.wait();
    over_panels(isa_.project_step, call_.output, 1);
    part.wait();
  }

  // A single step, with a region for each product.
  void run_step(const LayerArrays& layer, int64_t threads) const {
    const Part all{0, 1, 1, nullptr};
    PackedStepParams p = p_;
    const auto over_panels = [&](auto kernel, int64_t units, int64_t gates) {
      const int64_t count = panels(units, gates);
      if (threads == 1 || count == 1) return kernel(p, 0, count);
      torch_threads().run(count, 1, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
    };
    p.x.first = layer.x;
    quantise(p.x, layer.input, batch_, all);
    take_step(p, layer, 0, all, over_panels);
  }

  // False where the threads do not run at once: then nothing was done.
  bool run_together(const LayerArrays& layer, int64_t members) const {
    Team team(members);
    Barrier barrier(members);
    torch_threads().run(members, 1, [&](int64_t begin, int64_t end) {
      if (!team.assemble(end - begin)) return;
      Meeting meeting(&barrier, end - begin);
      run_part(layer, {begin, end, members, &meeting});
    });
    return team.went_ahead();
  }

  // All timesteps of the part's panels. Numbers that all threads need are made by one or the other.
  void run_part(const LayerArrays& layer, const Part& part) const {
    PackedStepParams p = p_;
    const auto over_panels = [&](auto kernel, int64_t units, int64_t gates) {
      const int64_t count = panels(units, gates);
      kernel(p, count * part.begin / part.members, count * part.end / part.members);
    };
    for (int64_t begin = 0; begin < timesteps_; begin += chunk_) {
      const int64_t steps = std::min(chunk_, timesteps_ - begin);
      p.batch = steps * batch_;
      p.x.first = layer.x + begin * batch_ * layer.input;
      p.input_side = p_.input_side;
      quantise(p.x, layer.input, p.batch, part);
      if (of_bytes_) part.wait();
      over_panels(isa_.packed_input, call_.hidden, gates_);
      p.batch = batch_;
      for (int64_t t = begin; t < begin + steps; t++) {
        take_step(p, layer, t, part, over_panels);
        p.input_side += batch_ * gates_ * call_.hidden;
      }
    }
  }

  const StepCall& call_;
  const int64_t timesteps_, batch_;
  const StepWord word_;
  const bool of_bytes_;
  const KernelsOf<float>& isa_;
  const int64_t gates_;
  const bool projected_;
  const int64_t chunk_;  // timesteps whose input side is computed at a time
  unsigned turn_ = next_turn;
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
    steps.run_layer(weights, {.x = x,
                              .input = layer ? s.output : s.input,
                              .h_prev = zeros ? zeros : h_prev + layer * h_size,
                              .c_prev = zeros ? zeros : c_prev + layer * c_size,
                              .y = out,
                              .c = cell.has_c ? c + layer * c_size : nullptr});
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

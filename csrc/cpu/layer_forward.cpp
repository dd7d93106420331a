#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "layer.h"
#include "layer_call.h"

namespace fused_rnn {
namespace {

// So many rows, of a few timesteps of up to kFewRows each, are computed from unpacked weights:
// packing would take longer. Time with packed weights over that, GRU and LSTM, two threads: T=1,
// B = 8 and 16 H=128 1.2 to 1.4 and 2.0 to 2.4, B = 8 and 32 H=512 2.4 and 1.4, H=1024 2.1 to 2.8
// and 1.4 to 1.6; B=4, T = 2 and 8 H=128 1.3 and 1.0, H=512 2.2 and 1.4; B=1, T = 4 and 16 H=128
// 1.4 and 1.1, H=512 2.6 and 1.4. At these limits it is 1.0 to 1.2, of one thread and with AVX2 as
// well; of one timestep of 24 and 32 rows at H=128 0.85 to 1.0 and, of two threads, 1.4 to 1.6. In
// bfloat16, which AMX multiplies faster, 1.1 to 1.2 at 8 rows and 0.8 to 1.1 at 16.
template <class E>
int64_t few_rows(const LayerShape& s) {
  const int64_t weights = recurrent_weights(s);
  if (weights < 1 << 12) return 4;
  if (weights < 1 << 14 || !std::is_same_v<E, float>) return 8;
  if (weights < 1 << 17) return s.rows.timesteps == 1 && weights >= 1 << 15 ? 32 : 16;
  return 48;
}

// Of those, so many of one timestep take both products at once, row after row: faster where weights
// are read again from L1 and L2. Where a GRU resets before the product there is no other way.
int64_t step_rows(const LayerShape& s) {
  const int64_t weights = recurrent_weights(s);
  return reset_before(s) || weights < 1 << 16 ? 4 : weights < 1 << 18 ? 2 : 1;
}

// [G*H] the biases that add directly to the input side: all but GRU's b_hn, which r multiplies.
template <class E>
const float* input_bias(const LayerShape& s, const WeightsOf<E>& w, LayerCall<E>& work) {
  if (w.b_ih == nullptr || s.normed) return nullptr;
  const int64_t all = cell_sizes(s.cell).gates * s.hidden;
  const int64_t both = s.cell == CellKind::gru ? 2 * s.hidden : all;
  float* sum = work.take(all);
  for (int64_t i = 0; i < all; i++) sum[i] = i < both ? w.b_ih[i] + w.b_hh[i] : w.b_ih[i];
  return sum;
}

// One timestep, both products at once. A GRU that resets before its second product takes two turns.
template <class E>
void run_step(LayerCall<E>& work, const KernelsOf<E>& isa, const ForwardCallOf<E>& call) {
  const LayerShape& s = call.shape;
  StepParamsOf<E> p{call};
  const auto step = [&] {
    work.run(s.directions * ceil_div(s.hidden, isa.width),
             [&](int64_t begin, int64_t end) { isa.step(p, begin, end); });
  };
  if (reset_before(s)) {
    const int64_t units = s.directions * s.rows.batch * s.hidden;
    p.between = work.take_elements(units);
    p.update = work.take(units);
    step();
    p.candidate = true;
  }
  step();
}

template <class E>
void run_few_steps(LayerCall<E>& work, const KernelsOf<E>& isa, const ForwardCallOf<E>& call) {
  const LayerShape& s = call.shape;
  float* input_side = work.take(s.directions * s.count * cell_sizes(s.cell).gates * s.hidden);
  const StepParamsOf<E> p{call, nullptr, nullptr, false, input_side};
  const PackedMatrix vectors{nullptr, s.output, s.hidden, 1, 1, nullptr};
  work.for_each_share(vectors, 0, [&](const Share& share, Meeting* meeting, float*) {
    isa.few_steps(p, share, meeting);
  });
}

template <class E>
void run_packed(LayerCall<E>& work, const KernelsOf<E>& isa, const ForwardCallOf<E>& call) {
  const LayerShape& s = call.shape;
  const CellSizes sizes = cell_sizes(s.cell);
  const int gates = static_cast<int>(sizes.gates);
  const int64_t batch = s.rows.batch;
  int64_t words = 0;  // of a share's own memory
  ForwardParamsOf<E> p{call};
  p.chunk_rows = std::min(s.count, rows_for(isa.input_side_bytes * (work.plan().parallel ? 2 : 1),
                                            sizes.gates * s.hidden, isa.input_side_rows));
  p.scratch_rows = std::max(p.chunk_rows, batch);
  const bool in_place = std::is_same_v<E, float> && (sizes.saved_gates == 0 || call.gates);
  for (int64_t d = 0; d < s.directions; d++) {
    const WeightsOf<E>& w = call.weights[d];
    p.w_ih[d] = work.pack_gates(w.w_ih, s.input, s.hidden, gates, s.count);
    const int first_gates = reset_before(s) ? 2 : gates;
    p.w_hh[d] = work.pack_gates(w.w_hh, s.output, s.hidden, first_gates, rows_of_step(s));
    if (has_second_product(s)) {
      const E* second = projected(s) ? w.w_hr : w.w_hh + first_gates * s.hidden * s.output;
      p.w_second[d] = work.pack_gates(second, s.hidden, s.output, 1, rows_of_step(s));
      p.between[d] = work.take_elements(batch * s.hidden);
    }
    words =
        std::max({work.operand_words(p.w_ih[d], p.scratch_rows, sizeof(float*) / sizeof(int32_t)),
                  work.operand_words(p.w_hh[d], batch), work.operand_words(p.w_second[d], batch)});
    p.bias[d] = input_bias(s, w, work);
    if (s.cell == CellKind::gru && w.b_hh && !s.normed) p.hidden_bias[d] = w.b_hh + 2 * s.hidden;
    if (s.normed) p.hidden_side[d] = work.take(batch * sizes.gates * s.hidden);
    if (call.h_factor) p.operands[d] = work.take_elements(3 * batch * s.output);
    if (!in_place) {
      p.scratch[d] = work.take(work.interleaved_shares() * p.scratch_rows * sizes.gates * s.hidden);
    }
  }
  work.pack();
  // Of this GRU's panels, those of the second product have the most units.
  work.for_each_share(reset_before(s) ? p.w_second[0] : p.w_hh[0], words,
                      [&](const Share& share, Meeting* meeting, float* memory) {
                        isa.forward(p, share, meeting, memory);
                      });
}

}  // namespace

template <class E>
void layer_forward(const KernelsOf<E>& isa, const ForwardCallOf<E>& call, const Threads& threads) {
  const LayerShape& s = call.shape;
  const bool plain = !s.normed && !projected(s) && !call.h_factor && !call.zoneout_h.any() &&
                     !call.zoneout_c.any() && !call.weights[0].peephole;
  const bool is_step =
      plain && s.rows.timesteps == 1 && s.count == s.rows.batch && s.count <= step_rows(s);
  const bool are_few = plain && s.rows.timesteps > 0 && !s.rows.batch_sizes &&
                       s.rows.batch <= kFewRows && s.count <= few_rows<E>(s) && !reset_before(s);
  const double serial_flops = is_step || are_few ? kSerialFlops : kForwardSerialFlops;
  LayerCall<E> work(isa, s, kForwardRowsOfL3<E>, serial_flops, threads);
  prepare_result(call.y, s.count * s.directions * s.output);
  if (is_step) {
    run_step(work, isa, call);
  } else if (are_few) {
    run_few_steps(work, isa, call);
  } else {
    run_packed(work, isa, call);
  }
}

template void layer_forward(const KernelsOf<float>&, const ForwardCallOf<float>&, const Threads&);
template void layer_forward(const KernelsOf<BFloat16>&, const ForwardCallOf<BFloat16>&,
                            const Threads&);

}  // namespace fused_rnn

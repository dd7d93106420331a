#include "layer.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "workspace.h"

namespace fused_rnn {
namespace {

using Body = std::function<void(int64_t, int64_t)>;

// Below this many floating-point operations there is no parallel region: a few microseconds of
// one thread, what waking another costs.
constexpr double kSerialFlops = 4e5;
// Units are split over threads that meet after every step only where a step gives each of them so
// many floating-point operations: the meeting costs about a tenth of a microsecond.
constexpr double kFlopsPerMeeting = 2e4;
// Threads share out batch rows where each gets so many, else hidden units. Fewer rows do not fill
// the register tile, and every thread would stream all weights for them.
constexpr int64_t kRowsPerThread = 8;
// Or up to so many, where W_hh is of so many bytes that it comes from L3 in every step: split, each
// thread reads a part of it. Two threads, time of rows over that of units: with AMX at B = 20 to 48
// and H = 400 to 1150 LSTM 1.1 to 1.4 in inference and 1.0 to 1.15 in training, GRU 1.1 to 1.25 and
// 1.0 to 1.1; at B = 64 and 96, H = 512 to 1024 1.05 to 1.2 in inference, 0.95 to 1.0 in backward
// passes, and with AVX-512 and AVX2 1.02 to 1.08 and about 1; with AMX at B = 128 and 256 0.9
// to 1.0, and in bfloat16 0.95 from B=64 on. Below these bytes 0.85 to 1.05.
template <class E>
constexpr int64_t kForwardRowsOfL3 = std::is_same_v<E, float> ? 64 : 32;
constexpr int64_t kBackwardRowsOfL3 = 32;
constexpr int64_t kBytesOfL3 = 7 << 18;

// Elements of W_hh.
int64_t recurrent_weights(const LayerShape& s) {
  return cell_sizes(s.cell).gates * s.hidden * s.output;
}

// So many rows, of a few timesteps of up to kFewRows each, are computed from unpacked weights:
// packing would take longer. Time with packed weights over that, GRU and LSTM, two threads: T=1,
// B = 8 and 16 H=128 1.2 to 1.4 and 2.0 to 2.4, B = 8 and 32 H=512 2.4 and 1.4, H=1024 2.1 to 2.8
// and 1.4 to 1.6; B=4, T = 2 and 8 H=128 1.3 and 1.0, H=512 2.2 and 1.4; B=1, T = 4 and 16 H=128
// 1.4 and 1.1, H=512 2.6 and 1.4. At these limits it is 1.0 to 1.2, of one thread and with AVX2 as
// well. In bfloat16, which AMX multiplies faster, 1.1 to 1.2 at 8 rows and 0.8 to 1.1 at 16.
template <class E>
int64_t few_rows(const LayerShape& s) {
  const int64_t weights = recurrent_weights(s);
  if (weights < 1 << 12) return 4;
  if (weights < 1 << 14 || !std::is_same_v<E, float>) return 8;
  return weights < 1 << 17 ? 16 : 48;
}

// Of those, so many of one timestep take both products at once, row after row: faster where weights
// are read again from L1 and L2. Where a GRU resets before the product there is no other way.
int64_t step_rows(const LayerShape& s) {
  const int64_t weights = recurrent_weights(s);
  return reset_before(s) || weights < 1 << 16 ? 4 : weights < 1 << 18 ? 2 : 1;
}

// The input side of so many bytes is computed at a time: half of a usual L2 cache per thread. But
// of so many rows at least: W_ih is read once for them, and at H=1024 the weights exceed the L3
// cache, where 256 rows instead of 64 made LSTM 1.2 times faster.
constexpr int64_t kInputSideBytes = 512 << 10;
constexpr int64_t kInputSideRows = 256;

// Elements are taken in parts where a product has so many rows: with fewer, reading the weights
// takes as long as multiplying, and parts are half as many bytes again. AVX-512's time over that of
// parts at B=20: 1.15 in inference at H=128, else 1.0; at B=16 1.0, at B=12 0.96 to 1.0.
constexpr int64_t kRowsInParts = 20;
// And where a call has so many: cutting the weights costs more than packing them does. With 128
// rows of a batch of 1, GRU's inference at H=128 took 1.25 times as long in parts.
constexpr int64_t kCallRowsInParts = 512;
// And where a layer is wide, for cutting a row to be little beside its products and a tile's depth
// to be full. AVX-512's time over that of parts in inference and in training: GRU and LSTM 1.1 and
// 0.8 to 0.9 at H=64, 1.1 and 0.95 at 80, 1.3 and 1.03 at 96, 1.1 and 1.02 at 100; RNN 0.9 at
// H=100, 1.2 and 1.0 at 128, 1.4 and 1.1 at 192.
constexpr int64_t kUnitsInParts = 96;
constexpr int64_t kGateUnitsInParts = 128;

int64_t rows_for(int64_t bytes, int64_t floats_per_row, int64_t least) {
  return std::max(least, bytes / (floats_per_row * static_cast<int64_t>(sizeof(float))));
}

// Whether a step has a second product, that takes what the first one gave: W_hr's where h is
// projected, W_hn's in a GRU that resets before it.
bool has_second_product(const LayerShape& s) { return projected(s) || reset_before(s); }

// Columns of grad_gates: where a layer normalises, of W_hh's product and of W_ih's.
int64_t grad_width(const LayerShape& s) {
  const CellSizes sizes = cell_sizes(s.cell);
  return (s.normed ? 2 * sizes.gates : sizes.grad_gates) * s.hidden;
}

// As many as a step has on average: packed ones have fewer and fewer.
int64_t rows_of_step(const LayerShape& s) {
  return s.rows.timesteps > 0 ? s.count / s.rows.timesteps : 0;
}

// Of one step: W_hh's and W_hr's.
double recurrent_flops_per_row(const LayerShape& s) {
  const int64_t gates = cell_sizes(s.cell).gates + (projected(s) ? 1 : 0);
  return 2.0 * static_cast<double>(gates * s.hidden) * static_cast<double>(s.output);
}

double recurrent_flops(const LayerShape& s) {
  return static_cast<double>(s.directions * s.count) *
         (recurrent_flops_per_row(s) +
          2.0 * static_cast<double>(cell_sizes(s.cell).gates * s.hidden * s.input));
}

// How a call is divided.
struct Plan {
  bool parallel;
  bool units;       // over hidden units, else over batch rows
  int64_t members;  // threads per direction

  Plan(const LayerShape& s, int64_t element_bytes, int64_t rows_of_l3, const Threads& threads) {
    const int64_t count = recurrent_flops(s) > kSerialFlops ? threads.count : 1;
    parallel = count > 1;
    members = std::max<int64_t>(1, count / s.directions);
    const int64_t bytes = recurrent_weights(s) * element_bytes;
    const int64_t rows = bytes < kBytesOfL3 ? kRowsPerThread : rows_of_l3;
    units = members > 1 && rows_of_step(s) < rows * members;
    if (!units) return;
    const double step = static_cast<double>(s.rows.batch) * recurrent_flops_per_row(s);
    const double meetings = has_second_product(s) ? 2.0 : 1.0;
    const auto worth = static_cast<int64_t>(step / (meetings * kFlopsPerMeeting));
    if (s.normed || worth < 2) {
      // Rows need no meeting, however few they are; and statistics are of whole rows.
      units = false;
      members = std::min(members, std::max<int64_t>(1, s.rows.batch));
    } else {
      members = std::min(members, worth);
    }
  }
};

template <class E>
class Call {
 public:
  Call(const KernelsOf<E>& isa, const LayerShape& shape, int64_t rows_of_l3, const Threads& threads)
      : isa_(isa), shape_(shape), threads_(threads), plan_(shape, sizeof(E), rows_of_l3, threads) {}

  const Plan& plan() const { return plan_; }
  float* take(int64_t count) { return workspace_.take(count); }
  E* take_elements(int64_t count) { return reinterpret_cast<E*>(workspace_.take(words(count))); }

  void run(int64_t items, const Body& body, int64_t grain = 1) const {
    if (plan_.parallel && items > grain) {
      threads_.run(items, grain, body);
    } else if (items > 0) {
      body(0, items);
    }
  }

  // How many parts the elements of a product of so many rows are in.
  int parts(int64_t rows) const {
    const bool wide = shape_.hidden >= kUnitsInParts &&
                      cell_sizes(shape_.cell).gates * shape_.hidden >= kGateUnitsInParts;
    return wide && rows >= kRowsInParts && shape_.count >= kCallRowsInParts ? isa_.parts : 1;
  }

  // Wide panels are faster, but there must be one for every thread that splits units.
  PackedMatrix packed(int64_t depth, int64_t columns, int gates, int parts,
                      bool split_units = false) {
    int vectors = 4 / gates;
    const int64_t wanted = split_units && plan_.units ? plan_.members : 1;
    while (vectors > 1 && ceil_div(columns, vectors * isa_.width) < wanted) vectors /= 2;
    const int64_t padded = ceil_div(columns, isa_.width) * isa_.width;
    float* data = workspace_.take(padded * gates * isa_.column_words(depth, parts));
    PackedMatrix matrix{data, depth, columns, vectors, parts, nullptr};
    if (parts > 1) {
      matrix.exceptional =
          reinterpret_cast<bool*>(workspace_.take(panel_count(matrix, isa_.width)));
    }
    return matrix;
  }

  // `rows` are those of a product.
  PackedMatrix pack_gates(const E* weights, int64_t depth, int64_t columns, int gates,
                          int64_t rows) {
    const PackGatesParamsOf<E> p{weights, gates, packed(depth, columns, gates, parts(rows), true)};
    run(panel_count(p.packed, isa_.width),
        [&](int64_t begin, int64_t end) { isa_.pack_gates(p, begin, end); });
    return p.packed;
  }

  PackedMatrix pack_columns(const E* matrix, int64_t depth, int64_t columns, int64_t rotate,
                            int64_t rows, bool split_units = false) {
    const PackColumnsParamsOf<E> p{matrix, rotate,
                                   packed(depth, columns, 1, parts(rows), split_units)};
    run(panel_count(p.packed, isa_.width),
        [&](int64_t begin, int64_t end) { isa_.pack_columns(p, begin, end); });
    return p.packed;
  }

  // How many shares of a direction take turns among the batch rows.
  int64_t interleaved_shares() const {
    return shape_.rows.batch_sizes && !plan_.units ? row_shares() : 1;
  }

  // Words that `rows` rows need as products with `m` take them, beyond what they are: of each row,
  // `beside` more.
  int64_t operand_words(const PackedMatrix& m, int64_t rows, int64_t beside = 0) const {
    return m.parts > 1 ? rows * (isa_.row_words(m.depth) + beside) : 0;
  }

  // Runs `scan` on shares that together are all rows and units of all directions. `units` is the
  // packed matrix whose columns the units are; each share has `words` words of memory.
  template <class Scan>
  void for_each_share(const PackedMatrix& units, int64_t words, const Scan& scan) const {
    const int64_t panels = panel_count(units, isa_.width);
    if (plan_.units) {
      split_units(panels, words, scan);
    } else {
      split_rows(panels, words, scan);
    }
  }

  // A thread's work memory for one item.
  class OwnMemory {
   public:
    explicit OwnMemory(int64_t words) : data_(words > 0 ? workspace_.take(words) : nullptr) {}
    float* data() const { return data_; }

   private:
    Workspace workspace_;
    float* data_;
  };

 private:
  // Words of 32 bits that hold so many elements.
  static int64_t words(int64_t elements) {
    return ceil_div(elements, static_cast<int64_t>(sizeof(float) / sizeof(E)));
  }

  int64_t row_shares() const {
    return std::max<int64_t>(1, std::min(plan_.members, shape_.rows.batch));
  }

  template <class Scan>
  void split_rows(int64_t panels, int64_t words, const Scan& scan) const {
    const int64_t batch = shape_.rows.batch, members = row_shares();
    run(shape_.directions * members, [&](int64_t begin, int64_t end) {
      OwnMemory own(words);
      for (int64_t i = begin; i < end; i++) {
        const int64_t d = i / members, m = i % members;
        // Packed rows are sorted by length: dealing them out evens the work.
        scan(shape_.rows.batch_sizes && members > 1
                 ? Share{d, m, members, batch, 0, panels}
                 : Share{d, batch * m / members, 1, batch * (m + 1) / members, 0, panels},
             nullptr, own.data());
      }
    });
  }

  template <class Scan>
  void split_units(int64_t panels, int64_t words, const Scan& scan) const {
    const int64_t items = shape_.directions * panels;
    Team team(items);
    Barrier barriers[] = {Barrier(panels), Barrier(panels)};
    const auto part = [&](int64_t begin, int64_t end, float* memory) {
      for (int64_t d = 0; d < shape_.directions; d++) {
        const int64_t first = std::max(begin, d * panels), last = std::min(end, (d + 1) * panels);
        if (first >= last) continue;
        Meeting meeting(&barriers[d], last - first);
        scan(Share{d, 0, 1, shape_.rows.batch, first - d * panels, last - d * panels}, &meeting,
             memory);
      }
    };
    run(
        items,
        [&](int64_t begin, int64_t end) {
          // First: a thread that finds no memory must not be one that others wait for.
          OwnMemory own(words);
          if (team.assemble(end - begin)) part(begin, end, own.data());
        },
        ceil_div(items, plan_.members * shape_.directions));
    if (team.went_ahead()) return;
    OwnMemory own(words);
    part(0, items, own.data());
  }

  const KernelsOf<E>& isa_;
  const LayerShape& shape_;
  const Threads& threads_;
  const Plan plan_;
  Workspace workspace_;
};

// [G*H] the biases that add directly to the input side: all but GRU's b_hn, which r multiplies.
template <class E>
const float* input_bias(const LayerShape& s, const WeightsOf<E>& w, Call<E>& work) {
  if (w.b_ih == nullptr || s.normed) return nullptr;
  const int64_t all = cell_sizes(s.cell).gates * s.hidden;
  const int64_t both = s.cell == CellKind::gru ? 2 * s.hidden : all;
  float* sum = work.take(all);
  for (int64_t i = 0; i < all; i++) sum[i] = i < both ? w.b_ih[i] + w.b_hh[i] : w.b_ih[i];
  return sum;
}

// The timesteps in groups of about `limit` rows; one group at least.
std::vector<Chunk> make_chunks(const RowLayout& rows, int64_t limit) {
  std::vector<Chunk> chunks(1);
  int64_t first_row = 0;
  for (int64_t t = 0; t < rows.timesteps; t++) {
    const int64_t batch = rows.batch_sizes ? rows.batch_sizes[t] : rows.batch;
    if (chunks.back().rows > 0 && chunks.back().rows + batch > limit) {
      chunks.push_back({t, t, first_row, 0});
    }
    chunks.back().end = t + 1;
    chunks.back().rows += batch;
    first_row += batch;
  }
  return chunks;
}

}  // namespace

template <class E>
void layer_forward(const KernelsOf<E>& isa, const ForwardCallOf<E>& call, const Threads& threads) {
  const LayerShape& s = call.shape;
  const CellSizes sizes = cell_sizes(s.cell);
  const int gates = static_cast<int>(sizes.gates);
  Call<E> work(isa, s, kForwardRowsOfL3<E>, threads);
  const bool plain = !s.normed && !projected(s) && !call.h_factor && !call.zoneout_h.any() &&
                     !call.zoneout_c.any() && !call.weights[0].peephole;
  if (plain && s.rows.timesteps == 1 && s.count == s.rows.batch && s.count <= step_rows(s)) {
    StepParamsOf<E> p{call, nullptr, nullptr, false, nullptr};
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
    return;
  }
  if (plain && s.rows.timesteps > 0 && !s.rows.batch_sizes && s.rows.batch <= kFewRows &&
      s.count <= few_rows<E>(s) && !reset_before(s)) {
    float* input_side = work.take(s.directions * s.count * sizes.gates * s.hidden);
    const StepParamsOf<E> p{call, nullptr, nullptr, false, input_side};
    const PackedMatrix vectors{nullptr, s.output, s.hidden, 1, 1, nullptr};
    work.for_each_share(vectors, 0, [&](const Share& share, Meeting* meeting, float*) {
      isa.few_steps(p, share, meeting);
    });
    return;
  }
  const int64_t batch = s.rows.batch;
  int64_t words = 0;  // of a share's own memory
  ForwardParamsOf<E> p{call, {}, {}, {}, {}, {}, {}, {}, 0, 0, {}, {}};
  p.chunk_rows = std::min(s.count, rows_for(kInputSideBytes * (work.plan().parallel ? 2 : 1),
                                            sizes.gates * s.hidden, kInputSideRows));
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
  // Of this GRU's panels, those of the second product have the most units.
  work.for_each_share(reset_before(s) ? p.w_second[0] : p.w_hh[0], words,
                      [&](const Share& share, Meeting* meeting, float* memory) {
                        isa.forward(p, share, meeting, memory);
                      });
}

namespace {

// Turns the gradients of a chunk's gates, and of its h where that is projected, into those of x and
// weights, one direction at a time.
template <class E>
class Products {
 public:
  Products(Call<E>& work, const KernelsOf<E>& isa, const BackwardCallOf<E>& call, int64_t rows)
      : work_(work), isa_(isa), call_(call), sizes_(cell_sizes(call.shape.cell)) {
    const LayerShape& s = call.shape;
    width_ = grad_width(s);
    // GRU's grad_gates are (hn, r, z, n): the last three face W_ih, the first three W_hh.
    input_side_ = width_ - sizes_.gates * s.hidden;
    rotate_ = s.cell == CellKind::gru && !s.normed ? 2 * s.hidden : 0;
    bool any = false, any_ih = false, any_hh = false, any_between = false;
    for (int64_t d = 0; d < s.directions; d++) {
      const WeightGrads& g = call.grads[d];
      any |= g.any();
      any_ih |= g.w_ih != nullptr;
      any_hh |= g.w_hh != nullptr;
      any_between |= g.w_hr || (g.w_hh && reset_before(s));
      if (call.grad_x) {
        w_ih_[d] =
            work.pack_columns(call.weights[d].w_ih, sizes_.gates * s.hidden, s.input, 0, s.count);
      }
      if (g.any()) sums_[d] = work.take(width_);
    }
    parts_ = work.parts(s.count);
    // Rows apart by a power of two would share a few sets of the cache.
    stride_ = parts_ > 1 ? isa.row_words(rows) : ceil_div(rows, 16) * 16 + 16;
    if (any) transposed_ = work.take_elements(width_ * stride_);
    const int64_t widest =
        std::max({any_ih ? s.input : 0, any_hh ? s.output : 0, any_between ? s.hidden : 0});
    if (widest > 0) packed_ = work.packed(rows, widest, 1, parts_);
    if (any_between && projected(s)) unwanted_sums_ = work.take(s.output);
  }

  int64_t rotate() const { return rotate_; }

  void grad_x(int64_t d, const Chunk& chunk, const E* grad_gates, bool accumulate) const {
    if (!call_.grad_x) return;
    const InputGradParamsOf<E> p{grad_gates + input_side_, width_, w_ih_[d],
                                 call_.grad_x + chunk.first_row * call_.shape.input, accumulate};
    work_.run(
        chunk.rows,
        [&](int64_t begin, int64_t end) {
          typename Call<E>::OwnMemory own(work_.operand_words(p.w_ih, end - begin));
          isa_.input_grad(p, begin, end, own.data());
        },
        16);
  }

  void grad_weights(int64_t d, const BackwardParamsOf<E>& scanned, bool accumulate) const {
    const WeightGrads& g = call_.grads[d];
    if (!g.any()) return;
    const Chunk& chunk = scanned.chunk[d];
    const bool normed = call_.shape.normed;
    const E *grad_gates = scanned.grad_gates[d], *grad_h = scanned.grad_h[d];
    const E* grad_sums = normed ? scanned.grad_sums[d] : grad_gates;
    const int64_t hidden = call_.shape.hidden, output = call_.shape.output;
    const int64_t gate_rows = sizes_.gates * hidden;
    if (g.w_ih || g.w_hh || (!normed && (g.b_ih || g.b_hh))) {
      transpose(
          {grad_gates, chunk.rows, width_, transposed_, stride_, parts_, sums_[d], accumulate});
    }
    if (g.w_ih) {
      product({&call_, RowSource::x, chunk, d, packed(call_.shape.input)},
              {transposed_ + input_side_ * stride_, stride_, gate_rows, {}, g.w_ih, 0, accumulate});
    }
    if (g.w_hh) {
      const int64_t first_rows = reset_before(call_.shape) ? 2 * hidden : gate_rows;
      product({&call_, RowSource::states, chunk, d, packed(output)},
              {transposed_, stride_, first_rows, {}, g.w_hh, rotate_, accumulate});
      if (first_rows < gate_rows) {
        product({&call_, RowSource::between, chunk, d, packed(hidden)},
                {transposed_ + first_rows * stride_,
                 stride_,
                 gate_rows - first_rows,
                 {},
                 g.w_hh + first_rows * output,
                 0,
                 accumulate});
      }
    }
    if (g.peephole) {
      const PeepholeGradParamsOf<E> p{&call_, chunk, d, grad_sums, g.peephole, accumulate};
      work_.run(ceil_div(hidden, isa_.width),
                [&](int64_t begin, int64_t end) { isa_.peephole_grad(p, begin, end); });
    }
    if (normed) {
      const NormGradParamsOf<E> p{&call_, chunk, d, grad_sums, scanned.grad_c_seen[d], accumulate};
      work_.run(ceil_div(hidden, isa_.width),
                [&](int64_t begin, int64_t end) { isa_.norm_grad(p, begin, end); });
    }
    if (g.w_hr) {
      transpose({grad_h, chunk.rows, output, transposed_, stride_, parts_, unwanted_sums_, false});
      product({&call_, RowSource::between, chunk, d, packed(hidden)},
              {transposed_, stride_, output, {}, g.w_hr, 0, accumulate});
    }
  }

  void grad_biases(int64_t d) const {
    const WeightGrads& g = call_.grads[d];
    if (call_.shape.normed) return;  // which norm_grad did
    const int64_t rows = sizes_.gates * call_.shape.hidden;
    if (g.b_ih) std::copy_n(sums_[d] + input_side_, rows, g.b_ih);
    for (int64_t i = 0; g.b_hh && i < rows; i++) g.b_hh[(i + rotate_) % rows] = sums_[d][i];
  }

 private:
  void transpose(const TransposeParamsOf<E>& p) const {
    work_.run(ceil_div(p.width, isa_.width),
              [&](int64_t begin, int64_t end) { isa_.transpose(p, begin, end); });
  }

  PackedMatrix packed(int64_t columns) const {
    PackedMatrix matrix = packed_;
    matrix.columns = columns;
    return matrix;
  }

  // Packs the chunk's rows and multiplies by them.
  void product(PackRowsParamsOf<E> rows, WeightGradParamsOf<E> p) const {
    rows.packed.depth = rows.chunk.rows;
    work_.run(panel_count(rows.packed, isa_.width),
              [&](int64_t begin, int64_t end) { isa_.pack_rows(rows, begin, end); });
    p.packed = rows.packed;
    work_.run(ceil_div(p.rows, isa_.grad_rows),
              [&](int64_t begin, int64_t end) { isa_.weight_grad(p, begin, end); });
  }

  Call<E>& work_;
  const KernelsOf<E>& isa_;
  const BackwardCallOf<E>& call_;
  const CellSizes sizes_;
  int64_t width_ = 0;       // Q*H
  int64_t input_side_ = 0;  // first column of grad_gates that faces W_ih
  int64_t rotate_ = 0;      // from the order of grad_gates' hidden side to that of W_hh
  int parts_ = 1;           // of what the weights' gradients are products of
  int64_t stride_ = 0;
  E* transposed_ = nullptr;         // [Q*H, stride]
  float* sums_[2] = {};             // [Q*H]
  float* unwanted_sums_ = nullptr;  // [P]
  PackedMatrix w_ih_[2] = {};
  PackedMatrix packed_ = {};  // of one product at a time, as wide as the widest
};

}  // namespace

template <class E>
void layer_backward(const KernelsOf<E>& isa, const BackwardCallOf<E>& call,
                    const Threads& threads) {
  const LayerShape& s = call.shape;
  const CellSizes sizes = cell_sizes(s.cell);
  const int64_t width = grad_width(s);
  Call<E> work(isa, s, kBackwardRowsOfL3, threads);
  const std::vector<Chunk> chunks =
      make_chunks(s.rows, rows_for(isa.chunk_bytes, width, isa.chunk_rows / (s.normed ? 2 : 1)));
  int64_t most_rows = 0;
  for (const Chunk& chunk : chunks) most_rows = std::max(most_rows, chunk.rows);
  Products<E> products(work, isa, call, most_rows);
  BackwardParamsOf<E> p{call, {}, {}, {}, {}, {}, {}, {}, {}, {}};
  const int64_t batch = s.rows.batch;
  int64_t words = 0;  // of a share's own memory
  for (int64_t d = 0; d < s.directions; d++) {
    const WeightsOf<E>& w = call.weights[d];
    const int64_t first_rows = (reset_before(s) ? 2 : sizes.gates) * s.hidden;
    p.w_hh[d] =
        work.pack_columns(w.w_hh, first_rows, s.output, products.rotate(), rows_of_step(s), true);
    if (reset_before(s)) {
      p.w_second[d] = work.pack_columns(w.w_hh + first_rows * s.output, s.hidden, s.hidden, 0,
                                        rows_of_step(s), true);
    }
    if (projected(s)) {
      p.w_second[d] = work.pack_columns(w.w_hr, s.output, s.hidden, 0, rows_of_step(s), true);
      p.grad_h[d] = work.take_elements(most_rows * s.output);
    }
    p.grad_gates[d] = work.take_elements(most_rows * width);
    p.carried[d] = work.take_elements(batch * width);
    if (s.normed) {
      p.grad_sums[d] = work.take_elements(most_rows * sizes.grad_gates * s.hidden);
      if (sizes.has_c) p.grad_c_seen[d] = work.take(most_rows * s.hidden);
      p.grad_given[d] = work.take_elements(batch * s.hidden);
    }
    words =
        std::max(work.operand_words(p.w_hh[d], batch), work.operand_words(p.w_second[d], batch));
  }
  const auto rounds = static_cast<int64_t>(chunks.size());
  for (int64_t round = 0; round < rounds; round++) {
    const int64_t at[] = {rounds - 1 - round, round};  // the directions come from opposite ends
    for (int64_t d = 0; d < s.directions; d++) p.chunk[d] = chunks[static_cast<size_t>(at[d])];
    work.for_each_share(projected(s) ? p.w_second[0] : p.w_hh[0], words,
                        [&](const Share& share, Meeting* meeting, float* memory) {
                          isa.backward(p, share, meeting, memory);
                        });
    for (int64_t d = 0; d < s.directions; d++) {
      // The direction that comes to a chunk second adds to what the first has left in grad_x.
      const bool second =
          s.directions == 2 && (d == 0 ? 2 * round >= rounds : 2 * round + 1 >= rounds);
      products.grad_x(d, p.chunk[d], p.grad_gates[d], second);
      products.grad_weights(d, p, round > 0);
    }
  }
  for (int64_t d = 0; d < s.directions; d++) products.grad_biases(d);
}

template void layer_forward(const KernelsOf<float>&, const ForwardCallOf<float>&, const Threads&);
template void layer_backward(const KernelsOf<float>&, const BackwardCallOf<float>&, const Threads&);
template void layer_forward(const KernelsOf<BFloat16>&, const ForwardCallOf<BFloat16>&,
                            const Threads&);
template void layer_backward(const KernelsOf<BFloat16>&, const BackwardCallOf<BFloat16>&,
                             const Threads&);

}  // namespace fused_rnn

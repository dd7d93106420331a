#include <algorithm>
#include <cstdint>
#include <iterator>
#include <type_traits>
#include <utility>
#include <vector>

#include "layer.h"
#include "layer_call.h"

namespace fused_rnn {
namespace {

// Words of packed rows that wait side by side for their products, 2 MiB. More of them take turns in
// one memory: RNN (128, 32, 256) needs 20 MiB instead of 24 then, and two more parallel regions.
constexpr int64_t kPackedTogether = 1 << 19;

// Weights of so many floats in all, 1.25 MiB, are small: their gradients are added to cheaply.
constexpr int64_t kSmallWeights = 5 << 16;

// Whether weights are multiplied where they lie.
template <class E>
bool multiplies_unpacked(const KernelsOf<E>& isa, const LayerShape& s) {
  return s.count <= isa.unpacked_rows;
}

// Columns of grad_gates: where a layer normalises, of W_hh's product and of W_ih's.
int64_t grad_width(const LayerShape& s) {
  const CellSizes sizes = cell_sizes(s.cell);
  return (s.normed ? 2 * sizes.gates : sizes.grad_gates) * s.hidden;
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

// Of so many steps chunks of small weights are at least: more threads wait longer for each other.
constexpr int64_t kSmallChunkSteps = 8;

// How many rows a chunk has, about. Not by the number of threads, on which no bit depends.
template <class E>
int64_t rows_of_chunk(const KernelsOf<E>& isa, const LayerShape& s) {
  const int64_t width = grad_width(s), of_rows = s.normed ? 2 : 1;
  const int64_t most = rows_for(isa.chunk_bytes, width, isa.chunk_rows / of_rows);
  const int64_t gates = cell_sizes(s.cell).gates * s.hidden;
  if (s.directions * gates * (s.input + s.output) > kSmallWeights) return most;
  const int64_t few = rows_for(isa.small_chunk_bytes, width, isa.small_chunk_rows / of_rows);
  return std::min(most, std::max(few, kSmallChunkSteps * s.rows.batch));
}

// Whether the gradient of h0 is a product of its own, after the scan.
template <class E>
bool has_initial_state_apart(const KernelsOf<E>& isa, const BackwardCallOf<E>& call) {
  const LayerShape& s = call.shape;
  return s.rows.timesteps == 1 && !call.spares_h0 && multiplies_unpacked(isa, s) && !s.normed &&
         !has_second_product(s) && !call.h_factor;
}

// Turns the gradients of a chunk's gates, and of its h where that is projected, into those of x and
// weights, one direction at a time.
template <class E>
class Products {
 public:
  // Of so many rounds, each of up to so many rows.
  Products(LayerCall<E>& work, const KernelsOf<E>& isa, const BackwardCallOf<E>& call, int64_t rows,
           int64_t rounds)
      : rounds_(rounds), work_(work), isa_(isa), call_(call), sizes_(cell_sizes(call.shape.cell)) {
    const LayerShape& s = call.shape;
    width_ = grad_width(s);
    // GRU's grad_gates are (hn, r, z, n): the last three face W_ih, the first three W_hh.
    input_side_ = width_ - sizes_.gates * s.hidden;
    rotate_ = s.cell == CellKind::gru && !s.normed ? 2 * s.hidden : 0;
    const int64_t gate_rows = sizes_.gates * s.hidden;
    bool any = false, any_ih = false, any_hh = false, any_between = false;
    for (int64_t d = 0; d < s.directions; d++) {
      const WeightGradsOf<E>& g = call.grads[d];
      any |= g.any();
      any_ih |= g.w_ih != nullptr;
      any_hh |= g.w_hh != nullptr;
      any_between |= g.w_hr || (g.w_hh && reset_before(s));
      if (call.grad_x && !multiplies_unpacked(isa, s)) {
        w_ih_[d] = work.pack_columns(call.weights[d].w_ih, gate_rows, s.input, 0, s.count);
      }
      if (g.any()) sums_[d] = work.take(3 * width_);
      matrix_sums_[d] = {sums_of(g.w_ih, gate_rows * s.input),
                         sums_of(g.w_hh, gate_rows * s.output),
                         sums_of(g.w_hr, s.output * s.hidden)};
    }
    parts_ = work.parts(s.count);
    // Rows apart by a power of two would share a few sets of the cache.
    stride_ = parts_ > 1 ? isa.row_words(rows) : ceil_div(rows, 16) * 16 + 16;
    if (any) transposed_ = work.take_elements(width_ * stride_);
    const int64_t columns[] = {any_ih ? s.input : 0, any_hh ? s.output : 0,
                               any_between ? s.hidden : 0};
    PackedMatrix* const matrices[] = {&x_, &states_, &between_};
    int64_t all = 0, most = 0;
    for (const int64_t count : columns) {
      const int64_t words = work.packed_words(rows, count, 1, parts_);
      all += words;
      most = std::max(most, words);
    }
    one_by_one_ = all > kPackedTogether;
    float* shared = one_by_one_ ? work.take(most) : nullptr;
    for (size_t i = 0; i < std::size(columns); i++) {
      if (columns[i] > 0) *matrices[i] = work.packed(rows, columns[i], 1, parts_, false, shared);
    }
    if (any_between && projected(s)) unwanted_sums_ = work.take(3 * s.output);
  }

  int64_t rotate() const { return rotate_; }

  // Of a single step, where that is a product of its own.
  void grad_initial_state(int64_t d, const E* grad_gates) const {
    const LayerShape& s = call_.shape;
    const bool went_round = s.cell == CellKind::gru || call_.zoneout_h.any();
    multiply_unpacked(isa_.unpacked_state, grad_gates, s.count, call_.weights[d].w_hh, s.hidden,
                      rotate_, call_.grad_h0 + d * s.count * s.hidden, went_round);
  }

  // Of x, which are added to what is there if `adds_to_x`, and of the weights.
  void grads(int64_t d, const BackwardParamsOf<E>& scanned, int64_t round, bool adds_to_x) const {
    const bool accumulate = round > 0, last = round + 1 == rounds_;
    const auto [sums_ih, sums_hh, sums_hr] = matrix_sums_[d];
    const WeightGradsOf<E>& g = call_.grads[d];
    const Chunk& chunk = scanned.chunk[d];
    std::vector<Part> first;
    if (call_.grad_x) grad_x(d, chunk, scanned.grad_gates[d], adds_to_x, first);
    if (!g.any()) return work_.run_together(first);
    const bool normed = call_.shape.normed;
    const E *grad_gates = scanned.grad_gates[d], *grad_h = scanned.grad_h[d];
    const E* grad_sums = normed ? scanned.grad_sums[d] : grad_gates;
    const int64_t hidden = call_.shape.hidden, output = call_.shape.output;
    const int64_t gate_rows = sizes_.gates * hidden;
    std::vector<Product> products;
    if (g.w_ih) {
      products.push_back({{&call_, RowSource::x, chunk, d, x_},
                          {transposed_ + input_side_ * stride_,
                           stride_,
                           gate_rows,
                           {},
                           sums_ih,
                           g.w_ih,
                           0,
                           accumulate,
                           last}});
    }
    const int64_t first_rows = reset_before(call_.shape) ? 2 * hidden : gate_rows;
    if (g.w_hh) {
      products.push_back(
          {{&call_, RowSource::states, chunk, d, states_},
           {transposed_, stride_, first_rows, {}, sums_hh, g.w_hh, rotate_, accumulate, last}});
    }
    if (g.w_hh && first_rows < gate_rows) {
      products.push_back({{&call_, RowSource::between, chunk, d, between_},
                          {transposed_ + first_rows * stride_,
                           stride_,
                           gate_rows - first_rows,
                           {},
                           sums_hh ? sums_hh + first_rows * output : nullptr,
                           g.w_hh + first_rows * output,
                           0,
                           accumulate,
                           last}});
    }
    if (!products.empty() || (!normed && (g.b_ih || g.b_hh))) {
      multiply({grad_gates, chunk.rows, width_, transposed_, stride_, parts_, sums_[d], accumulate},
               products, std::move(first));
    } else {
      work_.run_together(first);
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
      multiply({grad_h, chunk.rows, output, transposed_, stride_, parts_, unwanted_sums_, false},
               {{{&call_, RowSource::between, chunk, d, between_},
                 {transposed_, stride_, output, {}, sums_hr, g.w_hr, 0, accumulate, last}}});
    }
  }

  void grad_biases(int64_t d) const {
    const WeightGradsOf<E>& g = call_.grads[d];
    if (call_.shape.normed) return;  // which norm_grad did
    const int64_t rows = sizes_.gates * call_.shape.hidden;
    if (g.b_ih) std::copy_n(sums_[d] + input_side_, rows, g.b_ih);
    for (int64_t i = 0; g.b_hh && i < rows; i++) g.b_hh[(i + rotate_) % rows] = sums_[d][i];
  }

 private:
  // A weight's gradient: gradients, transposed, times the rows that the weight met.
  struct Product {
    PackRowsParamsOf<E> rows;
    WeightGradParamsOf<E> grad;
  };

  // Rows of gradients of gates times a matrix where it lies, see UnpackedParamsOf.
  template <class To>
  void multiply_unpacked(void (*kernel)(const UnpackedParamsOf<E, To>&, int64_t, int64_t),
                         const E* grads, int64_t rows, const E* matrix, int64_t columns,
                         int64_t rotate, To* to, bool accumulate) const {
    const UnpackedParamsOf<E, To> p{
        grads,   width_, rows, matrix,    sizes_.gates * call_.shape.hidden,
        columns, rotate, to,   accumulate};
    work_.run(ceil_div(columns, isa_.unpacked_columns),
              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  }

  // As a part of the work before the products of the weights' gradients; or at once.
  void grad_x(int64_t d, const Chunk& chunk, const E* grad_gates, bool accumulate,
              std::vector<Part>& parts) const {
    const LayerShape& s = call_.shape;
    E* grad_x = call_.grad_x + chunk.first_row * s.input;
    if (multiplies_unpacked(isa_, s)) {
      return multiply_unpacked(isa_.unpacked_input, grad_gates + input_side_, chunk.rows,
                               call_.weights[d].w_ih, s.input, 0, grad_x, accumulate);
    }
    const InputGradParamsOf<E> p{grad_gates + input_side_, width_, w_ih_[d], grad_x, accumulate};
    parts.push_back({chunk.rows, [this, p](int64_t begin, int64_t end) {
                       typename LayerCall<E>::OwnMemory own(
                           work_.operand_words(p.w_ih, end - begin));
                       isa_.input_grad(p, begin, end, own.data());
                     }});
  }

  // Transposes and packs, then multiplies: everything, or product after product. `preparations` are
  // of other things that may be done meanwhile.
  void multiply(const TransposeParamsOf<E>& grads, std::vector<Product> products,
                std::vector<Part> preparations = {}) const {
    preparations.push_back({ceil_div(grads.width, isa_.width), [&](int64_t begin, int64_t end) {
                              isa_.transpose(grads, begin, end);
                            }});
    std::vector<Part> multiplications;
    const auto flush = [&] {
      work_.run_together(std::exchange(preparations, {}));
      work_.run_together(std::exchange(multiplications, {}));
    };
    for (Product& product : products) {
      product.rows.packed.depth = product.rows.chunk.rows;
      product.grad.packed = product.rows.packed;
      preparations.push_back(
          {panel_count(product.rows.packed, isa_.width),
           [&](int64_t begin, int64_t end) { isa_.pack_rows(product.rows, begin, end); }});
      multiplications.push_back(
          {ceil_div(product.grad.rows, isa_.grad_rows),
           [&](int64_t begin, int64_t end) { isa_.weight_grad(product.grad, begin, end); }});
      if (one_by_one_) flush();
    }
    flush();
  }

  // Where a matrix's gradient is summed up between rounds: in it, if that is of floats.
  float* sums_of(E* grad, int64_t count) {
    if constexpr (std::is_same_v<E, float>) {
      return grad;
    } else {
      return grad && rounds_ > 1 ? work_.take(count) : nullptr;
    }
  }

  struct MatrixSums {
    float *w_ih, *w_hh, *w_hr;
  };

  const int64_t rounds_;
  LayerCall<E>& work_;
  const KernelsOf<E>& isa_;
  const BackwardCallOf<E>& call_;
  const CellSizes sizes_;
  int64_t width_ = 0;       // Q*H
  int64_t input_side_ = 0;  // first column of grad_gates that faces W_ih
  int64_t rotate_ = 0;      // from the order of grad_gates' hidden side to that of W_hh
  int parts_ = 1;           // of what the weights' gradients are products of
  int64_t stride_ = 0;
  E* transposed_ = nullptr;  // [Q*H, stride]
  float* sums_[2] = {};      // [3, Q*H]
  MatrixSums matrix_sums_[2] = {};
  float* unwanted_sums_ = nullptr;  // [3, P]
  PackedMatrix w_ih_[2] = {};
  PackedMatrix x_ = {}, states_ = {}, between_ = {};  // rows that weights met
  bool one_by_one_ = false;                           // whether these share their memory
};

}  // namespace

template <class E>
void layer_backward(const KernelsOf<E>& isa, const BackwardCallOf<E>& call,
                    const Threads& threads) {
  const LayerShape& s = call.shape;
  const CellSizes sizes = cell_sizes(s.cell);
  const int64_t width = grad_width(s);
  LayerCall<E> work(isa, s, kBackwardRowsOfL3, kBackwardSerialFlops, threads);
  prepare_result(call.grad_x, s.count * s.input);
  for (int64_t d = 0; d < s.directions; d++) {
    prepare_result(call.grads[d].w_ih, sizes.gates * s.hidden * s.input);
    prepare_result(call.grads[d].w_hh, sizes.gates * s.hidden * s.output);
  }
  const std::vector<Chunk> chunks = make_chunks(s.rows, rows_of_chunk(isa, s));
  int64_t most_rows = 0;
  for (const Chunk& chunk : chunks) most_rows = std::max(most_rows, chunk.rows);
  const auto rounds = static_cast<int64_t>(chunks.size());
  Products<E> products(work, isa, call, most_rows, rounds);
  BackwardParamsOf<E> p{call};
  const bool apart = has_initial_state_apart(isa, call);
  p.spares_h0 |= apart;
  const int64_t batch = s.rows.batch;
  int64_t words = 0;  // of a share's own memory
  for (int64_t d = 0; d < s.directions; d++) {
    const WeightsOf<E>& w = call.weights[d];
    const int64_t first_rows = (reset_before(s) ? 2 : sizes.gates) * s.hidden;
    // A single step's gradients go through W_hh to h0 alone.
    p.w_hh[d] = s.rows.timesteps == 1 && p.spares_h0
                    ? work.packed(first_rows, s.output, 1, work.parts(rows_of_step(s)), true)
                    : work.pack_columns(w.w_hh, first_rows, s.output, products.rotate(),
                                        rows_of_step(s), true);
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
  work.pack();
  for (int64_t round = 0; round < rounds; round++) {
    const int64_t at[] = {rounds - 1 - round, round};  // the directions come from opposite ends
    for (int64_t d = 0; d < s.directions; d++) p.chunk[d] = chunks[static_cast<size_t>(at[d])];
    work.for_each_share(projected(s) ? p.w_second[0] : p.w_hh[0], words,
                        [&](const Share& share, Meeting* meeting, float* memory) {
                          isa.backward(p, share, meeting, memory);
                        });
    for (int64_t d = 0; apart && d < s.directions; d++) {
      products.grad_initial_state(d, p.grad_gates[d]);
    }
    for (int64_t d = 0; d < s.directions; d++) {
      // The direction that comes to a chunk second adds to what the first has left in grad_x.
      const bool second =
          s.directions == 2 && (d == 0 ? 2 * round >= rounds : 2 * round + 1 >= rounds);
      products.grads(d, p, round, second);
    }
  }
  for (int64_t d = 0; d < s.directions; d++) products.grad_biases(d);
}

template void layer_backward(const KernelsOf<float>&, const BackwardCallOf<float>&, const Threads&);
template void layer_backward(const KernelsOf<BFloat16>&, const BackwardCallOf<BFloat16>&,
                             const Threads&);

}  // namespace fused_rnn

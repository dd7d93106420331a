// What both passes of a layer call work with: memory, packed weights, and shares of the scan.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "layer_plan.h"
#include "team.h"
#include "workspace.h"

namespace fused_rnn {

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

// Of so many rows a thread multiplies panels whose columns lie side by side: in halves a single row
// takes 1.1 times as long where weights are in L2. Two rows take as long either way there, and from
// L3 and beyond 1.2 times less in halves.
constexpr int64_t kRowsSideBySide = 1;

// A result of so many bytes is worth keeping when it is freed.
constexpr size_t kLargeResult = size_t(1) << 20;

// A result that a kernel is the first to touch; or null.
template <class E>
void prepare_result(E* result, int64_t count) {
  const size_t bytes = static_cast<size_t>(count) * sizeof(E);
  if (result == nullptr || bytes < kLargeResult) return;
  let_malloc_keep_memory();
  advise_huge_pages_if_fresh(result, bytes);
}

// Rows that so many bytes hold, or `least`.
inline int64_t rows_for(int64_t bytes, int64_t floats_per_row, int64_t least) {
  return std::max(least, bytes / (floats_per_row * static_cast<int64_t>(sizeof(float))));
}

// Items that threads share out.
struct Part {
  int64_t items;
  Body body;
};

template <class E>
class LayerCall {
 public:
  LayerCall(const KernelsOf<E>& isa, const LayerShape& shape, int64_t rows_of_l3,
            double serial_flops, const Threads& threads)
      : isa_(isa),
        shape_(shape),
        threads_(threads),
        plan_(shape, sizeof(E), rows_of_l3, serial_flops, threads) {}

  const LayerPlan& plan() const { return plan_; }
  float* take(int64_t count) { return workspace_.take(count); }
  E* take_elements(int64_t count) { return reinterpret_cast<E*>(workspace_.take(words(count))); }

  void run(int64_t items, const Body& body, int64_t grain = 1) const {
    if (plan_.parallel && items > grain) {
      threads_.run(items, grain, body);
    } else if (items > 0) {
      body(0, items);
    }
  }

  // All parts in one region, as each costs some 4 us. A thread has the same share of every one;
  // they are counted from either end in turns, so that of single items not all are the same
  // thread's.
  void run_together(const std::vector<Part>& parts) const {
    int64_t items = 0;
    for (const Part& part : parts) items += part.items;
    const int64_t shares = std::min(threads_.count, items);
    run(shares, [&](int64_t begin, int64_t end) {
      bool turned = false;
      for (const Part& part : parts) {
        const int64_t first = (turned ? shares - end : begin) * part.items / shares;
        const int64_t last = (turned ? shares - begin : end) * part.items / shares;
        if (first < last) part.body(first, last);
        turned = !turned;
      }
    });
  }

  // How many parts the elements of a product of so many rows are in.
  int parts(int64_t rows) const {
    const bool wide = shape_.hidden >= kUnitsInParts &&
                      cell_sizes(shape_.cell).gates * shape_.hidden >= kGateUnitsInParts;
    return wide && rows >= kRowsInParts && shape_.count >= kCallRowsInParts ? isa_.parts : 1;
  }

  int64_t packed_words(int64_t depth, int64_t columns, int gates, int parts) const {
    const int64_t padded = ceil_div(columns, isa_.width) * isa_.width;
    return padded * gates * isa_.column_words(depth, parts);
  }

  // Wide panels are faster, but there must be one for every thread that splits units. In memory of
  // its own, or in `data`.
  PackedMatrix packed(int64_t depth, int64_t columns, int gates, int parts,
                      bool split_units = false, float* data = nullptr) {
    int vectors = 4 / gates;
    const int64_t wanted = split_units && plan_.units ? plan_.members : 1;
    while (vectors > 1 && ceil_div(columns, vectors * isa_.width) < wanted) vectors /= 2;
    if (!data) data = workspace_.take(packed_words(depth, columns, gates, parts));
    PackedMatrix matrix{data, depth, columns, vectors, parts, nullptr};
    if (parts > 1) {
      matrix.exceptional =
          reinterpret_cast<bool*>(workspace_.take(panel_count(matrix, isa_.width)));
    }
    return matrix;
  }

  // What is to be packed, by `pack`. `rows` are those of a product.
  PackedMatrix pack_gates(const E* weights, int64_t depth, int64_t columns, int gates,
                          int64_t rows) {
    PackGatesParamsOf<E> p{weights, gates, packed(depth, columns, gates, parts(rows), true)};
    p.packed.in_halves = in_halves(rows);
    waiting_.push_back({panel_count(p.packed, isa_.width),
                        [this, p](int64_t begin, int64_t end) { isa_.pack_gates(p, begin, end); }});
    return p.packed;
  }

  PackedMatrix pack_columns(const E* matrix, int64_t depth, int64_t columns, int64_t rotate,
                            int64_t rows, bool split_units = false) {
    PackColumnsParamsOf<E> p{matrix, rotate, packed(depth, columns, 1, parts(rows), split_units)};
    p.packed.in_halves = in_halves(rows);
    waiting_.push_back({panel_count(p.packed, isa_.width), [this, p](int64_t begin, int64_t end) {
                          isa_.pack_columns(p, begin, end);
                        }});
    return p.packed;
  }

  void pack() { run_together(std::exchange(waiting_, {})); }

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

  // Whether panels that products of so many rows take are better in halves (PackedMatrix).
  bool in_halves(int64_t rows) const {
    return (plan_.units ? rows : rows / row_shares()) > kRowsSideBySide;
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
    const int64_t at_a_time = plan_.in_turn ? 1 : shape_.directions;
    for (int64_t d = 0; d < shape_.directions; d += at_a_time) {
      split_units(d, at_a_time, panels, words, scan);
    }
  }

  // Of so many directions from the first one on.
  template <class Scan>
  void split_units(int64_t first_direction, int64_t directions, int64_t panels, int64_t words,
                   const Scan& scan) const {
    const int64_t items = directions * panels;
    Team team(items);
    Barrier barriers[] = {Barrier(panels), Barrier(panels)};
    const auto part = [&](int64_t begin, int64_t end, float* memory) {
      for (int64_t i = 0; i < directions; i++) {
        const int64_t first = std::max(begin, i * panels), last = std::min(end, (i + 1) * panels);
        if (first >= last) continue;
        Meeting meeting(&barriers[i], last - first);
        scan(Share{first_direction + i, 0, 1, shape_.rows.batch, first - i * panels,
                   last - i * panels},
             &meeting, memory);
      }
    };
    run(
        items,
        [&](int64_t begin, int64_t end) {
          // First: a thread that finds no memory must not be one that others wait for.
          OwnMemory own(words);
          if (team.assemble(end - begin)) part(begin, end, own.data());
        },
        ceil_div(items, plan_.members * directions));
    if (team.went_ahead()) return;
    OwnMemory own(words);
    part(0, items, own.data());
  }

  const KernelsOf<E>& isa_;
  const LayerShape& shape_;
  const Threads& threads_;
  const LayerPlan plan_;
  Workspace workspace_;
  std::vector<Part> waiting_;  // to be packed
};

}  // namespace fused_rnn

// Where the pieces of a padded batch lie, see fused_rnn/backends/pieces.py; and rows on their way
// there and back.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../tensor_checks.h"
#include "border.h"

namespace fused_rnn {
namespace {

using torch::headeronly::ScalarType;

struct Piece {
  int64_t row, start, length;
  bool first, last;  // of its row
  bool afresh;       // whether it starts from the states after a reset
};

// Row by row and from left to right. Null lengths: every row has all timesteps; null resets: none.
std::vector<Piece> find_pieces(const int64_t* lengths, const bool* resets, int64_t timesteps,
                               int64_t batch) {
  std::vector<Piece> pieces;
  pieces.reserve(static_cast<size_t>(batch));
  for (int64_t row = 0; row < batch; row++) {
    const int64_t end = lengths ? lengths[row] : timesteps;
    STD_TORCH_CHECK(end >= 0 && end <= timesteps, "lengths: expected values from 0 to ", timesteps,
                    ", got ", end);
    int64_t start = 0;
    // Without resets straight to the end, which may be far in a sequence that is expanded.
    for (int64_t t = resets ? 1 : end; 0 < t && t <= end; t++) {
      if (t < end && !resets[t * batch + row]) continue;
      const bool afresh = start > 0 || (resets && resets[row]);
      pieces.push_back({row, start, t - start, start == 0, t == end, afresh});
      start = t;
    }
  }
  return pieces;
}

// The longest first, those of equal length in the order they had.
std::vector<Piece> sorted(const std::vector<Piece>& pieces, const std::vector<int64_t>& sizes) {
  // Of the pieces that have step l, those that are longer come before a piece of length l.
  std::vector<int64_t> next(sizes.size() + 1, 0);
  for (size_t length = 1; length < sizes.size(); length++) next[length] = sizes[length];
  std::vector<Piece> result(pieces.size());
  for (const Piece& piece : pieces) {
    result[static_cast<size_t>(next[static_cast<size_t>(piece.length)]++)] = piece;
  }
  return result;
}

// How many pieces have each timestep.
std::vector<int64_t> step_sizes(const std::vector<Piece>& pieces) {
  int64_t longest = 0;
  for (const Piece& piece : pieces) longest = std::max(longest, piece.length);
  std::vector<int64_t> sizes(static_cast<size_t>(longest), 0);
  for (const Piece& piece : pieces) sizes[static_cast<size_t>(piece.length - 1)]++;
  for (size_t t = sizes.size(); t-- > 1;) sizes[t - 1] += sizes[t];
  return sizes;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cut_op(std::optional<Tensor> lengths,
                                                  std::optional<Tensor> resets, int64_t timesteps,
                                                  int64_t batch, bool batch_first) {
  STD_TORCH_CHECK(timesteps >= 0 && batch >= 0, "timesteps, batch: expected sizes, got ", timesteps,
                  " and ", batch);
  if (lengths) {
    STD_TORCH_CHECK(lengths->is_cpu(), "lengths: expected a CPU tensor");
    check_dense(*lengths, "lengths", ScalarType::Long, {batch});
  }
  if (resets) {
    STD_TORCH_CHECK(resets->is_cpu(), "resets: expected a CPU tensor");
    check_dense(*resets, "resets", ScalarType::Bool, {timesteps, batch});
  }
  const std::vector<Piece> found = find_pieces(
      lengths ? lengths->const_data_ptr<int64_t>() : nullptr,
      resets ? static_cast<const bool*>(resets->const_data_ptr()) : nullptr, timesteps, batch);
  const std::vector<int64_t> sizes = step_sizes(found);
  const std::vector<Piece> pieces = sorted(found, sizes);
  const auto count = static_cast<int64_t>(pieces.size());
  int64_t rows = 0;
  for (int64_t size : sizes) rows += size;

  const auto integers = [](std::initializer_list<int64_t> shape) {
    return empty(shape, aoti_torch_dtype_int64());
  };
  Tensor batch_sizes = integers({static_cast<int64_t>(sizes.size())}), index = integers({rows});
  Tensor sources = integers({2, count}), finals = integers({2, batch});
  std::copy(sizes.begin(), sizes.end(), batch_sizes.mutable_data_ptr<int64_t>());
  const int64_t of_step = batch_first ? 1 : batch, of_row = batch_first ? timesteps : 1;
  int64_t* at = index.mutable_data_ptr<int64_t>();
  for (size_t step = 0; step < sizes.size(); step++) {
    for (int64_t i = 0; i < sizes[step]; i++) {
      const Piece& piece = pieces[static_cast<size_t>(i)];
      *at++ = (piece.start + static_cast<int64_t>(step)) * of_step + piece.row * of_row;
    }
  }
  int64_t* source = sources.mutable_data_ptr<int64_t>();
  int64_t* final = finals.mutable_data_ptr<int64_t>();
  for (int64_t row = 0; row < batch; row++) final[row] = final[batch + row] = count + row;
  for (int64_t i = 0; i < count; i++) {
    const Piece& piece = pieces[static_cast<size_t>(i)];
    source[i] = piece.row + (piece.afresh ? batch : 0);
    source[count + i] = piece.row + (piece.last ? 0 : batch);
    if (piece.last) final[piece.row] = i;
    if (piece.first) final[batch + piece.row] = i;
  }
  return {batch_sizes, index, sources, finals};
}

// How many rows an index has, each within `count`.
int64_t check_index(const Tensor& index, int64_t count) {
  STD_TORCH_CHECK(index.is_cpu() && index.dim() == 1, "index: expected a 1-D CPU tensor");
  check_dense(index, "index", ScalarType::Long, {index.size(0)});
  const int64_t* at = index.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < index.size(0); i++) {
    STD_TORCH_CHECK(at[i] >= 0 && at[i] < count, "index: expected values from 0 to ", count - 1,
                    ", got ", at[i]);
  }
  return index.size(0);
}

int64_t check_rows(const Tensor& rows) {
  STD_TORCH_CHECK(rows.is_cpu() && rows.dim() == 2, "rows: expected a 2-D CPU tensor");
  check_dense(rows, "rows", ScalarType::Float, {rows.size(0), rows.size(1)});
  return rows.size(1);
}

// Threads take so many bytes of rows at least.
constexpr int64_t kBytesToCopy = 64 << 10;

template <class Body>
void for_each_row(int64_t rows, int64_t row_bytes, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kBytesToCopy / std::max<int64_t>(1, row_bytes));
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) body(row);
  };
  if (rows <= grain) return run(0, rows);
  torch_threads().run(rows, grain, run);
}

Tensor gather_rows_op(const Tensor& rows, const Tensor& index) {
  const int64_t width = check_rows(rows), count = check_index(index, rows.size(0));
  Tensor gathered = empty({count, width});
  const int64_t* at = index.const_data_ptr<int64_t>();
  const float* from = rows.const_data_ptr<float>();
  float* to = gathered.mutable_data_ptr<float>();
  for_each_row(count, width * static_cast<int64_t>(sizeof(float)),
               [&](int64_t row) { std::copy_n(from + at[row] * width, width, to + row * width); });
  return gathered;
}

Tensor spread_rows_op(const Tensor& rows, const Tensor& index, int64_t count) {
  STD_TORCH_CHECK(count >= 0, "count: expected a number of rows, got ", count);
  const int64_t width = check_rows(rows), given = check_index(index, count);
  STD_TORCH_CHECK(given == rows.size(0), "index: expected shape [", rows.size(0), "], got [", given,
                  "]");
  std::vector<int64_t> sources(static_cast<size_t>(count), -1);
  const int64_t* at = index.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < given; i++) sources[static_cast<size_t>(at[i])] = i;
  Tensor spread = empty({count, width});
  const float* from = rows.const_data_ptr<float>();
  float* to = spread.mutable_data_ptr<float>();
  for_each_row(count, width * static_cast<int64_t>(sizeof(float)), [&](int64_t row) {
    const int64_t source = sources[static_cast<size_t>(row)];
    if (source < 0) {
      std::fill_n(to + row * width, width, 0.0f);
    } else {
      std::copy_n(from + source * width, width, to + row * width);
    }
  });
  return spread;
}

}  // namespace
}  // namespace fused_rnn

// lengths int64 [B] or none, resets bool [T, B] or none. For K pieces of together M steps:
// batch_sizes [timesteps of the longest], index [M] into the rows of a padded batch as it lies in
// memory, sources [2, K], finals [2, B], all int64. gather_rows gives rows [index], spread_rows
// [count] rows of which these are the ones at `index`, each once, and others are zeros; of float32.
STABLE_TORCH_LIBRARY_FRAGMENT(fused_rnn_cpu, m) {
  m.def(
      "cut(Tensor? lengths, Tensor? resets, int timesteps, int batch, bool batch_first=False) -> "
      "(Tensor batch_sizes, Tensor index, Tensor sources, Tensor finals)");
  m.def("gather_rows(Tensor rows, Tensor index) -> Tensor");
  m.def("spread_rows(Tensor rows, Tensor index, int count) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fused_rnn_cpu, CompositeExplicitAutograd, m) {
  m.impl("cut", TORCH_BOX(&fused_rnn::cut_op));
  m.impl("gather_rows", TORCH_BOX(&fused_rnn::gather_rows_op));
  m.impl("spread_rows", TORCH_BOX(&fused_rnn::spread_rows_op));
}

#include "pieces.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "../tensor_checks.h"
#include "border.h"

namespace fused_rnn {
namespace {

// Row by row and from left to right.
std::vector<Piece> find_pieces(const PaddedRows& rows, const int64_t* lengths, const bool* resets) {
  std::vector<Piece> pieces;
  pieces.reserve(static_cast<size_t>(rows.batch));
  for (int64_t row = 0; row < rows.batch; row++) {
    // Within the sequence even if another thread changes it between the caller's look and this one.
    const int64_t end =
        lengths ? std::clamp<int64_t>(lengths[row], 0, rows.timesteps) : rows.timesteps;
    const auto is_reset = [&](int64_t t) {
      return resets && resets[t * rows.of_step + row * rows.of_row];
    };
    int64_t start = 0;
    // Without resets straight to the end, which may be far in a sequence that is expanded.
    for (int64_t t = resets ? 1 : end; 0 < t && t <= end; t++) {
      if (t < end && !is_reset(t)) continue;
      pieces.push_back({row, start, t - start, t == end, start > 0 || is_reset(0)});
      start = t;
    }
  }
  return pieces;
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

}  // namespace

Pieces::Pieces(const PaddedRows& rows, const int64_t* lengths, const bool* resets)
    : Pieces(rows, find_pieces(rows, lengths, resets)) {}

Pieces::Pieces(const PaddedRows& rows, const std::vector<Piece>& pieces)
    : rows_(rows), batch_sizes_(step_sizes(pieces)) {
  all_ = sorted(pieces, batch_sizes_);
  int64_t steps = 0;
  for (int64_t size : batch_sizes_) {
    offsets_.push_back(steps);
    steps += size;
  }
  index_.reserve(static_cast<size_t>(steps));
  for (size_t step = 0; step < batch_sizes_.size(); step++) {
    for (int64_t i = 0; i < batch_sizes_[step]; i++) {
      const Piece& piece = all_[static_cast<size_t>(i)];
      index_.push_back((piece.start + static_cast<int64_t>(step)) * rows.of_step +
                       piece.row * rows.of_row);
    }
  }
}

// What memory depends on is looked at: others may have stored the numbers meanwhile.
std::optional<Pieces> Pieces::saved(const PaddedRows& rows, const int64_t* numbers, int64_t count) {
  std::vector<Piece> pieces;
  for (const int64_t* n = numbers; n < numbers + count * kPieceNumbers; n += kPieceNumbers) {
    const bool fits = 0 <= n[0] && n[0] < rows.batch && 0 <= n[1] && n[1] < rows.timesteps &&
                      1 <= n[2] && n[2] <= rows.timesteps - n[1];
    if (!fits) return {};
    pieces.push_back({n[0], n[1], n[2], (n[3] & 1) != 0, (n[3] & 2) != 0});
  }
  return Pieces(rows, pieces);
}

void Pieces::save(int64_t* numbers) const {
  for (const Piece& piece : all_) {
    *numbers++ = piece.row;
    *numbers++ = piece.start;
    *numbers++ = piece.length;
    *numbers++ = (piece.last ? 1 : 0) + (piece.afresh ? 2 : 0);
  }
}

namespace {

using torch::headeronly::ScalarType;

std::tuple<Tensor, Tensor, Tensor, Tensor> cut_op(std::optional<Tensor> lengths,
                                                  std::optional<Tensor> resets, int64_t timesteps,
                                                  int64_t batch) {
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
  const int64_t* ends = lengths ? lengths->const_data_ptr<int64_t>() : nullptr;
  for (int64_t row = 0; ends && row < batch; row++) {
    STD_TORCH_CHECK(ends[row] >= 0 && ends[row] <= timesteps, "lengths: expected values from 0 to ",
                    timesteps, ", got ", ends[row]);
  }
  const PaddedRows rows(timesteps, batch, false);
  const Pieces pieces(rows, ends,
                      resets ? static_cast<const bool*>(resets->const_data_ptr()) : nullptr);
  const int64_t count = pieces.count();
  const auto integers = [](std::initializer_list<int64_t> shape) {
    return empty(shape, aoti_torch_dtype_int64());
  };
  const auto tensor_of = [&](const std::vector<int64_t>& numbers) {
    Tensor tensor = integers({static_cast<int64_t>(numbers.size())});
    std::copy(numbers.begin(), numbers.end(), tensor.mutable_data_ptr<int64_t>());
    return tensor;
  };
  Tensor sources = integers({2, count}), finals = integers({2, batch});
  int64_t* source = sources.mutable_data_ptr<int64_t>();
  int64_t* final = finals.mutable_data_ptr<int64_t>();
  for (int64_t d = 0; d < 2; d++) {
    for (int64_t row = 0; row < batch; row++) final[d * batch + row] = count + row;
    for (int64_t i = 0; i < count; i++) {
      const Piece& piece = pieces.all()[static_cast<size_t>(i)];
      *source++ = piece.row + (Pieces::starts_row(d, piece) ? 0 : batch);
      if (Pieces::ends_row(d, piece)) final[d * batch + piece.row] = i;
    }
  }
  return {tensor_of(pieces.batch_sizes()), tensor_of(pieces.index()), sources, finals};
}

}  // namespace
}  // namespace fused_rnn

// lengths int64 [B] or none, resets bool [T, B] or none. For K pieces of together M steps:
// batch_sizes [timesteps of the longest], index [M] into the rows of a padded batch as it lies in
// memory, sources [2, K], finals [2, B], all int64.
STABLE_TORCH_LIBRARY_FRAGMENT(fused_rnn_cpu, m) {
  m.def(
      "cut(Tensor? lengths, Tensor? resets, int timesteps, int batch) -> "
      "(Tensor batch_sizes, Tensor index, Tensor sources, Tensor finals)");
}

STABLE_TORCH_LIBRARY_IMPL(fused_rnn_cpu, CompositeExplicitAutograd, m) {
  m.impl("cut", TORCH_BOX(&fused_rnn::cut_op));
}

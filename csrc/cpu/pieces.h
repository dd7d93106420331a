// The pieces of a padded batch, see fused_rnn/backends/pieces.py, and what moves between its rows
// and theirs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "border.h"

namespace fused_rnn {

struct Piece {
  int64_t row, start, length;
  bool last;    // of its row
  bool afresh;  // whether it starts from the states after a reset

  bool first() const { return start == 0; }
};

// Where the steps of a padded batch lie: row b's step t is number t * of_step + b * of_row.
struct PaddedRows {
  int64_t timesteps, batch, of_step, of_row;

  PaddedRows(int64_t timesteps, int64_t batch, bool batch_first)
      : timesteps(timesteps),
        batch(batch),
        of_step(batch_first ? 1 : batch),
        of_row(batch_first ? timesteps : 1) {}
  int64_t count() const { return timesteps * batch; }
};

// All pieces of a batch: the rows of a packed one.
class Pieces {
 public:
  // Null lengths: every row has all timesteps; null resets: none. Lengths lie within the sequence.
  Pieces(const PaddedRows& rows, const int64_t* lengths, const bool* resets);
  // As `save` has left them; or nothing where they cannot be the pieces of these rows.
  static std::optional<Pieces> saved(const PaddedRows& rows, const int64_t* numbers, int64_t count);

  const std::vector<Piece>& all() const { return all_; }  // the longest first
  int64_t count() const { return static_cast<int64_t>(all_.size()); }
  const std::vector<int64_t>& batch_sizes() const { return batch_sizes_; }
  int64_t steps() const { return static_cast<int64_t>(index_.size()); }
  RowLayout layout() const {
    return {static_cast<int64_t>(batch_sizes_.size()), count(), batch_sizes_.data(),
            offsets_.data()};
  }

  // [steps] the number of each packed row among the padded ones.
  const std::vector<int64_t>& index() const { return index_; }
  void save(int64_t* numbers) const;

  // Rows [width] of a padded batch, packed; and packed ones among zeros.
  template <class T>
  void gather(const T* from, int64_t width, T* to) const {
    for_each_row(steps(), width, [&](int64_t row) {
      std::copy_n(from + index_[static_cast<size_t>(row)] * width, width, to + row * width);
    });
  }
  template <class T>
  void spread(const T* from, int64_t width, T* to) const {
    if (steps() < rows_.count()) fill_padding(width, to);
    for_each_row(steps(), width, [&](int64_t row) {
      std::copy_n(from + row * width, width, to + index_[static_cast<size_t>(row)] * width);
    });
  }

  // The states [D, K, width] that pieces start from, of the rows' [D, B, width].
  template <class T>
  void initial(const T* from, int64_t directions, int64_t width, T* to) const {
    of_rows(from, directions, width, to, starts_row);
  }

  // The states [D, B, width] that rows end with, of those of the pieces; rows without a step keep
  // `initial`, zeros where that is null.
  template <class T>
  void final(const T* from, const T* initial, int64_t directions, int64_t width, T* to) const {
    const int64_t states = directions * rows_.batch * width;
    initial ? std::copy_n(initial, states, to) : std::fill_n(to, states, T{});
    for_each_piece(directions, [&](int64_t d, int64_t i, const Piece& piece) {
      if (!ends_row(d, piece)) return;
      std::copy_n(from + (d * count() + i) * width, width,
                  to + (d * rows_.batch + piece.row) * width);
    });
  }

  // Backward of `final`: gradients of the pieces' states, those of `initial` staying with the rows.
  template <class T>
  void final_grads(const T* from, int64_t directions, int64_t width, T* to) const {
    of_rows(from, directions, width, to, ends_row);
  }

  // Backward of `initial`; rows without a step hand through those of `final`, zeros where that is
  // null.
  template <class T>
  void initial_grads(const T* from, const T* final, int64_t directions, int64_t width,
                     T* to) const {
    const int64_t states = directions * rows_.batch * width;
    final ? std::copy_n(final, states, to) : std::fill_n(to, states, T{});
    for_each_piece(directions, [&](int64_t d, int64_t i, const Piece& piece) {
      T* grad = to + (d * rows_.batch + piece.row) * width;
      if (starts_row(d, piece)) {
        std::copy_n(from + (d * count() + i) * width, width, grad);
      } else if (d == 0 ? piece.first() : piece.last) {
        std::fill_n(grad, width, T{});
      }
    });
  }

  // Whether a direction begins with the piece, with the states of the row; or ends with it.
  static bool starts_row(int64_t direction, const Piece& piece) {
    return direction == 0 ? !piece.afresh : piece.last;
  }
  static bool ends_row(int64_t direction, const Piece& piece) {
    return direction == 0 ? piece.last : piece.first();
  }

 private:
  Pieces(const PaddedRows& rows, const std::vector<Piece>& pieces);

  // body(direction, number of the piece, piece)
  template <class Body>
  void for_each_piece(int64_t directions, const Body& body) const {
    for (int64_t d = 0; d < directions; d++) {
      for (int64_t i = 0; i < count(); i++) body(d, i, all_[static_cast<size_t>(i)]);
    }
  }

  // [D, K, width] what is the rows', of those pieces it belongs to; else zeros.
  template <class T>
  void of_rows(const T* from, int64_t directions, int64_t width, T* to,
               bool (*belongs)(int64_t, const Piece&)) const {
    for_each_piece(directions, [&](int64_t d, int64_t i, const Piece& piece) {
      T* state = to + (d * count() + i) * width;
      if (belongs(d, piece)) {
        std::copy_n(from + (d * rows_.batch + piece.row) * width, width, state);
      } else {
        std::fill_n(state, width, T{});
      }
    });
  }

  template <class T>
  void fill_padding(int64_t width, T* to) const {
    std::vector<int64_t> lengths(static_cast<size_t>(rows_.batch), 0);
    for (const Piece& piece : all_) {
      int64_t& length = lengths[static_cast<size_t>(piece.row)];
      length = std::max(length, piece.start + piece.length);
    }
    for_each_row(rows_.batch, width * rows_.timesteps, [&](int64_t row) {
      for (int64_t t = lengths[static_cast<size_t>(row)]; t < rows_.timesteps; t++) {
        std::fill_n(to + (t * rows_.of_step + row * rows_.of_row) * width, width, T{});
      }
    });
  }

  PaddedRows rows_;
  std::vector<Piece> all_;
  std::vector<int64_t> batch_sizes_, offsets_;  // by the timestep of pieces
  std::vector<int64_t> index_;
};

}  // namespace fused_rnn

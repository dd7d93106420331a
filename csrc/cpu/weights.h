// A layer's flat list of weights: w_ih, w_hh[, b_ih, b_hh][, w_hr][, peephole][, norm] of each
// direction, norm being the gains of normalisations: ih [G*H], hh [G*H], and of an LSTM c [H] and
// with biases c_bias [H].
#pragma once

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "../tensor_checks.h"
#include "kernels.h"

namespace fused_rnn {

// The places of w_hr, peephole and norm among the fields of Weights.
constexpr size_t kProjection = 4, kPeephole = 5, kNorm = 6;

// Calls function(number in the list, direction, field of Weights, shape it must have) for each.
template <class F>
void for_each_weight(const LayerShape& s, size_t given, const char* name, const F& function) {
  const auto directions = static_cast<size_t>(s.directions);
  const size_t least = projected(s) ? 3 : 2, per_direction = given / directions;
  // Biases come in pairs.
  const size_t norm = s.normed ? 1 : 0;
  const size_t peephole = cell_sizes(s.cell).has_c ? (per_direction - norm - least) % 2 : 0;
  const size_t others = per_direction - norm - peephole;
  STD_TORCH_CHECK(
      given % directions == 0 && (others == least || others == least + 2), name, ": expected ",
      least, " tensors, or ", least + 2,
      " with biases, and one more each for an LSTM's peepholes and for gains, for each of ",
      s.directions, " directions, got ", given);
  const int64_t rows = cell_sizes(s.cell).gates * s.hidden;
  const int64_t of_c = cell_sizes(s.cell).has_c ? (others > least ? 2 : 1) * s.hidden : 0;
  for (size_t i = 0; i < given; i++) {
    const size_t d = i / per_direction, which = i % per_direction;
    if (norm && which == per_direction - 1) {
      function(i, d, kNorm, {2 * rows + of_c});
    } else if (which == others) {
      function(i, d, kPeephole, {3 * s.hidden});
    } else if (projected(s) && which == others - 1) {
      function(i, d, kProjection, {s.output, s.hidden});
    } else if (which < 2) {
      function(i, d, which, {rows, which == 0 ? s.input : s.output});
    } else {
      function(i, d, which, {rows});
    }
  }
}

// Of `count` numbers, where they are.
template <class T>
NormGainsOf<T> norm_gains(const LayerShape& s, T* data, int64_t count) {
  const int64_t rows = cell_sizes(s.cell).gates * s.hidden;
  NormGainsOf<T> gains{data, data + rows, nullptr, nullptr};
  if (count > 2 * rows) gains.c = data + 2 * rows;
  if (count > 2 * rows + s.hidden) gains.c_bias = gains.c + s.hidden;
  return gains;
}

// Of Weights or of their gradients; all but norm.
template <class Fields, class Data>
void set_field(Fields& fields, size_t which, Data* data) {
  const auto set = [data](auto& field) {
    field = static_cast<std::remove_reference_t<decltype(field)>>(data);
  };
  switch (which) {
    case 0:
      return set(fields.w_ih);
    case 1:
      return set(fields.w_hh);
    case 2:
      return set(fields.b_ih);
    case 3:
      return set(fields.b_hh);
    case kProjection:
      return set(fields.w_hr);
    default:
      return set(fields.peephole);
  }
}

}  // namespace fused_rnn

// One timestep of a layer whose W_hh does not fit on chip: the pointwise part, forward and
// backward, between products that are torch's. A thread has two units of one batch row.
//
// A cell with two products in a step runs twice in it: `kInner` before the second product, only to
// make its operand. What that run computes is computed again in the other, and not kept.
#pragma once

#include "../cells.h"
#include "elements.h"
#include "params.h"
#include "rows.h"

namespace fused_rnn {

// Where a thread stands.
struct StepPlace {
  int row, direction;
  int64_t unit;  // of the first of two
  int64_t state_at;

  FUSED_RNN_DEVICE_MEMBER StepPlace(const ScanRows& rows, int pitch) {
    const int ctas = step_ctas(pitch);
    row = block_x() / ctas;
    direction = block_y();
    unit = 2 * (static_cast<int64_t>(block_x() % ctas) * kStepThreads + thread_index());
    state_at = (direction * rows.batch + row) * pitch + unit;
  }
};

// Two numbers, zeros where there is no array.
template <class Element>
FUSED_RNN_DEVICE void load_pair(const void* array, int64_t at, float (&v)[2]) {
  v[0] = v[1] = 0.0f;
  if (array) Element::load_pair(static_cast<const typename Element::Stored*>(array) + at, v);
}

template <class Element>
FUSED_RNN_DEVICE void store_pair(void* array, int64_t at, const float (&v)[2]) {
  Element::store_pair(static_cast<typename Element::Stored*>(array) + at, v);
}

// Which step this is. The kernel that ends it says which one follows, `by` further.
template <bool kInner>
FUSED_RNN_DEVICE int step_of(const StepNumber& number, int by) {
  const int64_t step = number.now ? *number.now : number.value;
  const bool tells = !kInner && number.next && block_x() == 0 && block_y() == 0;
  if (tells && thread_index() == 0) *number.next = step + by;
  return static_cast<int>(step);
}

template <class Cell>
constexpr bool kHasInnerProduct =
    requires(typename Cell::Value v) { Cell::forward_candidate(v, v, v, v, v); };
// How many gates have their part of W_hh in the first product.
template <class Cell>
constexpr int kOuterGates = kHasInnerProduct<Cell> ? 2 : Cell::kGates;

template <class Cell, class Element, bool kInner>
FUSED_RNN_KERNEL(kStepThreads)
step_forward(const ForwardStep step) {
  constexpr int kGates = Cell::kGates, kSaved = Cell::kSavedGates;
  constexpr int kOuter = kOuterGates<Cell>;
  const ForwardParams& p = step.scan;
  const int s = step_of<kInner>(step.number, 1);
  const StepPlace at(p.rows, p.pitch);
  if (at.unit >= p.pitch) return;
  const int64_t pitch = p.pitch;
  const RowsView rows{p.rows, 0, at.direction == 1, static_cast<int>(p.rows.timesteps)};
  const int length = rows.length_of(at.row);

  // The states before the step.
  float h[2], state[2] = {};
  const bool first = s < 0;
  load_pair<Element>(first ? p.h0 : p.h_n, at.state_at, h);
  if (Cell::kHasC) load_pair<FloatElement>(first ? p.c0 : p.c_n, at.state_at, state);
  if (Cell::kUsesPreviousH) {
    load_pair<FloatElement>(first ? nullptr : step.h, at.state_at, state);
    if (first) state[0] = h[0], state[1] = h[1];
  }

  if (!first) {
    const int64_t t = rows.time(s);
    const bool taken = t < length;
    float out[2] = {}, c[2] = {}, saved[kSaved > 0 ? kSaved : 1][2] = {}, operand[2] = {};
    if (taken) {
      const int64_t row_at = at.direction * p.rows.count + rows.index(t, at.row);
      float gx[kGates][2], gh[kGates][2], b_hn[2];
      FUSED_RNN_UNROLL
      for (int q = 0; q < kGates; q++) {
        load_pair<Element>(p.gx, (row_at * kGates + q) * pitch + at.unit, gx[q]);
        const int64_t product_at = (at.direction * p.rows.batch + at.row) * kOuter + q;
        if (q < kOuter) {
          load_pair<FloatElement>(step.products, product_at * pitch + at.unit, gh[q]);
        } else {
          load_pair<FloatElement>(kInner ? nullptr : step.inner, at.state_at, gh[q]);
        }
      }
      load_pair<FloatElement>(p.b_hn, at.direction * pitch + at.unit, b_hn);
      FUSED_RNN_UNROLL
      for (int e = 0; e < 2; e++) {
        if (at.unit + e >= p.hidden) continue;  // padding stays zero
        float gx_of[kGates], gh_of[kGates], values[4] = {};
        FUSED_RNN_UNROLL
        for (int q = 0; q < kGates; q++) {
          gx_of[q] = gx[q][e];
          gh_of[q] = gh[q][e];
        }
        if constexpr (kHasInnerProduct<Cell>) {
          operand[e] = Cell::forward_gates(gx_of, gh_of, state[e], values[0], values[1]);
          out[e] = Cell::forward_candidate(gx_of[2], gh_of[2], state[e], values[1], values[2]);
        } else {
          if (Cell::kUsesPreviousH) gh_of[kGates - 1] += b_hn[e];
          out[e] = Cell::forward(gx_of, gh_of, state[e], state[e], values);
        }
        if (Cell::kUsesPreviousH) state[e] = out[e];
        h[e] = out[e];
        c[e] = state[e];
        FUSED_RNN_UNROLL
        for (int q = 0; q < kSaved; q++) saved[q][e] = values[q];
      }
    }
    if constexpr (kInner) {
      store_pair<Element>(step.inner_operand, at.state_at, operand);
      return;
    }
    if (rows.stored(length, at.row, t)) {
      const int64_t row = rows.index(t, at.row), row_at = at.direction * p.rows.count + row;
      store_pair<Element>(p.y, (row * p.directions + at.direction) * pitch + at.unit, out);
      FUSED_RNN_UNROLL
      for (int q = 0; q < kSaved; q++) {
        if (p.gates) {
          store_pair<Element>(p.gates, (row_at * kSaved + q) * pitch + at.unit, saved[q]);
        }
      }
      if (Cell::kHasC && p.cells) store_pair<FloatElement>(p.cells, row_at * pitch + at.unit, c);
    }
  }
  if constexpr (kInner) return;

  if (rows.begins(length, at.row, s + 1)) {
    load_pair<Element>(p.reset_h, at.state_at, h);
    if (Cell::kHasC) load_pair<FloatElement>(p.reset_c, at.state_at, state);
    if (Cell::kUsesPreviousH) state[0] = h[0], state[1] = h[1];
  }
  store_pair<Element>(p.h_n, at.state_at, h);
  if (Cell::kHasC) store_pair<FloatElement>(p.c_n, at.state_at, state);
  if (Cell::kUsesPreviousH) store_pair<FloatElement>(step.h, at.state_at, state);
}

template <class Cell, class Element, bool kInner>
FUSED_RNN_KERNEL(kStepThreads)
step_backward(const BackwardStep step) {
  constexpr int kSaved = Cell::kSavedGates, kGrads = Cell::kGradGates;
  constexpr int kOuter = kOuterGates<Cell>;
  const BackwardParams& p = step.scan;
  const int s = step_of<kInner>(step.number, -1);
  const StepPlace at(p.rows, p.pitch);
  if (at.unit >= p.pitch) return;
  const int64_t pitch = p.pitch;
  const RowsView rows{p.rows, 0, at.direction == 1, static_cast<int>(p.rows.timesteps)};
  const int length = rows.length_of(at.row);
  const bool last = s + 1 == rows.steps;  // of the forward scan, hence the first here

  // Gradients of the states after the step, but for what comes from y.
  float held[2], grad_c[2] = {}, sum[2];
  load_pair<FloatElement>(last ? p.grad_h_n : p.grad_h0, at.state_at, held);
  if (Cell::kHasC) load_pair<FloatElement>(last ? p.grad_c_n : p.grad_c0, at.state_at, grad_c);
  // Where the row did not take the step after this one, nothing comes back from it.
  if (!last && rows.time(s + 1) < length) {
    load_pair<FloatElement>(step.products, at.state_at, sum);
    held[0] += sum[0];
    held[1] += sum[1];
  }
  // The state after a step had no successor: what arrives is the fresh one's.
  if (rows.begins(length, at.row, s + 1)) {
    if (!kInner) {
      if (p.grad_reset_h) {
        load_pair<FloatElement>(p.grad_reset_h, at.state_at, sum);
        sum[0] += held[0], sum[1] += held[1];
        store_pair<FloatElement>(p.grad_reset_h, at.state_at, sum);
      }
      if (Cell::kHasC && p.grad_reset_c) {
        load_pair<FloatElement>(p.grad_reset_c, at.state_at, sum);
        sum[0] += grad_c[0], sum[1] += grad_c[1];
        store_pair<FloatElement>(p.grad_reset_c, at.state_at, sum);
      }
    }
    held[0] = held[1] = grad_c[0] = grad_c[1] = 0.0f;
  }

  if (s >= 0) {
    const int64_t t = rows.time(s), before = t + (rows.reverse ? 1 : -1);
    float grads[kGrads][2] = {};
    if (t < length) {
      const int64_t row = rows.index(t, at.row), row_at = at.direction * p.rows.count + row;
      const auto y_at = [&](int64_t of) {
        return (of * p.directions + at.direction) * pitch + at.unit;
      };
      float values[kSaved > 0 ? kSaved : 1][2], arriving[2], from_cells[2], inner[2] = {};
      FUSED_RNN_UNROLL
      for (int q = 0; q < kSaved; q++) {
        load_pair<Element>(p.gates, (row_at * kSaved + q) * pitch + at.unit, values[q]);
      }
      load_pair<Element>(p.grad_y, y_at(row), arriving);
      load_pair<FloatElement>(p.grad_cells, row_at * pitch + at.unit, from_cells);
      if (kHasInnerProduct<Cell> && !kInner) {
        load_pair<FloatElement>(step.inner, at.state_at, inner);
      }
      // The states before and after it, as far as the cell wants them.
      float h[2] = {}, h_before[2] = {}, c[2] = {}, c_before[2] = {};
      const bool fresh = rows.begins(length, at.row, s);
      const bool has_before = before >= 0 && before < length;
      const int64_t row_before = has_before && !fresh ? rows.index(before, at.row) : 0;
      if constexpr (Cell::kHasC) {
        load_pair<FloatElement>(p.cells, row_at * pitch + at.unit, c);
        if (fresh || !has_before) {
          load_pair<FloatElement>(fresh ? p.reset_c : p.c0, at.state_at, c_before);
        } else {
          const int64_t from = at.direction * p.rows.count + row_before;
          load_pair<FloatElement>(p.cells, from * pitch + at.unit, c_before);
        }
      } else if constexpr (Cell::kUsesPreviousH) {
        if (fresh || !has_before) {
          load_pair<Element>(fresh ? p.reset_h : p.h0, at.state_at, h_before);
        } else {
          load_pair<Element>(p.y, y_at(row_before), h_before);
        }
      } else {
        load_pair<Element>(p.y, y_at(row), h);
      }
      FUSED_RNN_UNROLL
      for (int e = 0; e < 2; e++) {
        if (at.unit + e >= p.hidden) continue;
        float saved[4] = {}, factors[Cell::kFactors], of_gates[kGrads];
        FUSED_RNN_UNROLL
        for (int q = 0; q < kSaved; q++) saved[q] = values[q][e];
        float carry = grad_c[e] + from_cells[e];
        Cell::factors(saved, h[e], h_before[e], c[e], c_before[e], factors);
        Cell::backward(factors, held[e] + arriving[e], carry, of_gates);
        if constexpr (kHasInnerProduct<Cell>) {
          of_gates[0] = Cell::backward_reset(saved[0], h_before[e], inner[e], carry);
        }
        held[e] = Cell::kUsesPreviousH ? carry : 0.0f;
        grad_c[e] = Cell::kHasC ? carry : 0.0f;
        FUSED_RNN_UNROLL
        for (int q = 0; q < kGrads; q++) grads[q][e] = of_gates[q];
      }
    }
    if constexpr (kInner) {
      store_pair<Element>(step.inner_operand, at.state_at, grads[kGrads - 1]);
      return;
    }
    if (rows.stored(length, at.row, t)) {
      const int64_t row_at = at.direction * p.rows.count + rows.index(t, at.row);
      FUSED_RNN_UNROLL
      for (int q = 0; q < kGrads; q++) {
        store_pair<Element>(p.grad_gates, (row_at * kGrads + q) * pitch + at.unit, grads[q]);
      }
    }
    FUSED_RNN_UNROLL
    for (int q = 0; q < kOuter; q++) {
      const int64_t operand_at = (at.direction * p.rows.batch + at.row) * kOuter;
      store_pair<Element>(step.operand, (operand_at + gate_of_grad<Cell>(q)) * pitch + at.unit,
                          grads[q]);
    }
  }
  if constexpr (kInner) return;
  store_pair<FloatElement>(p.grad_h0, at.state_at, held);
  if (Cell::kHasC) store_pair<FloatElement>(p.grad_c0, at.state_at, grad_c);
}

}  // namespace fused_rnn

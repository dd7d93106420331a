// The backward scan: against the order of the forward scan, with W_hh transposed on chip. A CTA
// owns the same units as in the forward scan. In a cluster the gradients of its gates never leave
// it, but the sum over all gate rows that makes the gradient of h does, in one part from each CTA.
// In a grid it is the other way round: every CTA reads the gradients of all gates and keeps its
// sums.
#pragma once

#include "../cells.h"
#include "cluster_messages.h"
#include "elements.h"
#include "gather.h"
#include "params.h"
#include "rows.h"

namespace fused_rnn {

template <class Cell, class Element, class Tile, CellKind kind>
FUSED_RNN_KERNEL(Tile::warps* kWarp)
scan_backward(const BackwardParams p) {
  static_assert(is_whole(Tile::value, kind, Element::kBytes));
  constexpr BackwardLayout kLayout = layout_of(Tile::value, kind, Element::kBytes);
  constexpr int kGates = Cell::kGates, kGrads = Cell::kGradGates, kSaved = Cell::kSavedGates;
  constexpr int kBlocks = Tile::row_blocks, kItems = kLayout.items_per_warp;
  constexpr int kProducts = kLayout.products, kWords = Element::kWords;
  constexpr int kBlockWords = kWarp * kWords, kBlockBytes = block_bytes(Element::kBytes);
  constexpr int kGroupsPerStep = step_depth(Element::kBytes) / kGroup;
  constexpr int kRowGroups = kLayout.row_groups;
  constexpr bool kGrid = Tile::grid, kAlone = Tile::cluster == 1;
  constexpr bool kCluster = !kGrid && !kAlone;
  using Stored = typename Element::Stored;

#if !FUSED_RNN_HAS_CLUSTERS
  if constexpr (kCluster) return;  // the planner never asks for it
#endif
  FUSED_RNN_SHARED(shared);
  constexpr int kSlotsAt = kLayout.weights_bytes;
  constexpr int kGradsAt = kSlotsAt + kLayout.buffers * kLayout.slot_bytes;
  constexpr int kRingAt = kGradsAt + kLayout.buffers * kLayout.grads_bytes;
  constexpr int kStageAt = kRingAt + kLayout.ring_bytes;
  constexpr int kBarriersAt = kLayout.shared_bytes - kBarrierBytes;
  const uint32_t shared_at = shared_address(shared);
  const uint32_t barriers_at = shared_at + kBarriersAt;
  Fragment* weights_memory = reinterpret_cast<Fragment*>(shared);

  const int warp = warp_index();
  int lane = lane_index();
  const bool has_items = warp < kLayout.item_warps;
  const int rank = kCluster ? static_cast<int>(cluster_rank()) : block_x() % Tile::cluster;
  const int tile = block_x() / Tile::cluster;  // of the launch
  const int first_tile = kGrid ? p.exchange.first_tile : 0;
  const int direction = block_y() + (kGrid ? p.exchange.first_direction : 0);
  const TileRows<kBlocks> rows(p.rows, (first_tile + tile) * kGroup * kBlocks, direction == 1);
  // Message steps - s, in a grid, is the gradients of all gates at step s.
  const Exchange<Element, kLayout.message_bytes> exchange(
      p.exchange, tile, reinterpret_cast<uint32_t*>(shared + kBarriersAt));
  const int64_t pitch = p.pitch;
  const int group0 = rank * kLayout.groups;  // of this CTA

  const Stored* w_hh = static_cast<const Stored*>(p.w_hh[direction]);
  const int64_t y_pitch = p.directions * pitch;
  const Stored* y = static_cast<const Stored*>(p.y) + direction * pitch;
  const Stored* grad_y =
      p.grad_y ? static_cast<const Stored*>(p.grad_y) + direction * pitch : nullptr;
  const Stored* gates =
      static_cast<const Stored*>(p.gates) + direction * p.rows.count * kSaved * pitch;
  const float* cells = Cell::kHasC ? p.cells + direction * p.rows.count * pitch : nullptr;
  Stored* grad_gates =
      static_cast<Stored*>(p.grad_gates) + direction * p.rows.count * kGrads * pitch;
  const int64_t states_at = direction * p.rows.batch * pitch;

  // Of each warp some 16-unit columns of W_hh, over the CTA's gate rows. CTAs begin at their own
  // units, so that at no time all send to the same. In a grid: the CTA's own columns, over the
  // warp's part of all gate rows.
  constexpr int kAllProducts = Tile::hidden / (2 * kGroup);
  const int product0 = (warp * kProducts + rank * kAllProducts / Tile::cluster) % kAllProducts;
  const auto product = [&](int i) {
    const int at = product0 + i;
    return at >= kAllProducts ? at - kAllProducts : at;
  };
  const int row_group0 = kGrid ? warp * kLayout.k_steps * kGroupsPerStep : group0 * kGates;
  const auto fragment = [&](int step, int i) {
    return Element::fragment_transposed(
        [&](int half, int row_in_group) -> const Stored* {
          const int within = step * kGroupsPerStep + half, index = row_group0 + within;
          const int unit = index / kGates * kGroup + row_in_group;
          if ((!kGrid && within >= kRowGroups) || unit >= pitch) return nullptr;
          return w_hh + (gate_of_grad<Cell>(index % kGates) * pitch + unit) * pitch;
        },
        kGrid ? (group0 + 2 * i) * kGroup : product(i) * 2 * kGroup, p.pitch);
  };
  Fragment weights[Tile::register_steps > 0 ? Tile::register_steps : 1][kProducts];
  FUSED_RNN_UNROLL
  for (int k = 0; k < Tile::register_steps; k++) {
    FUSED_RNN_UNROLL
    for (int i = 0; i < kProducts; i++) weights[k][i] = fragment(k, i);
    warp_sync();  // keeps the loads of one step from those of the next, which would spill
  }
  Fragment* shared_weights =
      weights_memory + warp * kLayout.shared_steps * kProducts * kWarp + lane;
#pragma unroll 1
  for (int k = 0; k < kLayout.shared_steps; k++) {
    for (int i = 0; i < kProducts; i++) {
      shared_weights[(k * kProducts + i) * kWarp] = fragment(Tile::register_steps + k, i);
    }
  }
  if (kGrid) exchange.start();
  if (kCluster && thread_index() == 0) {
    barrier_init(barriers_at, 1);
    barrier_init(barriers_at + 8, 1);
    barrier_init_fence();
  }

  // Item j of a warp: a unit group of this CTA by a row block.
  const auto group_of = [&](int j) { return (warp * kItems + j) / kBlocks; };
  const auto block_of = [&](int j) { return (warp * kItems + j) % kBlocks; };
  const auto unit_of = [&](int j) { return (group0 + group_of(j)) * kGroup + (lane >> 2); };
  const auto group_is_there = [&](int group) { return (group0 + group) * kGroup < p.pitch; };
  const auto row_of = [&](int j, int e) { return block_of(j) * kGroup + 2 * (lane & 3) + e; };
  const auto state_index = [&](int j, int e) {
    return states_at + (rows.first + row_of(j, e)) * pitch + unit_of(j);
  };
  const auto cell_index = [&](const Timestep& at, int j, int e) {
    return (at.row0 + row_of(j, e)) * pitch + unit_of(j);
  };

  // In lane order: lengths (0 for units that are padding), the gradients that wait for a row's
  // next live step, and LSTM's c after the step at hand.
  int length[kItems][2];
  float held[kItems][2], grad_c[kItems][2], c[kItems][2];
  // Bit 2 * j + e: whether the step at hand, and the one after it, began from a fresh state.
  uint32_t anew = 0, began = 0;
  FUSED_RNN_UNROLL
  for (int j = 0; j < kItems; j++) {
    FUSED_RNN_UNROLL
    for (int e = 0; e < 2; e++) {
      const bool real = has_items && unit_of(j) < p.hidden;
      length[j][e] = real ? rows.length_of(row_of(j, e)) : 0;
      const bool there = real && rows.first + row_of(j, e) < p.rows.batch;
      held[j][e] = there && p.grad_h_n ? p.grad_h_n[state_index(j, e)] : 0.0f;
      grad_c[j][e] = there && p.grad_c_n ? p.grad_c_n[state_index(j, e)] : 0.0f;
      c[j][e] = 0.0f;
      if (rows.begins(length[j][e], row_of(j, e), rows.steps - 1)) anew |= 1u << (2 * j + e);
      const int64_t t = rows.time(rows.steps - 1);
      if (Cell::kHasC && t >= 0 && t < length[j][e]) {
        c[j][e] = cells[cell_index(rows.timestep(t), j, e)];
      }
    }
  }

  // Gradients of the gates at steps that no row of the tile takes.
  const auto store = [&](const Timestep& at, int group, int q, int n, const uint32_t* words) {
    FUSED_RNN_UNROLL
    for (int w = 0; w < kWords; w++) {
      const int row = n * kGroup + Element::row(w);
      if (!group_is_there(group) || !rows.stored(row, at.t)) continue;
      Stored* first = grad_gates + ((at.row0 + row) * kGrads + q) * pitch +
                      (group0 + group) * kGroup + Element::column();
      *reinterpret_cast<uint32_t*>(first) = words[w];
    }
  };
  if (!p.rows.offsets) {
    const uint32_t zeros[kWords] = {};
    for (int64_t t = rows.steps; t < p.rows.timesteps; t++) {
      const Timestep now = rows.timestep(t);
      for (int i = warp; i < kLayout.items * kGrads; i += Tile::warps) {
        store(now, i / kBlocks / kGrads, i / kBlocks % kGrads, i % kBlocks, zeros);
      }
    }
  }

  block_sync();
  if (kCluster) cluster_sync();

  // What the pointwise part of step s reads, on its way into the ring: the saved gates; the state
  // before the step, or where that is of no use after it; the gradient of y.
  const auto ring_item = [&](int s, int j) {
    const int slot = s & (Tile::ring - 1);
    return shared_at + kRingAt + (slot * kLayout.items + warp * kItems + j) * kLayout.item_bytes;
  };
  const auto prefetch = [&](int s) {
    if (has_items && s >= 0) {
      constexpr int kPieces = Element::kBytes / 2;  // of 16 bytes, in a row of a block
      const Timestep now = rows.timestep(rows.time(s));
      const int64_t t_before = now.t + (rows.reverse ? 1 : -1);
      const bool has_before = t_before >= 0 && t_before < rows.steps;
      const Timestep before = rows.timestep(has_before ? t_before : now.t);
      FUSED_RNN_UNROLL
      for (int j = 0; j < kItems; j++) {
        const uint32_t item = ring_item(s, j);
        const int n = block_of(j), row = n * kGroup + lane / kPieces % kGroup;
        const int length_of_row = rows.length_of(row);
        const int64_t group_at = (group0 + group_of(j)) * kGroup;
        const bool there = group_is_there(group_of(j)) && rows.exists(length_of_row, row, now.t);
        const int64_t index = there ? now.row0 + row : 0;
        FUSED_RNN_UNROLL
        for (int piece = lane; piece < kSaved * kGroup * kPieces; piece += kWarp) {
          const int64_t at = (index * kSaved + piece / (kGroup * kPieces)) * pitch + group_at +
                             piece % kPieces * 4;
          copy_async(item + piece * 16, gates + (there ? at : 0), there);
        }
        const uint32_t state_at = item + kSaved * kBlockBytes;
        if constexpr (Cell::kHasC) {
          // float32, whatever the elements are: two pieces in a row.
          if (lane < 2 * kGroup) {
            const int c_row = n * kGroup + lane / 2;
            // Also where step t itself is not taken: its c before is the next live step's c after.
            const bool c_there = group_is_there(group_of(j)) && rows.first + c_row < p.rows.batch;
            const int64_t column = group_at + lane % 2 * 4;
            const float* from = p.c0 + states_at + (rows.first + c_row) * pitch + column;
            if (has_before && before.t < rows.length_of(c_row)) {
              from = cells + (before.row0 + c_row) * pitch + column;
            }
            copy_async(state_at + lane * 16, c_there ? from : p.c0, c_there);
          }
        } else if (lane < kGroup * kPieces) {
          const int64_t column = group_at + lane % kPieces * 4;
          const Stored* from = y + index * y_pitch + column;
          if (Cell::kUsesPreviousH) {
            from = has_before && before.t < length_of_row
                       ? y + (before.row0 + row) * y_pitch + column
                       : static_cast<const Stored*>(p.h0) + states_at + (rows.first + row) * pitch +
                             column;
          }
          copy_async(state_at + lane * 16, there ? from : y, there);
        }
        if (lane < kGroup * kPieces) {
          const int64_t at = index * y_pitch + group_at + lane % kPieces * 4;
          const bool given = there && grad_y;
          copy_async(state_at + kLayout.state_bytes + lane * 16, given ? grad_y + at : y, given);
        }
      }
    }
    copy_commit();
  };

  // The state after a step had no successor: what arrives is the fresh one's.
  const auto give_to_fresh_state = [&](int j, int e) {
    if (p.grad_reset_h) p.grad_reset_h[state_index(j, e)] += held[j][e];
    if (Cell::kHasC && p.grad_reset_c) p.grad_reset_c[state_index(j, e)] += grad_c[j][e];
    held[j][e] = grad_c[j][e] = 0.0f;
  };

  // Parts of the gradient of h after step s, in the order of the CTAs or warps they come from.
  const auto received = [&](int s, int j, float (&sum)[2]) {
    const int buffer = kLayout.buffers == 1 ? 0 : s & 1;
    const float* slots =
        reinterpret_cast<const float*>(shared + kSlotsAt + buffer * kLayout.slot_bytes);
    sum[0] = sum[1] = 0.0f;
#pragma unroll 8
    for (int from = 0; from < kLayout.parts; from++) {
      const float2 part = reinterpret_cast<const float2*>(
          slots)[(from * kLayout.items + group_of(j) * kBlocks + block_of(j)) * kWarp + lane];
      sum[0] += part.x;
      sum[1] += part.y;
    }
  };
  const auto wait = [&](int s) {
    const int message = rows.steps - 2 - s;
    if (kCluster) barrier_wait<Order::acquire>(barriers_at + 8 * (s & 1), (message >> 1) & 1);
  };

  // In a grid: parts of the gradient of h after step s.
  const auto gather_for = [&](int s) {
    gather<Element, Tile, kind>(exchange, rows.steps - 1 - s, weights, shared_weights,
                                reinterpret_cast<uint32_t*>(shared + kStageAt),
                                reinterpret_cast<float2*>(shared + kSlotsAt));
  };

  for (int i = 1; i < Tile::ring; i++) prefetch(rows.steps - i);
  // Across the grid a last turn, of step -1, only gathers: that code is too large to have twice.
  constexpr int kLastTurn = kGrid ? -1 : 0;
#pragma unroll 1
  for (int s = rows.steps - 1; s >= kLastTurn; s--) {
    warp_sync();  // every lane has read the slot that is filled next
    prefetch(s - Tile::ring + 1);
    const bool is_step = kLastTurn == 0 || s >= 0;
    const int64_t t = rows.time(s);
    const int buffer = kLayout.buffers == 1 ? 0 : s & 1;
    uint32_t* grads_now =
        reinterpret_cast<uint32_t*>(shared + kGradsAt + buffer * kLayout.grads_bytes);
    if (kCluster && thread_index() == 0) {
      barrier_expect(barriers_at + 8 * ((s + 1) & 1), kLayout.slot_bytes);
    }
    float factors[kItems][2][Cell::kFactors], arriving[kItems][2];
    uint32_t next_anew = 0;
    const auto prepare = [&](int j) {
      const uint32_t item = ring_item(s, j), state_at = item + kSaved * kBlockBytes;
      float saved[4][2] = {}, state[1][2], from_y[1][2];
      if constexpr (kSaved > 0) Element::template load_blocks<kSaved>(item, saved);
      if constexpr (Cell::kHasC) {
        FloatElement::load_blocks<1>(state_at, state);
      } else {
        Element::template load_blocks<1>(state_at, state);
      }
      Element::template load_blocks<1>(state_at + kLayout.state_bytes, from_y);
      FUSED_RNN_UNROLL
      for (int e = 0; e < 2; e++) {
        float values[4], before = state[0][e];
        FUSED_RNN_UNROLL
        for (int q = 0; q < 4; q++) values[q] = saved[q][e];
        if (s > 0 && rows.begins(length[j][e], row_of(j, e), s - 1)) {
          next_anew |= 1u << (2 * j + e);
        }
        if (anew >> (2 * j + e) & 1) {
          before = 0.0f;
          if (Cell::kHasC && p.reset_c) before = p.reset_c[state_index(j, e)];
          if (Cell::kUsesPreviousH && p.reset_h) {
            before = Element::to_float(static_cast<const Stored*>(p.reset_h) + state_index(j, e));
          }
        }
        Cell::factors(values, state[0][e], before, c[j][e], before, factors[j][e]);
        if (Cell::kHasC) c[j][e] = state[0][e];
        arriving[j][e] = from_y[0][e];
      }
    };
    if (has_items && is_step) {
      copy_wait<Tile::ring - 1>();
      warp_sync();
      if constexpr (!kAlone) {
        // While the sums are on their way; alone there is nothing to wait for, and what all items
        // prepare would only take registers.
        FUSED_RNN_UNROLL
        for (int j = 0; j < kItems; j++) prepare(j);
      }
    }
    if constexpr (kGrid) {
      if (s + 1 < rows.steps) gather_for(s);
      if (!is_step) break;
    }
    if (has_items) {
      if (s + 1 < rows.steps) wait(s);
      FUSED_RNN_UNROLL
      for (int j = 0; j < kItems; j++) {
        if constexpr (kAlone) prepare(j);
        float sum[2] = {};
        if (s + 1 < rows.steps) received(s, j, sum);
        float grads[2][kGrads];
        FUSED_RNN_UNROLL
        for (int e = 0; e < 2; e++) {
          const int64_t after = t + (rows.reverse ? -1 : 1);
          if (after < length[j][e] && after >= 0) held[j][e] += sum[e];
          if (began >> (2 * j + e) & 1) give_to_fresh_state(j, e);
          const bool taken = t < length[j][e];
          float carry = grad_c[j][e];
          if (Cell::kHasC && p.grad_cells && taken) {
            carry +=
                p.grad_cells[direction * p.rows.count * pitch + cell_index(rows.timestep(t), j, e)];
          }
          Cell::backward(factors[j][e], held[j][e] + arriving[j][e], carry, grads[e]);
          // Selects, not products: what was never saved may be NaN.
          if (taken) {
            held[j][e] = Cell::kUsesPreviousH ? carry : 0.0f;
            if (Cell::kHasC) grad_c[j][e] = carry;
          }
          FUSED_RNN_UNROLL
          for (int q = 0; q < kGrads; q++) grads[e][q] = taken ? grads[e][q] : 0.0f;
        }
        FUSED_RNN_UNROLL
        for (int q = 0; q < kGrads; q++) {
          const float v[2] = {grads[0][q], grads[1][q]};
          uint32_t words[kWords];
          Element::to_words(v, words);
          const int at = ((group_of(j) * kGrads + q) * kBlocks + block_of(j)) * kBlockWords;
          FUSED_RNN_UNROLL
          for (int w = 0; w < kWords; w++) grads_now[at + lane * kWords + w] = words[w];
          if (kGrid && q < kGates) {
            const int row_group = rank * kRowGroups + group_of(j) * kGates + q;
            exchange.put(rows.steps - s, row_group * kBlocks + block_of(j), words);
          }
        }
      }
      began = anew;
      anew = next_anew;
    }
    block_sync();  // the gradients of all the CTA's gates are there

    if constexpr (!kGrid) {
      constexpr int kTurns = turns<Element>(kProducts);
      typename Element::Sum sums[kTurns][kProducts][kBlocks];
      const auto multiply = [&](int step, const auto& weight) {
        const int index = step * kGroupsPerStep;
        const bool whole = index + 1 < kRowGroups;
        typename Element::Operand b[kBlocks];
        FUSED_RNN_UNROLL
        for (int n = 0; n < kBlocks; n++) {
          const auto block = [&](int index) {
            const int at = index / kGates * kGrads + index % kGates;
            return grads_now + (at * kBlocks + n) * kBlockWords;
          };
          b[n] = Element::operand(block(index), block(whole ? index + 1 : index), whole);
        }
        FUSED_RNN_UNROLL
        for (int i = 0; i < kProducts; i++) {
          const Fragment a = weight(i);
          FUSED_RNN_UNROLL
          for (int n = 0; n < kBlocks; n++) {
            Element::multiply(sums[step % kTurns][i][n], a, b[n]);
          }
        }
      };
      SharedWeights<Element, kLayout.shared_steps * kProducts> in_shared(shared_weights);
      FUSED_RNN_UNROLL
      for (int k = 0; k < Tile::register_steps; k++) {
        multiply(k, [&](int i) { return weights[k][i]; });
      }
      FUSED_RNN_UNROLL
      for (int k = 0; k < kLayout.shared_steps; k++) {
        multiply(Tile::register_steps + k,
                 [&](int i) { return in_shared.take(k * kProducts + i); });
      }
      const int slot_at = kSlotsAt + ((s + 1) & 1) * kLayout.slot_bytes;
      FUSED_RNN_UNROLL
      for (int i = 0; i < kProducts; i++) {
        float totals[kBlocks][4];
        FUSED_RNN_UNROLL
        for (int n = 0; n < kBlocks; n++) finish(sums, i, n, totals[n]);
        if constexpr (kCluster) {
          const int group = product(i) * 2 + (lane & 1);
          const int owner = group / kLayout.groups, item = group % kLayout.groups * kBlocks;
          const uint32_t block = shared_at + slot_at + (rank * kLayout.items + item) * kWarp * 8;
          FUSED_RNN_UNROLL
          for (int n = 0; n < kBlocks; n++) {
            send_pairs(block + n * kWarp * 8, totals[n], barriers_at + 8 * ((s + 1) & 1), owner);
          }
        } else {
          FUSED_RNN_UNROLL
          for (int half = 0; half < 2; half++) {
            const int group = product(i) * 2 + half;
            FUSED_RNN_UNROLL
            for (int n = 0; n < kBlocks; n++) {
              const int at = slot_at + ((group * kBlocks + n) * kWarp + lane) * 8;
              *reinterpret_cast<float2*>(shared + at) =
                  make_float2(totals[n][2 * half], totals[n][2 * half + 1]);
            }
          }
        }
      }
    }

    const Timestep now = rows.timestep(t);
    for (int i = warp; i < kLayout.items * kGrads; i += Tile::warps) {
      store(now, i / kBlocks / kGrads, i / kBlocks % kGrads, i % kBlocks,
            grads_now + i * kBlockWords + lane * kWords);
    }
  }

  // The gradient of the state before the first step. To have received it also means that nothing
  // is on its way to this CTA when it leaves.
  lane = known_anew(lane);
  if (has_items) {
    if (rows.steps > 0) wait(-1);
    FUSED_RNN_UNROLL
    for (int j = 0; j < kItems; j++) {
      float sum[2] = {};
      if (rows.steps > 0) received(-1, j, sum);
      FUSED_RNN_UNROLL
      for (int e = 0; e < 2; e++) {
        const bool took = rows.reverse ? length[j][e] == rows.steps : length[j][e] > 0;
        if (took) held[j][e] += sum[e];
        if (began >> (2 * j + e) & 1) give_to_fresh_state(j, e);
        if (unit_of(j) < p.pitch && rows.first + row_of(j, e) < p.rows.batch) {
          p.grad_h0[state_index(j, e)] = held[j][e];
          if (Cell::kHasC) p.grad_c0[state_index(j, e)] = grad_c[j][e];
        }
      }
    }
  }
}

}  // namespace fused_rnn

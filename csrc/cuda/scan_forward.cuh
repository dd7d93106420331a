// The forward scan: CTAs, of a cluster or of the whole grid, keep W_hh on chip for the whole
// sequence and take a tile of batch rows through time. docs/cuda-kernels.md tells how, and why it
// needs no more barriers.
#pragma once

#include "cluster_messages.h"
#include "elements.h"
#include "exchange.h"
#include "params.h"
#include "rows.h"

namespace fused_rnn {

template <class Cell, class Element, class Tile>
FUSED_RNN_KERNEL(layout_of(Tile::value, Cell::kGates, Element::kBytes).threads)
scan_forward(const ForwardParams p) {
  static_assert(is_whole(Tile::value, Cell::kGates, Element::kBytes));
  constexpr ForwardLayout kLayout = layout_of(Tile::value, Cell::kGates, Element::kBytes);
  constexpr int kGates = Cell::kGates, kBlocks = Tile::row_blocks, kUnits = Tile::unit_groups;
  constexpr int kProducts = kLayout.products, kWords = Element::kWords;
  constexpr int kDepth = step_depth(Element::kBytes);
  constexpr int kBlockWords = kWarp * kWords;
  constexpr bool kGrid = Tile::grid, kAlone = Tile::cluster == 1;
  // Of a cell that goes on from h itself, which h0 and h_n have rounded.
  constexpr bool kHandsOnH = Cell::kUsesPreviousH && Element::kBytes == 2 && !kGrid;
  constexpr bool kCluster = !kGrid && !kAlone;
  using Stored = typename Element::Stored;

#if !FUSED_RNN_HAS_CLUSTERS
  if constexpr (kCluster) return;  // the planner never asks for it
#endif
  FUSED_RNN_SHARED(shared);
  const uint32_t weights_at = shared_address(shared);
  const uint32_t h_at = weights_at + kLayout.weights_bytes;
  const uint32_t ring_at = h_at + kLayout.h_buffers * kLayout.h_bytes;
  constexpr int kBarriersAt = kLayout.shared_bytes - kBarrierBytes;
  const uint32_t barriers_at = shared_address(shared) + kBarriersAt;
  Fragment* weights_memory = reinterpret_cast<Fragment*>(shared);
  uint32_t* h_memory = reinterpret_cast<uint32_t*>(shared + kLayout.weights_bytes);
  float4* partials = reinterpret_cast<float4*>(
      shared + kLayout.weights_bytes + kLayout.h_buffers * kLayout.h_bytes + kLayout.ring_bytes);

  const int warp = warp_index();
  int lane = lane_index();
  const int column = warp % kLayout.warp_columns, part = warp / kLayout.warp_columns;
  const bool leads = part == 0;  // the warp that does the pointwise part of its unit groups
  const int rank = kCluster ? static_cast<int>(cluster_rank()) : block_x() % Tile::cluster;
  const int tile = block_x() / Tile::cluster;  // of the launch
  const int first_tile = kGrid ? p.exchange.first_tile : 0;
  const int direction = block_y() + (kGrid ? p.exchange.first_direction : 0);
  const TileRows<kBlocks> rows(p.rows, (first_tile + tile) * kGroup * kBlocks, direction == 1);
  // Message s, in a grid, is h_s; each CTA has the first for itself.
  const Exchange<Element, kLayout.h_bytes> exchange(
      p.exchange, tile, reinterpret_cast<uint32_t*>(shared + kBarriersAt));
  const int64_t pitch = p.pitch;
  const int group0 = rank * kLayout.groups + column * kUnits;  // of this warp

  const Stored* gx = static_cast<const Stored*>(p.gx) + direction * p.rows.count * kGates * pitch;
  const Stored* w_hh = static_cast<const Stored*>(p.w_hh[direction]);
  Stored* y = static_cast<Stored*>(p.y) + direction * pitch;
  const int64_t y_pitch = p.directions * pitch;
  const int64_t states_at = direction * p.rows.batch * pitch;

  // W_hh: of each warp the gate rows of its unit groups, over its part of k.
  const auto fragment = [&](int step, int product) {
    return Element::fragment(
        [&](int half) -> const Stored* {
          const int index = 2 * product + half,
                    unit = (group0 + index / kGates) * kGroup + (lane >> 2);
          if (index >= kLayout.row_groups || unit >= pitch) return nullptr;
          return w_hh + (index % kGates * pitch + unit) * pitch;
        },
        (part * kLayout.k_steps + step) * kDepth, p.pitch);
  };
  Fragment weights[Tile::register_steps > 0 ? Tile::register_steps : 1][kProducts];
  FUSED_RNN_UNROLL
  for (int k = 0; k < Tile::register_steps; k++) {
    FUSED_RNN_UNROLL
    for (int i = 0; i < kProducts; i++) weights[k][i] = fragment(k, i);
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

  // States, in lane order: what h the next step starts from, rounded as it is sent; c or GRU's h.
  const LaneRows<Element, kBlocks> alive(rows);
  float h[kUnits][kBlocks][2], state[kUnits][kBlocks][2], b_hn[kUnits];
  const auto unit_of = [&](int j) { return (group0 + j) * kGroup + (lane >> 2); };
  const auto state_index = [&](int j, int row) { return states_at + row * pitch + unit_of(j); };
  const auto begin_anew = [&](int j, int n, int e) {
    const int64_t at = state_index(j, rows.first + alive.row(n, e));
    h[j][n][e] = p.reset_h ? Element::to_float(static_cast<const Stored*>(p.reset_h) + at) : 0.0f;
    if (Cell::kHasC) state[j][n][e] = p.reset_c ? p.reset_c[at] : 0.0f;
    if (Cell::kUsesPreviousH) state[j][n][e] = h[j][n][e];
  };
  FUSED_RNN_UNROLL
  for (int j = 0; j < kUnits; j++) {
    const bool real = unit_of(j) < p.hidden;
    b_hn[j] = real && p.b_hn ? p.b_hn[direction * pitch + unit_of(j)] : 0.0f;
    FUSED_RNN_UNROLL
    for (int n = 0; n < kBlocks; n++) {
      FUSED_RNN_UNROLL
      for (int e = 0; e < 2; e++) {
        const int row = rows.first + alive.row(n, e);
        const bool there = real && row < p.rows.batch;
        const int64_t at = there ? state_index(j, row) : 0;
        h[j][n][e] = there ? Element::to_float(static_cast<const Stored*>(p.h0) + at) : 0.0f;
        const bool is_wide = Cell::kHasC || (kHandsOnH && p.c0 != nullptr);
        state[j][n][e] = !there ? 0.0f : is_wide ? p.c0[at] : h[j][n][e];
        if (there && rows.begins(alive.length[n][e], alive.row(n, e), 0)) begin_anew(j, n, e);
      }
    }
  }

  // The first h goes to this CTA's own buffer: every CTA reads all of it for itself.
  for (int i = warp; i < Tile::hidden / kGroup * kBlocks; i += kLayout.threads / kWarp) {
    const int n = i % kBlocks, unit = i / kBlocks * kGroup + (lane >> 2);
    float v[2];
    FUSED_RNN_UNROLL
    for (int e = 0; e < 2; e++) {
      const int row = rows.first + alive.row(n, e);
      const bool there = unit < p.hidden && row < p.rows.batch;
      const bool anew = there && rows.begins(rows.length_of(alive.row(n, e)), alive.row(n, e), 0);
      const Stored* from = static_cast<const Stored*>(anew ? p.reset_h : p.h0);
      v[e] = there && from ? Element::to_float(from + states_at + row * pitch + unit) : 0.0f;
    }
    uint32_t words[kWords];
    Element::to_words(v, words);
    FUSED_RNN_UNROLL
    for (int w = 0; w < kWords; w++) h_memory[i * kBlockWords + lane * kWords + w] = words[w];
  }

  // A block of words to rows of a matrix; those of rows that are not there are left out.
  using Words = WordRows<Element, kBlocks>;
  const auto store = [&](Stored* to, int64_t to_pitch, const Words& at, int n,
                         const float (&v)[2]) {
    uint32_t words[kWords];
    Element::to_words(v, words);
    FUSED_RNN_UNROLL
    for (int w = 0; w < kWords; w++) {
      if (!at.stored[n][w]) continue;
      const int row = n * kGroup + Element::row(w);
      *reinterpret_cast<uint32_t*>(to + (at.row0 + row) * to_pitch + Element::column()) = words[w];
    }
  };
  const auto group_is_there = [&](int j) { return (group0 + j) * kGroup < p.pitch; };

  // The outputs of steps that no row of the tile takes.
  if (leads && !p.rows.offsets) {
    const float zeros[2] = {};
    for (int64_t t = rows.steps; t < p.rows.timesteps; t++) {
      const Words now(rows, t);
      FUSED_RNN_UNROLL
      for (int j = 0; j < kUnits; j++) {
        FUSED_RNN_UNROLL
        for (int n = 0; n < kBlocks; n++) {
          if (!group_is_there(j)) continue;
          const int64_t unit = (group0 + j) * kGroup;
          store(y + unit, y_pitch, now, n, zeros);
          if (Cell::kSavedGates > 0 && p.gates) {
            Stored* gates = static_cast<Stored*>(p.gates) +
                            direction * p.rows.count * Cell::kSavedGates * pitch + unit;
            FUSED_RNN_UNROLL
            for (int q = 0; q < Cell::kSavedGates; q++) {
              store(gates + q * pitch, Cell::kSavedGates * pitch, now, n, zeros);
            }
          }
          if (Cell::kHasC && p.cells) {
            FUSED_RNN_UNROLL
            for (int e = 0; e < 2; e++) {
              const int row = alive.row(n, e);
              if (rows.first + row >= p.rows.batch) continue;
              p.cells[(direction * p.rows.count + now.row0 + row) * pitch + unit_of(j)] = 0.0f;
            }
          }
        }
      }
    }
  }

  block_sync();
  if (kCluster) cluster_sync();

  // gx of step s on its way into the ring; each warp reads only what it asked for itself.
  const auto ring_block = [&](int s, int j, int n) {
    const int slot = s & (Tile::ring - 1);
    return ring_at +
           ((slot * kLayout.groups + column * kUnits + j) * kBlocks + n) * kLayout.gx_block_bytes;
  };
  const auto prefetch = [&](int s) {
    if (leads && s < rows.steps) {
      constexpr int kPieces = Element::kBytes / 2;  // of 16 bytes, in a row of a block
      const Timestep now = rows.timestep(rows.time(s));
      FUSED_RNN_UNROLL
      for (int n = 0; n < kBlocks; n++) {
        const int row = n * kGroup + lane / kPieces % kGroup;
        const bool exists = rows.exists(rows.length_of(row), row, now.t);
        FUSED_RNN_UNROLL
        for (int j = 0; j < kUnits; j++) {
          const bool there = exists && group_is_there(j);
          FUSED_RNN_UNROLL
          for (int piece = lane; piece < kGates * kGroup * kPieces; piece += kWarp) {
            const int gate = piece / (kGroup * kPieces);
            const int64_t at = gate * pitch + (group0 + j) * kGroup + piece % kPieces * 4;
            const int64_t index = there ? (now.row0 + row) * kGates * pitch + at : 0;
            copy_async(ring_block(s, j, n) + piece * 16, gx + index, there);
          }
        }
      }
    }
    copy_commit();
  };
  for (int s = 0; s < Tile::ring - 1; s++) prefetch(s);

#pragma unroll 1
  for (int s = 0; s < rows.steps; s++) {
    warp_sync();  // every lane has read the slot that is filled next
    prefetch(s + Tile::ring - 1);
    const bool last = s + 1 == rows.steps;
    bool anew[kBlocks][2] = {};  // whether the next step begins from a fresh state
    if (p.rows.resets && leads && !last) {
      FUSED_RNN_UNROLL
      for (int n = 0; n < kBlocks; n++) {
        FUSED_RNN_UNROLL
        for (int e = 0; e < 2; e++) {
          anew[n][e] = rows.begins(alive.length[n][e], alive.row(n, e), s + 1);
        }
      }
    }
    if (kCluster && thread_index() == 0 && !last) {
      barrier_expect(barriers_at + 8 * ((s + 1) & 1), kLayout.h_bytes);
    }
    if (s > 0) {
      if constexpr (kAlone) {
        block_sync();
      } else if constexpr (kGrid) {
        block_sync();  // every warp has read the h before it
        const int first = warp * kLayout.warp_blocks;
        exchange.template fetch<kLayout.warp_blocks>(h_memory + first * kBlockWords, s, first);
        block_sync();
      } else {
        barrier_wait<Order::acquire>(barriers_at + 8 * (s & 1), ((s - 1) >> 1) & 1);
      }
    }

    // W_hh h
    constexpr int kTurns = turns<Element>(kProducts);
    typename Element::Sum sums[kTurns][kProducts][kBlocks];
    const uint32_t* h_now = h_memory + (kGrid ? 0 : (s & 1) * (kLayout.h_bytes / 4));
    const auto multiply = [&](int step, const Fragment(&a)[kProducts]) {
      constexpr int kGroupsPerStep = kDepth / kGroup;
      const int group = (part * kLayout.k_steps + step) * kGroupsPerStep;
      FUSED_RNN_UNROLL
      for (int n = 0; n < kBlocks; n++) {
        const uint32_t* block = h_now + (group * kBlocks + n) * kBlockWords;
        const auto b = Element::operand(block, block + kBlocks * kBlockWords);
        FUSED_RNN_UNROLL
        for (int i = 0; i < kProducts; i++) Element::multiply(sums[step % kTurns][i][n], a[i], b);
      }
    };
    SharedWeights<Element, kLayout.shared_steps * kProducts> in_shared(shared_weights);
    FUSED_RNN_UNROLL
    for (int k = 0; k < Tile::register_steps; k++) multiply(k, weights[k]);
    FUSED_RNN_UNROLL
    for (int k = 0; k < kLayout.shared_steps; k++) {
      Fragment a[kProducts];
      FUSED_RNN_UNROLL
      for (int i = 0; i < kProducts; i++) a[i] = in_shared.take(k * kProducts + i);
      multiply(Tile::register_steps + k, a);
    }
    float totals[kProducts][kBlocks][4];
    FUSED_RNN_UNROLL
    for (int i = 0; i < kProducts; i++) {
      FUSED_RNN_UNROLL
      for (int n = 0; n < kBlocks; n++) finish(sums, i, n, totals[i][n]);
    }
    if constexpr (Tile::split_k > 1) {
      // Added in a fixed order, so that the same inputs give the same bits.
      const auto partial = [&](int of, int i, int n) -> float4& {
        return partials[(((of - 1) * kLayout.warp_columns + column) * kProducts * kBlocks +
                         i * kBlocks + n) *
                            kWarp +
                        lane];
      };
      FUSED_RNN_UNROLL
      for (int i = 0; i < kProducts; i++) {
        FUSED_RNN_UNROLL
        for (int n = 0; n < kBlocks; n++) {
          const float (&v)[4] = totals[i][n];
          if (!leads) partial(part, i, n) = make_float4(v[0], v[1], v[2], v[3]);
        }
      }
      named_sync(1 + column, kWarp * Tile::split_k);
      if (leads) {
        FUSED_RNN_UNROLL
        for (int of = 1; of < Tile::split_k; of++) {
          FUSED_RNN_UNROLL
          for (int i = 0; i < kProducts; i++) {
            FUSED_RNN_UNROLL
            for (int n = 0; n < kBlocks; n++) {
              const float4 v = partial(of, i, n);
              totals[i][n][0] += v.x;
              totals[i][n][1] += v.y;
              totals[i][n][2] += v.z;
              totals[i][n][3] += v.w;
            }
          }
        }
      }
    }
    if (!leads) continue;

    // The pointwise part: `out` is y's row, h what the next step starts from.
    const int64_t t = rows.time(s);
    float out[kUnits][kBlocks][2], c[kUnits][kBlocks][2], saved[kUnits][kBlocks][4][2];
    copy_wait<Tile::ring - 1>();
    warp_sync();
    FUSED_RNN_UNROLL
    for (int j = 0; j < kUnits; j++) {
      const bool real = unit_of(j) < p.hidden;
      FUSED_RNN_UNROLL
      for (int n = 0; n < kBlocks; n++) {
        float x[kGates][2];
        Element::template load_blocks<kGates>(ring_block(s, j, n), x);
        FUSED_RNN_UNROLL
        for (int e = 0; e < 2; e++) {
          float gx_of[kGates], gh[kGates], values[4] = {};
          FUSED_RNN_UNROLL
          for (int q = 0; q < kGates; q++) {
            const int index = j * kGates + q;
            gx_of[q] = x[q][e];
            gh[q] = totals[index >> 1][n][2 * (index & 1) + e];
          }
          if (Cell::kUsesPreviousH) gh[kGates - 1] += b_hn[j];
          float next = state[j][n][e];
          const float h_new = Cell::forward(gx_of, gh, next, next, values);
          if (Cell::kUsesPreviousH) next = h_new;
          const bool taken = real && t < alive.length[n][e];
          if (taken) {
            state[j][n][e] = next;
            h[j][n][e] = Element::rounded(h_new);
          }
          out[j][n][e] = taken ? h_new : 0.0f;
          c[j][n][e] = taken ? next : 0.0f;
          FUSED_RNN_UNROLL
          for (int q = 0; q < 4; q++) saved[j][n][q][e] = taken ? values[q] : 0.0f;
          if (anew[n][e] && real) begin_anew(j, n, e);
        }
      }
    }

    // h to every CTA. Not in the last step: nobody waits for it, and a CTA that has left must not
    // be written to.
    if (!last) {
      const int group0_at = group0 * kBlocks * kBlockWords;
      const int block0 = ((s + 1) & 1) * (kLayout.h_bytes / 4) + group0_at;
      uint32_t words[kUnits * kBlocks][kWords];
      FUSED_RNN_UNROLL
      for (int i = 0; i < kUnits * kBlocks; i++) {
        Element::to_words(h[i / kBlocks][i % kBlocks], words[i]);
      }
      if constexpr (kAlone) {
        FUSED_RNN_UNROLL
        for (int i = 0; i < kUnits * kBlocks; i++) {
          FUSED_RNN_UNROLL
          for (int w = 0; w < kWords; w++) {
            h_memory[block0 + i * kBlockWords + lane * kWords + w] = words[i][w];
          }
        }
      } else if constexpr (kGrid) {
        FUSED_RNN_UNROLL
        for (int i = 0; i < kUnits * kBlocks; i++) {
          exchange.put(s + 1, group0 * kBlocks + i, words[i]);
        }
      } else {
        send_to_all<Element, Tile::cluster>(h_at + block0 * 4, words,
                                            barriers_at + 8 * ((s + 1) & 1), rank);
      }
    }

    const Words now(rows, t);
    FUSED_RNN_UNROLL
    for (int j = 0; j < kUnits; j++) {
      if (!group_is_there(j)) continue;
      const int64_t unit = (group0 + j) * kGroup;
      FUSED_RNN_UNROLL
      for (int n = 0; n < kBlocks; n++) {
        store(y + unit, y_pitch, now, n, out[j][n]);
        if (Cell::kSavedGates > 0 && p.gates) {
          Stored* gates = static_cast<Stored*>(p.gates) +
                          direction * p.rows.count * Cell::kSavedGates * pitch + unit;
          FUSED_RNN_UNROLL
          for (int q = 0; q < Cell::kSavedGates; q++) {
            store(gates + q * pitch, Cell::kSavedGates * pitch, now, n, saved[j][n][q]);
          }
        }
        if (Cell::kHasC && p.cells) {
          FUSED_RNN_UNROLL
          for (int e = 0; e < 2; e++) {
            const int row = alive.row(n, e);
            if (rows.stored(alive.length[n][e], row, t)) {
              p.cells[(direction * p.rows.count + now.row0 + row) * pitch + unit_of(j)] =
                  c[j][n][e];
            }
          }
        }
      }
    }
  }

  lane = known_anew(lane);
  if (leads) {
    FUSED_RNN_UNROLL
    for (int j = 0; j < kUnits; j++) {
      if (!group_is_there(j)) continue;
      FUSED_RNN_UNROLL
      for (int n = 0; n < kBlocks; n++) {
        uint32_t words[kWords];
        Element::to_words(h[j][n], words);
        FUSED_RNN_UNROLL
        for (int w = 0; w < kWords; w++) {
          const int row = rows.first + n * kGroup + Element::row(w);
          if (row >= p.rows.batch) continue;
          Stored* at = static_cast<Stored*>(p.h_n) + states_at + row * pitch +
                       (group0 + j) * kGroup + Element::column();
          *reinterpret_cast<uint32_t*>(at) = words[w];
        }
        FUSED_RNN_UNROLL
        for (int e = 0; e < 2; e++) {
          const int row = rows.first + alive.row(n, e);
          const bool is_wide = Cell::kHasC || (kHandsOnH && p.c_n != nullptr);
          if (is_wide && row < p.rows.batch) p.c_n[state_index(j, row)] = state[j][n][e];
        }
      }
    }
  }
  if (kCluster) cluster_sync();  // no CTA leaves while another may still write to it
}

}  // namespace fused_rnn

// Backward across the grid: the gradients of all gates, from every CTA, become
// a CTA's own part of the gradient of h.
#pragma once

#include "exchange.h"

namespace fused_rnn {

// All threads of a CTA take part. Each warp multiplies its part of the message,
// in pieces of which a stage in shared memory holds one; `slots` get the sums
// of each warp, a block of every item.
template <class Element, class Tile, CellKind kind, class Messages, int kRegisterSteps,
          int kProducts>
FUSED_RNN_DEVICE void gather(const Messages& messages, int message,
                             const Fragment (&weights)[kRegisterSteps][kProducts],
                             const Fragment* shared_weights, uint32_t* stages, float2* slots) {
  constexpr BackwardLayout kLayout = layout_of(Tile::value, kind, Element::kBytes);
  constexpr int kBlocks = Tile::row_blocks, kStaged = kLayout.staged_steps;
  constexpr int kBlockWords = kWarp * Element::kWords;
  constexpr int kStepBlocks = step_depth(Element::kBytes) / kGroup * kBlocks;
  constexpr int kStepWords = kStepBlocks * kBlockWords;
  const int lane = lane_index(), warp = warp_index();
  const int part_at = warp * kLayout.k_steps * kStepBlocks;
  uint32_t* stage = stages + warp * kStaged * kStepWords;

  constexpr int kTurns = turns<Element>(kProducts);
  typename Element::Sum sums[kTurns][kProducts][kBlocks];
  FUSED_RNN_UNROLL
  for (int first = 0; first < kLayout.k_steps; first += kStaged) {
    warp_sync();  // every lane has read what was staged before
    messages.template fetch<kStaged * kStepBlocks>(stage, message, part_at + first * kStepBlocks);
    warp_sync();
    FUSED_RNN_UNROLL
    for (int k = 0; k < kStaged; k++) {
      const int in_registers = first + k, in_shared = in_registers - Tile::register_steps;
      FUSED_RNN_UNROLL
      for (int n = 0; n < kBlocks; n++) {
        const uint32_t* block = stage + k * kStepWords + n * kBlockWords;
        const auto b = Element::operand(block, block + kBlocks * kBlockWords);
        FUSED_RNN_UNROLL
        for (int i = 0; i < kProducts; i++) {
          auto& sum = sums[in_registers % kTurns][i][n];
          if (in_shared < 0) {
            Element::multiply(sum, weights[in_shared < 0 ? in_registers : 0][i], b);
          } else {
            Element::multiply(sum, shared_weights[(in_shared * kProducts + i) * kWarp], b);
          }
        }
      }
    }
  }
  float2* of_warp = slots + warp * kLayout.items * kWarp;
  FUSED_RNN_UNROLL
  for (int i = 0; i < kProducts; i++) {
    FUSED_RNN_UNROLL
    for (int n = 0; n < kBlocks; n++) {
      float totals[4];
      finish(sums, i, n, totals);
      FUSED_RNN_UNROLL
      for (int group = 2 * i; group < 2 * i + 2 && group < kLayout.groups; group++) {
        const int half = group % 2 * 2;
        of_warp[(group * kBlocks + n) * kWarp + lane] = make_float2(totals[half], totals[half + 1]);
      }
    }
  }
  block_sync();
}

}  // namespace fused_rnn

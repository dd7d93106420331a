// How a scan is cut into clusters, warps, registers and shared memory. Plain C++: the kernels take
// a tile as a template argument, the planner reads the same structs at run time.
//
// A unit group is 8 hidden units, a row block 8 batch rows; a block is one by the other. A k step
// is what one product covers of its inner dimension: 16 in a 16-bit dtype, 8 in float32.
#pragma once

#include "../layer_params.h"

namespace fused_rnn {

inline constexpr int kGroup = 8;
inline constexpr int kWarp = 32;
// A product of 16 rows by a k step, as each lane holds it: 16 bytes.
inline constexpr int kFragmentBytes = 16 * kWarp;
inline constexpr int kBarrierBytes = 64;
// The most that a warp reads of a message at a time, on its way from global memory to products.
inline constexpr int kMaxStageBytes = 4096;

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr int step_depth(int element_bytes) { return 32 / element_bytes; }
constexpr int block_bytes(int element_bytes) { return kGroup * kGroup * element_bytes; }

// Of global memory that the CTAs of one batch tile share: two messages, each with two words more
// for every block.
constexpr int64_t exchange_words(int message_bytes, int element_bytes) {
  return 2 * (message_bytes / 4 + 2 * (message_bytes / block_bytes(element_bytes)));
}

// The kernels of single timesteps: two units to a thread, and no CTA has units of two rows.
#if defined(FUSED_RNN_EMULATED)
inline constexpr int kStepThreads = 32;
#else
inline constexpr int kStepThreads = 128;
#endif
constexpr int step_ctas(int pitch) { return ceil_div(pitch, 2 * kStepThreads); }  // of one row

// One CTA owns hidden / cluster units: their gate rows of W_hh, their states.
struct ForwardTile {
  int hidden;          // the largest hidden_size it takes; units beyond a layer's own are zero
  int cluster;         // CTAs that share W_hh
  int row_blocks;      // batch rows / 8 of one cluster
  int unit_groups;     // of one warp
  int split_k;         // warps that share a sum over k
  int register_steps;  // k steps whose weights stay in registers; the others lie in shared memory
  int ring;            // timesteps of gx held or on their way, a power of two
  // Whether the CTAs are of the whole grid instead, and pass h on through global memory.
  bool grid = false;
};

struct ForwardLayout {
  int groups;        // unit groups of a CTA
  int warp_columns;  // warps side by side over units; split_k of them share each
  int threads;
  int k_steps, shared_steps;  // of one warp: all, and those in shared memory
  int row_groups, products;   // of one warp: groups of 8 gate rows, pairs of them
  int warp_blocks;            // of h, in a grid: those that one warp reads for all
  // In shared memory, in this order.
  int weights_bytes;
  int h_bytes;  // one of the buffers
  int h_buffers;
  int gx_block_bytes, ring_bytes;
  int partial_bytes;
  int shared_bytes;
};

constexpr ForwardLayout layout_of(const ForwardTile& tile, int gates, int element_bytes) {
  ForwardLayout l{};
  l.groups = tile.hidden / tile.cluster / kGroup;
  l.warp_columns = l.groups / tile.unit_groups;
  const int warps = l.warp_columns * tile.split_k;
  l.threads = warps * kWarp;
  l.k_steps = tile.hidden / step_depth(element_bytes) / tile.split_k;
  l.shared_steps = l.k_steps - tile.register_steps;
  l.row_groups = tile.unit_groups * gates;
  l.products = ceil_div(l.row_groups, 2);
  l.warp_blocks = tile.hidden / kGroup * tile.row_blocks / warps;
  const int block = block_bytes(element_bytes);
  l.weights_bytes = warps * l.shared_steps * l.products * kFragmentBytes;
  l.h_bytes = tile.hidden / kGroup * tile.row_blocks * block;
  l.h_buffers = tile.grid ? 1 : 2;
  l.gx_block_bytes = gates * block;
  l.ring_bytes = tile.ring * l.groups * tile.row_blocks * l.gx_block_bytes;
  l.partial_bytes =
      (tile.split_k - 1) * l.warp_columns * l.products * tile.row_blocks * kFragmentBytes;
  l.shared_bytes =
      l.weights_bytes + l.h_buffers * l.h_bytes + l.ring_bytes + l.partial_bytes + kBarrierBytes;
  return l;
}

constexpr bool is_whole(const ForwardTile& tile, int gates, int element_bytes) {
  const ForwardLayout l = layout_of(tile, gates, element_bytes);
  return tile.hidden == l.groups * kGroup * tile.cluster &&
         l.groups == l.warp_columns * tile.unit_groups &&
         tile.hidden == l.k_steps * step_depth(element_bytes) * tile.split_k &&
         (!tile.grid ||
          l.warp_blocks * (l.threads / kWarp) == tile.hidden / kGroup * tile.row_blocks) &&
         l.shared_steps >= 0 && (tile.ring & (tile.ring - 1)) == 0 && tile.ring >= 2;
}

// A CTA of a cluster owns the same gate rows as in the forward scan and makes from their gradients
// a part of the gradient of all hidden units, which it sends to the owners: the sum over CTAs is
// the whole. A CTA of a grid reads the gradients of all gates and makes the whole of its own units'
// sums, of which each warp has a part.
struct BackwardTile {
  int hidden;
  int cluster;
  int row_blocks;
  int warps;
  int register_steps;
  int ring;
  bool grid = false;
};

struct BackwardLayout {
  int groups;  // unit groups of a CTA
  int threads;
  int products;               // per warp: pairs of unit groups of the sum it makes
  int row_groups;             // groups of 8 gate rows of a CTA
  int k_steps, shared_steps;  // of each warp: over the CTA's gate rows, in a grid a part of all
  int parts;                  // of a sum: CTAs or, in a grid, warps
  int items;                  // blocks whose pointwise part a CTA does
  int items_per_warp, item_warps;
  // In shared memory, in this order.
  int weights_bytes;
  int buffers;      // of each of the next two
  int slot_bytes;   // the parts of the sums for one step, a block each
  int grads_bytes;  // gradients of the gates of one step, a block of words each
  int state_bytes;  // c or h of one block
  int item_bytes, ring_bytes;
  int staged_steps, stage_bytes;  // in a grid, k steps that a warp reads at a time
  int shared_bytes;
  int message_bytes;  // in a grid, in global memory: the gradients of all gates of one step
};

constexpr BackwardLayout layout_of(const BackwardTile& tile, CellKind cell, int element_bytes) {
  const CellSizes sizes = cell_sizes(cell);
  const int gates = static_cast<int>(sizes.gates);
  BackwardLayout l{};
  l.groups = tile.hidden / tile.cluster / kGroup;
  l.threads = tile.warps * kWarp;
  l.products = tile.grid ? ceil_div(l.groups, 2) : tile.hidden / (2 * kGroup) / tile.warps;
  l.row_groups = gates * l.groups;
  l.k_steps = tile.grid ? gates * tile.hidden / step_depth(element_bytes) / tile.warps
                        : ceil_div(l.row_groups * kGroup, step_depth(element_bytes));
  l.shared_steps = l.k_steps - tile.register_steps;
  l.items = l.groups * tile.row_blocks;
  l.items_per_warp = ceil_div(l.items, tile.warps);
  l.item_warps = l.items / l.items_per_warp;
  const int block = block_bytes(element_bytes);
  l.weights_bytes = tile.warps * l.shared_steps * l.products * kFragmentBytes;
  l.buffers = tile.grid ? 1 : 2;
  l.parts = tile.grid ? tile.warps : tile.cluster;
  l.slot_bytes = l.parts * l.items * block_bytes(4);
  l.grads_bytes = l.items * static_cast<int>(sizes.grad_gates) * block;
  l.state_bytes = sizes.has_c ? block_bytes(4) : block;
  l.item_bytes = static_cast<int>(sizes.saved_gates) * block + l.state_bytes + block;
  l.ring_bytes = tile.ring * l.items * l.item_bytes;
  const int step_bytes = step_depth(element_bytes) / kGroup * tile.row_blocks * block;
  l.staged_steps = l.k_steps;
  while (l.staged_steps * step_bytes > kMaxStageBytes || l.k_steps % l.staged_steps != 0) {
    l.staged_steps--;
  }
  l.stage_bytes = tile.grid ? tile.warps * l.staged_steps * step_bytes : 0;
  l.message_bytes = tile.cluster * l.row_groups * tile.row_blocks * block;
  l.shared_bytes = l.weights_bytes + l.buffers * (l.slot_bytes + l.grads_bytes) + l.ring_bytes +
                   l.stage_bytes + kBarrierBytes;
  return l;
}

constexpr bool is_whole(const BackwardTile& tile, CellKind cell, int element_bytes) {
  const BackwardLayout l = layout_of(tile, cell, element_bytes);
  const int gates = static_cast<int>(cell_sizes(cell).gates);
  const bool whole_products =
      tile.grid ? gates * tile.hidden == l.k_steps * step_depth(element_bytes) * tile.warps
                : tile.hidden == l.products * 2 * kGroup * tile.warps;
  return tile.hidden == l.groups * kGroup * tile.cluster && whole_products && l.shared_steps >= 0 &&
         l.items == l.item_warps * l.items_per_warp && (tile.ring & (tile.ring - 1)) == 0 &&
         tile.ring >= 2 &&
         // Alone, a warp reads only what it wrote itself, and needs no barrier for it.
         (tile.cluster > 1 || l.items_per_warp == 2 * l.products * tile.row_blocks);
}

}  // namespace fused_rnn

#include "plan.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "cuda/instances.h"

namespace fused_rnn {
namespace {

// No launch has more CTAs; grids go to 2^31 - 1.
constexpr int64_t kMaxCtas = int64_t{1} << 30;
// Pitches have to stay below it, so that offsets within a row of gates fit 32 bits.
constexpr int64_t kMaxPitch = int64_t{1} << 20;
// A scan across the grid that needs more launches than this, one after the other, is left to
// products of all rows. By the model a step of such a launch takes 1.4 to 2.7 us, a product per
// step with all that is around it 8 or so.
constexpr int64_t kMaxLaunches = 6;

// The model of time of docs/cuda-kernels.md. No GPU has confirmed any of it.
constexpr double kClocksPerUs = 1755;
constexpr double kProductClocks = 6.6;  // an mma, of one of an SM's quadrants
constexpr double kChainClocks = 24;     // from one k step's products to the next
constexpr double kFmasPerClock = 128;   // of an SM
constexpr double kSharedBytesPerClock = 128;
constexpr double kPointwiseClocks = 180;
constexpr double kMessageClocks = 180 + 30;  // latency and waking up
constexpr double kMessageBytesPerClock = 11.4;
constexpr double kBackwardRatio = 1.2;  // to a forward step
// A chunk waits for a launch, an event and a product, and reads W_hh again; the host has to say so.
constexpr double kChunkUs = 10, kHostChunkUs = 15;
constexpr int64_t kChunkUnit = 8;
// Of the time of layer after layer, so that what is not known does not turn a gain into a loss.
constexpr double kWorthwhile = 0.9;

template <class Tiles>
auto list(const Tiles& tiles) {
  return std::vector(tiles.begin(), tiles.end());
}

template <CellKind kind>
std::vector<ForwardTile> tiles_of(int element_bytes, ForwardTile) {
  return element_bytes == 2 ? list(forward_tiles<kind, 2>()) : list(forward_tiles<kind, 4>());
}

template <CellKind kind>
std::vector<BackwardTile> tiles_of(int element_bytes, BackwardTile) {
  return element_bytes == 2 ? list(backward_tiles<kind, 2>()) : list(backward_tiles<kind, 4>());
}

template <class Tile>
std::vector<Tile> tiles_of(const ScanProblem& problem) {
  switch (problem.cell) {
    case CellKind::lstm:
      return tiles_of<CellKind::lstm>(problem.element_bytes, Tile{});
    case CellKind::gru:
      return tiles_of<CellKind::gru>(problem.element_bytes, Tile{});
    case CellKind::gru_reset_before:
      return {};  // it would need a second exchange between CTAs in every step
    default:
      return tiles_of<CellKind::rnn_tanh>(problem.element_bytes, Tile{});
  }
}

ForwardLayout layout(const ForwardTile& tile, const ScanProblem& problem) {
  return layout_of(tile, static_cast<int>(cell_sizes(problem.cell).gates), problem.element_bytes);
}

BackwardLayout layout(const BackwardTile& tile, const ScanProblem& problem) {
  return layout_of(tile, problem.cell, problem.element_bytes);
}

int message_bytes(const ForwardLayout& l) { return l.h_bytes; }
int message_bytes(const BackwardLayout& l) { return l.message_bytes; }

// Whether two tiles add up in the same order.
bool same_sums(const ForwardTile& a, const ForwardTile& b) {
  return a.hidden == b.hidden && a.cluster == b.cluster && a.split_k == b.split_k &&
         a.grid == b.grid;
}

bool same_sums(const BackwardTile& a, const BackwardTile& b) {
  return a.hidden == b.hidden && a.cluster == b.cluster && a.warps == b.warps && a.grid == b.grid;
}

template <class Tile>
bool runs(const Tile& tile, const ScanProblem& problem, const Device& device) {
  return tile.cluster <= (tile.grid ? device.processors : device.max_cluster) &&
         layout(tile, problem).shared_bytes <= device.shared_bytes;
}

// How many tiles of the batch run at a time. Clusters of 16 need a whole GPC each, smaller ones
// leave about a tenth of the SMs without one (15 clusters of 8 on the 132 SMs of an H100). CTAs of
// a grid may be anywhere.
template <class Tile>
int64_t concurrent_clusters(const Tile& tile, const Device& device) {
  const int cluster = tile.cluster;
  if (cluster == 1 || tile.grid) return device.processors / cluster;
  if (cluster > 8) return std::max(device.processors / 18, 1);
  return std::max(device.processors * 10 / (11 * cluster), 1);
}

template <class Tile>
Plan<Tile> plan_on_chip(const ScanProblem& problem, const Device& device, bool grid,
                        int64_t layers) {
  const std::vector<Tile> tiles = tiles_of<Tile>(problem);
  const Tile* preferred = nullptr;
  for (const Tile& tile : tiles) {
    if (tile.grid != grid || tile.hidden < problem.hidden || !runs(tile, problem, device)) continue;
    if (preferred == nullptr || tile.hidden < preferred->hidden) preferred = &tile;
  }
  if (preferred == nullptr) return {};

  // The fewest rows to a cluster with which all clusters run at once, else the most.
  const int64_t at_once = concurrent_clusters(*preferred, device) / layers;
  const auto clusters = [&](const Tile& tile) {
    const int64_t rows = tile.row_blocks * kGroup;
    return (problem.batch + rows - 1) / rows;
  };
  const Tile* best = preferred;
  for (const Tile& tile : tiles) {
    if (!runs(tile, problem, device) || !same_sums(tile, *preferred)) continue;
    const bool fits = clusters(tile) * problem.directions <= at_once;
    const bool best_fits = clusters(*best) * problem.directions <= at_once;
    if (fits ? !best_fits || tile.row_blocks < best->row_blocks
             : !best_fits && tile.row_blocks > best->row_blocks) {
      best = &tile;
    }
  }
  const int64_t tiles_of_batch = clusters(*best);
  const auto l = layout(*best, problem);
  LaunchShape shape{};
  shape.threads = l.threads;
  shape.shared_bytes = l.shared_bytes;
  shape.cluster = grid ? 1 : best->cluster;
  shape.cooperative = grid;
  shape.directions = static_cast<int>(problem.directions);
  int64_t tiles_at_once = tiles_of_batch;
  if (grid) {
    if (problem.directions > at_once) shape.directions = 1;
    tiles_at_once = std::min(tiles_at_once, at_once / shape.directions);
  }
  const int64_t ctas = tiles_at_once * best->cluster;
  if (ctas > kMaxCtas) return {};
  shape.ctas = static_cast<int>(ctas);
  return {grid ? Regime::grid : Regime::cluster,
          static_cast<int>(best - tiles.data()),
          *best,
          shape,
          tiles_of_batch,
          exchange_words(message_bytes(l), problem.element_bytes)};
}

template <class Tile>
Plan<Tile> plan_steps(const ScanProblem& problem) {
  // hidden_size comes padded to a whole number of groups.
  const int64_t pitch = (problem.hidden + kGroup - 1) / kGroup * kGroup;
  if (pitch >= kMaxPitch) return {};
  const int64_t per_row = step_ctas(static_cast<int>(pitch));
  if (problem.batch > kMaxCtas / per_row) return {};
  return {Regime::steps, -1, Tile{},
          LaunchShape{static_cast<int>(problem.batch * per_row),
                      static_cast<int>(problem.directions), 1, kStepThreads, 0}};
}

template <class Tile>
int64_t launches(const Plan<Tile>& plan, const ScanProblem& problem) {
  const int64_t at_once = plan.shape.ctas / plan.tile.cluster;
  return (plan.batch_tiles + at_once - 1) / at_once * (problem.directions / plan.shape.directions);
}

// What needs no more than a cluster is not spread over the grid, where every step takes longer; nor
// is a batch that the grid can only take piece by piece.
template <class Tile>
Plan<Tile> plan(const ScanProblem& problem, const Device& device, ForcedRegime forced,
                int64_t layers) {
  const auto may_be = [&](Regime regime) { return forced.value_or(regime) == regime; };
  Plan<Tile> found;
  if (may_be(Regime::cluster)) found = plan_on_chip<Tile>(problem, device, false, layers);
  if (found.regime == Regime::none && may_be(Regime::grid) && !device.is_shared) {
    found = plan_on_chip<Tile>(problem, device, true, 1);
    const bool is_there = found.regime != Regime::none;
    if (!forced && is_there && launches(found, problem) > kMaxLaunches) found = {};
  }
  if (found.regime == Regime::none && may_be(Regime::steps)) found = plan_steps<Tile>(problem);
  return found;
}

template <class Tile>
std::string text(const char* pass, const Plan<Tile>& plan) {
  if (plan.regime == Regime::steps) return std::string(pass) + " a product per step";
  return std::string(pass) + " H<=" + std::to_string(plan.tile.hidden) +
         (plan.regime == Regime::grid ? " across the grid by " : " on clusters of ") +
         std::to_string(plan.tile.cluster) + ", " + std::to_string(plan.tile.row_blocks * kGroup) +
         " rows each";
}

// Why clusters or the grid cannot take it, or nothing.
std::string on_chip_refusal(const ScanProblem& problem, const Device& device, bool training,
                            bool grid) {
  if (problem.cell == CellKind::gru_reset_before) {
    return std::string(grid ? "scans across the grid" : "clusters") +
           " have no GRU with the reset gate before the product: a step would need a second "
           "exchange";
  }
  if (grid && device.is_shared) {
    return "scans across the grid need all of their CTAs to run at once, which nobody promises on "
           "a GPU that other processes share (MPS)";
  }
  const auto limit = [&](const auto& tiles) {
    int largest = 0;
    for (const auto& tile : tiles) {
      if (tile.grid == grid && runs(tile, problem, device))
        largest = std::max(largest, tile.hidden);
    }
    return largest;
  };
  int largest = limit(tiles_of<ForwardTile>(problem));
  if (training) largest = std::min(largest, limit(tiles_of<BackwardTile>(problem)));
  if (problem.hidden <= largest) return "";
  return "W_hh does not fit on chip: needs hidden_size up to " + std::to_string(largest) +
         " for this cell, dtype and device, got " + std::to_string(problem.hidden);
}

// Microseconds of a forward step on clusters, of one tile of rows.
double step_us(const Plan<ForwardTile>& plan, const ScanProblem& problem) {
  const ForwardTile& tile = plan.tile;
  const int bytes = problem.element_bytes, rows = tile.row_blocks * kGroup;
  const ForwardLayout l = layout(tile, problem);
  const double weights = static_cast<double>(cell_sizes(problem.cell).gates) * tile.hidden *
                         tile.hidden / tile.cluster;
  const double per_mma = 16.0 * step_depth(bytes) * kGroup;
  const double products =
      bytes == 2 ? weights * rows / per_mma / 4 * kProductClocks : weights * rows / kFmasPerClock;
  const int warps = l.threads / kWarp;
  const double shared = (l.weights_bytes + static_cast<double>(l.h_bytes) * warps / tile.split_k) /
                        kSharedBytesPerClock;
  double clocks = std::max({products, kChainClocks * l.k_steps, shared}) + kPointwiseClocks;
  if (tile.cluster > 1) clocks += kMessageClocks + l.h_bytes / kMessageBytesPerClock;
  return clocks / kClocksPerUs;
}

// The chunk with which layers side by side take the least time, 0 where none is worth it. A step
// may take longer there than that of a layer alone, whose rows more clusters share.
int64_t best_chunk(const StackProblem& stack, double step, double step_alone) {
  const auto layers = static_cast<double>(stack.layers);
  const double apart = layers * static_cast<double>(stack.timesteps) * step_alone;
  double least = kWorthwhile * apart;
  int64_t best = 0;
  for (int64_t chunk = kChunkUnit; 2 * chunk <= stack.timesteps; chunk += kChunkUnit) {
    const auto chunks = static_cast<double>((stack.timesteps + chunk - 1) / chunk);
    const double device = (chunks + layers - 1) * (static_cast<double>(chunk) * step + kChunkUs);
    const double time = std::max(device, layers * chunks * kHostChunkUs);
    if (time < least) {
      least = time;
      best = chunk;
    }
  }
  return best;
}

// Whether every layer's clusters run at once with those of the others.
template <class Tile>
bool all_run_at_once(const Plan<Tile>& plan, const StackProblem& stack, const Device& device) {
  return plan.regime == Regime::cluster &&
         stack.layers * plan.batch_tiles <= concurrent_clusters(plan.tile, device);
}

}  // namespace

ForcedRegime regime_called(const std::string& name) {
  if (name.empty()) return {};
  if (name == "cluster") return Regime::cluster;
  if (name == "grid") return Regime::grid;
  if (name == "steps") return Regime::steps;
  throw std::invalid_argument("regime: expected cluster, grid, steps or nothing, got " + name);
}

Plan<ForwardTile> plan_forward(const ScanProblem& problem, const Device& device,
                               ForcedRegime forced, int64_t layers) {
  return plan<ForwardTile>(problem, device, forced, layers);
}

Plan<BackwardTile> plan_backward(const ScanProblem& problem, const Device& device,
                                 ForcedRegime forced, int64_t layers) {
  return plan<BackwardTile>(problem, device, forced, layers);
}

std::string plan_refusal(const ScanProblem& problem, const Device& device, bool training,
                         ForcedRegime forced) {
  if (device.capability < 80) {
    return "needs compute capability 8.0 or newer, got " + std::to_string(device.capability / 10) +
           "." + std::to_string(device.capability % 10);
  }
  if (forced == Regime::cluster || forced == Regime::grid) {
    const bool grid = forced == Regime::grid;
    if (std::string reason = on_chip_refusal(problem, device, training, grid); !reason.empty()) {
      return reason;
    }
  }
  if (problem.hidden > kMaxPitch - kGroup) {
    return "hidden_size " + std::to_string(problem.hidden) + " is too large";
  }
  if (plan_forward(problem, device, forced).regime == Regime::none) {
    return "batch size " + std::to_string(problem.batch) + " is too large";
  }
  return "";
}

std::string describe_plan(const ScanProblem& problem, const Device& device, bool training,
                          ForcedRegime forced, LayersAtOnce layers) {
  std::string result = text("scan", plan_forward(problem, device, forced, layers.forward));
  if (training) {
    result += "; " + text("back", plan_backward(problem, device, forced, layers.backward));
  }
  return result;
}

StackPlan plan_stack(const StackProblem& stack, const Device& device, ForcedRegime forced) {
  if (!stack_refusal(stack, device, forced).empty()) return {};
  const auto forward = plan_forward(stack.layer, device, forced, stack.layers);
  const double step = step_us(forward, stack.layer);
  const double alone = step_us(plan_forward(stack.layer, device, forced), stack.layer);
  StackPlan found;
  if (all_run_at_once(forward, stack, device)) found.forward = best_chunk(stack, step, alone);
  if (!stack.training) return found;
  const auto backward = plan_backward(stack.layer, device, forced, stack.layers);
  if (all_run_at_once(backward, stack, device)) {
    found.backward = best_chunk(stack, kBackwardRatio * step, kBackwardRatio * alone);
  }
  return found;
}

std::string stack_refusal(const StackProblem& stack, const Device& device, ForcedRegime forced) {
  const ScanProblem& layer = stack.layer;
  if (layer.directions != 1) return "the next layer needs the end of the reverse direction first";
  if (layer.hidden % kGroup != 0) {
    return "needs a hidden_size that is a multiple of " + std::to_string(kGroup) + ", got " +
           std::to_string(layer.hidden);
  }
  const bool fits =
      plan_forward(layer, device, forced).regime == Regime::cluster &&
      (!stack.training || plan_backward(layer, device, forced).regime == Regime::cluster);
  if (!fits) return "needs layers that run on clusters";
  return "";
}

}  // namespace fused_rnn

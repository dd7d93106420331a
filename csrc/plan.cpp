#include "plan.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "cuda/instances.h"

namespace fused_rnn {
namespace {

// The kernels of all dtypes and cells: no launch has more row blocks than this many in its grid.
constexpr int64_t kMaxCtas = int64_t{1} << 30;
// Pitches have to stay below it, so that offsets within a row of gates fit 32 bits.
constexpr int64_t kMaxPitch = int64_t{1} << 20;

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

// Whether two tiles add up in the same order.
bool same_sums(const ForwardTile& a, const ForwardTile& b) {
  return a.hidden == b.hidden && a.cluster == b.cluster && a.split_k == b.split_k;
}

bool same_sums(const BackwardTile& a, const BackwardTile& b) {
  return a.hidden == b.hidden && a.cluster == b.cluster;
}

// How many clusters run at a time. Clusters of 16 need a whole GPC each, smaller ones leave about a
// tenth of the SMs without one (15 clusters of 8 on the 132 SMs of an H100).
int64_t concurrent_clusters(int cluster, const Device& device) {
  if (cluster == 1) return device.processors;
  if (cluster > 8) return std::max(device.processors / 18, 1);
  return std::max(device.processors * 10 / (11 * cluster), 1);
}

template <class Tile>
Plan<Tile> plan_clusters(const ScanProblem& problem, const Device& device) {
  const std::vector<Tile> tiles = tiles_of<Tile>(problem);
  const auto runs = [&](const Tile& tile) {
    return tile.hidden >= problem.hidden && tile.cluster <= device.max_cluster &&
           layout(tile, problem).shared_bytes <= device.shared_bytes;
  };
  const Tile* preferred = nullptr;
  for (const Tile& tile : tiles) {
    if (runs(tile) && (preferred == nullptr || tile.hidden < preferred->hidden)) preferred = &tile;
  }
  if (preferred == nullptr) return {};

  // The fewest rows to a cluster with which all clusters run at once, else the most.
  const int64_t at_once = concurrent_clusters(preferred->cluster, device);
  const auto clusters = [&](const Tile& tile) {
    const int64_t rows = tile.row_blocks * kGroup;
    return (problem.batch + rows - 1) / rows;
  };
  const Tile* best = preferred;
  for (const Tile& tile : tiles) {
    if (!runs(tile) || !same_sums(tile, *preferred)) continue;
    const bool fits = clusters(tile) * problem.directions <= at_once;
    const bool best_fits = clusters(*best) * problem.directions <= at_once;
    if (fits ? !best_fits || tile.row_blocks < best->row_blocks
             : !best_fits && tile.row_blocks > best->row_blocks) {
      best = &tile;
    }
  }
  const int64_t ctas = clusters(*best) * best->cluster;
  if (ctas > kMaxCtas) return {};
  const auto l = layout(*best, problem);
  return {Regime::cluster, static_cast<int>(best - tiles.data()), *best,
          LaunchShape{static_cast<int>(ctas), static_cast<int>(problem.directions), best->cluster,
                      l.threads, l.shared_bytes}};
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
Plan<Tile> plan(const ScanProblem& problem, const Device& device, ForcedRegime forced) {
  Plan<Tile> found;
  if (forced.value_or(Regime::cluster) == Regime::cluster) {
    found = plan_clusters<Tile>(problem, device);
  }
  if (found.regime == Regime::none && forced.value_or(Regime::steps) == Regime::steps) {
    found = plan_steps<Tile>(problem);
  }
  return found;
}

template <class Tile>
std::string text(const char* pass, const Plan<Tile>& plan) {
  if (plan.regime == Regime::steps) return std::string(pass) + " a product per step";
  return std::string(pass) + " H<=" + std::to_string(plan.tile.hidden) + " on clusters of " +
         std::to_string(plan.tile.cluster) + ", " + std::to_string(plan.tile.row_blocks * kGroup) +
         " rows each";
}

// Why clusters cannot take it, or nothing.
std::string cluster_refusal(const ScanProblem& problem, const Device& device, bool training) {
  if (problem.cell == CellKind::gru_reset_before) {
    return "clusters have no GRU with the reset gate before the product: a step would need a "
           "second exchange";
  }
  const auto limit = [&](const auto& tiles) {
    int largest = 0;
    for (const auto& tile : tiles) {
      const bool runs = tile.cluster <= device.max_cluster &&
                        layout(tile, problem).shared_bytes <= device.shared_bytes;
      if (runs) largest = std::max(largest, tile.hidden);
    }
    return largest;
  };
  int largest = limit(tiles_of<ForwardTile>(problem));
  if (training) largest = std::min(largest, limit(tiles_of<BackwardTile>(problem)));
  if (problem.hidden <= largest) return "";
  return "W_hh does not fit on chip: needs hidden_size up to " + std::to_string(largest) +
         " for this cell, dtype and device, got " + std::to_string(problem.hidden);
}

}  // namespace

ForcedRegime regime_called(const std::string& name) {
  if (name.empty()) return {};
  if (name == "cluster") return Regime::cluster;
  if (name == "steps") return Regime::steps;
  throw std::invalid_argument("regime: expected cluster, steps or nothing, got " + name);
}

Plan<ForwardTile> plan_forward(const ScanProblem& problem, const Device& device,
                               ForcedRegime forced) {
  return plan<ForwardTile>(problem, device, forced);
}

Plan<BackwardTile> plan_backward(const ScanProblem& problem, const Device& device,
                                 ForcedRegime forced) {
  return plan<BackwardTile>(problem, device, forced);
}

std::string plan_refusal(const ScanProblem& problem, const Device& device, bool training,
                         ForcedRegime forced) {
  if (device.capability < 80) {
    return "needs compute capability 8.0 or newer, got " + std::to_string(device.capability / 10) +
           "." + std::to_string(device.capability % 10);
  }
  if (forced == Regime::cluster) {
    if (std::string reason = cluster_refusal(problem, device, training); !reason.empty()) {
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
                          ForcedRegime forced) {
  std::string result = text("scan", plan_forward(problem, device, forced));
  if (training) result += "; " + text("back", plan_backward(problem, device, forced));
  return result;
}

}  // namespace fused_rnn

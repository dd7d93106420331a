#include "weak_memory.h"

#include <cstring>
#include <iterator>

namespace fused_rnn::emulator {
namespace {

constexpr size_t kVersionsKept = 12;

uint64_t draw(std::mt19937_64& random, uint64_t below) { return random() % below; }

}  // namespace

std::vector<WeakMemory::Version>& WeakMemory::versions(const void* at, int bytes) {
  std::vector<Version>& all = versions_[at];
  if (all.empty()) {
    all.push_back({0, 0});
    std::memcpy(&all.back().value, at, static_cast<size_t>(bytes));
  }
  return all;
}

// The newest, or half of the time any that is not older than what the thread has read there.
uint64_t WeakMemory::load(View& view, const void* from, int bytes, std::mt19937_64& random) {
  const std::vector<Version>& all = versions(from, bytes);
  int64_t& seen = view[from];
  size_t oldest = 0;
  while (oldest + 1 < all.size() && all[oldest + 1].time <= seen) oldest++;
  const size_t choices = all.size() - oldest;
  const size_t at = draw(random, 2) == 0 ? choices - 1 : draw(random, choices);
  seen = all[oldest + at].time;
  return all[oldest + at].value;
}

void WeakMemory::store(void* to, uint64_t value, int bytes, std::mt19937_64& random) {
  versions(to, bytes);
  if (draw(random, 256) == 0) holding_ = !holding_;
  pending_.emplace(++issued_, Store{to, value, bytes, holding_ && draw(random, 6) == 0});
}

// Stores to one place stay in order.
void WeakMemory::perform(int64_t number) {
  const void* place = pending_.at(number).to;
  for (auto other = pending_.begin(); other != pending_.end() && other->first <= number;) {
    const Store store = other->second;
    if (store.to != place) {
      ++other;
      continue;
    }
    std::vector<Version>& all = versions_.at(place);
    all.push_back({++now_, store.value});
    if (all.size() > kVersionsKept) all.erase(all.begin());
    std::memcpy(store.to, &store.value, static_cast<size_t>(store.bytes));
    other = pending_.erase(other);
  }
}

bool WeakMemory::perform_any(bool held_too, std::mt19937_64& random) {
  if (pending_.empty()) return false;
  const auto chosen =
      std::next(pending_.begin(), static_cast<std::ptrdiff_t>(draw(random, pending_.size())));
  if (chosen->second.held && !held_too) return false;
  perform(chosen->first);
  return true;
}

}  // namespace fused_rnn::emulator

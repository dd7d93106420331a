#include "weak_memory.h"

#include <algorithm>
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

// The newest, or half of the time any that is neither older than what the thread has read there nor
// hidden by what it knows.
const WeakMemory::Version& WeakMemory::pick(View& view, const void* from, int bytes,
                                            std::mt19937_64& random) {
  const std::vector<Version>& all = versions(from, bytes);
  const auto last = view.seen.find(from);
  const int64_t seen = last == view.seen.end() ? 0 : last->second;
  const int64_t known = std::max(view.floor, seen);
  size_t oldest = 0;
  while (oldest + 1 < all.size() && all[oldest + 1].time <= known) oldest++;
  const size_t choices = all.size() - oldest;
  const size_t at = draw(random, 2) == 0 ? choices - 1 : draw(random, choices);
  view.seen[from] = all[oldest + at].time;
  return all[oldest + at];
}

uint64_t WeakMemory::load(View& view, const void* from, int bytes, std::mt19937_64& random) {
  return pick(view, from, bytes, random).value;
}

uint32_t WeakMemory::load_acquire(View& view, const void* from, std::mt19937_64& random) {
  const Version& version = pick(view, from, 4, random);
  view.floor = std::max(view.floor, version.time);
  return static_cast<uint32_t>(version.value);
}

void WeakMemory::issue(View& view, const Store& store) {
  versions(store.to, store.bytes);
  pending_.emplace(++issued_, store);
  view.past.push_back(issued_);
}

void WeakMemory::store(View& view, void* to, uint64_t value, int bytes, std::mt19937_64& random) {
  issue(view, {to, value, bytes, false, draw(random, 6) == 0});
}

void WeakMemory::add(View& view, uint32_t* to, uint32_t value, std::mt19937_64& random) {
  issue(view, {to, value, 4, true, draw(random, 6) == 0});
}

// Stores to one place stay in order.
void WeakMemory::perform(int64_t number) {
  const Store store = pending_.at(number);
  for (auto other = pending_.begin(); other->first <= number;) {
    if (other->second.to != store.to) {
      ++other;
      continue;
    }
    std::vector<Version>& all = versions_.at(store.to);
    const uint64_t value =
        other->second.add ? all.back().value + other->second.value : other->second.value;
    all.push_back({++now_, value});
    if (all.size() > kVersionsKept) all.erase(all.begin());
    std::memcpy(store.to, &value, static_cast<size_t>(store.bytes));
    other = pending_.erase(other);
    if (other == pending_.end()) break;
  }
}

void WeakMemory::release(View& view) {
  for (const int64_t number : view.past) {
    if (pending_.count(number) != 0) perform(number);
  }
  view.past.clear();
}

void WeakMemory::meet(const std::vector<View*>& views) const {
  int64_t floor = 0;
  std::vector<int64_t> past;
  for (const View* view : views) {
    floor = std::max(floor, view->floor);
    std::copy_if(view->past.begin(), view->past.end(), std::back_inserter(past),
                 [this](int64_t number) { return pending_.count(number) != 0; });
  }
  std::sort(past.begin(), past.end());
  past.erase(std::unique(past.begin(), past.end()), past.end());
  for (View* view : views) {
    view->floor = floor;
    view->past = past;
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

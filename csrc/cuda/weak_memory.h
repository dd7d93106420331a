// Global memory as running CTAs see each other's accesses to it: a store is performed some time
// after it was issued, in any order with others, and a load may return what is long overwritten.
// Only a release that an acquire sees brings order. What is one access to hardware, a word or two,
// is one here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <random>
#include <unordered_map>
#include <vector>

namespace fused_rnn::emulator {

class WeakMemory {
 public:
  // What one thread knows.
  struct View {
    int64_t floor = 0;          // all that was performed up to this time is seen
    std::vector<int64_t> past;  // stores, its own or passed on at a barrier, that may be pending
    std::unordered_map<const void*, int64_t> seen;  // when what it last read there was performed
  };

  uint64_t load(View& view, const void* from, int bytes, std::mt19937_64& random);
  // Sees what was before the release of the value it returns.
  uint32_t load_acquire(View& view, const void* from, std::mt19937_64& random);
  void store(View& view, void* to, uint64_t value, int bytes, std::mt19937_64& random);
  void add(View& view, uint32_t* to, uint32_t value, std::mt19937_64& random);
  // Performs all stores of the thread's past.
  void release(View& view);

  // The threads have met at a barrier: each knows what all knew.
  void meet(const std::vector<View*>& views) const;

  // Some pending store, if there is one; those that are held only when asked for.
  bool perform_any(bool held_too, std::mt19937_64& random);

 private:
  struct Store {
    void* to;
    uint64_t value;
    int bytes;
    bool add, held;
  };
  struct Version {
    int64_t time;
    uint64_t value;
  };

  std::vector<Version>& versions(const void* at, int bytes);
  const Version& pick(View& view, const void* from, int bytes, std::mt19937_64& random);
  void issue(View& view, const Store& store);
  void perform(int64_t number);

  std::map<int64_t, Store> pending_;  // by number, in the order in which they were issued
  std::unordered_map<const void*, std::vector<Version>> versions_;
  int64_t issued_ = 0, now_ = 0;
};

}  // namespace fused_rnn::emulator

// Global memory as running CTAs see each other's accesses to it, all of them relaxed: a store is
// performed some time after it was issued, in any order with those to other places, and a load may
// return what is long overwritten. What is one access to hardware, a word or two, is one here.
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
  // When what a thread last read in a place was performed: it reads nothing older there.
  using View = std::unordered_map<const void*, int64_t>;

  uint64_t load(View& view, const void* from, int bytes, std::mt19937_64& random);
  void store(void* to, uint64_t value, int bytes, std::mt19937_64& random);

  // Some pending store, if there is one; those that are held only when asked for.
  bool perform_any(bool held_too, std::mt19937_64& random);

 private:
  struct Store {
    void* to;
    uint64_t value;
    int bytes;
    bool held;
  };
  struct Version {
    int64_t time;
    uint64_t value;
  };

  std::vector<Version>& versions(const void* at, int bytes);
  void perform(int64_t number);

  std::map<int64_t, Store> pending_;  // by number, in the order in which they were issued
  std::unordered_map<const void*, std::vector<Version>> versions_;
  int64_t issued_ = 0, now_ = 0;
  // Whether some stores wait until nothing else can happen. Not always: then every message would
  // wait for whatever else is slow.
  bool holding_ = false;
};

}  // namespace fused_rnn::emulator

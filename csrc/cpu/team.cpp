#include "team.h"

#include <sched.h>

#include <chrono>

namespace fused_rnn {
namespace {

// Spins before the first yield: about 20 us, longer than any step that is worth sharing, so that
// an idle machine never yields and a crowded one soon does.
constexpr int kSpins = 1000;
// How long to wait for the other threads of a region to start. They are being woken at the same
// moment; one that takes longer is not coming, or the machine is too crowded for a barrier.
constexpr auto kPatience = std::chrono::microseconds(500);

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

template <class Done>
void spin_until(Done done) {
  for (int i = 0; !done(); i++) {
    if (i < kSpins) {
      pause();
    } else {
      sched_yield();
    }
  }
}

}  // namespace

bool Team::assemble(int64_t items) {
  if (items == items_) {
    __atomic_store_n(&state_, kComplete, __ATOMIC_RELEASE);
    return true;
  }
  const auto decide = [&](int state) {
    int waiting = kWaiting;
    __atomic_compare_exchange_n(&state_, &waiting, state, false, __ATOMIC_ACQ_REL,
                                __ATOMIC_ACQUIRE);
  };
  if (__atomic_add_fetch(&present_, items, __ATOMIC_ACQ_REL) == items_) {
    decide(kComplete);
  } else {
    const auto start = std::chrono::steady_clock::now();
    spin_until([&] {
      if (__atomic_load_n(&state_, __ATOMIC_ACQUIRE) != kWaiting) return true;
      if (std::chrono::steady_clock::now() - start > kPatience) decide(kGivenUp);
      return false;
    });
  }
  return __atomic_load_n(&state_, __ATOMIC_ACQUIRE) == kComplete;
}

void Meeting::wait() {
  target_ += barrier_->items_;
  if (items_ == barrier_->items_) return;
  if (__atomic_add_fetch(&barrier_->arrived_, items_, __ATOMIC_ACQ_REL) >= target_) return;
  spin_until([&] { return __atomic_load_n(&barrier_->arrived_, __ATOMIC_ACQUIRE) >= target_; });
}

}  // namespace fused_rnn

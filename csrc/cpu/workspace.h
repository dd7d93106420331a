// Memory for the length of one call.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fused_rnn {

constexpr size_t kHugePage = size_t(2) << 20;

// Large fresh memory is cheaper to touch in huge pages: measured 6 ms instead of 25 for 64 MiB.
// And weights that are read from end to end in every timestep miss the TLB less.
inline void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHugePage - 1);
  // Advice: it does not matter if the kernel will not have it.
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// From here on malloc maps every block for itself, and anew: its threshold grows no further.
constexpr size_t kOwnMapping = size_t(32) << 20;

// Memory that the allocator is sure to have mapped for this use alone; advice on other memory
// would outlive it.
inline void advise_huge_pages_if_fresh(void* data, size_t bytes) {
  if (bytes >= kOwnMapping) advise_huge_pages(data, bytes);
}

// malloc gives freed memory at its end back to the system where it is more than twice its
// threshold, which is the largest mapping that was freed so far. A layer's y and the gradient of x
// are about as much, so that every step of training may find fresh pages: RNN (T, B, H) = (512, 64,
// 128) took 28 to 34 ms in most processes, and 20 to 23 once such a mapping had been freed. So here
// is one, never touched.
inline void let_malloc_keep_memory() {
#if defined(__GLIBC__)
  static const bool once = [] {
    constexpr size_t kPages = 8192;  // with malloc's own words it has to be below the limit
    void* volatile block = std::malloc(kOwnMapping - kPages);
    std::free(block);
    return true;
  }();
  (void)once;
#endif
}

// On a cache line; large blocks on huge pages. Null when there is none.
inline void* allocate(size_t bytes) {
  const bool huge = bytes >= 2 * kHugePage;
  const size_t alignment = huge ? kHugePage : 64;
  void* data = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  if (huge && data != nullptr) advise_huge_pages(data, bytes);
  return data;
}

// Takes memory from a block that its thread keeps between calls, so that only the first call of a
// size pays for page faults; what exceeds the block comes from the allocator, and the block grows
// at the end to what was used. One inside another, on the same thread, goes on where that is, which
// takes nothing meanwhile.
class Workspace {
 public:
  Workspace() : kept_(kept()), begin_(kept_.used), extras_(kept_.extras.size()) {}
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  ~Workspace() {
    for (; kept_.extras.size() > extras_; kept_.extras.pop_back()) std::free(kept_.extras.back());
    kept_.used = begin_;
    if (begin_ == 0) kept_.grow();
  }

  // Memory for `count` floats on cache lines of its own, not initialised.
  float* take(int64_t count) {
    constexpr size_t kLine = 64;
    const size_t bytes = (static_cast<size_t>(count) * sizeof(float) + kLine) / kLine * kLine;
    const size_t at = kept_.used;
    if (at + bytes <= kept_.bytes) {
      kept_.use(bytes);
      return reinterpret_cast<float*>(static_cast<char*>(kept_.data) + at);
    }
    kept_.extras.reserve(kept_.extras.size() + 1);
    void* extra = allocate(bytes);
    if (extra == nullptr) throw std::bad_alloc();
    kept_.extras.push_back(extra);
    kept_.use(bytes);
    return static_cast<float*>(extra);
  }

 private:
  struct Kept {
    void* data = nullptr;
    size_t bytes = 0;
    size_t used = 0, most = 0;  // most: that was used at a time since `grow`
    std::vector<void*> extras;

    Kept() = default;
    Kept(const Kept&) = delete;
    Kept& operator=(const Kept&) = delete;
    ~Kept() { std::free(data); }

    void use(size_t more) {
      used += more;
      most = most < used ? used : most;
    }

    // The contents are lost. Without memory there is no block.
    void grow() {
      // More than this goes back to the system after each call. A layer of H=1024 in parts needs
      // less.
      constexpr size_t kMost = size_t(96) << 20;
      const size_t wanted = most;
      most = 0;
      if (wanted <= bytes || wanted > kMost) return;
      std::free(data);
      data = allocate(wanted);
      bytes = data == nullptr ? 0 : wanted;
    }
  };

  static Kept& kept() {
    static thread_local Kept kept;
    return kept;
  }

  Kept& kept_;
  const size_t begin_;
  const size_t extras_;
};

}  // namespace fused_rnn

#include "saved.h"

#include <cstdlib>
#include <mutex>
#include <vector>

#include "../torch_compat.h"
#include "border.h"
#include "workspace.h"

namespace fused_rnn {
namespace {

struct Block {
  void* data;
  size_t bytes;
};

// Blocks whose tensors are gone, the oldest first.
class IdleBlocks {
 public:
  // Never destroyed: tensors may go after a library's static objects.
  static IdleBlocks& all() {
    static IdleBlocks* blocks = new IdleBlocks;
    return *blocks;
  }

  // Room for all that are kept and the one that comes: where a tensor goes nothing may be thrown,
  // not for want of memory either.
  IdleBlocks() { blocks_.reserve(kKeep / kOwnMapping + 1); }

  // The smallest that holds so much and is at most twice as large; or null.
  Block take(size_t bytes) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return {nullptr, 0};
    auto best = blocks_.end();
    for (auto block = blocks_.begin(); block != blocks_.end(); ++block) {
      const bool fits = block->bytes >= bytes && block->bytes / 2 <= bytes;
      if (fits && (best == blocks_.end() || block->bytes < best->bytes)) best = block;
    }
    if (best == blocks_.end()) return {nullptr, 0};
    const Block block = *best;
    blocks_.erase(best);
    bytes_ -= block.bytes;
    return block;
  }

  void give(Block block) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock || block.bytes > kKeep) {
      std::free(block.data);
      return;
    }
    give_leave(block);
    blocks_.push_back(block);
    bytes_ += block.bytes;
    while (bytes_ > kKeep) {
      bytes_ -= blocks_.front().bytes;
      std::free(blocks_.front().data);
      blocks_.erase(blocks_.begin());
    }
  }

 private:
  static constexpr size_t kKeep = size_t(256) << 20;

  // To take the pages, whose contents nobody needs, instead of swapping or giving up.
  static void give_leave(Block block) {
#if defined(MADV_FREE)
    madvise(block.data, block.bytes, MADV_FREE);
#else
    (void)block;
#endif
  }

  // Tried and not waited for: a process forked while another thread had it would wait forever.
  std::mutex mutex_;
  std::vector<Block> blocks_;
  size_t bytes_ = 0;
};

void give_back(void* data, void* bytes) {
  IdleBlocks::all().give({data, reinterpret_cast<size_t>(bytes)});
}

}  // namespace

Tensor empty_saved(int64_t directions, int64_t count, int64_t width) {
  const int64_t sizes[] = {directions, count, width}, strides[] = {count * width, width, 1};
  const size_t bytes = static_cast<size_t>(directions * count * width) * sizeof(float);
  Block block{nullptr, bytes};
  if (bytes >= kOwnMapping && torch_from_blob != nullptr) {
    block = IdleBlocks::all().take(bytes);
    if (block.data == nullptr) block = {allocate(bytes), bytes};
  }
  if (block.data == nullptr) {
    Tensor tensor = empty(sizes, 3);
    advise_huge_pages_if_fresh(tensor.mutable_data_ptr<float>(), bytes);
    return tensor;
  }
  constexpr int32_t kNoIndex = -1;
  AtenTensorHandle handle = nullptr;
  const AOTITorchError from_blob =
      torch_from_blob(block.data, 3, sizes, strides, 0, aoti_torch_dtype_float32(),
                      aoti_torch_device_type_cpu(), kNoIndex, &handle, aoti_torch_layout_strided(),
                      nullptr, 0, give_back, reinterpret_cast<void*>(block.bytes));
  if (from_blob != AOTI_TORCH_SUCCESS) std::free(block.data);
  FUSED_RNN_TORCH_CHECK(from_blob);
  return Tensor(handle);
}

}  // namespace fused_rnn

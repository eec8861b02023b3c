#include "ops/kept_memory.h"

#if defined(__linux__)

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "geometry.h"

namespace dsconv {
namespace {

constexpr int64_t kSmallest = 64 << 10;  // below, C libraries keep the memory
constexpr int64_t kHugePage = 2 << 20, kLine = 64;
// Loads wait for stores to the same place of another page. Where columns are a power of two apart, from 512 bytes on, all
// of them meet if one does: data begins 5 lines further on than that, modulo 16.
constexpr int64_t kPlaces = 16 * kLine, kApart = 5 * kLine;
// In tensors that asked for memory meanwhile: how long a block waits until the system may take its pages, and until it is
// unmapped. (To tell the system takes as long as a small layer where that interrupts other processors.)
constexpr int64_t kOffered = 256, kPatience = 1024;
constexpr int64_t kInspection = 64;
constexpr int64_t kMostWaiting = 4;  // times the bytes that were in use at one time: layers of a network differ in size

struct Block {
  char* begin;
  int64_t bytes;
};

int64_t whole_pages(const Block& block) { return block.bytes / kHugePage * kHugePage; }

Block map_block(int64_t bytes) {
  const int64_t room = bytes < kHugePage ? bytes : bytes + kHugePage;
  void* const found = mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (found == MAP_FAILED) return {};
  char* const first = static_cast<char*>(found);
  if (bytes < kHugePage) return {first, bytes};
  const int64_t before = -reinterpret_cast<intptr_t>(first) & (kHugePage - 1);
  if (before > 0) munmap(first, before);
  if (before < kHugePage) munmap(first + before + bytes, kHugePage - before);
  const Block block{first + before, bytes};
  madvise(block.begin, whole_pages(block), MADV_HUGEPAGE);  // a hint: may fail
  return block;
}

void unmap(const Block& block) { munmap(block.begin, block.bytes); }

// Where a lock is not free, a block is mapped or unmapped: also in the child of a fork, where nobody may be left to free it.
class KeptMemory {
 public:
  void* take(int64_t bytes, const void* source) {
    const int64_t least = bytes + kPlaces + kLine;
    const int64_t step = std::bit_floor(static_cast<uint64_t>(least)) / 16;
    Block block{};
    std::vector<Block> idle;
    if (const std::unique_lock lock{mutex_, std::try_to_lock}) {
      ++clock_;
      if (const auto it = waiting_.lower_bound(least); it != waiting_.end() && it->first <= least + least / 4)
        block = remove(it);
      if (clock_ % kInspection == 0) {
        idle = remove_idle(kPatience);
        offer_idle();
      }
    }
    for (const Block& old : idle) unmap(old);
    if (!block.begin) block = map_block(round_up(least, step));
    if (!block.begin) return nullptr;
    live_bytes_ += block.bytes;
    const int64_t there = reinterpret_cast<intptr_t>(source) / kLine * kLine + kApart;
    char* const data = block.begin + kLine + ((there - kLine) & (kPlaces - 1));
    std::memcpy(data - kLine, &block, sizeof block);
    return data;
  }

  void keep(void* data) {
    Block block;
    std::memcpy(&block, static_cast<char*>(data) - kLine, sizeof block);
    const int64_t live_bytes = live_bytes_.fetch_sub(block.bytes);
    std::vector<Block> removed;
    if (const std::unique_lock lock{mutex_, std::try_to_lock}) {
      most_bytes_ = max64(most_bytes_, live_bytes);
      waiting_.insert({block.bytes, {block, clock_, false}});
      waiting_bytes_ += block.bytes;
      while (waiting_bytes_ > kMostWaiting * most_bytes_) removed.push_back(remove(oldest()));
    } else {
      removed.push_back(block);
    }
    for (const Block& old : removed) unmap(old);
  }

  void empty() {
    std::vector<Block> all;
    {
      const std::lock_guard lock{mutex_};
      all = remove_idle(0);
    }
    for (const Block& block : all) unmap(block);
  }

 private:
  struct Waiting {
    Block block;
    int64_t since;
    bool offered;
  };

  using Blocks = std::multimap<int64_t, Waiting>;  // by size

  Blocks::iterator oldest() {
    return std::min_element(waiting_.begin(), waiting_.end(),
                            [](const auto& a, const auto& b) { return a.second.since < b.second.since; });
  }
  Block remove(Blocks::iterator it) {
    const Block block = it->second.block;
    waiting_bytes_ -= block.bytes;
    waiting_.erase(it);
    return block;
  }
  std::vector<Block> remove_idle(int64_t patience) {
    std::vector<Block> removed;
    for (auto it = waiting_.begin(); it != waiting_.end();) {
      const auto next = std::next(it);
      if (clock_ - it->second.since >= patience) removed.push_back(remove(it));
      it = next;
    }
    return removed;
  }
  void offer_idle() {
    for (auto& [bytes, waiting] : waiting_) {
      const int64_t pages = whole_pages(waiting.block);
      if (waiting.offered || pages == 0 || clock_ - waiting.since < kOffered) continue;
      madvise(waiting.block.begin, pages, MADV_FREE);
      waiting.offered = true;
    }
  }

  std::mutex mutex_;
  Blocks waiting_;
  int64_t waiting_bytes_ = 0, most_bytes_ = 0, clock_ = 0;  // most: of what lived at the same time
  std::atomic<int64_t> live_bytes_ = 0;
};

// Never destroyed: tensors may be freed after everything else.
KeptMemory& kept() {
  static KeptMemory* const memory = new KeptMemory;
  return *memory;
}

bool is_wanted() {
  static const bool wanted = [] {
    const char* const variable = std::getenv("DSCONV_CPU_CACHE");
    const std::string value = variable ? variable : "";
    if (value != "" && value != "0" && value != "1")
      throw std::runtime_error("DSCONV_CPU_CACHE: got '" + value + "', expected 0 or 1");
    return value != "0";
  }();
  return wanted;
}

}  // namespace

void* take_memory(int64_t bytes, const void* source) {
  return is_wanted() && bytes >= kSmallest ? kept().take(bytes, source) : nullptr;
}
void keep_memory(void* data) { kept().keep(data); }
void empty_cache() { kept().empty(); }

}  // namespace dsconv

#else

namespace dsconv {

void* take_memory(int64_t, const void*) { return nullptr; }
void keep_memory(void*) {}
void empty_cache() {}

}  // namespace dsconv

#endif

// CUDA threads on the CPU. Each thread of a block is a fibre with its own stack; blocks run one after another. Barriers,
// exchanges within a warp and atomics are real: what a kernel gets wrong about them is reported with line numbers.
#pragma once

#include <vector_types.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <string>

namespace simt {

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

struct Grid {
  int64_t blocks;
  int threads;
  int64_t shared_bytes;
};

// The order in which the runnable threads of a block run, and its blocks. Results must not depend on it.
enum class Order : uint8_t { forward, reverse, shuffled };
extern Order order;

// Launches are checked and counted, and nothing runs.
extern bool dry;

// What a kernel must not do: the message says what, where and in which kernel.
struct Violation : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What a launch runs.
struct Kernel {
  const char* name;
  const void *function, *parameters;
  size_t parameter_bytes;
};

// Runs thread() once for every thread of the grid; throws Violation.
void run(const Kernel& kernel, const Grid& grid, const std::function<void()>& thread);

// Unless null: launches are written there for tests/ptx.py, with all buffers before and after.
extern std::FILE* record;

// Largest grid and shared memory of the runs so far, and the last kernel.
struct Extent {
  int64_t blocks, shared_bytes;
  const char* kernel;
};
extern Extent largest;

// For kernels.
void* shared_memory();
bool in_shared_memory(const void* at, int bytes);
int lane();
void block_barrier(const std::source_location& site);
void warp_barrier(unsigned mask, const std::source_location& site);
void note_atomic(const void* at, int bytes);
// The running thread has done what it must not. The first of these becomes the Violation; the block runs no further.
void fail(const std::string& what);

// What the lanes of a warp brought to an exchange.
class Lanes {
 public:
  static constexpr size_t kBytes = 48;
  template <class T>
  T from(int lane) const {
    static_assert(sizeof(T) <= kBytes);
    T value;
    std::memcpy(&value, bytes_[lane], sizeof value);
    return value;
  }
  void bring(int lane, const void* value) { std::memcpy(bytes_[lane], value, kBytes); }

 private:
  alignas(8) unsigned char bytes_[32][kBytes];
};
// Every lane of the mask brings a value and leaves with all of them. Memory is not ordered by it.
const Lanes& warp_exchange(unsigned mask, const void* value, size_t bytes, const std::source_location& site);
template <class T>
const Lanes& warp_exchange(unsigned mask, const T& value, const std::source_location& site) {
  static_assert(sizeof(T) <= Lanes::kBytes);
  return warp_exchange(mask, &value, sizeof value, site);
}

// The data arrives when its group is waited for and not before, and meanwhile the target holds NaN: a copy that is not
// waited for, or only with a later group, shows. `bytes` of the `size` come from global memory, the rest become 0.
void copy_async(void* shared, const void* global, int size, int bytes);
void commit_copies();
// All committed groups of this thread but the last `pending` have arrived.
void wait_for_copies_but(int pending);

}  // namespace simt

// CUDA threads on the CPU. Each thread of a block is a fibre with its own stack; blocks run one after another. Barriers,
// exchanges within a warp and atomics are real: what a kernel gets wrong about them is reported with line numbers.
#pragma once

#include <vector_types.h>

#include <cstdint>
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

// Runs thread() once for every thread of the grid; throws Violation.
void run(const char* kernel, const Grid& grid, const std::function<void()>& thread);

// Largest grid and shared memory of the runs so far.
struct Extent {
  int64_t blocks, shared_bytes;
};
extern Extent largest;

// For kernels.
struct Lanes {
  uint64_t value[32];
};
void* shared_memory();
int lane();
void block_barrier(const std::source_location& site);
const Lanes& warp_exchange(unsigned mask, uint64_t value, const std::source_location& site);
void copy_async(void* shared, const void* global, int bytes);
void wait_for_copies();
void note_atomic(const void* at, int bytes);

}  // namespace simt

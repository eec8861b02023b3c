#include "simt/plants.h"

#include "cuda/copy_async.cuh"
#include "cuda/launch.cuh"

namespace dsconv::simt_test {
namespace {

using cuda::shared_memory;

constexpr int kThreads = 128, kBlocks = 4, kTotal = kThreads * kBlocks;

enum class Bug : uint8_t {
  none,
  out_of_bounds,         // reads one element behind the input
  shared_out_of_bounds,  // writes one element behind shared memory
  missing_barrier,       // reads what another thread of the block wrote
  divergent_barrier,     // half of the threads wait elsewhere
  early_exit,            // a thread leaves before the barrier
  divergent_shuffle,     // a lane of the mask does not come
  uncoalesced,           // lanes a row apart
  bank_conflict,         // lanes a row of banks apart
  forgotten_wait,        // the copy may not have arrived
  plain_add,             // += of all blocks to one sum
  misaligned             // a vector between vectors
};
constexpr const char* kBugs[] = {
    "none",       "out_of_bounds",     "shared_out_of_bounds", "missing_barrier", "divergent_barrier",
    "early_exit", "divergent_shuffle", "uncoalesced",          "bank_conflict",   "forgotten_wait",
    "plain_add",  "misaligned"};

struct Parameters {
  Bug bug;
  const float* x;
  float* y;    // x reversed within each block
  float* sum;  // of all x
};

__device__ void wait(const Parameters& p) {
  if (p.bug == Bug::missing_barrier) return;
  if (p.bug == Bug::divergent_barrier && threadIdx.x % 2 == 1) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__device__ float sum_of_warp(float value, const Parameters& p) {
  if (p.bug == Bug::divergent_shuffle && threadIdx.x == 40) return value;
  for (int by = 16; by > 0; by /= 2) value += __shfl_xor_sync(~0u, value, by);
  return value;
}

__global__ void reverse_and_sum(const Parameters p) {
  float* const tile = shared_memory<float>();
  const int t = threadIdx.x, first = blockIdx.x * kThreads;
  const int from = p.bug == Bug::uncoalesced ? t % 16 * 8 + t / 16 : t;
  const int at = p.bug == Bug::bank_conflict ? from % 4 * 32 + from / 4 : from;
  if (p.bug == Bug::out_of_bounds && first + t == kTotal - 1) {
    tile[at] = p.x[kTotal];
  } else if (p.bug == Bug::misaligned && t == 0) {
    const float4 four = *reinterpret_cast<const float4*>(p.x + first + 1);
    tile[at] = four.x + four.y + four.z + four.w;
  } else {
    cuda::copy_async(tile + at, p.x + first + from);
  }
  if (p.bug == Bug::shared_out_of_bounds && t == 0) tile[kThreads] = 0;
  if (p.bug != Bug::forgotten_wait) cuda::wait_for_copies();
  if (p.bug == Bug::early_exit && t == 5) return;
  wait(p);
  const int mirror = kThreads - 1 - t;
  const float value = tile[p.bug == Bug::bank_conflict ? mirror % 4 * 32 + mirror / 4 : mirror];
  p.y[first + t] = value;
  const float sum = sum_of_warp(value, p);
  if (t % 32 != 0) return;
  if (p.bug == Bug::plain_add) {
    *p.sum += sum;
  } else {
    atomicAdd(p.sum, sum);
  }
}

void launch(int bug, void* const* buffers) {
  auto *const x = static_cast<float*>(buffers[0]), *const y = static_cast<float*>(buffers[1]),
              *const sum = static_cast<float*>(buffers[2]);
  for (int i = 0; i < kTotal; ++i) x[i] = static_cast<float>(i % 23);
  *sum = 0;
  cuda::launch("reverse_and_sum", reverse_and_sum, kBlocks, kThreads, kThreads * sizeof(float), Runtime{},
               Parameters{static_cast<Bug>(bug), x, y, sum});
}

int wrong(void* const* buffers) {
  const auto *const x = static_cast<const float*>(buffers[0]), *const y = static_cast<const float*>(buffers[1]);
  int count = 0;
  float total = 0;
  for (int i = 0; i < kTotal; ++i) {
    count += !(y[i] == x[i / kThreads * kThreads + kThreads - 1 - i % kThreads]);
    total += x[i];
  }
  return count + !(*static_cast<const float*>(buffers[2]) == total);
}

constexpr int64_t kBytes[] = {kTotal * sizeof(float), kTotal * sizeof(float), sizeof(float)};

}  // namespace

extern const Plant kStreamPlant = {kBugs, kBytes, launch, wrong};

}  // namespace dsconv::simt_test

#include "simt/plants.h"

#include <cstdio>
#include <memory>

#include "cuda/copy_async.cuh"
#include "cuda/launch.cuh"
#include "simt/trace.h"

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

}  // namespace

int run_plant(const std::string& name) {
  Parameters p{};
  bool known = false;
  for (size_t i = 0; i < std::size(kBugs); ++i) {
    if (name != kBugs[i]) continue;
    known = true;
    p.bug = static_cast<Bug>(i);
  }
  if (!known) throw std::invalid_argument("no planted bug is called " + name);
  int noticed = 0;
  const auto notice = [&](const std::string& what) {
    std::printf("noticed: %s\n", what.c_str());
    ++noticed;
  };
  const auto aligned = [] {
    return std::unique_ptr<float, void (*)(void*)>(static_cast<float*>(std::aligned_alloc(128, kTotal * sizeof(float))),
                                                   std::free);
  };
  const auto x = aligned(), y = aligned();
  for (int i = 0; i < kTotal; ++i) x.get()[i] = static_cast<float>(i % 23);
  for (simt::Order order : {simt::Order::forward, simt::Order::reverse, simt::Order::shuffled}) {
    std::fill(y.get(), y.get() + kTotal, NAN);
    float* const sum = new float(0);
    p.x = x.get();
    p.y = y.get();
    p.sum = sum;
    simt::order = order;
    const auto range = [](const void* begin, int64_t count) {
      return simt::trace::Range{static_cast<const unsigned char*>(begin), count * int64_t{sizeof(float)}};
    };
    simt::trace::set_buffers({range(x.get(), kTotal), range(y.get(), kTotal), range(sum, 1)});
    try {
      cuda::launch("reverse_and_sum", reverse_and_sum, kBlocks, kThreads, kThreads * sizeof(float), Runtime{}, p);
    } catch (const simt::Violation& violation) {
      notice(violation.what());
    }
    const simt::trace::Report report = simt::trace::take_report();
    for (const std::string& violation : report.violations) notice(violation);
    int wrong = 0;
    float total = 0;
    for (int i = 0; i < kTotal; ++i) {
      wrong += !(p.y[i] == p.x[i / kThreads * kThreads + kThreads - 1 - i % kThreads]);
      total += p.x[i];
    }
    if (wrong > 0) notice(std::to_string(wrong) + " values are wrong");
    if (!(*sum == total)) notice("the sum is wrong");
    const auto& c = report.counts;
    if (order == simt::Order::forward)
      std::printf("sectors %lld for %lld bytes, wavefronts %lld of %lld\n", static_cast<long long>(c.sectors_requested),
                  static_cast<long long>(c.bytes_read + c.bytes_written), static_cast<long long>(c.wavefronts),
                  static_cast<long long>(c.fewest_wavefronts));
    delete sum;
  }
  return noticed > 0 ? 1 : 0;
}

}  // namespace dsconv::simt_test

// Mistakes in the use of tensor-core instructions and grouped copies: a product whose operand a comes through a ring of
// two stages, and b by plain stores of the warp that reads it.
#include "cuda/launch.cuh"
#include "cuda/mma.cuh"
#include "simt/plants.h"

namespace dsconv::simt_test {
namespace {

using cuda::shared_memory;

constexpr int kM = 16, kN = 16, kK = 64, kChunk = 16, kThreads = 64;  // a warp computes 8 columns
constexpr int kRowBytes = kChunk * sizeof(__half), kWidePitch = 128;

enum class Bug : uint8_t {
  product,            // without a mistake
  swapped_fragments,  // of a
  no_group_wait,      // the chunk may not have arrived
  wrong_group,        // the wait is for the chunk before
  early_refill,       // a stage is filled while the other warp reads it
  divergent_mma,      // a lane does not come
  misaligned_row,     // of ldmatrix
  no_warp_barrier,    // between the stores of b and its loads
  conflicting_rows    // rows a multiple of all banks apart
};
constexpr const char* kBugs[] = {"product",        "swapped_fragments", "no_group_wait",
                                 "wrong_group",    "early_refill",      "divergent_mma",
                                 "misaligned_row", "no_warp_barrier",   "conflicting_rows"};

struct Parameters {
  Bug bug;
  const __half *a, *b;  // [kM][kK], [kK][kN]
  float* c;             // [kM][kN]
};

__global__ void product(const Parameters p) {
  auto* const shared = shared_memory<char>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int pitch = p.bug == Bug::conflicting_rows ? kWidePitch : kRowBytes + 16;
  const int stage = kM * pitch;
  char* const own = shared + 2 * stage + warp * kChunk * 16;  // of b
  const auto fetch = [&](int chunk) {
    const int row = lane % 16, half = lane / 16;
    if (warp == 0 && chunk < kK / kChunk)
      cuda::copy_async_16(shared + chunk % 2 * stage + row * pitch + half * 16,
                          p.a + row * kK + chunk * kChunk + half * 8, 16);
    cuda::commit_copies();
  };
  float d[4] = {0, 0, 0, 0};
  fetch(0);
  for (int chunk = 0; chunk < kK / kChunk; ++chunk) {
    fetch(chunk + 1);
    if (p.bug == Bug::wrong_group) {
      cuda::wait_for_copies_but<2>();
    } else if (p.bug != Bug::no_group_wait) {
      cuda::wait_for_copies_but<1>();
    }
    __syncthreads();
    if (lane < kChunk) {
      const __half* const from = p.b + (chunk * kChunk + lane) * kN + warp * 8;
      reinterpret_cast<uint4*>(own)[lane] = *reinterpret_cast<const uint4*>(from);
    }
    if (p.bug != Bug::no_warp_barrier) __syncwarp();
    uint32_t a[4], b[2];
    const int skew = p.bug == Bug::misaligned_row && lane == 3 ? 8 : 0;
    cuda::ldmatrix_x4(a, shared + chunk % 2 * stage + lane % 16 * pitch + lane / 16 * 16 + skew);
    cuda::ldmatrix_x2_trans(b, own + lane % kChunk * 16);
    if (p.bug == Bug::swapped_fragments) {
      const uint32_t first = a[1];
      a[1] = a[2];
      a[2] = first;
    }
    if (p.bug != Bug::divergent_mma || threadIdx.x != 40) cuda::mma_m16n8k16<__half>(d, a, b);
    if (p.bug != Bug::early_refill) __syncthreads();
  }
  for (int i = 0; i < 4; ++i) p.c[(lane / 4 + i / 2 * 8) * kN + warp * 8 + lane % 4 * 2 + i % 2] = d[i];
}

void launch(int bug, void* const* buffers) {
  auto *const a = static_cast<__half*>(buffers[0]), *const b = static_cast<__half*>(buffers[1]);
  for (int i = 0; i < kM * kK; ++i) a[i] = __float2half(static_cast<float>(i * 7 % 17 - 8));
  for (int i = 0; i < kK * kN; ++i) b[i] = __float2half(static_cast<float>(i * 5 % 13 - 6));
  const int64_t shared_bytes = 2 * kM * kWidePitch + kThreads / 32 * kChunk * 16;
  cuda::launch("product", product, 1, kThreads, shared_bytes, Runtime{},
               Parameters{static_cast<Bug>(bug), a, b, static_cast<float*>(buffers[2])});
}

int wrong(void* const* buffers) {
  const auto *const a = static_cast<const __half*>(buffers[0]), *const b = static_cast<const __half*>(buffers[1]);
  const auto* const c = static_cast<const float*>(buffers[2]);
  int count = 0;
  for (int i = 0; i < kM * kN; ++i) {
    float sum = 0;
    for (int k = 0; k < kK; ++k) sum += __half2float(a[i / kN * kK + k]) * __half2float(b[k * kN + i % kN]);
    count += !(c[i] == sum);
  }
  return count;
}

constexpr int64_t kBytes[] = {kM * kK * sizeof(__half), kK * kN * sizeof(__half), kM * kN * sizeof(float)};

}  // namespace

extern const Plant kMatrixPlant = {kBugs, kBytes, launch, wrong};

}  // namespace dsconv::simt_test

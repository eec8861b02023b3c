// A kernel around each primitive: the harness runs them on the CPU (driver --primitive), tests/ptx.py runs what nvcc
// makes of them, and tests/test_mma.py compares. In and out are 32-bit words, those of a thread side by side.
#include "cuda/launch.cuh"
#include "cuda/mma.cuh"
#include "simt/primitives.h"

namespace dsconv::simt_test {
namespace {

using namespace cuda;

// Each lane: d, a, b.
template <int kA, int kB, class Multiply>
__device__ void multiply(const Words& p, Multiply instruction) {
  const uint32_t* const in = p.in + threadIdx.x * (4 + kA + kB);
  float d[4];
  uint32_t a[kA], b[kB];
  for (int i = 0; i < 4; ++i) d[i] = __builtin_bit_cast(float, in[i]);
  for (int i = 0; i < kA; ++i) a[i] = in[4 + i];
  for (int i = 0; i < kB; ++i) b[i] = in[4 + kA + i];
  instruction(d, a, b);
  for (int i = 0; i < 4; ++i) p.out[threadIdx.x * 4 + i] = __builtin_bit_cast(uint32_t, d[i]);
}

// The row of each lane, in bytes from the start of shared memory; then shared memory.
template <int kMatrices, class Load>
__device__ void load_matrices(const Words& p, Load instruction) {
  auto* const shared = shared_memory<uint32_t>();
  for (int i = threadIdx.x; i < kSharedWords; i += kLanes) shared[i] = p.in[kLanes + i];
  __syncthreads();
  uint32_t r[kMatrices];
  instruction(r, reinterpret_cast<const char*>(shared) + p.in[threadIdx.x]);
  for (int i = 0; i < kMatrices; ++i) p.out[threadIdx.x * kMatrices + i] = r[i];
}

}  // namespace

extern "C" {
__global__ void mma_m16n8k16_f16(const Words p) {
  multiply<4, 2>(p, [](auto& d, auto& a, auto& b) { mma_m16n8k16<__half>(d, a, b); });
}
__global__ void mma_m16n8k16_bf16(const Words p) {
  multiply<4, 2>(p, [](auto& d, auto& a, auto& b) { mma_m16n8k16<__nv_bfloat16>(d, a, b); });
}
__global__ void mma_m16n8k8_tf32(const Words p) {
  multiply<4, 2>(p, [](auto& d, auto& a, auto& b) { cuda::mma_m16n8k8_tf32(d, a, b); });
}
__global__ void mma_m16n8k8_f16(const Words p) {
  multiply<2, 1>(p, [](auto& d, auto& a, auto& b) { cuda::mma_m16n8k8_f16(d, a, b); });
}
__global__ void ldmatrix_x4(const Words p) {
  load_matrices<4>(p, [](auto& r, const void* row) { cuda::ldmatrix_x4(r, row); });
}
__global__ void ldmatrix_x4_trans(const Words p) {
  load_matrices<4>(p, [](auto& r, const void* row) { cuda::ldmatrix_x4_trans(r, row); });
}
__global__ void ldmatrix_x2(const Words p) {
  load_matrices<2>(p, [](auto& r, const void* row) { cuda::ldmatrix_x2(r, row); });
}
__global__ void ldmatrix_x2_trans(const Words p) {
  load_matrices<2>(p, [](auto& r, const void* row) { cuda::ldmatrix_x2_trans(r, row); });
}
__global__ void to_tf32(const Words p) {
  p.out[threadIdx.x] = cuda::to_tf32(__builtin_bit_cast(float, p.in[threadIdx.x]));
}

// Three groups of copies, each looked at after its own wait: 16 bytes of which in[0], in[1] come, and 4 bytes.
__global__ void copies(const Words p) {
  auto* const to = shared_memory<uint32_t>() + threadIdx.x * kCopied;
  const uint32_t *const sizes = p.in + threadIdx.x * 2, *const from = p.in + kLanes * 2 + threadIdx.x * kCopied;
  uint32_t* const out = p.out + threadIdx.x * kCopied;
  copy_async_16(to, from, sizes[0]);
  commit_copies();
  copy_async_16(to + 4, from + 4, sizes[1]);
  commit_copies();
  copy_async(reinterpret_cast<float*>(to + 8), reinterpret_cast<const float*>(from + 8));
  wait_for_copies_but<1>();
  for (int i = 0; i < 4; ++i) out[i] = to[i];
  wait_for_copies_but<0>();
  for (int i = 4; i < 8; ++i) out[i] = to[i];
  wait_for_copies();
  for (int i = 8; i < kCopied; ++i) out[i] = i == 8 ? to[i] : 0;
}
}

const Primitive* find_primitive(std::string_view name) {
  static constexpr Primitive kAll[] = {
      {"mma_m16n8k16_f16", mma_m16n8k16_f16, 4},
      {"mma_m16n8k16_bf16", mma_m16n8k16_bf16, 4},
      {"mma_m16n8k8_tf32", mma_m16n8k8_tf32, 4},
      {"mma_m16n8k8_f16", mma_m16n8k8_f16, 4},
      {"ldmatrix_x4", ldmatrix_x4, 4},
      {"ldmatrix_x4_trans", ldmatrix_x4_trans, 4},
      {"ldmatrix_x2", ldmatrix_x2, 2},
      {"ldmatrix_x2_trans", ldmatrix_x2_trans, 2},
      {"to_tf32", to_tf32, 1},
      {"copies", copies, kCopied},
  };
  for (const Primitive& primitive : kAll) {
    if (primitive.name == name) return &primitive;
  }
  return nullptr;
}

}  // namespace dsconv::simt_test

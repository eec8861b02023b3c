// The matrix product within a block of the fused kernel: sums += P Q^T, where the rows of P and Q are pixels and outputs
// or, for contiguous tensors, outputs and pixels. A warp has 32 rows of P and kColumns, 32 or 64, rows of Q.
//
// F names the factors: the storage type of the tensors, which for __half and __nv_bfloat16 means tensor cores and for
// float means none, or Tf32: float tensors whose values are rounded for tensor cores.
#pragma once

#include <type_traits>

#include "cuda/mma.cuh"
#include "cuda/storage.cuh"

namespace dsconv::cuda {

struct Tf32 {};
template <class F>
using Storage = std::conditional_t<std::is_same_v<F, Tf32>, float, F>;

// One chunk of channels of one row: as many as 64 bytes hold.
constexpr int kRowBytes = 64, kUnits = kRowBytes / 16;
template <class S>
constexpr int kChunk = kRowBytes / sizeof(S);

// A matrix in shared memory, rows of 64 bytes. Eight neighbouring rows of the same unit of 16 bytes lie in different
// banks (ldmatrix), and so do rows that are 2^shift apart (the depthwise stage writes two such at a time).
struct Operand {
  uint4* data;
  int shift;

  __device__ uint4* unit(int row, int u) const {
    return data + (row ^ (row >> shift & 1)) * kUnits + (u ^ (row >> 1 & 3));
  }
};

// A warp's part of the product: the first of its rows of P and of Q.
struct WarpTile {
  int row, column;
};

// The sums that a warp lays out in shared memory at a time: kSumRows x 32.
constexpr int kSumRows = 16, kSumPitch = 40;

// d += a b over 32 bytes of channels. Before sm_80 tensor cores take 8 halves at a time, and neither bfloat16 nor tf32:
// choose() leaves those out, and the instruction traps.
template <class F>
__device__ inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  if constexpr (__is_same(F, __half)) {
    mma_m16n8k8_f16(d, {a[0], a[1]}, {b[0]});
    mma_m16n8k8_f16(d, {a[2], a[3]}, {b[1]});
    return;
  }
#endif
  if constexpr (__is_same(F, Tf32)) {
    mma_m16n8k8_tf32(d, a, b);
  } else {
    mma_m16n8k16<F>(d, a, b);
  }
}

// On tensor cores: ldmatrix gives each lane the words of a row that mma expects, whether a word is two halves or a float.
template <class F, int columns, bool kWeightsAreP>
class Product {
 public:
  static constexpr int kColumns = columns;

  __device__ void start() {
#pragma unroll
    for (auto& rows : sum_) {
#pragma unroll
      for (auto& quad : rows) quad[0] = quad[1] = quad[2] = quad[3] = 0;
    }
  }

  // Adds `steps` halves of a chunk.
  __device__ void add(const WarpTile& tile, const Operand& p, const Operand& q, int steps) {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      uint32_t a[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        ldmatrix_x4(a[i], p.unit(tile.row + 16 * i + lane % 16, 2 * step + lane / 16));
        if constexpr (kWeightsAreP) round(a[i]);
      }
#pragma unroll
      for (int j = 0; j < kColumns / 16; ++j) {
        uint32_t b[4];
        ldmatrix_x4(b, q.unit(tile.column + 16 * j + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
        if constexpr (!kWeightsAreP) round(b);
        const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          multiply_add<F>(sum_[i][2 * j], a[i], low);
          multiply_add<F>(sum_[i][2 * j + 1], a[i], high);
        }
      }
    }
  }

  // Rows from kSumRows half on and columns from 32 part on of the warp's tile; registers have no index.
  __device__ void put(int part, int half, float* to) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j) {
        if (i != half || j / 4 != part) continue;
        const float (&quad)[4] = sum_[i][j];
        float* const at = to + lane / 4 * kSumPitch + 8 * (j % 4) + lane % 4 * 2;
        *reinterpret_cast<float2*>(at) = make_float2(quad[0], quad[1]);
        *reinterpret_cast<float2*>(at + 8 * kSumPitch) = make_float2(quad[2], quad[3]);
      }
    }
  }

 private:
  // Weights come as memory has them; depthwise values were rounded when they were written.
  __device__ static void round(uint32_t (&bits)[4]) {
    if constexpr (__is_same(F, Tf32)) {
#pragma unroll
      for (uint32_t& b : bits) b = to_tf32(__builtin_bit_cast(float, b));
    }
  }

  float sum_[2][kColumns / 8][4];
};

// In float32 as it is: on CUDA cores. A lane has rows 8 i + lane % 8 of P and, of each 32 rows of Q, eight neighbours.
template <int columns, bool kWeightsAreP>
class Product<float, columns, kWeightsAreP> {
 public:
  static constexpr int kColumns = columns;

  __device__ void start() {
#pragma unroll
    for (auto& row : sum_) {
#pragma unroll
      for (float& sum : row) sum = 0;
    }
  }

  __device__ void add(const WarpTile& tile, const Operand& p, const Operand& q, int steps) {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int u = 0; u < 2 * steps; ++u) {
      float4 a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = *reinterpret_cast<const float4*>(p.unit(tile.row + 8 * i + lane % 8, u));
#pragma unroll
      for (int j = 0; j < kColumns / 4; ++j) {
        const int row = tile.column + j / 8 * 32 + lane / 8 * 8 + j % 8;
        const float4 b = *reinterpret_cast<const float4*>(q.unit(row, u));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sum_[i][j] += a[i].x * b.x;
          sum_[i][j] += a[i].y * b.y;
          sum_[i][j] += a[i].z * b.z;
          sum_[i][j] += a[i].w * b.w;
        }
      }
    }
  }

  __device__ void put(int part, int half, float* to) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns / 4; j += 4) {
        if (i / 2 != half || j / 8 != part) continue;
        const float* const four = sum_[i] + j;
        *reinterpret_cast<float4*>(to + (8 * (i % 2) + lane % 8) * kSumPitch + lane / 8 * 8 + j % 8) =
            make_float4(four[0], four[1], four[2], four[3]);
      }
    }
  }

 private:
  float sum_[4][kColumns / 4];
};

}  // namespace dsconv::cuda

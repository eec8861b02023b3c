// The storage types of tensors, one value or one vector of channels at a time, as the numbers kernels compute with.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_types.h>

#include <cstdint>

namespace dsconv::cuda {

template <class S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class S>
using Compute = typename ComputeOf<S>::type;

// Explicit conversions: torch's build flags disable the implicit ones of the half types.
__device__ inline double widen(double value) { return value; }
__device__ inline float widen(float value) { return value; }
__device__ inline float widen(__half value) { return __half2float(value); }
__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline void narrow(double value, double* out) { *out = value; }
__device__ inline void narrow(float value, float* out) { *out = value; }
__device__ inline void narrow(float value, __half* out) { *out = __float2half_rn(value); }
__device__ inline void narrow(float value, __nv_bfloat16* out) { *out = __float2bfloat16_rn(value); }

// Two neighbouring values of a half type as the 32 bits that memory holds.
template <class S>
__device__ inline float2 widen_pair(uint32_t bits) {
  if constexpr (__is_same(S, __half)) {
    __half2 pair;
    memcpy(&pair, &bits, sizeof pair);
    return __half22float2(pair);
  } else {  // the upper half of a float
    return {__builtin_bit_cast(float, bits << 16), __builtin_bit_cast(float, bits & 0xffff0000u)};
  }
}
__device__ inline __half2 pair_of(float low, float high, __half) { return __floats2half2_rn(low, high); }
__device__ inline __nv_bfloat162 pair_of(float low, float high, __nv_bfloat16) {
  return __floats2bfloat162_rn(low, high);
}
template <class S>
__device__ inline uint32_t narrow_pair(float low, float high) {
  const auto pair = pair_of(low, high, S{});
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

// Elements of a 16-byte vector.
template <class S>
constexpr int kWide = 16 / sizeof(S);

// V neighbouring channels of a position: one, or the 16 bytes that one access moves.
template <class S, int V>
struct Channels {
  static_assert(V == 1 || V == kWide<S>);

  float value[V];

  __device__ void load(const S* from) {
    if constexpr (V == 1) {
      value[0] = widen(__ldg(from));
    } else {
      unpack(__ldg(reinterpret_cast<const uint4*>(from)));
    }
  }
  __device__ void zero() {
    for (int i = 0; i < V; ++i) value[i] = 0;
  }
  __device__ void store(S* to) const {
    if constexpr (V == 1) {
      narrow(value[0], to);
    } else {
      *reinterpret_cast<uint4*>(to) = pack();
    }
  }

 private:
  __device__ void unpack(const uint4 bits) {
    const uint32_t word[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(S) == 4) {
        value[i] = __builtin_bit_cast(float, word[i]);
      } else {
        const float2 pair = widen_pair<S>(word[i]);
        value[2 * i] = pair.x;
        value[2 * i + 1] = pair.y;
      }
    }
  }
  __device__ uint4 pack() const {
    uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(S) == 4) {
        word[i] = __builtin_bit_cast(uint32_t, value[i]);
      } else {
        word[i] = narrow_pair<S>(value[2 * i], value[2 * i + 1]);
      }
    }
    return {word[0], word[1], word[2], word[3]};
  }
};

}  // namespace dsconv::cuda

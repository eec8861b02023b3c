// The storage types of tensors, one value or one vector of channels at a time, as the numbers kernels compute with.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <string.h>
#include <vector_functions.h>

#include <cstdint>

#include "geometry.h"

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
// As the bits that are stored: the harness of tests/simt sees no stores of class objects.
__device__ inline void narrow(float value, __half* out) {
  *reinterpret_cast<unsigned short*>(out) = __half_as_ushort(__float2half_rn(value));
}
__device__ inline void narrow(float value, __nv_bfloat16* out) {
  *reinterpret_cast<unsigned short*>(out) = __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

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

// Four neighbouring values in one access.
template <class S>
__device__ inline float4 load_quad(const S* from) {
  if constexpr (sizeof(S) == 4) {
    return __ldg(reinterpret_cast<const float4*>(from));
  } else {
    const uint2 bits = __ldg(reinterpret_cast<const uint2*>(from));
    const float2 low = widen_pair<S>(bits.x), high = widen_pair<S>(bits.y);
    return make_float4(low.x, low.y, high.x, high.y);
  }
}
template <class S>
__device__ inline void store_quad(float4 value, S* to) {
  if constexpr (sizeof(S) == 4) {
    *reinterpret_cast<float4*>(to) = value;
  } else {
    // One number: of a uint2 nvcc would make two stores here.
    const uint64_t high = narrow_pair<S>(value.z, value.w);
    *reinterpret_cast<uint64_t*>(to) = high << 32 | narrow_pair<S>(value.x, value.y);
  }
}

// Calls use.template operator()<S>() for the storage type, one of three.
template <class Use>
DSCONV_HD inline void with_storage(DType dtype, Use use) {
  if (dtype == DType::f32) return use.template operator()<float>();
  if (dtype == DType::bf16) return use.template operator()<__nv_bfloat16>();
  return use.template operator()<__half>();
}

__device__ inline float load_one(DType dtype, const void* data, int64_t index) {
  float value;
  with_storage(dtype, [&]<class S>() { value = widen(__ldg(static_cast<const S*>(data) + index)); });
  return value;
}

// Elements of a 16-byte vector.
template <class S>
constexpr int kWide = 16 / sizeof(S);

// V neighbouring channels of a position as memory has them: one, or the 16 bytes that one access moves. They are
// computed with in parts of kPart floats: halves unpacked all at once would take the registers of twice as many.
template <class S, int V>
struct Channels {
  static_assert(V == 1 || V == kWide<S>);
  static constexpr int kPart = V < 4 ? V : 4, kParts = V / kPart;

  uint32_t word[V == 1 ? 1 : 4];

  __device__ void load(const S* from) {
    if constexpr (V == 1) {
      word[0] = __builtin_bit_cast(uint32_t, widen(__ldg(from)));
    } else {
      const uint4 bits = __ldg(reinterpret_cast<const uint4*>(from));
      word[0] = bits.x;
      word[1] = bits.y;
      word[2] = bits.z;
      word[3] = bits.w;
    }
  }
  __device__ void zero() {
#pragma unroll
    for (uint32_t& w : word) w = 0;
  }
  __device__ void part(int index, float (&value)[kPart]) const {
    if constexpr (sizeof(S) == 4 || V == 1) {
#pragma unroll
      for (int i = 0; i < kPart; ++i) value[i] = __builtin_bit_cast(float, word[i]);
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 pair = widen_pair<S>(word[2 * index + i]);
        value[2 * i] = pair.x;
        value[2 * i + 1] = pair.y;
      }
    }
  }
  __device__ static void store(const float* value, S* to) {
    if constexpr (V == 1) {
      narrow(value[0], to);
    } else if constexpr (sizeof(S) == 4) {
      *reinterpret_cast<float4*>(to) = make_float4(value[0], value[1], value[2], value[3]);
    } else {
      *reinterpret_cast<uint4*>(to) =
          make_uint4(narrow_pair<S>(value[0], value[1]), narrow_pair<S>(value[2], value[3]),
                     narrow_pair<S>(value[4], value[5]), narrow_pair<S>(value[6], value[7]));
    }
  }
};

}  // namespace dsconv::cuda

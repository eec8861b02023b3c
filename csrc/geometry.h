// Sizes, halos and tiles of a window. Everything is static: an ISA-specific object must not share a copy with the
// others.
#pragma once

#include <cstdint>

#include "problem.h"

#if defined(__CUDACC__)
#define DSCONV_HD __host__ __device__
#else
#define DSCONV_HD
#endif

namespace dsconv {

DSCONV_HD static inline constexpr int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
DSCONV_HD static inline constexpr int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
DSCONV_HD static inline constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
DSCONV_HD static inline constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Division that rounds down for negative numerators too (divisor > 0).
DSCONV_HD static inline constexpr int64_t floor_div(int64_t a, int64_t b) {
  return a >= 0 ? a / b : -((-a + b - 1) / b);
}

// Ho = floor((H + pad_low + pad_high - dilation*(taps-1) - 1) / stride) + 1; not positive when the window does not fit.
static inline constexpr int64_t output_size(int64_t in, int64_t taps, int64_t stride, int64_t dilation, int64_t pad_low,
                                            int64_t pad_high) {
  return floor_div(in + pad_low + pad_high - dilation * (taps - 1) - 1, stride) + 1;
}

// Input positions that `count` neighbouring outputs read.
static inline constexpr int64_t input_extent(int64_t count, int64_t taps, int64_t stride, int64_t dilation) {
  return (count - 1) * stride + (taps - 1) * dilation + 1;
}

static inline constexpr int64_t product(const int64_t (&size)[3]) { return size[0] * size[1] * size[2]; }

static inline constexpr int64_t element_size(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }

// Elements of a [N, C, spatial] tensor.
static inline constexpr int64_t numel(int64_t batch, int64_t channels, const int64_t (&size)[3]) {
  return batch * channels * product(size);
}

// Largest element offset a view reaches: int32 kernels may run only when it fits.
static inline int64_t max_offset(const View& v, int64_t batch, int64_t channels, const int64_t (&size)[3]) {
  int64_t offset = (batch - 1) * v.stride[0] + (channels - 1) * v.stride[1];
  for (int i = 0; i < 3; ++i) offset += (size[i] - 1) * v.stride[2 + i];
  return offset;
}

// Is every offset the view reaches below 2^31, with room for the pointer steps of a loop?
static inline bool fits_int32(const View& v, int64_t batch, int64_t channels, const int64_t (&size)[3]) {
  return v.data == nullptr || max_offset(v, batch, channels, size) < (int64_t{1} << 30);
}

}  // namespace dsconv

// csrc/cpu/pair_product.h for processors without AVX512-BF16: what Intel's manual says of VDPBF16PS (Intel 64 and IA-32
// Architectures Software Developer's Manual, volume 2), in vectors of any size.
#pragma once

#include <cmath>

#include "cpu/vec.h"

namespace dsconv::cpu::DSCONV_ISA {

// A subnormal operand or result is zero.
static inline float flushed_sum(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

template <class V>
static inline void multiply_pairs(V& sum, V a, V b) {
  for (unsigned lane = 0; lane < sizeof(V) / sizeof(float); ++lane) {
    const uint32_t x = bits_of(a[lane]), w = bits_of(b[lane]);
    const auto add = [&](uint32_t x_bits, uint32_t w_bits) {
      const float product = flushed_sum(float_of(x_bits)) * flushed_sum(float_of(w_bits));
      sum[lane] = flushed_sum(flushed_sum(sum[lane]) + product);
    };
    add(x & 0xffff0000, w & 0xffff0000);
    add(x << 16, w << 16);
  }
}

}  // namespace dsconv::cpu::DSCONV_ISA

// The instruction of AVX512-BF16 that multiplies pairs of bfloat16: what only a processor with it runs.
#pragma once

#include "vec.h"

namespace dsconv::cpu::DSCONV_ISA {

// sum += a.odd * b.odd, then a.even * b.even: of the bfloat16 values in the upper and lower halves of each lane.
template <class V>
DSCONV_INLINE void multiply_pairs(V& sum, V a, V b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "vm"(b));
}

}  // namespace dsconv::cpu::DSCONV_ISA

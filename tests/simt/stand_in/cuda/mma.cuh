// csrc/cuda/mma.cuh for the CPU.
#pragma once

#include <type_traits>

#include "cuda/copy_async.cuh"
#include "simt/matrix.h"

namespace dsconv::cuda {

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SimtSite site = SimtSite::current()) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  simt::mma(std::is_same_v<T, __half> ? simt::Element::f16 : simt::Element::bf16, 16, d, a, b, site);
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             SimtSite site = SimtSite::current()) {
  simt::mma(simt::Element::tf32, 8, d, a, b, site);
}
inline void mma_m16n8k8_f16(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1],
                            SimtSite site = SimtSite::current()) {
  simt::mma(simt::Element::f16, 8, d, a, b, site);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, SimtSite site = SimtSite::current()) {
  simt::ldmatrix(r, 4, false, row, site);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, SimtSite site = SimtSite::current()) {
  simt::ldmatrix(r, 4, true, row, site);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row, SimtSite site = SimtSite::current()) {
  simt::ldmatrix(r, 2, false, row, site);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row, SimtSite site = SimtSite::current()) {
  simt::ldmatrix(r, 2, true, row, site);
}

inline uint32_t to_tf32(float value) { return simt::to_tf32(value); }

}  // namespace dsconv::cuda

// Square transposes in registers, and vectors of which only a part lies in memory.
#pragma once

#include "unroll.h"

namespace dsconv::cpu::DSCONV_ISA {

// The first `count` values of storage as a vector, zeros beyond; nothing past them is touched.
template <class S, class T = Compute<S>>
DSCONV_INLINE Vec<T> load_part(const S* p, int64_t count) {
  if (count >= kLanes<T>) return load_wide<S>(p);
#if DSCONV_VECTOR_BYTES == 64
  const unsigned mask = (1u << count) - 1;
  if constexpr (sizeof(S) == 8) return _mm512_maskz_loadu_pd(mask, p);
  if constexpr (sizeof(S) == 4) return _mm512_maskz_loadu_ps(mask, p);
#elif DSCONV_VECTOR_BYTES == 32
  static constexpr int32_t kMasks[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  [[maybe_unused]] const auto mask =
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMasks + 8 - count * sizeof(S) / 4));
  if constexpr (sizeof(S) == 8) return _mm256_maskload_pd(p, mask);
  if constexpr (sizeof(S) == 4) return _mm256_maskload_ps(p, mask);
#endif
  S part[kLanes<T>] = {};
#if DSCONV_VECTOR_BYTES == 64
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(part), _mm256_maskz_loadu_epi16(mask, p));
#else
  for (int64_t i = 0; i < count; ++i) part[i] = p[i];
#endif
  return load_wide<S>(part);
}
template <class S, class T = Compute<S>>
DSCONV_INLINE void store_part(S* p, Vec<T> v, int64_t count) {
  if (count >= kLanes<T>) return store_narrow<S>(p, v);
#if DSCONV_VECTOR_BYTES == 64
  const unsigned mask = (1u << count) - 1;
  if constexpr (sizeof(S) == 8) return _mm512_mask_storeu_pd(p, mask, v);
  if constexpr (sizeof(S) == 4) return _mm512_mask_storeu_ps(p, mask, v);
#endif
  S part[kLanes<T>];
  store_narrow<S>(part, v);
#if DSCONV_VECTOR_BYTES == 64
  _mm256_mask_storeu_epi16(p, mask, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(part)));
#else
  for (int64_t i = 0; i < count; ++i) p[i] = part[i];
#endif
}

template <int bytes>
struct IntOf {
  typedef int32_t type;
};
template <>
struct IntOf<8> {
  typedef int64_t type;
};

// Rows become columns: blocks of 1, 2, 4 ... change places across the diagonal.
template <class T>
DSCONV_INLINE void transpose(Vec<T>* rows) {
  constexpr int kL = kLanes<T>;
  typedef typename IntOf<sizeof(T)>::type Index;
  unroll<5>([&]<int level>() __attribute__((always_inline)) {
    constexpr int s = 1 << level;
    if constexpr (s < kL) {
      Vec<Index> low, high;  // of two rows side by side
      unroll<kL>([&]<int l>() __attribute__((always_inline)) {
        low[l] = l & s ? kL + l - s : l;
        high[l] = l & s ? kL + l : l + s;
      });
      unroll<kL>([&]<int i>() __attribute__((always_inline)) {
        if constexpr ((i & s) == 0) {
          const Vec<T> a = rows[i], b = rows[i + s];
          rows[i] = __builtin_shuffle(a, b, low);
          rows[i + s] = __builtin_shuffle(a, b, high);
        }
      });
    }
  });
}

// Lane i of the result is the sum of the lanes of row i; zero from kCount rows on. Overwrites the rows.
template <class T, int kCount>
DSCONV_INLINE Vec<T> sum_of_lanes(Vec<T>* rows) {
  constexpr int kL = kLanes<T>;
  typedef typename IntOf<sizeof(T)>::type Index;
  static_assert(kCount <= kL);
  unroll<5>([&]<int level>() __attribute__((always_inline)) {
    constexpr int s = 1 << level;  // rows i and i + s become one
    if constexpr (s < kL) {
      Vec<Index> low, high;
      unroll<kL>([&]<int l>() __attribute__((always_inline)) {
        low[l] = l & s ? kL + l - s : l;
        high[l] = l & s ? kL + l : l + s;
      });
      unroll<kL>([&]<int i>() __attribute__((always_inline)) {
        if constexpr (i % (2 * s) == 0 && i < kCount) {
          const Vec<T> a = rows[i], b = i + s < kCount ? rows[i + s] : splat(T(0));
          rows[i] = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
        }
      });
    }
  });
  return rows[0];
}

}  // namespace dsconv::cpu::DSCONV_ISA

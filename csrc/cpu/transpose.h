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
// The lanes whose bits are set, the others not written.
template <class S, class T = Compute<S>>
DSCONV_INLINE void store_lanes(S* p, Vec<T> v, uint32_t lanes) {
#if DSCONV_VECTOR_BYTES == 64
  if constexpr (sizeof(S) == 8) return _mm512_mask_storeu_pd(p, lanes, v);
  if constexpr (sizeof(S) == 4) return _mm512_mask_storeu_ps(p, lanes, v);
  if constexpr (sizeof(S) == 2) {
    const __m256i bits = kRoundsBf16<S> && has_avx512_bf16 ? bf16_bits(v) : reinterpret_cast<__m256i>(narrowed<S>(v));
    _mm256_mask_storeu_epi16(p, lanes, bits);
  }
#else
  S part[kLanes<T>];
  store_narrow<S>(part, v);
  for (int l = 0; l < kLanes<T>; ++l)
    if (lanes >> l & 1) p[l] = part[l];
#endif
}
// The first lanes.
template <class S, class T = Compute<S>>
DSCONV_INLINE void store_part(S* p, Vec<T> v, int64_t count) {
  if (count >= kLanes<T>) return store_narrow<S>(p, v);
#if DSCONV_VECTOR_BYTES == 64
  store_lanes<S>(p, v, (1u << count) - 1);
#else
  S part[kLanes<T>];
  store_narrow<S>(part, v);
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

// Lanes of two vectors: kFirst, kFirst + 1, ... of both in turn, kUnit neighbours at a time, within pieces of kPiece lanes.
template <int kPiece, int kUnit, int kFirst, class T>
DSCONV_INLINE Vec<T> zipped(Vec<T> a, Vec<T> b) {
  Vec<typename IntOf<sizeof(T)>::type> places;
  unroll<kLanes<T>>([&]<int l>() __attribute__((always_inline)) {
    constexpr int unit = l % kPiece / kUnit, second = unit % 2 * kLanes<T>;
    places[l] = second + l / kPiece * kPiece + kFirst + unit / 2 * kUnit + l % kUnit;
  });
  return __builtin_shuffle(a, b, places);
}
// Pieces of kPiece lanes of two vectors: kFirst, kFirst + kStep, ... of the first, then those of the second.
template <int kPiece, int kFirst, int kStep, class T>
DSCONV_INLINE Vec<T> joined(Vec<T> a, Vec<T> b) {
  Vec<typename IntOf<sizeof(T)>::type> places;
  constexpr int kHalf = kLanes<T> / kPiece / 2;  // pieces
  unroll<kLanes<T>>([&]<int l>() __attribute__((always_inline)) {
    constexpr int piece = l / kPiece;
    places[l] = piece / kHalf * kLanes<T> + (kFirst + piece % kHalf * kStep) * kPiece + l % kPiece;
  });
  return __builtin_shuffle(a, b, places);
}

// Rows become columns: first in squares of 16 bytes, then these squares. Each step is one instruction that leaves its operands.
template <class T>
DSCONV_INLINE void transpose(Vec<T>* rows) {
  constexpr int kL = kLanes<T>, kPiece = 16 / sizeof(T), kPieces = kL / kPiece;
  unroll<kL / 2>([&]<int i>() __attribute__((always_inline)) {
    const Vec<T> a = rows[2 * i], b = rows[2 * i + 1];
    rows[2 * i] = zipped<kPiece, 1, 0, T>(a, b);
    rows[2 * i + 1] = zipped<kPiece, 1, kPiece / 2, T>(a, b);
  });
  if constexpr (kPiece == 4) {
    unroll<kL / 4>([&]<int i>() __attribute__((always_inline)) {
      Vec<T>* const r = rows + 4 * i;
      const Vec<T> a = r[0], b = r[1], c = r[2], d = r[3];
      r[0] = zipped<kPiece, 2, 0, T>(a, c);
      r[1] = zipped<kPiece, 2, 2, T>(a, c);
      r[2] = zipped<kPiece, 2, 0, T>(b, d);
      r[3] = zipped<kPiece, 2, 2, T>(b, d);
    });
  }
  // Piece m of row q * kPiece + j is now what piece q of row m * kPiece + j is to be.
  unroll<kPieces == 1 ? 0 : kPiece>([&]<int j>() __attribute__((always_inline)) {
    Vec<T>* const r = rows + j;
    if constexpr (kPieces == 2) {
      const Vec<T> a = r[0], b = r[kPiece];
      r[0] = joined<kPiece, 0, 1, T>(a, b);
      r[kPiece] = joined<kPiece, 1, 1, T>(a, b);
    } else {
      const Vec<T> a = joined<kPiece, 0, 1, T>(r[0], r[kPiece]), b = joined<kPiece, 2, 1, T>(r[0], r[kPiece]);
      const Vec<T> c = joined<kPiece, 0, 1, T>(r[2 * kPiece], r[3 * kPiece]);
      const Vec<T> d = joined<kPiece, 2, 1, T>(r[2 * kPiece], r[3 * kPiece]);
      r[0] = joined<kPiece, 0, 2, T>(a, c);
      r[kPiece] = joined<kPiece, 1, 2, T>(a, c);
      r[2 * kPiece] = joined<kPiece, 0, 2, T>(b, d);
      r[3 * kPiece] = joined<kPiece, 1, 2, T>(b, d);
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

// The vector type and the element types of one ISA. Included once per ISA object, after DSCONV_ISA and
// DSCONV_VECTOR_BYTES are set; everything lies in that ISA's own namespace, because a function shared between objects
// might be the copy that needs AVX-512.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "activations.h"

#define DSCONV_INLINE static inline __attribute__((always_inline))

namespace dsconv::cpu {
extern const bool has_avx512_bf16;  // has the processor instructions that round to bfloat16? (machine.cpp)
}

namespace dsconv::cpu::DSCONV_ISA {

constexpr int kVectorBytes = DSCONV_VECTOR_BYTES;
constexpr int kBlockBytes = 64;  // channels are handled in blocks of one cache line of the compute type

// Longest chain of additions: partial sums keep longer sums in float32 accurate. Without fused multiply-adds, products
// are rounded too.
constexpr int64_t kChain = DSCONV_VECTOR_BYTES > 16 ? 64 : 16;
constexpr int64_t kPositionChain = 16;  // the same for sums over positions, where terms of both signs cancel

template <class T>
constexpr int kBlock = kBlockBytes / sizeof(T);
template <class T>
constexpr int kLanes = kVectorBytes / sizeof(T);

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  // In memory, where it is no more aligned than its elements.
  typedef T unaligned __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
};
template <class T>
using Vec = typename VecOf<T>::type;

template <class T>
DSCONV_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VecOf<T>::unaligned*>(p);
}
template <class T>
DSCONV_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VecOf<T>::unaligned*>(p) = v;
}
template <class T>
DSCONV_INLINE Vec<T> splat(T s) {
  return s - Vec<T>{};
}

// Values as large (small) as a bound at least (most); NaN stays.
template <class V>
DSCONV_INLINE V at_least(V v, V bound) {
#if DSCONV_VECTOR_BYTES == 64  // one instruction, where GCC makes a comparison and a selection
  if constexpr (sizeof v[0] == 4) return _mm512_max_ps(bound, v);
  if constexpr (sizeof v[0] == 8) return _mm512_max_pd(bound, v);
#endif
  return v < bound ? bound : v;
}
template <class V>
DSCONV_INLINE V at_most(V v, V bound) {
#if DSCONV_VECTOR_BYTES == 64
  if constexpr (sizeof v[0] == 4) return _mm512_min_ps(bound, v);
  if constexpr (sizeof v[0] == 8) return _mm512_min_pd(bound, v);
#endif
  return v > bound ? bound : v;
}

// Loads a vector into a register: compilers would rather read memory again as the operand of every use.
template <class T>
DSCONV_INLINE Vec<T> load_once(const T* p) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)  // which do not look into asm
  return load(p);
#elif defined(__AVX__)
  Vec<T> v;
  asm("vmovups %1, %0" : "=v"(v) : "m"(*reinterpret_cast<const typename VecOf<T>::unaligned*>(p)));
  return v;
#elif defined(__SSE2__)
  Vec<T> v;
  asm("movups %1, %0" : "=x"(v) : "m"(*reinterpret_cast<const typename VecOf<T>::unaligned*>(p)));
  return v;
#else
  return load(p);
#endif
}

// A pointer that the compiler takes as it is: else it would add up its parts again at every use.
template <class T>
DSCONV_INLINE T* keep(T* p) {
  asm("" : "+r"(p));
  return p;
}

// Storage types. Half types are carried as bits; Compute is what kernels accumulate in.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
// The same as BFloat16 to all but the block kernels, which multiply neighbouring columns of it in pairs.
struct PairedBFloat16 : BFloat16 {};

template <class S>
constexpr bool kIsBFloat16 = __is_base_of(BFloat16, S);
template <class S>
constexpr bool kIsPaired = __is_same(S, PairedBFloat16);

template <class S>
struct ComputeOf {
  typedef float type;
};
template <>
struct ComputeOf<double> {
  typedef double type;
};
template <class S>
using Compute = typename ComputeOf<S>::type;

DSCONV_INLINE double widen(double x) { return x; }
DSCONV_INLINE float widen(float x) { return x; }
DSCONV_INLINE float widen(BFloat16 x) { return float_of(uint32_t{x.bits} << 16); }
DSCONV_INLINE float widen(Float16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  // Shift exponent and mantissa into place, then scale by 2^112: subnormals come out right, infinities and NaN are
  // patched.
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  const uint32_t finite = bits_of(float_of(magnitude) * 0x1p112f);
  return float_of(sign | (magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : finite));
#endif
}

DSCONV_INLINE void narrow(double x, double* out) { *out = x; }
DSCONV_INLINE void narrow(float x, float* out) { *out = x; }
DSCONV_INLINE void narrow(float x, BFloat16* out) {  // round to nearest even; NaN stays NaN
  const uint32_t u = bits_of(x);
  const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  out->bits = static_cast<uint16_t>((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}
DSCONV_INLINE void narrow(float x, Float16* out) {
#if defined(__F16C__)
  out->bits = static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
  const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;  // NaN
  } else if (magnitude >= 0x477ff000) {
    half = 0x7c00;  // rounds to infinity
  } else if (magnitude < 0x38800000) {
    // Subnormal: adding 0.5 aligns the 10 mantissa bits with the end of the float's, and rounds to nearest even.
    half = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
#endif
}

// dst[i] = src[i] in the compute type, and back.
template <class S>
DSCONV_INLINE void widen_row(Compute<S>* __restrict dst, const S* __restrict src, int64_t count) {
  int64_t i = 0;
#if defined(__F16C__)
  if constexpr (sizeof(S) == 2 && !kIsBFloat16<S>) {
    for (; i + 8 <= count; i += 8) {
      const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i));
      _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(h));
    }
  }
#endif
  for (; i < count; ++i) dst[i] = widen(src[i]);
}
template <class S>
DSCONV_INLINE void narrow_row(S* __restrict dst, const Compute<S>* __restrict src, int64_t count) {
  int64_t i = 0;
#if defined(__F16C__)
  if constexpr (sizeof(S) == 2 && !kIsBFloat16<S>) {
    for (; i + 8 <= count; i += 8) {
      const __m256 v = _mm256_loadu_ps(src + i);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + i), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    }
  }
#endif
  for (; i < count; ++i) narrow(src[i], dst + i);
}

#if DSCONV_VECTOR_BYTES == 64
// The number of each lane.
DSCONV_INLINE __m512i lane_numbers() { return _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0); }
#endif

// A vector of the compute type in storage.
template <class S>
struct BitsOf {
  typedef uint16_t type __attribute__((vector_size(kVectorBytes / 2)));
};
template <class S>
  requires(sizeof(S) == sizeof(Compute<S>))
struct BitsOf<S> {
  typedef Vec<S> type;
};
template <class S>
using Bits = typename BitsOf<S>::type;

template <class S>
DSCONV_INLINE Bits<S> load_bits(const S* p) {
  Bits<S> bits;
  memcpy(&bits, p, sizeof bits);
  return bits;
}
// Of types that are not widened, the same as load_once.
template <class S>
DSCONV_INLINE Bits<S> load_bits_once(const S* p) {
  if constexpr (sizeof(S) == sizeof(Compute<S>)) return load_once(p);
  return load_bits(p);
}
template <class S, class T = Compute<S>>
DSCONV_INLINE Vec<T> widened(Bits<S> bits) {
  if constexpr (sizeof(S) == sizeof(T)) {
    return bits;
  } else if constexpr (kIsBFloat16<S>) {
#if DSCONV_VECTOR_BYTES == 64  // into the upper words with one instruction, not two, where registers hold its constants
    if constexpr (kIsPaired<S>)
      return reinterpret_cast<Vec<T>>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(bits)), 16));
    const __m512i wide = _mm512_castsi256_si512(reinterpret_cast<__m256i>(bits));
    return reinterpret_cast<Vec<T>>(
        _mm512_maskz_permutexvar_epi16(0xaaaaaaaa, _mm512_slli_epi32(lane_numbers(), 16), wide));
#elif DSCONV_VECTOR_BYTES == 32  // two instructions: of a converted vector, GCC makes six
    return reinterpret_cast<Vec<T>>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(bits)), 16));
#else
    typedef uint32_t Word __attribute__((vector_size(kVectorBytes)));
    return reinterpret_cast<Vec<T>>(__builtin_convertvector(bits, Word) << 16);
#endif
  } else {
#if DSCONV_VECTOR_BYTES == 64
    return _mm512_cvtph_ps(reinterpret_cast<__m256i>(bits));
#elif defined(__F16C__)
    return _mm256_cvtph_ps(reinterpret_cast<__m128i>(bits));
#else
    Vec<T> v;
    for (int l = 0; l < kLanes<T>; ++l) v[l] = widen(Float16{bits[l]});
    return v;
#endif
  }
}
// One vector of the compute type from storage, and back.
template <class S, class T = Compute<S>>
DSCONV_INLINE Vec<T> load_wide(const S* p) {
  return widened<S>(load_bits(p));
}
// Rounded to the nearest bfloat16, to even; that is in the upper halves. NaN stays NaN if arithmetic made it, or if it
// was one in bfloat16: with all of 16 more bits set it would carry into the sign.
DSCONV_INLINE auto rounded_bits(Vec<float> v) {
  typedef uint32_t Word __attribute__((vector_size(kVectorBytes)));
  const Word u = reinterpret_cast<Word>(v);
  return u + (((u >> 16) & 1) + 0x7fff);
}
// The bits of a vector in storage, as a vector.
template <class S, class T = Compute<S>>
DSCONV_INLINE auto narrowed(Vec<T> v) {
  [[maybe_unused]] typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
  if constexpr (sizeof(S) == sizeof(T)) {
    return v;
  } else if constexpr (kIsBFloat16<S>) {
    const auto words = rounded_bits(v) >> 16;
#if DSCONV_VECTOR_BYTES == 32
    const auto bits = reinterpret_cast<__m256i>(words);
    return _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
#else
    return __builtin_convertvector(words, Half);
#endif
  } else {
#if DSCONV_VECTOR_BYTES == 64
    return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
    return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
#else
    S values[kLanes<T>];
    for (int l = 0; l < kLanes<T>; ++l) narrow(v[l], values + l);
    Half bits;
    memcpy(&bits, values, sizeof bits);
    return bits;
#endif
  }
}
// The bits of two vectors of a half type, side by side. (Through memory they would have to wait for each other.)
#if DSCONV_VECTOR_BYTES == 64
template <class S>
DSCONV_INLINE __m512i narrowed_pair(Vec<float> low, Vec<float> high) {
  if constexpr (kIsBFloat16<S>) {
    if (has_avx512_bf16) {  // a tenth of the instructions; subnormals become zeros
      __m512i bits;
      asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(bits) : "v"(low), "v"(high));
      return bits;
    }
    const __m512i odd =
        _mm512_set_epi32(0x3f003d, 0x3b0039, 0x370035, 0x330031, 0x2f002d, 0x2b0029, 0x270025, 0x230021, 0x1f001d,
                         0x1b0019, 0x170015, 0x130011, 0x0f000d, 0x0b0009, 0x070005, 0x030001);
    return _mm512_permutex2var_epi16(reinterpret_cast<__m512i>(rounded_bits(low)), odd,
                                     reinterpret_cast<__m512i>(rounded_bits(high)));
  } else {
    return _mm512_inserti64x4(_mm512_castsi256_si512(narrowed<S>(low)), narrowed<S>(high), 1);
  }
}
#elif DSCONV_VECTOR_BYTES == 32
template <class S>
DSCONV_INLINE __m256i narrowed_pair(Vec<float> low, Vec<float> high) {
  if constexpr (kIsBFloat16<S>) {
    const auto lows = reinterpret_cast<__m256i>(rounded_bits(low) >> 16);
    const auto highs = reinterpret_cast<__m256i>(rounded_bits(high) >> 16);
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(lows, highs), 0xd8);
  } else {
    return _mm256_set_m128i(narrowed<S>(high), narrowed<S>(low));
  }
}
#endif
// What a vector becomes in storage, as the compute type.
template <class S, class T = Compute<S>>
DSCONV_INLINE Vec<T> rounded(Vec<T> v) {
  if constexpr (sizeof(S) == sizeof(T)) {
    return v;
  } else if constexpr (kIsBFloat16<S>) {
    typedef uint32_t Word __attribute__((vector_size(kVectorBytes)));
    return reinterpret_cast<Vec<T>>(rounded_bits(v) & (Word{} + 0xffff0000));
  } else {
    const auto bits = narrowed<S>(v);
    S memory[kLanes<T>];
    memcpy(memory, &bits, sizeof bits);
    return load_wide<S>(memory);
  }
}
template <class S, class T = Compute<S>>
DSCONV_INLINE void store_narrow(S* p, Vec<T> v) {
  const auto bits = narrowed<S>(v);
  memcpy(p, &bits, sizeof bits);
}
// The same for bfloat16 where the processor rounds to it (has_avx512_bf16); subnormals become zeros.
template <class S>
constexpr bool kRoundsBf16 = kVectorBytes == 64 && kIsBFloat16<S>;
#if DSCONV_VECTOR_BYTES == 64
template <class V>
DSCONV_INLINE __m256i bf16_bits(V v) {
  __m256i bits;
  asm("vcvtneps2bf16 %1, %0" : "=v"(bits) : "v"(v));
  return bits;
}
#endif
template <class S, class V>
DSCONV_INLINE void store_bf16([[maybe_unused]] S* p, [[maybe_unused]] V v) {
#if DSCONV_VECTOR_BYTES == 64
  if constexpr (kRoundsBf16<S>) {
    const __m256i bits = bf16_bits(v);
    memcpy(p, &bits, sizeof bits);
  }
#endif
}
// Two of them, v at p and w at q: in the time of one.
template <class S, class V>
DSCONV_INLINE void store_bf16([[maybe_unused]] S* p, [[maybe_unused]] V v, [[maybe_unused]] S* q,
                              [[maybe_unused]] V w) {
#if DSCONV_VECTOR_BYTES == 64
  if constexpr (kRoundsBf16<S>) {
    __m512i bits;
    asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(bits) : "v"(v), "v"(w));
    const __m256i low = _mm512_castsi512_si256(bits), high = _mm512_extracti64x4_epi64(bits, 1);
    memcpy(p, &low, sizeof low);
    memcpy(q, &high, sizeof high);
  }
#endif
}

// A store that goes past the caches, without the read that fills a line before it is written. p is a multiple of the
// vector; the vectors that fill a cache line follow each other, or lines leave half full. `end_stream` before another
// thread reads them.
#if defined(__F16C__)
constexpr bool kStreams = true;
#else
constexpr bool kStreams = false;
#endif
template <class S, class Bits>
DSCONV_INLINE void stream_bits(S* p, Bits bits) {
#if defined(__F16C__)
  if constexpr (sizeof bits == 16)
    return _mm_stream_si128(reinterpret_cast<__m128i*>(p), reinterpret_cast<__m128i>(bits));
  if constexpr (sizeof bits == 32)
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(bits));
#endif
#if DSCONV_VECTOR_BYTES == 64
  if constexpr (sizeof bits == 64)
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), reinterpret_cast<__m512i>(bits));
#endif
  memcpy(p, &bits, sizeof bits);
}
template <class S, class T = Compute<S>>
DSCONV_INLINE void stream_narrow(S* p, Vec<T> v) {
  stream_bits(p, narrowed<S>(v));
}
DSCONV_INLINE void end_stream() {
#if defined(__F16C__)
  _mm_sfence();
#endif
}
// Two vectors side by side, past the caches if `streamed`.
template <class S, class T = Compute<S>>
DSCONV_INLINE void store_pair(S* p, Vec<T> low, Vec<T> high, bool streamed) {
#if DSCONV_VECTOR_BYTES >= 32
  if constexpr (sizeof(S) < sizeof(T)) {
    const auto bits = narrowed_pair<S>(low, high);
    if (streamed) return stream_bits(p, bits);
    memcpy(p, &bits, sizeof bits);
    return;
  }
#endif
  if (streamed) {
    stream_narrow(p, low);
    stream_narrow(p + kLanes<T>, high);
  } else {
    store_narrow(p, low);
    store_narrow(p + kLanes<T>, high);
  }
}

// A bump allocator over the workspace that an operator handed to a kernel; every piece starts on a cache line.
struct Arena {
  char* next;
};
template <class T>
DSCONV_INLINE T* take(Arena& arena, int64_t count) {
  T* p = reinterpret_cast<T*>(arena.next);
  arena.next += round_up(count * static_cast<int64_t>(sizeof(T)), kBlockBytes);
  return p;
}
DSCONV_INLINE Arena arena_at(void* workspace) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(workspace);
  return Arena{reinterpret_cast<char*>((address + kBlockBytes - 1) / kBlockBytes * kBlockBytes)};
}
template <class T>
DSCONV_INLINE int64_t piece_bytes(int64_t count) {
  return round_up(count * static_cast<int64_t>(sizeof(T)), kBlockBytes);
}

}  // namespace dsconv::cpu::DSCONV_ISA

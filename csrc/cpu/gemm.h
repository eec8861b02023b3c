// The matrix product behind every pointwise pass: rows of A (row-major, compute type) times packed panels of B.
#pragma once

#include "activation_rows.h"

namespace dsconv::cpu::DSCONV_ISA {

template <class T>
constexpr int kPanel = 2 * kLanes<T>;  // columns of a B panel: two vectors
// Rows of one block: rows x 2 accumulators, 2 vectors of B and a broadcast fit the register file (32 with AVX-512, else
// 16).
constexpr int kMaxRows = DSCONV_VECTOR_BYTES == 64 ? 12 : 6;

// c[row][kPanel] = sum over depth of a[row * lda + k] * panel[k][kPanel]
template <class T, int kRows>
static void multiply_rows(const T* a, int64_t lda, const T* panel, int64_t depth, T* c) {
  Vec<T> acc[kRows][2];
  for (int r = 0; r < kRows; ++r) acc[r][0] = acc[r][1] = splat(T(0));
  for (int64_t k = 0; k < depth; ++k) {
    const Vec<T> b0 = load(panel + k * kPanel<T>), b1 = load(panel + k * kPanel<T> + kLanes<T>);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const Vec<T> s = splat(a[r * lda + k]);
      acc[r][0] += s * b0;
      acc[r][1] += s * b1;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    store(c + r * kPanel<T>, acc[r][0]);
    store(c + r * kPanel<T> + kLanes<T>, acc[r][1]);
  }
}

template <class T>
static void multiply_panel(const T* a, int64_t lda, int64_t rows, const T* panel, int64_t depth, T* c) {
  using Block = void (*)(const T*, int64_t, const T*, int64_t, T*);
  static constexpr Block kBlocks[] = {
      nullptr,
      multiply_rows<T, 1>,
      multiply_rows<T, 2>,
      multiply_rows<T, 3>,
      multiply_rows<T, 4>,
      multiply_rows<T, 5>,
      multiply_rows<T, 6>,
#if DSCONV_VECTOR_BYTES == 64
      multiply_rows<T, 7>,
      multiply_rows<T, 8>,
      multiply_rows<T, 9>,
      multiply_rows<T, 10>,
      multiply_rows<T, 11>,
      multiply_rows<T, 12>,
#endif
  };
  int64_t done = 0;
  for (int64_t left = ceil_div(rows, kMaxRows); left > 0; --left) {
    const int64_t block = ceil_div(rows - done, left);
    kBlocks[block](a + done * lda, lda, panel, depth, c + done * kPanel<T>);
    done += block;
  }
}

// Weights [K, C] (any strides) as panels [K / kPanel][C][kPanel]; columns past K are zero.
template <class S, class T = Compute<S>>
static void pack_panels(T* packed, const View& weight, int64_t out_channels, int64_t in_channels) {
  for (int64_t first = 0; first < out_channels; first += kPanel<T>) {
    const int64_t columns = min64(kPanel<T>, out_channels - first);
    const S* source = static_cast<const S*>(weight.data) + first * weight.stride[0];
    for (int64_t c = 0; c < in_channels; ++c, packed += kPanel<T>) {
      for (int64_t k = 0; k < columns; ++k) packed[k] = widen(source[k * weight.stride[0] + c * weight.stride[1]]);
      for (int64_t k = columns; k < kPanel<T>; ++k) packed[k] = T(0);
    }
  }
}
template <class T>
DSCONV_INLINE int64_t packed_panels_count(int64_t out_channels, int64_t in_channels) {
  return ceil_div(out_channels, kPanel<T>) * kPanel<T> * in_channels;
}

template <class S>
struct PackedPanels {
  using T = Compute<S>;
  static size_t bytes(const PointwiseProblem& p) {
    return packed_panels_count<T>(p.out_channels, p.in_channels) * sizeof(T);
  }
  static void pack(const PointwiseProblem& p, void* out) {
    pack_panels<S>(static_cast<T*>(out), p.weight, p.out_channels, p.in_channels);
  }
};

}  // namespace dsconv::cpu::DSCONV_ISA

// The matrix product behind every pointwise pass: rows of A (row-major, compute type) times packed panels of B.
#pragma once

#include "activation_rows.h"
#include "transpose.h"

namespace dsconv::cpu::DSCONV_ISA {

template <class T>
constexpr int kPanel = 2 * kLanes<T>;  // columns of a B panel: two vectors
// Rows of one block: rows x 2 accumulators, 2 vectors of B and a broadcast fit the register file (32 with AVX-512, else
// 16).
constexpr int kMaxRows = DSCONV_VECTOR_BYTES == 64 ? 12 : 6;

constexpr int kNarrowRows = 8;  // of blocks of one vector

// What becomes of the rows of one panel of a product: y = activation(product + bias + residual), stored as Y.
template <class T, class Y = T>
struct Epilogue {
  Y* y;  // column 0 of row 0
  int64_t y_step;
  int64_t columns;          // those that exist
  const T* bias = nullptr;  // of all columns of the panel
  const Y* residual = nullptr;
  int64_t residual_step = 0;
  ActivationSpec activation = {Activation::none, 0};
  bool streamed = false;  // past the caches; whole cache lines only
};

// The rest of it, from row `first` on, for sums that begin with the bias.
template <int kRows, int kVectors, class T, class Y>
DSCONV_INLINE void finish_rows(Vec<T>* sums, const Epilogue<T, Y>& e, int64_t first) {
  constexpr int kL = kLanes<T>, kCount = kRows * kVectors;
  if (e.residual) {
    const Y* residual = e.residual + first * e.residual_step;
    unroll<kCount>([&]<int i>() __attribute__((always_inline)) {
      const int64_t count = e.columns - i % kVectors * kL;
      if (count > 0) sums[i] += load_part<Y>(residual + i / kVectors * e.residual_step + i % kVectors * kL, count);
    });
  }
  activate_vectors<kCount, T>(e.activation, sums);
  Y* y = e.y + first * e.y_step;
  if constexpr (kVectors == 2) {
    if (e.columns == 2 * kL) {
      return unroll<kRows>([&]<int row>() __attribute__((always_inline)) {
        store_pair(y + row * e.y_step, sums[2 * row], sums[2 * row + 1], kStreams && e.streamed);
      });
    }
  }
  unroll<kCount>([&]<int i>() __attribute__((always_inline)) {
    const int64_t count = e.columns - i % kVectors * kL;
    if (count > 0) store_part<Y>(y + i / kVectors * e.y_step + i % kVectors * kL, sums[i], count);
  });
}

// kAcross: the rows of A are columns in memory, element (r, k) at a[k * lda + r].
// kVectors: 2, or 1 where a panel has no more columns.
template <class T, class Y, int kRows, int kVectors, bool kAcross>
static void multiply_rows(const T* a, int64_t lda, const T* panel, int64_t depth, const Epilogue<T, Y>& e,
                          int64_t first) {
  constexpr int kL = kLanes<T>;
  Vec<T> acc[kRows * kVectors];
  unroll<kRows * kVectors>([&]<int i>() __attribute__((always_inline)) {
    acc[i] = e.bias ? load(e.bias + i % kVectors * kL) : splat(T(0));
  });
  a += kAcross ? first : first * lda;
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> b[kVectors];
    unroll<kVectors>([&]<int v>() __attribute__((always_inline)) { b[v] = load(panel + k * kPanel<T> + v * kL); });
    unroll<kRows>([&]<int r>() __attribute__((always_inline)) {
      const Vec<T> s = splat(kAcross ? a[k * lda + r] : a[r * lda + k]);
      unroll<kVectors>([&]<int v>() __attribute__((always_inline)) { acc[r * kVectors + v] += s * b[v]; });
    });
  }
  finish_rows<kRows, kVectors>(acc, e, first);
}

template <bool kAcross = false, class T, class Y>
static void multiply_panel(const T* a, int64_t lda, int64_t rows, const T* panel, int64_t depth,
                           const Epilogue<T, Y>& e) {
  using Block = void (*)(const T*, int64_t, const T*, int64_t, const Epilogue<T, Y>&, int64_t);
  struct Blocks {
    Block of[kMaxRows + 1];  // by rows
  };
  static constexpr Blocks kBlocks = [] {
    Blocks blocks{};
    unroll<kMaxRows>([&]<int i>()
                         __attribute__((always_inline)) { blocks.of[i + 1] = multiply_rows<T, Y, i + 1, 2, kAcross>; });
    return blocks;
  }();
  int64_t done = 0;
  if constexpr (!kAcross) {
    if (e.columns <= kLanes<T>) {
      unroll<4>([&]<int i>() __attribute__((always_inline)) {
        constexpr int kRows = kNarrowRows >> i;
        for (; rows - done >= kRows; done += kRows) multiply_rows<T, Y, kRows, 1, false>(a, lda, panel, depth, e, done);
      });
      static_assert(kNarrowRows >> 3 == 1);
      return;
    }
  }
  for (int64_t left = ceil_div(rows, kMaxRows); left > 0; --left) {
    const int64_t block = ceil_div(rows - done, left);
    kBlocks.of[block](a, lda, panel, depth, e, done);
    done += block;
  }
}

}  // namespace dsconv::cpu::DSCONV_ISA

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

// What becomes of the rows of one panel of a product: y = activation(product + bias + residual).
template <class T>
struct Epilogue {
  T* y;  // column 0 of row 0
  int64_t y_step;
  int64_t columns = kPanel<T>;  // those that exist
  const T* bias = nullptr;      // [kPanel]
  const T* residual = nullptr;
  int64_t residual_step = 0;
  ActivationSpec activation = {Activation::none, 0};
  bool streamed = false;  // past the caches; whole cache lines only
};

// Columns of a row of a panel, the second vector of which may end early.
template <class T>
DSCONV_INLINE Vec<T> load_columns(const T* row, int half, int64_t columns) {
  const int64_t count = columns - half * kLanes<T>;
  return count <= 0 ? splat(T(0)) : load_part<T>(row + half * kLanes<T>, count);
}

// The sum over depth of a[row * lda + k] * panel[k][column], from row `first` on.
template <class T, int kRows>
static void multiply_rows(const T* a, int64_t lda, const T* panel, int64_t depth, const Epilogue<T>& e, int64_t first) {
  constexpr int kL = kLanes<T>;
  Vec<T> acc[2 * kRows];
  unroll<2 * kRows>([&]<int i>()
                        __attribute__((always_inline)) { acc[i] = e.bias ? load(e.bias + i % 2 * kL) : splat(T(0)); });
  a += first * lda;
  for (int64_t k = 0; k < depth; ++k) {
    const Vec<T> b0 = load(panel + k * kPanel<T>), b1 = load(panel + k * kPanel<T> + kL);
    unroll<kRows>([&]<int r>() __attribute__((always_inline)) {
      const Vec<T> s = splat(a[r * lda + k]);
      acc[2 * r] += s * b0;
      acc[2 * r + 1] += s * b1;
    });
  }
  if (e.residual) {
    const T* residual = e.residual + first * e.residual_step;
    unroll<2 * kRows>([&]<int i>() __attribute__((always_inline)) {
      acc[i] += load_columns(residual + i / 2 * e.residual_step, i % 2, e.columns);
    });
  }
  activate_vectors<2 * kRows, T>(e.activation, acc);
  T* y = e.y + first * e.y_step;
  if (kStreams && e.streamed && e.columns == kPanel<T>) {
    unroll<2 * kRows>([&]<int i>()
                          __attribute__((always_inline)) { stream_narrow(y + i / 2 * e.y_step + i % 2 * kL, acc[i]); });
  } else {
    unroll<2 * kRows>([&]<int i>() __attribute__((always_inline)) {
      const int64_t count = e.columns - i % 2 * kL;
      if (count > 0) store_part<T>(y + i / 2 * e.y_step + i % 2 * kL, acc[i], count);
    });
  }
}

template <class T>
static void multiply_panel(const T* a, int64_t lda, int64_t rows, const T* panel, int64_t depth, const Epilogue<T>& e) {
  using Block = void (*)(const T*, int64_t, const T*, int64_t, const Epilogue<T>&, int64_t);
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
    kBlocks[block](a, lda, panel, depth, e, done);
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

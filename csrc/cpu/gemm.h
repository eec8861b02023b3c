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

constexpr int kNarrowRows = 8, kWideRows = 4;  // of blocks of fewer vectors, and of more

// The lower half of a vector as a vector of its own, where processors do two of these in the time of one.
#if DSCONV_VECTOR_BYTES == 64
constexpr bool kHasHalves = true;
DSCONV_INLINE __m256 low_half(Vec<float> v) { return _mm512_castps512_ps256(v); }
DSCONV_INLINE __m256d low_half(Vec<double> v) { return _mm512_castpd512_pd256(v); }
DSCONV_INLINE Vec<float> from_half(__m256 v) { return _mm512_zextps256_ps512(v); }
DSCONV_INLINE Vec<double> from_half(__m256d v) { return _mm512_zextpd256_pd512(v); }
#else
constexpr bool kHasHalves = false;
template <class V>
DSCONV_INLINE V low_half(V v) {
  return v;
}
#endif

// Memory that is read after a product and is fetched meanwhile, each row a share: all at once would wait for each other.
struct Ahead {
  const char* at = nullptr;
  int64_t share = 0;                    // bytes
  static constexpr int64_t kSteps = 8;  // of a product, between fetches

  // Those of rows [first, first + rows), some lines at a time.
  struct Lines {
    const char* next;
    int64_t count;
    __attribute__((always_inline)) void fetch() {
      for (int64_t i = 0; i < count; ++i, next += kBlockBytes) __builtin_prefetch(next, 0, 2);
    }
  };
  Lines lines(int64_t first, int64_t rows, int64_t times) const {
    return {at + first * share, share > 0 ? ceil_div(rows * share, kBlockBytes * times) : 0};
  }
};

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
  Ahead ahead = {};
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

// The innermost step of a product, one channel of T: what it multiplies and how. kAcross: the rows of A are columns in
// memory, element (r, k) at a[k * lda + r].
template <class T, bool kAcross = false>
struct ChannelSteps {
  using Sum = T;
  using A = T;
  static constexpr bool across = kAcross;
  static constexpr int kVectors = kPanel<T> / kLanes<T>;  // of a panel
  static int64_t count(int64_t depth) { return depth; }
  static int64_t panel_values(int64_t depth) { return kPanel<T> * depth; }
  static Vec<T> weights(const T* panel, int64_t k, int v) { return load(panel + k * kPanel<T> + v * kLanes<T>); }
  template <class V>
  static V value(const T* a, int64_t lda, int64_t row, int64_t k) {
    return (kAcross ? a[k * lda + row] : a[row * lda + k]) - V{};
  }
  template <class V>
  static void multiply(V& sum, V value, V weights) {
    sum += value * weights;
  }
};

// Columns that one product may have: those of a panel of ChannelSteps, or as few more as one vector holds. Half vectors are
// faster than that.
template <class Steps>
constexpr int kMostColumns = Steps::kVectors * kLanes<typename Steps::Sum>;
template <class T>
constexpr int kMostColumns<ChannelSteps<T>> = kPanel<T> + (kHasHalves ? 0 : kLanes<T>);

// kRows rows from row `first` on of the first kVectors vectors of a panel and, if that has fewer, of the next one; the last
// of them may be half a vector.
template <class Steps, class Y, int kRows, int kVectors, bool kHalf = false, class T = typename Steps::Sum>
static void multiply_rows(const typename Steps::A* a, int64_t lda, const typename Steps::A* panel, int64_t depth,
                          const Epilogue<T, Y>& e, int64_t first) {
  constexpr int kWhole = kVectors - kHalf;
  Vec<T> acc[kRows * kVectors];
  unroll<kRows * kVectors>([&]<int i>() __attribute__((always_inline)) {
    acc[i] = e.bias ? load(e.bias + i % kVectors * kLanes<T>) : splat(T(0));
  });
  using Half = decltype(low_half(acc[0]));
  Half half[kRows];
  if constexpr (kHalf)
    unroll<kRows>([&]<int r>() __attribute__((always_inline)) { half[r] = low_half(acc[r * kVectors + kWhole]); });
  a += Steps::across ? first : first * lda;
  if (!e.streamed) {  // the lines are there when they are written
    unroll<kRows>([&]<int r>() __attribute__((always_inline)) {
      for (int64_t i = 0; i < e.columns; i += kBlock<Y>) __builtin_prefetch(e.y + (first + r) * e.y_step + i, 1);
    });
  }
  const int64_t end = Steps::count(depth), stretch = e.ahead.share > 0 ? Ahead::kSteps : max64(end, 1);
  Ahead::Lines lines = e.ahead.lines(first, kRows, ceil_div(end, stretch));
  for (int64_t k = 0; k < end;) {
    lines.fetch();
    for (const int64_t stop = min64(end, k + stretch); k < stop; ++k) {
      Vec<T> b[kVectors];
      unroll<kVectors>([&]<int v>() __attribute__((always_inline)) {
        if constexpr (v < Steps::kVectors) {
          b[v] = Steps::weights(panel, k, v);
        } else {
          b[v] = Steps::weights(panel + Steps::panel_values(depth), k, v - Steps::kVectors);
        }
      });
      unroll<kRows>([&]<int r>() __attribute__((always_inline)) {
        if constexpr (kWhole == 0) {
          Steps::multiply(half[r], Steps::template value<Half>(a, lda, r, k), low_half(b[0]));
        } else {
          const auto value = Steps::template value<Vec<T>>(a, lda, r, k);
          unroll<kWhole>([&]<int v>()
                             __attribute__((always_inline)) { Steps::multiply(acc[r * kVectors + v], value, b[v]); });
          if constexpr (kHalf) Steps::multiply(half[r], low_half(value), low_half(b[kWhole]));
        }
      });
    }
  }
  if constexpr (kHalf)
    unroll<kRows>([&]<int r>() __attribute__((always_inline)) { acc[r * kVectors + kWhole] = from_half(half[r]); });
  finish_rows<kRows, kVectors>(acc, e, first);
}

// All rows, up to kMost at a time, where the columns are more or fewer than the vectors of a panel.
template <class Steps, class Y, int kMost, int kVectors, bool kHalf, class T = typename Steps::Sum>
static void multiply_uneven(const typename Steps::A* a, int64_t lda, int64_t rows, const typename Steps::A* panel,
                            int64_t depth, const Epilogue<T, Y>& e) {
  int64_t done = 0;
  unroll<4>([&]<int i>() __attribute__((always_inline)) {
    constexpr int kRows = kMost >> i;
    if constexpr (kRows > 0) {
      for (; rows - done >= kRows; done += kRows)
        multiply_rows<Steps, Y, kRows, kVectors, kHalf>(a, lda, panel, depth, e, done);
    }
  });
  static_assert(kMost >> 4 == 0);
}

// The columns of e, up to kMostColumns.
template <class Steps, class Y, class T = typename Steps::Sum>
static void multiply_panel(const typename Steps::A* a, int64_t lda, int64_t rows, const typename Steps::A* panel,
                           int64_t depth, const Epilogue<T, Y>& e) {
  using A = typename Steps::A;
  using Block = void (*)(const A*, int64_t, const A*, int64_t, const Epilogue<T, Y>&, int64_t);
  struct Blocks {
    Block of[kMaxRows + 1];  // by rows
  };
  static constexpr Blocks kBlocks = [] {
    Blocks blocks{};
    unroll<kMaxRows>([&]<int i>() __attribute__((always_inline)) {
      blocks.of[i + 1] = multiply_rows<Steps, Y, i + 1, Steps::kVectors>;
    });
    return blocks;
  }();
  if constexpr (!Steps::across) {
    constexpr int kL = kLanes<T>, kFew = Steps::kVectors / 2;
    if constexpr (kHasHalves) {
      if (e.columns <= kL / 2) return multiply_uneven<Steps, Y, kNarrowRows, 1, true>(a, lda, rows, panel, depth, e);
      if (e.columns > kL && e.columns <= kL + kL / 2)
        return multiply_uneven<Steps, Y, kNarrowRows, 2, true>(a, lda, rows, panel, depth, e);
    }
    if (e.columns <= kFew * kL)
      return multiply_uneven<Steps, Y, kNarrowRows, kFew, false>(a, lda, rows, panel, depth, e);
    if constexpr (kMostColumns<Steps> > Steps::kVectors * kL) {
      if (e.columns > Steps::kVectors * kL)
        return multiply_uneven<Steps, Y, kWideRows, Steps::kVectors + 1, false>(a, lda, rows, panel, depth, e);
    }
  }
  int64_t done = 0;
  for (int64_t left = ceil_div(rows, kMaxRows); left > 0; --left) {
    const int64_t block = ceil_div(rows - done, left);
    kBlocks.of[block](a, lda, panel, depth, e, done);
    done += block;
  }
}

}  // namespace dsconv::cpu::DSCONV_ISA

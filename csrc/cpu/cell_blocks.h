// The block kernels of the input gradient of stride 2 in both directions.
//
// Of a cell of 2 x 2 neighbours, each output meets other taps, but all of them read the same few gradients. A block is a
// row of such cells: every gradient is loaded once and multiplied into the accumulators of all of them, and a cache line
// of outputs is written once. (As four phases, every gradient would be read four times, and rows and columns be visited
// with gaps.)
#pragma once

#include "row_blocks.h"

namespace dsconv::cpu::DSCONV_ISA {

// Output 2 * m + r (r: 0, 1) of a row meets taps t = even(r) + 2 * u at the inputs m + shift(r) - u, with kOdd the parity
// of the padding; half the padding, whole, is to be added to m.
template <int kTaps, int kOdd>
struct CellTaps {
  static constexpr int kInputs = (kTaps + 1) / 2;        // that a cell reads
  static constexpr int kFirst = kOdd - (kTaps - 1) / 2;  // the first of them, from m on
  // The tap with which output r meets input `i` of those, or -1.
  static constexpr int tap(int r, int i) {
    const int even = (r + kOdd) % 2, shift = (r + kOdd - even) / 2, t = even + 2 * (shift - kFirst - i);
    return t >= 0 && t < kTaps ? t : -1;
  }
  // The input with which tap t meets an output.
  static constexpr int input(int t) {
    for (int i = 0; i < kInputs; ++i)
      if (tap(0, i) == t || tap(1, i) == t) return i;
    return -1;
  }
  // The place of a tap among the packed ones (Correlation::place_of): the even ones, descending, before the odd ones.
  static constexpr int place(int t) {
    constexpr int kEven = (kTaps + 1) / 2;
    return t % 2 == 0 ? kEven - 1 - t / 2 : kEven + kTaps / 2 - 1 - t / 2;
  }
};

// Two rows of kPixels outputs from output `pixel` on, an even one, `runs` times side by side, all channels. The rows and
// columns of the window are those that the first cell reads.
template <class S, int kTaps, int kOdd, int kPixels, bool kEdge, class T = Compute<S>>
static void cell_block(const BlockRow<T>& row, int64_t pixel, int64_t runs) {
  using Taps = CellTaps<kTaps, kOdd>;
  constexpr int kL = kLanes<T>, kCells = (kPixels + 1) / 2, kIn = Taps::kInputs;
  const int64_t last = row.last, weight_block = row.weight_block, x_step = row.x_step;
  const uint64_t rows_inside = row.window.inside;
  for (; runs > 0; --runs, pixel += kPixels) {
    const uint64_t inside = columns_inside(row.window.low, row.window.high, pixel / 2);
    const BlockOutputs<S> out(row, pixel, kPixels);
    const NextBlock<S, kCells> fresh(row, pixel / 2, kCells);
    const S* const columns = static_cast<const S*>(row.x) + pixel / 2 * row.x_pixel;
    const S* x[kIn];
    unroll<kIn>([&]<int q>() __attribute__((always_inline)) { x[q] = keep(columns + row.window.x[q]); });
    const T* weights = row.weights + row.first / kL * weight_block;
    for (int64_t next = row.first; next < last; next += kL, weights += weight_block) {
      const int64_t c = block_channel<T>(next, row.channels);
      fresh.fetch(next);
      Vec<T> acc[2 * kPixels];
      unroll<2 * kPixels>([&]<int i>() __attribute__((always_inline)) { acc[i] = splat(T(0)); });
      unroll<kIn>([&]<int q>() __attribute__((always_inline)) {
        if (kEdge && !is_inside<q>(rows_inside)) return;
        unroll<kCells + kIn - 1>([&]<int column>() __attribute__((always_inline)) {
          if (kEdge && !is_inside<column>(inside)) return;
          const Vec<T> value = load_channels(x[q] + c + column * x_step);
          using Cells = ColumnOutputs<kIn, 1, kCells, column>;
          constexpr int kFirst = 2 * Cells::kFirst;
          constexpr int kCount = static_cast<int>(min64(2 * Cells::kCount, kPixels - kFirst));
          unroll<2 * kCount>([&]<int i>() __attribute__((always_inline)) {
            constexpr int r = i / kCount, p = kFirst + i % kCount;
            constexpr int ty = Taps::tap(r, q), tx = Taps::tap(p % 2, column - p / 2);
            if constexpr (ty >= 0 && tx >= 0)
              acc[r * kPixels + p] += value * load(weights + (Taps::place(ty) * kTaps + Taps::place(tx)) * kL);
          });
        });
      });
      out.template write<2, kPixels>(acc, c);
    }
    if (row.staged) row.put(row, pixel, 2, kPixels);
  }
}

// The block kernels of one number of taps and one parity of the padding, by pixels.
template <class T>
struct CellKernels {
  using Block = void (*)(const BlockRow<T>&, int64_t pixel, int64_t runs);
  static constexpr int kWide = DSCONV_VECTOR_BYTES == 64 ? 8 : 4;  // 8 or 16 accumulators
  int taps, odd;
  int inputs, first;  // that a cell reads
  Block edge[kWide + 1], inner[kWide + 1];

  template <class S, int kTaps, int kOdd>
  static constexpr CellKernels make() {
    using Taps = CellTaps<kTaps, kOdd>;
    CellKernels k{kTaps, kOdd, Taps::kInputs, Taps::kFirst, {}, {}};
    unroll<kWide>([&]<int i>() __attribute__((always_inline)) {
      constexpr int kPixels = i + 1;
      if constexpr (kPixels == 1 || kPixels % 2 == 0) k.edge[kPixels] = cell_block<S, kTaps, kOdd, kPixels, true>;
      if constexpr (kPixels == kWide || (kPixels == kWide / 2 && kTaps == 3))
        k.inner[kPixels] = cell_block<S, kTaps, kOdd, kPixels, false>;
    });
    return k;
  }

  // Computes `width` outputs, by narrow blocks if `crowded`; the window's rows are all inside if `whole`. (Of columns in a
  // single set of an L1, the lines of a wide block do not stay there until its stores are done. More taps take longer yet.)
  void run(const BlockRow<T>& row, int64_t width, bool whole, bool crowded) const {
    const int64_t most = crowded && inner[kWide / 2] ? kWide / 2 : kWide, most_cells = most / 2;
    for (int64_t pixel = 0; pixel < width;) {
      const int64_t left = width - pixel, cell = pixel / 2;
      const int64_t cells = min64(left / 2, row.window.high - (inputs - 1) - cell);  // before a column outside
      if (whole && cell >= row.window.low && cells >= most_cells) {
        inner[most](row, pixel, cells / most_cells);
        pixel += cells / most_cells * most;
      } else {
        const int64_t size = left == 1 ? 1 : min64(left / 2 * 2, most);
        edge[size](row, pixel, 1);
        pixel += size;
      }
    }
  }
};

// Those that read S, or null. Defined in block_kernels.inc.
template <class S>
const CellKernels<Compute<S>>* cell_kernels(int64_t taps, int64_t odd);

}  // namespace dsconv::cpu::DSCONV_ISA

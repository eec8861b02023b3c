// The block kernels of the depthwise weight gradient.
//
// A kernel walks along a run of neighbouring outputs of one row, one vector of channels at a time: a few gradients
// are held in registers, every input is loaded once and multiplied into the accumulators of all taps that pair it with
// one of them. The sums of a run go to memory, and so a chain of additions stays short.
#pragma once

#include "row_blocks.h"

namespace dsconv::cpu::DSCONV_ISA {

// Neighbouring taps that pair one row of the input with the row of gradients.
struct TapRun {
  int64_t x;          // offset of the input that output 0 pairs with the first of them
  int64_t tap;        // its index
  int64_t low, high;  // the columns inside the tensor, counted from the column that output 0 reads first
};

template <class T>
struct GradRow {
  const T *x, *grad;                 // channel 0 of row 0 of the image; of output 0
  int64_t x_step, x_pixel, g_pixel;  // elements between columns, between outputs in the input and in the gradient
  int64_t first, last, channels;     // channels [first, last) of `channels`; `first` begins a block
  T* sums;                           // [block][tap, then the bias][lane]; the last block ends with the last channel
  int64_t taps;
  const TapRun* runs;
  bool bias;             // also sum the gradient itself
  const int64_t* ahead;  // rows that the next row of outputs will read and this one does not, as offsets from x
  int64_t ahead_count;
  int64_t g_ahead;  // to the next row of gradients, or 0
};

// kPixels outputs from output `pixel` on. `inside` has a bit for every column that lies in the tensor.
template <class T, int kTaps, int kStride, int kRuns, int kPixels, bool kEdge>
DSCONV_INLINE void accumulate_pixels(const GradRow<T>& row, const T* x, const T* grad, int64_t pixel, Vec<T>* sum,
                                     Vec<T>& bias) {
  constexpr int kColumns = (kPixels - 1) * kStride + kTaps;
  Vec<T> g[kPixels];
  unroll<kPixels>([&]<int p>() __attribute__((always_inline)) { g[p] = load_once(grad + (pixel + p) * row.g_pixel); });
  if (row.bias) unroll<kPixels>([&]<int p>() __attribute__((always_inline)) { bias += g[p]; });
  if (row.g_ahead)
    unroll<kPixels>([&]<int p>() __attribute__((always_inline)) {
      __builtin_prefetch(grad + row.g_ahead + (pixel + p) * row.g_pixel, 0, 2);
    });
  for (int64_t i = 0; i < row.ahead_count; ++i) {
    unroll<kPixels>([&]<int p>() __attribute__((always_inline)) {
      __builtin_prefetch(x + row.ahead[i] + (pixel + p) * row.x_pixel, 0, 2);
    });
  }
  unroll<kRuns>([&]<int r>() __attribute__((always_inline)) {
    const TapRun& run = row.runs[r];
    const T* column = x + run.x + pixel * row.x_pixel;
    const uint64_t inside = kEdge ? columns_inside(run.low, run.high, pixel * kStride) : 0;
    unroll<kColumns>([&]<int c>() __attribute__((always_inline)) {
      if (kEdge && !is_inside<c>(inside)) return;
      const Vec<T> value = load_once(column + c * row.x_step);
      unroll<kTaps>([&]<int t>() __attribute__((always_inline)) {
        constexpr int offset = c - t, p = offset / kStride;
        if constexpr (offset >= 0 && offset % kStride == 0 && p < kPixels) sum[r * kTaps + t] += value * g[p];
      });
    });
  });
}

// The sums of kRuns runs of kTaps taps over outputs [pixel, last_pixel), of which [inner_first, inner_last) pair with no
// padding.
template <class T, int kTaps, int kStride, int kRuns>
static void grad_block(const GradRow<T>& row, int64_t pixel, int64_t last_pixel, int64_t inner_first,
                       int64_t inner_last) {
  constexpr int kL = kLanes<T>, kWide = DSCONV_VECTOR_BYTES == 64 ? 7 : 4, kNarrow = 3;
  T* sums = row.sums + row.first / kL * (row.taps + 1) * kL;
  for (int64_t next = row.first; next < row.last; next += kL, sums += (row.taps + 1) * kL) {
    const int64_t c = block_channel<T>(next, row.channels);
    const T *x = row.x + c, *grad = row.grad + c;
    Vec<T> sum[kRuns * kTaps], bias = splat(T(0));
    unroll<kRuns * kTaps>([&]<int i>() __attribute__((always_inline)) { sum[i] = splat(T(0)); });
    for (int64_t p = pixel; p < last_pixel;) {
      const int64_t left = last_pixel - p;
      if (left >= kWide && p >= inner_first && p + kWide <= inner_last) {
        accumulate_pixels<T, kTaps, kStride, kRuns, kWide, false>(row, x, grad, p, sum, bias);
        p += kWide;
      } else if (left >= kWide) {
        accumulate_pixels<T, kTaps, kStride, kRuns, kWide, true>(row, x, grad, p, sum, bias);
        p += kWide;
      } else if (left >= kNarrow) {
        accumulate_pixels<T, kTaps, kStride, kRuns, kNarrow, true>(row, x, grad, p, sum, bias);
        p += kNarrow;
      } else {
        accumulate_pixels<T, kTaps, kStride, kRuns, 1, true>(row, x, grad, p, sum, bias);
        ++p;
      }
    }
    unroll<kRuns * kTaps>([&]<int i>() __attribute__((always_inline)) {
      T* total = sums + (row.runs[i / kTaps].tap + i % kTaps) * kL;
      store(total, load(total) + sum[i]);
    });
    if (row.bias) store(sums + row.taps * kL, load(sums + row.taps * kL) + bias);
  }
}

// The block kernels of one number of taps and one stride, by the number of runs.
constexpr int kMaxRuns = 3;
template <class T>
struct GradKernels {
  using Block = void (*)(const GradRow<T>&, int64_t, int64_t, int64_t, int64_t);
  int taps, stride;
  bool exact;  // what is left over of a row of taps is another kernel's
  Block block[kMaxRuns];

  template <int kTaps, int kStride>
  static constexpr GradKernels make() {
    return {kTaps,
            kStride,
            false,
            {grad_block<T, kTaps, kStride, 1>, grad_block<T, kTaps, kStride, 2>, grad_block<T, kTaps, kStride, 3>}};
  }
};

// Those whose taps divide a row of `taps` with the fewest left over. Defined in block_kernels.inc.
template <class T>
const GradKernels<T>& grad_kernels(int64_t taps, int64_t stride);

}  // namespace dsconv::cpu::DSCONV_ISA

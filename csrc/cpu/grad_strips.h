// Strips of the depthwise weight gradient of channels_last tensors, for 3x3 windows of stride 1 and 2.
//
// A strip of a few columns goes down the rows, a vector of channels at a time, as in column_strips.h: each input is loaded
// once and multiplied with the gradients of all rows whose windows hold it, which are kept in registers until their last
// row of the input has come. The sums of all taps are there, too. (A step, as in grad_blocks.h, holds the gradients of one
// row, and so an input is loaded once for each row of taps.)
#pragma once

#include "row_blocks.h"

namespace dsconv::cpu::DSCONV_ISA {

// Rows of outputs, `count` of one phase. Addresses are those of channel 0; distances are in bytes.
template <class T>
struct GradStrips {
  const char *x, *grad;   // the first column that output 0 reads, in the first row that row 0 reads, and output 0
  int64_t x_row, x_step;  // between rows and columns of taps
  int64_t g_row, g_step;  // between outputs
  int64_t low, high;      // the rows of the input inside the tensor, counted from x
  int64_t left, right;    // the columns
  int64_t count;          // of rows of outputs
  int64_t first, last, channels;  // channels [first, last) of `channels`; `first` begins a block
  T* sums;                        // as in GradRow
  int64_t taps;
  bool bias;                       // also sum the gradients themselves
  const char *next_x, *next_grad;  // null, or the columns that what follows will be the first to read
};

// Fetches the share of a row of what follows of kPixels vectors.
template <class S, int kPixels>
DSCONV_INLINE void fetch_share(const char* row) {
  constexpr int kLines = ceil_div(kPixels * kLanes<Compute<S>> * static_cast<int>(sizeof(S)), kBlockBytes);
  unroll<kLines>([&]<int line>()
                     __attribute__((always_inline)) { __builtin_prefetch(row + line * kBlockBytes, 0, 2); });
}

// Adds outputs [pixel, pixel + kPixels) of all rows. Of the columns that it reads, none but the first and the last may lie
// outside the tensor.
template <class S, int kTaps, int kStride, int kPixels, class T = Compute<S>>
static void grad_strip(const GradStrips<T>& strips, int64_t pixel) {
  constexpr int kL = kLanes<T>, kLive = ceil_div(kTaps, kStride), kColumns = (kPixels - 1) * kStride + kTaps;
  constexpr int64_t kBytes = sizeof(S);
  const int64_t low = strips.low, high = strips.high, count = strips.count;
  const int64_t from = ceil_div(max64(low, 0), kStride), to = min64(count, floor_div(high, kStride));  // without checks
  const int64_t x_row = strips.x_row, x_step = strips.x_step, g_row = strips.g_row, g_step = strips.g_step;
  const uint64_t inside = columns_inside(strips.left, strips.right, pixel * kStride);
  const int64_t run = (strips.last - strips.first) * kBytes;  // of a column
  const bool fetches = strips.next_x;
  int64_t fetched = 0;
  T* sums = strips.sums + strips.first / kL * (strips.taps + 1) * kL;
  for (int64_t next = strips.first; next < strips.last; next += kL, sums += (strips.taps + 1) * kL) {
    const int64_t c = block_channel<T>(next, strips.channels) * kBytes;
    const char *x = strips.x + pixel * kStride * x_step + c, *grad = strips.grad + pixel * g_step + c;
    const char *next_x = strips.next_x, *next_grad = strips.next_grad;
    if (fetches) {
      next_x += strips.first * kBytes + column_offset(fetched * kStride, run, x_step);
      next_grad += strips.first * kBytes + column_offset(fetched, run, g_step);
      fetched += kPixels * kL * kBytes;
    }
    Vec<T> sum[kTaps][kTaps] = {}, bias = {}, g[kLive][kPixels] = {};
    // As go_down says: row j of the gradients begins, in registers k, and row j - kLive + 1 ends.
    const auto advance = [&]<int k, int kFirst, int kLast, bool kChecked>(int64_t j) __attribute__((always_inline)) {
      constexpr bool kMayLack = kChecked && kFirst == 0 && kLast == kLive;  // of few rows, some that do not exist
      if (kFirst == 0 && (!kMayLack || j < count)) {
        const char* at[kPixels / 3 + 1];
        at[0] = grad;
        unroll<kPixels>([&]<int p>() __attribute__((always_inline)) {
          if constexpr (p > 0 && p % 3 == 0) at[p / 3] = at[p / 3 - 1] + 3 * g_step;
          g[k][p] = load_steps<S, p % 3>(at[p / 3], g_step);
        });
        if (strips.bias) unroll<kPixels>([&]<int p>() __attribute__((always_inline)) { bias += g[k][p]; });
        grad += g_row;
        if (fetches) fetch_share<S, kPixels>(next_grad);
        next_grad += g_row;
      }
      unroll<kStride>([&]<int r>() __attribute__((always_inline)) {
        constexpr int kRows = rows_meeting(kTaps, kStride, r, kFirst, kLast);
        if (!kChecked || (j * kStride + r >= low && j * kStride + r < high)) {
          const char* at[kColumns / 3 + 1];
          at[0] = x;
          unroll<kColumns>([&]<int column>() __attribute__((always_inline)) {
            if constexpr (column > 0 && column % 3 == 0) at[column / 3] = at[column / 3 - 1] + 3 * x_step;
            if ((column == 0 || column == kColumns - 1) && !is_inside<column>(inside)) return;
            const Vec<T> value = load_steps<S, column % 3>(at[column / 3], x_step);
            unroll<kRows>([&]<int i>() __attribute__((always_inline)) {
              constexpr int m = kFirst + i;
              if (kMayLack && (j - m < 0 || j - m >= count)) return;
              using Here = ColumnOutputs<kTaps, kStride, kPixels, column>;
              unroll<Here::kCount>([&]<int n>() __attribute__((always_inline)) {
                constexpr int p = Here::kLast - n;
                sum[m * kStride + r][column - p * kStride] += value * g[(k + kLive - m) % kLive][p];
              });
            });
          });
        }
        x += x_row;
        if (fetches) fetch_share<S, kPixels * kStride>(next_x);
        next_x += x_row;
      });
    };
    go_down<kLive>(count, from, to, advance, [&]<int i>() __attribute__((always_inline)) {
      unroll<kPixels>([&]<int p>() __attribute__((always_inline)) { g[i][p] = g[i + 1][p]; });
    });
    unroll<kTaps * kTaps>([&]<int i>() __attribute__((always_inline)) {
      store(sums + i * kL, load(sums + i * kL) + sum[i / kTaps][i % kTaps]);
    });
    if (strips.bias) store(sums + strips.taps * kL, load(sums + strips.taps * kL) + bias);
  }
}

// The strips of one number of taps and one stride, by pixels.
template <class T>
struct GradStripKernels {
  using Strip = void (*)(const GradStrips<T>&, int64_t pixel);
  static constexpr int kMost = 6;  // columns whose gradients stay in 32 registers beside the sums
  static constexpr int kWide = 4;  // faster, where it is not one strip more
  int taps, stride;
  Strip strips[kMost + 1];

  template <class S, int kTaps, int kStride>
  static constexpr GradStripKernels make() {
    GradStripKernels k{kTaps, kStride, {}};
    unroll<kMost>([&]<int i>()
                      __attribute__((always_inline)) { k.strips[i + 1] = grad_strip<S, kTaps, kStride, i + 1>; });
    return k;
  }

  static int64_t count(int64_t columns) { return columns <= kMost ? 1 : ceil_div(columns, kWide); }

  // Adds `columns` outputs of all rows, in strips of nearly the same width. What follows is at next_x and next_grad.
  void run(const GradStrips<T>& rows, int64_t columns) const {
    const int64_t parts = count(columns);
    GradStrips<T> strip = rows;
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t first = columns * i / parts, last = columns * (i + 1) / parts;
      const bool more = rows.next_x && last < columns;
      strip.next_x = more ? rows.x + ((last - 1) * stride + taps) * rows.x_step : rows.next_x;
      strip.next_grad = more ? rows.grad + last * rows.g_step : rows.next_grad;
      strips[last - first](strip, first);
    }
  }
};

// Those that read S; null if there are none. Defined in block_kernels.inc.
template <class S>
const GradStripKernels<Compute<S>>* grad_strip_kernels(int64_t taps, int64_t stride);

}  // namespace dsconv::cpu::DSCONV_ISA

// The block kernels of the depthwise weight gradient.
//
// A kernel walks along steps, a few neighbouring outputs each, one vector of channels at a time: their gradients are held
// in registers, every input is loaded once and multiplied into the accumulators of all taps that pair it with one of
// them. The sums of the steps go to memory, and so a chain of additions stays short.
#pragma once

#include "row_blocks.h"

namespace dsconv::cpu::DSCONV_ISA {

constexpr int kMaxRuns = 3;  // runs of neighbouring taps that a kernel serves at once

// A few neighbouring outputs of one row, and the inputs that runs of taps pair them with. Offsets are in elements.
struct GradStep {
  enum Size { inner, wide, narrow, single };  // inner: as many as wide, and no padding
  Size size;
  int64_t grad;               // the first output
  int64_t x[kMaxRuns];        // the input that it pairs with the first tap of each run
  uint64_t inside[kMaxRuns];  // a bit for each column from there on that lies in the tensor
};

// Neighbouring columns that the next steps will be the first to read: while a kernel walks along its own steps, it fetches
// them, as NextBlock does.
struct NextSteps {
  static constexpr int kMost = 6;
  const void *x[kMost], *grad;  // the first channel in work of the first column, in rows of the input and of gradients
  int count;                    // of rows of the input
  bool gradients;
  int64_t x_step, g_step;  // elements between columns
};

template <class T>
struct GradRow {
  const void *x, *grad;              // channel 0 of an image, of the type that the kernel reads
  int64_t x_step, x_pixel, g_pixel;  // elements between columns, between outputs in the input and in the gradient
  int64_t first, last, channels;     // channels [first, last) of `channels`; `first` begins a block
  T* sums;                           // [block][tap, then the bias][lane]; the last block ends with the last channel
  int64_t taps;
  const GradStep* steps;
  int64_t step_count;
  int64_t tap[kMaxRuns];  // the first of each run
  bool bias;              // also sum the gradient itself
  NextSteps next;
};

// Pixels of the steps.
constexpr int kGradWide = DSCONV_VECTOR_BYTES == 64 ? 7 : 4, kGradNarrow = 3;

// Fetches the share of kPixels outputs; `fetched` elements of gradients were before them.
template <class S, int kPixels, int kStride, class T>
DSCONV_INLINE void fetch_next(const GradRow<T>& row, int64_t fetched) {
  constexpr int kLine = kBlockBytes / sizeof(S), kL = kLanes<T>;
  const NextSteps& next = row.next;
  const int64_t channels = row.last - row.first;
  if (next.gradients) {
    const S* const share = static_cast<const S*>(next.grad) + column_offset(fetched, channels, next.g_step);
    unroll<ceil_div(kPixels * kL, kLine)>(
        [&]<int line>() __attribute__((always_inline)) { __builtin_prefetch(share + line * kLine, 0, 2); });
  }
  if (next.count == 0) return;
  const int64_t share = column_offset(fetched * kStride, channels, next.x_step);
  unroll<ceil_div(kPixels * kStride * kL, kLine)>([&]<int line>() __attribute__((always_inline)) {
    for (int i = 0; i < next.count; ++i)
      __builtin_prefetch(static_cast<const S*>(next.x[i]) + share + line * kLine, 0, 2);
  });
}

template <class S, int kTaps, int kStride, int kRuns, int kPixels, bool kEdge, class T = Compute<S>>
DSCONV_INLINE void accumulate_step(const GradRow<T>& row, const GradStep& step, const S* x, const S* grad, Vec<T>* sum,
                                   Vec<T>& bias, int64_t fetched) {
  Vec<T> g[kPixels];
  grad += step.grad;
  unroll<kPixels>([&]<int p>() __attribute__((always_inline)) { g[p] = load_channels(grad + p * row.g_pixel); });
  if (row.bias) unroll<kPixels>([&]<int p>() __attribute__((always_inline)) { bias += g[p]; });
  fetch_next<S, kPixels, kStride>(row, fetched);
  unroll<kRuns>([&]<int r>() __attribute__((always_inline)) {
    const uint64_t inside = step.inside[r];
    if (kEdge && !inside) return;
    const S* column = x + step.x[r];
    unroll<(kPixels - 1) * kStride + kTaps>([&]<int c>() __attribute__((always_inline)) {
      if (kEdge && !is_inside<c>(inside)) return;
      const Vec<T> value = load_channels(column + c * row.x_step);
      using Here = ColumnOutputs<kTaps, kStride, kPixels, c>;
      unroll<Here::kCount>([&]<int n>() __attribute__((always_inline)) {
        constexpr int p = Here::kLast - n, t = c - p * kStride;
        sum[r * kTaps + t] += value * g[p];
      });
    });
  });
}

// The sums of kRuns runs of kTaps taps over all steps.
template <class S, int kTaps, int kStride, int kRuns, class T = Compute<S>>
static void grad_block(const GradRow<T>& row) {
  constexpr int kL = kLanes<T>;
  T* sums = row.sums + row.first / kL * (row.taps + 1) * kL;
  int64_t fetched = 0;
  for (int64_t next = row.first; next < row.last; next += kL, sums += (row.taps + 1) * kL) {
    const int64_t c = block_channel<T>(next, row.channels);
    const S *x = static_cast<const S*>(row.x) + c, *grad = static_cast<const S*>(row.grad) + c;
    Vec<T> sum[kRuns * kTaps], bias = splat(T(0));
    unroll<kRuns * kTaps>([&]<int i>() __attribute__((always_inline)) { sum[i] = splat(T(0)); });
    for (const GradStep *step = row.steps, *end = step + row.step_count; step != end; ++step) {
      const auto accumulate = [&]<int pixels, bool edge>() __attribute__((always_inline)) {
        accumulate_step<S, kTaps, kStride, kRuns, pixels, edge>(row, *step, x, grad, sum, bias, fetched);
        fetched += pixels * kL;
      };
      switch (step->size) {
        case GradStep::inner: accumulate.template operator()<kGradWide, false>(); break;
        case GradStep::wide: accumulate.template operator()<kGradWide, true>(); break;
        case GradStep::narrow: accumulate.template operator()<kGradNarrow, true>(); break;
        case GradStep::single: accumulate.template operator()<1, true>(); break;
      }
    }
    unroll<kRuns * kTaps>([&]<int i>() __attribute__((always_inline)) {
      T* total = sums + (row.tap[i / kTaps] + i % kTaps) * kL;
      store(total, load(total) + sum[i]);
    });
    if (row.bias) store(sums + row.taps * kL, load(sums + row.taps * kL) + bias);
  }
}

// The block kernels of one number of taps and one stride, by the number of runs: as many as there are registers for.
template <class T>
struct GradKernels {
  using Block = void (*)(const GradRow<T>&);
  int taps, stride;
  bool exact;  // what is left over of a row of taps is another kernel's
  int runs;
  Block block[kMaxRuns];

  template <class S, int kTaps, int kStride>
  static constexpr GradKernels make() {
    constexpr int kSums = DSCONV_VECTOR_BYTES == 64 ? 21 : 10, kFit = kSums / kTaps;
    constexpr int kRuns = kFit < 1 ? 1 : kFit > kMaxRuns ? kMaxRuns : kFit;
    GradKernels k{kTaps, kStride, false, kRuns, {}};
    unroll<kRuns>([&]<int i>() __attribute__((always_inline)) { k.block[i] = grad_block<S, kTaps, kStride, i + 1>; });
    return k;
  }
};

// Those that read S and whose taps divide a row of `taps` with the fewest left over. Defined in block_kernels.inc.
template <class S>
const GradKernels<Compute<S>>& grad_kernels(int64_t taps, int64_t stride);

}  // namespace dsconv::cpu::DSCONV_ISA

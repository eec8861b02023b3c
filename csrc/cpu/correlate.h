// The inner loop of every depthwise pass that produces positions: acc[pixel] += tile[pixel * step + tap] * weight[tap]
// over a list of taps. A forward pass lists all taps; an input gradient lists the taps of its stride phase. Both walk a
// zero-padded tile (stage.h).
#pragma once

#include "stage.h"

namespace dsconv::cpu::DSCONV_ISA {

constexpr int kMaxPixels =
    8;  // accumulators of one block: 8 chains hide the FMA latency of two ports, and 16 registers hold them

struct Tap {
  int64_t offset;  // in the tile, relative to the pixel
  int64_t weight;  // in the packed weights of the block
  int64_t column;  // the tile columns that offset stands for
};

template <class T, int kPixels>
static void correlate_pixels(const T* tile, const T* weights, const Tap* taps, int64_t count, int64_t step,
                             const T* bias, T* out) {
  constexpr int kB = kBlock<T>, kL = kLanes<T>;
  for (int v = 0; v < kB; v += kL) {
    for (int64_t first = 0; first == 0 || first < count; first += kChain) {
      Vec<T> acc[kPixels];
      for (int p = 0; p < kPixels; ++p) acc[p] = first == 0 ? load(bias + v) : splat(T(0));
      for (int64_t t = first; t < min64(first + kChain, count); ++t) {
        const Vec<T> w = load(weights + taps[t].weight + v);
        const T* source = tile + taps[t].offset + v;
#pragma GCC unroll 8
        for (int p = 0; p < kPixels; ++p) acc[p] += load(source + p * step) * w;
      }
      for (int p = 0; p < kPixels; ++p) {
        T* target = out + p * kB + v;
        store(target, first == 0 ? acc[p] : load(target) + acc[p]);
      }
    }
  }
}

// `count` pixels in blocks of nearly equal size.
template <class T>
static void correlate_row(const T* tile, const T* weights, const Tap* taps, int64_t tap_count, int64_t step,
                          const T* bias, T* out, int64_t count) {
  using Block = void (*)(const T*, const T*, const Tap*, int64_t, int64_t, const T*, T*);
  static constexpr Block kBlocks[kMaxPixels + 1] = {nullptr,
                                                    correlate_pixels<T, 1>,
                                                    correlate_pixels<T, 2>,
                                                    correlate_pixels<T, 3>,
                                                    correlate_pixels<T, 4>,
                                                    correlate_pixels<T, 5>,
                                                    correlate_pixels<T, 6>,
                                                    correlate_pixels<T, 7>,
                                                    correlate_pixels<T, 8>};
  int64_t done = 0;
  for (int64_t left = ceil_div(count, kMaxPixels); left > 0; --left) {
    const int64_t pixels = ceil_div(count - done, left);
    kBlocks[pixels](tile + done * step, weights, taps, tap_count, step, bias, out + done * kBlock<T>);
    done += pixels;
  }
}

// A row whose weights hold an Inf or NaN: zero padding must not meet them, so every pixel takes only the taps inside
// [0, width). `column` is the tensor column of the first pixel's tap with column 0, `step_columns` the columns between
// pixels.
template <class T>
static void correlate_row_checked(const T* tile, const T* weights, const Tap* taps, int64_t tap_count, int64_t step,
                                  const T* bias, T* out, int64_t count, int64_t column, int64_t step_columns,
                                  int64_t width, Tap* inside) {
  for (int64_t p = 0; p < count; ++p) {
    int64_t kept = 0;
    for (int64_t t = 0; t < tap_count; ++t) {
      const int64_t at = column + p * step_columns + taps[t].column;
      if (at >= 0 && at < width) inside[kept++] = taps[t];
    }
    correlate_pixels<T, 1>(tile + p * step, weights, inside, kept, step, bias, out + p * kBlock<T>);
  }
}

}  // namespace dsconv::cpu::DSCONV_ISA

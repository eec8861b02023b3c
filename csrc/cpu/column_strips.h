// Strips of columns of channels_last tensors, for 3x3 windows of stride 1 and 2.
//
// A strip of a few columns goes down the rows, a vector of channels at a time: each input vector is loaded once and
// multiplied into the outputs of all rows whose windows hold it, which are kept in registers until their last row has come.
// The taps are loaded once for all rows. (A block of two rows, as in row_blocks.h, reads an input twice as often and the
// taps for every two rows.) The sums are the same to the bit.
//
// Where columns are a power of two apart, the lines that such a strip reads come from a few sets of each cache and one bank
// of the L2, at half the rate. There, strips are narrower and take several vectors at a time, and taps from memory.
#pragma once

#include "row_blocks.h"

namespace dsconv::cpu::DSCONV_ISA {

// Outputs [pixel, pixel + kPixels) in all rows of `row.strip`, all channels, kVectors vectors of these at a time. Of the
// columns that it reads, none but the first and the last may lie outside the tensor.
template <class S, int kTaps, int kStride, int kVectors, int kPixels, class T = Compute<S>>
static void column_strip(const BlockRow<T>& row, int64_t pixel) {
  constexpr int kL = kLanes<T>, kLive = ceil_div(kTaps, kStride), kColumns = (kPixels - 1) * kStride + kTaps;
  const StripRows rows = row.strip;
  const int64_t low = rows.low, high = rows.high, count = rows.count;
  const int64_t from = ceil_div(max64(low, 0), kStride), to = min64(count, floor_div(high, kStride));  // without checks
  const uint64_t inside = columns_inside(row.window.low, row.window.high, pixel * kStride);
  const int64_t step = row.x_step * static_cast<int64_t>(sizeof(S)), last = row.last, y_row = row.y_row;
  const S* const columns = static_cast<const S*>(row.x) + pixel * row.x_pixel;
  const BlockOutputs<S, true> out(row, pixel, kPixels);
  const Limits<T> limits(row.activation);
  const T* weights = row.weights + row.first / kL * row.weight_block;
  const auto go = [&]<int kCount>(int64_t next) __attribute__((always_inline)) {
    int64_t c[kCount];
    Vec<T> bias[kCount], acc[kCount][kLive][kPixels] = {};
    unroll<kCount>([&]<int v>() __attribute__((always_inline)) {
      c[v] = block_channel<T>(next + v * kL, row.channels);
      bias[v] = load(row.bias + c[v]);
    });
    const char* x = reinterpret_cast<const char*>(columns + c[0]);
    int64_t y = c[0];
    [[maybe_unused]] Vec<T> w[kTaps][kTaps];
    [[maybe_unused]] PairedTaps<kTaps> paired[kCount][kTaps];
    unroll<kCount * kTaps * kTaps>([&]<int i>() __attribute__((always_inline)) {
      constexpr int v = i / (kTaps * kTaps), u = i / kTaps % kTaps, t = i % kTaps;
      const T* const weight = weights + v * row.weight_block + (u * kTaps + t) * kL;
      if constexpr (kIsPaired<S>) paired[v][u].set(t, load_once(weight));
      if constexpr (!kIsPaired<S> && kCount == 1) w[u][t] = load_once(weight);
    });
    const auto tap = [&]<int v, int u, int t>() __attribute__((always_inline)) {
      if constexpr (kIsPaired<S>) return paired[v][u].template tap<t>();
      if constexpr (kCount == 1) return w[u][t];
      return load(weights + v * row.weight_block + (u * kTaps + t) * kL);
    };
    // As go_down says: row j of the outputs begins, in accumulators k, and row j - kLive + 1 ends.
    const auto advance = [&]<int k, int kFirst, int kLast, bool kChecked>(int64_t j) __attribute__((always_inline)) {
      if constexpr (kFirst == 0) {
        unroll<kCount * kPixels>(
            [&]<int i>() __attribute__((always_inline)) { acc[i / kPixels][k][i % kPixels] = bias[i / kPixels]; });
      }
      unroll<kStride>([&]<int r>() __attribute__((always_inline)) {
        // Passes to `use` the accumulator of output p in every row that meets this one, and the row of taps.
        const auto meet = [&]<int v, int p, class Use>(const Use& use) __attribute__((always_inline)) {
          unroll<kLive>([&]<int m>() __attribute__((always_inline)) {
            constexpr int u = m * kStride + r;
            if constexpr (m >= kFirst && m < kLast && u < kTaps)
              use.template operator()<u>(acc[v][(k + kLive - m) % kLive][p]);
          });
        };
        const auto one = [&]<int p, int t, int v = 0>(Vec<T> value) __attribute__((always_inline)) {
          meet.template operator()<v, p>([&]<int u>(Vec<T>& to) __attribute__((always_inline)) {
            to += value * tap.template operator()<v, u, t>();
          });
        };
        if (!kChecked || (j * kStride + r >= low && j * kStride + r < high)) {
          if constexpr (kIsPaired<S>) {
            unroll<kCount>([&]<int v>() __attribute__((always_inline)) {
              const char* from = x + (c[v] - c[0]) * static_cast<int64_t>(sizeof(S));
              const auto at = [&]<int column>() __attribute__((always_inline)) {
                return reinterpret_cast<const S*>(from + column * step);
              };
              const auto single = [&]<int p, int t>(Vec<T> value)
                                      __attribute__((always_inline)) { one.template operator()<p, t, v>(value); };
              const auto two = [&]<int p, int t>(Vec<T> pair) __attribute__((always_inline)) {
                meet.template operator()<v, p>([&]<int u>(Vec<T>& to) __attribute__((always_inline)) {
                  multiply_pairs(to, pair, paired[v][u].template pair<t>());
                });
              };
              for_pairs<S, kTaps, kStride, kPixels, Outside::ends>(at, inside, single, two);
            });
          } else {
            unroll<kCount>([&]<int v>() __attribute__((always_inline)) {
              const char* at[kColumns / 3 + 1];
              at[0] = x + (c[v] - c[0]) * static_cast<int64_t>(sizeof(S));
              unroll<kColumns>([&]<int column>() __attribute__((always_inline)) {
                if constexpr (column > 0 && column % 3 == 0) at[column / 3] = at[column / 3 - 1] + 3 * step;
                if ((column == 0 || column == kColumns - 1) && !is_inside<column>(inside)) return;
                const Vec<T> value = load_steps<S, column % 3>(at[column / 3], step);
                unroll<kPixels>([&]<int p>() __attribute__((always_inline)) {
                  constexpr int t = column - p * kStride;
                  if constexpr (t >= 0 && t < kTaps) one.template operator()<p, t, v>(value);
                });
              });
            });
          }
        }
        x += rows.x_row * static_cast<int64_t>(sizeof(S));
      });
      if (kLast < kLive || (kChecked && j < kLive - 1)) return;
      unroll<kCount>([&]<int v>() __attribute__((always_inline)) {
        Vec<T>(&done)[kPixels] = acc[v][(k + 1) % kLive];
        limits.template bound<kPixels>(done);
        out.template write<kPixels>(
            done, [&]<int p>() __attribute__((always_inline)) { return y + c[v] - c[0] + p * out.pixel; });
      });
      y += y_row;
    };
    go_down<kLive>(count, from, to, advance, [&]<int i>() __attribute__((always_inline)) {
      unroll<kCount * kPixels>([&]<int p>() __attribute__((always_inline)) {
        acc[p / kPixels][i][p % kPixels] = acc[p / kPixels][i + 1][p % kPixels];
      });
    });
    weights += kCount * row.weight_block;
  };
  int64_t aligned = row.first;
  if constexpr (kVectors > 1) {  // two cache lines that are fetched together, where vectors before them make it so
    constexpr uintptr_t kVector = kL * sizeof(S), kUnit = kVectors * kVector < 128 ? kVectors * kVector : 128;
    const uintptr_t before = -reinterpret_cast<uintptr_t>(columns + aligned) % kUnit;
    if (before % kVector == 0) aligned += before / sizeof(S);
  }
  for (int64_t next = row.first; next < last;) {
    if (kVectors == 1 || (next >= aligned && next + (kVectors - 1) * kL < last)) {
      go.template operator()<kVectors>(next);
      next += kVectors * kL;
    } else {
      go.template operator()<1>(next);
      next += kL;
    }
  }
}

// The strips of one number of taps, one stride and one number of vectors, by pixels.
template <class T>
struct StripKernels {
  using Strip = void (*)(const BlockRow<T>&, int64_t pixel);
  static constexpr int kMost = 7;
  int taps, stride, vectors;
  int wide;  // the most columns of one
  Strip strips[kMost + 1];

  template <class S, int kTaps, int kStride, int kVectors>
  static constexpr StripKernels make() {
    // Of the 32 registers, pairs of taps take some, and accumulators of several vectors as many times more.
    constexpr bool kPairs = kIsPaired<S> && kStride == 1;
    constexpr int kWide = kVectors == 4 ? 3 : kVectors == 2 ? (kStride == 1 ? 4 : 5) : kPairs ? 5 : kMost;
    StripKernels k{kTaps, kStride, kVectors, kWide, {}};
    unroll<kWide>([&]<int i>() __attribute__((always_inline)) {
      k.strips[i + 1] = column_strip<S, kTaps, kStride, kVectors, i + 1>;
    });
    return k;
  }

  // Computes outputs [begin, end), in strips of nearly the same width.
  void run(const BlockRow<T>& row, int64_t begin, int64_t end) const {
    const int64_t count = ceil_div(end - begin, wide);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t first = begin + (end - begin) * i / count, last = begin + (end - begin) * (i + 1) / count;
      strips[last - first](row, first);
    }
  }
};

// Those that read S and take `vectors` at a time (1, 2, of stride 2 also 4); null if there are none. Defined in
// block_kernels.inc.
template <class S>
const StripKernels<Compute<S>>* strip_kernels(int64_t taps, int64_t stride, int64_t vectors);

}  // namespace dsconv::cpu::DSCONV_ISA

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
  int64_t first = row.first, end = last;
  if constexpr (kVectors > 1) {
    // Begins where two cache lines do that are fetched together, if whole vectors lie before; the rest goes one by one.
    constexpr uintptr_t kVector = kL * sizeof(S), kUnit = kVectors * kVector < 128 ? kVectors * kVector : 128;
    const uintptr_t before = -reinterpret_cast<uintptr_t>(columns + first) % kUnit;
    if (before % kVector == 0) first = min64(first + static_cast<int64_t>(before / sizeof(S)), last);
    end = first + ceil_div(last - first, kL) / kVectors * kVectors * kL;
    const auto alone = [&](int64_t from_channel, int64_t to_channel) {
      if (from_channel >= to_channel) return;
      BlockRow<T> part = row;
      part.first = from_channel;
      part.last = to_channel;
      column_strip<S, kTaps, kStride, 1, kPixels>(part, pixel);
    };
    alone(row.first, first);
    alone(end, last);
  }
  const BlockOutputs<S, true> out(row, pixel, kPixels);
  const Limits<T> limits(row.activation);
  const T* weights = row.weights + first / kL * row.weight_block;
  for (int64_t next = first; next < end; next += kVectors * kL, weights += kVectors * row.weight_block) {
    int64_t c[kVectors];
    Vec<T> bias[kVectors], acc[kVectors][kLive][kPixels] = {};
    unroll<kVectors>([&]<int v>() __attribute__((always_inline)) {
      c[v] = block_channel<T>(next + v * kL, row.channels);
      bias[v] = load(row.bias + c[v]);
    });
    const char* x = reinterpret_cast<const char*>(columns + c[0]);
    int64_t y = c[0];
    [[maybe_unused]] Vec<T> w[kTaps][kTaps];
    [[maybe_unused]] PairedTaps<kTaps> paired[kVectors][kTaps];
    unroll<kVectors * kTaps * kTaps>([&]<int i>() __attribute__((always_inline)) {
      constexpr int v = i / (kTaps * kTaps), u = i / kTaps % kTaps, t = i % kTaps;
      const T* const weight = weights + v * row.weight_block + (u * kTaps + t) * kL;
      if constexpr (kIsPaired<S>) paired[v][u].set(t, load_once(weight));
      if constexpr (!kIsPaired<S> && kVectors == 1) w[u][t] = load_once(weight);
    });
    const auto tap = [&]<int v, int u, int t>() __attribute__((always_inline)) {
      if constexpr (kIsPaired<S>) return paired[v][u].template tap<t>();
      if constexpr (kVectors == 1) return w[u][t];
      return load(weights + v * row.weight_block + (u * kTaps + t) * kL);
    };
    // As go_down says: row j of the outputs begins, in accumulators k, and row j - kLive + 1 ends.
    const auto advance = [&]<int k, int kFirst, int kLast, bool kChecked>(int64_t j) __attribute__((always_inline)) {
      if constexpr (kFirst == 0) {
        unroll<kVectors * kPixels>(
            [&]<int i>() __attribute__((always_inline)) { acc[i / kPixels][k][i % kPixels] = bias[i / kPixels]; });
      }
      unroll<kStride>([&]<int r>() __attribute__((always_inline)) {
        constexpr int kRows = rows_meeting(kTaps, kStride, r, kFirst, kLast);
        if (!kChecked || (j * kStride + r >= low && j * kStride + r < high)) {
          unroll<kVectors>([&]<int v>() __attribute__((always_inline)) {
            const char* const from = x + (c[v] - c[0]) * static_cast<int64_t>(sizeof(S));
            if constexpr (kIsPaired<S>) {
              const auto at = [&]<int column>() __attribute__((always_inline)) {
                return reinterpret_cast<const S*>(from + column * step);
              };
              const auto one = [&]<int p, int t>(Vec<T> value) __attribute__((always_inline)) {
                unroll<kRows>([&]<int i>() __attribute__((always_inline)) {
                  constexpr int m = kFirst + i, u = m * kStride + r;
                  acc[v][(k + kLive - m) % kLive][p] += value * tap.template operator()<v, u, t>();
                });
              };
              const auto two = [&]<int p, int t>(Vec<T> pair) __attribute__((always_inline)) {
                unroll<kRows>([&]<int i>() __attribute__((always_inline)) {
                  constexpr int m = kFirst + i, u = m * kStride + r;
                  multiply_pairs(acc[v][(k + kLive - m) % kLive][p], pair, paired[v][u].template pair<t>());
                });
              };
              for_pairs<S, kTaps, kStride, kPixels, Outside::ends>(at, inside, one, two);
            } else {
              const char* at[kColumns / 3 + 1];
              at[0] = from;
              unroll<kColumns>([&]<int column>() __attribute__((always_inline)) {
                if constexpr (column > 0 && column % 3 == 0) at[column / 3] = at[column / 3 - 1] + 3 * step;
                if ((column == 0 || column == kColumns - 1) && !is_inside<column>(inside)) return;
                const Vec<T> value = load_steps<S, column % 3>(at[column / 3], step);
                using Here = ColumnOutputs<kTaps, kStride, kPixels, column>;
                unroll<Here::kCount * kRows>([&]<int i>() __attribute__((always_inline)) {
                  constexpr int p = Here::kFirst + i / kRows, m = kFirst + i % kRows;
                  acc[v][(k + kLive - m) % kLive][p] +=
                      value * tap.template operator()<v, m * kStride + r, column - p * kStride>();
                });
              });
            }
          });
        }
        x += rows.x_row * static_cast<int64_t>(sizeof(S));
      });
      if (kLast < kLive || (kChecked && j < kLive - 1)) return;
      unroll<kVectors>([&]<int v>() __attribute__((always_inline)) {
        Vec<T>(&done)[kPixels] = acc[v][(k + 1) % kLive];
        limits.template bound<kPixels>(done);
        out.template write<1, kPixels>(done, y + c[v] - c[0]);
      });
      y += y_row;
    };
    go_down<kLive>(count, from, to, advance, [&]<int i>() __attribute__((always_inline)) {
      unroll<kVectors * kPixels>([&]<int p>() __attribute__((always_inline)) {
        acc[p / kPixels][i][p % kPixels] = acc[p / kPixels][i + 1][p % kPixels];
      });
    });
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

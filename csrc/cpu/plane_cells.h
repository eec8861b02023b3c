// The depthwise input gradient of stride 2 by planes: contiguous tensors, where neighbouring columns are neighbours in
// memory.
//
// As in planes.h, but what a lane holds is a cell of 2 x 2 neighbours (cell_blocks.h), which read the same few gradients:
// those are loaded once for all of it, and its even and odd columns are put side by side when they are stored.
#pragma once

#include "cell_blocks.h"
#include "plane_strips.h"

namespace dsconv::cpu::DSCONV_ISA {

// The lanes of two vectors, one from each in turn: a vector from lane kFirst of both on.
template <int kFirst, class T>
DSCONV_INLINE Vec<T> interleaved(Vec<T> even, Vec<T> odd) {
  typename Lanes<T>::Places places;
  unroll<kLanes<T>>([&]<int l>()
                        __attribute__((always_inline)) { places[l] = kFirst + l / 2 + (l % 2 ? kLanes<T> : 0); });
  return __builtin_shuffle(even, odd, places);
}

// One vector's width of cells, of which the last may be half a one. Columns are counted as those of a Strip of outputs.
template <class T, int kInputs>
struct CellStrip : Strip<T, kInputs, 1> {
  int64_t width;  // outputs

  CellStrip(int64_t first, int64_t outputs, int64_t low, int64_t high, int64_t dilation)
      : Strip<T, kInputs, 1>(first, ceil_div(outputs, 2), low, high, dilation),
        width(min64(outputs - 2 * first, 2 * kLanes<T>)) {}
};

// The outputs of a strip in the rows of some pieces, one after the other. The rows of a piece are those of outputs.
template <class S, int kTaps, int kOdd, Reach kReach, class T = Compute<S>>
static void cell_strip(const Plane<S>& plane, const Piece* pieces, int64_t piece_count,
                       const CellStrip<T, CellTaps<kTaps, kOdd>::kInputs>& strip) {
  using Taps = CellTaps<kTaps, kOdd>;
  constexpr int kL = kLanes<T>, kLive = Taps::kInputs;
  Vec<T> w[kTaps][kTaps], acc[kLive][4] = {};
  unroll<kTaps * kTaps>([&]<int i>() __attribute__((always_inline)) {
    constexpr int ty = i / kTaps, tx = i % kTaps;
    const Vec<T> weight = splat(plane.weights[(Taps::place(ty) * kTaps + Taps::place(tx)) * kL]);
    w[ty][tx] = kReach != Reach::inner ? strip.weights[Taps::input(tx)].of(weight) : weight;
  });
  KeptLanes<T> columns[kLive];
  unroll<kLive>([&]<int i>() __attribute__((always_inline)) { columns[i] = KeptLanes<T>(strip.columns[i][0]); });
  for (const Piece* p = pieces; p < pieces + piece_count; ++p) {
    const Piece& piece = *p;
    const int64_t low = piece.low, high = piece.high, rows = piece.count, x_row = piece.x_row, y_row = piece.y_row;
    const int64_t cells = ceil_div(rows, 2), from = low, to = min64(cells, high);  // without checks
    // Rows of outputs shorter than two vectors are stored as such where later rows write anew what is too much.
    const int64_t whole = kReach != Reach::narrow || y_row != strip.width ? 0 : rows - (2 * kL - 1) / strip.width;
    const S* x = plane.x + piece.x + strip.first;
    S* y = plane.y + piece.y + 2 * strip.first;
    const S* next_x = plane.x + piece.x_next + strip.first * ceil_div(rows, 2);  // a strip fetches its share
    const S* next_y = plane.y + piece.y_next + 2 * strip.first * rows;
    const auto put = [&]<int r>(const Vec<T>* cell, int64_t row) __attribute__((always_inline)) {
      const Vec<T> first = interleaved<0, T>(cell[2 * r], cell[2 * r + 1]);
      const Vec<T> second = interleaved<kL / 2, T>(cell[2 * r], cell[2 * r + 1]);
      if (strip.width == 2 * kL || row < whole) {
        store_pair<S>(y, first, second, false);
      } else {
        store_part<S>(y, first, strip.width);
        if (strip.width > kL) store_part<S>(y + kL, second, strip.width - kL);
      }
      y += y_row;
    };
    // As go_down says: row j of the cells begins, in accumulators k, and row j - kLive + 1 ends.
    const auto advance = [&]<int k, int kFirst, int kLast, bool kChecked>(int64_t j) __attribute__((always_inline)) {
      if constexpr (kFirst == 0) unroll<4>([&]<int i>() __attribute__((always_inline)) { acc[k][i] = splat(T(0)); });
      if (!kChecked || (j >= low && j < high)) {
        unroll<Taps::kInputs>([&]<int i>() __attribute__((always_inline)) {
          const S* at = x + i;
          const Vec<T> value = widened<S>(kReach == Reach::inner ? load_bits_once(at) : columns[i].load(at));
          unroll<(kLast - kFirst) * 4>([&]<int n>() __attribute__((always_inline)) {
            constexpr int m = kFirst + n / 4, ty = Taps::tap(n / 2 % 2, m), tx = Taps::tap(n % 2, i);
            if constexpr (ty >= 0 && tx >= 0) acc[(k + kLive - m) % kLive][n % 4] += value * w[ty][tx];
          });
        });
      }
      x += x_row;
      __builtin_prefetch(next_x, 0, 2);
      next_x += kL;
      unroll<4>([&]<int i>() __attribute__((always_inline)) { __builtin_prefetch(next_y + i * kL, 1, 2); });
      next_y += 4 * kL;
      const int64_t row = 2 * (j - kLive + 1);
      if (kLast < kLive || (kChecked && row < 0)) return;
      const Vec<T>* done = acc[(k + 1) % kLive];
      put.template operator()<0>(done, row);
      if (row + 1 < rows) put.template operator()<1>(done, row + 1);
    };
    go_down<kLive>(cells, from, to, advance, [&]<int i>() __attribute__((always_inline)) {
      unroll<4>([&]<int n>() __attribute__((always_inline)) { acc[i][n] = acc[i + 1][n]; });
    });
  }
}

// Planes by such strips.
template <class S, int kTaps, int kOdd>
struct ByCells {
  using Taps = CellTaps<kTaps, kOdd>;
  using StripOf = CellStrip<Compute<S>, Taps::kInputs>;
  using Work = StripWork<StripOf, StripOf>;
  static constexpr int kOutputs = 2, kInputs = 1;

  static int64_t first_column(const Correlation& c) { return c.window.pad[2] / 2 + Taps::kFirst; }
  static int64_t cut_rows(const Correlation& c, const View& from, const View& to, int64_t top, int64_t bottom,
                          int64_t most, Piece* pieces) {
    const int64_t cuts = ceil_div(bottom - top, most), left = first_column(c);
    for (int64_t cut = 0; cut < cuts; ++cut) {
      const int64_t n = top + (bottom - top) * cut / cuts, end = top + (bottom - top) * (cut + 1) / cuts;
      const int64_t row = n + c.window.pad[1] / 2 + Taps::kFirst;
      pieces[cut] = {row * from.stride[3] + left,
                     2 * n * to.stride[3],
                     (row + end - n) * from.stride[3] + left,
                     2 * end * to.stride[3],
                     from.stride[3],
                     to.stride[3],
                     -row,
                     c.source()[1] - row,
                     min64(2 * end, c.target()[1]) - 2 * n};
    }
    return cuts;
  }
  static void run(const ImagePlanes<S>& image, int64_t first, int64_t last, const Work& work) {
    work.for_each(image, first, last, [](const auto& plane, const Piece* pieces, int64_t count, const StripOf& strip) {
      with_reach(strip.reach, [&]<Reach reach>() { cell_strip<S, kTaps, kOdd, reach>(plane, pieces, count, strip); });
    });
  }
};

}  // namespace dsconv::cpu::DSCONV_ISA

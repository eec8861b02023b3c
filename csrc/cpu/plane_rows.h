// Rows of planes that fit into a vector or two, with AVX-512: maps of up to 16 columns in float32, and what strips of whole
// vectors leave of wider ones.
//
// As in plane_strips.h, but a row of the input is loaded once, and shuffled into what each column of taps wants. Where two
// rows of outputs fit into a vector, they are those of two planes, side by side. Columns outside the tensor are lanes that
// are not multiplied.
#pragma once

#include "plane_strips.h"

namespace dsconv::cpu::DSCONV_ISA {

// What a vector of outputs is shuffled from: a vector of a row, two that follow each other, or one from each of two planes.
enum class RowForm { vector, vectors, planes };

// What all rows have in common. Columns are counted as those of a Strip.
template <class T, int kTaps, int kStride, RowForm kForm>
struct RowStrip {
  static constexpr int kL = kLanes<T>, kWidth = kForm == RowForm::planes ? kL / 2 : kL;
  int64_t x_first, y_first;  // the first column that is loaded, from the first that output 0 reads; output
  typename Lanes<T>::Places places[kTaps];  // of the columns that outputs pair with each tap
  uint32_t inside[kTaps];                   // outputs whose column is inside the tensor
  uint32_t row[2], outputs;                 // the columns of the input by vectors; the outputs of a row

  // Outputs [first, first + count), of which there are no more than lanes for them.
  RowStrip(int64_t first, int64_t count, int64_t low, int64_t high, int64_t dilation) : y_first(first) {
    low = max64(low, 0);
    x_first = first * kStride + low;
    row[0] = Lanes<T>(0, high - low).bits;
    row[1] = kForm == RowForm::planes ? row[0] : Lanes<T>(0, high - low - kL).bits;
    outputs = Lanes<T>(0, count).bits;
    for (int t = 0; t < kTaps; ++t) {
      inside[t] = 0;
      for (int l = 0; l < kL; ++l) {
        const int64_t column = l % kWidth * kStride + t * dilation;
        const bool is_inside = l % kWidth < count && column >= low && column < high;
        places[t][l] = is_inside ? column - low + l / kWidth * kL : 0;
        inside[t] |= is_inside ? 1u << l : 0;
      }
    }
  }
  // Do the columns that they read fit into a vector?
  static bool fits(int64_t count, int64_t low, int64_t high, int64_t dilation) {
    const int64_t last = min64(high - 1, (count - 1) * kStride + (kTaps - 1) * dilation);
    return count <= kWidth && last - max64(low, 0) < kL;
  }
};

// All planes of channels [first, last): the pieces of each, one after the other.
template <class S, int kTaps, int kStride, RowForm kForm, class T = Compute<S>>
static void plane_rows(const ImagePlanes<S>& image, int64_t first, int64_t last, const Piece* pieces,
                       int64_t piece_count, const RowStrip<T, kTaps, kStride, kForm>& strip) {
  constexpr bool kTwo = kForm == RowForm::planes, kSecond = kForm != RowForm::vector;
  constexpr int kL = kLanes<T>, kHalf = kL / 2, kPlanes = kTwo ? 2 : 1;
  constexpr int kLive = (kTaps + kStride - 1) / kStride;
  constexpr bool kHeld = kTaps < 7 || kTwo;                 // weights: more would be spilled, and stay in memory
  constexpr int kAhead = kTwo ? kStride : kSecond ? 2 : 1;  // cache lines of an input row, of all planes
  typename Lanes<T>::Places places[kTaps];
  uint32_t inside[kTaps];
  unroll<kTaps>([&]<int t>() __attribute__((always_inline)) {
    places[t] = strip.places[t];
    inside[t] = kept_bits(strip.inside[t]);
  });
  const uint32_t row = kept_bits(strip.row[0]), second_row = kept_bits(strip.row[1]),
                 outputs = kept_bits(strip.outputs);
  const auto values = [](T first, T second) __attribute__((always_inline)) {  // one for each plane
    typename Lanes<T>::Places right;
    unroll<kL>([&]<int l>() __attribute__((always_inline)) { right[l] = l < kHalf ? 0 : -1; });
    return kTwo ? right ? splat(second) : splat(first) : splat(first);
  };
  const Limits<T> limits = image.limits;
  Vec<T> acc[kLive] = {};
  for (int64_t channel = first; channel < last; channel += kPlanes) {  // of an odd number, the last one twice
    const Plane<S> plane = image.plane(channel), other = image.plane(kTwo ? min64(channel + 1, last - 1) : channel);
    [[maybe_unused]] Vec<T> w[kTaps][kTaps];
    if constexpr (kHeld) {
      unroll<kTaps * kTaps>([&]<int i>() __attribute__((always_inline)) {
        w[i / kTaps][i % kTaps] = values(plane.weights[i * kL], other.weights[i * kL]);
      });
    }
    const auto weight = [&]<int u, int t>() __attribute__((always_inline)) {
      if constexpr (kHeld) return w[u][t];
      return splat(plane.weights[(u * kTaps + t) * kL]);
    };
    const Vec<T> bias = values(plane.bias, other.bias);
    const int64_t x_second = kTwo ? other.x - plane.x : kL, y_second = kTwo ? other.y - plane.y : 0;
    for (const Piece* piece = pieces; piece < pieces + piece_count; ++piece) {
      const int64_t low = piece->low, high = piece->high, x_row = piece->x_row, y_row = piece->y_row;
      const int64_t steps = piece->count + kLive - 1;
      const S* x = plane.x + piece->x + strip.x_first;
      S* y = plane.y + piece->y + strip.y_first;
      const S* next_x = other.x + piece->x_next;
      const S* next_y = other.y + piece->y_next;
      // Step j begins row j of the outputs, the last of those in work, and ends the first one.
      for (int64_t j = 0; j < steps; ++j) {
        unroll<kLive - 1>([&]<int i>() __attribute__((always_inline)) { acc[i] = acc[i + 1]; });
        acc[kLive - 1] = bias;
        unroll<kStride>([&]<int r>() __attribute__((always_inline)) {
          if (j * kStride + r >= low && j * kStride + r < high) {
            const Vec<T> a = widened<S>(load_lanes(x, row));
            const Vec<T> b = kSecond ? widened<S>(load_lanes(x + x_second, second_row)) : a;
            unroll<kTaps>([&]<int t>() __attribute__((always_inline)) {
              const Vec<T> value = kSecond ? __builtin_shuffle(a, b, places[t]) : __builtin_shuffle(a, places[t]);
              unroll<kLive>([&]<int i>() __attribute__((always_inline)) {
                constexpr int u = (kLive - 1 - i) * kStride + r;
                if constexpr (u < kTaps)
                  acc[i] = add_product_in(inside[t], acc[i], value, weight.template operator()<u, t>());
              });
            });
          }
          unroll<kAhead>([&]<int i>() __attribute__((always_inline)) { __builtin_prefetch(next_x + i * kL, 0, 2); });
          next_x += kAhead * kL;
          x += x_row;
        });
        __builtin_prefetch(next_y, 1, 2);
        next_y += kL;
        if (j < kLive - 1) continue;
        Vec<T> done = acc[0];
        limits.template apply<1>(&done);
        store_lanes<S>(y, done, outputs);
        if (kTwo) store_lanes<S>(y + y_second - kHalf, done, outputs << kHalf);
        y += y_row;
      }
    }
  }
}

}  // namespace dsconv::cpu::DSCONV_ISA

// The depthwise weight gradient by planes: contiguous tensors, where neighbouring columns are neighbours in memory.
//
// A vector holds neighbouring outputs of one row. Strips of one vector's width go down the plane: each row of gradients is
// loaded once and multiplied by the rows of the input that its windows meet, into an accumulator for every tap; the lanes
// are added at the end. Rows outside the tensor are left out; columns outside are never read, and lanes of zeros times
// gradients that are zero there.
#pragma once

#include "planes.h"

namespace dsconv::cpu::DSCONV_ISA {

// One vector's width of the outputs. Columns are counted from the one that the strip's first output reads first.
template <class T, int kTaps, int kStride>
struct GradStrip {
  int64_t first;  // output
  bool inner;     // all lanes are outputs, and no column lies outside the tensor
  Lanes<T> outputs, inside[kTaps], columns[kTaps][kStride];  // inside: of the outputs, those whose column is

  GradStrip(int64_t first, int64_t count, int64_t low, int64_t high, int64_t dilation) : first(first) {
    constexpr int kL = kLanes<T>;
    inner = count == kL && low <= 0 && high >= (kTaps - 1) * dilation + kL * kStride;
    outputs = {0, count, -first, count};
    for (int t = 0; t < kTaps; ++t) {
      const int64_t from = low - t * dilation, end = high - t * dilation, to = min64(end, count * kStride);
      inside[t] = {ceil_div(from, kStride), ceil_div(to, kStride)};
      for (int i = 0; i < kStride; ++i) columns[t][i] = {from - i * kL, to - i * kL, from - i * kL, end - i * kL};
    }
  }
};

// Neighbouring rows of outputs of a strip, and the rows of the input that kRows rows of taps pair them with.
template <class S>
struct GradPiece {
  const S *x, *grad;                            // the column and the output that come first
  const S *next_x, *next_grad;                  // what is fetched for later: as much as is read
  int64_t x_step, x_row, grad_row, x_dilation;  // between outputs, rows of taps, rows of gradients, columns of taps
  int64_t count, from, to;                      // rows of outputs; of which [from, to) pair with no row outside
  int64_t top, step, tap_step, height;  // row u of taps pairs row n of outputs with top + n * step + u * tap_step
};

// Adds to sums[tap] and, if it is wanted, to the bias.
template <class S, int kTaps, int kStride, int kRows, bool kInner, class T = Compute<S>>
static void grad_strip(const GradPiece<S>& piece, const GradStrip<T, kTaps, kStride>& strip, Vec<T>* sums,
                       Vec<T>* bias) {
  constexpr int kL = kLanes<T>;
  Vec<T> sum[kRows * kTaps], gradients = splat(T(0));
  unroll<kRows * kTaps>([&]<int i>() __attribute__((always_inline)) { sum[i] = sums[i]; });
  const S *x = piece.x, *grad = piece.grad;
  const int64_t x_step = piece.x_step, x_row = piece.x_row, grad_row = piece.grad_row, dilation = piece.x_dilation;
  const S *next_x = piece.next_x, *next_grad = piece.next_grad;
  const auto add_row = [&]<bool kChecked>(int64_t n) __attribute__((always_inline)) {
    const Vec<T> g = widened<S>(kInner ? load_bits_once(grad) : strip.outputs.load(grad));
    const auto as_paired = [](Vec<T> v) __attribute__((always_inline)) {
      if constexpr (kShuffles<S, kStride>) v = from_proper_order<T>(v);
      return v;
    };
    const Vec<T> paired = as_paired(g);
    gradients += g;
    unroll<kRows>([&]<int u>() __attribute__((always_inline)) {
      const int64_t row = piece.top + n * piece.step + u * piece.tap_step;
      if (kChecked && (row < 0 || row >= piece.height)) return;
      const auto columns = [&]<int t, int i>() __attribute__((always_inline)) {
        const S* at = x + u * x_row + t * dilation + i * kL;
        return kInner ? load_bits(at) : strip.columns[t][i].load(at);
      };
      for_taps<S, kTaps, kStride>(columns, [&]<int t>(Vec<T> value) __attribute__((always_inline)) {
        sum[u * kTaps + t] += value * (kInner ? paired : as_paired(strip.inside[t].of(g)));
      });
    });
    if (bias) {  // the first of the passes over these rows
      unroll<kStride>([&]<int r>()
                          __attribute__((always_inline)) { __builtin_prefetch(next_x + r * kL * kStride, 0, 2); });
      __builtin_prefetch(next_grad, 0, 2);
    }
    next_x += kStride * kL * kStride;
    next_grad += kL;
    x += x_step;
    grad += grad_row;
  };
  int64_t n = 0;
  for (; n < piece.from; ++n) add_row.template operator()<true>(n);
  for (; n < piece.to; ++n) add_row.template operator()<false>(n);
  for (; n < piece.count; ++n) add_row.template operator()<true>(n);
  unroll<kRows * kTaps>([&]<int i>() __attribute__((always_inline)) { sums[i] = sum[i]; });
  if (bias) *bias += gradients;
}

template <class S>
struct PlanesGradWeight {
  using T = Compute<S>;
  static constexpr int kL = kLanes<T>;
  static constexpr int kSums = round_up(7 * 7 + 1, kL);  // taps and the bias

  static const char* can_run(const DepthwiseProblem& p) {
    const Window& w = p.window;
    if (!kWidens<S>) return "half types are widened by rows";
    if (p.x.stride[4] != 1 || p.grad.stride[4] != 1) return "columns are no neighbours in memory";
    if (w.in[0] != 1 || w.taps[0] != 1 || w.out[0] != 1) return "three dimensions";
    if (w.taps[1] != w.taps[2] || (w.taps[1] != 3 && w.taps[1] != 5 && w.taps[1] != 7))
      return "taps other than 3x3, 5x5, 7x7";
    if (w.stride[1] != w.stride[2] || w.stride[1] > 2 || (w.stride[1] == 2 && product(w.dilation) != 1))
      return "strides other than 1, and 2 without dilation";
    if (!has_wide_rows<S>(w)) return "rows of a half type that are shorter than a vector";
    return nullptr;
  }
  // Values that are not kept in registers for several rows of taps, lanes without outputs, and the addition of all lanes.
  static double part(const DepthwiseProblem& p) {
    constexpr double kSlower = 1.6, kAdding = 5;
    const Window& w = p.window;
    const double taps = static_cast<double>(product(w.taps));
    const int64_t vectors = max64(1, p.batch * w.out[1] * ceil_div(w.out[2], kL));  // of each channel
    const int64_t sums = round_up(product(w.taps) + 1, kL);
    return taps / (kSlower * taps / filled_lanes<T>(w.out[2]) + kAdding * sums / vectors);
  }
  static size_t workspace_bytes(const DepthwiseProblem& p, int) {
    return kBlockBytes + piece_bytes<GradStrip<T, 7, 2>>(ceil_div(p.window.out[2], kL));
  }
  static void launch(const DepthwiseProblem& p, const Runtime& runtime, void* workspace) {
    if constexpr (kWidens<S>) {
      unroll<6>([&]<int i>() __attribute__((always_inline)) {
        constexpr int kTaps = 3 + i / 2 * 2, kStride = 1 + i % 2;
        if (p.window.taps[1] == kTaps && p.window.stride[1] == kStride)
          launch_strips<kTaps, kStride>(p, runtime, workspace);
      });
    }
  }

  // A task is a channel: all its planes, in their order.
  template <int kTaps, int kStride>
  static void launch_strips(const DepthwiseProblem& p, const Runtime& runtime, void* workspace) {
    using StripOf = GradStrip<T, kTaps, kStride>;
    const Window& w = p.window;
    const int64_t strip_count = ceil_div(w.out[2], kL);
    Arena arena = arena_at(workspace);
    StripOf* const strips = take<StripOf>(arena, strip_count);
    for (int64_t s = 0; s < strip_count; ++s) {
      const int64_t at = s * kL * kStride - w.pad[2];
      strips[s] = StripOf(s * kL, min64(kL, w.out[2] - s * kL), -at, w.in[2] - at, w.dilation[2]);
    }
    const int64_t channels = p.channels * p.multiplier;
    auto body = [&](int64_t channel, int64_t end, int64_t) {
      for (; channel < end; ++channel) {
        Vec<T> sums[kSums] = {};
        double totals[kSums] = {};
        int64_t chain = 0;
        for (int64_t image = 0; image < p.batch; ++image) {
          const bool last = image + 1 == p.batch;
          const PlanePair now = planes_of(p, channel, image);
          const PlanePair next = planes_of(p, min64(channel + last, channels - 1), last ? 0 : image + 1);
          for (int64_t h = 0; h < w.out[1]; h += kChain) {
            const int64_t count = min64(kChain, w.out[1] - h);
            for (int64_t s = 0; s < strip_count; ++s, chain += count) {
              if (chain + count > kChain) {
                add_lanes<kTaps * kTaps + 1>(sums, totals);
                chain = 0;
              }
              add_piece<kTaps, kStride>(p, strips[s], now, next, h, count, sums);
            }
          }
        }
        add_lanes<kTaps * kTaps + 1>(sums, totals);
        write(p, channel, totals, kTaps * kTaps);
      }
    };
    for_slots(runtime, channels, thread_slots(runtime, channels, depthwise_flops(p)), body);
  }

  // A plane of the input and one of gradients.
  struct PlanePair {
    const S *x, *grad;
  };
  static PlanePair planes_of(const DepthwiseProblem& p, int64_t channel, int64_t image) {
    return {static_cast<const S*>(p.x.data) + image * p.x.stride[0] + channel / p.multiplier * p.x.stride[1],
            static_cast<const S*>(p.grad.data) + image * p.grad.stride[0] + channel * p.grad.stride[1]};
  }

  // `count` rows of outputs of a strip from row h on, some rows of taps at a time: as there are registers for.
  template <int kTaps, int kStride>
  static void add_piece(const DepthwiseProblem& p, const GradStrip<T, kTaps, kStride>& strip, const PlanePair& now,
                        const PlanePair& next, int64_t h, int64_t count, Vec<T>* sums) {
    constexpr int kFit = (DSCONV_VECTOR_BYTES == 64 ? 28 : 12) / kTaps, kRows = kFit < kTaps ? kFit : kTaps;
    const Window& w = p.window;
    GradPiece<S> piece{};
    const int64_t before = h * w.out[2] + strip.first * count;  // outputs
    piece.next_x = next.x + before * kStride * kStride;
    piece.next_grad = next.grad + before;
    piece.grad = now.grad + h * p.grad.stride[3] + strip.first;
    piece.grad_row = p.grad.stride[3];
    piece.x_step = w.stride[1] * p.x.stride[3];
    piece.x_row = w.dilation[1] * p.x.stride[3];
    piece.x_dilation = w.dilation[2];
    piece.count = count;
    piece.step = w.stride[1];
    piece.tap_step = w.dilation[1];
    piece.height = w.in[1];
    unroll<ceil_div(kTaps, kRows)>([&]<int group>() __attribute__((always_inline)) {
      constexpr int kFirst = group * kRows, kCount = kTaps - kFirst < kRows ? kTaps - kFirst : kRows;
      piece.top = h * w.stride[1] - w.pad[1] + kFirst * w.dilation[1];
      const int64_t last = piece.height - 1 - (kCount - 1) * w.dilation[1] - piece.top;  // as piece.top + n * step is
      piece.from = min64(count, max64(0, ceil_div(-piece.top, kStride)));
      piece.to = max64(piece.from, min64(count, floor_div(last, kStride) + 1));
      piece.x = now.x + piece.top * p.x.stride[3] + strip.first * kStride - w.pad[2];
      Vec<T>* const to = sums + kFirst * kTaps;
      Vec<T>* const bias = group == 0 ? sums + kTaps * kTaps : nullptr;
      if (strip.inner) {
        grad_strip<S, kTaps, kStride, kCount, true>(piece, strip, to, bias);
      } else {
        grad_strip<S, kTaps, kStride, kCount, false>(piece, strip, to, bias);
      }
    });
  }

  // Adds the lanes of each sum to its total, and clears it.
  template <int kCount>
  static void add_lanes(Vec<T>* sums, double* totals) {
    for (int first = 0; first < kCount; first += kL) {
      transpose<T>(sums + first);
      for (int step = 1; step < kL; step *= 2)
        for (int i = 0; i + step < kL; i += 2 * step) sums[first + i] += sums[first + i + step];
      for (int i = 0; i < kL; ++i) totals[first + i] += sums[first][i];
      for (int i = 0; i < kL; ++i) sums[first + i] = splat(T(0));
    }
  }

  static void write(const DepthwiseProblem& p, int64_t channel, const double* totals, int64_t taps) {
    if (p.grad_weight.data) {
      const bool dense = has_dense_taps(p.grad_weight, p.window);
      S* filter = static_cast<S*>(p.grad_weight.data) + channel * p.grad_weight.stride[0];
      for (int64_t t = 0; t < taps; ++t)
        narrow(static_cast<T>(totals[t]), filter + (dense ? t : tap_offset(p.grad_weight, p.window, t)));
    }
    if (p.grad_bias.data)
      narrow(static_cast<T>(totals[taps]), static_cast<S*>(p.grad_bias.data) + channel * p.grad_bias.stride[0]);
  }
};

}  // namespace dsconv::cpu::DSCONV_ISA

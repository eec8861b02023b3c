// The depthwise weight gradient by planes: contiguous tensors, where neighbouring columns are neighbours in memory.
//
// A vector holds neighbouring outputs of one row. Strips of one vector's width go down the plane: each row of the input is
// loaded once for every column of taps and multiplied by all rows of gradients whose windows hold it, which are kept in
// registers until their last row has come, into an accumulator for every tap. The lanes are added at the end. Borders as
// in planes.h: rows outside the tensor are left out, columns outside are lanes that add nothing.
#pragma once

#include "planes.h"

namespace dsconv::cpu::DSCONV_ISA {

// One vector's width of the outputs. Columns are counted from the one that the strip's first output reads first.
template <class S, int kTaps, int kStride, class T = Compute<S>>
struct GradStrip {
  int64_t first;     // output
  int64_t dilation;  // columns between taps
  bool inner;        // all lanes are outputs, and no column lies outside the tensor
  Lanes<T> outputs, inside[kTaps], columns[kTaps][kStride];  // inside: of the outputs, those whose column is

  GradStrip(int64_t first, int64_t count, int64_t low, int64_t high, int64_t dilation)
      : first(first), dilation(dilation) {
    constexpr int kL = kLanes<T>;
    inner = count == kL && low <= 0 && high >= (kTaps - 1) * dilation + kL * kStride;
    outputs = {0, count, -first, count};
    for (int t = 0; t < kTaps; ++t) {
      const int64_t from = low - t * dilation, end = high - t * dilation, to = min64(end, count * kStride);
      inside[t] = {ceil_div(from, kStride), ceil_div(to, kStride)};
      if constexpr (kShuffles<S, kStride>) inside[t].shuffle();
      for (int i = 0; i < kStride; ++i) columns[t][i] = {from - i * kL, to - i * kL, from - i * kL, end - i * kL};
    }
  }
};

// A plane of the input and one of gradients, and where the strip's share of those begins that are fetched for later.
template <class S>
struct PlanePair {
  const S *x, *grad, *next_x, *next_grad;
};

// Adds the outputs of a strip in the rows of some pieces to sums[tap] of the taps of kRows rows from kFirst on, and with
// the first of them to the bias, which follows the taps.
template <class S, int kTaps, int kStride, int kFirst, int kRows, bool kInner, class T = Compute<S>>
static void grad_strip(const PlanePair<S>& planes, const Piece* pieces, int64_t piece_count,
                       const GradStrip<S, kTaps, kStride>& strip, Vec<T>* sums) {
  constexpr int kL = kLanes<T>, kLive = ceil_div(kRows, kStride);
  Vec<T> sum[kRows * kTaps], live[kLive] = {}, bias = splat(T(0));
  unroll<kRows * kTaps>([&]<int i>() __attribute__((always_inline)) { sum[i] = sums[kFirst * kTaps + i]; });
  const S *next_x = planes.next_x, *next_grad = planes.next_grad;
  const int64_t dilation = strip.dilation;
  const KeptLanes<T> outputs(strip.outputs);
  KeptLanes<T> inside[kTaps], columns[kTaps][kStride];
  unroll<kTaps>([&]<int t>() __attribute__((always_inline)) {
    inside[t] = KeptLanes<T>(strip.inside[t]);
    unroll<kStride>([&]<int i>() __attribute__((always_inline)) { columns[t][i] = KeptLanes<T>(strip.columns[t][i]); });
  });
  for (const Piece* p = pieces; p < pieces + piece_count; ++p) {
    const Piece& piece = *p;
    const int64_t low = piece.low - kFirst, high = piece.high - kFirst, count = piece.count;
    const int64_t x_row = piece.x_row, grad_row = piece.y_row;
    const int64_t from = ceil_div(max64(low, 0), kStride),
                  to = min64(count, floor_div(high, kStride));  // without checks
    const S* x = planes.x + piece.x + strip.first * kStride + kFirst * x_row;
    const S* grad = planes.grad + piece.y + strip.first;
    // As go_down says: row j of the gradients begins, in live[k], and row j - kLive + 1 ends.
    const auto advance = [&]<int k, int kBegin, int kEnd, bool kChecked>(int64_t j) __attribute__((always_inline)) {
      if (kBegin == 0 && (!kChecked || j < count)) {
        const Vec<T> g = widened<S>(kInner ? load_bits_once(grad) : outputs.load(grad));
        live[k] = kShuffles<S, kStride> ? from_proper_order<T>(g) : g;
        if constexpr (kFirst == 0) {
          bias += g;
          __builtin_prefetch(next_grad, 0, 2);
          next_grad += kL;
        }
        grad += grad_row;
      }
      unroll<kStride>([&]<int r>() __attribute__((always_inline)) {
        if (!kChecked || (j * kStride + r >= low && j * kStride + r < high)) {
          const auto columns_of = [&]<int t, int i>() __attribute__((always_inline)) {
            const S* at = x + t * dilation + i * kL;
            if constexpr (kInner) return load_bits_once(at);
            return columns[t][i].load(at);
          };
          for_taps<S, kTaps, kStride>(columns_of, [&]<int t>(Vec<T> value) __attribute__((always_inline)) {
            unroll<kLive>([&]<int m>() __attribute__((always_inline)) {
              constexpr int u = m * kStride + r;
              if constexpr (m >= kBegin && m < kEnd && u < kRows) {
                if (kChecked && kEnd - kBegin == kLive && (j < m || j - m >= count)) return;  // does the row exist?
                Vec<T>& to = sum[u * kTaps + t];
                const Vec<T> g = live[(k + kLive - m) % kLive];
                to = kInner ? to + value * g : inside[t].add_product(to, value, g);
              }
            });
          });
        }
        if constexpr (kFirst == 0) {
          unroll<kStride>([&]<int i>() __attribute__((always_inline)) { __builtin_prefetch(next_x + i * kL, 0, 2); });
          next_x += kL * kStride;
        }
        x += x_row;
      });
    };
    go_down<kLive>(count, from, to, advance, [&]<int i>() __attribute__((always_inline)) { live[i] = live[i + 1]; });
  }
  unroll<kRows * kTaps>([&]<int i>() __attribute__((always_inline)) { sums[kFirst * kTaps + i] = sum[i]; });
  if constexpr (kFirst == 0) sums[kTaps * kTaps] += bias;
}

template <class S>
struct PlanesGradWeight {
  using T = Compute<S>;
  static constexpr int kL = kLanes<T>;
  typedef double Totals __attribute__((vector_size(kL * sizeof(double))));

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
  // Lanes without outputs, what every strip begins and ends with, and the addition of all lanes (in multiply-adds). With few
  // registers, rows of taps take turns, and lanes at borders are cleared; with four lanes rows are always faster.
  static double part(const DepthwiseProblem& p) {
    constexpr bool kMany = kVectorBytes == 64, kFew = kVectorBytes == 16;
    constexpr double kStrip = kMany ? 70 : 140, kSum = kMany ? 3 : 12;
    const Window& w = p.window;
    const double taps = static_cast<double>(product(w.taps));
    const int64_t strips = p.batch * ceil_div(w.out[2], kL), tiles = ceil_div(w.out[1], tile_rows(p));
    const int groups = groups_of(static_cast<int>(w.taps[1]), static_cast<int>(w.stride[1]));
    const bool strided = w.stride[1] == 2;
    const double slower = kMany ? 1.0 : (kFew ? 5 : groups > 1 ? 2.4 : 1.1) * (strided ? 1.15 : 1);
    const double row = slower * taps + (kMany && strided ? 11 : 0);
    const double time = row * strips * w.out[1] + kStrip * strips * tiles * groups + kSum * (taps + 1);
    return taps * p.batch * w.out[1] * w.out[2] / kL / time;
  }

  // Rows of outputs at a time, at most: strips side by side share cache lines, and sums are that long.
  static int64_t tile_rows(const DepthwiseProblem& p) {
    constexpr int64_t kTileBytes = 13 << 10, kLeast = 8;
    const Window& w = p.window;
    const int64_t row = (w.in[2] * w.stride[1] + w.out[2]) * static_cast<int64_t>(sizeof(S));
    return min64(kChain, max64(kLeast, kTileBytes / row));
  }
  struct Tile {
    const Piece* pieces;
    int64_t count, rows;
  };
  static size_t workspace_bytes(const DepthwiseProblem& p, int) {
    const int64_t *out = p.window.out, tiles = ceil_div(out[1], tile_rows(p));
    return kBlockBytes + piece_bytes<GradStrip<S, 7, 2>>(ceil_div(out[2], kL)) + piece_bytes<Piece>(out[1]) +
           piece_bytes<Tile>(tiles);
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
    using StripOf = GradStrip<S, kTaps, kStride>;
    constexpr int kSums = kTaps * kTaps + 1;  // taps and the bias
    const Window& w = p.window;
    const int64_t strip_count = ceil_div(w.out[2], kL), tiles = ceil_div(w.out[1], tile_rows(p));
    Arena arena = arena_at(workspace);
    StripOf* const strips = take<StripOf>(arena, strip_count);
    for (int64_t s = 0; s < strip_count; ++s) {
      const int64_t at = s * kL * kStride - w.pad[2];
      strips[s] = StripOf(s * kL, min64(kL, w.out[2] - s * kL), -at, w.in[2] - at, w.dilation[2]);
    }
    const Correlation correlation = Correlation::of(w, false);
    Piece* const pieces = take<Piece>(arena, w.out[1]);
    Tile* const tile_list = take<Tile>(arena, tiles);
    for (int64_t i = 0, pieces_before = 0; i < tiles; ++i) {
      const int64_t top = w.out[1] * i / tiles, bottom = w.out[1] * (i + 1) / tiles, rows = bottom - top;
      Piece* const first = pieces + pieces_before;
      const int64_t count = OutputRows<S, kTaps, kStride>::cut_rows(correlation, p.x, p.grad, top, bottom, rows, first);
      tile_list[i] = {first, count, rows};
      pieces_before += count;
    }

    const int64_t channels = p.channels * p.multiplier;
    auto body = [&](int64_t channel, int64_t end, int64_t) {
      Vec<T> sums[kSums] = {}, longer[kSums] = {};  // of up to kChain values in each lane, of so many sums
      for (; channel < end; ++channel) {
        Totals totals[ceil_div(kSums, kL)] = {};
        int64_t chain = 0, folds = 0;
        const auto fold = [&] {
          for (int i = 0; i < kSums; ++i) {
            longer[i] += sums[i];
            sums[i] = splat(T(0));
          }
          chain = 0;
          if (++folds % kChain == 0) add_lanes<kSums>(longer, totals);
        };
        for (int64_t image = 0; image < p.batch; ++image) {
          const bool last = image + 1 == p.batch;
          PlanePair<S> planes = planes_of(p, channel, image);
          const PlanePair<S> after = planes_of(p, min64(channel + last, channels - 1), last ? 0 : image + 1);
          planes.next_x = after.x;
          planes.next_grad = after.grad;
          for (const Tile* tile = tile_list; tile < tile_list + tiles; ++tile) {
            for (int64_t s = 0; s < strip_count; ++s) {
              if (chain + tile->rows > kChain) fold();
              chain += tile->rows;
              add_strip<kTaps, kStride>(planes, tile->pieces, tile->count, strips[s], sums);
              planes.next_x += tile->rows * kL * kStride * kStride;
              planes.next_grad += tile->rows * kL;
            }
          }
        }
        if (folds > 0) fold();
        add_lanes<kSums>(folds > 0 ? longer : sums, totals);
        write<kTaps * kTaps>(p, channel, totals);
      }
    };
    for_slots(runtime, channels, thread_slots(runtime.threads, channels, depthwise_flops(p)), body);
  }

  static PlanePair<S> planes_of(const DepthwiseProblem& p, int64_t channel, int64_t image) {
    const int64_t from = p.multiplier == 1 ? channel : channel / p.multiplier;
    return {static_cast<const S*>(p.x.data) + image * p.x.stride[0] + from * p.x.stride[1],
            static_cast<const S*>(p.grad.data) + image * p.grad.stride[0] + channel * p.grad.stride[1], nullptr,
            nullptr};
  }

  // Some rows of taps at a time: as there are registers for.
  template <int kTaps, int kStride>
  static void add_strip(const PlanePair<S>& planes, const Piece* pieces, int64_t count,
                        const GradStrip<S, kTaps, kStride>& strip, Vec<T>* sums) {
    constexpr int kGroups = groups_of(kTaps, kStride);
    unroll<kGroups>([&]<int group>() __attribute__((always_inline)) {
      constexpr int kFirst = kTaps * group / kGroups, kRows = kTaps * (group + 1) / kGroups - kFirst;
      const auto run = strip.inner ? grad_strip<S, kTaps, kStride, kFirst, kRows, true>
                                   : grad_strip<S, kTaps, kStride, kFirst, kRows, false>;
      run(planes, pieces, count, strip, sums);
    });
  }
  static constexpr int groups_of(int taps, int stride) {
    constexpr int kRegisters = DSCONV_VECTOR_BYTES == 64 ? 30 : 12;
    int rows = taps;
    while (rows > 1 && rows * taps + ceil_div(rows, stride) > kRegisters) --rows;
    return static_cast<int>(ceil_div(taps, rows));
  }

  // Adds the lanes of each of kCount sums to its total, and clears it.
  template <int kCount>
  static void add_lanes(Vec<T>* sums, Totals* totals) {
    unroll<ceil_div(kCount, kL)>([&]<int block>() __attribute__((always_inline)) {
      constexpr int kFirst = block * kL, kHere = min64(kCount - kFirst, kL);
      Vec<T> rows[kL];
      unroll<kHere>([&]<int i>() __attribute__((always_inline)) { rows[i] = sums[kFirst + i]; });
      totals[block] += __builtin_convertvector((sum_of_lanes<T, kHere>(rows)), Totals);
      for (int i = 0; i < kHere; ++i) sums[kFirst + i] = splat(T(0));
    });
  }

  template <int kCount>  // taps, which the bias follows
  static void write(const DepthwiseProblem& p, int64_t channel, const Totals* totals) {
    Vec<T> values[ceil_div(kCount + 1, kL)];
    unroll<ceil_div(kCount + 1, kL)>(
        [&]<int i>() __attribute__((always_inline)) { values[i] = __builtin_convertvector(totals[i], Vec<T>); });
    if (p.grad_weight.data) {
      S* const filter = static_cast<S*>(p.grad_weight.data) + channel * p.grad_weight.stride[0];
      if (has_dense_taps(p.grad_weight, p.window)) {
        unroll<ceil_div(kCount, kL)>([&]<int i>() __attribute__((always_inline)) {
          store_part<S>(filter + i * kL, values[i], min64(kL, kCount - i * kL));
        });
      } else {
        for (int64_t t = 0; t < kCount; ++t)
          narrow(static_cast<T>(values[t / kL][t % kL]), filter + tap_offset(p.grad_weight, p.window, t));
      }
    }
    if (p.grad_bias.data)
      narrow(static_cast<T>(values[kCount / kL][kCount % kL]),
             static_cast<S*>(p.grad_bias.data) + channel * p.grad_bias.stride[0]);
  }
};

}  // namespace dsconv::cpu::DSCONV_ISA

// Depthwise correlation by planes: contiguous tensors, where neighbouring columns are neighbours in memory.
//
// A vector holds neighbouring outputs of one row. Strips of one vector's width go down the plane: each row of the input
// is loaded once for every column of taps and multiplied into all rows of outputs whose windows hold it, which are kept
// in registers until their last row has come. Borders as in row_blocks.h: rows outside the tensor are left out; columns
// outside are lanes of zeros times weights that are zero there, so no weight meets padding.
#pragma once

#include "depthwise_rows.h"

namespace dsconv::cpu::DSCONV_ISA {

// The lanes [low, high) of a vector, the others neither read nor written.
template <class T>
struct Lanes {
  typedef typename IntOf<sizeof(T)>::type Index;
  typedef Vec<Index> Places;  // of lanes to be shuffled
  Vec<Index> mask;            // all bits of those lanes
  int64_t low, high;
  uint32_t bits;  // one of each

  Lanes() = default;
  Lanes(int64_t from, int64_t to) : low(max64(from, 0)), high(min64(to, kLanes<T>)) {
    for (int l = 0; l < kLanes<T>; ++l) mask[l] = l >= low && l < high ? -1 : 0;
    bits = high <= low ? 0 : ((1u << high) - 1) & ~((1u << low) - 1);
  }
  __attribute__((always_inline)) Vec<T> of(Vec<T> v) const {
    return reinterpret_cast<Vec<T>>(reinterpret_cast<Vec<Index>>(v) & mask);
  }
  // Those in memory, zero elsewhere.
  __attribute__((always_inline)) Vec<T> load(const T* p) const {
#if DSCONV_VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 8) return _mm512_maskz_loadu_pd(bits, p);
    if constexpr (sizeof(T) == 4) return _mm512_maskz_loadu_ps(bits, p);
#elif defined(__AVX__)
    if constexpr (sizeof(T) == 8) return _mm256_maskload_pd(p, reinterpret_cast<__m256i>(mask));
    if constexpr (sizeof(T) == 4) return _mm256_maskload_ps(p, reinterpret_cast<__m256i>(mask));
#endif
    Vec<T> v = splat(T(0));
    for (int64_t l = low; l < high; ++l) v[l] = p[l];
    return v;
  }
};

// Limits of the activations that limits make; others leave values alone.
template <class T>
struct Limits {
  bool any;
  T low, high;

  explicit Limits(Activation kind) : any(kind == Activation::relu || kind == Activation::relu6), low(0) {
    high = kind == Activation::relu6 ? T(6) : static_cast<T>(__builtin_inf());
  }
  __attribute__((always_inline)) Vec<T> of(Vec<T> v) const {
    if (!any) return v;
    v = v < splat(low) ? splat(low) : v;  // NaN stays
    return v > splat(high) ? splat(high) : v;
  }
};

// The even (kOdd: odd) lanes of two vectors side by side, in an order that takes one instruction: within pieces of 16 bytes.
template <int kOdd, class T>
DSCONV_INLINE Vec<T> every_second(Vec<T> a, Vec<T> b) {
  constexpr int kPiece = 16 / sizeof(T), kHalf = kPiece / 2;
  typename Lanes<T>::Places places;
  unroll<kLanes<T>>([&]<int l>() __attribute__((always_inline)) {
    constexpr int piece = l / kPiece * kPiece, place = l % kPiece;
    places[l] = piece + 2 * (place % kHalf) + kOdd + (place < kHalf ? 0 : kLanes<T>);
  });
  return __builtin_shuffle(a, b, places);
}
// Where lane l of that would be in its proper order.
template <class T>
constexpr int proper_lane(int l) {
  constexpr int kPiece = 16 / sizeof(T), kHalf = kPiece / 2;
  return l / kPiece * kHalf + l % kHalf + (l % kPiece < kHalf ? 0 : kLanes<T> / 2);
}
template <class T>
DSCONV_INLINE Vec<T> to_proper_order(Vec<T> v) {
  typename Lanes<T>::Places places;
  unroll<kLanes<T>>([&]<int l>() __attribute__((always_inline)) { places[proper_lane<T>(l)] = l; });
  return __builtin_shuffle(v, places);
}
template <class T>
DSCONV_INLINE Vec<T> from_proper_order(Vec<T> v) {
  typename Lanes<T>::Places places;
  unroll<kLanes<T>>([&]<int l>() __attribute__((always_inline)) { places[l] = proper_lane<T>(l); });
  return __builtin_shuffle(v, places);
}

// Passes to `use` what neighbouring outputs pair with each tap of a row, in the order of every_second if there is a stride.
// `columns` loads vector i of the columns from that of tap t on; a tap that is not a multiple of the stride has those of the
// one before it.
template <class T, int kTaps, int kStride, class Columns, class Use>
DSCONV_INLINE void for_taps(const Columns& columns, const Use& use) {
  static_assert(kStride <= 2);
  Vec<T> part[kStride];
  unroll<kTaps>([&]<int t>() __attribute__((always_inline)) {
    if constexpr (t % kStride == 0) {
      unroll<kStride>([&]<int i>() __attribute__((always_inline)) { part[i] = columns.template operator()<t, i>(); });
    }
    if constexpr (kStride == 1) {
      use.template operator()<t>(part[0]);
    } else {
      use.template operator()<t>(every_second<t % 2, T>(part[0], part[1]));
    }
  });
}

// Strips that read no column outside the tensor, that do, and that do and have fewer outputs than a vector lanes.
enum class Reach { inner, edge, narrow };

// One vector's width of a plane. Columns are counted from the one that the strip's first output reads first.
template <class T, int kTaps, int kStride>
struct Strip {
  int64_t first, count;  // outputs
  Reach reach;
  Lanes<T> weights[kTaps], columns[kTaps][kStride];

  Strip(int64_t first, int64_t count, int64_t low, int64_t high, int64_t dilation) : first(first), count(count) {
    constexpr int kL = kLanes<T>;
    const bool inner = low <= 0 && high >= (kTaps - 1) * dilation + kL * kStride;
    reach = count < kL ? Reach::narrow : inner ? Reach::inner : Reach::edge;
    for (int t = 0; t < kTaps; ++t) {
      const int64_t from = low - t * dilation, to = high - t * dilation;
      weights[t] = {ceil_div(from, kStride), ceil_div(to, kStride)};
      for (int i = 0; i < kStride; ++i) columns[t][i] = {from - i * kL, to - i * kL};
    }
  }
};

// Neighbouring rows of outputs of one phase. Offsets are in elements from the planes; rows of the input are counted from
// the one that the first output row reads first.
struct Piece {
  int64_t x, y;          // the column that output 0 reads first, in that row; output 0
  int64_t x_row, y_row;  // between rows of taps, between rows of outputs
  int64_t low, high;     // the rows inside the tensor
  int64_t count;         // rows of outputs
};

// A plane of the input and one of the output.
template <class T>
struct Plane {
  const T* x;
  T* y;
  const T* weights;  // [tap][lane] at the lane of its filter
  T bias;
  int64_t dilation;  // columns between taps
  Limits<T> limits;
};

// The outputs of a strip in the rows of a piece.
template <class T, int kTaps, int kStride, Reach kReach>
static void plane_strip(const Plane<T>& plane, const Piece& piece, const Strip<T, kTaps, kStride>& strip) {
  constexpr int kL = kLanes<T>, kLive = (kTaps + kStride - 1) / kStride;
  Vec<T> w[kTaps][kTaps], acc[kLive] = {};
  unroll<kTaps * kTaps>([&]<int i>() __attribute__((always_inline)) {
    const Vec<T> weight = splat(plane.weights[i * kL]);
    const Vec<T> inside = kReach != Reach::inner ? strip.weights[i % kTaps].of(weight) : weight;
    w[i / kTaps][i % kTaps] = kStride == 2 ? from_proper_order<T>(inside) : inside;
  });
  const Vec<T> bias = splat(plane.bias);
  const int64_t low = piece.low, high = piece.high, count = piece.count, x_row = piece.x_row, y_row = piece.y_row;
  const int64_t dilation = plane.dilation;
  // Steps without conditions: a row of outputs is finished, and all rows lie in the tensor.
  const int64_t steps = count + kLive - 1;
  const int64_t from = max64(kLive - 1, ceil_div(max64(low, 0), kStride)), to = min64(steps, floor_div(high, kStride));
  const Limits<T> limits = plane.limits;
  // Rows of outputs shorter than a vector are stored as a whole one where later rows write anew what that is too much.
  const int64_t spilled = y_row == strip.count ? ceil_div(kL, strip.count) - 1 : count, whole = steps - spilled;
  const T* x = plane.x + piece.x + strip.first * kStride;
  T* y = plane.y + piece.y + strip.first;
  const T* next = plane.x + piece.x + count * kStride * x_row +
                  strip.first * kStride * (count * kStride);  // as many rows further on, a strip its share
  // Row j of the outputs begins, in accumulator k, and row j - kLive + 1 ends.
  const auto advance = [&]<int k, bool kChecked>(int64_t j) __attribute__((always_inline)) {
    acc[k] = bias;
    unroll<kStride>([&]<int r>() __attribute__((always_inline)) {
      if (!kChecked || (j * kStride + r >= low && j * kStride + r < high)) {
        const auto columns = [&]<int t, int i>() __attribute__((always_inline)) {
          const T* at = x + t * dilation + i * kL;
          return kReach != Reach::inner ? strip.columns[t][i].load(at) : load(at);
        };
        for_taps<T, kTaps, kStride>(columns, [&]<int t>(Vec<T> value) __attribute__((always_inline)) {
          unroll<kLive>([&]<int m>() __attribute__((always_inline)) {
            constexpr int u = m * kStride + r;
            if constexpr (u < kTaps) acc[(k + kLive - m) % kLive] += value * w[u][t];
          });
        });
      }
      __builtin_prefetch(next, 0, 2);
      next += kL * kStride;
      x += x_row;
    });
    if (kChecked && j < kLive - 1) return;
    const Vec<T> limited = limits.of(acc[(k + 1) % kLive]);
    const Vec<T> done = kStride == 2 ? to_proper_order<T>(limited) : limited;
    if (kReach == Reach::narrow && j >= whole) {
      store_part<T>(y, done, strip.count);
    } else {
      store(y, done);
    }
    y += y_row;
  };
  const auto advance_one = [&]<bool kChecked>(int64_t j) __attribute__((always_inline)) {
    unroll<kLive - 1>([&]<int i>() __attribute__((always_inline)) { acc[i] = acc[i + 1]; });
    advance.template operator()<kLive - 1, kChecked>(j);
  };
  int64_t j = 0;
  for (; j < min64(from, steps); ++j) advance_one.template operator()<true>(j);
  for (; j + kLive <= to; j += kLive)
    unroll<kLive>([&]<int k>() __attribute__((always_inline)) { advance.template operator()<k, false>(j + k); });
  for (; j < to; ++j) advance_one.template operator()<false>(j);
  for (; j < steps; ++j) advance_one.template operator()<true>(j);
}

template <class S, bool kTransposed>
struct Planes {
  using T = Compute<S>;
  using Shared = Rows<S, kTransposed>;
  using Plan = typename Shared::Plan;
  static constexpr int kL = kLanes<T>;
  static constexpr int64_t kTasks = 64;
  static constexpr int64_t kTileRows = 8, kTileBytes = 12 << 10;  // what strips side by side share stays in L1

  static const char* can_run(const DepthwiseProblem& p) {
    const Window& w = p.window;
    const View &from = kTransposed ? p.grad : p.x, &to = kTransposed ? p.grad_x : p.y;
    if (sizeof(S) != sizeof(T)) return "half types are widened by rows";
    if (from.stride[4] != 1 || to.stride[4] != 1) return "columns are no neighbours in memory";
    if (w.in[0] != 1 || w.taps[0] != 1 || w.out[0] != 1) return "three dimensions";
    if (w.taps[1] != w.taps[2] || (w.taps[1] != 3 && w.taps[1] != 5 && w.taps[1] != 7))
      return "taps other than 3x3, 5x5, 7x7";
    if (product(w.taps) > kChain) return "longer sums than this instruction set keeps in one chain";
    if (w.stride[1] != w.stride[2] || w.stride[1] > 2 || (w.stride[1] == 2 && product(w.dilation) != 1))
      return "strides other than 1, and 2 without dilation";
    if (kTransposed && (w.stride[1] != 1 || p.multiplier != 1)) return "a gradient of strides or multipliers";
    return nullptr;
  }

  // Of a plane, to be worked on at the same time.
  static int64_t tiles(const DepthwiseProblem& p, const Plan& plan) {
    const int64_t wanted = wanted_tasks(depthwise_flops(p), kTasks), planes = p.batch * plan.channels;
    return max64(1, min64(ceil_div(wanted, max64(planes, 1)), plan.c.target()[1] / kTileRows));
  }
  static size_t workspace_bytes(const DepthwiseProblem& p, int) {
    const Plan plan = Shared::plan_of(p);
    const auto& out = plan.c.target();
    return kBlockBytes + Shared::shared_bytes(p, plan) + piece_bytes<Strip<T, 7, 2>>(ceil_div(out[2], kL)) +
           piece_bytes<Piece>(out[1]) + piece_bytes<int64_t>(tiles(p, plan) + 1);
  }
  static void launch(const DepthwiseProblem& p, const Runtime& runtime, void* workspace) {
    if constexpr (sizeof(S) == sizeof(T)) {
      unroll<3>([&]<int i>() __attribute__((always_inline)) {
        constexpr int kTaps = 3 + 2 * i;
        if (p.window.taps[1] != kTaps) return;
        if (kTransposed || p.window.stride[1] == 1) return launch_strips<kTaps, 1>(p, runtime, workspace);
        if constexpr (!kTransposed) launch_strips<kTaps, 2>(p, runtime, workspace);
      });
    }
  }

  template <int kTaps, int kStride>
  static void launch_strips(const DepthwiseProblem& p, const Runtime& runtime, void* workspace) {
    using StripOf = Strip<T, kTaps, kStride>;
    const View &from = kTransposed ? p.grad : p.x, &to = kTransposed ? p.grad_x : p.y;
    const Plan plan = Shared::plan_of(p);
    Arena arena = arena_at(workspace);
    const BlockRow<T> shared = Shared::shared_row(p, plan, arena);
    const auto &in = plan.c.source(), &out = plan.c.target();
    const int64_t first_column = plan.c.phase(2, 0).in_first, dilation = p.window.dilation[2];
    const int64_t strip_count = ceil_div(out[2], kL);
    StripOf* const strips = take<StripOf>(arena, strip_count);
    for (int64_t s = 0; s < strip_count; ++s) {
      const int64_t first = max64(0, min64(s * kL, out[2] - kL)), at = first_column + first * kStride;
      strips[s] = StripOf(first, min64(kL, out[2]), -at, in[2] - at, dilation);
    }
    const int64_t per_plane = tiles(p, plan);
    Piece* const pieces = take<Piece>(arena, out[1]);
    int64_t* const ends = take<int64_t>(arena, per_plane + 1);  // of the pieces of each tile
    ends[0] = 0;
    for (int64_t tile = 0; tile < per_plane; ++tile) {
      const int64_t top = out[1] * tile / per_plane, bottom = out[1] * (tile + 1) / per_plane;
      const int64_t rows = max64(kTileRows, kTileBytes / (in[2] * kStride * static_cast<int64_t>(sizeof(T))));
      ends[tile + 1] = ends[tile] + cut_rows(plan, from, to, top, bottom, rows, first_column, pieces + ends[tile]);
    }

    const int64_t channels = plan.channels, tasks = p.batch * channels * per_plane;
    const int64_t multiplier = kTransposed ? 1 : p.multiplier;
    auto body = [&](int64_t task, int64_t end, int64_t) {
      for (; task < end; ++task) {
        const int64_t tile = task % per_plane, channel = task / per_plane % channels,
                      image = task / per_plane / channels;
        const int64_t first = block_channel<T>(channel / kL * kL, channels);
        const Plane<T> plane{
            static_cast<const T*>(from.data) + image * from.stride[0] + channel / multiplier * from.stride[1],
            static_cast<T*>(to.data) + image * to.stride[0] + channel * to.stride[1],
            shared.weights + channel / kL * shared.weight_block + (channel - first),
            shared.bias[channel],
            dilation,
            Limits<T>(shared.activation.kind)};
        for (int64_t i = ends[tile]; i < ends[tile + 1]; ++i) {
          for (int64_t s = 0; s < strip_count; ++s) {
            const StripOf& strip = strips[s];
            if (strip.reach == Reach::inner) plane_strip<T, kTaps, kStride, Reach::inner>(plane, pieces[i], strip);
            if (strip.reach == Reach::edge) plane_strip<T, kTaps, kStride, Reach::edge>(plane, pieces[i], strip);
            if (strip.reach == Reach::narrow) plane_strip<T, kTaps, kStride, Reach::narrow>(plane, pieces[i], strip);
          }
        }
        if (shared.activation.kind <= Activation::relu6) continue;
        for (int64_t h = out[1] * tile / per_plane; h < out[1] * (tile + 1) / per_plane; ++h)
          activate_row(shared.activation, plane.y + h * to.stride[3], out[2]);
      }
    };
    for_slots(runtime, tasks, thread_slots(runtime, tasks, depthwise_flops(p)), body);
  }

  // Output rows [top, bottom) of all phases, up to `most` in a piece; returns the number of pieces.
  static int64_t cut_rows(const Plan& plan, const View& from, const View& to, int64_t top, int64_t bottom, int64_t most,
                          int64_t first_column, Piece* pieces) {
    Piece* next = pieces;
    for (int64_t i = 0; i < plan.y_phases; ++i) {
      const Phase y = plan.c.phase(1, i);
      const int64_t last = min64(y.count, ceil_div(max64(bottom - i, 0), y.out_step));
      for (int64_t n = ceil_div(max64(top - i, 0), y.out_step); n < last; n += most, ++next) {
        const int64_t row = y.in_first + n * y.in_step;
        *next = {row * from.stride[3] + first_column,
                 (y.out_first + n * y.out_step) * to.stride[3],
                 y.tap_step * from.stride[3],
                 y.out_step * to.stride[3],
                 ceil_of(-row, y.tap_step),
                 ceil_of(plan.c.source()[1] - row, y.tap_step),
                 min64(most, last - n)};
      }
    }
    return next - pieces;
  }
};

template <class S>
struct PlanesForward : Planes<S, false> {};
template <class S>
struct PlanesGradInput : Planes<S, true> {};

}  // namespace dsconv::cpu::DSCONV_ISA

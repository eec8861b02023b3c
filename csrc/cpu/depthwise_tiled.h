// Depthwise convolution over staged tiles, for whoever wants the values of a tile rather than of a tensor: the fused
// forward.
#pragma once

#include "correlate.h"
#include "kernel_of.h"
#include "tasks.h"

namespace dsconv::cpu::DSCONV_ISA {

constexpr int64_t kTileElements = 24 * 1024;  // staged elements per tile: some rows stay in L1, the whole tile in L2

struct TilePlan {
  int64_t extent[3];  // of the positions that are produced
  int64_t count[3];
  int64_t tiles;
  int64_t staged;  // largest number of staged positions
};

// The largest tile of `size` whose staged box fits; halo(dim, n) is the staged extent behind n positions.
template <class Halo>
DSCONV_INLINE TilePlan plan_tiles(const int64_t (&size)[3], int64_t budget, Halo halo, int64_t widest = INT64_MAX) {
  TilePlan plan{{1, 1, 1}, {}, 1, 1};
  for (int dim = 2; dim >= 0; --dim) {
    auto staged = [&](int64_t n) {
      int64_t positions = 1;
      for (int other = 0; other < 3; ++other) positions *= halo(other, other == dim ? n : plan.extent[other]);
      return positions;
    };
    int64_t n = dim == 2 ? min64(size[2], widest) : size[dim];
    while (n > 1 && staged(n) > budget) n = ceil_div(n, 2);
    const int64_t pieces = ceil_div(size[dim], n);
    plan.extent[dim] = ceil_div(size[dim], pieces);
    plan.count[dim] = ceil_div(size[dim], plan.extent[dim]);
    plan.tiles *= plan.count[dim];
    plan.staged = staged(plan.extent[dim]);
  }
  return plan;
}

DSCONV_INLINE Box tile_box(const TilePlan& plan, const int64_t (&size)[3], int64_t tile) {
  Box box;
  for (int dim = 2; dim >= 0; --dim, tile /= plan.count[dim + 1]) {
    box.origin[dim] = tile % plan.count[dim] * plan.extent[dim];
    box.extent[dim] = min64(plan.extent[dim], size[dim] - box.origin[dim]);
  }
  return box;
}

DSCONV_INLINE TilePlan plan_outputs(const Window& w, int64_t budget) {
  return plan_tiles(w.out, budget,
                    [&](int dim, int64_t n) { return input_extent(n, w.taps[dim], w.stride[dim], w.dilation[dim]); });
}
DSCONV_INLINE Box input_box(const Window& w, const Box& out) {
  Box box;
  for (int dim = 0; dim < 3; ++dim) {
    box.origin[dim] = out.origin[dim] * w.stride[dim] - w.pad[dim];
    box.extent[dim] = input_extent(out.extent[dim], w.taps[dim], w.stride[dim], w.dilation[dim]);
  }
  return box;
}

// Packed weights: [block][tap][lane]; padding lanes are zero. Returns false when a weight is Inf or NaN.
template <class S, class T = Compute<S>>
static bool pack_depthwise(T* packed, const DepthwiseProblem& p) {
  const int64_t *k = p.window.taps, *stride = p.weight.stride, channels = p.channels * p.multiplier;
  bool finite = true;
  for (int64_t first = 0; first < channels; first += kBlock<T>, packed += product(p.window.taps) * kBlock<T>) {
    for (int l = 0; l < kBlock<T>; ++l) {
      const S* source = static_cast<const S*>(p.weight.data) + min64(first + l, channels - 1) * stride[0];
      T* lane = packed + l;
      for (int64_t z = 0; z < k[0]; ++z) {
        for (int64_t y = 0; y < k[1]; ++y) {
          for (int64_t x = 0; x < k[2]; ++x, lane += kBlock<T>) {
            *lane = first + l < channels ? widen(source[z * stride[2] + y * stride[3] + x * stride[4]]) : T(0);
            finite &= *lane - *lane == T(0);
          }
        }
      }
    }
  }
  return finite;
}
template <class T>
DSCONV_INLINE int64_t packed_depthwise_count(const DepthwiseProblem& p) {
  return round_up(p.channels * p.multiplier, kBlock<T>) * product(p.window.taps);
}

// Per-thread scratch of the passes that produce positions.
template <class T>
struct Scratch {
  T *tile, *row, *bias;
  Tap *taps, *inside;
};
template <class T>
DSCONV_INLINE Scratch<T> take_scratch(Arena& arena, int64_t staged, int64_t columns, int64_t taps) {
  Scratch<T> s;
  s.tile = take<T>(arena, staged * kBlock<T>);
  s.row = take<T>(arena, columns * kBlock<T>);
  s.bias = take<T>(arena, kBlock<T>);
  s.taps = take<Tap>(arena, taps);
  s.inside = take<Tap>(arena, taps);
  return s;
}
template <class T>
DSCONV_INLINE int64_t scratch_bytes(int64_t staged, int64_t columns, int64_t taps) {
  return piece_bytes<T>(staged * kBlock<T>) + piece_bytes<T>(columns * kBlock<T>) + piece_bytes<T>(kBlock<T>) +
         2 * piece_bytes<Tap>(taps);
}

// A bias (or zeros) for one block of channels.
template <class S, class T = Compute<S>>
DSCONV_INLINE void stage_bias(T* block, const View& bias, int64_t first, int64_t channels) {
  for (int l = 0; l < kBlock<T>; ++l) {
    const bool present = bias.data && first + l < channels;
    block[l] = present ? widen(static_cast<const S*>(bias.data)[(first + l) * bias.stride[0]]) : T(0);
  }
}

// The pre-activations of one tile and one block of output channels; sink(z, y, row) receives each row of box.extent[2]
// pixels.
template <class S, class Sink, class T = Compute<S>>
DSCONV_INLINE void forward_tile(const DepthwiseProblem& p, const Scratch<T>& s, const T* weights, bool finite,
                                int64_t image, int64_t first, const Box& box, Sink sink) {
  const Window& w = p.window;
  const LaneMap<T> lanes = map_lanes<T>(first, p.channels * p.multiplier, 1, p.multiplier, 0, p.x.stride[1]);
  const Box in = input_box(w, box);
  stage_box<S>(s.tile, static_cast<const S*>(p.x.data) + image * p.x.stride[0], lanes, in, w.in, p.x.stride + 2);
  stage_bias<S>(s.bias, p.bias, first, p.channels * p.multiplier);
  for (int64_t z = 0; z < box.extent[0]; ++z) {
    for (int64_t y = 0; y < box.extent[1]; ++y) {
      int64_t count = 0;
      for (int64_t uz = 0; uz < w.taps[0]; ++uz) {
        const int64_t d = z * w.stride[0] + uz * w.dilation[0];
        if (in.origin[0] + d < 0 || in.origin[0] + d >= w.in[0]) continue;
        for (int64_t uy = 0; uy < w.taps[1]; ++uy) {
          const int64_t h = y * w.stride[1] + uy * w.dilation[1];
          if (in.origin[1] + h < 0 || in.origin[1] + h >= w.in[1]) continue;
          for (int64_t ux = 0; ux < w.taps[2]; ++ux, ++count) {
            const int64_t column = ux * w.dilation[2];
            const int64_t offset = (d * in.extent[1] + h) * in.extent[2] + column;
            s.taps[count] = {offset * kBlock<T>, ((uz * w.taps[1] + uy) * w.taps[2] + ux) * kBlock<T>, column};
          }
        }
      }
      const int64_t step = w.stride[2] * kBlock<T>;
      if (finite) {
        correlate_row(s.tile, weights, s.taps, count, step, s.bias, s.row, box.extent[2]);
      } else {
        correlate_row_checked(s.tile, weights, s.taps, count, step, s.bias, s.row, box.extent[2], in.origin[2],
                              w.stride[2], w.in[2], s.inside);
      }
      sink(z, y, s.row);
    }
  }
}

}  // namespace dsconv::cpu::DSCONV_ISA

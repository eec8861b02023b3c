// Depthwise convolution of any rank, taps, stride, dilation, padding, multiplier, dtype and layout over staged tiles.
//   forward      task = image x tile of outputs x block of output channels
//   grad_input   task = image x tile of inputs x block of input channels; per stride phase a correlation with the taps
//   of that phase grad_weight  task = block of output channels x slab of tiles; the slabs depend on the problem alone
//   and are added in order
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

// Outputs that n neighbouring inputs can take part in.
DSCONV_INLINE TilePlan plan_inputs(const Window& w, int64_t budget) {
  return plan_tiles(w.in, budget, [&](int dim, int64_t n) {
    return (n - 1 + (w.taps[dim] - 1) * w.dilation[dim]) / w.stride[dim] + 2;
  });
}
DSCONV_INLINE Box output_box(const Window& w, const Box& in) {
  Box box;
  for (int dim = 0; dim < 3; ++dim) {
    const int64_t first = in.origin[dim] + w.pad[dim] - (w.taps[dim] - 1) * w.dilation[dim];
    const int64_t last = in.origin[dim] + in.extent[dim] - 1 + w.pad[dim];
    box.origin[dim] = floor_div(first + w.stride[dim] - 1, w.stride[dim]);
    box.extent[dim] = max64(1, floor_div(last, w.stride[dim]) - box.origin[dim] + 1);
  }
  return box;
}

// Packed weights: [block][j][tap][lane], where lane l of block b is output channel (b*kBlock + l) * step + j, j < step.
// Padding lanes are zero. Returns false when a weight is Inf or NaN.
template <class S, class T = Compute<S>>
static bool pack_depthwise(T* packed, const DepthwiseProblem& p, int64_t step) {
  const int64_t *k = p.window.taps, *stride = p.weight.stride;
  const int64_t channels = p.channels * p.multiplier / step, taps = product(p.window.taps);
  const S* weight = static_cast<const S*>(p.weight.data);
  bool finite = true;
  for (int64_t first = 0; first < channels; first += kBlock<T>) {
    for (int64_t j = 0; j < step; ++j, packed += taps * kBlock<T>) {
      for (int l = 0; l < kBlock<T>; ++l) {
        if (first + l >= channels) {
          for (int64_t t = 0; t < taps; ++t) packed[t * kBlock<T> + l] = T(0);
          continue;
        }
        const S* source = weight + ((first + l) * step + j) * stride[0];
        T* lane = packed + l;
        for (int64_t z = 0; z < k[0]; ++z) {
          for (int64_t y = 0; y < k[1]; ++y) {
            for (int64_t x = 0; x < k[2]; ++x, lane += kBlock<T>) {
              *lane = widen(source[z * stride[2] + y * stride[3] + x * stride[4]]);
              finite &= *lane - *lane == T(0);
            }
          }
        }
      }
    }
  }
  return finite;
}
template <class T>
DSCONV_INLINE int64_t packed_depthwise_count(const DepthwiseProblem& p, int64_t step) {
  return ceil_div(p.channels * p.multiplier / step, kBlock<T>) * step * product(p.window.taps) * kBlock<T>;
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

template <class S>
struct Forward {
  using T = Compute<S>;

  static int64_t slot_bytes(const DepthwiseProblem& p, const TilePlan& plan) {
    return scratch_bytes<T>(plan.staged, plan.extent[2], product(p.window.taps));
  }
  static size_t workspace_bytes(const DepthwiseProblem& p, int threads) {
    const TilePlan plan = plan_outputs(p.window, kTileElements / kBlock<T>);
    return kBlockBytes + piece_bytes<T>(packed_depthwise_count<T>(p, 1)) + threads * slot_bytes(p, plan);
  }
  static void launch(const DepthwiseProblem& p, const Runtime& runtime, void* workspace) {
    const TilePlan plan = plan_outputs(p.window, kTileElements / kBlock<T>);
    const int64_t channels = p.channels * p.multiplier, blocks = ceil_div(channels, kBlock<T>),
                  taps = product(p.window.taps);
    Arena arena = arena_at(workspace);
    T* weights = take<T>(arena, packed_depthwise_count<T>(p, 1));
    const bool finite = pack_depthwise<S>(weights, p, 1);
    auto body = [&](int64_t task, int64_t end, int64_t slot) {
      Arena own{arena.next + slot * slot_bytes(p, plan)};
      const Scratch<T> scratch = take_scratch<T>(own, plan.staged, plan.extent[2], taps);
      for (; task < end; ++task) {
        const int64_t block = task % blocks, tile = task / blocks % plan.tiles, image = task / blocks / plan.tiles;
        const Box box = tile_box(plan, p.window.out, tile);
        const LaneMap<T> lanes = map_lanes<T>(block * kBlock<T>, channels, 1, 1, 0, p.y.stride[1]);
        const T* w = weights + block * taps * kBlock<T>;
        forward_tile<S>(p, scratch, w, finite, image, block * kBlock<T>, box, [&](int64_t z, int64_t y, T* row) {
          activate_row(p.activation, row, box.extent[2] * kBlock<T>);
          S* out = static_cast<S*>(p.y.data) + image * p.y.stride[0] + (box.origin[0] + z) * p.y.stride[2] +
                   (box.origin[1] + y) * p.y.stride[3] + box.origin[2] * p.y.stride[4];
          unstage_row<S>(out, row, lanes, box.extent[2], p.y.stride[4]);
        });
      }
    };
    const int64_t tasks = p.batch * plan.tiles * blocks;
    for_slots(runtime, tasks, thread_slots(runtime, tasks, depthwise_flops(p)), body);
  }
};

template <class S>
struct GradInput {
  using T = Compute<S>;

  // All multiplier tiles of a block are staged side by side; they are just more taps.
  static TilePlan plan_of(const DepthwiseProblem& p) {
    return plan_inputs(p.window, max64(1, kTileElements / kBlock<T> / p.multiplier));
  }
  static int64_t slot_bytes(const DepthwiseProblem& p, const TilePlan& plan) {
    return scratch_bytes<T>(plan.staged * p.multiplier, plan.extent[2], product(p.window.taps) * p.multiplier);
  }
  static size_t workspace_bytes(const DepthwiseProblem& p, int threads) {
    return kBlockBytes + piece_bytes<T>(packed_depthwise_count<T>(p, p.multiplier)) +
           threads * slot_bytes(p, plan_of(p));
  }

  // Lists the taps (j, uz, uy, ux) that reach input row (d, h) and the columns congruent to `w`; offsets are relative
  // to column `w`.
  static int64_t list_taps(const DepthwiseProblem& p, const Box& staged, int64_t d, int64_t h, int64_t w, Tap* taps) {
    const Window& win = p.window;
    int64_t count = 0;
    // The output that position `at` reaches through tap u, relative to the staged box, or -1.
    auto reach = [&](int dim, int64_t at, int64_t u) {
      const int64_t scaled = at + win.pad[dim] - u * win.dilation[dim], i = floor_div(scaled, win.stride[dim]);
      return i * win.stride[dim] == scaled && i >= 0 && i < win.out[dim] ? i - staged.origin[dim] : int64_t{-1};
    };
    for (int64_t j = 0; j < p.multiplier; ++j) {
      for (int64_t uz = 0; uz < win.taps[0]; ++uz) {
        const int64_t z = reach(0, d, uz);
        if (z < 0) continue;
        for (int64_t uy = 0; uy < win.taps[1]; ++uy) {
          const int64_t y = reach(1, h, uy);
          if (y < 0) continue;
          for (int64_t ux = 0; ux < win.taps[2]; ++ux) {
            const int64_t scaled = w + win.pad[2] - ux * win.dilation[2], i = floor_div(scaled, win.stride[2]);
            if (i * win.stride[2] != scaled) continue;
            const int64_t column = i - staged.origin[2];  // may lie left of the map: the tile is zero there
            const int64_t offset = ((j * staged.extent[0] + z) * staged.extent[1] + y) * staged.extent[2] + column;
            const int64_t weight = ((j * win.taps[0] + uz) * win.taps[1] + uy) * win.taps[2] + ux;
            taps[count++] = {offset * kBlock<T>, weight * kBlock<T>, column};
          }
        }
      }
    }
    return count;
  }

  static void launch(const DepthwiseProblem& p, const Runtime& runtime, void* workspace) {
    const Window& w = p.window;
    const TilePlan plan = plan_of(p);
    const int64_t blocks = ceil_div(p.channels, kBlock<T>), taps = product(w.taps) * p.multiplier;
    Arena arena = arena_at(workspace);
    T* weights = take<T>(arena, packed_depthwise_count<T>(p, p.multiplier));
    const bool finite = pack_depthwise<S>(weights, p, p.multiplier);
    auto body = [&](int64_t task, int64_t end, int64_t slot) {
      Arena own{arena.next + slot * slot_bytes(p, plan)};
      const Scratch<T> s = take_scratch<T>(own, plan.staged * p.multiplier, plan.extent[2], taps);
      stage_bias<S>(s.bias, View{}, 0, 0);
      for (; task < end; ++task) {
        const int64_t block = task % blocks, tile = task / blocks % plan.tiles, image = task / blocks / plan.tiles;
        const Box box = tile_box(plan, w.in, tile), staged = output_box(w, box);
        const LaneMap<T> lanes = map_lanes<T>(block * kBlock<T>, p.channels, 1, 1, 0, p.grad_x.stride[1]);
        for (int64_t j = 0; j < p.multiplier; ++j) {
          T* part = s.tile + j * product(staged.extent) * kBlock<T>;
          stage_outputs<S>(part, p, p.grad, image, block * kBlock<T>, p.multiplier, j, staged);
        }
        for (int64_t z = 0; z < box.extent[0]; ++z) {
          for (int64_t y = 0; y < box.extent[1]; ++y) {
            S* out = static_cast<S*>(p.grad_x.data) + image * p.grad_x.stride[0] +
                     (box.origin[0] + z) * p.grad_x.stride[2] + (box.origin[1] + y) * p.grad_x.stride[3];
            for (int64_t phase = 0; phase < min64(w.stride[2], box.extent[2]); ++phase) {
              const int64_t column = box.origin[2] + phase, pixels = ceil_div(box.extent[2] - phase, w.stride[2]);
              const int64_t count = list_taps(p, staged, box.origin[0] + z, box.origin[1] + y, column, s.taps);
              const T* block_weights = weights + block * taps * kBlock<T>;
              if (finite) {
                correlate_row(s.tile, block_weights, s.taps, count, kBlock<T>, s.bias, s.row, pixels);
              } else {
                correlate_row_checked(s.tile, block_weights, s.taps, count, kBlock<T>, s.bias, s.row, pixels,
                                      staged.origin[2], 1, w.out[2], s.inside);
              }
              unstage_row<S>(out + column * p.grad_x.stride[4], s.row, lanes, pixels, w.stride[2] * p.grad_x.stride[4]);
            }
          }
        }
      }
    };
    const int64_t tasks = p.batch * plan.tiles * blocks;
    for_slots(runtime, tasks, thread_slots(runtime, tasks, depthwise_flops(p)), body);
  }
};

constexpr int64_t kPositionChain = 16;  // as kChain, for sums over positions, where terms of both signs cancel

// sum[tap] += sum over the tile's outputs of x[output * stride + tap] * grad[output], for kTaps taps at once.
template <class T, int kTaps>
static void accumulate_taps(const T* x, const T* grad, const int64_t* offset, const Window& w, const Box& out,
                            const Box& in, T* sum) {
  constexpr int kB = kBlock<T>, kL = kLanes<T>;
  for (int v = 0; v < kB; v += kL) {
    Vec<T> acc[kTaps];
    for (int t = 0; t < kTaps; ++t) acc[t] = splat(T(0));
    int64_t chain = 0;
    auto flush = [&] {
      for (int t = 0; t < kTaps; ++t) {
        store(sum + t * kB + v, load(sum + t * kB + v) + acc[t]);
        acc[t] = splat(T(0));
      }
      chain = 0;
    };
    const T* g = grad + v;
    for (int64_t z = 0; z < out.extent[0]; ++z) {
      for (int64_t y = 0; y < out.extent[1]; ++y) {
        const T* row = x + v + (z * w.stride[0] * in.extent[1] + y * w.stride[1]) * in.extent[2] * kB;
        for (int64_t first = 0; first < out.extent[2]; first += kPositionChain) {
          const int64_t last = min64(first + kPositionChain, out.extent[2]);
          if (chain + last - first > kPositionChain) flush();
          chain += last - first;
          for (int64_t c = first; c < last; ++c, g += kB) {
            const Vec<T> gradient = load(g);
            const T* pixel = row + c * w.stride[2] * kB;
#pragma GCC unroll 9
            for (int t = 0; t < kTaps; ++t) acc[t] += load(pixel + offset[t]) * gradient;
          }
        }
      }
    }
    flush();
  }
}

constexpr int kMaxTaps = 9;  // 3x3 in one pass; more taps take several passes over the staged tile

template <class S>
struct GradWeight {
  using T = Compute<S>;

  struct Plan {
    TilePlan tiles;
    int64_t blocks, taps, slabs, sums;
  };
  static Plan plan_of(const DepthwiseProblem& p) {
    Plan plan;
    plan.tiles = plan_outputs(p.window, kTileElements / kBlock<T>);
    plan.blocks = ceil_div(p.channels * p.multiplier, kBlock<T>);
    plan.taps = product(p.window.taps);
    plan.slabs = max64(
        1, min64(p.batch * plan.tiles.tiles, ceil_div(64, plan.blocks)));  // 64 tasks or more keep many threads busy
    plan.sums = (plan.taps + 1) * kBlock<T>;                               // every tap, and the bias
    return plan;
  }
  static int64_t slot_bytes(const Plan& plan) {
    return scratch_bytes<T>(plan.tiles.staged, 1, 1) + piece_bytes<T>(product(plan.tiles.extent) * kBlock<T>) +
           piece_bytes<int64_t>(plan.taps);
  }
  static size_t workspace_bytes(const DepthwiseProblem& p, int threads) {
    const Plan plan = plan_of(p);
    return kBlockBytes + piece_bytes<T>(plan.blocks * plan.slabs * plan.sums) + threads * slot_bytes(plan);
  }

  static void accumulate_tile(const DepthwiseProblem& p, const T* x, const T* grad, const int64_t* offset, int64_t taps,
                              const Box& out, const Box& in, T* sums) {
    using Pass = void (*)(const T*, const T*, const int64_t*, const Window&, const Box&, const Box&, T*);
    static constexpr Pass kPasses[kMaxTaps + 1] = {nullptr,
                                                   accumulate_taps<T, 1>,
                                                   accumulate_taps<T, 2>,
                                                   accumulate_taps<T, 3>,
                                                   accumulate_taps<T, 4>,
                                                   accumulate_taps<T, 5>,
                                                   accumulate_taps<T, 6>,
                                                   accumulate_taps<T, 7>,
                                                   accumulate_taps<T, 8>,
                                                   accumulate_taps<T, 9>};
    int64_t done = 0;
    for (int64_t left = ceil_div(taps, kMaxTaps); left > 0; --left) {
      const int64_t group = ceil_div(taps - done, left);
      kPasses[group](x, grad, offset + done, p.window, out, in, sums + done * kBlock<T>);
      done += group;
    }
    if (p.grad_bias.data == nullptr) return;
    const int64_t positions = product(out.extent);
    double total[kBlock<T>] = {};
    for (int64_t i = 0; i < positions; ++i) {
      for (int l = 0; l < kBlock<T>; ++l) total[l] += grad[i * kBlock<T> + l];
    }
    for (int l = 0; l < kBlock<T>; ++l) sums[taps * kBlock<T> + l] += static_cast<T>(total[l]);
  }

  static void launch(const DepthwiseProblem& p, const Runtime& runtime, void* workspace) {
    const Window& w = p.window;
    const Plan plan = plan_of(p);
    const int64_t channels = p.channels * p.multiplier, pieces = p.batch * plan.tiles.tiles;
    Arena arena = arena_at(workspace);
    T* partial = take<T>(arena, plan.blocks * plan.slabs * plan.sums);
    auto body = [&](int64_t task, int64_t end, int64_t slot) {
      Arena own{arena.next + slot * slot_bytes(plan)};
      const Scratch<T> s = take_scratch<T>(own, plan.tiles.staged, 1, 1);
      T* grad = take<T>(own, product(plan.tiles.extent) * kBlock<T>);
      int64_t* offset = take<int64_t>(own, plan.taps);
      for (; task < end; ++task) {
        const int64_t block = task / plan.slabs, slab = task % plan.slabs, first = block * kBlock<T>;
        T* sums = partial + task * plan.sums;
        memset(sums, 0, plan.sums * sizeof(T));
        const LaneMap<T> lanes = map_lanes<T>(first, channels, 1, p.multiplier, 0, p.x.stride[1]);
        for (int64_t piece = pieces * slab / plan.slabs; piece < pieces * (slab + 1) / plan.slabs; ++piece) {
          const int64_t image = piece / plan.tiles.tiles;
          const Box out = tile_box(plan.tiles, w.out, piece % plan.tiles.tiles), in = input_box(w, out);
          stage_outputs<S>(grad, p, p.grad, image, first, 1, 0, out);
          stage_box<S>(s.tile, static_cast<const S*>(p.x.data) + image * p.x.stride[0], lanes, in, w.in,
                       p.x.stride + 2);
          for (int64_t t = 0; t < plan.taps; ++t) {
            const int64_t x = t % w.taps[2], y = t / w.taps[2] % w.taps[1], z = t / w.taps[2] / w.taps[1];
            offset[t] =
                ((z * w.dilation[0] * in.extent[1] + y * w.dilation[1]) * in.extent[2] + x * w.dilation[2]) * kBlock<T>;
          }
          accumulate_tile(p, s.tile, grad, offset, plan.taps, out, in, sums);
        }
      }
    };
    const int64_t tasks = plan.blocks * plan.slabs;
    for_slots(runtime, tasks, thread_slots(runtime, tasks, depthwise_flops(p)), body);
    for (int64_t o = 0; o < channels; ++o)
      write_channel(p, plan, partial + o / kBlock<T> * plan.slabs * plan.sums + o % kBlock<T>, o);
  }

  // Adds the slabs in their order and writes one channel's gradients.
  static void write_channel(const DepthwiseProblem& p, const Plan& plan, const T* partial, int64_t o) {
    auto total = [&](int64_t t) {
      T sum = T(0);
      for (int64_t slab = 0; slab < plan.slabs; ++slab) sum += partial[slab * plan.sums + t * kBlock<T>];
      return sum;
    };
    if (p.grad_weight.data) {
      S* out = static_cast<S*>(p.grad_weight.data) + o * p.grad_weight.stride[0];
      for (int64_t t = 0; t < plan.taps; ++t) {
        const int64_t x = t % p.window.taps[2], y = t / p.window.taps[2] % p.window.taps[1],
                      z = t / p.window.taps[2] / p.window.taps[1];
        narrow(total(t), out + z * p.grad_weight.stride[2] + y * p.grad_weight.stride[3] + x * p.grad_weight.stride[4]);
      }
    }
    if (p.grad_bias.data) narrow(total(plan.taps), static_cast<S*>(p.grad_bias.data) + o * p.grad_bias.stride[0]);
  }
};

}  // namespace dsconv::cpu::DSCONV_ISA

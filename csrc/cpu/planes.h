// Depthwise correlation by planes: the forward pass and the input gradient of contiguous tensors, strip by strip.
#pragma once

#include "depthwise_rows.h"
#include "plane_cells.h"
#include "plane_rows.h"

namespace dsconv::cpu::DSCONV_ISA {

// Planes by strips of outputs. With AVX-512, columns that would fill no more than half a vector are those of two planes (but
// where the memory sets the pace: strips in turn fetch all of what comes next).
template <class S, int kTaps, int kStride>
struct ByOutputs : OutputRows<S, kTaps, kStride> {
  using T = Compute<S>;
  using StripOf = Strip<T, kTaps, kStride>;
  using RestOf = RowStrip<T, kTaps, kStride, RowForm::planes>;
  using Work = StripWork<StripOf, RestOf>;

  static void run(const ImagePlanes<S>& image, int64_t first, int64_t last, const Work& work) {
    const auto strips = [&](int64_t first, int64_t last) {
      work.for_each(
          image, first, last, [](const auto& plane, const Piece* pieces, int64_t count, const StripOf& strip) {
            with_reach(strip.reach,
                       [&]<Reach reach>() { plane_strip<S, kTaps, kStride, reach>(plane, pieces, count, strip); });
          });
    };
    if (!work.rest) return strips(first, last);
    if constexpr (kVectorBytes == 64) {
      for (int64_t channel = first; channel < last; channel += 2) {
        const int64_t end = min64(channel + 2, last);
        strips(channel, end);
        plane_rows<S, kTaps, kStride, RowForm::planes>(image, channel, end, work.pieces, work.piece_count, *work.rest);
      }
    }
  }
};

template <class S, bool kTransposed>
struct Planes {
  using T = Compute<S>;
  using Shared = Rows<S, kTransposed>;
  using Plan = typename Shared::Plan;
  static constexpr int kL = kLanes<T>;
  static constexpr int64_t kTasks = 64;
  static constexpr int64_t kTileRows = 8, kTileBytes = 13 << 10;  // what strips side by side share stays in L1

  static const char* can_run(const DepthwiseProblem& p) {
    const Window& w = p.window;
    const View &from = kTransposed ? p.grad : p.x, &to = kTransposed ? p.grad_x : p.y;
    if (!kWidens<S>) return "half types are widened by rows";
    if (from.stride[4] != 1 || to.stride[4] != 1) return "columns are no neighbours in memory";
    if (w.in[0] != 1 || w.taps[0] != 1 || w.out[0] != 1) return "three dimensions";
    if (w.taps[1] != w.taps[2] || (w.taps[1] != 3 && w.taps[1] != 5 && w.taps[1] != 7))
      return "taps other than 3x3, 5x5, 7x7";
    if (product(w.taps) > kChain) return "longer sums than this instruction set keeps in one chain";
    if (w.stride[1] != w.stride[2] || w.stride[1] > 2 || (w.stride[1] == 2 && product(w.dilation) != 1))
      return "strides other than 1, and 2 without dilation";
    if (kTransposed && p.multiplier != 1) return "a gradient of multipliers";
    if (kTransposed && w.stride[1] == 2 && w.pad[1] % 2 != w.pad[2] % 2) return "padding that is odd in one direction";
    if (!has_wide_rows<S>(w)) return "rows of a half type that are shorter than a vector";
    return nullptr;
  }

  // Lanes without outputs (or cells of them), and what every strip begins and ends with (in multiply-adds). With four lanes,
  // edges are read one by one.
  static double part(const DepthwiseProblem& p) {
    constexpr bool kFew = kVectorBytes == 16;
    constexpr double kStrip = kFew ? 20 : 85, kEdges = kFew ? 12 : 0;  // kEdges: strips
    const Window& w = p.window;
    const int64_t* out = kTransposed ? w.in : w.out;
    const int64_t unit = kTransposed ? w.stride[1] : 1, rows = ceil_div(out[1], unit), columns = ceil_div(out[2], unit);
    const int64_t strips = ceil_div(columns, kL), left = columns % kL, products = product(w.taps) * max64(rows, 1);
    const bool shared = kVectorBytes == 64 && unit == 1 && strips > 1 && left > 0 && left <= kL / 2;  // by two planes
    const double filled = static_cast<double>(columns) / kL / (static_cast<double>(strips) - (shared ? 0.4 : 0));
    return filled / (1 + kStrip / products) * strips / (strips + kEdges);
  }

  // Of a plane, to be worked on at the same time.
  static int64_t tiles(const DepthwiseProblem& p, const Plan& plan) {
    const int64_t wanted = wanted_tasks(depthwise_flops(p), kTasks), planes = p.batch * plan.channels;
    return max64(1, min64(ceil_div(wanted, max64(planes, 1)), plan.c.target()[1] / kTileRows));
  }
  static size_t workspace_bytes(const DepthwiseProblem& p, int) {
    const Plan plan = Shared::plan_of(p);
    const auto& out = plan.c.target();
    return kBlockBytes + Shared::shared_bytes(p, plan) + piece_bytes<Strip<T, 7, 2>>(ceil_div(out[2], kL) + 1) +
           piece_bytes<Piece>(out[1]) + piece_bytes<int64_t>(tiles(p, plan) + 1);
  }
  static void launch(const DepthwiseProblem& p, const Runtime& runtime, void* workspace) {
    if constexpr (kWidens<S>) {
      unroll<3>([&]<int i>() __attribute__((always_inline)) {
        constexpr int kTaps = 3 + 2 * i;
        const Window& w = p.window;
        if (w.taps[1] != kTaps) return;
        if (w.stride[1] == 1) return launch_strips<ByOutputs<S, kTaps, 1>>(p, runtime, workspace);
        if constexpr (kTransposed) {
          if (w.pad[1] % 2 == 0) return launch_strips<ByCells<S, kTaps, 0>>(p, runtime, workspace);
          launch_strips<ByCells<S, kTaps, 1>>(p, runtime, workspace);
        } else {
          launch_strips<ByOutputs<S, kTaps, 2>>(p, runtime, workspace);
        }
      });
    }
  }

  template <class By>
  static void launch_strips(const DepthwiseProblem& p, const Runtime& runtime, void* workspace) {
    using StripOf = typename By::StripOf;
    const View &from = kTransposed ? p.grad : p.x, &to = kTransposed ? p.grad_x : p.y;
    const Plan plan = Shared::plan_of(p);
    Arena arena = arena_at(workspace);
    const BlockRow<T> shared = Shared::shared_row(p, plan, arena);
    const auto &in = plan.c.source(), &out = plan.c.target();
    const int64_t rows = ceil_div(out[1], By::kOutputs), columns = ceil_div(out[2], By::kOutputs);
    const int64_t dilation = p.window.dilation[2], whole = columns / kL;
    // Of the columns that the strip's outputs read from the first one on: where the tensor begins.
    const auto low_of = [&](int64_t first) { return -(By::first_column(plan.c) + first * By::kInputs); };
    typename By::Work work{};
    work.strip_count = ceil_div(columns, kL);
    if constexpr (kVectorBytes == 64 && requires { typename By::RestOf; }) {
      using RestOf = typename By::RestOf;
      const int64_t first = whole * kL, left = columns - first, low = low_of(first), high = in[2] + low;
      if (whole > 0 && left > 0 && !is_large<S>(p, kNearBytes) && RestOf::fits(left, low, high, dilation)) {
        RestOf* const rest = take<RestOf>(arena, 1);
        *rest = RestOf(first, left, low, high, dilation);
        work.rest = rest;
        work.strip_count = whole;
      }
    }
    StripOf* const strips = take<StripOf>(arena, work.strip_count);
    for (int64_t s = 0; s < work.strip_count; ++s) {
      const int64_t first = max64(0, min64(s * kL, columns - kL));
      strips[s] = StripOf(first, out[2], low_of(first), in[2] + low_of(first), dilation);
    }
    work.strips = strips;
    const int64_t per_plane = tiles(p, plan);
    Piece* const pieces = take<Piece>(arena, out[1]);
    int64_t* const ends = take<int64_t>(arena, per_plane + 1);  // of the pieces of each tile
    ends[0] = 0;
    const int64_t row_bytes = max64(in[2] * By::kInputs, out[2] * By::kOutputs) * static_cast<int64_t>(sizeof(S));
    const int64_t most = max64(kTileRows, kTileBytes / row_bytes);
    for (int64_t tile = 0; tile < per_plane; ++tile) {
      const int64_t top = rows * tile / per_plane, bottom = rows * (tile + 1) / per_plane;
      const int64_t count = By::cut_rows(plan.c, from, to, top, bottom, most, pieces + ends[tile]);
      ends[tile + 1] = ends[tile] + count;
    }

    // Strips side by side share lines of the cache; but dilated rows are many short pieces, for which a strip has the same
    // weights.
    work.together = p.window.dilation[1] > 1 ? out[1] : 1;
    const Limits<T> limits(shared.activation);
    const int64_t channels = plan.channels, tasks = p.batch * channels * per_plane;
    auto body = [&](int64_t task, int64_t end, int64_t) {
      int64_t tile = task % per_plane, channel = task / per_plane % channels, image = task / per_plane / channels;
      while (task < end) {
        const ImagePlanes<S> planes{static_cast<const S*>(from.data) + image * from.stride[0],
                                    static_cast<S*>(to.data) + image * to.stride[0],
                                    from.stride[1],
                                    to.stride[1],
                                    kTransposed ? 1 : p.multiplier,
                                    shared.weights,
                                    shared.weight_block,
                                    shared.bias,
                                    channels,
                                    limits};
        const int64_t last = per_plane > 1 ? channel + 1 : min64(channels, channel + end - task);
        typename By::Work own = work;
        own.pieces = pieces + ends[tile];
        own.piece_count = ends[tile + 1] - ends[tile];
        By::run(planes, channel, last, own);
        task += last - channel;
        if (++tile < per_plane) continue;
        tile = 0;
        channel = last;
        if (channel < channels) continue;
        channel = 0;
        ++image;
      }
    };
    for_slots(runtime, tasks, thread_slots(runtime.threads, tasks, depthwise_flops(p)), body);
  }
};

template <class S>
struct PlanesForward : Planes<S, false> {};
template <class S>
struct PlanesGradInput : Planes<S, true> {};

}  // namespace dsconv::cpu::DSCONV_ISA

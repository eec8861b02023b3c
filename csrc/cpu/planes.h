// Depthwise correlation by planes: the forward pass and the input gradient of contiguous tensors, strip by strip.
#pragma once

#include "depthwise_rows.h"
#include "plane_cells.h"

namespace dsconv::cpu::DSCONV_ISA {

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
    const int64_t strips = ceil_div(columns, kL), products = product(w.taps) * max64(rows, 1);
    return filled_lanes<T>(columns) / (1 + kStrip / products) * strips / (strips + kEdges);
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
    const int64_t strip_count = ceil_div(columns, kL);
    StripOf* const strips = take<StripOf>(arena, strip_count);
    for (int64_t s = 0; s < strip_count; ++s) {
      const int64_t first = max64(0, min64(s * kL, columns - kL));
      const int64_t at = By::first_column(plan.c) + first * By::kInputs;
      strips[s] = StripOf(first, out[2], -at, in[2] - at, p.window.dilation[2]);
    }
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
    const int64_t together = p.window.dilation[1] > 1 ? out[1] : 1;
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
        const StripWork<StripOf> work{pieces + ends[tile], ends[tile + 1] - ends[tile], together, strips, strip_count};
        By::run(planes, channel, last, work);
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

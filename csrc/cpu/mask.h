// grad_x = grad times the activation's derivative at `saved`: the gradient of a pre-activation.
#pragma once

#include "kernel_of.h"
#include "tasks.h"
#include "tiles.h"

namespace dsconv::cpu::DSCONV_ISA {

// The three maps lie in memory alike and without gaps: one run of numbers.
template <class S>
struct FlatMask {
  using T = Compute<S>;
  static constexpr int64_t kRun = 1024;  // numbers at a time: two buffers of them stay in L1

  static bool is_dense(const View& v, const DepthwiseProblem& p) {
    int64_t size[5] = {p.batch, p.channels, p.window.out[0], p.window.out[1], p.window.out[2]}, elements = 1;
    for (int64_t n : size) elements *= n;
    return max_offset(v, p.batch, p.channels, p.window.out) == elements - 1;
  }
  static const char* can_run(const DepthwiseProblem& p) {
    const int64_t size[5] = {p.batch, p.channels, p.window.out[0], p.window.out[1], p.window.out[2]};
    for (int dim = 0; dim < 5; ++dim) {
      const int64_t stride = p.grad_x.stride[dim];
      if (size[dim] > 1 && p.grad.stride[dim] != stride) return "unlike strides";
      if (size[dim] > 1 && p.saved.data && p.saved.stride[dim] != stride) return "unlike strides";
    }
    return is_dense(p.grad_x, p) ? nullptr : "gaps between the elements";
  }
  static size_t workspace_bytes(const DepthwiseProblem&, int) { return 0; }
  static void launch(const DepthwiseProblem& p, const Runtime& runtime, void*) {
    const int64_t count = numel(p.batch, p.channels, p.window.out), runs = ceil_div(count, kRun);
    auto body = [&](int64_t run, int64_t end, int64_t) {
      T gradient[kRun], saved[kRun];
      for (; run < end; ++run) {
        const int64_t first = run * kRun, length = min64(kRun, count - first);
        widen_row<S>(gradient, static_cast<const S*>(p.grad.data) + first, length);
        if (p.saved.data) {
          widen_row<S>(saved, static_cast<const S*>(p.saved.data) + first, length);
          mask_row(p.activation, gradient, saved, length);
        }
        narrow_row<S>(static_cast<S*>(p.grad_x.data) + first, gradient, length);
      }
    };
    for_slots(runtime, runs, thread_slots(runtime, runs, 8 * count), body);
  }
};

// Any strides: over tiles.
template <class S>
struct TiledMask {
  using T = Compute<S>;
  static constexpr int64_t kTileElements = 8 * 1024;  // two tiles stay in L2

  static TilePlan plan_of(const DepthwiseProblem& p) { return plan_tiles(p.window.out, kTileElements / kBlock<T>); }
  static int64_t slot_bytes(const TilePlan& plan) { return 2 * piece_bytes<T>(plan.staged * kBlock<T>); }
  static size_t workspace_bytes(const DepthwiseProblem& p, int threads) {
    return kBlockBytes + threads * slot_bytes(plan_of(p));
  }
  static void launch(const DepthwiseProblem& p, const Runtime& runtime, void* workspace) {
    const TilePlan plan = plan_of(p);
    const int64_t blocks = ceil_div(p.channels, kBlock<T>);
    const Arena arena = arena_at(workspace);
    auto body = [&](int64_t task, int64_t end, int64_t slot) {
      Arena own{arena.next + slot * slot_bytes(plan)};
      T* tile = take<T>(own, plan.staged * kBlock<T>);
      T* second = take<T>(own, plan.staged * kBlock<T>);
      for (; task < end; ++task) {
        const int64_t block = task % blocks, image = task / blocks / plan.tiles;
        const Box box = tile_box(plan, p.window.out, task / blocks % plan.tiles);
        const LaneMap<T> lanes = map_lanes<T>(block * kBlock<T>, p.channels, 1, 1, 0, p.grad_x.stride[1]);
        stage_outputs<S>(tile, p, p.grad, image, block * kBlock<T>, 1, 0, box);
        if (p.saved.data) {
          stage_outputs<S>(second, p, p.saved, image, block * kBlock<T>, 1, 0, box);
          mask_row(p.activation, tile, second, product(box.extent) * kBlock<T>);
        }
        unstage_box<S>(static_cast<S*>(p.grad_x.data) + image * p.grad_x.stride[0], tile, lanes, box,
                       p.grad_x.stride + 2);
      }
    };
    const int64_t tasks = p.batch * plan.tiles * blocks;
    for_slots(runtime, tasks, thread_slots(runtime, tasks, 8 * numel(p.batch, p.channels, p.window.out)), body);
  }
};

}  // namespace dsconv::cpu::DSCONV_ISA

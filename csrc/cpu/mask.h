// grad_x = grad times the activation's derivative at `saved`: the gradient of a pre-activation.
#pragma once

#include "activation_rows.h"
#include "kernel_of.h"
#include "row_stage.h"
#include "tasks.h"

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
    for_slots(runtime, runs, thread_slots(runtime.threads, runs, 8 * count), body);
  }
};

// Any strides: row by row, some channels at a time.
template <class S>
struct RowsMask {
  using T = Compute<S>;
  static constexpr int64_t kLanesAtOnce = 2 * kLanes<T>;  // a cache line of a half type

  static int64_t slot_bytes(const DepthwiseProblem& p) { return 2 * piece_bytes<T>(p.window.out[2] * kLanesAtOnce); }
  static size_t workspace_bytes(const DepthwiseProblem& p, int threads) {
    return kBlockBytes + threads * slot_bytes(p);
  }
  static void launch(const DepthwiseProblem& p, const Runtime& runtime, void* workspace) {
    const int64_t* size = p.window.out;
    const int64_t width = size[2], chunks = ceil_div(p.channels, kLanesAtOnce);
    const Arena arena = arena_at(workspace);
    auto body = [&](int64_t task, int64_t end, int64_t slot) {
      Arena own{arena.next + slot * slot_bytes(p)};
      T* gradient = take<T>(own, width * kLanesAtOnce);
      T* saved = take<T>(own, width * kLanesAtOnce);
      for (; task < end; ++task) {
        const int64_t base = task % chunks * kLanesAtOnce, row = task / chunks;
        const int64_t h = row % size[1], d = row / size[1] % size[0], image = row / size[1] / size[0];
        auto at = [&](const View& v) {
          return static_cast<S*>(v.data) + image * v.stride[0] + d * v.stride[2] + h * v.stride[3];
        };
        auto gather = [&](T* tile, const View& v) {
          RowCopy<S>::gather(tile, kLanesAtOnce, at(v), {p.channels, 1, 1}, base, 0, v.stride[1], v.stride[4], width,
                             v.stride[3]);
        };
        gather(gradient, p.grad);
        if (p.saved.data) {
          gather(saved, p.saved);
          mask_row(p.activation, gradient, saved, width * kLanesAtOnce);
        }
        RowCopy<S>::scatter(at(p.grad_x), gradient, kLanesAtOnce, base, p.channels, p.grad_x.stride[1],
                            p.grad_x.stride[4], width);
      }
    };
    const int64_t tasks = p.batch * size[0] * size[1] * chunks;
    for_slots(runtime, tasks, thread_slots(runtime.threads, tasks, 8 * numel(p.batch, p.channels, p.window.out)), body);
  }
};

}  // namespace dsconv::cpu::DSCONV_ISA

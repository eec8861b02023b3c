// The rows of the fused kernel: which problems, in which tiles.
#pragma once

#include "cuda/fused.cuh"

namespace dsconv::cuda {

// Two blocks fit the shared memory of every architecture's multiprocessor but sm_75's.
constexpr int64_t kFusedBytes = 48 << 10;

// A problem cut into tiles of one shape.
struct FusedPlan {
  FusedParameters parameters;
  int64_t blocks, shared_bytes;
  double cost;  // multiply-adds of the busiest multiprocessor, those of tensor cores at their rate
};

struct FusedShape {
  int pixels, outputs;
  int64_t operand_bytes, sum_bytes;
};
template <class Tile>
constexpr FusedShape kShapeOf{Tile::kPixels, Tile::kOutputs, Tile::kOperandBytes, Tile::kSumBytes};

FusedPlan plan_fused(const SeparableProblem& p, const FusedShape& shape, bool pixels_inner, int multiprocessors);

// null, or the reason why not. 0 taps or a stride of 0 are any.
const char* why_not_fused(const SeparableProblem& p, int taps, int stride, bool pixels_inner);

using Tiny = FusedTile<32, 64, 2>;
using Small = FusedTile<64, 64, 4>;
using Large = FusedTile<128, 128, 8>;

// A row of kernels.inc, and the tiles it has code for: of the smallest come the most blocks and the smallest boxes.
template <int kTaps, int kStride, bool kPixelsInner, class Smallest, class... Larger>
struct Fused {
  template <class Tile>
  static FusedPlan plan(const SeparableProblem& p, int multiprocessors) {
    return plan_fused(p, kShapeOf<Tile>, kPixelsInner, multiprocessors);
  }

  static const char* can_run(const SeparableProblem& p) {
    if (const char* reason = why_not_fused(p, kTaps, kStride, kPixelsInner)) return reason;
    const FusedPlan least = plan<Smallest>(p, 1);
    if (least.shared_bytes > kFusedBytes) return "the window does not fit shared memory";
    return least.blocks > kLargestGrid ? kGridTooLarge : nullptr;
  }

  static int64_t threads(const SeparableProblem& p) { return plan<Smallest>(p, 1).blocks * Smallest::kThreads; }

  template <class S, class Tile>
  static void launch_plan(const FusedPlan& plan, const Runtime& runtime) {
    cuda::launch("fused_forward", fused_forward<S, Tile, kTaps, kStride, kPixelsInner>, plan.blocks, Tile::kThreads,
                 plan.shared_bytes, runtime, plan.parameters);
  }
  static void launch(const SeparableProblem& p, const Runtime& runtime) {
    with_storage(p.depthwise.dtype, [&]<class S>() { launch_as<S>(p, runtime); });
  }
  template <class S>
  static void launch_as(const SeparableProblem& p, const Runtime& runtime) {
    FusedPlan best = plan<Smallest>(p, runtime.threads);
    auto* launch_best = launch_plan<S, Smallest>;
    const auto consider = [&]<class Tile>(const FusedPlan& other, Tile*) {
      if (other.shared_bytes > kFusedBytes || other.cost >= best.cost) return;
      best = other;
      launch_best = launch_plan<S, Tile>;
    };
    (consider(plan<Larger>(p, runtime.threads), static_cast<Larger*>(nullptr)), ...);
    launch_best(best, runtime);
  }
};

// bfloat16 needs the tensor cores of sm_80.
inline int least_sm_of(const SeparableProblem& p) { return p.depthwise.dtype == DType::bf16 ? 80 : 75; }

template <int kTaps, int kStride, bool kPixelsInner, class... Tiles>
constexpr Kernel<SeparableProblem> kernel_of_fused() {
  return kernel_of_rows<Fused<kTaps, kStride, kPixelsInner, Tiles...>, SeparableProblem>(least_sm_of);
}

}  // namespace dsconv::cuda

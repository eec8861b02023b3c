// The rows of the fused kernel: which problems, in which tiles.
#pragma once

#include <cmath>
#include <stdexcept>

#include "cuda/device.h"
#include "cuda/fused.cuh"

namespace dsconv::cuda {

// Where the depthwise values are while they are multiplied: see fused.cuh.
enum class Dataflow : uint8_t { accumulators, resident };

// Positions of the input that are read, and pixels that are computed.
struct FusedWork {
  double positions, pixels;
};

// A problem cut into tiles, and estimates: of the arithmetic and what it reads, and of latencies.
struct FusedPlan {
  FusedParameters parameters;
  FusedWork map, tile;  // of all tiles of a map, and of the largest one
  int64_t blocks, shared_bytes;
  int threads;
  double busy_us, latency_us;

  double us(double efficiency = 1) const { return busy_us / efficiency + latency_us; }
};

// The plan with the least time, of tiles of so many outputs and any number of pixels; infinite where no block fits the
// GPU, whose multiprocessors have registers for `resident_threads`.
FusedPlan plan_fused(const SeparableProblem& p, int64_t outputs, int64_t resident_threads, bool pixels_inner,
                     Dataflow dataflow, const Machine& machine);

// What moving inputs, outputs and weights takes, once each.
double fused_memory_us(const SeparableProblem& p, const Machine& machine);

// null, or the reason why not. 0 taps or a stride of 0 are any.
const char* why_not_fused(const SeparableProblem& p, int taps, int stride, bool pixels_inner);

// A row of kernels.inc. There is code for tiles of 64 outputs, and where that pays of 128: then half as many blocks make
// the depthwise values anew, and a warp multiplies twice as often with what it reads from shared memory.
template <Dataflow kDataflow, int kTaps, int kStride, bool kPixelsInner, int kMostOutputs>
struct Fused {
  static constexpr int kLeastOutputs = 64;

  struct Choice {
    FusedPlan plan;
    void (*launch)(const FusedPlan&, const Runtime&);
  };

  template <class F, int kOutputs>
  static void launch_plan(const FusedPlan& plan, const Runtime& runtime) {
    cuda::launch("fused_forward", fused_forward<F, kOutputs, kTaps, kStride, kPixelsInner>, plan.blocks, plan.threads,
                 plan.shared_bytes, runtime, plan.parameters);
  }
  template <class F, int kOutputs>
  static Choice choice(const SeparableProblem& p, const Machine& machine) {
    const int threads = resident_threads<F, kOutputs, kTaps>(machine.sm >= 80);
    return {plan_fused(p, kOutputs, threads, kPixelsInner, kDataflow, machine), launch_plan<F, kOutputs>};
  }
  template <class F>
  static Choice best(const SeparableProblem& p, const Machine& machine) {
    const Choice least = choice<F, kLeastOutputs>(p, machine);
    if constexpr (kMostOutputs > kLeastOutputs) {
      const Choice most = choice<F, kMostOutputs>(p, machine);
      if (most.plan.us() < least.plan.us()) return most;
    }
    return least;
  }
  static Choice best(const SeparableProblem& p, const Machine& machine) {
    switch (p.depthwise.dtype) {
      case DType::f16: return best<__half>(p, machine);
      case DType::bf16: return best<__nv_bfloat16>(p, machine);
      default: return product_rate(p.pointwise, machine) > 1 ? best<Tf32>(p, machine) : best<float>(p, machine);
    }
  }

  static const char* can_run(const SeparableProblem& p) {
    if (const char* reason = why_not_fused(p, kTaps, kStride, kPixelsInner)) return reason;
    const int64_t tiles = ceil_div(p.pointwise.out_channels, kLeastOutputs);
    if (kDataflow == Dataflow::resident && tiles < 2) return "one tile has all outputs";
    const FusedPlan plan = best(p, kMostShared).plan;  // what a smaller GPU has no room for takes forever there
    return plan.blocks > 0 ? nullptr : "no tile fits shared memory, or more blocks than a grid holds";
  }
  static double estimate_us(const SeparableProblem& p, const Machine& machine, double efficiency) {
    return std::fmax(best(p, machine).plan.us(efficiency), fused_memory_us(p, machine));
  }
  static void launch(const SeparableProblem& p, const Runtime& runtime, void*) {
    const Choice chosen = best(p, *runtime.machine);
    if (chosen.plan.blocks == 0) throw std::invalid_argument("dsconv: a fused kernel that this GPU has no room for");
    chosen.launch(chosen.plan, runtime);
  }

 private:
  static constexpr Machine kMostShared{Target::cuda, 90, 1, 1, 1, 0, 1, 228 << 10};
};

// bfloat16 needs the tensor cores of sm_80.
inline int least_sm_of(const SeparableProblem& p) { return p.depthwise.dtype == DType::bf16 ? 80 : 75; }

template <Dataflow kDataflow, int kTaps, int kStride, bool kPixelsInner, int kMostOutputs>
constexpr Kernel<SeparableProblem> kernel_of_fused() {
  using Row = Fused<kDataflow, kTaps, kStride, kPixelsInner, kMostOutputs>;
  return {.can_run = Row::can_run,
          .workspace_bytes = [](const SeparableProblem&, int) -> size_t { return 0; },
          .launch = Row::launch,
          .least_sm = least_sm_of,
          .estimate_us = Row::estimate_us};
}

}  // namespace dsconv::cuda

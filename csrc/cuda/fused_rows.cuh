// The rows of the fused kernel: which problems, in which tiles.
#pragma once

#include <cmath>
#include <stdexcept>

#include "cuda/device.h"
#include "cuda/fused.cuh"

namespace dsconv::cuda {

// Where the depthwise values are while they are multiplied: see fused.cuh.
enum class Dataflow : uint8_t { accumulators, resident };

// A problem cut into tiles of one shape, and estimates: of the arithmetic and what it reads, and of latencies.
struct FusedPlan {
  FusedParameters parameters;
  int64_t blocks, shared_bytes;
  double busy_us, latency_us;

  double us(double efficiency = 1) const { return busy_us / efficiency + latency_us; }
};

struct FusedShape {
  int pixels, outputs, resident_blocks;  // of a multiprocessor, by their registers
  int64_t map_bytes, weight_bytes, sum_bytes;
};

// The plan with the least time; infinite where a block does not fit the GPU.
FusedPlan plan_fused(const SeparableProblem& p, const FusedShape& shape, bool pixels_inner, Dataflow dataflow,
                     const Machine& machine);

// What moving inputs, outputs and weights takes, once each.
double fused_memory_us(const SeparableProblem& p, const Machine& machine);

// null, or the reason why not. 0 taps or a stride of 0 are any.
const char* why_not_fused(const SeparableProblem& p, int taps, int stride, bool pixels_inner);

using Tiny = FusedTile<32, 64, 2>;
using Small = FusedTile<64, 64, 4>;
using Tall = FusedTile<128, 64, 8>;
using Large = FusedTile<128, 128, 8>;

// A row of kernels.inc, and the tiles it has code for: of the smallest come the most blocks and the smallest boxes.
template <Dataflow kDataflow, int kTaps, int kStride, bool kPixelsInner, class Smallest, class... Larger>
struct Fused {
  struct Choice {
    FusedPlan plan;
    void (*launch)(const FusedPlan&, const Runtime&);
  };

  template <class F, class Tile>
  static void launch_plan(const FusedPlan& plan, const Runtime& runtime) {
    cuda::launch("fused_forward", fused_forward<F, Tile, kTaps, kStride, kPixelsInner>, plan.blocks, Tile::kThreads,
                 plan.shared_bytes, runtime, plan.parameters);
  }
  template <class F, class Tile>
  static Choice choice(const SeparableProblem& p, const Machine& machine) {
    constexpr FusedShape kShape{Tile::kPixels,   Tile::kOutputs,     kResident<F, Tile, kTaps, kStride, kPixelsInner>,
                                Tile::kMapBytes, Tile::kWeightBytes, Tile::kSumBytes};
    return {plan_fused(p, kShape, kPixelsInner, kDataflow, machine), launch_plan<F, Tile>};
  }
  template <class F>
  static Choice best(const SeparableProblem& p, const Machine& machine) {
    Choice best = choice<F, Smallest>(p, machine);
    const auto consider = [&](const Choice& other) {
      if (other.plan.us() < best.plan.us()) best = other;
    };
    (consider(choice<F, Larger>(p, machine)), ...);
    return best;
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
    const int64_t tiles = ceil_div(p.pointwise.out_channels, Smallest::kOutputs);
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

template <Dataflow kDataflow, int kTaps, int kStride, bool kPixelsInner, class... Tiles>
constexpr Kernel<SeparableProblem> kernel_of_fused() {
  using Row = Fused<kDataflow, kTaps, kStride, kPixelsInner, Tiles...>;
  return {.can_run = Row::can_run,
          .workspace_bytes = [](const SeparableProblem&, int) -> size_t { return 0; },
          .launch = Row::launch,
          .least_sm = least_sm_of,
          .estimate_us = Row::estimate_us};
}

}  // namespace dsconv::cuda

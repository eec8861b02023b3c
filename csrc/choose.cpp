#include "choose.h"

#include <algorithm>
#include <cmath>

namespace dsconv {

// The implementations live in objects compiled for their target; only their addresses are known here.
#define DSCONV_DECLARE_CPU(isa)                                                                \
  namespace cpu::isa {                                                                         \
  extern const Kernel<DepthwiseProblem> rows_forward, rows_grad_input, rows_grad_weight;       \
  extern const Kernel<DepthwiseProblem> planes_forward, planes_grad_input, planes_grad_weight; \
  extern const Kernel<DepthwiseProblem> lines_forward, lines_grad_input;                       \
  extern const Kernel<DepthwiseProblem> flat_mask, rows_mask;                                  \
  extern const Kernel<PointwiseProblem> gemm_forward, gemm_grad_weight;                        \
  extern const Kernel<SeparableProblem> fused_forward;                                         \
  extern const Packer<DepthwiseProblem> rows_packer;                                           \
  extern const Packer<PointwiseProblem> panel_packer;                                          \
  }
DSCONV_DECLARE_CPU(avx512)
DSCONV_DECLARE_CPU(avx2)
DSCONV_DECLARE_CPU(portable)
#undef DSCONV_DECLARE_CPU
namespace cpu::avx512 {
extern const Kernel<DepthwiseProblem> narrow_planes_forward, narrow_planes_grad_input;
// With AMX or AVX512-BF16:
extern const Kernel<DepthwiseProblem> paired_rows_forward, paired_rows_grad_input;
extern const Kernel<PointwiseProblem> tiles_forward, pairs_forward;
extern const Kernel<SeparableProblem> fused_tiles_forward, fused_pairs_forward;
extern const Packer<PointwiseProblem> bf16_packer;
}  // namespace cpu::avx512
namespace cpu::reference {
extern const Kernel<DepthwiseProblem> depthwise_forward, depthwise_grad_input, depthwise_grad_weight, depthwise_mask;
extern const Kernel<PointwiseProblem> pointwise_forward, pointwise_grad_weight;
}  // namespace cpu::reference
namespace cuda {
extern const Kernel<DepthwiseProblem> direct_forward;
extern const Kernel<DepthwiseProblem> nhwc_wide_k3s1, nhwc_wide_k3s2, nhwc_wide_k5s1, nhwc_wide_k5s2, nhwc_wide_k7s1,
    nhwc_wide_k7s2, nhwc_wide_kanys1, nhwc_wide_kanys2;
extern const Kernel<DepthwiseProblem> nhwc_narrow_kanys1, nhwc_narrow_kanys2;
extern const Kernel<DepthwiseProblem> nchw_k3s1, nchw_k3s2, nchw_k5s1, nchw_k5s2, nchw_k7s1, nchw_k7s2, nchw_kanys1,
    nchw_kanys2;
extern const Kernel<SeparableProblem> fused_nhwc_k3s1, fused_nhwc_k3s2, fused_nhwc_k5s1, fused_nhwc_k5s2,
    fused_nhwc_k7s1, fused_nhwc_kany, fused_nchw_k3s1, fused_nchw_k3s2, fused_nchw_kany;
extern const Kernel<SeparableProblem> resident_nhwc_k3s1, resident_nhwc_k3s2, resident_nhwc_k5s1, resident_nhwc_k5s2,
    resident_nhwc_k7s1, resident_nhwc_kany, resident_nchw_k3s1, resident_nchw_k3s2, resident_nchw_kany;
}  // namespace cuda

const std::vector<Row>& kernel_table() {
  static const std::vector<Row> table = {
#define DSCONV_KERNEL(pass, name, target, efficiency, implementation) \
  Row{Pass::pass, #name, Target::target, efficiency, &implementation},
#include "kernels.inc"
#undef DSCONV_KERNEL
  };
  return table;
}

namespace {

// The instruction set whose kernels, and whose packed weights, a problem takes: those above AVX-512 multiply bfloat16 alone.
Target packing_target(const DepthwiseProblem&, Target target) { return std::min(target, Target::avx512); }
Target packing_target(const PointwiseProblem& p, Target target) {
  return p.dtype == DType::bf16 ? target : std::min(target, Target::avx512);
}
Target packing_target(const SeparableProblem& p, Target target) { return packing_target(p.pointwise, target); }

}  // namespace

template <>
const Packer<DepthwiseProblem>& packer_of(const DepthwiseProblem& p, Target target) {
  target = packing_target(p, target);
#if DSCONV_X86
  if (target == Target::avx512) return cpu::avx512::rows_packer;
  if (target == Target::avx2) return cpu::avx2::rows_packer;
#endif
  return cpu::portable::rows_packer;
}
template <>
const Packer<PointwiseProblem>& packer_of(const PointwiseProblem& p, Target target) {
  target = packing_target(p, target);
#if DSCONV_X86
  if (target > Target::avx512) return cpu::avx512::bf16_packer;
  if (target == Target::avx512) return cpu::avx512::panel_packer;
  if (target == Target::avx2) return cpu::avx2::panel_packer;
#endif
  return cpu::portable::panel_packer;
}

const char* name_of(Pass pass) {
  static constexpr const char* kNames[] = {"depthwise_fwd", "depthwise_dgrad", "depthwise_wgrad", "mask",
                                           "pointwise_fwd", "pointwise_wgrad", "separable_fwd"};
  return kNames[static_cast<int>(pass)];
}
const char* name_of(Target target) {
  static constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512bf16", "amx", "cuda"};
  return kNames[static_cast<int>(target)];
}
const char* name_of(DType dtype) {
  static constexpr const char* kNames[] = {"float64", "float32", "bfloat16", "float16"};
  return kNames[static_cast<int>(dtype)];
}

namespace {

// Work and traffic of a problem. Bytes count every tensor once.
struct Cost {
  double flops, bytes;
};

Cost cost_of(const DepthwiseProblem& p) {
  const double outputs = numel(p.batch, p.channels * p.multiplier, p.window.out),
               inputs = numel(p.batch, p.channels, p.window.in);
  return {2 * outputs * product(p.window.taps), (outputs + inputs) * element_size(p.dtype)};
}
Cost cost_of(const PointwiseProblem& p) {
  const double positions = p.batch * product(p.size);
  const double values = positions * (p.in_channels + p.out_channels) + double(p.in_channels) * p.out_channels;
  return {2 * positions * p.in_channels * p.out_channels, values * element_size(p.dtype)};
}

DType dtype_of(const DepthwiseProblem& p) { return p.dtype; }
DType dtype_of(const PointwiseProblem& p) { return p.dtype; }
DType dtype_of(const SeparableProblem& p) { return p.depthwise.dtype; }

// What a row reaches of its instruction set's peak on a problem.
template <class Problem>
double efficiency_of(const Row& row, const Problem& problem) {
  const auto part = kernel_of<Problem>(row).part;
  return row.efficiency * (part ? part(problem) : 1);
}

template <class Problem>
double time_us(const Cost& cost, const Row& row, const Problem& problem, const Machine& machine) {
  // Vectors of half the width halve the rate; fp64 halves it again.
  const auto width = [](Target target) { return static_cast<int>(std::min(target, Target::avx512)); };
  const int steps = machine.target == Target::cuda ? 0 : width(machine.target) - width(row.target);
  const double rate =
      machine.peak_gflops * efficiency_of(row, problem) / (1 << steps) / (dtype_of(problem) == DType::f64 ? 2 : 1);
  const double bandwidth = cost.bytes > machine.cache_bytes ? machine.memory_gbs : machine.cache_gbs;
  // The sum, not the larger: of two rows that wait for the same memory the one with less arithmetic is the better.
  return (cost.flops / rate + cost.bytes / bandwidth) * 1e-3;
}

// Threads per multiprocessor that keep it busy: each has several loads under way.
constexpr double kBusyThreads = 256;

// The part of a GPU that a launch of the row keeps busy. A row with less work in each thread is then the faster one.
template <class Problem>
double busy_part(const Row& row, const Problem& problem, const Machine& machine) {
  const auto threads = kernel_of<Problem>(row).threads;
  if (!threads || machine.multiprocessors == 0) return 1;
  return std::min(1.0, threads(problem) / (kBusyThreads * machine.multiprocessors));
}

template <class Problem>
const char* why_not(const Row& row, const Problem& problem, const Machine& machine) {
  if ((row.target == Target::cuda) != (machine.target == Target::cuda)) return "runs on another device";
  if (row.target == Target::cuda) {
    if (!machine.sm) return "the library holds no code for this GPU";
    const auto least_sm = kernel_of<Problem>(row).least_sm;
    return least_sm && least_sm(problem) > machine.sm ? "the GPU has no tensor cores for this dtype" : nullptr;
  }
  return row.target > machine.target ? "the processor, or DSCONV_CPU_ISA, does not allow its instruction set" : nullptr;
}

const DepthwiseProblem& with_packed(const DepthwiseProblem& p) { return p; }
const PointwiseProblem& with_packed(const PointwiseProblem& p) { return p; }
const DepthwiseProblem& with_packed(const SeparableProblem& p) { return p.depthwise; }

// Weights that are there in packed form alone were packed for the best instruction set that the machine has for them.
template <class Problem>
const char* why_not_packed(const Row& row, const Problem& problem, const Machine& machine) {
  const auto& p = with_packed(problem);
  if (!p.packed || p.weight.data) return nullptr;
  const bool reads_them = kernel_of<Problem>(row).reads_packed &&
                          packing_target(problem, row.target) == packing_target(problem, machine.target);
  return reads_them ? nullptr : "the weights are packed, and not for it";
}

// PyTorch's matrix product, the second stage of the unfused way on a GPU, which has no pointwise rows: at this part of
// the tensor cores' rate or as fast as the memory, whichever takes longer. Its tiles, and the parts it cuts their sums
// into, may leave multiprocessors idle. And what each launch costs.
constexpr double kMatmulEfficiency = 0.7, kLaunchUs = 2;
constexpr int64_t kMatmulTile = 64, kMatmulParts = 4;

double matmul_us(const PointwiseProblem& p, const Machine& machine) {
  const Cost cost = cost_of(p);
  const int64_t blocks = ceil_div(p.batch * product(p.size), kMatmulTile) * ceil_div(p.out_channels, kMatmulTile);
  const double busy = std::min(1.0, double(kMatmulParts * blocks) / std::max(1, machine.multiprocessors));
  const double rate = machine.peak_gflops * product_rate(p, machine) * kMatmulEfficiency * busy;
  const double bandwidth = cost.bytes > machine.cache_bytes ? machine.memory_gbs : machine.cache_gbs;
  return std::max(cost.flops / rate, cost.bytes / bandwidth) * 1e-3;
}

bool is_preferred(const Row& row, const Preferred& preferred) {
  return std::find(preferred.begin(), preferred.end(), row.name) != preferred.end();
}

}  // namespace

double estimate_us(const Row& row, const DepthwiseProblem& p, const Machine& machine) {
  return time_us(cost_of(p), row, p, machine) / busy_part(row, p, machine);
}
double estimate_us(const Row& row, const PointwiseProblem& p, const Machine& machine) {
  return time_us(cost_of(p), row, p, machine);
}
double estimate_us(const Row& row, const SeparableProblem& p, const Machine& machine) {
  const auto own = kernel_of<SeparableProblem>(row).estimate_us;
  if (own) return own(p, machine, row.efficiency);
  // The map stays in the cache.
  const Cost depthwise = cost_of(p.depthwise), pointwise = cost_of(p.pointwise);
  const double map =
      2.0 * numel(p.pointwise.batch, p.pointwise.in_channels, p.pointwise.size) * element_size(p.depthwise.dtype);
  return time_us({depthwise.flops + pointwise.flops, depthwise.bytes + pointwise.bytes - map}, row, p, machine) /
         busy_part(row, p, machine);
}

template <class Problem>
const Row* choose(Pass pass, const Problem& problem, const Machine& machine, const Preferred& preferred,
                  std::vector<Candidate>* candidates) {
  const Row* best = nullptr;
  double best_us = 0;
  for (const Row& row : kernel_table()) {
    if (row.pass != pass) continue;
    const char* reason = why_not(row, problem, machine);
    if (!reason) reason = why_not_packed(row, problem, machine);
    if (!reason) reason = kernel_of<Problem>(row).can_run(problem);
    double us = reason ? 0 : estimate_us(row, problem, machine);
    if (std::isinf(us)) {
      reason = "the GPU has no room for a block";
      us = 0;
    }
    if (candidates) candidates->push_back({row.name, us, reason});
    if (reason) continue;
    if (!preferred.empty() && is_preferred(row, preferred)) us = -1;
    if (!best || us < best_us) {
      best = &row;
      best_us = us;
    }
  }
  return best;
}

template const Row* choose(Pass, const DepthwiseProblem&, const Machine&, const Preferred&, std::vector<Candidate>*);
template const Row* choose(Pass, const PointwiseProblem&, const Machine&, const Preferred&, std::vector<Candidate>*);
template const Row* choose(Pass, const SeparableProblem&, const Machine&, const Preferred&, std::vector<Candidate>*);

SeparableChoice choose_separable(const SeparableProblem& p, Fuse fuse, const Machine& machine,
                                 const Preferred& preferred, std::vector<Candidate>* candidates) {
  SeparableChoice choice{choose(Pass::separable_fwd, p, machine, preferred, candidates), nullptr, nullptr};
  std::vector<Candidate> parts;
  if (!choice.fused || fuse != Fuse::always || candidates) {
    choice.depthwise = choose(Pass::depthwise_fwd, p.depthwise, machine, preferred);
    choice.pointwise = choose(Pass::pointwise_fwd, p.pointwise, machine, preferred);
  }
  const bool on_gpu = machine.target == Target::cuda, separate = choice.depthwise && (choice.pointwise || on_gpu);
  double separate_us = 0;
  if (separate) {
    const double second =
        on_gpu ? matmul_us(p.pointwise, machine) + kLaunchUs : estimate_us(*choice.pointwise, p.pointwise, machine);
    separate_us = estimate_us(*choice.depthwise, p.depthwise, machine) + second;
  }
  if (candidates) {
    const std::string name =
        separate ? std::string(choice.depthwise->name) + " + " + (on_gpu ? "matmul" : choice.pointwise->name)
                 : "unfused";
    candidates->push_back({name, separate_us, separate ? nullptr : "no row for one of the two passes"});
  }
  if (!choice.fused || !separate || fuse == Fuse::always) return choice;
  const bool forced =
      is_preferred(*choice.depthwise, preferred) || (choice.pointwise && is_preferred(*choice.pointwise, preferred));
  const bool keep =
      is_preferred(*choice.fused, preferred) || (!forced && estimate_us(*choice.fused, p, machine) <= separate_us);
  if (fuse == Fuse::never || !keep) choice.fused = nullptr;
  return choice;
}

}  // namespace dsconv

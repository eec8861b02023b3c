// Which row of kernels.inc runs: legality and estimated cost of every row, from the problem and a description of the
// machine. Pure: no torch, no hardware is asked, so tests choose for machines they do not have.
#pragma once

#include <string>
#include <variant>
#include <vector>

#include "geometry.h"
#include "problem.h"

namespace dsconv {

enum class Pass : uint8_t {
  depthwise_fwd,
  depthwise_dgrad,
  depthwise_wgrad,
  mask,
  pointwise_fwd,
  pointwise_wgrad,
  separable_fwd
};

// Instruction sets in ascending order, then devices. avx512bf16: AVX-512 that multiplies pairs of bfloat16, two
// multiply-adds in the time of one; amx: with tiles of them.
enum class Target : uint8_t { portable, avx2, avx512, avx512bf16, amx, cuda };

// The machine a problem runs on. Bandwidths and peaks are rough: they order rows, nothing more.
struct Machine {
  Target target;             // the best instruction set allowed, or cuda
  int sm;                    // compute capability times ten; 0 on a CPU, and on a GPU the library holds no code for
  double peak_gflops;        // fp32 multiply-adds of one core (CPU, best instruction set) or of the device
  double cache_gbs;          // one core's L2, or the device's L2
  double memory_gbs;         // beyond the caches
  int64_t cache_bytes;       // what stays in the cache between two passes
  int multiprocessors = 0;   // of a GPU
  int64_t shared_bytes = 0;  // of a multiprocessor
};

// Multiply-adds that a GPU does in a matrix product while its CUDA cores do one: of half types, and of float32 that may
// be rounded to tf32, on tensor cores as mma.sync drives them.
inline double product_rate(const PointwiseProblem& p, const Machine& machine) {
  const double half = machine.sm == 80 ? 16 : machine.sm == 75 || machine.sm == 90 || machine.sm == 100 ? 8 : 4;
  switch (p.dtype) {
    case DType::f16: return half;
    case DType::bf16: return machine.sm >= 80 ? half : 1;
    case DType::f32: return p.allow_tf32 && machine.sm >= 80 ? half / 2 : 1;
    default: return 1;
  }
}

struct Row {
  Pass pass;
  const char* name;
  Target target;
  double efficiency;
  std::variant<const Kernel<DepthwiseProblem>*, const Kernel<PointwiseProblem>*, const Kernel<SeparableProblem>*>
      kernel;
};

const std::vector<Row>& kernel_table();
// Of the kernels for a problem that have this instruction set, or the next lower one that has any of their own.
template <class Problem>
const Packer<Problem>& packer_of(const Problem& problem, Target target);
const char* name_of(Pass pass);
const char* name_of(Target target);
const char* name_of(DType dtype);

// One row considered: its estimate, or why it cannot run.
struct Candidate {
  std::string name;
  double estimate_us;
  const char* reason;
};

// Row names that are taken whenever they can run.
using Preferred = std::vector<std::string>;

// The legal row with the lowest estimate, or null. `candidates`, when given, receives every row of the pass.
template <class Problem>
const Row* choose(Pass pass, const Problem& problem, const Machine& machine, const Preferred& preferred,
                  std::vector<Candidate>* candidates = nullptr);

double estimate_us(const Row& row, const DepthwiseProblem& problem, const Machine& machine);
double estimate_us(const Row& row, const PointwiseProblem& problem, const Machine& machine);
double estimate_us(const Row& row, const SeparableProblem& problem, const Machine& machine);

enum class Fuse : uint8_t { automatic, always, never };

// The rows of a separable forward: `fused` alone, or `depthwise` then `pointwise` when `fused` is null.
struct SeparableChoice {
  const Row* fused;
  const Row* depthwise;
  const Row* pointwise;
};
SeparableChoice choose_separable(const SeparableProblem& problem, Fuse fuse, const Machine& machine,
                                 const Preferred& preferred, std::vector<Candidate>* candidates = nullptr);

template <class Problem>
const Kernel<Problem>& kernel_of(const Row& row) {
  return *std::get<const Kernel<Problem>*>(row.kernel);
}

}  // namespace dsconv

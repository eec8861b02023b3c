// What the operators share: tensors to views, allocation, the choice of a row and its launch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "checks.h"
#include "choose.h"

namespace dsconv {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using IntList = std::vector<int64_t>;

DType dtype_of(const char* argument, const Tensor& t);

// The [N, C, D, H, W] view of a tensor of rank 3 to 5; a 1-d tensor (a bias) puts its stride first.
View view_of(const Tensor& t);
View view_of(const OptionalTensor& t);

// Checks dtype, device and sizes against x; sizes of -1 are free. An absent optional passes.
void check_like(const char* argument, const Tensor& t, const Tensor& x, const IntList& sizes);
void check_like(const char* argument, const OptionalTensor& t, const Tensor& x, const IntList& sizes);

// [N, channels, spatial] like x: channels_last when x has more than one channel and its channel stride is 1, else
// contiguous. `source` is what it will be computed from, if not x (take_memory).
Tensor empty_output(const Tensor& x, int64_t channels, const int64_t* spatial, const Tensor* source = nullptr);
Tensor empty_bytes(const Tensor& x, int64_t bytes);

// The spatial sizes of window.out as a tensor of x's rank has them.
inline const int64_t* spatial_of(const Tensor& x, const int64_t (&size)[3]) { return size + 5 - x.dim(); }

// Output channels of a depthwise problem, elements of its output.
inline int64_t channels_of(const DepthwiseProblem& p) { return p.channels * p.multiplier; }

// The machine behind x's device, and whether this library holds code for it.
const Machine& machine_of(const Tensor& x);
inline bool has_kernels(const Tensor& x) { return x.is_cpu() || machine_of(x).sm > 0; }

// Chooses the row of a pass and runs it on x's device and current stream. `op` names the operator in explanations.
void run(const char* op, Pass pass, const DepthwiseProblem& problem, const Tensor& x);
void run(const char* op, Pass pass, const PointwiseProblem& problem, const Tensor& x);

// Runs a row that was chosen already.
template <class Problem>
void launch(const Row& row, const Problem& problem, const Tensor& x);

const Preferred& preferred_rows();

// Explanations: while recording, every choice leaves an entry.
bool recording();
void record(const char* op, Pass pass, const std::string& problem, const std::string& chosen,
            const std::vector<Candidate>& candidates);
std::string describe(const DepthwiseProblem& problem);
std::string describe(const PointwiseProblem& problem);
std::string describe(const SeparableProblem& problem);

}  // namespace dsconv

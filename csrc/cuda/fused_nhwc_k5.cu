#include "cuda/fused_rows.cuh"

namespace dsconv::cuda {

extern const Kernel<SeparableProblem> fused_nhwc_k5s1 = kernel_of_fused<Dataflow::accumulators, 5, 1, false, 128>();
extern const Kernel<SeparableProblem> resident_nhwc_k5s1 = kernel_of_fused<Dataflow::resident, 5, 1, false, 128>();
extern const Kernel<SeparableProblem> fused_nhwc_k5s2 = kernel_of_fused<Dataflow::accumulators, 5, 2, false, 64>();
extern const Kernel<SeparableProblem> resident_nhwc_k5s2 = kernel_of_fused<Dataflow::resident, 5, 2, false, 64>();

}  // namespace dsconv::cuda

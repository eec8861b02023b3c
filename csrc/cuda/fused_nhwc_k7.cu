#include "cuda/fused_rows.cuh"

namespace dsconv::cuda {

extern const Kernel<SeparableProblem> fused_nhwc_k7s1 = kernel_of_fused<Dataflow::accumulators, 7, 1, false, 128>();
extern const Kernel<SeparableProblem> resident_nhwc_k7s1 = kernel_of_fused<Dataflow::resident, 7, 1, false, 128>();

}  // namespace dsconv::cuda

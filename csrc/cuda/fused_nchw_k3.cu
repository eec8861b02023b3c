#include "cuda/fused_rows.cuh"

namespace dsconv::cuda {

extern const Kernel<SeparableProblem> fused_nchw_k3s1 = kernel_of_fused<Dataflow::accumulators, 3, 1, true, 128>();
extern const Kernel<SeparableProblem> resident_nchw_k3s1 = kernel_of_fused<Dataflow::resident, 3, 1, true, 128>();
extern const Kernel<SeparableProblem> fused_nchw_k3s2 = kernel_of_fused<Dataflow::accumulators, 3, 2, true, 64>();
extern const Kernel<SeparableProblem> resident_nchw_k3s2 = kernel_of_fused<Dataflow::resident, 3, 2, true, 64>();

}  // namespace dsconv::cuda

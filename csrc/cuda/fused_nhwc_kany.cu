#include "cuda/fused_rows.cuh"

namespace dsconv::cuda {

extern const Kernel<SeparableProblem> fused_nhwc_kany = kernel_of_fused<Dataflow::accumulators, 0, 0, false, 64>();
extern const Kernel<SeparableProblem> resident_nhwc_kany = kernel_of_fused<Dataflow::resident, 0, 0, false, 64>();

}  // namespace dsconv::cuda

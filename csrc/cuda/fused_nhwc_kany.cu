#include "cuda/fused_rows.cuh"

namespace dsconv::cuda {

extern const Kernel<SeparableProblem> fused_nhwc_kany =
    kernel_of_fused<Dataflow::accumulators, 0, 0, false, Tiny, Small>();
extern const Kernel<SeparableProblem> resident_nhwc_kany =
    kernel_of_fused<Dataflow::resident, 0, 0, false, Tiny, Small>();

}  // namespace dsconv::cuda

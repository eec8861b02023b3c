#include "cuda/fused_rows.cuh"

namespace dsconv::cuda {

extern const Kernel<SeparableProblem> fused_nhwc_k3s1 =
    kernel_of_fused<Dataflow::accumulators, 3, 1, false, Tiny, Small, Tall, Large>();
extern const Kernel<SeparableProblem> resident_nhwc_k3s1 =
    kernel_of_fused<Dataflow::resident, 3, 1, false, Tiny, Small, Tall, Large>();
extern const Kernel<SeparableProblem> fused_nhwc_k3s2 =
    kernel_of_fused<Dataflow::accumulators, 3, 2, false, Tiny, Small, Tall, Large>();
extern const Kernel<SeparableProblem> resident_nhwc_k3s2 =
    kernel_of_fused<Dataflow::resident, 3, 2, false, Tiny, Small, Tall, Large>();

}  // namespace dsconv::cuda

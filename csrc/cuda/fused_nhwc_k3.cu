#include "cuda/fused_rows.cuh"

namespace dsconv::cuda {

extern const Kernel<SeparableProblem> fused_nhwc_k3s1 = kernel_of_fused<3, 1, false, Small, Large>();
extern const Kernel<SeparableProblem> fused_nhwc_k3s2 = kernel_of_fused<3, 2, false, Small, Large>();

}  // namespace dsconv::cuda

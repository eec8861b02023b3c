#include "cuda/fused_rows.cuh"

namespace dsconv::cuda {

extern const Kernel<SeparableProblem> fused_nhwc_k5s1 = kernel_of_fused<5, 1, false>();
extern const Kernel<SeparableProblem> fused_nhwc_k5s2 = kernel_of_fused<5, 2, false>();

}  // namespace dsconv::cuda

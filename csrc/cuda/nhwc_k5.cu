#include "cuda/depthwise_nhwc.cuh"

namespace dsconv::cuda {

extern const Kernel<DepthwiseProblem> nhwc_wide_k5s1 = kernel_of_rows<Nhwc<true, 5, 1>>();
extern const Kernel<DepthwiseProblem> nhwc_wide_k5s2 = kernel_of_rows<Nhwc<true, 5, 2>>();
extern const Kernel<DepthwiseProblem> nhwc_narrow_k5s1 = kernel_of_rows<Nhwc<false, 5, 1>>();
extern const Kernel<DepthwiseProblem> nhwc_narrow_k5s2 = kernel_of_rows<Nhwc<false, 5, 2>>();

}  // namespace dsconv::cuda

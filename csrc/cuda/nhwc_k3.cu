#include "cuda/depthwise_nhwc.cuh"

namespace dsconv::cuda {

extern const Kernel<DepthwiseProblem> nhwc_wide_k3s1 = kernel_of_rows<Nhwc<true, 3, 1>>();
extern const Kernel<DepthwiseProblem> nhwc_wide_k3s2 = kernel_of_rows<Nhwc<true, 3, 2>>();
extern const Kernel<DepthwiseProblem> nhwc_narrow_k3s1 = kernel_of_rows<Nhwc<false, 3, 1>>();
extern const Kernel<DepthwiseProblem> nhwc_narrow_k3s2 = kernel_of_rows<Nhwc<false, 3, 2>>();

}  // namespace dsconv::cuda

#include "cuda/depthwise_nhwc.cuh"

namespace dsconv::cuda {

extern const Kernel<DepthwiseProblem> nhwc_wide_k5s1 = kernel_of_rows<Nhwc<true, 5, 1>>();

}  // namespace dsconv::cuda

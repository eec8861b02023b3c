#include "cuda/depthwise_nhwc.cuh"

namespace dsconv::cuda {

extern const Kernel<DepthwiseProblem> nhwc_wide_k5s2 = kernel_of_rows<Nhwc<true, 5, 2>>();

}  // namespace dsconv::cuda

#include "cuda/depthwise_nhwc.cuh"

namespace dsconv::cuda {

extern const Kernel<DepthwiseProblem> nhwc_wide_k3s1 = kernel_of_rows<Nhwc<true, 3, 1>>();

}  // namespace dsconv::cuda

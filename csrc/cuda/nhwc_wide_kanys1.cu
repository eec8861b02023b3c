#include "cuda/depthwise_nhwc.cuh"

namespace dsconv::cuda {

extern const Kernel<DepthwiseProblem> nhwc_wide_kanys1 = kernel_of_rows<Nhwc<true, kAnyTaps, 1>>();

}  // namespace dsconv::cuda

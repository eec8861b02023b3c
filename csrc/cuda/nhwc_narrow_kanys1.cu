#include "cuda/depthwise_nhwc.cuh"

namespace dsconv::cuda {

extern const Kernel<DepthwiseProblem> nhwc_narrow_kanys1 = kernel_of_rows<Nhwc<false, kAnyTaps, 1>>();

}  // namespace dsconv::cuda

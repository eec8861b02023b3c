#include "cuda/depthwise_nhwc.cuh"

namespace dsconv::cuda {

extern const Kernel<DepthwiseProblem> nhwc_wide_kanys2 = kernel_of_rows<Nhwc<true, kAnyTaps, 2>>();

}  // namespace dsconv::cuda

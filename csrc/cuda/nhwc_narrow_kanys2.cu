#include "cuda/depthwise_nhwc.cuh"

namespace dsconv::cuda {

extern const Kernel<DepthwiseProblem> nhwc_narrow_kanys2 = kernel_of_rows<Nhwc<false, kAnyTaps, 2>>();

}  // namespace dsconv::cuda

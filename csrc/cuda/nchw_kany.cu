#include "cuda/depthwise_nchw_any.cuh"

namespace dsconv::cuda {

extern const Kernel<DepthwiseProblem> nchw_kanys1 = kernel_of_rows<NchwAnyRow<1>>();
extern const Kernel<DepthwiseProblem> nchw_kanys2 = kernel_of_rows<NchwAnyRow<2>>();

}  // namespace dsconv::cuda

#include "cuda/depthwise_nchw.cuh"

namespace dsconv::cuda {

extern const Kernel<DepthwiseProblem> nchw_k3s1 = kernel_of_rows<Nchw<3, 1>>();
extern const Kernel<DepthwiseProblem> nchw_k3s2 = kernel_of_rows<Nchw<3, 2>>();

}  // namespace dsconv::cuda

#include "cuda/depthwise_nchw.cuh"

namespace dsconv::cuda {

extern const Kernel<DepthwiseProblem> nchw_k7s1 = kernel_of_rows<Nchw<7, 1>>();
extern const Kernel<DepthwiseProblem> nchw_k7s2 = kernel_of_rows<Nchw<7, 2>>();

}  // namespace dsconv::cuda

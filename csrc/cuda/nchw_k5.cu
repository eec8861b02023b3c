#include "cuda/depthwise_nchw.cuh"

namespace dsconv::cuda {

extern const Kernel<DepthwiseProblem> nchw_k5s1 = kernel_of_rows<Nchw<5, 1>>();
extern const Kernel<DepthwiseProblem> nchw_k5s2 = kernel_of_rows<Nchw<5, 2>>();

}  // namespace dsconv::cuda

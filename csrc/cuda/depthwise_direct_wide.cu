// Offsets of 64 bits.
#include "cuda/depthwise_direct.cuh"

namespace dsconv::cuda {

template void launch_direct<int64_t>(const DepthwiseProblem&, const Runtime&);

}  // namespace dsconv::cuda

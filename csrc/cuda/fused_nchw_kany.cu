#include "cuda/fused_rows.cuh"

namespace dsconv::cuda {

extern const Kernel<SeparableProblem> fused_nchw_kany = kernel_of_fused<0, 0, true, Tiny, Small>();

}  // namespace dsconv::cuda

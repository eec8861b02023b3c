#define DSCONV_ISA avx2
#define DSCONV_VECTOR_BYTES 32

#include "cpu/depthwise_tiled.h"

namespace dsconv::cpu::avx2 {

extern const Kernel<DepthwiseProblem> tiled_forward = kernel_of<DepthwiseProblem, Forward>();
extern const Kernel<DepthwiseProblem> tiled_grad_input = kernel_of<DepthwiseProblem, GradInput>();
extern const Kernel<DepthwiseProblem> tiled_grad_weight = kernel_of<DepthwiseProblem, GradWeight>();
extern const Kernel<DepthwiseProblem> tiled_mask = kernel_of<DepthwiseProblem, Mask>();

}  // namespace dsconv::cpu::avx2

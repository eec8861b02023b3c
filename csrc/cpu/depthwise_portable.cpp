#define DSCONV_ISA portable
#define DSCONV_VECTOR_BYTES 16

#include "cpu/depthwise_tiled.h"

namespace dsconv::cpu::portable {

extern const Kernel<DepthwiseProblem> tiled_forward = kernel_of<DepthwiseProblem, Forward>();
extern const Kernel<DepthwiseProblem> tiled_grad_input = kernel_of<DepthwiseProblem, GradInput>();
extern const Kernel<DepthwiseProblem> tiled_grad_weight = kernel_of<DepthwiseProblem, GradWeight>();
extern const Kernel<DepthwiseProblem> tiled_mask = kernel_of<DepthwiseProblem, Mask>();

}  // namespace dsconv::cpu::portable

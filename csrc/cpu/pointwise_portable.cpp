#define DSCONV_ISA portable
#define DSCONV_VECTOR_BYTES 16

#include "cpu/pointwise_gemm.h"

namespace dsconv::cpu::portable {

extern const Kernel<PointwiseProblem> gemm_forward = kernel_of<PointwiseProblem, Pointwise>();
extern const Kernel<PointwiseProblem> gemm_grad_weight = kernel_of<PointwiseProblem, PointwiseGradWeight>();
extern const Kernel<SeparableProblem> fused_forward = kernel_of<SeparableProblem, Fused>();
extern const Packer panel_packer = packer_of<PackedPanels>();

}  // namespace dsconv::cpu::portable

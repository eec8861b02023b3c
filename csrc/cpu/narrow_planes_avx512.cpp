#define DSCONV_ISA avx512
#define DSCONV_VECTOR_BYTES 64

#include "cpu/kernel_of.h"
#include "cpu/narrow_planes.h"

namespace dsconv::cpu::avx512 {

extern const Kernel<DepthwiseProblem> narrow_planes_forward =
    kernel_of<DepthwiseProblem, NarrowPlanesForward, kReadsPacked>();
extern const Kernel<DepthwiseProblem> narrow_planes_grad_input = kernel_of<DepthwiseProblem, NarrowPlanesGradInput>();

}  // namespace dsconv::cpu::avx512

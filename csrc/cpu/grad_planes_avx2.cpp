#define DSCONV_ISA avx2
#define DSCONV_VECTOR_BYTES 32

#include "cpu/grad_planes_kernels.inc"

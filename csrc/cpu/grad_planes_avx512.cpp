#define DSCONV_ISA avx512
#define DSCONV_VECTOR_BYTES 64

#include "cpu/grad_planes_kernels.inc"

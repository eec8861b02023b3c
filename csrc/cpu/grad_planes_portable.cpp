#define DSCONV_ISA portable
#define DSCONV_VECTOR_BYTES 16

#include "cpu/grad_planes_kernels.inc"

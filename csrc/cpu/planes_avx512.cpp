#define DSCONV_ISA avx512
#define DSCONV_VECTOR_BYTES 64

#include "cpu/planes_kernels.inc"

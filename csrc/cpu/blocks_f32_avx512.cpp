#define DSCONV_ISA avx512
#define DSCONV_VECTOR_BYTES 64
#define DSCONV_COMPUTE float

#include "cpu/block_kernels.inc"

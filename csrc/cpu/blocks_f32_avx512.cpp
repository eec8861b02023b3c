#define DSCONV_ISA avx512
#define DSCONV_VECTOR_BYTES 64
#define DSCONV_STORAGE float

#include "cpu/block_kernels.inc"

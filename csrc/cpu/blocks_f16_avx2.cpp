#define DSCONV_ISA avx2
#define DSCONV_VECTOR_BYTES 32
#define DSCONV_STORAGE Float16

#include "cpu/block_kernels.inc"

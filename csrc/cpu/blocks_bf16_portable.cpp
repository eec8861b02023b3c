#define DSCONV_ISA portable
#define DSCONV_VECTOR_BYTES 16
#define DSCONV_STORAGE BFloat16

#include "cpu/block_kernels.inc"

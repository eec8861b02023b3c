#define DSCONV_ISA portable
#define DSCONV_VECTOR_BYTES 16
#define DSCONV_STORAGE float

#include "cpu/block_kernels.inc"

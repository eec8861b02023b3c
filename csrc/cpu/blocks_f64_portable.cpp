#define DSCONV_ISA portable
#define DSCONV_VECTOR_BYTES 16
#define DSCONV_STORAGE double
#define DSCONV_FEW_BLOCKS  // float64 is for checking: fewer kernels compile faster

#include "cpu/block_kernels.inc"

#define DSCONV_ISA avx512
#define DSCONV_VECTOR_BYTES 64
#define DSCONV_STORAGE double
#define DSCONV_FEW_BLOCKS  // float64 is for checking: fewer kernels compile faster

#include "cpu/block_kernels.inc"

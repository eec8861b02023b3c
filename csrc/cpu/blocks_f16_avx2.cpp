#define DSCONV_ISA avx2
#define DSCONV_VECTOR_BYTES 32
#define DSCONV_STORAGE Float16
#define DSCONV_NO_GRAD_BLOCKS  // those read the compute type

#include "cpu/block_kernels.inc"

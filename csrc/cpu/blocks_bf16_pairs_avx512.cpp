#define DSCONV_ISA avx512
#define DSCONV_VECTOR_BYTES 64
#define DSCONV_STORAGE PairedBFloat16
#define DSCONV_NO_CELLS        // those take no pairs
#define DSCONV_NO_GRAD_BLOCKS  // those read the compute type

#include "cpu/block_kernels.inc"

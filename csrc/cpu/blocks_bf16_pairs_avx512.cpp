#define DSCONV_ISA avx512
#define DSCONV_VECTOR_BYTES 64
#define DSCONV_STORAGE PairedBFloat16
#define DSCONV_ONLY_ROWS  // the others take no pairs

#include "cpu/block_kernels.inc"

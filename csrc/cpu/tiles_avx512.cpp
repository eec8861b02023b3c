#define DSCONV_ISA avx512
#define DSCONV_VECTOR_BYTES 64

#include "cpu/tile_gemm.h"

namespace dsconv::cpu::DSCONV_ISA {

extern const Kernel<PointwiseProblem> tiles_forward = kernel_of<PointwiseProblem, TilePointwise, kReadsPacked>();
extern const Kernel<SeparableProblem> fused_tiles_forward = kernel_of<SeparableProblem, TileFused, kReadsPacked>();
extern const Packer<PointwiseProblem> tile_packer = packer_of<PointwiseProblem, PackedTiles>();

}  // namespace dsconv::cpu::DSCONV_ISA

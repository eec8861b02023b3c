#define DSCONV_ISA avx512
#define DSCONV_VECTOR_BYTES 64

#include "cpu/bf16_gemm.h"

namespace dsconv::cpu::DSCONV_ISA {

using Tiles = Bf16Passes<TileProduct>;
using Pairs = Bf16Passes<PairProduct, PairedBFloat16>;
extern const Kernel<PointwiseProblem> tiles_forward = kernel_of<PointwiseProblem, Tiles::Forward, kReadsPacked>();
extern const Kernel<SeparableProblem> fused_tiles_forward =
    kernel_of<SeparableProblem, Tiles::FusedForward, kReadsPacked>();
extern const Kernel<PointwiseProblem> pairs_forward = kernel_of<PointwiseProblem, Pairs::Forward, kReadsPacked>();
extern const Kernel<SeparableProblem> fused_pairs_forward =
    kernel_of<SeparableProblem, Pairs::FusedForward, kReadsPacked>();
extern const Kernel<DepthwiseProblem> paired_rows_forward = kernel_of<DepthwiseProblem, PairedForward, kReadsPacked>();
extern const Kernel<DepthwiseProblem> paired_rows_grad_input = kernel_of<DepthwiseProblem, PairedGradInput>();
extern const Packer<PointwiseProblem> bf16_packer = packer_of<PointwiseProblem, PackedBf16>();

}  // namespace dsconv::cpu::DSCONV_ISA

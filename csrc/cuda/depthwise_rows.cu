#include "cuda/depthwise_rows.cuh"

namespace dsconv::cuda {
namespace {

// The steps of pointers and columns stay below 2^30, those to positions around the map included.
bool fits(const DepthwiseProblem& p) {
  const Window& w = p.window;
  constexpr int64_t kLimit = int64_t{1} << 30;
  for (int dim : {1, 2}) {
    const int64_t reach = w.in[dim] + w.taps[dim] * w.dilation[dim] + w.pad[dim] + 16 * w.stride[dim] * w.dilation[dim];
    if (reach * p.x.stride[2 + dim] >= kLimit || w.out[dim] * w.stride[dim] + reach >= kLimit) return false;
  }
  return fits_int32(p.x, 1, p.channels, w.in) && fits_int32(p.y, 1, p.channels, w.out) &&
         numel(1, p.channels, w.out) < kLimit;
}

}  // namespace

const char* why_not_rows(const DepthwiseProblem& p, int taps, int stride) {
  const Window& w = p.window;
  if (p.dtype == DType::f64) return "float64 runs in the general kernel";
  if (p.multiplier != 1) return "the depth multiplier is not 1";
  if (w.in[0] != 1 || w.out[0] != 1 || w.taps[0] != 1) return "three spatial dimensions";
  if (taps != kAnyTaps && w.taps[2] != taps) return "another number of taps along a row";
  const int64_t down = w.out[1] == 1 ? stride : w.stride[1];  // a single row has no stride
  if (w.stride[2] != stride || down != stride) return "another stride";
  if (stride > 1 && (w.dilation[1] > 1 || w.dilation[2] > 1)) return "strided and dilated";
  if (w.taps[1] > 1 && w.taps[2] > 1 && p.weight.stride[3] != w.taps[2] * p.weight.stride[4])
    return "the taps of a filter are not evenly spaced";
  return fits(p) ? nullptr : "offsets within an image, or columns, beyond 2^30";
}

int64_t tap_stride(const DepthwiseProblem& p) { return p.weight.stride[p.window.taps[2] > 1 ? 4 : 3]; }

}  // namespace dsconv::cuda

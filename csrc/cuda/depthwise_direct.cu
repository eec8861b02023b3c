#include "cuda/depthwise_direct.cuh"

namespace dsconv::cuda {

extern template void launch_direct<int64_t>(const DepthwiseProblem&, const Runtime&);

// The bound covers one image: the offset of an image is always 64-bit. A row of threads and a padded column must fit as
// well.
static bool fits(const DepthwiseProblem& p) {
  const Window& w = p.window;
  constexpr int64_t kLimit = int64_t{1} << 30;
  return numel(1, p.channels * p.multiplier, w.out) < kLimit && max_offset(p.x, 1, 1, w.in) < kLimit &&
         (w.out[2] + kPixels) * w.stride[2] + w.taps[2] * w.dilation[2] + w.pad[2] < kLimit &&
         fits_int32(p.x, 1, p.channels, w.in) && fits_int32(p.y, 1, p.channels * p.multiplier, w.out);
}

extern const Kernel<DepthwiseProblem> direct_forward = {
    [](const DepthwiseProblem&) -> const char* { return nullptr; },
    [](const DepthwiseProblem&, int) -> size_t { return 0; },
    [](const DepthwiseProblem& p, const Runtime& runtime, void*) {
      fits(p) ? launch_direct<int32_t>(p, runtime) : launch_direct<int64_t>(p, runtime);
    },
    threads_of_direct,
};

}  // namespace dsconv::cuda

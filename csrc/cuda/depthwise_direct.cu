#include "cuda/depthwise_direct.cuh"

#include "cuda/launch.cuh"

namespace dsconv::cuda {
namespace {

int64_t threads_of(const DepthwiseProblem& p) {
  const Window& w = p.window;
  return p.batch * p.channels * p.multiplier * w.out[0] * w.out[1] * ceil_div(w.out[2], kPixels);
}

template <class S, class Index>
void launch_as(const DepthwiseProblem& p, const Runtime& runtime) {
  const int64_t blocks = min64(ceil_div(threads_of(p), kThreads), (int64_t{1} << 31) - 1);
  launch("depthwise_direct", depthwise_direct<S, Index>, blocks, kThreads, 0, runtime, p);
}

template <class S>
void launch_storage(const DepthwiseProblem& p, const Runtime& runtime) {
  // The bound covers one image: the offset of an image is always 64-bit. A row of threads and a padded column must fit
  // as well.
  const Window& w = p.window;
  const bool columns = numel(1, p.channels * p.multiplier, w.out) < (int64_t{1} << 30) &&
                       max_offset(p.x, 1, 1, w.in) < (int64_t{1} << 30) &&
                       (w.out[2] + kPixels) * w.stride[2] + w.taps[2] * w.dilation[2] + w.pad[2] < (int64_t{1} << 30);
  const bool narrow =
      columns && fits_int32(p.x, 1, p.channels, w.in) && fits_int32(p.y, 1, p.channels * p.multiplier, w.out);
  return narrow ? launch_as<S, int32_t>(p, runtime) : launch_as<S, int64_t>(p, runtime);
}

void launch_direct(const DepthwiseProblem& p, const Runtime& runtime, void*) {
  switch (p.dtype) {
    case DType::f64: return launch_storage<double>(p, runtime);
    case DType::f32: return launch_storage<float>(p, runtime);
    case DType::bf16: return launch_storage<__nv_bfloat16>(p, runtime);
    case DType::f16: return launch_storage<__half>(p, runtime);
  }
}

}  // namespace

extern const Kernel<DepthwiseProblem> direct_forward = {
    [](const DepthwiseProblem&) -> const char* { return nullptr; },
    [](const DepthwiseProblem&, int) -> size_t { return 0; },
    launch_direct,
    threads_of,
};

}  // namespace dsconv::cuda

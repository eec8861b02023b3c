// Depthwise forward of any rank, taps, stride, dilation, padding, multiplier, dtype and layout: a thread computes
// kPixels neighbouring outputs of one channel and reads its inputs through the cache. The general kernel: what
// specialised rows do not cover.
#pragma once

#include "cuda/epilogue.cuh"
#include "cuda/launch.cuh"
#include "cuda/storage.cuh"

namespace dsconv::cuda {

constexpr int kThreads = 256;
constexpr int kPixels = 4;

// Neighbouring threads take neighbouring channels of channels_last tensors, neighbouring groups of columns of others.
// Index is int32_t where every offset fits, else int64_t.
template <class S, class Index>
__global__ void __launch_bounds__(kThreads, 2) depthwise_direct(const DepthwiseProblem p) {
  using T = Compute<S>;
  const Window& w = p.window;
  const Index channels = p.channels * p.multiplier, groups = (w.out[2] + kPixels - 1) / kPixels;
  const Index inner = channels * groups;
  const bool channels_last = p.y.stride[1] == 1;
  const int64_t rows = p.batch * w.out[0] * w.out[1], total = rows * inner;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < total; i += gridDim.x * int64_t{kThreads}) {
    const int64_t row = i / inner;
    const Index at = i - row * inner;
    const Index o = channels_last ? at % channels : at / groups;
    const Index column = (channels_last ? at / channels : at % groups) * kPixels;
    const Index h = row % w.out[1], d = row / w.out[1] % w.out[0];
    const int64_t image = row / (w.out[0] * w.out[1]);
    const S* x = static_cast<const S*>(p.x.data) + image * p.x.stride[0] +
                 (o / static_cast<Index>(p.multiplier)) * p.x.stride[1];
    const S* weight = static_cast<const S*>(p.weight.data) + o * p.weight.stride[0];
    T sum[kPixels];
    const T bias = p.bias.data ? widen(static_cast<const S*>(p.bias.data)[o * p.bias.stride[0]]) : T(0);
    for (int q = 0; q < kPixels; ++q) sum[q] = bias;
    for (Index u0 = 0; u0 < w.taps[0]; ++u0) {
      const Index z = d * w.stride[0] + u0 * w.dilation[0] - w.pad[0];
      if (z < 0 || z >= w.in[0]) continue;
      for (Index u1 = 0; u1 < w.taps[1]; ++u1) {
        const Index y = h * w.stride[1] + u1 * w.dilation[1] - w.pad[1];
        if (y < 0 || y >= w.in[1]) continue;
        const S* line = x + z * static_cast<Index>(p.x.stride[2]) + y * static_cast<Index>(p.x.stride[3]);
        const S* taps = weight + u0 * p.weight.stride[2] + u1 * p.weight.stride[3];
        for (Index u2 = 0; u2 < w.taps[2]; ++u2) {
          const T tap = widen(taps[u2 * p.weight.stride[4]]);
          const Index first = column * w.stride[2] + u2 * w.dilation[2] - w.pad[2];
#pragma unroll
          for (int q = 0; q < kPixels; ++q) {
            const Index c = first + q * static_cast<Index>(w.stride[2]);
            if (c >= 0 && c < w.in[2]) sum[q] += tap * widen(line[c * static_cast<Index>(p.x.stride[4])]);
          }
        }
      }
    }
    S* y =
        static_cast<S*>(p.y.data) + image * p.y.stride[0] + o * p.y.stride[1] + d * p.y.stride[2] + h * p.y.stride[3];
    activate_values(sum, p.activation);
#pragma unroll
    for (int q = 0; q < kPixels; ++q) {
      if (column + q < w.out[2]) narrow(sum[q], y + (column + q) * p.y.stride[4]);
    }
  }
}

inline int64_t threads_of_direct(const DepthwiseProblem& p) {
  const Window& w = p.window;
  return p.batch * p.channels * p.multiplier * w.out[0] * w.out[1] * ceil_div(w.out[2], kPixels);
}

template <class Index>
void launch_direct(const DepthwiseProblem& p, const Runtime& runtime) {
  const int64_t blocks = min64(ceil_div(threads_of_direct(p), kThreads), (int64_t{1} << 31) - 1);
  const auto launch_as = [&]<class S>() {
    launch(sizeof(Index) == 4 ? "depthwise_direct" : "depthwise_direct_wide", depthwise_direct<S, Index>, blocks,
           kThreads, 0, runtime, p);
  };
  if (p.dtype == DType::f64) return launch_as.template operator()<double>();
  with_storage(p.dtype, launch_as);
}

}  // namespace dsconv::cuda

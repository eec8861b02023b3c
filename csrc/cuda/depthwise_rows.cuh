// What the channels_last and the contiguous forward kernels share: a thread's block of outputs, and the taps in shared
// memory.
//
// A thread computes kRows x kColumns outputs of V neighbouring channels. Its rows and columns lie `dilation` apart, so
// that the window is undilated within what it reads: output (r, l) and tap (u, t) meet at row r * stride + u, column
// l * stride + t. Taps along a row are unrolled, kTaps at a time; those along a column are counted at run time.
#pragma once

#include "cuda/epilogue.cuh"
#include "cuda/launch.cuh"
#include "cuda/storage.cuh"
#include "geometry.h"

namespace dsconv::cuda {

constexpr int kWarp = 32;

// Taps of a row unrolled at once: as many as a row has, or 8 of any number.
constexpr int kAnyTaps = 8;

template <int taps, int s, int columns = 4>
struct Unrolled {
  static constexpr int kTaps = taps, kStride = s;
  static constexpr bool kExact = taps != kAnyTaps;
  static constexpr int kColumns = columns;
  static constexpr int kReads = (kColumns - 1) * kStride + kTaps;  // input columns of a row of outputs
};

// One spatial dimension of a problem, in 32 bits.
struct Axis {
  int in, out, taps, dilation, pad;
  int blocks;  // of neighbouring outputs of a thread: `dilation` phases of them

  // The first of the outputs of block i; they lie `dilation` apart. Blocks of one phase, which share inputs, are
  // neighbours; those of other phases share none with them.
  DSCONV_HD int first(int i, int outputs) const {
    if (dilation == 1) return i * outputs;
    const int of_phase = blocks / dilation;
    return i / of_phase + i % of_phase * (outputs * dilation);
  }
};

inline Axis axis_of(const Window& w, int dim, int outputs) {
  const auto narrow = [](int64_t n) { return static_cast<int>(n); };
  const int64_t dilation = w.taps[dim] > 1 ? w.dilation[dim] : 1;
  const int64_t blocks = dilation * ceil_div(ceil_div(w.out[dim], dilation), outputs);
  return {narrow(w.in[dim]), narrow(w.out[dim]), narrow(w.taps[dim]),
          narrow(dilation),  narrow(w.pad[dim]), narrow(blocks)};
}

// What every row's parameters begin with: the tensors, and what ends their outputs. Steps in elements.
struct RowParameters {
  const void *x, *weight, *bias;
  void* y;
  int64_t x_image, y_image, weight_channel, weight_tap, bias_channel;
  int channels;
  DType dtype;
  ActivationSpec activation;
};

// The step from one tap of a filter to the next, rows of taps included.
int64_t tap_stride(const DepthwiseProblem& p);

// Parameters that derive from these, the rest of them zero.
template <class Parameters>
Parameters parameters_of(const DepthwiseProblem& p) {
  Parameters q{};
  q.x = p.x.data;
  q.weight = p.weight.data;
  q.bias = p.bias.data;
  q.y = p.y.data;
  q.x_image = p.x.stride[0];
  q.y_image = p.y.stride[0];
  q.weight_channel = p.weight.stride[0];
  q.weight_tap = tap_stride(p);
  q.bias_channel = p.bias.stride[0];
  q.channels = static_cast<int>(p.channels);
  q.dtype = p.dtype;
  q.activation = p.activation;
  return q;
}

// The columns that a thread reads and that exist: [first, first + count) of those 0, 1, ... it numbers.
struct Inside {
  int first, count;

  __device__ Inside(const Axis& axis, int begin) {
    const int below = begin < 0 ? (-begin + axis.dilation - 1) / axis.dilation : 0;
    const int reach = axis.in - begin;
    first = below;
    count = reach > 0 ? (reach + axis.dilation - 1) / axis.dilation - below : 0;
    if (count < 0) count = 0;
  }
  __device__ bool holds(int column) const {
    return static_cast<unsigned>(column - first) < static_cast<unsigned>(count);
  }
  __device__ bool holds_all(int columns) const { return first == 0 && count >= columns; }
};

// The outputs of a thread, and what a row of inputs adds to them.
template <class U, int kRows, int V>
struct Outputs {
  static constexpr int kPart = V < 4 ? V : 4;  // channels at a time
  float sum[kRows * U::kColumns * V];

  __device__ static constexpr int at(int row, int column) { return (row * U::kColumns + column) * V; }

  __device__ void start(const float (&bias)[V]) {
#pragma unroll
    for (int i = 0; i < kRows * U::kColumns; ++i) {
#pragma unroll
      for (int v = 0; v < V; ++v) sum[i * V + v] = bias[v];
    }
  }

  // Input row i (of kRows * stride + taps - stride) goes to the rows of outputs it belongs to. input(part, column) and
  // tap(part, u, t) are of kPart channels; exists(column) tells which columns are inside the map.
  template <class Input, class Tap, class Exists>
  __device__ void add(int i, int taps_down, int taps_across, Input input, Tap tap, Exists exists) {
#pragma unroll
    for (int part = 0; part < V / kPart; ++part) {
      float in[U::kReads][kPart];
#pragma unroll
      for (int c = 0; c < U::kReads; ++c) input(part, c, in[c]);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int u = i - r * U::kStride;
        if (u < 0 || u >= taps_down) continue;
#pragma unroll
        for (int t = 0; t < U::kTaps; ++t) {
          if (!U::kExact && t >= taps_across) break;
          float weight[kPart];
          tap(part, u, t, weight);
#pragma unroll
          for (int l = 0; l < U::kColumns; ++l) {
            if (!exists(l * U::kStride + t)) continue;
#pragma unroll
            for (int v = 0; v < kPart; ++v) sum[at(r, l) + part * kPart + v] += weight[v] * in[l * U::kStride + t][v];
          }
        }
      }
    }
  }
};

// Copies the taps of `channels` channels from channel `first` on into shared memory as floats: [tap][pitch]. A warp
// takes 8 taps of 4 channels at a time: memory has the taps of a channel together, and a pitch of 4 modulo 32 puts
// these 32 numbers into 32 banks. place(c) is where channel c lies.
template <class S, class Place>
__device__ void stage_taps(float* to, int pitch, const S* weight, int64_t channel_stride, int64_t tap_stride, int taps,
                           int channels, Place place) {
  const int octets = (taps + 7) / 8;
  for (int i = threadIdx.x; i < octets * 8 * ((channels + 3) / 4 * 4); i += blockDim.x) {
    const int warp = i / kWarp, tap = warp % octets * 8 + i % 8, c = warp / octets * 4 + i / 8 % 4;
    if (tap < taps && c < channels)
      to[tap * pitch + place(c)] = widen(__ldg(weight + c * channel_stride + tap * tap_stride));
  }
}

// What every row of this family asks of a problem: null, or the reason why not. taps of kAnyTaps are any number.
const char* why_not_rows(const DepthwiseProblem& p, int taps, int stride);

constexpr int64_t kLargestGrid = (int64_t{1} << 31) - 1;
constexpr const char* kGridTooLarge = "more blocks than a grid holds";

// Threads that fill a GPU's multiprocessors: blocks shrink until there are two for each, or a block is one warp.
inline int threads_of_block(int64_t threads, int most, int multiprocessors) {
  int block = most;
  while (block > kWarp && ceil_div(threads, block) < 2 * int64_t{multiprocessors}) block /= 2;
  return block;
}

// The Kernel of a row that has can_run, threads and launch.
template <class Row, class Problem = DepthwiseProblem>
constexpr Kernel<Problem> kernel_of_rows(int (*least_sm)(const Problem&) = nullptr) {
  return {
      Row::can_run,
      [](const Problem&, int) -> size_t { return 0; },
      [](const Problem& p, const Runtime& runtime, void*) { Row::launch(p, runtime); },
      Row::threads,
      least_sm,
  };
}

}  // namespace dsconv::cuda

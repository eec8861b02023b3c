// Depthwise forward, contiguous, undilated square filters. A lane is a column of outputs: its taps stay in registers, and
// a row of inputs serves all rows of outputs that it meets.
#pragma once

#include <utility>

#include "cuda/nchw_tile.cuh"

namespace dsconv::cuda {

// Enough rows that what a lane does once, above all fetching its taps, is little beside them; common feature maps have
// a multiple of 7, and rows that do not exist are skipped. With 7 taps and a stride of 2, 14 would not fit the registers.
template <int kTaps, int kStride>
constexpr int kRowsOf = kTaps == 7 && kStride == 2 ? 7 : 14;
// A row of a map that is not cut needs a lane for every output.
constexpr int kSquareThreads = 512;

// Taps of a plane in shared memory, in whole vectors.
template <int kTaps>
constexpr int kTapPitch = (kTaps * kTaps + 3) / 4 * 4;

template <int kTaps, int kStride>
class NchwSquare : NchwBlock<NchwParameters, kStride> {
  using Block = NchwBlock<NchwParameters, kStride>;
  using Block::p_, Block::row_, Block::column_, Block::place;
  static constexpr int kRowsOfThread = kRowsOf<kTaps, kStride>;
  static constexpr int kSpan = (kRowsOfThread - 1) * kStride + kTaps;  // rows of inputs of a thread

 public:
  __device__ NchwSquare(const NchwParameters& p, float* shared) : Block(p, shared) {}

  __device__ void load() {
    Block::load(1, p_.in.with_gaps ? kTapPitch<kTaps> : kTaps * kTaps,
                [](int, int tap) { return tap < kTaps * kTaps ? tap : -1; });
  }

  __device__ void compute() {
    const auto [plane, chunk, out_column] = this->lane();
    const int out_row = chunk * kRowsOfThread;
    const bool exists = plane < this->planes_ && out_column < p_.columns && column_ + out_column < p_.out_width;
    rows_ = exists ? p_.out_height - row_ - out_row : 0;
    if (!exists) return;
    at_ = p_.out.at(plane) + out_row * p_.out.row_pitch + out_column;
#pragma unroll
    for (float& sum : sums_) sum = this->biases_[plane];
    const int top = (row_ + out_row) * kStride - p_.pad_row, left = (column_ + out_column) * kStride - p_.pad_column;
    // Windows that lie beside the map read next to its box.
    int column = left - this->columns_of_box().begin;
    column = column < -kTaps ? -kTaps : column > p_.in.row_pitch ? p_.in.row_pitch : column;
    const int first = p_.in.at(plane) + (top - this->rows_of_box().begin) * p_.in.row_pitch + column + this->behind_;
    const float* const taps = this->taps_ + plane * kTapPitch<kTaps>;
    if (top >= 0 && top + kSpan <= p_.height) {  // the same for all lanes of a warp
      add<true>(taps, first, top, left);
    } else {
      add<false>(taps, first, top, left);
    }
    activate_values(sums_, p_.activation);
  }

  __device__ void store() { Block::store(sums_, at_, p_.out.row_pitch, rows_); }

 private:
  // What a lane does once for all of its rows.
  struct Rows {
    float taps[kTapPitch<kTaps>];
    bool exists[kTaps];                  // of its columns; what is read in the place of others is not used
    const char* line[kStride][kStride];  // of stride 2: the even and the odd columns, in even and in odd rows
    int top;
    int offset = 0, step;  // of the lines, in bytes; opaque, so that all add one uniform register
  };

  template <bool kInterior>
  __device__ void add(const float* taps, int first, int top, int left) {
    Rows lane;
#pragma unroll
    for (int i = 0; i < kTapPitch<kTaps>; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(taps + i);
      lane.taps[i] = four.x;
      lane.taps[i + 1] = four.y;
      lane.taps[i + 2] = four.z;
      lane.taps[i + 3] = four.w;
    }
#pragma unroll
    for (int t = 0; t < kTaps; ++t) lane.exists[t] = static_cast<unsigned>(left + t) < static_cast<unsigned>(p_.width);
#pragma unroll
    for (int i = 0; i < kStride; ++i) {
#pragma unroll
      for (int t = 0; t < kStride; ++t)
        lane.line[i][t] = reinterpret_cast<const char*>(place(first + i * p_.in.row_pitch + t));
    }
    lane.top = top;
    lane.step = p_.in.row_pitch * int{sizeof(float)};
    add_rows<kInterior>(std::make_integer_sequence<int, kSpan>(), lane);
  }
  template <bool kInterior, int... i>
  __device__ __forceinline__ void add_rows(std::integer_sequence<int, i...>, Rows& lane) {
    (add_row<kInterior, i>(lane), ...);
  }

  // The inputs of row i, and what they add to the rows of outputs that it meets.
  template <bool kInterior, int i>
  __device__ __forceinline__ void add_row(Rows& lane) {
    if (kInterior || static_cast<unsigned>(lane.top + i) < static_cast<unsigned>(p_.height)) {
      float in[kTaps];
#pragma unroll
      for (int t = 0; t < kTaps; ++t) {
        const char* const line = lane.line[i % kStride][t % kStride] + lane.offset;
        in[t] = reinterpret_cast<const float*>(line)[t / kStride];
      }
#pragma unroll
      for (int t = 0; t < kTaps; ++t) {
        if (!lane.exists[t]) continue;
#pragma unroll
        for (int r = 0; r < kRowsOfThread; ++r) {
          const int u = i - r * kStride;
          if (u >= 0 && u < kTaps) sums_[r] = fmaf(lane.taps[u * kTaps + t], in[t], sums_[r]);
        }
      }
    }
    if constexpr (i % kStride == kStride - 1) lane.offset = opaque(lane.offset + lane.step);
  }

  int at_ = 0, rows_;  // the outputs of the lane in their box, and how many rows of them exist
  float sums_[kRowsOfThread];
};

// One kernel for all storage types: shared memory and registers hold floats, the type matters to the streams alone.
template <int kTaps, int kStride>
__global__ void __launch_bounds__(kSquareThreads, 1) depthwise_nchw(const NchwParameters p) {
  NchwSquare<kTaps, kStride> block(p, shared_memory<float>());
  block.load();
  __syncthreads();
  block.compute();
  __syncthreads();  // the box of inputs becomes that of outputs
  block.store();
}

// A row of kernels.inc.
template <int kTaps, int kStride>
struct Nchw {
  static const char* can_run(const DepthwiseProblem& p) {
    if (const char* reason = why_not_rows(p, kTaps, kStride)) return reason;
    const Window& w = p.window;
    if (w.taps[1] != kTaps) return "another number of taps along a column";
    if (w.dilation[1] != 1 || w.dilation[2] != 1) return "dilated";
    if (const char* reason = why_not_contiguous(p)) return reason;
    return tiling(p).blocks_of(parameters(p, 1)) > kLargestGrid ? kGridTooLarge : nullptr;
  }

  static NchwTiling tiling(const DepthwiseProblem& p) {
    // The widest window behind the last column is read too.
    return {p,     kStride,        kRowsOf<kTaps, kStride>, 1, 1, 1, 1, kTapPitch<kTaps>, 16,
            kTaps, kSquareThreads, NchwTiling::kSharedBytes};
  }
  static NchwParameters parameters(const DepthwiseProblem& p, int multiprocessors) {
    const NchwTiling t = tiling(p);
    return t.grown(t.smallest(), multiprocessors);
  }
  static int64_t threads(const DepthwiseProblem& p) {
    const NchwParameters q = parameters(p, 1);
    return tiling(p).blocks_of(q) * NchwTiling::threads_of(q);
  }
  static void launch(const DepthwiseProblem& p, const Runtime& runtime) {
    const NchwParameters q = parameters(p, runtime.threads);
    cuda::launch("depthwise_nchw", depthwise_nchw<kTaps, kStride>, tiling(p).blocks_of(q), NchwTiling::threads_of(q),
                 NchwTiling::shared_bytes(q), runtime, q);
  }
};

}  // namespace dsconv::cuda

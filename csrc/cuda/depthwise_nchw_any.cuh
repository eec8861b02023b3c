// Depthwise forward, contiguous, filters of any shape and dilation. A lane computes kOutputs outputs that lie `dilation`
// apart along one axis, so that an input serves all of them that it meets: down a column, while the lanes of a warp are
// neighbouring columns, or along the row of a map that has only one. Taps are unrolled along that axis, up to kMostTaps
// at a time, and counted at run time across it.
#pragma once

#include <utility>

#include "cuda/nchw_tile.cuh"

namespace dsconv::cuda {

constexpr int kOutputs = 7;   // common feature maps have a multiple of it, and words 7 apart are in different banks
constexpr int kMostTaps = 4;  // one vector of them in registers; more make much more code for little

// The largest power of two that divides a number.
DSCONV_HD constexpr int power_of_two_in(int number) { return number & -number; }

struct NchwAnyParameters : NchwParameters {
  Axis along, across;
  int outputs;                            // of a lane, at most kOutputs: fewer where a tile would not fit otherwise
  bool is_row;                            // along a row
  int along_step, across_step, out_step;  // from one tap, or output, to the next in the boxes
  int group;                              // taps along that are unrolled at once, a vector of shared memory
  int parity_pitch, taps_across_pitch;    // of a strided filter's taps the even and the odd ones lie apart
};

template <int kStride>
class NchwAny : NchwBlock<NchwAnyParameters, kStride> {
  using Block = NchwBlock<NchwAnyParameters, kStride>;
  using Block::p_, Block::row_, Block::column_, Block::place;

 public:
  __device__ NchwAny(const NchwAnyParameters& p, float* shared) : Block(p, shared) {}

  __device__ void load() {
    Block::load(p_.is_row ? p_.across.taps : p_.along.taps, p_.is_row ? p_.along.taps : p_.across.taps,
                [&](int u, int t) {
                  const int along = p_.is_row ? t : u, across = p_.is_row ? u : t, tap = along / kStride;
                  return across * p_.taps_across_pitch + along % kStride * p_.parity_pitch +
                         tap / p_.group * kMostTaps + tap % p_.group;
                });
  }

  __device__ void compute() {
    const auto lane = this->lane();
    int row = 0, column;
    if (p_.is_row) {
      column = column_of(lane.group, lane.index);
    } else {
      row = lane.group * p_.lines + lane.index / p_.columns;
      column = lane.index % p_.columns;
    }
    const bool exists = lane.plane < this->planes_ && lane.index < p_.lanes_used;
    const int plane = exists ? lane.plane : 0;
    count_ = exists ? outputs_from(row, column) : 0;
    at_ = p_.out.at(plane) + row * p_.out.row_pitch + column;
#pragma unroll
    for (float& sum : sums_) sum = this->biases_[plane];
    const int top = (row_ + row) * kStride - p_.pad_row, left = (column_ + column) * kStride - p_.pad_column;
    const int first = p_.in.at(plane) + (top - this->rows_of_box().begin) * p_.in.row_pitch + left -
                      this->columns_of_box().begin + this->behind_;
    // The inputs of those outputs that exist; behind them the box may end.
    const Inside inside(p_.along, p_.is_row ? left : top);
    const int end = count_ == 0 ? 0 : smaller(inside.first + inside.count, (count_ - 1) * kStride + p_.along.taps);
    add(this->taps_ + plane * p_.taps_pitch, first, p_.is_row ? top : left, inside.first, end);
    activate_values(sums_, p_.activation);
  }

  __device__ void store() { Block::store(sums_, at_, p_.out_step, count_); }

 private:
  __device__ static int smaller(int a, int b) { return a < b ? a : b; }

  // The first output of a lane of a row. Lanes whose outputs lie a power of two apart are neighbours, and those that are
  // an odd number of these apart: all in different banks.
  __device__ int column_of(int group, int lane) const {
    const int dilation = p_.along.dilation, neighbours = power_of_two_in(dilation);
    return group * neighbours + lane % neighbours + lane / neighbours * (p_.outputs * dilation);
  }
  // How many outputs of the tile a lane has that begins at these.
  __device__ int outputs_from(int row, int column) const {
    const int rows = p_.out_height - row_ - row, columns = smaller(p_.columns, p_.out_width - column_) - column;
    if (rows <= 0 || columns <= 0) return 0;
    const int left = p_.is_row ? columns : rows;
    return smaller(p_.outputs, (left + p_.along.dilation - 1) / p_.along.dilation);
  }

  // Positions along the axis are numbered from the lane's first; [begin, end) are those that exist.
  __device__ void add(const float* plane_taps, int first, int across, int begin, int end) {
#pragma unroll 1
    for (int parity = 0; parity < kStride; ++parity) {
      const float* taps = plane_taps + parity * p_.parity_pitch;
      const int count = (p_.along.taps - parity + kStride - 1) / kStride;
#pragma unroll 1
      for (int tap = 0; tap < count; tap += p_.group, taps += kMostTaps) {
        const int position = tap * kStride + parity;
        const unsigned exist = inputs_before(end - position) & ~inputs_before(begin - position);
        with_count<1>(smaller(p_.group, count - tap),
                      [&]<int kTaps>() { add_taps<kTaps>(taps, first + position * p_.along_step, across, exist); });
      }
    }
  }
  // A bit for each that a lane reads of so many positions.
  __device__ static unsigned inputs_before(int positions) {
    const int inputs = (positions + kStride - 1) / kStride;
    return inputs <= 0 ? 0 : inputs > 30 ? ~0u : (1u << inputs) - 1;
  }
  template <int n, class Use>
  __device__ __forceinline__ static void with_count(int count, Use use) {
    if constexpr (n < kMostTaps) {
      if (count > n) return with_count<n + 1>(count, use);
    }
    use.template operator()<n>();
  }

  // What the inputs from `from` on add to the outputs by kTaps taps along the axis, and all across it.
  template <int kTaps>
  __device__ __forceinline__ void add_taps(const float* taps, int from, int across, unsigned exist) {
#pragma unroll 1
    for (int t = 0; t < p_.across.taps; ++t, taps += p_.taps_across_pitch, from += p_.across_step) {
      __syncwarp();  // lanes that pass over a column wait for the others, which then read it together
      const bool here = static_cast<unsigned>(across + t * p_.across.dilation) < static_cast<unsigned>(p_.across.in);
      if (!here || exist == 0) continue;
      const float4 four = *reinterpret_cast<const float4*>(taps);
      const float tap[kMostTaps] = {four.x, four.y, four.z, four.w};
      add_inputs<kTaps>(std::make_integer_sequence<int, kOutputs + kTaps - 1>(), tap, place(from), exist);
    }
  }
  template <int kTaps, int... i>
  __device__ __forceinline__ void add_inputs(std::integer_sequence<int, i...>, const float (&tap)[kMostTaps],
                                             const float* line, unsigned exist) {
    (add_input<kTaps, i>(tap, line, exist), ...);
  }
  template <int kTaps, int i>
  __device__ __forceinline__ void add_input(const float (&tap)[kMostTaps], const float* line, unsigned exist) {
    if (!(exist >> i & 1)) return;
    const float in = line[i * p_.along_step];
#pragma unroll
    for (int u = 0; u < kTaps; ++u) {
      const int r = i - u;
      if (r >= 0 && r < kOutputs) sums_[r] = fmaf(tap[u], in, sums_[r]);
    }
  }

  int at_, count_;  // the outputs of the lane in their box, and how many of them exist
  float sums_[kOutputs];
};

template <int kStride>
__global__ void __launch_bounds__(1024, 1) depthwise_nchw_any(const NchwAnyParameters p) {
  NchwAny<kStride> block(p, shared_memory<float>());
  block.load();
  __syncthreads();
  block.compute();
  __syncthreads();  // the box of inputs becomes that of outputs
  block.store();
}

// A row of kernels.inc.
template <int kStride>
struct NchwAnyRow {
  static const char* can_run(const DepthwiseProblem& p) {
    if (const char* reason = why_not_rows(p, kAnyTaps, kStride)) return reason;
    if (const char* reason = why_not_contiguous(p)) return reason;
    const Launch launch = launch_of(p, 1);
    if (launch.q.planes == 0) return "the window does not fit shared memory";
    return launch.blocks > kLargestGrid ? kGridTooLarge : nullptr;
  }

  static bool is_row(const DepthwiseProblem& p) { return p.window.out[1] == 1; }

  static NchwTiling tiling(const DepthwiseProblem& p, const NchwAnyParameters& q) {
    const int64_t across = p.window.taps[is_row(p) ? 1 : 2];
    const int vectors = static_cast<int>(across * q.taps_across_pitch / 4) | 1, dilation = q.along.dilation;
    return {p,
            kStride,
            is_row(p) ? 1 : q.outputs * dilation,
            is_row(p) ? dilation / power_of_two_in(dilation) : 1,
            is_row(p) ? 1 : dilation,
            is_row(p) ? q.outputs : 1,
            is_row(p) ? dilation : 1,
            4 * vectors,
            is_row(p) || dilation == 1 ? 16 : kWarp,
            0,
            1024,
            46 << 10};
  }

  struct Launch {
    NchwAnyParameters q;
    int64_t blocks;
  };

  // Of lanes with fewer and fewer outputs, those whose smallest tiles copy the least, and of several such those that
  // issue the fewest instructions, whole segments of a warp at a time.
  static Launch launch_of(const DepthwiseProblem& p, int multiprocessors) {
    const Window& w = p.window;
    const int dim = is_row(p) ? 2 : 1;
    NchwAnyParameters q{};
    q.is_row = is_row(p);
    q.along = axis_of(w, dim, 1);
    q.across = axis_of(w, 3 - dim, 1);
    const int taps = static_cast<int>(ceil_div(q.along.taps, kStride)),
              groups = static_cast<int>(ceil_div(taps, kMostTaps));
    q.group = static_cast<int>(ceil_div(taps, groups));
    q.parity_pitch = groups * kMostTaps;
    q.taps_across_pitch = kStride * q.parity_pitch;
    Launch best{q, 0};
    std::pair<int64_t, int64_t> least;
    for (int outputs = kOutputs; outputs > 0; outputs -= 2) {
      q.outputs = outputs;
      const NchwTiling t = tiling(p, q);
      static_cast<NchwParameters&>(q) = t.smallest();
      if (q.planes == 0) continue;
      const int64_t lanes = t.blocks_of(q) * q.chunks * q.groups * q.warps_across * q.lanes;
      const int64_t inputs = outputs + q.group - 1, issued = inputs * (1 + q.group);  // of a group of taps
      const std::pair<int64_t, int64_t> cost{t.blocks_of(q) * q.in.plane_pitch, lanes * issued};
      if (best.q.planes > 0 && cost >= least) continue;
      best.q = q;
      least = cost;
    }
    if (best.q.planes == 0) return best;
    const NchwTiling t = tiling(p, best.q);
    static_cast<NchwParameters&>(best.q) = t.grown(best.q, multiprocessors);
    best.blocks = t.blocks_of(best.q);
    // Where the boxes of a tile lie is known now.
    NchwAnyParameters& r = best.q;
    r.along_step = r.along.dilation * (r.is_row ? 1 : r.in.row_pitch);
    r.across_step = r.across.dilation * (r.is_row ? r.in.row_pitch : 1);
    r.out_step = r.along.dilation * (r.is_row ? 1 : r.out.row_pitch);
    return best;
  }

  static int64_t threads(const DepthwiseProblem& p) {
    const Launch launch = launch_of(p, 1);
    return launch.blocks * NchwTiling::threads_of(launch.q);
  }

  static void launch(const DepthwiseProblem& p, const Runtime& runtime) {
    const auto [q, blocks] = launch_of(p, runtime.threads);
    cuda::launch("depthwise_nchw_any", depthwise_nchw_any<kStride>, blocks, NchwTiling::threads_of(q),
                 NchwTiling::shared_bytes(q), runtime, q);
  }
};

}  // namespace dsconv::cuda

// Depthwise forward, contiguous, undilated square filters: a block copies rows of one or several planes to shared memory
// as memory has them, computes from there, and streams the outputs back the same way. Memory sees long runs of vectors
// whatever the width. A lane is a column of outputs: its taps stay in registers, a row of inputs serves all rows of
// outputs that it meets, and the lanes of a warp read neighbouring words.
#pragma once

#include <utility>

#include "cuda/depthwise_rows.cuh"
#include "cuda/plane_stream.cuh"

namespace dsconv::cuda {

struct NchwParameters : RowParameters {
  Planes in, out;
  int height, width, out_height, out_width, pad_row, pad_column;
  int planes, slabs;  // planes of a block, all of one image
  int row_tiles, column_tiles;
  int box_height, box_width;  // those of a box that exist are copied
  int chunks, columns;        // of a tile; a chunk is kRowsOfThread rows of outputs
  int lanes, warps, across;   // lanes of one plane, warps of a chunk, warps across a row of outputs
  int apart;                  // the planes of a warp
  int half;                   // stride 2: from the even values of the box to the odd ones
  int box;                    // floats of the box
};

// Enough rows that what a lane does once, above all fetching its taps, is little beside them; common feature maps have
// a multiple of 7, and rows that do not exist are skipped. With 7 taps and a stride of 2, 14 would not fit the registers.
template <int kTaps, int kStride>
constexpr int kRowsOf = kTaps == 7 && kStride == 2 ? 7 : 14;
// A row of a map that is not cut needs a lane for every output; else blocks of half as many leave the scheduler more
// choice.
constexpr int kMostThreads = 512, kThreads = kMostThreads / 2;

// Taps of a plane in shared memory, in whole vectors.
template <int kTaps>
constexpr int kTapPitch = (kTaps * kTaps + 3) / 4 * 4;

template <int kTaps, int kStride>
class NchwBlock {
  static constexpr int kRowsOfThread = kRowsOf<kTaps, kStride>;

 public:
  __device__ NchwBlock(const NchwParameters& p, float* shared)
      : p_(p), taps_(shared), biases_(taps_ + p.planes * kTapPitch<kTaps>), box_(biases_ + round_up(p.planes, 4)) {
    locate(blockIdx.x);
  }

  __device__ void load() {
    const int run = p_.in.with_gaps ? kTapPitch<kTaps> : kTaps * kTaps;
    for_stream(planes_, 1, run, [&](int plane, int, int tap) {
      if (tap >= kTaps * kTaps) return;
      taps_[plane * kTapPitch<kTaps> + tap] =
          load_one(p_.dtype, p_.weight, (channel_ + plane) * p_.weight_channel + tap * p_.weight_tap);
    });
    for (int plane = threadIdx.x; plane < planes_; plane += blockDim.x)
      biases_[plane] = p_.bias ? load_one(p_.dtype, p_.bias, (channel_ + plane) * p_.bias_channel) : 0.0f;
    const Clipped rows = rows_of_box(), columns = columns_of_box();
    const int64_t first =
        image_ * p_.x_image + channel_ * p_.in.plane + static_cast<int64_t>(rows.begin) * p_.in.row + columns.begin;
    behind_ = stream_planes(
        p_.in, p_.x, first, p_.dtype, planes_, rows.count, columns.count,
        [&](int64_t from, int at) { put_quad(from, at); },
        [&](int64_t from, int at) {
          if (p_.dtype == DType::f32) {
            copy_async(place(at), static_cast<const float*>(p_.x) + from);
          } else {
            *place(at) = load_one(p_.dtype, p_.x, from);
          }
        });
    wait_for_copies();
  }

  __device__ void compute() {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int chunk = warp / p_.warps, in_chunk = warp % p_.warps, plane_warp = in_chunk / p_.across;
    const int segments = kWarp / p_.lanes;
    const int plane =
        plane_warp / p_.apart * (p_.apart * segments) + lane / p_.lanes * p_.apart + plane_warp % p_.apart;
    const int out_column = in_chunk % p_.across * kWarp + lane % p_.lanes, out_row = chunk * kRowsOfThread;
    const bool exists = plane < planes_ && out_column < p_.columns && column_ + out_column < p_.out_width;
    rows_ = exists ? p_.out_height - row_ - out_row : 0;
    if (!exists) return;
    at_ = p_.out.at(plane) + out_row * p_.out.row_pitch + out_column;
#pragma unroll
    for (float& sum : sums_) sum = biases_[plane];
    const int top = (row_ + out_row) * kStride - p_.pad_row, left = (column_ + out_column) * kStride - p_.pad_column;
    // Windows that lie beside the map read next to its box.
    int column = left - columns_of_box().begin;
    column = column < -kTaps ? -kTaps : column > p_.in.row_pitch ? p_.in.row_pitch : column;
    const int first = p_.in.at(plane) + (top - rows_of_box().begin) * p_.in.row_pitch + column + behind_;
    const float* const taps = taps_ + plane * kTapPitch<kTaps>;
    if (top >= 0 && top + kSpan <= p_.height) {  // the same for all lanes of a warp
      add<true>(taps, first, top, left);
    } else {
      add<false>(taps, first, top, left);
    }
    activate_values(sums_, p_.activation);
  }

  __device__ void store() {
    locate(opaque(blockIdx.x));  // anew, or it would take registers from compute()
    const int64_t first =
        image_ * p_.y_image + channel_ * p_.out.plane + static_cast<int64_t>(row_) * p_.out.row + column_;
    float* const to = box_ + at_ + behind_vector(p_.out, p_.y, first, p_.dtype);
#pragma unroll
    for (int r = 0; r < kRowsOfThread; ++r) {
      if (r < rows_) to[r * p_.out.row_pitch] = sums_[r];
    }
    __syncthreads();
    const Clipped rows(row_, p_.chunks * kRowsOfThread, p_.out_height), columns(column_, p_.columns, p_.out_width);
    stream_planes(
        p_.out, p_.y, first, p_.dtype, planes_, rows.count, columns.count,
        [&](int64_t to, int at) {
          with_storage(p_.dtype, [&]<class S>() {
            store_quad(*reinterpret_cast<const float4*>(box_ + at), static_cast<S*>(p_.y) + to);
          });
        },
        [&](int64_t to, int at) {
          with_storage(p_.dtype, [&]<class S>() { narrow(box_[at], static_cast<S*>(p_.y) + to); });
        });
  }

 private:
  __device__ void locate(int block) {
    const int column_tile = block % p_.column_tiles;
    block /= p_.column_tiles;
    const int row_tile = block % p_.row_tiles;
    block /= p_.row_tiles;
    channel_ = block % p_.slabs * p_.planes;
    image_ = block / p_.slabs;
    planes_ = p_.channels - channel_ < p_.planes ? p_.channels - channel_ : p_.planes;
    row_ = row_tile * p_.chunks * kRowsOfThread;
    column_ = column_tile * p_.columns;
  }

  static constexpr int kSpan = (kRowsOfThread - 1) * kStride + kTaps;  // rows of inputs of a thread

  __device__ Clipped rows_of_box() const { return {row_ * kStride - p_.pad_row, p_.box_height, p_.height}; }
  __device__ Clipped columns_of_box() const { return {column_ * kStride - p_.pad_column, p_.box_width, p_.width}; }

  // Of a strided filter's inputs the even and the odd ones lie apart: the words that neighbouring lanes read are then
  // neighbours.
  __device__ float* place(int at) const { return box_ + (kStride == 1 ? at : (at & 1) * p_.half + (at >> 1)); }
  __device__ void put_quad(int64_t from, int at) const {
    if (kStride == 1 && p_.dtype == DType::f32) {
      copy_async_16(place(at), static_cast<const float*>(p_.x) + from, 16);
      return;
    }
    float4 four;
    with_storage(p_.dtype, [&]<class S>() { four = load_quad(static_cast<const S*>(p_.x) + from); });
    if constexpr (kStride == 1) {
      *reinterpret_cast<float4*>(place(at)) = four;
    } else {
      *reinterpret_cast<float2*>(place(at)) = make_float2(four.x, four.z);
      *reinterpret_cast<float2*>(place(at + 1)) = make_float2(four.y, four.w);
    }
  }

  // What a lane does once for all of its rows.
  struct Lane {
    float taps[kTapPitch<kTaps>];
    bool exists[kTaps];                  // of its columns; what is read in the place of others is not used
    const char* line[kStride][kStride];  // of stride 2: the even and the odd columns, in even and in odd rows
    int top;
    int offset = 0, step;  // of the lines, in bytes; opaque, so that all add one uniform register
  };

  template <bool kInterior>
  __device__ void add(const float* taps, int first, int top, int left) {
    Lane lane;
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
  __device__ __forceinline__ void add_rows(std::integer_sequence<int, i...>, Lane& lane) {
    (add_row<kInterior, i>(lane), ...);
  }

  // The inputs of row i, and what they add to the rows of outputs that it meets.
  template <bool kInterior, int i>
  __device__ __forceinline__ void add_row(Lane& lane) {
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

  const NchwParameters& p_;
  float *taps_, *biases_, *box_;
  int image_, channel_, planes_, row_, column_;
  int behind_;         // the box of inputs starts, in its first vector
  int at_ = 0, rows_;  // the outputs of the lane in their box, and how many rows of them exist
  float sums_[kRowsOfThread];
};

// One kernel for all storage types: shared memory and registers hold floats, the type matters to the streams alone.
template <int kTaps, int kStride>
__global__ void __launch_bounds__(kMostThreads, 1) depthwise_nchw(const NchwParameters p) {
  NchwBlock<kTaps, kStride> block(p, shared_memory<float>());
  block.load();
  __syncthreads();
  block.compute();
  __syncthreads();  // the box of inputs becomes that of outputs
  block.store();
}

// A row of kernels.inc.
template <int kTaps, int kStride>
struct Nchw {
  static constexpr int kRowsOfThread = kRowsOf<kTaps, kStride>;
  static constexpr int64_t kSharedBytes = 31 << 10;  // two blocks fit every architecture's multiprocessor

  static const char* can_run(const DepthwiseProblem& p) {
    if (const char* reason = why_not_rows(p, kTaps, kStride)) return reason;
    const Window& w = p.window;
    if (w.taps[1] != kTaps) return "another number of taps along a column";
    if (w.dilation[1] != 1 || w.dilation[2] != 1) return "dilated";
    if ((w.in[2] > 1 && p.x.stride[4] != 1) || (w.out[2] > 1 && p.y.stride[4] != 1)) return "not contiguous";
    return blocks_of(p, parameters(p, 1)) > kLargestGrid ? kGridTooLarge : nullptr;
  }

  // Tiles of at most so many chunks and columns.
  static NchwParameters tiled(const DepthwiseProblem& p, int64_t chunks, int64_t column_tiles, int64_t planes) {
    const auto narrow = [](int64_t n) { return static_cast<int>(n); };
    const Window& w = p.window;
    auto q = parameters_of<NchwParameters>(p);
    q.height = narrow(w.in[1]);
    q.width = narrow(w.in[2]);
    q.out_height = narrow(w.out[1]);
    q.out_width = narrow(w.out[2]);
    q.pad_row = narrow(w.pad[1]);
    q.pad_column = narrow(w.pad[2]);
    q.planes = narrow(planes);
    q.slabs = narrow(ceil_div(p.channels, planes));
    const int64_t all_chunks = ceil_div(w.out[1], kRowsOfThread);
    q.row_tiles = narrow(ceil_div(all_chunks, chunks));
    q.chunks = narrow(ceil_div(all_chunks, q.row_tiles));
    // Tiles of a row start between sectors of every storage type.
    q.columns = narrow(column_tiles == 1 ? w.out[2] : round_up(ceil_div(w.out[2], column_tiles), 16));
    q.column_tiles = narrow(ceil_div(w.out[2], q.columns));
    q.across = narrow(ceil_div(q.columns, kWarp));
    for (q.lanes = 4; q.lanes < kWarp && q.lanes < q.columns;) q.lanes *= 2;
    lay_out(p, q);
    return q;
  }

  // The lanes of a warp are in different banks: its planes lie an odd multiple of `lanes` words apart (twice that for a
  // stride of 2, whose lanes take every second word), with gaps if need be. Of the distances for which a block has planes
  // enough, or of the least one, that with the fewest gaps. With 8 and segments of 4 lanes taps would share banks.
  static int apart_of(const NchwParameters& q, int segments) {
    int best = 0, fewest = 3;
    for (int apart = 1; apart <= (q.lanes == 4 ? 4 : 8); apart *= 2) {
      if (!can_group(q.in, apart) || !can_group(q.out, apart)) continue;
      if (best > 0 && apart * segments > q.planes) break;
      const int gaps = (skew_of(q.in, apart, q.lanes * kStride) > 0) + (skew_of(q.out, apart, q.lanes) > 0);
      if (gaps >= fewest) continue;
      best = apart;
      fewest = gaps;
    }
    return best;
  }

  static void lay_out(const DepthwiseProblem& p, NchwParameters& q) {
    const Window& w = p.window;
    // Whole rows, and whole planes, are copied with what their last windows may leave over: they are one run.
    const auto extent = [](int64_t outputs) { return (outputs - 1) * kStride + kTaps; };
    const auto whole = [](int tiles, int64_t reach, int64_t size) { return tiles == 1 && size < reach + kStride; };
    const int64_t reach[2] = {extent(q.chunks * kRowsOfThread), extent(q.columns)};
    const bool all_columns = whole(q.column_tiles, reach[1], q.width),
               all_rows = whole(q.row_tiles, reach[0], q.height);
    q.box_height = static_cast<int>(all_rows ? w.in[1] + w.pad[1] : reach[0]);
    q.box_width = static_cast<int>(all_columns ? w.in[2] + w.pad[2] : reach[1]);
    const int rows = smaller(q.box_height, w.in[1]), width = smaller(q.box_width, w.in[2]),
              out_rows = smaller(q.chunks * kRowsOfThread, w.out[1]);
    q.in = planes_of(p.x, w.in, rows, width, all_columns, all_rows);
    q.out = planes_of(p.y, w.out, out_rows, q.columns, q.column_tiles == 1, q.row_tiles == 1);
    const int segments = kWarp / q.lanes;
    q.apart = segments > 1 ? apart_of(q, segments) : 1;
    spread(q.in, q.planes, q.apart, segments > 1 ? q.lanes * kStride : 0);
    spread(q.out, q.planes, q.apart, segments > 1 ? q.lanes : 0);
    q.in.with_gaps = q.out.with_gaps = q.lanes == 4;  // of the smallest maps, where there are many
    const int group = q.apart * segments, rest = q.planes % group;
    q.warps = (q.planes / group * q.apart + (rest < q.apart ? rest : q.apart)) * q.across;
    // The widest window behind the last column is read too.
    const int64_t box = max64(q.in.at(q.planes), q.out.at(q.planes)) + 4 + kTaps;
    q.half = static_cast<int>(round_up(ceil_div(box, 2), 32) + 16);
    q.box = static_cast<int>(kStride == 1 ? round_up(box, 4) : 2 * q.half);
  }

  static int smaller(int64_t a, int64_t b) { return static_cast<int>(min64(a, b)); }
  static int64_t shared_bytes(const NchwParameters& q) {
    return (q.planes * kTapPitch<kTaps> + round_up(q.planes, 4) + q.box) * int64_t{sizeof(float)};
  }
  static int threads_of(const NchwParameters& q) { return q.chunks * q.warps * kWarp; }
  static int64_t blocks_of(const DepthwiseProblem& p, const NchwParameters& q) {
    return p.batch * q.slabs * q.row_tiles * q.column_tiles;
  }
  static bool fits(const NchwParameters& q, int threads) {
    return threads_of(q) <= threads && shared_bytes(q) <= kSharedBytes;
  }

  // The largest tile that fits, of whole rows before several chunks before several planes; on a GPU with many
  // multiprocessors fewer planes, then fewer chunks.
  static NchwParameters parameters(const DepthwiseProblem& p, int multiprocessors) {
    int64_t column_tiles = ceil_div(p.window.out[2], kMostThreads);
    while (!fits(tiled(p, 1, column_tiles, 1), kMostThreads)) ++column_tiles;
    NchwParameters best = tiled(p, 1, column_tiles, 1);
    const auto grow = [&](int64_t most, auto tile) {
      for (int64_t n = 1; n < most;) {
        n = min64(2 * n, most);
        const NchwParameters next = tile(n);
        if (!fits(next, kThreads) || blocks_of(p, next) < 2 * int64_t{multiprocessors}) break;
        best = next;
      }
    };
    grow(ceil_div(p.window.out[1], kRowsOfThread), [&](int64_t n) { return tiled(p, n, column_tiles, 1); });
    if (best.row_tiles * best.column_tiles == 1)
      grow(p.channels, [&](int64_t n) { return tiled(p, best.chunks, column_tiles, n); });
    return best;
  }

  static int64_t threads(const DepthwiseProblem& p) {
    const NchwParameters q = parameters(p, 1);
    return blocks_of(p, q) * threads_of(q);
  }

  static void launch(const DepthwiseProblem& p, const Runtime& runtime) {
    const NchwParameters q = parameters(p, runtime.threads);
    cuda::launch("depthwise_nchw", depthwise_nchw<kTaps, kStride>, blocks_of(p, q), threads_of(q), shared_bytes(q),
                 runtime, q);
  }
};

}  // namespace dsconv::cuda

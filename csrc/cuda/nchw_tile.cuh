// What the contiguous forward kernels share: a block copies rows of one or several planes to shared memory as memory has
// them, computes from there, and streams the outputs back the same way. Memory sees long runs of vectors whatever the
// width, and the lanes of a warp read neighbouring words, or words an odd number of which apart.
#pragma once

#include "cuda/depthwise_rows.cuh"
#include "cuda/plane_stream.cuh"

namespace dsconv::cuda {

struct NchwParameters : RowParameters {
  Planes in, out;
  int height, width, out_height, out_width, pad_row, pad_column;
  int planes, slabs;  // planes of a block, all of one image
  int row_tiles, column_tiles;
  int box_height, box_width;       // those of a box that exist are copied
  int chunks, lines, columns;      // of a tile; a chunk is so many rows of outputs
  int groups;                      // of the lanes of a chunk, in warps of their own
  int lanes_used;                  // lanes of a group of a plane
  int lanes, warps, warps_across;  // the same in whole segments of a warp, warps of a group, warps of one plane
  int apart;                       // the planes of a warp
  int half;                        // stride 2: from the even values of the box to the odd ones
  int taps_pitch, box;             // floats of a plane's taps, of the box
};

template <class Parameters, int kStride>
class NchwBlock {
 protected:
  __device__ NchwBlock(const Parameters& p, float* shared)
      : p_(p), taps_(shared), biases_(taps_ + p.planes * p.taps_pitch), box_(biases_ + round_up(p.planes, 4)) {
    locate(blockIdx.x);
  }

  // place(u, t) is where tap t of row u of a filter lies among the taps of its plane, or negative for none.
  template <class Place>
  __device__ void load(int taps_down, int taps_across, Place place_of_tap) {
    for_stream(planes_, taps_down, taps_across, [&](int plane, int u, int t, int) {
      const int at = place_of_tap(u, t);
      if (at < 0) return;
      taps_[plane * p_.taps_pitch + at] =
          load_one(p_.dtype, p_.weight, (channel_ + plane) * p_.weight_channel + (u * taps_across + t) * p_.weight_tap);
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

  // Of `outputs`, `step` floats apart in their box, the first `count`. All threads of the block take part.
  template <int kOutputs>
  __device__ void store(const float (&outputs)[kOutputs], int at, int step, int count) {
    locate(opaque(blockIdx.x));  // anew, or it would take registers from what was computed
    const int64_t first =
        image_ * p_.y_image + channel_ * p_.out.plane + static_cast<int64_t>(row_) * p_.out.row + column_;
    float* const to = box_ + at + behind_vector(p_.out, p_.y, first, p_.dtype);
#pragma unroll
    for (int r = 0; r < kOutputs; ++r) {
      if (r < count) to[r * step] = outputs[r];
    }
    __syncthreads();
    const Clipped rows(row_, p_.chunks * p_.lines, p_.out_height), columns(column_, p_.columns, p_.out_width);
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

  // The plane and the group of this thread, of all groups of all chunks, and which of the group's lanes it is.
  struct Lane {
    int plane, group, index;
  };
  __device__ Lane lane() const {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int group = warp / p_.warps, in_group = warp % p_.warps, plane_warp = in_group / p_.warps_across;
    const int segments = kWarp / p_.lanes;
    return {plane_warp / p_.apart * (p_.apart * segments) + lane / p_.lanes * p_.apart + plane_warp % p_.apart, group,
            in_group % p_.warps_across * kWarp + lane % p_.lanes};
  }

  __device__ Clipped rows_of_box() const { return {row_ * kStride - p_.pad_row, p_.box_height, p_.height}; }
  __device__ Clipped columns_of_box() const { return {column_ * kStride - p_.pad_column, p_.box_width, p_.width}; }

  // Of a strided filter's inputs the even and the odd ones lie apart: the words that neighbouring lanes read are then
  // neighbours.
  __device__ float* place(int at) const { return box_ + (kStride == 1 ? at : (at & 1) * p_.half + (at >> 1)); }

  const Parameters& p_;
  float *taps_, *biases_, *box_;
  int image_, channel_, planes_, row_, column_;
  int behind_;  // the box of inputs starts, in its first vector

 private:
  __device__ void locate(int block) {
    const int column_tile = block % p_.column_tiles;
    block /= p_.column_tiles;
    const int row_tile = block % p_.row_tiles;
    block /= p_.row_tiles;
    channel_ = block % p_.slabs * p_.planes;
    image_ = block / p_.slabs;
    planes_ = p_.channels - channel_ < p_.planes ? p_.channels - channel_ : p_.planes;
    row_ = row_tile * p_.chunks * p_.lines;
    column_ = column_tile * p_.columns;
  }

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
};

// Cuts a problem into tiles.
struct NchwTiling {
  const DepthwiseProblem& p;
  int stride;
  int lines;          // rows of outputs of a chunk
  int groups;         // of lanes of a chunk
  int phases;         // a lane has a column of one of so many neighbouring rows,
  int line;           // or so many outputs of one row,
  int line_dilation;  // this far apart
  int taps_pitch;     // floats, an odd number of vectors: planes in different banks
  int column_step;    // tiles of a row are multiples of this, at least one sector of any storage type
  int beyond;         // floats behind the box that lanes without an output read
  int most_threads;
  int64_t most_bytes;  // of shared memory, for the smallest tile

  static constexpr int kThreads = 256;               // smaller blocks leave the scheduler more choice
  static constexpr int64_t kSharedBytes = 31 << 10;  // two blocks fit every architecture's multiprocessor

  int64_t lanes_of(int64_t columns) const {
    return phases * line_dilation / groups * ceil_div(columns, int64_t{line} * line_dilation);
  }
  int64_t reach(int dim, int64_t outputs) const {
    return input_extent(outputs, p.window.taps[dim], stride, p.window.dilation[dim]);
  }
  static int smaller(int64_t a, int64_t b) { return static_cast<int>(min64(a, b)); }

  // Tiles of at most so many chunks and columns.
  NchwParameters tiled(int64_t chunks, int64_t column_tiles, int64_t planes) const {
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
    q.lines = lines;
    q.groups = groups;
    q.taps_pitch = taps_pitch;
    const int64_t all_chunks = ceil_div(w.out[1], lines);
    q.row_tiles = narrow(ceil_div(all_chunks, chunks));
    q.chunks = narrow(ceil_div(all_chunks, q.row_tiles));
    q.columns = narrow(column_tiles == 1 ? w.out[2] : round_up(ceil_div(w.out[2], column_tiles), column_step));
    q.column_tiles = narrow(ceil_div(w.out[2], q.columns));
    q.lanes_used = narrow(lanes_of(q.columns));
    q.warps_across = narrow(ceil_div(q.lanes_used, kWarp));
    for (q.lanes = 4; q.lanes < kWarp && q.lanes < q.lanes_used;) q.lanes *= 2;
    lay_out(q);
    return q;
  }

  // The lanes of a warp are in different banks: its planes lie an odd multiple of `lanes` words apart (twice that for a
  // stride of 2, whose lanes take every second word), with gaps if need be. Of the distances for which a block has planes
  // enough, or of the least one, that with the fewest gaps. With 8 and segments of 4 lanes taps would share banks.
  int apart_of(const NchwParameters& q, int segments) const {
    int best = 0, fewest = 3;
    for (int apart = 1; apart <= (q.lanes == 4 ? 4 : 8); apart *= 2) {
      if (!can_group(q.in, apart) || !can_group(q.out, apart)) continue;
      if (best > 0 && apart * segments > q.planes) break;
      const int gaps = (skew_of(q.in, apart, q.lanes * stride) > 0) + (skew_of(q.out, apart, q.lanes) > 0);
      if (gaps >= fewest) continue;
      best = apart;
      fewest = gaps;
    }
    return best;
  }

  void lay_out(NchwParameters& q) const {
    const Window& w = p.window;
    // Whole rows, and whole planes, are copied with what their last windows may leave over: they are one run.
    const auto whole = [&](int tiles, int64_t reach, int64_t size) { return tiles == 1 && size < reach + stride; };
    const int64_t down = reach(1, q.chunks * lines), across = reach(2, q.columns);
    const bool all_columns = whole(q.column_tiles, across, q.width), all_rows = whole(q.row_tiles, down, q.height);
    q.box_height = static_cast<int>(all_rows ? w.in[1] + w.pad[1] : down);
    q.box_width = static_cast<int>(all_columns ? w.in[2] + w.pad[2] : across);
    const int rows = smaller(q.box_height, w.in[1]), width = smaller(q.box_width, w.in[2]),
              out_rows = smaller(q.chunks * lines, w.out[1]);
    q.in = planes_of(p.x, w.in, rows, width, all_columns, all_rows);
    q.out = planes_of(p.y, w.out, out_rows, q.columns, q.column_tiles == 1, q.row_tiles == 1);
    const int segments = kWarp / q.lanes;
    q.apart = segments > 1 ? apart_of(q, segments) : 1;
    spread(q.in, q.planes, q.apart, segments > 1 ? q.lanes * stride : 0);
    spread(q.out, q.planes, q.apart, segments > 1 ? q.lanes : 0);
    q.in.with_gaps = q.out.with_gaps = q.lanes == 4;  // of the smallest maps, where there are many
    const int group = q.apart * segments, rest = q.planes % group;
    q.warps = (q.planes / group * q.apart + (rest < q.apart ? rest : q.apart)) * q.warps_across;
    const int64_t box = max64(q.in.at(q.planes), q.out.at(q.planes)) + 4 + beyond;
    q.half = static_cast<int>(round_up(ceil_div(box, 2), 32) + 16);
    q.box = static_cast<int>(stride == 1 ? round_up(box, 4) : 2 * q.half);
  }

  static int64_t shared_bytes(const NchwParameters& q) {
    return (q.planes * q.taps_pitch + round_up(q.planes, 4) + q.box) * int64_t{sizeof(float)};
  }
  static int threads_of(const NchwParameters& q) { return q.chunks * q.groups * q.warps * kWarp; }
  int64_t blocks_of(const NchwParameters& q) const { return p.batch * q.slabs * q.row_tiles * q.column_tiles; }

  // The tile of one chunk of one plane of which the fewest make a row, or of no plane: none fits.
  NchwParameters smallest() const {
    const int64_t width = p.window.out[2];
    for (int64_t tiles = ceil_div(groups * lanes_of(width), most_threads);; ++tiles) {
      NchwParameters q = tiled(1, tiles, 1);
      if (threads_of(q) <= most_threads && shared_bytes(q) <= most_bytes) return q;
      if (tiles * column_step >= width) {
        q.planes = 0;
        return q;
      }
    }
  }

  // That tile with more chunks, then more planes, while it fits; on a GPU with many multiprocessors fewer of each.
  NchwParameters grown(NchwParameters best, int multiprocessors) const {
    const auto grow = [&](int64_t most, auto tile) {
      for (int64_t n = 1; n < most;) {
        n = min64(2 * n, most);
        const NchwParameters next = tile(n);
        if (threads_of(next) > kThreads || shared_bytes(next) > kSharedBytes ||
            blocks_of(next) < 2 * int64_t{multiprocessors})
          break;
        best = next;
      }
    };
    const int64_t tiles = best.column_tiles;
    grow(ceil_div(p.window.out[1], lines), [&](int64_t n) { return tiled(n, tiles, 1); });
    if (best.row_tiles * best.column_tiles == 1)
      grow(p.channels, [&](int64_t n) { return tiled(best.chunks, tiles, n); });
    return best;
  }
};

// Null, or why the contiguous rows cannot run a problem of which they run the window.
inline const char* why_not_contiguous(const DepthwiseProblem& p) {
  const Window& w = p.window;
  const bool contiguous = (w.in[2] == 1 || p.x.stride[4] == 1) && (w.out[2] == 1 || p.y.stride[4] == 1);
  return contiguous ? nullptr : "not contiguous";
}

}  // namespace dsconv::cuda

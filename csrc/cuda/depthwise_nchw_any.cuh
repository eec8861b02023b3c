// Depthwise forward, contiguous, filters of any shape and dilation: a block copies a box of inputs of one or several
// planes to shared memory as one stream of single values, computes from there, and streams the outputs back through it.
#pragma once

#include "cuda/depthwise_rows.cuh"
#include "cuda/plane_stream.cuh"

namespace dsconv::cuda {

// A box of a plane in shared memory. Columns that differ by `split` lie side by side: the outputs of a thread and what
// they read are then neighbours, dilated or strided. Pitches in floats.
struct Box {
  int height, width;
  int split, phase, row, plane;  // from one column modulo split to the next, one row, one plane

  DSCONV_HD int at(int column) const { return split == 1 ? column : column % split * phase + column / split; }
};

struct NchwAnyParameters : RowParameters {
  int64_t x_channel, y_channel;
  int x_row, y_row;
  Axis rows, columns;
  int planes, slabs;              // planes of a block, all of one image
  int row_blocks, column_blocks;  // of a block's threads in each plane
  int row_tiles, column_tiles;
  Box in, out;
  int taps_row, taps_plane;  // pitches
};

template <class U>
class NchwAnyBlock {
 public:
  __device__ NchwAnyBlock(const NchwAnyParameters& p, float* shared)
      : p_(p), taps_(shared), box_(shared + p.planes * p.taps_plane) {
    int64_t block = blockIdx.x;
    const int column_tile = static_cast<int>(block % p.column_tiles);
    block /= p.column_tiles;
    const int row_tile = static_cast<int>(block % p.row_tiles);
    block /= p.row_tiles;
    channel_ = static_cast<int>(block % p.slabs) * p.planes;
    const int64_t image = block / p.slabs;
    planes_ = p.channels - channel_ < p.planes ? p.channels - channel_ : p.planes;
    row_ = row_tile * p.out.height;
    column_ = column_tile * p.out.width;
    x_ = image * p.x_image + channel_ * p.x_channel;
    y_ = image * p.y_image + channel_ * p.y_channel;
  }

  __device__ void load() {
    for_stream(planes_, p_.rows.taps, p_.columns.taps, [&](int plane, int u, int t) {
      taps_[plane * p_.taps_plane + u * p_.taps_row + t] = load_one(
          p_.dtype, p_.weight, (channel_ + plane) * p_.weight_channel + (u * p_.columns.taps + t) * p_.weight_tap);
    });
    const int top = top_of_box(), left = left_of_box();
    const Clipped rows(top, p_.in.height, p_.rows.in), columns(left, p_.in.width, p_.columns.in);
    const int64_t first = x_ + static_cast<int64_t>(rows.begin) * p_.x_row + columns.begin;
    for_warps(rows.count, columns.count, p_.x, first, [&](int plane, int row, int column) {
      const int64_t from = first + plane * p_.x_channel + row * p_.x_row + column;
      float* const to =
          box_ + plane * p_.in.plane + (row + rows.begin - top) * p_.in.row + p_.in.at(column + columns.begin - left);
      if (p_.dtype == DType::f32) {
        copy_async(to, static_cast<const float*>(p_.x) + from);
      } else {
        *to = load_one(p_.dtype, p_.x, from);
      }
    });
    wait_for_copies();
  }

  __device__ void compute() {
    const int blocks = p_.row_blocks * p_.column_blocks, plane = threadIdx.x / blocks, at = threadIdx.x % blocks;
    const bool exists = plane < planes_;
    const int row = p_.rows.first(at / p_.column_blocks, 1),
              column = p_.columns.first(at % p_.column_blocks, U::kColumns);
    const Inside inside(p_.columns, left_of_box() + column * U::kStride);
    const bool interior = inside.holds_all((U::kColumns - 1) * U::kStride + p_.columns.taps);
    // The warp decides together: one that has both kinds would do the work of both.
    if (__all_sync(~0u, !exists || interior)) {
      if (exists) compute_block<true>(plane, row, column, inside);
    } else if (exists) {
      compute_block<false>(plane, row, column, inside);
    }
    __syncthreads();  // the box of inputs becomes that of outputs
    if (!exists) return;
    const float (&sum)[4] = outputs_.sum;
    *reinterpret_cast<float4*>(box_ + plane * p_.out.plane + row * p_.out.row + p_.out.at(column)) =
        make_float4(sum[0], sum[1], sum[2], sum[3]);
  }

  __device__ void store() const {
    const Clipped rows(row_, p_.out.height, p_.rows.out), columns(column_, p_.out.width, p_.columns.out);
    const int64_t first = y_ + static_cast<int64_t>(row_) * p_.y_row + column_;
    for_warps(rows.count, columns.count, p_.y, first, [&](int plane, int row, int column) {
      const float value = box_[plane * p_.out.plane + row * p_.out.row + p_.out.at(column)];
      const int64_t to = first + plane * p_.y_channel + row * p_.y_row + column;
      with_storage(p_.dtype, [&]<class S>() { narrow(value, static_cast<S*>(p_.y) + to); });
    });
  }

 private:
  // As for_stream, from data[first] on, where the first warp starts between sectors of 32 bytes.
  template <class Visit>
  __device__ void for_warps(int rows, int columns, const void* data, int64_t first, Visit visit) const {
    if (rows <= 0 || columns <= 0) return;
    const int bytes = p_.dtype == DType::f32 ? 4 : 2;
    const int behind = static_cast<int>((reinterpret_cast<uintptr_t>(data) / bytes + first) % (32 / bytes));
    for_stream(planes_, rows, behind + columns, [&](int plane, int row, int column) {
      if (column >= behind) visit(plane, row, column - behind);
    });
  }
  __device__ int top_of_box() const { return row_ * U::kStride - p_.rows.pad; }
  __device__ int left_of_box() const { return column_ * U::kStride - p_.columns.pad; }

  template <bool kInterior>
  __device__ void compute_block(int plane, int row, int column, const Inside& inside) {
    const float bias[1] = {p_.bias ? load_one(p_.dtype, p_.bias, (channel_ + plane) * p_.bias_channel) : 0.0f};
    outputs_.start(bias);
    const float* const taps = taps_ + plane * p_.taps_plane;
    const float* const box = box_ + plane * p_.in.plane + p_.in.at(column * U::kStride);
    const int top = top_of_box() + row * U::kStride;
#pragma unroll 1
    for (int i = 0; i < p_.rows.taps; ++i) {
      const int y = top + i * p_.rows.dilation;
      if (static_cast<unsigned>(y) >= static_cast<unsigned>(p_.rows.in)) continue;
      const float* const line = box + (row * U::kStride + i * p_.rows.dilation) * p_.in.row;
#pragma unroll 1
      for (int t0 = 0; t0 < (U::kExact ? 1 : p_.columns.taps); t0 += U::kTaps) {
        const int across = p_.columns.taps - t0;
        float in[U::kStride][kLength];
#pragma unroll
        for (int s = 0; s < U::kStride; ++s) load_line(line + s * p_.in.phase + t0 / U::kStride, in[s]);
        outputs_.add(
            i, p_.rows.taps, across,
            [&](int, int c, float (&value)[1]) { value[0] = in[c % U::kStride][c / U::kStride]; },
            [&](int, int u, int t, float (&weight)[1]) { weight[0] = taps[u * p_.taps_row + t0 + t]; },
            [&](int c) { return kInterior || inside.holds(c + t0); });
      }
    }
    activate_values(outputs_.sum, p_.activation);
  }

  // Columns of one phase, in whole vectors: what lies behind the last one is not used.
  static constexpr int kLength = ((U::kReads + U::kStride - 1) / U::kStride + 3) / 4 * 4;

  __device__ static void load_line(const float* from, float (&line)[kLength]) {
#pragma unroll
    for (int i = 0; i < kLength; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + i);
      line[i] = four.x;
      line[i + 1] = four.y;
      line[i + 2] = four.z;
      line[i + 3] = four.w;
    }
  }

  const NchwAnyParameters& p_;
  float *taps_, *box_;
  int channel_, planes_, row_, column_;
  int64_t x_, y_;
  Outputs<U, 1, 1> outputs_;
};

template <class U>
__global__ void __launch_bounds__(256, 2) depthwise_nchw_any(const NchwAnyParameters p) {
  NchwAnyBlock<U> block(p, shared_memory<float>());
  block.load();
  __syncthreads();
  block.compute();
  __syncthreads();
  block.store();
}

// A row of kernels.inc.
template <int kStride>
struct NchwAny {
  using U = Unrolled<kAnyTaps, kStride>;
  static constexpr int64_t kSharedBytes = 24 << 10;  // two blocks fit every architecture's multiprocessor

  static const char* can_run(const DepthwiseProblem& p) {
    if (const char* reason = why_not_rows(p, kAnyTaps, kStride)) return reason;
    const Window& w = p.window;
    if ((w.in[2] > 1 && p.x.stride[4] != 1) || (w.out[2] > 1 && p.y.stride[4] != 1)) return "not contiguous";
    const NchwAnyParameters q = parameters(p, 1);
    if (shared_bytes(q) > 48 << 10) return "the window does not fit shared memory";
    return blocks_of(p, q) > kLargestGrid ? kGridTooLarge : nullptr;
  }

  static int64_t shared_bytes(const NchwAnyParameters& q) {
    const int64_t box = max64(q.in.plane, q.out.plane);
    return q.planes * (q.taps_plane + box) * int64_t{sizeof(float)};
  }

  // A box whose rows lie so that the vectors of eight neighbouring threads are in different banks, also where a row of
  // threads ends and the next begins `rows` lower.
  static Box box_of(int height, int width, int split, int behind, int row_blocks, int column_blocks, int rows) {
    Box box{height, width, split, 0, 0, 0};
    box.phase = static_cast<int>(round_up(ceil_div(width, split) + behind, 4));
    int quads = box.phase * split / 4;
    const auto apart = [](int step, int wanted) { return (step - wanted) % 8 == 0; };
    for (int more = 0; more < 8; ++more) {
      if (apart(rows * (quads + more), column_blocks)) {
        quads += more;
        break;
      }
    }
    box.row = 4 * quads;
    int plane = quads * height;
    while (!apart(plane, row_blocks * column_blocks)) ++plane;
    box.plane = 4 * plane;
    return box;
  }

  // Tiles of at most this many groups of row and column blocks, a group being one block of each phase of the dilation.
  static NchwAnyParameters tiled(const DepthwiseProblem& p, int64_t row_groups, int64_t column_groups, int64_t planes) {
    const auto narrow = [](int64_t n) { return static_cast<int>(n); };
    const Window& w = p.window;
    auto q = parameters_of<NchwAnyParameters>(p);
    q.x_channel = p.x.stride[1];
    q.y_channel = p.y.stride[1];
    q.x_row = w.in[1] > 1 ? narrow(p.x.stride[3]) : 0;
    q.y_row = w.out[1] > 1 ? narrow(p.y.stride[3]) : 0;
    q.rows = axis_of(w, 1, 1);
    q.columns = axis_of(w, 2, U::kColumns);
    q.planes = narrow(planes);
    q.slabs = narrow(ceil_div(p.channels, planes));
    const int rows_of_group = q.rows.dilation, columns_of_group = U::kColumns * q.columns.dilation;
    q.row_tiles = narrow(ceil_div(q.rows.blocks, q.rows.dilation * row_groups));
    q.column_tiles = narrow(ceil_div(q.columns.blocks, q.columns.dilation * column_groups));
    const int rows = narrow(ceil_div(q.rows.blocks / q.rows.dilation, q.row_tiles)),
              columns = narrow(ceil_div(q.columns.blocks / q.columns.dilation, q.column_tiles));
    q.row_blocks = rows * q.rows.dilation;
    q.column_blocks = columns * q.columns.dilation;
    const int height = rows * rows_of_group, width = columns * columns_of_group;
    const int behind = kStride == 1 ? U::kTaps : U::kTaps / 2 + 4;  // vectors reach beyond the last column read
    q.in = box_of(narrow(input_extent(height, w.taps[1], kStride, w.dilation[1])),
                  narrow(input_extent(width, w.taps[2], kStride, w.dilation[2])),
                  kStride == 1 ? q.columns.dilation : kStride, behind, q.row_blocks, q.column_blocks, kStride);
    q.out = box_of(height, width, q.columns.dilation, 0, q.row_blocks, q.column_blocks, 1);
    q.taps_row = narrow(round_up(w.taps[2], 4));
    q.taps_plane = narrow(w.taps[1]) * q.taps_row;
    return q;
  }

  static int threads_of(const NchwAnyParameters& q) { return q.planes * q.row_blocks * q.column_blocks; }
  static int64_t blocks_of(const DepthwiseProblem& p, const NchwAnyParameters& q) {
    return p.batch * q.slabs * q.row_tiles * q.column_tiles;
  }
  static bool fits(const NchwAnyParameters& q) { return threads_of(q) <= 256 && shared_bytes(q) <= kSharedBytes; }

  // The largest tile that fits, of whole rows before several rows before several planes; on a GPU with many
  // multiprocessors fewer planes, then fewer rows.
  static NchwAnyParameters parameters(const DepthwiseProblem& p, int multiprocessors) {
    int64_t groups[3] = {1, 1, 1};  // columns, rows, planes
    const Axis rows = axis_of(p.window, 1, 1), columns = axis_of(p.window, 2, U::kColumns);
    const int64_t most[3] = {ceil_div(columns.blocks, columns.dilation), ceil_div(rows.blocks, rows.dilation),
                             p.channels};
    NchwAnyParameters best = tiled(p, 1, 1, 1);
    for (int i = 0; i < 3; ++i) {
      while (groups[i] < most[i]) {
        const int64_t before = groups[i];
        groups[i] = min64(2 * groups[i], most[i]);
        const NchwAnyParameters next = tiled(p, groups[1], groups[0], groups[2]);
        if (!fits(next) || (i > 0 && blocks_of(p, next) < 2 * int64_t{multiprocessors})) {
          groups[i] = before;
          break;
        }
        best = next;
      }
      if (groups[i] < most[i]) break;
    }
    return best;
  }

  static int64_t threads(const DepthwiseProblem& p) {
    const NchwAnyParameters q = parameters(p, 1);
    return p.batch * p.channels * q.rows.blocks * q.columns.blocks;
  }

  static void launch(const DepthwiseProblem& p, const Runtime& runtime) {
    const NchwAnyParameters q = parameters(p, runtime.threads);
    const int block = static_cast<int>(round_up(threads_of(q), kWarp));
    cuda::launch("depthwise_nchw_any", depthwise_nchw_any<U>, blocks_of(p, q), block, shared_bytes(q), runtime, q);
  }
};

}  // namespace dsconv::cuda

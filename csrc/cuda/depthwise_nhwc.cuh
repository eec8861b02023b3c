// Depthwise forward, channels_last: neighbouring lanes take neighbouring vectors of channels. A row of inputs is read
// through the L1, once for the kRows rows of outputs of a thread; weights lie in shared memory.
#pragma once

#include "cuda/depthwise_rows.cuh"

namespace dsconv::cuda {

struct NhwcParameters : RowParameters {
  int x_row, x_column, y_row, y_column;
  Axis rows, columns;
  int slabs;                  // a block takes one slab of the channels
  int64_t items;              // blocks of outputs of one slab
  int items_of_image, panel;  // a panel of columns, downwards, then the next: what a block reads stays together
};

// Lanes across channels, and the channels of a slab.
template <int V>
constexpr int kLanes = V == 1 ? 32 : 8;
template <int V>
constexpr int kSlab = kLanes<V> * V;
template <int V>
constexpr int kPitch = kSlab<V> + 4;

// Quads of channels in the order in which lanes ask for them: lane 0's first, lane 1's first, ..., lane 0's second, ...
template <int V>
__device__ inline int place_of_channel(int c) {
  constexpr int kQuads = V / 4 > 0 ? V / 4 : 1;
  const int quad = c / 4;
  return (quad % kQuads * (kSlab<V> / 4 / kQuads) + quad / kQuads) * 4 + c % 4;
}

template <class S, int V, int kRows, class U>
class NhwcThread {
 public:
  __device__ NhwcThread(const NhwcParameters& p, const float* taps, int lane, int channel, int64_t item)
      : p_(p), lane_taps_(taps + (V == 1 ? lane : lane * 4)), exists_(channel < p.channels && item < p.items) {
    if (!exists_) return;
    const auto image = item / p.items_of_image;
    const int at = static_cast<int>(item - image * p.items_of_image), downwards = p.panel * p.rows.blocks;
    const int within = at % downwards, column_block = at / downwards * p.panel + within % p.panel;
    exists_ = column_block < p.columns.blocks;
    row_ = p.rows.first(within / p.panel, kRows);
    column_ = p.columns.first(column_block, U::kColumns);
    x_ = static_cast<const S*>(p.x) + image * p.x_image + channel;
    y_ = static_cast<S*>(p.y) + image * p.y_image + channel;
    float bias[V];
#pragma unroll
    for (int v = 0; v < V; ++v)
      bias[v] = p.bias ? widen(__ldg(static_cast<const S*>(p.bias) + (channel + v) * p.bias_channel)) : 0.0f;
    outputs_.start(bias);
  }

  __device__ bool exists() const { return exists_; }
  __device__ int first_column() const { return column_ * U::kStride - p_.columns.pad; }
  // Are all the columns that it reads inside the map, and all that it writes?
  __device__ bool interior() const {
    return Inside(p_.columns, first_column()).holds_all((U::kColumns - 1) * U::kStride + p_.columns.taps) &&
           column_ + (U::kColumns - 1) * p_.columns.dilation < p_.columns.out;
  }

  template <bool kInterior>
  __device__ void compute() {
    const int first = first_column(), top = row_ * U::kStride - p_.rows.pad;
    const Inside inside(p_.columns, first);
#pragma unroll 1
    for (int i = 0; i < (kRows - 1) * U::kStride + p_.rows.taps; ++i) {
      const int y = top + i * p_.rows.dilation;
      if (static_cast<unsigned>(y) >= static_cast<unsigned>(p_.rows.in)) continue;
      const S* const row = x_ + y * p_.x_row + first * p_.x_column;
#pragma unroll 1
      for (int t0 = 0; t0 < (U::kExact ? 1 : p_.columns.taps); t0 += U::kTaps) {
        const int across = p_.columns.taps - t0;
        const auto exists = [&](int column) { return kInterior || inside.holds(column + t0); };
        Channels<S, V> in[U::kReads];
#pragma unroll
        for (int c = 0; c < U::kReads; ++c) {
          // A row of fewer taps than are unrolled asks for fewer columns.
          const bool needed = U::kExact || c <= (U::kColumns - 1) * U::kStride + across - 1;
          if (needed && exists(c)) {
            in[c].load(row + (c + t0) * (p_.columns.dilation * p_.x_column));
          } else {
            in[c].zero();
          }
        }
        const int taps_across = U::kExact ? U::kTaps : p_.columns.taps;
        outputs_.add(
            i, p_.rows.taps, across, [&](int part, int c, float (&value)[kPart]) { in[c].part(part, value); },
            [&](int part, int u, int t, float (&weight)[kPart]) { load_tap(part, u * taps_across + t0 + t, weight); },
            exists);
      }
    }
  }
  __device__ void activate() { activate_values(outputs_.sum, p_.activation); }
  template <bool kInterior>
  __device__ void store() const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = row_ + r * p_.rows.dilation;
      if (row >= p_.rows.out) break;
#pragma unroll
      for (int l = 0; l < U::kColumns; ++l) {
        const int column = column_ + l * p_.columns.dilation;
        if (!kInterior && column >= p_.columns.out) break;
        Channels<S, V>::store(outputs_.sum + outputs_.at(r, l), y_ + row * p_.y_row + column * p_.y_column);
      }
    }
  }

 private:
  static constexpr int kPart = Outputs<U, kRows, V>::kPart;

  __device__ void load_tap(int part, int tap, float (&weight)[kPart]) const {
    const float* const from = lane_taps_ + tap * kPitch<V> + part * kPart * kLanes<V>;
    if constexpr (V == 1) {
      weight[0] = *from;
    } else {
      const float4 four = *reinterpret_cast<const float4*>(from);
      weight[0] = four.x;
      weight[1] = four.y;
      weight[2] = four.z;
      weight[3] = four.w;
    }
  }
  const NhwcParameters& p_;
  const float* lane_taps_;
  bool exists_;
  int row_ = 0, column_ = 0;
  const S* x_ = nullptr;
  S* y_ = nullptr;
  Outputs<U, kRows, V> outputs_;
};

// Blocks of 256 threads whose registers a multiprocessor holds: as few as the columns of a row of inputs demand.
template <int V, class U>
constexpr int kResident = U::kReads > 12 || V* U::kReads > 80 ? 1 : 2;

template <class S, int V, int kRows, class U>
__global__ void __launch_bounds__(256, kResident<V, U>) depthwise_nhwc(const NhwcParameters p) {
  float* const taps = shared_memory<float>();
  const int slab = blockIdx.x % p.slabs, first = slab * kSlab<V>;
  stage_taps(taps, kPitch<V>, static_cast<const S*>(p.weight) + first * p.weight_channel, p.weight_channel,
             p.weight_tap, p.rows.taps * p.columns.taps, p.channels - first < kSlab<V> ? p.channels - first : kSlab<V>,
             [](int c) { return place_of_channel<V>(c); });
  __syncthreads();
  const int lane = threadIdx.x % kLanes<V>;
  const int64_t item = int64_t{blockIdx.x / p.slabs} * (blockDim.x / kLanes<V>)+threadIdx.x / kLanes<V>;
  NhwcThread<S, V, kRows, U> self(p, taps, lane, first + lane * V, item);
  // The warp decides together: one that has both kinds would do the work of both.
  const bool interior = __all_sync(~0u, !self.exists() || self.interior());
  if (!self.exists()) return;
  if (interior) {
    self.template compute<true>();
  } else {
    self.template compute<false>();
  }
  self.activate();
  if (interior) {
    self.template store<true>();
  } else {
    self.template store<false>();
  }
}

// A row of kernels.inc. kIsWide: 16 bytes of channels per thread, else one channel.
template <bool kIsWide, int kTaps, int kStride>
struct Nhwc {
  // Filters of one dimension may be long: as many columns share what is read as the registers hold.
  static constexpr int columns_of(int vector) {
    return kTaps != kAnyTaps || kStride > 1 || vector == 1 ? 4 : vector == 4 ? 8 : 6;
  }
  template <class S>
  using U = Unrolled<kTaps, kStride, columns_of(kIsWide ? kWide<S> : 1)>;

  template <class S>
  static constexpr int kVector = kIsWide ? kWide<S> : 1;
  // Two rows of outputs where the registers hold them.
  static constexpr int rows_of(int vector) { return vector == 4 && kTaps != kAnyTaps ? 2 : 1; }
  static int vector_of(DType dtype) { return kIsWide ? static_cast<int>(16 / element_size(dtype)) : 1; }
  static int slab_of(DType dtype) { return kIsWide ? 8 * vector_of(dtype) : 32; }
  static int64_t shared_bytes(const DepthwiseProblem& p) {
    return product(p.window.taps) * (slab_of(p.dtype) + 4) * int64_t{sizeof(float)};
  }

  static const char* can_run(const DepthwiseProblem& p) {
    if (const char* reason = why_not_rows(p, kTaps, kStride)) return reason;
    if (p.x.stride[1] != 1 || p.y.stride[1] != 1) return "not channels_last";
    if (shared_bytes(p) > 48 << 10) return "the taps do not fit shared memory";
    if (ceil_div(threads(p), 256) + parameters(p).slabs > kLargestGrid) return kGridTooLarge;
    if (!kIsWide) return nullptr;
    const int64_t bytes = element_size(p.dtype), vector = vector_of(p.dtype);
    if (p.channels % vector != 0) return "channels are not a multiple of 16 bytes";
    for (const View* view : {&p.x, &p.y}) {
      const int64_t (&size)[3] = view == &p.x ? p.window.in : p.window.out;
      bool aligned = reinterpret_cast<uintptr_t>(view->data) % 16 == 0;
      aligned &= p.batch == 1 || view->stride[0] * bytes % 16 == 0;
      for (int i : {1, 2}) aligned &= size[i] == 1 || view->stride[2 + i] * bytes % 16 == 0;
      if (!aligned) return "positions are not aligned to 16 bytes";
    }
    return nullptr;
  }

  static NhwcParameters parameters(const DepthwiseProblem& p) {
    const auto narrow = [](int64_t n) { return static_cast<int>(n); };
    auto q = parameters_of<NhwcParameters>(p);
    q.x_row = narrow(p.x.stride[3]);
    q.x_column = narrow(p.x.stride[4]);
    q.y_row = narrow(p.y.stride[3]);
    q.y_column = narrow(p.y.stride[4]);
    q.rows = axis_of(p.window, 1, rows_of(vector_of(p.dtype)));
    q.columns = axis_of(p.window, 2, columns_of(vector_of(p.dtype)));
    q.slabs = narrow(ceil_div(p.channels, slab_of(p.dtype)));
    // The 32 items of a full block are about as high as wide.
    const int panels = narrow(ceil_div(q.columns.blocks, p.window.out[1] == 1 ? 32 : 4 * rows_of(vector_of(p.dtype))));
    q.panel = narrow(ceil_div(q.columns.blocks, panels));
    q.items_of_image = panels * q.panel * q.rows.blocks;
    q.items = p.batch * q.items_of_image;
    return q;
  }
  static int64_t threads(const DepthwiseProblem& p) {
    const NhwcParameters q = parameters(p);
    return q.items * q.slabs * slab_of(p.dtype) / vector_of(p.dtype);
  }

  static void launch(const DepthwiseProblem& p, const Runtime& runtime) {
    with_storage(p.dtype, [&]<class S>() { launch_as<S>(p, runtime); });
  }
  template <class S>
  static void launch_as(const DepthwiseProblem& p, const Runtime& runtime) {
    const NhwcParameters q = parameters(p);
    const int block = threads_of_block(threads(p), 256, runtime.threads);
    const int64_t blocks = ceil_div(q.items, block / kLanes<kVector<S>>) * q.slabs;
    cuda::launch("depthwise_nhwc", depthwise_nhwc<S, kVector<S>, rows_of(kVector<S>), U<S>>, blocks, block,
                 shared_bytes(p), runtime, q);
  }
};

}  // namespace dsconv::cuda

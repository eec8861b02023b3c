// Depthwise, mid activation and pointwise forward in one kernel: the depthwise map stays in the multiprocessor.
//
// A block computes a tile of pixels (rows x columns of one image) x one or several tiles of kOutputs outputs. It walks
// through the channels, 64 bytes of them at a time: the inputs of the tile and its halo go to shared memory, CUDA cores
// make of them the depthwise values, rounded to the tensors' type as memory would round them (to tf32 where that is what
// is multiplied), and a product with as many columns of the pointwise weights adds to the sums in registers.
//
// What a warp has, 32 pixels x half of the outputs or 32 outputs x pixels, is the same whatever the tile: how many pixels
// that has, and how many warps the block, is known at run time only, and all tiles share a kernel.
//
// Two dataflows differ in how many chunks of depthwise values shared memory holds. Accumulators: two of them, one that is
// multiplied while the next is made; a block has one tile of outputs, and blocks of other tiles compute the depthwise
// values anew. Resident: all of them, and the block goes on to the next tiles of outputs with them.
//
// A step is one chunk of one tile. There is one barrier for each: the product of this chunk and the depthwise values of
// the next depend on what was there before it alone, so half of the warps begin with the one and half with the other, and
// tensor cores and CUDA cores work at the same time.
#pragma once

#include <type_traits>

#include "cuda/depthwise_rows.cuh"
#include "cuda/fused_product.cuh"
#include "cuda/plane_stream.cuh"

namespace dsconv::cuda {

// A tensor of [images, channels, rows, columns].
struct Map {
  void* data;
  int64_t image;
  int channel, row, column;
};

struct FusedParameters {
  Map x, y, residual;
  const void *depthwise_weight, *depthwise_bias, *weight, *bias;
  int64_t depthwise_channel, depthwise_tap, depthwise_bias_channel, weight_output, weight_channel, bias_output;
  // What lies side by side is moved 16 bytes at a time.
  bool wide_input, wide_weight, wide_outputs;
  Axis rows, columns;
  int row_stride, column_stride;
  int channels, multiplier, outputs;
  int tile_shift, height_shift;  // a tile has 1 << tile_shift columns and 1 << height_shift rows
  int row_tiles, column_tiles;   // of an image
  int splits;                    // of the outputs over blocks
  int tiles;                     // of outputs, of a block
  int resident;                  // of a chunk's number, the bits that say where its depthwise values are: 1, or all
  // The input of a tile: with row_split 2 even rows come before odd ones, so that lanes whose outputs are neighbours
  // downwards read neighbouring rows.
  int box_rows, box_columns, box_pitch, row_split, rows_of_phase;
  int stages;  // 2 or 3 boxes and chunks of weights, those under way included
  ActivationSpec mid, activation;
};

// A block has two threads for each pixel.
constexpr int kMostPixelsShift = 7, kMostThreads = 2 << kMostPixelsShift;

// Taps and bias of a chunk of channels: floats, [tap][channel], the bias behind the taps.
constexpr int kTapPitch = 36;

// kTaps and kStride of 0 are counted at run time. kPixelsInner: neighbouring pixels lie side by side (contiguous), else
// neighbouring channels (channels_last).
template <class F, int kOutputs, int kTaps, int kStride, bool kPixelsInner>
class FusedBlock {
  using S = Storage<F>;
  static constexpr int kVector = kWide<S>, kSlab = kChunk<S>;
  static constexpr int kQuads = kSlab / 4;   // threads across the channels of a chunk
  static constexpr int kGroup = kQuads / 2;  // pixels of a thread, side by side
  static constexpr int kWeightBytes = kOutputs * kRowBytes;
  // Copies of a thread that wait in registers while it multiplies, where copies are not asynchronous: most of a window of
  // stride 1.
  static constexpr int kHeldBoxes = kStride == 2 ? 1 : 2, kHeldWeights = kOutputs / 64;
  using Sums = Product<F, kOutputs / 2, kPixelsInner>;

 public:
  __device__ FusedBlock(const FusedParameters& p, unsigned char* shared) : p_(p), shared_(shared) {
    int block = static_cast<int>(blockIdx.x);
    output_ = block % p.splits * p.tiles * kOutputs;
    block /= p.splits;
    column_ = block % p.column_tiles << p.tile_shift;
    block /= p.column_tiles;
    row_ = block % p.row_tiles << p.height_shift;
    image_ = block / p.row_tiles;
    chunks_ = (p.channels + kSlab - 1) / kSlab;
  }

  __device__ void compute() {
    const int tiles = min(p_.tiles, (p_.outputs - output_ + kOutputs - 1) / kOutputs);
    const int stages = p_.stages, steps = tiles * chunks_;
    const bool product_first = threadIdx.x / 128 % 2 == 1, multiplies = has_pixels();
    Step now{-stages, 0};
    int slot = 0;  // the step modulo stages
    sums_.start();
    // Rounds below -1 only load, and that of -1 makes the first depthwise values: weights are under way for stages - 1
    // rounds, boxes for as many before a round that reads them.
#pragma unroll 1
    for (int step = -stages; step < steps; ++step) {
      if (step >= -1) {
        if (stages == 2) {
          wait_for_copies_but<0>();
        } else {
          wait_for_copies_but<1>();
        }
        __syncthreads();
      }
      const int before = slot == 0 ? stages - 1 : slot - 1, after = slot == stages - 1 ? 0 : slot + 1;
      HeldCopies<kHeldBoxes> of_box;
      HeldCopies<kHeldWeights> of_weight;
      const auto load = [&] {
        of_weight.start();
        load_weight(now.ahead(stages - 1, chunks_), tiles, before, of_weight);
        of_box.start();
        load_box(step + stages, slot, of_box);
        commit_copies();
      };
      if constexpr (kAsynchronousCopies) load();
      load_taps(step + 2);
      // Where copies are not asynchronous, a round begins them in the turn of the product.
      if (!kAsynchronousCopies || step >= -1) {
#pragma unroll 1
        for (int turn = 0; turn < 2; ++turn) {
          if ((turn == 0) != product_first) {
            if (exists(step + 1)) depthwise(step + 1, after);
            continue;
          }
          if constexpr (!kAsynchronousCopies) load();
          if (step >= 0 && multiplies) {
            const Operand pixels = map(now.chunk), outputs = weight(slot);
            sums_.add(share(), kPixelsInner ? outputs : pixels, kPixelsInner ? pixels : outputs, halves(now.chunk));
          }
          of_box.put(shared_);
          of_weight.put(shared_);
        }
        if (now.chunk == chunks_ - 1 && multiplies) {
          store(output_ + now.tile * kOutputs);
          sums_.start();
        }
      }
      now = now.ahead(1, chunks_);
      slot = after;
    }
  }

 private:
  // A chunk of a tile of outputs.
  struct Step {
    int chunk, tile;

    __device__ Step ahead(int steps, int chunks) const {
      Step step{chunk + steps, tile};
      for (; step.chunk >= chunks; step.chunk -= chunks) ++step.tile;
      return step;
    }
  };

  // A warp's part of the product.
  __device__ static WarpTile share() {
    constexpr int kDown = kOutputs / 32;
    const int warp = threadIdx.x / 32;
    return kPixelsInner ? WarpTile{warp % kDown * 32, warp / kDown * Sums::kColumns}
                        : WarpTile{warp / 2 * 32, warp % 2 * Sums::kColumns};
  }

  // A warp without a pixel of the map has nothing to do: what it would write is never stored.
  __device__ bool in_map(int row, int column) const {
    return row_ + row < p_.rows.out && column_ + column < p_.columns.out;
  }
  // The first of the pixels that a warp multiplies is the highest and the leftmost.
  __device__ bool has_pixels() const {
    const int first = kPixelsInner ? share().column : share().row;
    return in_map(first >> p_.tile_shift, first & ((1 << p_.tile_shift) - 1));
  }

  // Shared memory: the depthwise values of two chunks or of all, weights, then boxes and the taps of two chunks; these
  // are no longer read when the first sums take their place.
  __device__ int map_bytes() const { return kRowBytes << (p_.tile_shift + p_.height_shift); }
  __device__ int operand_shift() const { return p_.height_shift > 0 ? p_.tile_shift : kGroup / 2; }
  __device__ Operand map(int chunk) const {
    return {reinterpret_cast<uint4*>(shared_ + (chunk & p_.resident) * map_bytes()), operand_shift()};
  }
  __device__ unsigned char* weights() const { return shared_ + (p_.resident < 0 ? chunks_ : 2) * map_bytes(); }
  __device__ Operand weight(int slot) const {
    return {reinterpret_cast<uint4*>(weights() + slot * kWeightBytes), operand_shift()};
  }
  __device__ unsigned char* box(int slot) const {
    return weights() + p_.stages * kWeightBytes + slot * p_.box_rows * p_.box_pitch * kRowBytes;
  }
  __device__ float* taps(int chunk) const {
    return reinterpret_cast<float*>(box(p_.stages)) + chunk % 2 * (p_.rows.taps * p_.columns.taps + 1) * kTapPitch;
  }

  __device__ int box_row(int row) const {
    return (row & (p_.row_split - 1)) * p_.rows_of_phase + (row >> (p_.row_split - 1));
  }
  // Where a byte of a position lies. Two positions fill the banks. Columns are swapped in pairs in every second row and
  // every second group of columns that a thread starts at, so that two threads side by side or one below the other meet
  // no bank twice; and units are permuted where neighbouring pixels are written together.
  __device__ int box_at(int row, int column, int byte) const {
    const int r = box_row(row), swapped = (r ^ (column >> group_shift())) & 1;
    return (r * p_.box_pitch + (column ^ swapped)) * kRowBytes + (byte ^ permuted(column >> 1));
  }
  __device__ static int permuted(int pair) { return kPixelsInner ? (pair & 3) * 16 : 0; }
  __device__ int group_shift() const { return kGroup / 2 + (column_stride() == 2); }
  __device__ int row_stride() const { return kStride ? kStride : p_.row_stride; }
  __device__ int column_stride() const { return kStride ? kStride : p_.column_stride; }
  __device__ int top() const { return row_ * row_stride() - p_.rows.pad; }
  __device__ int left() const { return column_ * column_stride() - p_.columns.pad; }

  __device__ bool exists(int chunk) const { return chunk >= 0 && chunk < chunks_; }
  // Channels of a chunk that exist, and how many halves of it the product needs.
  __device__ int remaining(int chunk) const { return p_.channels - chunk * kSlab; }
  __device__ int halves(int chunk) const { return remaining(chunk) > kSlab / 2 ? 2 : 1; }

  // A unit of values that are not 16 aligned bytes; zeros beyond `count`.
  template <class At>
  __device__ static void gather(uint4* to, int count, At at) {
    uint32_t word[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (i >= count) break;
      if constexpr (sizeof(S) == 4) {
        word[i] = __ldg(reinterpret_cast<const uint32_t*>(at(i)));
      } else {
        word[i / 2] |= uint32_t{__ldg(reinterpret_cast<const uint16_t*>(at(i)))} << i % 2 * 16;
      }
    }
    *to = make_uint4(word[0], word[1], word[2], word[3]);
  }

  // Of positions outside the map, and of channels that do not exist, nothing is written: nobody reads the former, and
  // what becomes of the latter is replaced.
  __device__ void load_box(int chunk, int slot, HeldCopies<kHeldBoxes>& copies) {
    const int first = chunk * kSlab;
    if (!exists(chunk)) return;
    const Clipped rows(top(), p_.box_rows, p_.rows.in), columns(left(), p_.box_columns, p_.columns.in);
    if (rows.count == 0 || columns.count == 0) return;
    const int down = rows.begin - top(), across = columns.begin - left();
    const int to = static_cast<int>(box(slot) - shared_);
    const S* const x =
        static_cast<const S*>(p_.x.data) + image_ * p_.x.image + rows.begin * p_.x.row + columns.begin * p_.x.column;
    for_box<copies.kHeld>(rows.count, columns.count, [&](int row, int column, int u, int i) {
      const int channel = first + u * kVector, at = to + box_at(row + down, column + across, 16 * u);
      if (channel >= p_.channels) return;
      const S* const from = x + row * p_.x.row + column * p_.x.column;
      if (p_.wide_input) {
        copies.copy(i, shared_, at, from + channel, min(kVector, p_.channels - channel) * int{sizeof(S)});
      } else {
        int source = channel / p_.multiplier, of_source = channel % p_.multiplier;
        gather(reinterpret_cast<uint4*>(shared_ + at), p_.channels - channel, [&](int) {
          const S* const value = from + source * p_.x.channel;
          of_source = of_source + 1 == p_.multiplier ? 0 : of_source + 1;
          source += of_source == 0;
          return value;
        });
      }
    });
  }
  // Visits the units of so many positions in the order of memory: see for_stream.
  template <int kFirst, class Visit>
  __device__ static void for_box(int rows, int columns, Visit visit) {
    if constexpr (kPixelsInner) {
      for_stream<kFirst>(kUnits, rows, columns, [&](int u, int row, int column, int i) { visit(row, column, u, i); });
    } else {
      for_stream<kFirst>(rows, columns, kUnits, visit);
    }
  }

  // Zeros for the channels that do not exist. What outputs that do not exist would be is never stored.
  __device__ void load_weight(const Step& step, int tiles, int slot, HeldCopies<kHeldWeights>& copies) {
    if (step.chunk < 0 || step.tile >= tiles) return;
    const int first = step.chunk * kSlab, start = output_ + step.tile * kOutputs;
    const int outputs = min(p_.outputs - start, kOutputs), units = kUnits / 2 * halves(step.chunk);
    const Operand to = weight(slot);
    const S* const from = static_cast<const S*>(p_.weight) + start * p_.weight_output;
    for_stream<copies.kHeld>(outputs * kUnits, [&](int unit, int i) {
      const int output = unit / kUnits, u = unit % kUnits, channel = first + u * kVector;
      if (u >= units) return;
      const S* const row = from + output * p_.weight_output;
      const int count = max(0, min(kVector, p_.channels - channel));
      uint4* const at = to.unit(output, u);
      if (p_.wide_weight) {
        const int offset = static_cast<int>(reinterpret_cast<unsigned char*>(at) - shared_);
        copies.copy(i, shared_, offset, row + (count ? channel : 0), count * int{sizeof(S)});
      } else {
        gather(at, count, [&](int c) { return row + (channel + c) * p_.weight_channel; });
      }
    });
  }

  __device__ void load_taps(int chunk) {
    const int first = chunk * kSlab, count = min(remaining(chunk), kSlab), rows = p_.rows.taps * p_.columns.taps;
    if (!exists(chunk)) return;
    float* const to = taps(chunk);
    stage_taps(to, kTapPitch, static_cast<const S*>(p_.depthwise_weight) + first * p_.depthwise_channel,
               p_.depthwise_channel, p_.depthwise_tap, rows, count, [](int c) { return c; });
    const int c = threadIdx.x;
    if (c < count) {
      const S* const bias = static_cast<const S*>(p_.depthwise_bias);
      to[rows * kTapPitch + c] = bias ? widen(__ldg(bias + (first + c) * p_.depthwise_bias_channel)) : 0.0f;
    }
  }

  // Four channels of a position of the box.
  __device__ static void load_four(const unsigned char* at, float (&value)[4]) {
    if constexpr (sizeof(S) == 4) {
      const float4 four = *reinterpret_cast<const float4*>(at);
      value[0] = four.x;
      value[1] = four.y;
      value[2] = four.z;
      value[3] = four.w;
    } else {
      const uint2 bits = *reinterpret_cast<const uint2*>(at);
      const float2 low = widen_pair<S>(bits.x), high = widen_pair<S>(bits.y);
      value[0] = low.x;
      value[1] = low.y;
      value[2] = high.x;
      value[3] = high.y;
    }
  }

  // A thread has four channels of kGroup neighbouring pixels. Lanes go through the channels, then down the tile.
  __device__ void depthwise(int chunk, int slot) {
    const int quad = threadIdx.x % kQuads, group = threadIdx.x / kQuads;
    const int row = group & ((1 << p_.height_shift) - 1), column = (group >> p_.height_shift) * kGroup;
    if (!__any_sync(~0u, in_map(row, column))) return;
    float sum[kGroup][4];
    if constexpr (kTaps == 0) {
      add_any_taps(chunk, slot, quad, row, column, sum);
    } else {
      const Inside inside(p_.columns, left() + column * kStride);
      // The warp decides together: one that has both kinds would do the work of both.
      if (__all_sync(~0u, inside.holds_all((kGroup - 1) * kStride + kTaps))) {
        add_taps<true>(chunk, slot, quad, row, column, inside, sum);
      } else {
        add_taps<false>(chunk, slot, quad, row, column, inside, sum);
      }
    }
    activate_values(reinterpret_cast<float (&)[4 * kGroup]>(sum), p_.mid);
    const Operand to = map(chunk);
    const int count = remaining(chunk) - 4 * quad;
#pragma unroll
    for (int l = 0; l < kGroup; ++l) {
      float (&value)[4] = sum[l];
#pragma unroll
      for (int v = 0; v < 4; ++v) value[v] = v < count ? factor(value[v]) : 0.0f;
      const int pixel = (row << p_.tile_shift) + column + l;
      uint4* const unit = to.unit(pixel, quad * 4 / kVector);
      if constexpr (sizeof(S) == 4) {
        *reinterpret_cast<float4*>(unit) = make_float4(value[0], value[1], value[2], value[3]);
      } else {
        reinterpret_cast<uint2*>(unit)[quad % 2] =
            make_uint2(narrow_pair<S>(value[0], value[1]), narrow_pair<S>(value[2], value[3]));
      }
    }
  }

  __device__ static float factor(float value) {
    if constexpr (__is_same(F, Tf32)) return __builtin_bit_cast(float, to_tf32(value));
    return value;
  }

  __device__ void start(const float* bias, float (&sum)[kGroup][4]) const {
    const float4 four = *reinterpret_cast<const float4*>(bias);
#pragma unroll
    for (auto& value : sum) {
      value[0] = four.x;
      value[1] = four.y;
      value[2] = four.z;
      value[3] = four.w;
    }
  }
  __device__ static void add(const float4& tap, const float (&in)[4], float (&sum)[4]) {
    sum[0] += tap.x * in[0];
    sum[1] += tap.y * in[1];
    sum[2] += tap.z * in[2];
    sum[3] += tap.w * in[3];
  }

  template <bool kInterior>
  __device__ void add_taps(int chunk, int slot, int quad, int row, int column, const Inside& inside,
                           float (&sum)[kGroup][4]) {
    constexpr int kReads = (kGroup - 1) * kStride + kTaps;
    const float* tap = taps(chunk) + 4 * quad;
    start(tap + p_.rows.taps * kTaps * kTapPitch, sum);
    const unsigned char* const from = box(slot);
    const int first = top() + row * kStride, byte = quad * 4 * int{sizeof(S)}, pair = column * kStride / 2;
#pragma unroll 1
    for (int u = 0; u < p_.rows.taps; ++u, tap += kTaps * kTapPitch) {
      const int down = u * p_.rows.dilation;
      if (static_cast<unsigned>(first + down) >= static_cast<unsigned>(p_.rows.in)) continue;
      // box_at() of columns from an even one on.
      const int r = box_row(row * kStride + down), odd = (r ^ (column / kGroup)) & 1;
      const unsigned char* const line = from + (r * p_.box_pitch + column * kStride) * kRowBytes;
      float4 weight[kTaps];
#pragma unroll
      for (int t = 0; t < kTaps; ++t) weight[t] = *reinterpret_cast<const float4*>(tap + t * kTapPitch);
      // Column by column: fewer registers than the whole row would take.
#pragma unroll
      for (int c = 0; c < kReads; ++c) {
        const int swapped = c / (kGroup * kStride) % 2 ? 1 - odd : odd;
        float in[4];
        load_four(line + (c + (c % 2 ? -swapped : swapped)) * kRowBytes + (byte ^ permuted(pair + c / 2)), in);
#pragma unroll
        for (int l = 0; l < kGroup; ++l) {
          const int t = c - l * kStride;
          if (t >= 0 && t < kTaps && (kInterior || inside.holds(c))) add(weight[t], in, sum[l]);
        }
      }
    }
  }

  __device__ void add_any_taps(int chunk, int slot, int quad, int row, int column, float (&sum)[kGroup][4]) {
    const float* tap = taps(chunk) + 4 * quad;
    start(tap + p_.rows.taps * p_.columns.taps * kTapPitch, sum);
    const unsigned char* const from = box(slot);
    const int byte = quad * 4 * int{sizeof(S)};
#pragma unroll 1
    for (int u = 0; u < p_.rows.taps; ++u) {
      const int down = row * row_stride() + u * p_.rows.dilation, y = top() + down;
      if (static_cast<unsigned>(y) >= static_cast<unsigned>(p_.rows.in)) {
        tap += p_.columns.taps * kTapPitch;
        continue;
      }
#pragma unroll 1
      for (int t = 0; t < p_.columns.taps; ++t, tap += kTapPitch) {
        const float4 weight = *reinterpret_cast<const float4*>(tap);
#pragma unroll
        for (int l = 0; l < kGroup; ++l) {
          const int across = (column + l) * column_stride() + t * p_.columns.dilation;
          if (static_cast<unsigned>(left() + across) >= static_cast<unsigned>(p_.columns.in)) continue;
          float in[4];
          load_four(from + box_at(down, across, byte), in);
          add(weight, in, sum[l]);
        }
      }
    }
  }

  // Through shared memory, kSumRows x 32 sums of a warp at a time, so that neighbours are stored together: by a lane, 16
  // bytes of them, or by as many lanes.
  __device__ void store(int first_output) {
    const WarpTile tile = share();
    float* const sums = reinterpret_cast<float*>(box(0)) + threadIdx.x / 32 * (kSumRows * kSumPitch);
#pragma unroll 1
    for (int block = 0; block < Sums::kColumns / kSumRows; ++block) {
      const int part = block / 2, half = block % 2, row = tile.row + kSumRows * half, column = tile.column + 32 * part;
      sums_.put(part, half, sums);
      __syncwarp();
      if (p_.wide_outputs) {
        store_sums<kVector>(first_output, row, column, sums);
      } else {
        store_sums<1>(first_output, row, column, sums);
      }
      __syncwarp();
    }
  }

  template <int V>
  __device__ void store_sums(int first_output, int first_row, int first_column, const float* sums) const {
    constexpr int kAcross = 32 / V;
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < kSumRows * kAcross; i += 32) {
      const int row = i / kAcross, column = i % kAcross * V;
      const float* const from = sums + row * kSumPitch + column;
      float value[V];
      if constexpr (V == 1) {
        value[0] = *from;
      } else {
        // Of eight, odd rows are read the other half first, which lies in other banks.
        const int odd = V == 8 ? row % 2 : 0;
        float4 four[V / 4];
#pragma unroll
        for (int f = 0; f < V / 4; ++f) four[f] = *reinterpret_cast<const float4*>(from + 4 * (f ^ odd));
#pragma unroll
        for (int f = 0; f < V / 4; ++f) {
          const float4 some = V == 8 && odd ? four[f ^ 1] : four[f];
          value[4 * f] = some.x;
          value[4 * f + 1] = some.y;
          value[4 * f + 2] = some.z;
          value[4 * f + 3] = some.w;
        }
      }
      finish(first_output, first_row + row, first_column + column, value);
    }
  }

  // Sums of V neighbouring outputs of one pixel, or of neighbouring pixels of one output.
  template <int V>
  __device__ void finish(int first_output, int row, int first, float (&value)[V]) const {
    const int pixel = kPixelsInner ? first : row, output = first_output + (kPixelsInner ? row : first);
    const int y = row_ + (pixel >> p_.tile_shift), x = column_ + (pixel & ((1 << p_.tile_shift) - 1));
    if (y >= p_.rows.out || x >= p_.columns.out || output >= p_.outputs) return;
    if (p_.bias) {
#pragma unroll
      for (int v = 0; v < V; ++v)
        value[v] += widen(__ldg(static_cast<const S*>(p_.bias) + (output + (kPixelsInner ? 0 : v)) * p_.bias_output));
    }
    const auto at = [&](const Map& m) {
      return static_cast<S*>(m.data) + image_ * m.image + output * m.channel + y * m.row + x * m.column;
    };
    if (p_.residual.data) {
      Channels<S, V> other;
      other.load(at(p_.residual));
#pragma unroll
      for (int part = 0; part < other.kParts; ++part) {
        float some[other.kPart];
        other.part(part, some);
#pragma unroll
        for (int v = 0; v < other.kPart; ++v) value[part * other.kPart + v] += some[v];
      }
    }
    activate_values(value, p_.activation);
    Channels<S, V>::store(value, at(p_.y));
  }

  const FusedParameters& p_;
  unsigned char* shared_;
  int output_, column_, row_, image_, chunks_;
  Sums sums_;
};

// Threads that the registers of a multiprocessor hold: with 128 each, or with twice as many where that would not do.
template <class F, int kOutputs, int kTaps>
constexpr int resident_threads(bool asynchronous_copies) {
  return kOutputs == 128 && (__is_same(F, float) || kTaps >= 7 || !asynchronous_copies) ? 256 : 512;
}

template <class F, int kOutputs, int kTaps, int kStride, bool kPixelsInner>
__global__ void __launch_bounds__(kMostThreads,
                                  (resident_threads<F, kOutputs, kTaps>(kAsynchronousCopies) / kMostThreads))
    fused_forward(const FusedParameters p) {
  FusedBlock<F, kOutputs, kTaps, kStride, kPixelsInner>(p, shared_memory<unsigned char>()).compute();
}

}  // namespace dsconv::cuda

// The pointwise passes on processors that multiply bfloat16: tiles (AMX) or pairs (AVX512-BF16), vectors do the rest.
#pragma once

#include "cpu/pair_product.h"
#include "pointwise_gemm.h"
#include "tile_product.h"

namespace dsconv::cpu::DSCONV_ISA {

// Rows of A and packed weights as tiles want them; pairs can do with the same.
struct Bf16Operands {
  using S = BFloat16;
  using T = float;
  using A = BFloat16;
  static constexpr int kColumns = amx::kBlock, kMostOutputs = kColumns, kTile = amx::kTile, kStep = amx::kStep;
  static constexpr int kL = kLanes<T>;

  static int64_t panel_values(int64_t depth) { return ceil_div(depth, kStep) * amx::kStepValues; }
  // Outputs [first, first + kColumns) of the weights [K, C] (any strides) as steps, see tile_product.h; zeros past K and C.
  static void pack(A* panel, const View& weight, int64_t out_channels, int64_t in_channels, int64_t first) {
    const auto* source = static_cast<const S*>(weight.data);
    for (int64_t c = 0; c < in_channels; c += kStep) {
      for (int64_t k = first; k < first + kColumns; k += kTile, panel += kTile * kStep) {
        const int64_t columns = max64(0, min64(kTile, out_channels - k)), channels = min64(kStep, in_channels - c);
        pack_tile(panel, source + k * weight.stride[0] + c * weight.stride[1], weight.stride[0], weight.stride[1],
                  columns, channels);
      }
    }
  }
  // [column][channel] becomes [pair of channels][column][channel of the pair]: a transpose of pairs.
  static void pack_tile(A* packed, const S* source, int64_t column_step, int64_t channel_step, int64_t columns,
                        int64_t channels) {
    alignas(kBlockBytes) S tile[kTile][kStep] = {};
    for (int64_t k = 0; k < columns; ++k) {
      const S* from = source + k * column_step;
      if (channel_step == 1) {
        memcpy(tile[k], from, channels * sizeof(S));
      } else {
        for (int64_t c = 0; c < channels; ++c) tile[k][c] = from[c * channel_step];
      }
    }
    constexpr int kPairs = kStep / 2;
    for (int k = 0; k < kTile; k += kL) {
      for (int pair = 0; pair < kPairs; pair += kL) {
        Vec<T> block[kL];
        unroll<kL>([&]<int i>() __attribute__((always_inline)) {
          block[i] = load(reinterpret_cast<const T*>(&tile[k + i][2 * pair]));
        });
        transpose<T>(block);
        unroll<kL>([&]<int i>() __attribute__((always_inline)) {
          store(reinterpret_cast<T*>(packed + (pair + i) * 2 * kTile + 2 * k), block[i]);
        });
      }
    }
  }

  // A step takes kStep channels: past the last one are zeros.
  static void clear_tails(A* a, int64_t rows, int64_t lda, int64_t depth) {
    const int64_t tail = round_up(depth, kStep) - depth;
    for (int64_t i = 0; tail > 0 && i < rows; ++i) memset(a + i * lda + depth, 0, tail * sizeof(A));
  }

  static void gather(A* a, int64_t lda, const View& view, int64_t image, int64_t channels, const Box& box) {
    for_rows<S>(view, image, box, [&](int64_t position, const BoxRow<S>& row) {
      for (int64_t column = 0; column < box.extent[2]; ++column) {
        A* to = a + (position + column) * lda;
        const S* from = row.data + column * row.column;
        if (row.channel == 1) {
          memcpy(to, from, channels * sizeof(S));
        } else if (column % kL == 0) {
          gather_columns(to, lda, from, row, channels, min64(kL, box.extent[2] - column));
        }
      }
    });
  }
  // Up to kL columns through registers, as the compute type.
  static void gather_columns(A* a, int64_t lda, const S* from, const BoxRow<S>& row, int64_t channels,
                             int64_t columns) {
    constexpr int64_t kTurned = 256;
    alignas(kBlockBytes) T turned[kL * kTurned];
    for (int64_t first = 0; first < channels; first += kTurned) {
      const int64_t count = min64(kTurned, channels - first), lanes = round_up(count, kL);
      RowCopy<S>::gather(turned, lanes, from, {channels, 1, 1}, first, 0, row.channel, row.column, columns, 0);
      for (int64_t i = 0; i < columns; ++i) narrow_row(a + i * lda + first, turned + i * lanes, count);
    }
  }
};

struct TileProduct : Bf16Operands {
  static constexpr int kRowBlock = amx::kBlock;

  static void begin() { amx::begin(); }
  static void end() { amx::end(); }

  template <class Y>
  static void multiply(const A* a, int64_t lda, int64_t rows, const A* panel, int64_t depth, const Epilogue<T, Y>& e) {
    constexpr int kTogether = 4, kVectors = kColumns / kL;
    alignas(kBlockBytes) T sums[amx::kBlock * kColumns];
    for (int64_t first = 0; first < rows; first += kRowBlock) {
      const int64_t end = min64(first + kRowBlock, rows);
      e.ahead.lines(first, end - first, 1).fetch();
      amx::multiply(bits(a + first * lda), lda, bits(panel), ceil_div(depth, kStep), end - first > kTile,
                    e.columns > kTile, sums);
      int64_t row = first;
      for (; row + kTogether <= end; row += kTogether)
        finish<kTogether, kVectors>(sums + (row - first) * kColumns, e, row);
      for (; row < end; ++row) finish<1, kVectors>(sums + (row - first) * kColumns, e, row);
    }
  }
  template <int kRows, int kVectors, class Y>
  static void finish(const T* sums, const Epilogue<T, Y>& e, int64_t row) {
    Vec<T> v[kRows * kVectors];
    unroll<kRows * kVectors>(
        [&]<int i>() __attribute__((always_inline)) { v[i] = load(sums + i * kL) + load(e.bias + i % kVectors * kL); });
    finish_rows<kRows, kVectors>(v, e, row);
  }
  static const uint16_t* bits(const A* a) { return reinterpret_cast<const uint16_t*>(a); }
};

struct PairProduct : Bf16Operands {
  static constexpr int kRowBlock = 1;

  static void begin() {}
  static void end() {}

  // The innermost step of a product (see ChannelSteps): two channels.
  struct Steps {
    using Sum = T;
    using A = Bf16Operands::A;
    static constexpr bool across = false;
    static constexpr int kVectors = kColumns / kL;
    static int64_t count(int64_t depth) { return ceil_div(depth, 2); }
    static Vec<T> weights(const A* panel, int64_t k, int v) {
      constexpr int64_t kPairs = kStep / 2, kRow = 2 * kTile;  // of a tile of columns
      const int column = v * kL;
      const int64_t others = k & -kPairs;  // rows of the other tile before this one
      return load(
          reinterpret_cast<const T*>(panel + (k + others + column / kTile * kPairs) * kRow + column % kTile * 2));
    }
    template <class V>
    static V value(const A* a, int64_t lda, int64_t row, int64_t k) {
      typedef uint32_t Word __attribute__((vector_size(sizeof(V))));
      uint32_t pair;
      memcpy(&pair, a + row * lda + 2 * k, sizeof pair);
      return reinterpret_cast<V>(Word{} + pair);
    }
    template <class V>
    static void multiply(V& sum, V value, V weights) {
      multiply_pairs(sum, value, weights);
    }
  };

  template <class Y>
  static void multiply(const A* a, int64_t lda, int64_t rows, const A* panel, int64_t depth, const Epilogue<T, Y>& e) {
    multiply_panel<Steps>(a, lda, rows, panel, depth, e);
  }
};

// What they multiply is bfloat16 alone.
template <class Problem>
DSCONV_INLINE const char* why_not_bf16(const Problem& p) {
  return storage_of(p) == DType::bf16 ? nullptr : "multiplies bfloat16 only";
}

template <class Product, class Storage = BFloat16>
struct Bf16Passes {
  template <class S>
  struct Forward : Pointwise<Storage, Product> {
    static const char* can_run(const PointwiseProblem& p) { return why_not_bf16(p); }
  };
  template <class S>
  struct FusedForward : Fused<Storage, Product> {
    static const char* can_run(const SeparableProblem& p) { return why_not_bf16(p); }
  };
};

// The depthwise passes by pairs of columns.
template <bool kTransposed>
struct PairedRows : Rows<PairedBFloat16, kTransposed> {
  using Base = Rows<PairedBFloat16, kTransposed>;
  static const char* can_run(const DepthwiseProblem& p) {
    if (const char* reason = why_not_bf16(p)) return reason;
    if (!RowStage<PairedBFloat16>::is_plain(Base::input_of(p), Base::input_map(p)))
      return "columns of channels are not read where they lie";
    if (kTransposed && max64(p.window.stride[1], p.window.stride[2]) > 1) return "strides of the input gradient";
    return Base::seen(p).window.taps[2] == 1 ? "no two taps side by side" : nullptr;
  }
};
template <class S>
struct PairedForward : PairedRows<false> {};
template <class S>
struct PairedGradInput : PairedRows<true> {};

template <class S>
struct PackedBf16 : PackedWeights<TileProduct> {};

}  // namespace dsconv::cpu::DSCONV_ISA

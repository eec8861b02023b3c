// The block kernels of the depthwise passes: a few outputs, all channels, on rows of columns of channels.
//
// One block of kRows x kPixels outputs is computed for all channels, a vector of channels at a time: an input vector is
// loaded once and multiplied into every accumulator whose window holds it. Channels are the innermost loop, so each
// input position is read as one contiguous run, and power-of-two pixel strides do not crowd a few cache sets. Borders:
// rows and columns outside the tensor are left out, so padding costs nothing and never meets a weight.
#pragma once

#include "activation_rows.h"
#include "cpu/pair_product.h"

namespace dsconv::cpu::DSCONV_ISA {

// Neighbouring taps that meet one row of the input. Offsets are in elements.
struct Segment {
  int64_t x;
  int64_t weight[2];    // for the first and the second output row
  int64_t low, high;    // the columns inside the tensor, counted from the column that output 0 reads first
  uint64_t inside = 0;  // scratch: a bit for each of those columns that the block reads
};

// A row of the input and the rows of taps that meet it.
struct InputRow {
  int kind;  // 0: taps of the first output row, 1: of both, 2: of the second
  int64_t x;
  int64_t weight[2];
};

// The segments of up to kChain taps, sorted by the output rows they belong to: the first alone, both, the second alone.
// Of each kind, those of kTaps taps come before those of one.
struct SegmentGroup {
  Segment* begin;
  const Segment* end[3][2];
};

// The rows of the input that the windows of one output row or two meet, where window kernels serve them: the same as the
// segments say, row by row.
struct WindowRows {
  static constexpr int kMost = 5;  // rows of taps + stride
  int64_t x[kMost];
  uint64_t inside;    // a bit for each row that lies in the tensor
  int64_t low, high;  // as in Segment
};

// The rows of column_strips.h, where x is in the first row of the input that the first row of outputs reads; rows of the
// input are counted from that one.
struct StripRows {
  int64_t x_row;      // elements between rows of taps
  int64_t low, high;  // the rows inside the tensor
  int64_t count;      // rows of outputs, y_row apart
};

// Rows of the input that lie further away than a cache, as offsets; none where fetching does not pay.
struct FreshRows {
  const int64_t* x;
  int64_t count;
};

// The first channel of a block: the last block ends with the last channel, where there are that many.
template <class T>
DSCONV_INLINE int64_t block_channel(int64_t next, int64_t channels) {
  return max64(0, min64(next, channels - kLanes<T>));
}

// What a block kernel works on: one or two output rows of one phase.
template <class T>
struct BlockRow {
  const SegmentGroup* groups;
  int64_t group_count;
  const void* x;                  // channel 0 of the first column that output 0 reads, in row 0 of the image
  void* y;                        // channel 0 of output 0: T where the blocks write it themselves and do not narrow it
  int64_t x_step, x_pixel;        // elements between columns, between the first columns of two outputs
  int64_t y_row, y_pixel;         // elements between the two output rows, between outputs
  const T* weights;               // [block][tap][lane], perhaps in pairs (pair_taps)
  int64_t weight_block;           // elements of a block of weights
  const T* bias;                  // [channels], at least a vector
  int64_t first, last, channels;  // channels [first, last) of `channels`; `first` begins a block
  ActivationSpec activation;
  bool streamed;  // the outputs go past the caches
  bool narrow;    // y is of the type that the blocks read, which is narrower than T
  T* staged;      // null, or where a block leaves its outputs, [row][pixel][channels in work], for `put` to move on
  void (*put)(const BlockRow&, int64_t pixel, int rows, int pixels);
  int64_t begin, end;  // the outputs that are computed
  int64_t distance;    // outputs to look ahead, if a block has fewer
  int64_t shared;  // elements from the first column that an output reads to the first that the one before it does not
  FreshRows fresh[2];  // rows that nothing has read before these outputs, and before those of the next rows
  T* total;            // scratch: the sums of the groups so far, where there are several
  WindowRows window;
  StripRows strip;
};

// Are there block kernels that read S? Without instructions that widen half types, rows are widened once, in the ring.
template <class S>
constexpr bool kWidens = sizeof(S) == sizeof(Compute<S>) || kVectorBytes > 16;

// Do block kernels that read S narrow their outputs themselves?
template <class S>
constexpr bool kNarrows = sizeof(S) < sizeof(Compute<S>) && kVectorBytes >= 32;

// Which of the columns from `column` on lie in [low, high): a bit for each of the first 63.
DSCONV_INLINE uint64_t columns_inside(int64_t low, int64_t high, int64_t column) {
  low = max64(low - column, 0);
  high = min64(high - column, 63);
  return high <= low ? 0 : ((uint64_t{1} << high) - 1) & ~((uint64_t{1} << low) - 1);
}

// Is the bit set? Asked where it matters: compilers would rather single out all bits first, and spill them.
template <int bit>
DSCONV_INLINE bool is_inside(uint64_t inside) {
  static_assert(bit < 31);
#if defined(__x86_64__)
  bool set;
  asm("testl %1, %k2" : "=@ccnz"(set) : "i"(1 << bit), "r"(inside));
  return set;
#else
  return inside & (uint64_t{1} << bit);
#endif
}

// Loads a vector of channels at x.
template <class S, class T = Compute<S>>
DSCONV_INLINE Vec<T> load_channels(const S* x) {
  if constexpr (sizeof(S) == sizeof(T)) {
    return load_once(x);
  } else {
    return load_wide<S>(x);
  }
}

// Loads the channels `times` steps (0, 1 or 2) of `step` bytes after x by one instruction: compilers would rather have a
// pointer for every column.
template <class S, int times, class T = Compute<S>>
DSCONV_INLINE Vec<T> load_steps(const char* x, int64_t step) {
#if defined(__AVX__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  if constexpr (sizeof(S) == sizeof(T) && times > 0) {
    Vec<T> v;
    asm("vmovups (%1,%2,%c3), %0"
        : "=v"(v)
        : "r"(x), "r"(step), "i"(times), "m"(*reinterpret_cast<const char (*)[]>(x)));
    return v;
  }
#endif
  return load_channels(reinterpret_cast<const S*>(x + times * step));
}

// Pairs of neighbouring columns: the bfloat16 value of the first in the lower half of each lane, that of the second above.
DSCONV_INLINE Vec<float> pair_of(Vec<float> first, Vec<float> second) {
  typedef uint32_t Word __attribute__((vector_size(kVectorBytes)));
  return reinterpret_cast<Vec<float>>((reinterpret_cast<Word>(first) >> 16) | reinterpret_cast<Word>(second));
}
DSCONV_INLINE Vec<float> first_of(Vec<float> pair) {
  typedef uint32_t Word __attribute__((vector_size(kVectorBytes)));
  return reinterpret_cast<Vec<float>>(reinterpret_cast<Word>(pair) << 16);
}
DSCONV_INLINE Vec<float> second_of(Vec<float> pair) {
  typedef uint32_t Word __attribute__((vector_size(kVectorBytes)));
  return reinterpret_cast<Vec<float>>(reinterpret_cast<Word>(pair) & (Word{} + 0xffff0000));
}
template <class S>
DSCONV_INLINE Vec<float> load_pair(const S* first, const S* second) {
#if DSCONV_VECTOR_BYTES == 64
  const __m512i place = lane_numbers();  // lane l: word l, word 16 + l
  const __m512i order = _mm512_or_si512(place, _mm512_slli_epi32(_mm512_add_epi32(place, _mm512_set1_epi32(16)), 16));
  const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first));
  const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second));
  const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  return reinterpret_cast<Vec<float>>(_mm512_permutexvar_epi16(order, both));
#else
  return pair_of(load_wide<S>(first), load_wide<S>(second));
#endif
}

// The columns of a block that may lie outside the tensor.
enum class Outside { none, ends, any };

// The outputs of a row of kPixels that read one of its columns: kFirst to kLast, kCount of them.
template <int kTaps, int kStride, int kPixels, int column>
struct ColumnOutputs {
  static constexpr int kFirst = column < kTaps ? 0 : (column - kTaps) / kStride + 1;
  static constexpr int kLast = column / kStride < kPixels ? column / kStride : kPixels - 1;
  static constexpr int kCount = kLast - kFirst + 1;
};

// Rows of outputs in work, as in go_down: of those with m in [first, last), how many meet row j * stride + r of the input.
// They are the first ones, each with row m * stride + r of taps.
DSCONV_INLINE constexpr int rows_meeting(int taps, int stride, int r, int first, int last) {
  return static_cast<int>(max64(min64(last, ceil_div(taps - r, stride)) - first, 0));
}

// A row of taps as pair_taps leaves them: the lower half of each holds the one before it.
template <int kTaps>
struct PairedTaps {
  Vec<float> packed[kTaps], first, last;

  __attribute__((always_inline)) void set(int t, Vec<float> value) {
    packed[t] = value;
    if (t == 0) first = second_of(value);
    if (t == kTaps - 1) last = second_of(value);
  }
  template <int t>
  __attribute__((always_inline)) Vec<float> tap() const {
    if constexpr (t == 0) return first;
    if constexpr (t == kTaps - 1) return last;
    return second_of(packed[t]);
  }
  template <int t>  // taps t and t + 1
  __attribute__((always_inline)) Vec<float> pair() const {
    return packed[t + 1];
  }
};

// A tap by itself.
template <class S, class T = Compute<S>>
DSCONV_INLINE Vec<T> load_tap(const T* p) {
  if constexpr (kIsPaired<S>) return second_of(load(p));
  return load(p);
}

// Passes to `one` and `two` what each output of a row meets in a row of the input, whose column `c` lies at
// at.operator()<c>(): one<p, t>(value) is for tap t of output p, two<p, t>(pair) for taps t and t + 1. Taps of an output that
// fill no pair are passed alone: a value outside its window could be infinite.
template <class S, int kTaps, int kStride, int kPixels, Outside outside, class At, class One, class Two>
DSCONV_INLINE void for_pairs(const At& at, uint64_t inside, const One& one, const Two& two) {
  constexpr int kColumns = (kPixels - 1) * kStride + kTaps;
  // Is the column read, if it is the first, the last or any other that may lie outside?
  const auto is_read = [&]<int column>() __attribute__((always_inline)) {
    constexpr bool kEnd = column == 0 || column == kColumns - 1;
    if constexpr (outside == Outside::any || (outside == Outside::ends && kEnd)) return is_inside<column>(inside);
    return true;
  };
  const auto alone = [&]<int column>(Vec<float> value) __attribute__((always_inline)) {
    using Here = ColumnOutputs<kTaps, kStride, kPixels, column>;
    unroll<Here::kCount>([&]<int n>() __attribute__((always_inline)) {
      constexpr int p = Here::kFirst + n;
      one.template operator()<p, column - p * kStride>(value);
    });
  };
  unroll<ceil_div(kColumns, 2)>([&]<int i>() __attribute__((always_inline)) {
    constexpr int column = 2 * i, next = column + 1;
    const bool first = is_read.template operator()<column>();
    if constexpr (next == kColumns) {
      if (first) alone.template operator()<column>(load_wide<S>(at.template operator()<column>()));
    } else if (const bool second = is_read.template operator()<next>(); first && second) {
      const Vec<float> both = load_pair<S>(at.template operator()<column>(), at.template operator()<next>());
      constexpr int kFirst = ColumnOutputs<kTaps, kStride, kPixels, column>::kFirst;
      constexpr int kLast = ColumnOutputs<kTaps, kStride, kPixels, next>::kLast;
      unroll<kLast - kFirst + 1>([&]<int n>() __attribute__((always_inline)) {
        constexpr int p = kFirst + n, t = column - p * kStride;
        if constexpr (t >= 0 && t + 1 < kTaps) two.template operator()<p, t>(both);
        if constexpr (t == -1) one.template operator()<p, 0>(second_of(both));
        if constexpr (t + 1 == kTaps) one.template operator()<p, t>(first_of(both));
      });
    } else {
      if (first) alone.template operator()<column>(load_wide<S>(at.template operator()<column>()));
      if (second) alone.template operator()<next>(load_wide<S>(at.template operator()<next>()));
    }
  });
}

// Accumulates such a row for two rows of outputs or for one of them.
template <class S, int kTaps, int kStride, bool kFirst, bool kSecond, int kPixels, Outside outside, class At>
DSCONV_INLINE void accumulate_pairs(Vec<float>* first, Vec<float>* second, const At& at,
                                    const PairedTaps<kTaps>& first_taps, const PairedTaps<kTaps>& second_taps,
                                    uint64_t inside) {
  for_pairs<S, kTaps, kStride, kPixels, outside>(
      at, inside,
      [&]<int p, int t>(Vec<float> value) __attribute__((always_inline)) {
        if constexpr (kFirst) first[p] += value * first_taps.template tap<t>();
        if constexpr (kSecond) second[p] += value * second_taps.template tap<t>();
      },
      [&]<int p, int t>(Vec<float> pair) __attribute__((always_inline)) {
        if constexpr (kFirst) multiply_pairs(first[p], pair, first_taps.template pair<t>());
        if constexpr (kSecond) multiply_pairs(second[p], pair, second_taps.template pair<t>());
      });
}

// Accumulates the kTaps taps of a segment for kRows rows. `inside` has a bit for every column that lies in the tensor.
template <class S, int kTaps, int kStride, int kRows, int kPixels, bool kEdge, class T = Compute<S>>
DSCONV_INLINE void accumulate_segment(Vec<T>* first, Vec<T>* second, const S* x, int64_t x_step, const T* weight0,
                                      const T* weight1, uint64_t inside) {
  if constexpr (kIsPaired<S> && kTaps > 1) {
    PairedTaps<kTaps> w[2];
    unroll<kTaps>([&]<int t>() __attribute__((always_inline)) {
      w[0].set(t, load(weight0 + t * kLanes<T>));
      if constexpr (kRows == 2) w[1].set(t, load(weight1 + t * kLanes<T>));
    });
    const auto at = [&]<int column>() __attribute__((always_inline)) { return x + column * x_step; };
    return accumulate_pairs<S, kTaps, kStride, true, kRows == 2, kPixels, kEdge ? Outside::any : Outside::none>(
        first, second, at, w[0], w[1], inside);
  }
  Vec<T> w[2][kTaps];
  unroll<kTaps>([&]<int t>() __attribute__((always_inline)) {
    w[0][t] = load_tap<S>(weight0 + t * kLanes<T>);
    if constexpr (kRows == 2) w[1][t] = load_tap<S>(weight1 + t * kLanes<T>);
  });
  unroll<(kPixels - 1) * kStride + kTaps>([&]<int column>() __attribute__((always_inline)) {
    if (kEdge && !is_inside<column>(inside)) return;
    const Vec<T> value = load_channels(x + column * x_step);
    using Here = ColumnOutputs<kTaps, kStride, kPixels, column>;
    unroll<Here::kCount>([&]<int n>() __attribute__((always_inline)) {
      constexpr int p = Here::kLast - n, t = column - p * kStride;
      first[p] += value * w[0][t];
      if constexpr (kRows == 2) second[p] += value * w[1][t];
    });
  });
}

// All segments of one kind. kSecond: the accumulators are those of the second row.
template <class S, int kTaps, int kStride, int kRows, int kPixels, bool kEdge, class T = Compute<S>>
DSCONV_INLINE const Segment* accumulate_segments(const Segment* s, const Segment* end, bool second_row, Vec<T>* first,
                                                 Vec<T>* second, int64_t x_step, const S* x, const T* weights) {
  for (; s != end; ++s) {
    accumulate_segment<S, kTaps, kStride, kRows, kPixels, kEdge>(
        first, second, x + s->x, x_step, weights + s->weight[second_row], weights + s->weight[1], s->inside);
  }
  return end;
}

// Where element `at` of neighbouring columns of `channels` lies, which are `step` apart.
DSCONV_INLINE int64_t column_offset(int64_t at, int64_t channels, int64_t step) {
  return step == channels ? at : at / channels * step + at % channels;
}

// The columns that the next block will be the first to read in the fresh rows. While a block walks along its channels, it
// fetches them in the order of their addresses and from all rows in turn: an order that the processor's own prefetchers
// follow, unlike that of a block, which reads a vector of every column.
template <class S, int kColumns, class T = Compute<S>>
struct NextBlock {
  const S* from;
  FreshRows rows;
  int64_t first, channels, step;  // of the channels that are computed

  // For a block of `pixels` outputs from output `pixel` on.
  __attribute__((always_inline)) NextBlock(const BlockRow<T>& row, int64_t pixel, int64_t pixels)
      : first(row.first), channels(row.last - row.first), step(row.x_step) {
    pixel += max64(pixels, row.distance);
    const bool beyond = pixel >= row.end;
    rows = row.fresh[beyond];
    if (beyond) pixel += row.begin - row.end;
    from = static_cast<const S*>(row.x) + first + pixel * row.x_pixel + row.shared;
  }
  // Fetches the share of a vector of channels.
  __attribute__((always_inline)) void fetch(int64_t channel) const {
    if (rows.count == 0) return;
    constexpr int64_t kLine = kBlockBytes / sizeof(S);
    const S* const share = from + column_offset((channel - first) * kColumns, channels, step);
    unroll<ceil_div(kColumns * kLanes<T>, kLine)>([&]<int line>() __attribute__((always_inline)) {
      for (int64_t i = 0; i < rows.count; ++i) __builtin_prefetch(share + line * kLine + rows.x[i], 0, 2);
    });
  }
};

// Where the outputs of a block go from output `pixel` on: to their places, or to the buffer. kDirect: to their places,
// through the caches.
template <class S, bool kDirect = false, class T = Compute<S>>
struct BlockOutputs {
  void* y;             // of S if `narrow`, else of T
  int64_t row, pixel;  // elements between the two output rows, between outputs
  bool narrow, streamed;

  __attribute__((always_inline)) BlockOutputs(const BlockRow<T>& block, int64_t first, int64_t pixels)
      : row(block.y_row),
        pixel(block.y_pixel),
        narrow(kNarrows<S> && block.narrow),
        streamed(!kDirect && kVectorBytes == kBlockBytes && block.streamed && !block.staged) {
    y = narrow ? static_cast<void*>(static_cast<S*>(block.y) + first * pixel)
               : static_cast<T*>(block.y) + first * pixel;
    if (kDirect || !block.staged) return;
    const int64_t base = block_channel<T>(block.first, block.channels);
    pixel = block.last - base;
    row = pixels * pixel;
    y = block.staged - base;
  }
  // Writes kRows x kPixels vectors, kVectors times, which are neighbours; `first` is the channel of the first.
  template <int kRows, int kPixels, int kVectors = 1>
  __attribute__((always_inline)) void write(const Vec<T>* values, int64_t first) const {
    constexpr int kCount = kVectors * kRows * kPixels;
    const auto place = [&](int i) __attribute__((always_inline)) {
      return first + i / (kRows * kPixels) * kLanes<T> + i / kPixels % kRows * row + i % kPixels * pixel;
    };
    const auto all = [&](auto* to, auto write_one) __attribute__((always_inline)) {
      unroll<kCount>([&]<int i>() __attribute__((always_inline)) { write_one(to + place(i), values[i]); });
    };
    if (streamed) {
      all(static_cast<T*>(y), [](T* to, Vec<T> v) __attribute__((always_inline)) { stream_narrow(to, v); });
    } else if (narrow && kRoundsBf16<S> && (kIsPaired<S> || has_avx512_bf16)) {
      unroll<ceil_div(kCount, 2)>([&]<int i>() __attribute__((always_inline)) {
        constexpr int one = 2 * i, other = one + 1;
        S* const to = static_cast<S*>(y) + place(one);
        if constexpr (other == kCount) {
          store_bf16(to, values[one]);
        } else {
          store_bf16(to, values[one], static_cast<S*>(y) + place(other), values[other]);
        }
      });
    } else if (narrow) {
      all(static_cast<S*>(y), [](S* to, Vec<T> v) __attribute__((always_inline)) { store_narrow(to, v); });
    } else {
      all(static_cast<T*>(y), [](T* to, Vec<T> v) __attribute__((always_inline)) { store(to, v); });
    }
  }
};

// Kernels of 5 and 7 taps, and of one, also take single taps; the others serve rows that they divide. (Each doubles the
// code.)
template <int kTaps>
constexpr bool kHasSingles = kTaps == 1 || kTaps >= 5;

// kRows x kPixels outputs from output `pixel` on, `runs` times side by side, all channels.
template <class S, int kTaps, int kStride, int kRows, int kPixels, bool kEdge, class T = Compute<S>>
static void row_block(const BlockRow<T>& row, int64_t pixel, int64_t runs) {
  constexpr int kL = kLanes<T>, kCount = kRows * kPixels;
  const SegmentGroup* const groups = row.groups;  // stores of outputs would have all of these read again
  const int64_t group_count = row.group_count, x_step = row.x_step;
  const int64_t channels = row.channels, last = row.last, weight_block = row.weight_block;
  const T* const all_bias = row.bias;
  T* const total = row.total;
  for (; runs > 0; --runs, pixel += kPixels) {
    if constexpr (kEdge) {
      const Segment* end = groups[group_count - 1].end[2][1];
      for (Segment* s = groups[0].begin; s != end; ++s) s->inside = columns_inside(s->low, s->high, pixel * kStride);
    }
    const BlockOutputs<S> out(row, pixel, kPixels);
    const NextBlock<S, kPixels * kStride> fresh(row, pixel, kPixels);
    const S* const columns = static_cast<const S*>(row.x) + pixel * row.x_pixel;
    const T* weights = row.weights + row.first / kL * weight_block;
    for (int64_t next = row.first; next < last; next += kL, weights += weight_block) {
      const int64_t c = block_channel<T>(next, channels);
      const S* x = columns + c;
      fresh.fetch(next);
      Vec<T> acc[kCount];
      const Vec<T> bias = load(all_bias + c);
      unroll<kCount>([&]<int i>() __attribute__((always_inline)) { acc[i] = bias; });
      for (int64_t g = 0;;) {
        const auto& end = groups[g].end;
        const Segment* s = groups[g].begin;
        unroll<(kRows == 2 ? 3 : 1)>([&]<int kind>() __attribute__((always_inline)) {
          constexpr int kBoth = kind == 1 ? 2 : 1, kSecond = kind == 2;
          Vec<T>* first = acc + kSecond * kPixels;
          Vec<T>* second = acc + (kCount - kPixels);
          if constexpr (kTaps > 1)
            s = accumulate_segments<S, kTaps, kStride, kBoth, kPixels, kEdge>(s, end[kind][0], kSecond, first, second,
                                                                              x_step, x, weights);
          if constexpr (kHasSingles<kTaps>)
            s = accumulate_segments<S, 1, kStride, kBoth, kPixels, kEdge>(s, end[kind][1], kSecond, first, second,
                                                                          x_step, x, weights);
        });
        if (group_count > 1) {
          unroll<kCount>([&]<int i>() __attribute__((always_inline)) {
            store(total + i * kL, g == 0 ? acc[i] : load(total + i * kL) + acc[i]);
            acc[i] = splat(T(0));
          });
        }
        if (++g >= group_count) break;
      }
      if (group_count > 1)
        unroll<kCount>([&]<int i>() __attribute__((always_inline)) { acc[i] = load(total + i * kL); });
      activate_vectors<kCount, T>(row.activation, acc);
      out.template write<kRows, kPixels>(acc, c);
    }
    if (row.staged) row.put(row, pixel, kRows, kPixels);
  }
}

// The same as row_block for windows of kTaps x kTaps whose blocks have no columns outside the tensor, or but the first and
// the last (kEdge): without lists, each weight is loaded once. kVectors of channels at a time. The sums are the same to the
// bit.
template <class S, int kTaps, int kStride, int kRows, int kPixels, int kVectors, bool kEdge, class T = Compute<S>>
static void window_block(const BlockRow<T>& row, int64_t pixel, int64_t runs) {
  constexpr int kL = kLanes<T>, kCount = kRows * kPixels, kIn = kTaps + (kRows - 1) * kStride;
  constexpr int kColumns = (kPixels - 1) * kStride + kTaps;
  const int64_t channels = row.channels, last = row.last, weight_block = row.weight_block;
  const int64_t step = row.x_step * static_cast<int64_t>(sizeof(S));
  const uint64_t rows_inside = row.window.inside;
  const Activation activation = row.activation.kind;
  for (; runs > 0; --runs, pixel += kPixels) {
    const uint64_t inside = columns_inside(row.window.low, row.window.high, pixel * kStride);
    const BlockOutputs<S> out(row, pixel, kPixels);
    const NextBlock<S, kPixels * kStride> fresh(row, pixel, kPixels);
    const S* const columns = static_cast<const S*>(row.x) + pixel * row.x_pixel;
    const S* x[kIn];
    unroll<kIn>([&]<int q>() __attribute__((always_inline)) { x[q] = keep(columns + row.window.x[q]); });
    const T* weights = row.weights + row.first / kL * weight_block;
    for (int64_t next = row.first; next < last; next += kVectors * kL, weights += kVectors * weight_block) {
      const int64_t c = block_channel<T>(next, channels);
      unroll<kVectors>([&]<int v>() __attribute__((always_inline)) { fresh.fetch(next + v * kL); });
      Vec<T> acc[kVectors * kCount], w[kTaps][kTaps];
      [[maybe_unused]] PairedTaps<kTaps> paired[kTaps];
      unroll<kVectors>([&]<int v>() __attribute__((always_inline)) {
        const Vec<T> bias = load(row.bias + c + v * kL);
        unroll<kCount>([&]<int i>() __attribute__((always_inline)) { acc[v * kCount + i] = bias; });
      });
      unroll<kIn * kVectors>([&]<int i>() __attribute__((always_inline)) {
        constexpr int q = i / kVectors, v = i % kVectors;
        if constexpr (q < kTaps) {
          unroll<kTaps>([&]<int t>() __attribute__((always_inline)) {
            const Vec<T> packed = load_once(weights + v * weight_block + (q * kTaps + t) * kL);
            if constexpr (kIsPaired<S>) paired[q].set(t, packed);
            if constexpr (!kIsPaired<S>) w[q][t] = packed;
          });
        }
        if (kEdge && !is_inside<q>(rows_inside)) return;
        if constexpr (kIsPaired<S>) {
          constexpr bool kFirst = q < kTaps, kSecond = kRows == 2 && q >= kStride;
          const S* const row_x = x[q] + c;
          const auto at = [&]<int column>() __attribute__((always_inline)) { return row_x + column * row.x_step; };
          return accumulate_pairs<S, kTaps, kStride, kFirst, kSecond, kPixels, kEdge ? Outside::ends : Outside::none>(
              acc, acc + (kCount - kPixels), at, paired[min64(q, kTaps - 1)], paired[max64(q - kStride, 0)], inside);
        }
        Vec<T>* const first = acc + v * kCount;
        const char* at[kColumns / 3 + 1];
        at[0] = reinterpret_cast<const char*>(x[q] + c + v * kL);
        unroll<kColumns>([&]<int column>() __attribute__((always_inline)) {
          if constexpr (column > 0 && column % 3 == 0) at[column / 3] = at[column / 3 - 1] + 3 * step;
          if (kEdge && (column == 0 || column == kColumns - 1) && !is_inside<column>(inside)) return;
          const Vec<T> value = load_steps<S, column % 3>(at[column / 3], step);
          using Here = ColumnOutputs<kTaps, kStride, kPixels, column>;
          unroll<Here::kCount>([&]<int n>() __attribute__((always_inline)) {
            constexpr int p = Here::kLast - n, t = column - p * kStride;
            if constexpr (q < kTaps) first[p] += value * w[q][t];
            if constexpr (kRows == 2 && q >= kStride) first[kPixels + p] += value * w[q - kStride][t];
          });
        });
      });
      if (activation != Activation::none) activate_vectors<kVectors * kCount, T>(row.activation, acc);
      out.template write<kRows, kPixels, kVectors>(acc, c);
    }
    if (row.staged) row.put(row, pixel, kRows, kPixels);
  }
}

// Are there kernels that take a cache line of channels as two vectors?
template <class S>
constexpr bool kHasLines = 2 * kVectorBytes == kBlockBytes && sizeof(S) == sizeof(Compute<S>);

// The block kernels of one number of taps and one stride, by output rows and pixels.
template <class T>
struct BlockKernels {
  using Block = void (*)(const BlockRow<T>&, int64_t pixel, int64_t runs);
  // Two rows of kWide: 14 (8) accumulators beside the weights and an input in 32 (16) registers; one row may be longer.
  static constexpr int kWide = DSCONV_VECTOR_BYTES == 64 ? 7 : 4, kLong = 2 * kWide;
  int taps, stride;
  bool exact;  // only for rows that `taps` divides
  struct Blocks {
    Block edge[kLong + 1], inner[kLong + 1];
  };
  Blocks rows[2], windows[2];  // for one output row and two; windows of taps x taps, if there are kernels for them
  Blocks lines;                // windows of one row, a cache line of channels at a time; none where a vector is a line

  template <class S, int kTaps, int kStride>
  static constexpr BlockKernels make() {
    BlockKernels k{kTaps, kStride, !kHasSingles<kTaps>, {}, {}, {}};
    set_rows<S, kTaps, kStride, 1>(k);
    set_rows<S, kTaps, kStride, 2>(k);
    if constexpr (kStride == 1) {
      k.rows[0].edge[kLong] = row_block<S, kTaps, kStride, 1, kLong, true>;
      k.rows[0].inner[kLong] = row_block<S, kTaps, kStride, 1, kLong, false>;
    }
    return k;
  }
  template <class S, int kTaps, int kStride, int kRows>
  static constexpr void set_rows(BlockKernels& k) {
    Blocks &blocks = k.rows[kRows - 1], &windows = k.windows[kRows - 1];
    unroll<kWide>([&]<int i>() __attribute__((always_inline)) {
      constexpr int kPixels = i + 1;
      // The others may reach back over finished pixels or do with singles.
      if constexpr (kPixels == 1 || kPixels == kWide / 2 + 1 || kPixels >= kWide - 1) {
        blocks.edge[kPixels] = row_block<S, kTaps, kStride, kRows, kPixels, true>;
        if constexpr (kTaps == 3) windows.edge[kPixels] = window_block<S, kTaps, kStride, kRows, kPixels, 1, true>;
        if constexpr (kTaps == 3 && kRows == 1 && kHasLines<S>)
          k.lines.edge[kPixels] = window_block<S, kTaps, kStride, 1, kPixels, 2, true>;
      }
    });
    if constexpr (kRows == 2 || kStride > 1) blocks.inner[kWide] = row_block<S, kTaps, kStride, kRows, kWide, false>;
    if constexpr (kTaps == 3) windows.inner[kWide] = window_block<S, kTaps, kStride, kRows, kWide, 1, false>;
    if constexpr (kTaps == 3 && kRows == 1 && kHasLines<S>)
      k.lines.inner[kWide] = window_block<S, kTaps, kStride, 1, kWide, 2, false>;
  }

  // Computes outputs [begin, end), of which [inside_first, inside_last) read no padding.
  static void run(const Blocks& blocks, const BlockRow<T>& row, int64_t begin, int64_t end, int64_t inside_first,
                  int64_t inside_last) {
    const auto &at_edge = blocks.edge, &inside = blocks.inner;
    for (int64_t pixel = begin; pixel < end;) {
      const int64_t size = block_size(at_edge, end - begin, end - pixel), first = min64(pixel, end - size);
      const int64_t runs = first >= inside_first && inside[size] ? (min64(inside_last, end) - first) / size : 0;
      if (runs > 0) {
        inside[size](row, first, runs);
      } else {
        at_edge[size](row, first, 1);
      }
      pixel = first + max64(runs, 1) * size;
    }
  }

  // Pixels of the next block of `count` when `left` are still to be computed. A block may reach back over pixels that are
  // done already: computing them twice is cheaper than a block of few.
  static int64_t block_size(const Block (&blocks)[kLong + 1], int64_t count, int64_t left) {
    if (blocks[kLong] && left >= kLong) return kLong;
    if (left == kWide + 1) return (kWide + 2) / 2;  // not kWide and one alone
    int64_t size = min64(left, kWide);
    while (size < min64(count, kWide) && !blocks[size]) ++size;
    while (!blocks[size]) --size;
    return size;
  }
};

// Those that read S and whose taps divide a row of `taps` with the fewest left over, which go one by one. Defined in
// block_kernels.inc.
template <class S>
const BlockKernels<Compute<S>>& block_kernels(int64_t taps, int64_t stride);

}  // namespace dsconv::cpu::DSCONV_ISA

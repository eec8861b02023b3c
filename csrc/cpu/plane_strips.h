// Strips of planes: contiguous tensors, where neighbouring columns are neighbours in memory.
//
// A vector holds neighbouring outputs of one row. Strips of one vector's width go down the plane: each row of the input
// is loaded once for every column of taps and multiplied into all rows of outputs whose windows hold it, which are kept
// in registers until their last row has come. Borders as in row_blocks.h: rows outside the tensor are left out; columns
// outside are lanes of zeros times weights that are zero there, so no weight meets padding.
#pragma once

#include "activation_rows.h"
#include "phases.h"
#include "transpose.h"

namespace dsconv::cpu::DSCONV_ISA {

// The lanes whose bits are set, zero elsewhere: one instruction with AVX-512 (and with other vectors many).
template <class S>
DSCONV_INLINE Bits<S> load_lanes(const S* p, uint32_t lanes) {
#if DSCONV_VECTOR_BYTES == 64
  if constexpr (sizeof(S) == 8) return _mm512_maskz_loadu_pd(lanes, p);
  if constexpr (sizeof(S) == 4) return _mm512_maskz_loadu_ps(lanes, p);
  if constexpr (sizeof(S) == 2) return reinterpret_cast<Bits<S>>(_mm256_maskz_loadu_epi16(lanes, p));
#else
  S values[kLanes<Compute<S>>] = {};
  for (int l = 0; l < kLanes<Compute<S>>; ++l)
    if (lanes >> l & 1) values[l] = p[l];
  return load_bits(values);
#endif
}
// acc + a * b in the lanes whose bits are set, acc in the others.
template <class V>
DSCONV_INLINE V add_product_in(uint32_t lanes, V acc, V a, V b) {
#if DSCONV_VECTOR_BYTES == 64
  if constexpr (sizeof a[0] == 8) return _mm512_mask3_fmadd_pd(a, b, acc, lanes);
  if constexpr (sizeof a[0] == 4) return _mm512_mask3_fmadd_ps(a, b, acc, lanes);
#else
  const V sum = acc + a * b;
  for (unsigned l = 0; l < sizeof acc / sizeof acc[0]; ++l)
    if (lanes >> l & 1) acc[l] = sum[l];
  return acc;
#endif
}
// Bits for a loop, in a register of masks: compilers would rather read them again for every use.
DSCONV_INLINE uint32_t kept_bits(uint32_t lanes) {
#if DSCONV_VECTOR_BYTES == 64
  asm("" : "+k"(lanes));
#endif
  return lanes;
}

// The lanes [low, high) of a vector, the others neither read nor written.
template <class T>
struct Lanes {
  typedef typename IntOf<sizeof(T)>::type Index;
  typedef Vec<Index> Places;  // of lanes to be shuffled
  Vec<Index> mask;            // all bits of those lanes
  int64_t low, high;
  uint32_t bits;  // one of each
#if DSCONV_VECTOR_BYTES == 32
  // Of half types: where a whole vector lies in the row, and the bytes of it that belong into each of those lanes.
  int64_t shift;
  __m128i bytes;
#endif

  Lanes() = default;
  Lanes(int64_t from, int64_t to) : Lanes(from, to, from, to) {}
  // In a row of which the lanes [row_from, row_to) would lie in memory.
  Lanes(int64_t from, int64_t to, [[maybe_unused]] int64_t row_from, [[maybe_unused]] int64_t row_to)
      : low(max64(from, 0)), high(min64(to, kLanes<T>)) {
    for (int l = 0; l < kLanes<T>; ++l) mask[l] = l >= low && l < high ? -1 : 0;
    bits = high <= low ? 0 : ((1u << high) - 1) & ~((1u << low) - 1);
#if DSCONV_VECTOR_BYTES == 32
    if constexpr (sizeof(T) == 4) {
      shift = min64(max64(row_from, 0), row_to - kLanes<T>);
      uint8_t picked[16];
      for (int i = 0; i < 16; ++i) picked[i] = mask[i / 2] ? static_cast<uint8_t>(i - 2 * shift) : 0x80;  // or zero
      memcpy(&bytes, picked, sizeof picked);
    }
#endif
  }
  void shuffle();  // as every_second does
  __attribute__((always_inline)) Vec<T> of(Vec<T> v) const {
    return reinterpret_cast<Vec<T>>(reinterpret_cast<Vec<Index>>(v) & mask);
  }
  // acc + a * b in those lanes, acc in the others, for a value of `a` that is zero there.
  __attribute__((always_inline)) Vec<T> add_product(Vec<T> acc, Vec<T> a, Vec<T> b) const {
#if DSCONV_VECTOR_BYTES == 64
    return add_product_in(bits, acc, a, b);
#else
    return acc + a * of(b);
#endif
  }
  // Those in memory, zero elsewhere. Of half types with AVX2, the row must have a vector's width.
  template <class S>
  __attribute__((always_inline)) Bits<S> load(const S* p) const {
#if DSCONV_VECTOR_BYTES == 64
    return load_lanes(p, bits);
#elif DSCONV_VECTOR_BYTES == 32
    if constexpr (sizeof(S) == 8) return _mm256_maskload_pd(p, reinterpret_cast<__m256i>(mask));
    if constexpr (sizeof(S) == 4) return _mm256_maskload_ps(p, reinterpret_cast<__m256i>(mask));
    if constexpr (sizeof(S) == 2) {
      const __m128i there = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + shift));
      return reinterpret_cast<Bits<S>>(_mm_shuffle_epi8(there, bytes));
    }
#endif
    if (high - low == kLanes<T>) return load_bits(p);
    S values[kLanes<T>] = {};
    for (int64_t l = low; l < high; ++l) values[l] = p[l];
    return load_bits(values);
  }
};

// The same for a loop, with AVX-512 as bits.
template <class T>
struct KeptLanes {
#if DSCONV_VECTOR_BYTES == 64
  uint32_t bits;
  KeptLanes() = default;
  explicit KeptLanes(const Lanes<T>& lanes) : bits(kept_bits(lanes.bits)) {}
  template <class S>
  __attribute__((always_inline)) Bits<S> load(const S* p) const {
    return load_lanes(p, bits);
  }
  __attribute__((always_inline)) Vec<T> add_product(Vec<T> acc, Vec<T> a, Vec<T> b) const {
    return add_product_in(bits, acc, a, b);
  }
#else
  const Lanes<T>* lanes;
  KeptLanes() = default;
  explicit KeptLanes(const Lanes<T>& lanes) : lanes(&lanes) {}
  template <class S>
  __attribute__((always_inline)) Bits<S> load(const S* p) const {
    return lanes->load(p);
  }
  __attribute__((always_inline)) Vec<T> add_product(Vec<T> acc, Vec<T> a, Vec<T> b) const {
    return lanes->add_product(acc, a, b);
  }
#endif
};

// Stores neighbouring outputs; `count` of them if that is not a vector.
template <class S, class T = Compute<S>>
DSCONV_INLINE void put_outputs(S* y, Vec<T> v, const Limits<T>& limits, int64_t count = kLanes<T>) {
  limits.template apply<1>(&v);
  if (count < kLanes<T>) {
    store_part<S>(y, v, count);
  } else if (kRoundsBf16<S> && has_avx512_bf16) {
    store_bf16(y, v);
  } else {
    store_narrow(y, v);
  }
}

// The even (kOdd: odd) lanes of two vectors side by side, in an order that takes one instruction: within pieces of 16 bytes.
template <int kOdd, class T>
DSCONV_INLINE Vec<T> every_second(Vec<T> a, Vec<T> b) {
  constexpr int kPiece = 16 / sizeof(T), kHalf = kPiece / 2;
  typename Lanes<T>::Places places;
  unroll<kLanes<T>>([&]<int l>() __attribute__((always_inline)) {
    constexpr int piece = l / kPiece * kPiece, place = l % kPiece;
    places[l] = piece + 2 * (place % kHalf) + kOdd + (place < kHalf ? 0 : kLanes<T>);
  });
  return __builtin_shuffle(a, b, places);
}
// Where lane l of that would be in its proper order.
template <class T>
constexpr int proper_lane(int l) {
  constexpr int kPiece = 16 / sizeof(T), kHalf = kPiece / 2;
  return l / kPiece * kHalf + l % kHalf + (l % kPiece < kHalf ? 0 : kLanes<T> / 2);
}
template <class T>
DSCONV_INLINE Vec<T> to_proper_order(Vec<T> v) {
  typename Lanes<T>::Places places;
  unroll<kLanes<T>>([&]<int l>() __attribute__((always_inline)) { places[proper_lane<T>(l)] = l; });
  return __builtin_shuffle(v, places);
}
template <class T>
DSCONV_INLINE Vec<T> from_proper_order(Vec<T> v) {
  typename Lanes<T>::Places places;
  unroll<kLanes<T>>([&]<int l>() __attribute__((always_inline)) { places[l] = proper_lane<T>(l); });
  return __builtin_shuffle(v, places);
}

template <class T>
void Lanes<T>::shuffle() {
  mask = reinterpret_cast<Vec<Index>>(from_proper_order<T>(reinterpret_cast<Vec<T>>(mask)));
  bits = 0;
  for (int l = 0; l < kLanes<T>; ++l) bits |= mask[l] ? 1u << l : 0;
}

// Two vectors of a half type as one.
template <class Half>
DSCONV_INLINE Vec<uint32_t> side_by_side(Half low, Half high) {
#if DSCONV_VECTOR_BYTES == 64
  return reinterpret_cast<Vec<uint32_t>>(
      _mm512_inserti64x4(_mm512_castsi256_si512(reinterpret_cast<__m256i>(low)), reinterpret_cast<__m256i>(high), 1));
#elif DSCONV_VECTOR_BYTES == 32
  return reinterpret_cast<Vec<uint32_t>>(
      _mm256_set_m128i(reinterpret_cast<__m128i>(high), reinterpret_cast<__m128i>(low)));
#else
  Half both[2] = {low, high};
  Vec<uint32_t> words;
  memcpy(&words, both, sizeof words);
  return words;
#endif
}
// A word of two neighbouring columns of bfloat16 is nearly the odd one, and the even one shifted: no shuffle is needed.
template <class S, int kStride>
constexpr bool kInWords = kStride == 2 && kIsBFloat16<S>;
// Do lanes have the order of every_second?
template <class S, int kStride>
constexpr bool kShuffles = kStride == 2 && !kInWords<S, kStride>;

// Passes to `use` what neighbouring outputs pair with each tap of a row. `columns` loads vector i of the columns from that
// of tap t on; a tap that is not a multiple of the stride has those of the one before it.
template <class S, int kTaps, int kStride, class Columns, class Use>
DSCONV_INLINE void for_taps(const Columns& columns, const Use& use) {
  static_assert(kStride <= 2);
  using T = Compute<S>;
  Bits<S> part[kStride];
  [[maybe_unused]] Vec<T> wide[kStride];
  [[maybe_unused]] Vec<uint32_t> words;
  unroll<kTaps>([&]<int t>() __attribute__((always_inline)) {
    if constexpr (t % kStride == 0) {
      unroll<kStride>([&]<int i>() __attribute__((always_inline)) {
        part[i] = columns.template operator()<t, i>();
        if constexpr (!kInWords<S, kStride>) wide[i] = widened<S>(part[i]);
      });
      if constexpr (kInWords<S, kStride>) words = side_by_side(part[0], part[1]);
    }
    if constexpr (kStride == 1) {
      use.template operator()<t>(wide[0]);
    } else if constexpr (kInWords<S, kStride>) {
      use.template operator()<t>(reinterpret_cast<Vec<T>>(t % 2 ? words & 0xffff0000u : words << 16));
    } else {
      use.template operator()<t>(every_second<t % 2, T>(wide[0], wide[1]));
    }
  });
}

// Strips that read no column outside the tensor, that do, and that do and have fewer outputs than a vector lanes.
enum class Reach { inner, edge, narrow };
template <class Fn>
DSCONV_INLINE void with_reach(Reach reach, Fn fn) {
  switch (reach) {
    case Reach::inner: return fn.template operator()<Reach::inner>();
    case Reach::edge: return fn.template operator()<Reach::edge>();
    case Reach::narrow: return fn.template operator()<Reach::narrow>();
  }
}

// One vector's width of a plane. Columns are counted from the one that the strip's first output reads first.
template <class T, int kTaps, int kStride>
struct Strip {
  int64_t first, count;  // outputs
  int64_t dilation;      // columns between taps
  Reach reach;
  Lanes<T> weights[kTaps], columns[kTaps][kStride];

  // As many of the outputs as there are lanes; columns [low, high) lie in the tensor.
  Strip(int64_t first, int64_t outputs, int64_t low, int64_t high, int64_t dilation)
      : first(first), count(min64(outputs, kLanes<T>)), dilation(dilation) {
    constexpr int kL = kLanes<T>;
    const bool inner = low <= 0 && high >= (kTaps - 1) * dilation + kL * kStride;
    reach = count < kL ? Reach::narrow : inner ? Reach::inner : Reach::edge;
    for (int t = 0; t < kTaps; ++t) {
      const int64_t from = low - t * dilation, to = high - t * dilation;
      weights[t] = {ceil_div(from, kStride), ceil_div(to, kStride)};
      for (int i = 0; i < kStride; ++i) columns[t][i] = {from - i * kL, to - i * kL};
    }
  }
};

// Neighbouring rows of outputs of one phase. Offsets are in elements from the planes; rows of the input are counted from
// the one that the first output row reads first.
struct Piece {
  int64_t x, y;            // the column that output 0 reads first, in that row; output 0
  int64_t x_next, y_next;  // what is fetched for later: as much as is read and written
  int64_t x_row, y_row;    // between rows of taps, between rows of outputs
  int64_t low, high;       // the rows inside the tensor
  int64_t count;           // rows of outputs
};

// A plane of the input and one of the output.
template <class S, class T = Compute<S>>
struct Plane {
  const S* x;
  S* y;
  const T* weights;  // [tap][lane] at the lane of its filter
  T bias;
  const Limits<T>& limits;
};
// Those of an image.
template <class S, class T = Compute<S>>
struct ImagePlanes {
  const S* x;
  S* y;
  int64_t x_step, y_step;  // between channels
  int64_t multiplier;      // channels of the output that read one of the input
  const T* weights;        // [block][tap][lane]
  int64_t weight_block;    // elements of a block
  const T* bias;
  int64_t channels;
  const Limits<T>& limits;

  __attribute__((always_inline)) Plane<S> plane(int64_t channel) const {
    constexpr int kL = kLanes<T>;
    const int64_t block = channel / kL, lane = channel - block_channel<T>(block * kL, channels);
    const int64_t source = multiplier == 1 ? channel : channel / multiplier;
    return {x + source * x_step, y + channel * y_step, weights + block * weight_block + lane, bias[channel], limits};
  }
};

// What is done to planes: all strips of some pieces after each other.
template <class Strip, class Rest>
struct StripWork {
  const Piece* pieces;
  int64_t piece_count;
  int64_t together;  // pieces for which a strip has the same weights
  const Strip* strips;
  int64_t strip_count;
  const Rest* rest;  // null, or columns after those of the strips

  // run(plane, pieces, their count, strip) for all of channels [first, last).
  template <class S, class Run>
  __attribute__((always_inline)) void for_each(const ImagePlanes<S>& image, int64_t first, int64_t last,
                                               const Run& run) const {
    for (int64_t channel = first; channel < last; ++channel) {
      const Plane<S> plane = image.plane(channel);
      for (int64_t i = 0; i < piece_count; i += together) {
        for (const Strip* strip = strips; strip < strips + strip_count; ++strip)
          run(plane, pieces + i, min64(together, piece_count - i), *strip);
      }
    }
  }
};

// The outputs of a strip in the rows of some pieces, one after the other.
template <class S, int kTaps, int kStride, Reach kReach, class T = Compute<S>>
static void plane_strip(const Plane<S>& plane, const Piece* pieces, int64_t piece_count,
                        const Strip<T, kTaps, kStride>& strip) {
  constexpr int kL = kLanes<T>, kLive = (kTaps + kStride - 1) / kStride;
  Vec<T> w[kTaps][kTaps], acc[kLive] = {};
  unroll<kTaps * kTaps>([&]<int i>() __attribute__((always_inline)) {
    const Vec<T> weight = splat(plane.weights[i * kL]);
    const Vec<T> inside = kReach != Reach::inner ? strip.weights[i % kTaps].of(weight) : weight;
    w[i / kTaps][i % kTaps] = kShuffles<S, kStride> ? from_proper_order<T>(inside) : inside;
  });
  KeptLanes<T> inside[kTaps][kStride];  // columns
  unroll<kTaps * kStride>([&]<int i>() __attribute__((always_inline)) {
    inside[i / kStride][i % kStride] = KeptLanes<T>(strip.columns[i / kStride][i % kStride]);
  });
  const Vec<T> bias = splat(plane.bias);
  const int64_t dilation = strip.dilation;
  const Limits<T> limits = plane.limits;
  for (const Piece* p = pieces; p < pieces + piece_count; ++p) {
    const Piece& piece = *p;
    const int64_t low = piece.low, high = piece.high, count = piece.count, x_row = piece.x_row, y_row = piece.y_row;
    const int64_t steps = count + kLive - 1;
    // Rows of outputs shorter than a vector are stored as a whole one where later rows write anew what that is too much.
    const int64_t spilled = y_row == strip.count ? ceil_div(kL, strip.count) - 1 : count, whole = steps - spilled;
    const S* x = plane.x + piece.x + strip.first * kStride;
    S* y = plane.y + piece.y + strip.first;
    const S* next_x = plane.x + piece.x_next + strip.first * kStride * (count * kStride);  // a strip fetches its share
    const S* next_y = plane.y + piece.y_next + strip.first * count;
    // Step j begins row j of the outputs, the last of those in work, and ends the first one. Rows that do not exist cost less
    // than code that leaves them out.
    for (int64_t j = 0; j < steps; ++j) {
      unroll<kLive - 1>([&]<int i>() __attribute__((always_inline)) { acc[i] = acc[i + 1]; });
      acc[kLive - 1] = bias;
      unroll<kStride>([&]<int r>() __attribute__((always_inline)) {
        if (j * kStride + r >= low && j * kStride + r < high) {
          const auto columns = [&]<int t, int i>() __attribute__((always_inline)) {
            const S* at = x + t * dilation + i * kL;
            if constexpr (kReach == Reach::inner) return load_bits_once(at);
            return inside[t][i].load(at);
          };
          for_taps<S, kTaps, kStride>(columns, [&]<int t>(Vec<T> value) __attribute__((always_inline)) {
            unroll<kLive>([&]<int i>() __attribute__((always_inline)) {
              constexpr int u = (kLive - 1 - i) * kStride + r;
              if constexpr (u < kTaps) acc[i] += value * w[u][t];
            });
          });
        }
        unroll<kStride>([&]<int i>() __attribute__((always_inline)) { __builtin_prefetch(next_x + i * kL, 0, 2); });
        next_x += kL * kStride;
        x += x_row;
      });
      __builtin_prefetch(next_y, 1, 2);
      next_y += kL;
      if (j < kLive - 1) continue;
      Vec<T> done = acc[0];
      if constexpr (kShuffles<S, kStride>) done = to_proper_order<T>(done);
      put_outputs<S>(y, done, limits, kReach == Reach::narrow && j >= whole ? strip.count : kL);
      y += y_row;
    }
  }
}

// How planes are cut for such strips. (ByCells of plane_cells.h has the same form: a lane makes kOutputs columns of outputs,
// and as many rows, with every kInputs columns of the input; rows are counted in such units.)
template <class S, int kTaps, int kStride>
struct OutputRows {
  static constexpr int kOutputs = 1, kInputs = kStride;

  // The column that output 0 reads first.
  static int64_t first_column(const Correlation& c) { return c.phase(2, 0).in_first; }
  // Output rows [top, bottom) of all phases, up to `most` in a piece; returns the number of pieces. Fetched are the
  // rows of the next piece, or of the next tile if phases take turns within this one.
  static int64_t cut_rows(const Correlation& c, const View& from, const View& to, int64_t top, int64_t bottom,
                          int64_t most, Piece* pieces) {
    const int64_t first_column = c.phase(2, 0).in_first, phases = c.phases(1);
    Piece* next = pieces;
    int64_t done = 0;
    for (int64_t i = 0; i < phases; ++i) {
      const Phase y = c.phase(1, i);
      const int64_t first = ceil_div(max64(top - i, 0), y.out_step);
      const int64_t last = min64(y.count, ceil_div(max64(bottom - i, 0), y.out_step));
      const int64_t cuts = ceil_div(last - first, most);
      for (int64_t cut = 0; cut < cuts; ++cut, ++next) {
        const int64_t n = first + (last - first) * cut / cuts, end = first + (last - first) * (cut + 1) / cuts;
        const int64_t row = y.in_first + n * y.in_step;
        const int64_t ahead = phases == 1 ? end : bottom + done;
        *next = {row * from.stride[3] + first_column,
                 (y.out_first + n * y.out_step) * to.stride[3],
                 (y.in_first + ahead * y.apart) * from.stride[3] + first_column,
                 ahead * to.stride[3],
                 y.tap_step * from.stride[3],
                 y.out_step * to.stride[3],
                 ceil_of(-row, y.tap_step),
                 ceil_of(c.source()[1] - row, y.tap_step),
                 end - n};
        done += end - n;
      }
    }
    return next - pieces;
  }
};

// Are rows of a half type as wide as Lanes wants them?
template <class S>
DSCONV_INLINE bool has_wide_rows(const Window& w) {
  return kVectorBytes != 32 || sizeof(S) == sizeof(Compute<S>) || min64(w.in[2], w.out[2]) >= kLanes<Compute<S>>;
}

}  // namespace dsconv::cpu::DSCONV_ISA

// Rows of a tensor as the block kernels want them: columns of neighbouring channels in the compute type. A tensor that is
// channels_last in that type already is used where it lies; of any other (half types, contiguous, depth multipliers, few
// channels) the rows in use are copied into a ring that stays in the cache, each of them once.
#pragma once

#include "transpose.h"

namespace dsconv::cpu::DSCONV_ISA {

// Channels of a tensor that a row of lanes holds: lane l is channel (base + l) * step / divide + plus, zero past `count`.
struct ChannelMap {
  int64_t count;  // of lanes with a channel, over the whole tensor
  int64_t step, divide;
};

// Input and output of this size do not stay in a share of a last-level cache until the next layer reads them.
constexpr int64_t kStreamedBytes = 8 << 20;

// What is read of tensors up to this size comes from a last-level cache: to fetch it ahead costs more than it saves.
constexpr int64_t kNearBytes = 13 << 20;

// But processors with vectors of half a cache line have small L2s, often far from a last-level cache that they share, and
// read a line in two passes over many columns: where blocks read more than this, they fetch it ahead.
constexpr bool kSmallCaches = kVectorBytes < kBlockBytes;
constexpr int64_t kFetchedBytes = kSmallCaches ? 5 << 19 : kStreamedBytes;

// Do input and output (of a gradient: its source and target) exceed so many bytes?
template <class S>
static bool is_large(const DepthwiseProblem& p, int64_t bytes = kStreamedBytes) {
  const int64_t channels = p.channels * p.multiplier;
  const int64_t elements = numel(p.batch, p.channels, p.window.in) + numel(p.batch, channels, p.window.out);
  return elements * static_cast<int64_t>(sizeof(S)) > bytes;
}

// Columns a multiple of so many bytes apart share two sets of an L1, or one, where nothing stays that was fetched ahead.
constexpr int64_t kHalfPage = 2048, kPage = 4096;

// Do columns of channels crowd these sets, so that a cache line is gone before its second vector is read?
template <class S>
DSCONV_INLINE bool is_crowded(const View& v, int64_t bytes = kHalfPage) {
  return v.stride[4] * static_cast<int64_t>(sizeof(S)) % bytes == 0;
}

// Does every column of `channels` neighbours begin and end with a cache line?
template <class S>
DSCONV_INLINE bool has_whole_lines(const View& v, int64_t channels) {
  constexpr int64_t kBytes = sizeof(S);
  int64_t unaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(v.data)) | channels * kBytes;
  for (int dim = 0; dim < 5; ++dim) unaligned |= dim == 1 ? 0 : v.stride[dim] * kBytes;
  return v.stride[1] == 1 && unaligned % kBlockBytes == 0;
}

// The problem with rows and columns exchanged, where that lays a window of one column along a row, whose taps share loads.
// `from` and `to` are the maps of the pass; in contiguous ones, rows are what neighbours make.
[[maybe_unused]] static DepthwiseProblem along_rows(DepthwiseProblem p, const View& from, const View& to) {
  Window& w = p.window;
  if (w.taps[1] == 1 || w.taps[2] > 1 || from.stride[1] != 1 || to.stride[1] != 1) return p;
  int64_t* const sizes[] = {w.in, w.out, w.taps, w.stride, w.dilation, w.pad};
  View* const views[] = {&p.x, &p.weight, &p.y, &p.grad, &p.grad_x, &p.grad_weight};
  const auto exchange = [](int64_t* pair) {
    const int64_t first = pair[0];
    pair[0] = pair[1];
    pair[1] = first;
  };
  for (int64_t* size : sizes) exchange(size + 1);
  for (View* view : views) exchange(view->stride + 3);
  return p;
}

// `count` neighbours into storage, past the caches if `streamed`. A vector more of `src` may be read.
template <class S, class T = Compute<S>>
static void copy_run(S* dst, const T* src, int64_t count, bool streamed) {
  constexpr int kL = kLanes<T>, kLine = kBlockBytes / sizeof(S);
  int64_t i = 0;
  const auto copy_to = [&](int64_t end) {
    for (; i + 2 * kL <= end; i += 2 * kL) store_pair(dst + i, load(src + i), load(src + i + kL), false);
    for (; i < end; i += kL) store_part<S>(dst + i, load(src + i), end - i);
    i = end;
  };
  if (kStreams && streamed) {
    const auto address = reinterpret_cast<uintptr_t>(dst);
    copy_to(min64(count, static_cast<int64_t>(-address % kBlockBytes / sizeof(S))));
    for (; i + kLine <= count; i += kLine) {
      if constexpr (kLine >= 2 * kL) {
        for (int l = 0; l < kLine; l += 2 * kL)
          store_pair(dst + i + l, load(src + i + l), load(src + i + l + kL), true);
      } else {
        stream_narrow<S>(dst + i, load(src + i));
      }
    }
  }
  copy_to(count);
}

// One row of `width` columns into [column][lanes], or back. src and dst point at channel 0, column 0; `ahead` elements on
// lies what will be wanted soon.
template <class S>
struct RowCopy {
  using T = Compute<S>;
  static constexpr int kL = kLanes<T>;
  static constexpr int kFew = kVectorBytes == 64 ? 0 : kL / 4;  // columns that are not worth a transpose

  // A block of at most kL rows of kL values, row(i) in memory, becomes to_rows rows of to_count values. What is not there
  // is zero; a kWhole one has no conditions. (A function, lest the loops around it keep a pointer to every row.)
  template <bool kWhole, class From, class To, class Row>
#if DSCONV_VECTOR_BYTES > 16
  __attribute__((noinline))
#endif
  static void turn(To* to, int64_t to_step, int64_t to_rows, int64_t to_count, const Row& row, int64_t rows,
                   int64_t count) {
    Vec<T> block[kL];
    unroll<kL>([&]<int i>() __attribute__((always_inline)) {
      block[i] = splat(T(0));
      if (!kWhole && i >= rows) return;
      block[i] = kWhole ? load_wide<From>(row(i)) : load_part<From>(row(i), count);
    });
    transpose<T>(block);
    unroll<kL>([&]<int i>() __attribute__((always_inline)) {
      if (!kWhole && i >= to_rows) return;
      kWhole ? store_narrow<To>(to, block[i]) : store_part<To>(to, block[i], to_count);
      to += to_step;
    });
  }

  // Columns of neighbouring channels, each of which is wanted by several lanes, or one of several.
  static void gather_mapped(T* tile, int64_t lanes, const S* src, const ChannelMap& map, int64_t base, int64_t plus,
                            int64_t column_stride, int64_t width, int64_t ahead) {
    typedef typename IntOf<sizeof(T)>::type Place;
    const int64_t filled = min64(lanes, map.count - base);
    for (int64_t l = 0; l < lanes; l += kL) {
      const int64_t count = max64(0, min64(kL, filled - l)), at = (base + l) * map.step;
      const S* from = src + at / map.divide;
      Place place[kL];  // of the value of each lane, or -1
      int64_t next = plus, rest = at % map.divide;
      for (int64_t k = 0; k < kL; ++k) {
        place[k] = k < count ? static_cast<Place>(next) : -1;
        next += map.divide == 1 ? map.step : 0;
        if (map.divide > 1 && ++rest == map.divide) rest = 0, ++next;
      }
      const int64_t read = count > 0 ? place[count - 1] + 1 : 0;
      const Vec<Place> places = load(place);
      T* to = tile + l;
      for (int64_t w = 0; w < width; ++w, from += column_stride, to += lanes) {
        __builtin_prefetch(from + ahead, 0, 2);
        const Vec<T> first = __builtin_shuffle(load_part<S>(from, min64(read, kL)), places);
        Vec<T> values = places >= 0 && places < kL ? first : splat(T(0));
        for (int64_t i = kL; i < read; i += kL) {
          const Vec<Place> here = places - static_cast<Place>(i);
          const Vec<T> some = __builtin_shuffle(load_part<S>(from + i, read - i), here);
          values = here >= 0 && here < kL ? some : values;
        }
        store(to, values);
      }
    }
  }

  static void gather(T* tile, int64_t lanes, const S* src, const ChannelMap& map, int64_t base, int64_t plus,
                     int64_t channel_stride, int64_t column_stride, int64_t width, int64_t ahead) {
    const int64_t filled = min64(lanes, map.count - base);
    const bool plain = map.step == 1 && map.divide == 1;
    if (plain && channel_stride == 1) {
      src += base;
      for (int64_t w = 0; w < width; ++w, src += column_stride, tile += lanes) {
        int64_t l = 0;
        for (; l + kL <= filled; l += kL) {
          __builtin_prefetch(src + l + ahead, 0, 2);
          store(tile + l, load_wide<S>(src + l));
        }
        for (; l < lanes; l += kL) store(tile + l, load_part<S>(src + l, max64(0, filled - l)));
      }
      return;
    }
    if (channel_stride == 1) return gather_mapped(tile, lanes, src, map, base, plus, column_stride, width, ahead);
    const auto channel = [&](int64_t l) {
      const int64_t at = (base + l) * map.step;
      return src + ((map.divide == 1 ? at : at / map.divide) + plus) * channel_stride;
    };
    for (int64_t l = 0; l < lanes; l += kL) {
      const int64_t count = max64(0, min64(kL, filled - l));
      for (int64_t w = 0; w < width; w += kL) {
        const int64_t columns = min64(kL, width - w);
        T* out = tile + w * lanes + l;
        if (column_stride == 1 && columns > kFew) {
          const S* const first = channel(l) + w;
          const auto spaced = [first, channel_stride, ahead](int64_t i) __attribute__((always_inline)) {
            const S* const row = first + i * channel_stride;
            __builtin_prefetch(row + ahead, 0, 2);
            return row;
          };
          const auto mapped = [&](int64_t i) { return channel(l + i) + w; };
          if (!plain) {
            turn<false, S>(out, lanes, columns, kL, mapped, count, columns);
          } else if (count == kL && columns == kL) {
            turn<true, S>(out, lanes, kL, kL, spaced, kL, kL);
          } else {
            turn<false, S>(out, lanes, columns, kL, spaced, count, columns);
          }
        } else {
          for (int64_t i = 0; i < columns; ++i) {
            for (int k = 0; k < kL; ++k)
              out[i * lanes + k] = k < count ? widen(channel(l + k)[(w + i) * column_stride]) : T(0);
          }
        }
      }
    }
  }

  static void scatter(S* dst, const T* tile, int64_t lanes, int64_t base, int64_t count, int64_t channel_stride,
                      int64_t column_stride, int64_t width) {
    dst += base * channel_stride;
    const int64_t filled = min64(lanes, count - base);
    if (channel_stride == 1) {
      for (int64_t w = 0; w < width; ++w) copy_run<S>(dst + w * column_stride, tile + w * lanes, filled, false);
      return;
    }
    for (int64_t l = 0; l < filled; l += kL) {
      const int64_t channels = min64(kL, filled - l);
      for (int64_t w = 0; w < width; w += kL) {
        const int64_t columns = min64(kL, width - w);
        const T* in = tile + w * lanes + l;
        S* out = dst + l * channel_stride + w * column_stride;
        if (column_stride == 1 && columns > kFew) {
          const auto row = [in, lanes](int64_t i) __attribute__((always_inline)) { return in + i * lanes; };
          if (channels == kL && columns == kL) {
            turn<true, T>(out, channel_stride, kL, kL, row, kL, kL);
          } else {
            turn<false, T>(out, channel_stride, channels, columns, row, columns, kL);
          }
        } else {
          for (int64_t k = 0; k < channels; ++k) {
            for (int64_t i = 0; i < columns; ++i)
              narrow(in[i * lanes + k], out + k * channel_stride + i * column_stride);
          }
        }
      }
    }
  }
};

// Are the taps of a filter, in the order of a plain nn.Conv weight, neighbours in memory?
DSCONV_INLINE bool has_dense_taps(const View& weight, const Window& w) {
  const int64_t *k = w.taps, *stride = weight.stride;
  return (k[2] == 1 || stride[4] == 1) && (k[1] == 1 || stride[3] == k[2]) && (k[0] == 1 || stride[2] == k[1] * k[2]);
}
DSCONV_INLINE int64_t tap_offset(const View& weight, const Window& w, int64_t tap) {
  const int64_t *k = w.taps, *stride = weight.stride;
  return tap / k[2] / k[1] * stride[2] + tap / k[2] % k[1] * stride[3] + tap % k[2] * stride[4];
}

// `count` taps from tap `tap` on of `lanes` filters, as one vector of filters per tap; and back.
template <class S, class T = Compute<S>>
static void load_taps(Vec<T>* rows, const S* filters, const View& weight, int64_t filter_stride, const Window& w,
                      int64_t lanes, int64_t tap, int64_t count) {
  constexpr int kL = kLanes<T>;
  const bool dense = has_dense_taps(weight, w);
  if (dense && count > kL / 4) {  // fewer are not worth a transpose
    unroll<kL>([&]<int l>() __attribute__((always_inline)) {
      rows[l] = l < lanes ? load_part<S>(filters + l * filter_stride + tap, count) : splat(T(0));
    });
    transpose<T>(rows);
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    T values[kL] = {};
    const S* at = filters + (dense ? tap + i : tap_offset(weight, w, tap + i));
    for (int64_t l = 0; l < lanes; ++l) values[l] = widen(at[l * filter_stride]);
    rows[i] = load(values);
  }
}
template <class S, class T = Compute<S>>
static void store_taps(S* filters, Vec<T>* rows, const View& weight, const Window& w, int64_t lanes, int64_t tap,
                       int64_t count) {
  constexpr int kL = kLanes<T>;
  const int64_t stride = weight.stride[0];
  const bool dense = has_dense_taps(weight, w);
  if (dense && count > kL / 4) {
    transpose<T>(rows);
    unroll<kL>([&]<int l>() __attribute__((always_inline)) {
      if (l < lanes) store_part<S>(filters + l * stride + tap, rows[l], count);
    });
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    T values[kL];
    store(values, rows[i]);
    S* to = filters + (dense ? tap + i : tap_offset(weight, w, tap + i));
    for (int64_t l = 0; l < lanes; ++l) narrow(values[l], to + l * stride);
  }
}

constexpr int64_t kRingBytes = 96 << 10;         // of the rows in use: with the outputs they stay in an L2 of 256 KiB
constexpr int64_t kCrowdedRingBytes = 40 << 10;  // near L1, which is what the copy is for
constexpr int64_t kSmallPlane = 384;             // columns of a block of channels: not more than an L1

// Of the lanes of vectors that hold neighbouring columns, the part that does.
template <class T>
static double filled_lanes(int64_t columns) {
  return max64(columns, 1) / static_cast<double>(round_up(max64(columns, 1), kLanes<T>));
}

// The part of a kernel's time that is arithmetic where columns of channels are turned out of contiguous inputs and outputs
// (`turn`: multiply-adds in the time of that).
template <class T>
static double part_of_turning(bool turns_in, bool turns_out, const Window& w, double turn) {
  const double taps = static_cast<double>(product(w.taps));
  const auto turned = [&](const int64_t (&size)[3]) {  // the work, in multiply-adds of each output
    const int64_t plane = size[1] * size[2], columns = plane <= kSmallPlane ? plane : size[2];
    return turn * product(size) / filled_lanes<T>(max64(columns, kLanes<T> / 4)) / max64(product(w.out), 1);
  };
  return taps / (taps + (turns_in ? turned(w.in) : 0) + (turns_out ? turned(w.out) : 0));
}

// The rows of one tensor. At one time at most `planes` planes `plane_step` apart and `rows` rows `row_step` apart are in
// use.
template <class S>
struct RowStage {
  using T = Compute<S>;
  static constexpr int kL = kLanes<T>;

  View view;
  const int64_t* size;  // D, H, W
  ChannelMap map;
  bool direct;
  int64_t planes, plane_step, rows, row_step;
  bool whole_planes;  // are all rows of a plane, which follow each other, turned at once?
  T* tile;
  int64_t* held;  // the row in each place of the ring, or -1
  int64_t lanes;  // of a column of the tile
  int64_t image, base;

  // Can columns of channels be read where they lie, at least by kernels that widen them?
  static bool is_plain(const View& v, const ChannelMap& map) {
    return v.stride[1] == 1 && map.step == 1 && map.divide == 1 && map.count >= kL;
  }
  // Do the rows of a contiguous plane follow each other, and are they few?
  bool has_small_planes() const {
    const bool follow = view.stride[4] == 1 && view.stride[3] == size[2] && view.stride[1] != 1;
    return !direct && follow && size[1] * size[2] <= kSmallPlane;
  }
  int64_t places() const { return direct ? 0 : planes * rows * map.step; }
  int64_t row_elements() const { return size[2] * lanes; }
  int64_t scratch() const { return piece_bytes<int64_t>(places()) + piece_bytes<T>(places() * row_elements()); }
  void take_scratch(Arena& arena) {
    held = take<int64_t>(arena, places());
    tile = take<T>(arena, places() * row_elements());
    image = -1;
    whole_planes = has_small_planes() && rows == size[1] && row_step == 1;
  }

  void begin(int64_t new_image, int64_t new_base) {
    if (new_image == image && new_base == base) return;
    image = new_image;
    base = new_base;
    for (int64_t i = 0; i < places(); ++i) held[i] = -1;
  }
  int64_t column() const { return direct ? view.stride[4] : lanes; }
  // Element `offset` from the channel that offset 0 of a row would hold; of T, or of S if the tensor is used directly.
  const void* at(int64_t offset) const {
    if (direct) return static_cast<const S*>(view.data) + image * view.stride[0] + offset;
    return tile - base + offset;
  }
  // Offset of the row in (depth, height); `plus` selects one of map.step channels per lane.
  int64_t row(int64_t plus, int64_t d, int64_t h) {
    if (direct) return d * view.stride[2] + h * view.stride[3];
    const int64_t plane = plane_step == 1 ? d : d / plane_step, line = row_step == 1 ? h : h / row_step;
    const int64_t place = (plus * planes + plane % planes) * rows + line % rows, key = d * size[1] + h;
    if (held[place] != key) {
      const int64_t before = whole_planes ? h : 0, count = whole_planes ? size[1] : 1;  // rows
      for (int64_t i = 0; i < count; ++i) held[place - before + i] = key - before + i;
      const S* src = static_cast<const S*>(view.data) + image * view.stride[0] + d * view.stride[2] +
                     (h - before) * view.stride[3];
      const int64_t ahead = whole_planes ? kL * view.stride[1] : 2 * row_step * view.stride[3];
      RowCopy<S>::gather(tile + (place - before) * row_elements(), lanes, src, map, base, plus, view.stride[1],
                         view.stride[4], count * size[2], ahead);
    }
    return place * row_elements();
  }
};

}  // namespace dsconv::cpu::DSCONV_ISA

// Depthwise correlation by rows of columns: the forward pass and the input gradient.
#pragma once

#include "cell_blocks.h"
#include "column_strips.h"
#include "kernel_of.h"
#include "phases.h"
#include "row_blocks.h"
#include "row_stage.h"
#include "tasks.h"

namespace dsconv::cpu::DSCONV_ISA {

// Weights as [block][part][tap in the correlation's order][lane]: lane l of a block is filter (c + l) * parts + part,
// where the last block ends with the last channel.
template <class S, class T = Compute<S>>
static void pack_taps(T* packed, const DepthwiseProblem& p, const Correlation& c, int64_t channels, int64_t parts) {
  constexpr int kL = kLanes<T>;
  const int64_t taps = product(p.window.taps), lanes = min64(kL, channels), filter = p.weight.stride[0];
  for (int64_t t = 0; t < taps; t += kL) {
    const int64_t count = min64(kL, taps - t);
    int64_t places[kL];
    for (int64_t i = 0; i < count; ++i) places[i] = c.place_of(t + i) * kL;
    T* block = packed;
    for (int64_t next = 0; next < channels; next += kL) {
      const S* filters = static_cast<const S*>(p.weight.data) + block_channel<T>(next, channels) * parts * filter;
      for (int64_t part = 0; part < parts; ++part, block += taps * kL) {
        Vec<T> rows[kL] = {};
        load_taps<S>(rows, filters + part * filter, p.weight, parts * filter, p.window, lanes, t, count);
        for (int64_t i = 0; i < count; ++i) store(block + places[i], rows[i]);
      }
    }
  }
}

// For kernels that multiply in pairs: the lower half of each of `count` packed taps takes the one before it.
template <class T>
static void pair_taps(T* packed, int64_t count) {
  for (T* tap = packed + (count - 1) * kLanes<T>; tap > packed; tap -= kLanes<T>)
    store(tap, pair_of(load(tap - kLanes<T>), load(tap)));
}

// How the outputs get where they belong. direct: the blocks write them there. staged: a block at a time, from a buffer in
// L1, where blocks do not narrow them or pixels of a streamed tensor share cache lines. rows: transposed, some rows at a
// time.
enum class Delivery { direct, staged, rows };

// Of one channel in a streamed tensor that is not channels_last: long enough for the cache lines at its ends not to count.
constexpr int64_t kRunBytes = 1024;

// Columns whose distances are multiples of this, or of half of it where the stride is 2, share so few sets of a cache that
// strips take several vectors at a time.
constexpr int64_t kCrowdedColumn = 2048;

constexpr int64_t kAheadBytes = 2048;  // of each row, at least, from what is read to what is fetched

// Moves the outputs of a block on (BlockRow::put).
template <class S, class T = Compute<S>>
static void put_block(const BlockRow<T>& row, int64_t pixel, int rows, int pixels) {
  const int64_t base = block_channel<T>(row.first, row.channels), count = row.last - base;
  const int64_t run = row.y_pixel == count ? pixels : 1;  // pixels without a gap
  const T* from = row.staged;
  for (int r = 0; r < rows; ++r) {
    S* to = static_cast<S*>(row.y) + r * row.y_row + pixel * row.y_pixel + base;
    for (int i = 0; i < pixels; i += run, to += row.y_pixel, from += run * count)
      copy_run<S>(to, from, run * count, row.streamed);
  }
}

template <class S, bool kTransposed>
struct Rows {
  using T = Compute<S>;
  static constexpr int kL = kLanes<T>, kTotals = 2 * BlockKernels<T>::kLong * kL;
  static constexpr int64_t kFewTasks = 8;  // for a thread: with more, one task is no great difference
  static constexpr int kMostOutputs = max64(BlockKernels<T>::kLong, 2 * CellKernels<T>::kWide);  // of a block

  // A task is one or two output rows of one phase, or a group of such pairs, over the whole width and a chunk of channels.
  struct Plan {
    Correlation c;
    int64_t channels, parts;  // of the output; input channels that meet in one of them
    int64_t blocks, taps, chunk, chunks, y_phases, pairs, group, tasks;
    int64_t rows, segments, groups;  // at most, for a pair
    RowStage<S> in;
    Delivery delivery;
    bool streamed, by_lines;
    bool fetches;                   // what blocks will read: where the cache is near, that costs more than it saves
    const CellKernels<T>* cells;    // null, or what computes two rows of outputs of all phases at once
    const StripKernels<T>* strips;  // null, or what computes all rows of a task, a few columns at a time
  };
  static double part(const DepthwiseProblem& p) {
    const View &in = kTransposed ? p.grad_x : p.x, &out = kTransposed ? p.grad : p.y;  // of the convolution
    constexpr double kTurn = kVectorBytes == 64 ? 7.5 : 4.5;
    return part_of_turning<T>(in.stride[1] != 1, out.stride[1] != 1, p.window, kTurn);
  }
  static ChannelMap output_map(const DepthwiseProblem& p) {
    return {kTransposed ? p.channels : p.channels * p.multiplier, 1, 1};
  }
  static const View& input_of(const DepthwiseProblem& p) { return kTransposed ? p.grad : p.x; }
  static ChannelMap input_map(const DepthwiseProblem& p) {
    return {output_map(p).count, kTransposed ? p.multiplier : 1, kTransposed ? 1 : p.multiplier};
  }
  // Do the blocks write S, though they compute in T?
  static bool narrows(const DepthwiseProblem& p) {
    return kNarrows<S> && RowStage<S>::is_plain(input_of(p), input_map(p));
  }
  // (What cuts its own tasks, as planes and lines do, asks for one thread.)
  static Plan plan_of(const DepthwiseProblem& p, int threads = 1) {
    // Strips are faster when their outputs stay in the cache than blocks are when theirs go past it; those of three columns
    // always, which are three blocks.
    if (is_large<S>(p) &&
        (!is_large<S>(p, kNearBytes) || Correlation::of(p.window, kTransposed).phase(2, 0).count == 3)) {
      const Plan plan = plan_of(p, threads, false);
      if (plan.strips) return plan;
    }
    return plan_of(p, threads, kStreams && is_large<S>(p));
  }
  static Plan plan_of(const DepthwiseProblem& p, int threads, bool streamed) {
    const View& to = kTransposed ? p.grad_x : p.y;
    const ChannelMap map = output_map(p);
    const int64_t slots = thread_slots(threads, threads, depthwise_flops(p));
    if (to.stride[1] != 1) return plan_of(p, Delivery::rows, streamed && to.stride[4] == 1, slots);
    if (!RowStage<S>::is_plain(to, map) || !(narrows(p) || sizeof(S) == sizeof(T)))
      return plan_of(p, Delivery::staged, streamed, slots);
    // Blocks that store whole lines stream them, others leave that to `put`. Half types whose pixels share lines would make
    // many short runs: they are better written through the caches.
    const bool whole_lines = has_whole_lines<S>(to, map.count), half = sizeof(S) < sizeof(T);
    const bool direct = half ? !whole_lines : whole_lines && kLanes<T> * sizeof(S) == kBlockBytes;
    Plan plan = plan_of(p, streamed && !direct ? Delivery::staged : Delivery::direct, streamed, slots);
    if (half && !whole_lines) plan.streamed = false;
    return plan;
  }
  // Channels are cut into as many chunks as `slots` threads take to have equal shares, or the cache.
  static Plan plan_of(const DepthwiseProblem& p, Delivery delivery, bool streamed, int64_t slots) {
    Plan plan{};
    plan.c = Correlation::of(p.window, kTransposed);
    const Window& w = p.window;
    plan.parts = kTransposed ? p.multiplier : 1;
    plan.channels = output_map(p).count;
    plan.delivery = delivery;
    plan.streamed = streamed;
    plan.blocks = ceil_div(plan.channels, kL);
    plan.taps = product(w.taps) * plan.parts;

    RowStage<S>& in = plan.in;
    in.view = input_of(p);
    in.map = input_map(p);
    in.direct = kWidens<S> && RowStage<S>::is_plain(in.view, in.map);
    const auto &source = plan.c.source(), &target = plan.c.target();
    const Phase z = plan.c.phase(0, 0), y = plan.c.phase(1, 0);
    in.plane_step = z.tap_step;
    in.planes = min64(ceil_div(source[0], z.tap_step), w.taps[0]);
    in.row_step = y.tap_step;
    in.rows = min64(ceil_div(source[1], y.tap_step), w.taps[1] + y.apart);
    in.size = source;
    if (in.has_small_planes()) {
      in.row_step = 1;
      in.rows = source[1];
    }
    const int64_t source_bytes = numel(p.batch, plan.channels, source) * static_cast<int64_t>(sizeof(S));
    plan.fetches = in.direct && (is_large<S>(p) || source_bytes > kFetchedBytes) && in.view.stride[4] == plan.channels;
    // Where rows crowd the cache, those that several rows of outputs meet are copied, if the copy does not crowd it too, and
    // others are read by whole lines.
    const bool crowded = kHasLines<S> && in.direct && is_crowded<S>(in.view);
    const bool copied = crowded && (!plan.fetches || is_crowded<S>(in.view, kPage)) && w.taps[1] > 1 &&
                        plan.c.phases(1) == 1 && y.apart == 1 &&
                        in.planes * in.rows * source[2] * kBlockBytes <= kCrowdedRingBytes;
    if (copied) in.direct = plan.fetches = false;
    plan.by_lines = crowded && !copied && plan.channels % kBlock<T> == 0;

    plan.cells = cells_of(p, plan);
    plan.strips = strips_of(p, plan);
    const int64_t phases = plan.cells ? 1 : plan.c.phases(1);
    plan.pairs = ceil_div(ceil_div(target[1], phases), 2);
    plan.group = 1;
    if (plan.delivery == Delivery::rows && plan.streamed && phases == 1)
      plan.group = min64(plan.pairs, ceil_div(kRunBytes, 2 * target[2] * static_cast<int64_t>(sizeof(S))));
    if (plan.strips) plan.group = strip_group(plan, p.batch * target[0] * min64(phases, target[1]), slots);
    int64_t column = output_columns(plan);  // elements per channel, in the ring too
    if (!in.direct) column += in.planes * in.rows * plan.parts * source[2];
    const int64_t ring = copied ? kCrowdedRingBytes : kRingBytes, least = kBlock<S> / kL;  // a cache line of channels
    int64_t fit = column == 0 ? plan.blocks : ring / (column * kL * static_cast<int64_t>(sizeof(T)));
    plan.y_phases = min64(phases, target[1]);  // the others are empty
    plan.tasks = p.batch * target[0] * plan.y_phases * ceil_div(plan.pairs, plan.group);
    const int64_t shares = plan.tasks < kFewTasks * slots ? slots / gcd64(slots, max64(plan.tasks, 1)) : 1;
    fit = min64(fit, max64(4 * least, ceil_div(plan.blocks, shares)));
    plan.chunks = ceil_div(plan.blocks, min64(plan.blocks, max64(least, fit)));
    plan.chunk = min64(plan.blocks, round_up(ceil_div(plan.blocks, plan.chunks), least)) * kL;
    plan.chunks = ceil_div(plan.blocks * kL, plan.chunk);
    in.lanes = plan.chunk;

    plan.rows = plan.parts * w.taps[0] * (w.taps[1] + min64(w.taps[1], w.stride[1]));
    plan.segments = plan.rows * w.taps[2];
    plan.groups = max64(1, plan.rows * ceil_div(w.taps[2], kChain / 2));
    plan.tasks *= plan.chunks;
    return plan;
  }
  static const CellKernels<T>* cells_of(const DepthwiseProblem& p, const Plan& plan) {
    const Window& w = p.window;
    const bool square = w.taps[0] == 1 && w.stride[0] == 1 && w.taps[1] == w.taps[2] && w.pad[1] % 2 == w.pad[2] % 2;
    const bool plain = w.stride[1] == 2 && w.stride[2] == 2 && w.dilation[1] == 1 && w.dilation[2] == 1;
    if (!kTransposed || kIsPaired<S> || plan.parts > 1 || !square || !plain) return nullptr;
    if constexpr (kWidens<S> && !kIsPaired<S>) {
      if (plan.in.direct) return cell_kernels<S>(w.taps[1], w.pad[1] % 2);
    }
    return cell_kernels<T>(w.taps[1], w.pad[1] % 2);
  }
  // Vectors that strips take at a time. Four make them so narrow that few outputs do not pay for pairs of taps, which every
  // strip makes anew.
  static int64_t strip_vectors(int64_t column, int64_t stride, int64_t outputs) {
    if (column % (stride == 1 ? kCrowdedColumn : kCrowdedColumn / 2) != 0) return 1;
    const bool four = stride == 2 && column % kCrowdedColumn == 0 && (!kIsPaired<S> || outputs > 5);
    return four ? 4 : 2;
  }
  // Strips want 3x3 windows in every phase. Activations that take registers would cost them more than they save.
  static const StripKernels<T>* strips_of(const DepthwiseProblem& p, const Plan& plan) {
    if constexpr (!kWidens<S>) return nullptr;
    if (!kTransposed && !Limits<T>::make(p.activation)) return nullptr;
    const Correlation& c = plan.c;
    const Phase y = c.phase(1, 0);
    if (kTransposed && c.window.stride[1] * c.window.stride[2] > 1) return nullptr;  // phases have other windows
    if (!plan.in.direct || plan.delivery != Delivery::direct || plan.streamed || plan.by_lines) return nullptr;
    if (plan.parts > 1 || c.window.taps[0] > 1 || c.window.taps[1] != c.window.taps[2]) return nullptr;
    const int64_t vectors = strip_vectors(strip_column(plan), y.apart, c.target()[2]);
    const StripKernels<T>* kernels = strip_kernels<S>(y.taps, y.apart, vectors);
    return kernels && c.has_narrow_borders(y.apart) ? kernels : nullptr;
  }
  // Pairs of rows of outputs that strips go down at a time, at most. What they read brings its neighbours into a cache, for
  // the next vector of channels; but not for long, where columns share sets of the cache or strips read many.
  static int64_t strip_pairs(const Plan& plan) {
    constexpr int64_t kFew = 3, kSome = 4, kPart = 512;
    if (plan.strips->stride > 1 || strip_column(plan) % kPage == 0) return kFew;
    return sizeof(S) < sizeof(T) && strip_column(plan) % kPart == 0 ? kSome : plan.pairs;
  }
  // Bytes between columns of a strip's inputs.
  static int64_t strip_column(const Plan& plan) {
    return plan.c.phase(2, 0).tap_step * plan.in.view.stride[4] * static_cast<int64_t>(sizeof(S));
  }
  // Pairs of rows of outputs in a task. To cut channels costs nothing, so rows are cut further only where that is not
  // enough, or would give threads unequal shares.
  static int64_t strip_group(const Plan& plan, int64_t maps, int64_t slots) {
    constexpr int64_t kLeast = 4;  // pairs, and blocks of a cache line
    const int64_t most = min64(plan.pairs, strip_pairs(plan));
    const int64_t shares = slots / gcd64(slots, max64(maps, 1)), blocks = plan.blocks * kL / kBlock<S>;
    const bool cut = blocks < kLeast * shares || (blocks % shares > 0 && blocks < kFewTasks * shares);
    return cut ? min64(most, max64(kLeast, ceil_div(plan.pairs, shares))) : most;
  }
  // The rows of outputs of phase `index`; with cells, all.
  static Phase output_rows(const Plan& plan, int64_t index) {
    if (!plan.cells) return plan.c.phase(1, index);
    Phase all{};
    all.count = plan.c.target()[1];
    all.out_step = 1;
    return all;
  }
  static int64_t output_columns(const Plan& plan) {
    if (plan.delivery == Delivery::direct) return 0;
    return plan.delivery == Delivery::rows ? 2 * plan.group * plan.c.target()[2] : kMostOutputs;
  }
  static int64_t output_count(const Plan& plan) {
    return plan.delivery == Delivery::direct ? 0 : output_columns(plan) * plan.chunk + kL;
  }
  static int64_t turned_count(const Plan& plan) {
    return plan.delivery == Delivery::rows && plan.streamed ? output_count(plan) : 0;
  }
  static int64_t slot_bytes(Plan& plan) {
    plan.in.size = plan.c.source();
    return piece_bytes<T>(kTotals) + 2 * piece_bytes<int64_t>(plan.rows) + piece_bytes<InputRow>(plan.rows) +
           piece_bytes<Segment>(plan.segments) + piece_bytes<SegmentGroup>(plan.groups) +
           piece_bytes<T>(output_count(plan)) + piece_bytes<T>(turned_count(plan)) + plan.in.scratch();
  }
  static int64_t shared_bytes(const DepthwiseProblem& p, const Plan& plan) {
    const int64_t packed = p.packed && !kTransposed ? 0 : packed_count(plan);
    return piece_bytes<T>(packed) + piece_bytes<T>(plan.blocks * kL);
  }
  static int64_t packed_count(const Plan& plan) { return plan.blocks * plan.taps * kL; }
  // As the pass sees it. (Memory is read and written along rows, in the order of the addresses.)
  static DepthwiseProblem seen(const DepthwiseProblem& p) {
    return is_large<S>(p, kNearBytes) ? p : along_rows(p, input_of(p), kTransposed ? p.grad_x : p.y);
  }
  static size_t workspace_bytes(const DepthwiseProblem& problem, int threads) {
    const DepthwiseProblem p = seen(problem);
    Plan plan = plan_of(p, threads);
    return kBlockBytes + shared_bytes(p, plan) + threads * slot_bytes(plan);
  }

  // The rows of the input that output rows n and n + 1 of phase y meet at output n_z of phase z.
  static int64_t list_rows(const Plan& plan, RowStage<S>& in, const Phase& z, int64_t n_z, const Phase& y, int64_t n,
                           int rows, InputRow* list) {
    const auto& size = plan.c.source();
    const int64_t *k = plan.c.window.taps, apart = y.apart;
    InputRow* next = list;
    for (int64_t part = 0; part < plan.parts; ++part) {
      for (int64_t u = 0; u < z.taps; ++u) {
        const int64_t d = z.in_first + n_z * z.in_step + u * z.tap_step;
        if (d < 0 || d >= size[0]) continue;
        for (int64_t q = 0; q < y.taps + (rows - 1) * apart; ++q) {
          const int64_t h = y.in_first + n * y.in_step + q * y.tap_step;
          const bool first = q < y.taps, second = rows == 2 && q >= apart;
          if (h < 0 || h >= size[1] || !(first || second)) continue;
          auto weight = [&](int64_t v) {
            return (((part * k[0] + z.tap_first + u) * k[1]) + y.tap_first + v) * k[2] * kL;
          };
          *next++ = {first && second ? 1 : first ? 0 : 2, in.row(part, d, h), {weight(q), weight(q - apart)}};
        }
      }
    }
    return next - list;
  }

  // The rows of the input that rows n and n + 1 meet and the two rows before them do not.
  static FreshRows list_fresh(const Plan& plan, RowStage<S>& in, const Phase& z, int64_t n_z, const Phase& y, int64_t n,
                              int64_t* list) {
    int64_t count = 0;
    if (!plan.fetches || n >= y.count) return {list, 0};
    for (int64_t u = 0; u < z.taps; ++u) {
      const int64_t d = z.in_first + n_z * z.in_step + u * z.tap_step;
      if (d < 0 || d >= plan.c.source()[0]) continue;
      for (int64_t q = n == 0 ? 0 : max64(0, y.taps - y.apart); q < y.taps + y.apart; ++q) {
        const int64_t h = y.in_first + n * y.in_step + q * y.tap_step;
        const bool met = q < y.taps || q >= y.apart;
        if (met && h >= 0 && h < plan.c.source()[1]) list[count++] = in.row(0, d, h);
      }
    }
    return {list, count};
  }

  // Are there kernels for the window, which is that of the convolution or one that a phase has of the same size?
  static bool has_windows(const Plan& plan, const Phase& z, const Phase& y, const Phase& x,
                          const BlockKernels<T>& kernels) {
    const int64_t *k = plan.c.window.taps, taps = kernels.taps, apart = kernels.stride;
    return kernels.windows[0].edge[1] && plan.parts == 1 && z.taps == 1 && k[0] == 1 && k[1] == taps && k[2] == taps &&
           y.taps == taps && x.taps == taps && y.apart == apart && x.apart == apart;
  }
  // Lists the rows of such a window; do all lie in the tensor?
  static bool list_window(const Plan& plan, RowStage<S>& in, const Phase& z, int64_t n_z, const Phase& y, int64_t n,
                          int rows, WindowRows& window) {
    const auto& size = plan.c.source();
    const int64_t d = z.in_first + n_z * z.in_step, count = y.taps + (rows - 1) * y.apart;
    window.inside = 0;
    for (int64_t q = 0; q < count; ++q) {
      const int64_t h = y.in_first + n * y.in_step + q * y.tap_step;
      const bool inside = d >= 0 && d < size[0] && h >= 0 && h < size[1];
      window.x[q] = inside ? in.row(0, d, h) : 0;
      window.inside |= uint64_t{inside} << q;
    }
    return window.inside + 1 == uint64_t{1} << count;
  }

  // The segments of those rows, in groups of up to kChain taps; returns the number of groups.
  static int64_t list_segments(const InputRow* rows, int64_t row_count, const Phase& x, int64_t x_step, int64_t width,
                               const BlockKernels<T>& kernels, Segment* segment, SegmentGroup* group) {
    const int64_t apart = x.apart, unit = kernels.stride == apart ? 1 : apart;
    const int64_t low = ceil_of(-x.in_first, x.tap_step), high = ceil_of(width - x.in_first, x.tap_step);
    const int64_t row_band = max64(1, kChain / max64(x.taps, 1));
    const int64_t tap_band = min64(x.taps, kChain / kernels.taps * kernels.taps);
    const SegmentGroup* begin = group;
    for (int64_t r = 0; r < row_count; r += row_band) {
      for (int64_t t = 0; t < x.taps; t += tap_band, ++group) {
        const int64_t taps = min64(tap_band, x.taps - t);
        const int64_t whole = kernels.taps > 1 ? taps / kernels.taps * kernels.taps : 0;
        group->begin = segment;
        for (int kind = 0; kind < 3; ++kind) {
          for (int single = 0; single < 2; ++single) {
            for (int64_t i = r; i < min64(r + row_band, row_count); ++i) {
              if (rows[i].kind != kind) continue;
              for (int64_t v = t + single * whole; v < t + (single ? taps : whole); v += single ? 1 : kernels.taps) {
                const int64_t place = (x.tap_first + v) * kL;
                *segment++ = {rows[i].x + v * x_step,
                              {rows[i].weight[0] + place, rows[i].weight[1] + place},
                              ceil_of(low - v, unit),
                              ceil_of(high - v, unit)};
              }
            }
            group->end[kind][single] = segment;
          }
        }
      }
    }
    if (group == begin) *group++ = {};  // no tap reaches these outputs
    return group - begin;
  }

  // Weights and bias, which every worker reads.
  static BlockRow<T> shared_row(const DepthwiseProblem& p, const Plan& plan, Arena& arena) {
    BlockRow<T> row{};
    const bool in_pairs = kIsPaired<S> && plan.in.direct;  // blocks on the ring multiply in the compute type
    if (p.packed && !kTransposed) {
      row.weights = static_cast<const T*>(p.packed) + (in_pairs ? packed_count(plan) : 0);
    } else {
      T* packed = take<T>(arena, packed_count(plan));
      pack_taps<S>(packed, p, plan.c, plan.channels, plan.parts);
      if constexpr (kIsPaired<S>) {
        if (in_pairs) pair_taps(packed, packed_count(plan) / kL);
      }
      row.weights = packed;
    }
    T* bias = take<T>(arena, plan.blocks * kL);
    const S* given = kTransposed ? nullptr : static_cast<const S*>(p.bias.data);
    for (int64_t c = 0; c < plan.blocks * kL; ++c)
      bias[c] = given && c < plan.channels ? widen(given[c * p.bias.stride[0]]) : T(0);
    row.bias = bias;
    row.weight_block = plan.taps * kL;
    row.channels = plan.channels;
    row.activation = kTransposed ? ActivationSpec{Activation::none, 0} : p.activation;
    row.streamed = plan.streamed && plan.delivery != Delivery::rows;
    row.put = put_block<S>;
    return row;
  }

  // One thread's lists and ring, and the rows it computes with them.
  struct Worker {
    const Plan& plan;
    BlockRow<T> row;
    RowStage<S> in;
    InputRow* inputs;
    Segment* segments;
    SegmentGroup* groups;
    int64_t* fresh[2];

    Worker(const Plan& plan, const BlockRow<T>& shared, Arena& own) : plan(plan), row(shared), in(plan.in) {
      inputs = take<InputRow>(own, plan.rows);
      segments = take<Segment>(own, plan.segments);
      groups = take<SegmentGroup>(own, plan.groups);
      for (int64_t*& list : fresh) list = take<int64_t>(own, plan.rows);
      row.groups = groups;
      row.total = take<T>(own, kTotals);
      in.take_scratch(own);
    }

    const BlockKernels<T>& kernels_for(const Phase& x) const {
      if constexpr (kWidens<S>) {
        if (in.direct) return block_kernels<S>(x.taps, x.apart);
      }
      return block_kernels<T>(x.taps, x.apart);
    }

    void begin(int64_t image, int64_t chunk) {
      row.first = chunk * plan.chunk;
      row.last = min64(row.first + plan.chunk, plan.channels);
      in.begin(image, block_channel<T>(row.first, plan.channels));
    }

    // What NextBlock wants to know of a row.
    void look_ahead(int64_t begin, int64_t end, int64_t shared) {
      row.begin = begin;
      row.end = end;
      row.shared = shared;
      row.distance = ceil_div(kAheadBytes, row.x_pixel * static_cast<int64_t>(sizeof(S)));
    }

    // Outputs [first, last) of `count` rows from row n of phase y on, in depth d. `to` is where column 0 of the first
    // row lies, `row_step` and `column` are the elements between rows and columns there.
    template <class Output>
    void compute(int64_t d, const Phase& y, int64_t n, int count, int64_t first, int64_t last, Output* to,
                 int64_t row_step, int64_t column) {
      const Phase z = plan.c.phase(0, d % plan.c.phases(0));
      const int64_t n_z = d / z.out_step, width = plan.c.source()[2];
      const FreshRows now = list_fresh(plan, in, z, n_z, y, n, fresh[0]);
      const FreshRows then = list_fresh(plan, in, z, n_z, y, n + count, fresh[1]);
      int64_t input_count = -1;
      row.y_row = row_step;
      for (int64_t i = 0; i < plan.c.phases(2); ++i) {
        const Phase x = plan.c.phase(2, i);
        if (x.count == 0) break;  // and in all that follow
        const int64_t step = x.tap_step * in.column();
        const BlockKernels<T>& kernels = kernels_for(x);
        row.x = in.at(x.in_first * in.column());
        row.y = to + x.out_first * column;
        row.x_pixel = x.in_step * in.column();
        row.x_step = kernels.stride == x.apart ? step : row.x_pixel;
        row.y_pixel = x.out_step * column;
        const int64_t begin = ceil_of(first - x.out_first, x.out_step);
        const int64_t end = min64(x.count, ceil_of(last - x.out_first, x.out_step));
        look_ahead(begin, end, max64(0, x.taps - x.apart) * step);
        row.fresh[0] = now;
        row.fresh[1] = then;
        WindowRows& window = row.window;
        window.low = ceil_of(-x.in_first, x.tap_step);
        window.high = ceil_of(width - x.in_first, x.tap_step);
        const int64_t inside_first = ceil_of(window.low, x.apart);
        const int64_t inside_last = floor_of(window.high - x.taps, x.apart) + 1;
        // Of the columns that a block reads, none but the first and the last may lie outside.
        const bool narrow = window.low - begin * x.apart <= 1 && (end - 1) * x.apart + x.taps - window.high <= 1;
        if (narrow && has_windows(plan, z, y, x, kernels)) {
          const int together = plan.by_lines ? 1 : count;
          for (int r = 0; r < count; r += together) {
            if (r > 0) row.fresh[0].count = 0;
            row.fresh[1].count = r + together < count ? 0 : then.count;
            const bool whole = list_window(plan, in, z, n_z, y, n + r, together, window);
            const auto& blocks = plan.by_lines ? kernels.lines : kernels.windows[together - 1];
            kernels.run(blocks, row, begin, end, whole ? inside_first : end, inside_last);
            row.y = static_cast<Output*>(row.y) + row_step;
          }
          continue;
        }
        if (input_count < 0) input_count = list_rows(plan, in, z, n_z, y, n, count, inputs);
        row.group_count = list_segments(inputs, input_count, x, step, width, kernels, segments, groups);
        kernels.run(kernels.rows[count - 1], row, begin, end, inside_first, inside_last);
      }
    }

    // The same for any number of rows, by strips.
    template <class Output>
    void compute_strips(int64_t d, const Phase& y, int64_t n, int64_t count, int64_t first, int64_t last, Output* to,
                        int64_t row_step, int64_t column) {
      const auto& size = plan.c.source();
      const Phase z = plan.c.phase(0, d % plan.c.phases(0));
      const int64_t depth = z.in_first + d / z.out_step * z.in_step, h = y.in_first + n * y.in_step;
      const int64_t low = ceil_of(-h, y.tap_step), high = ceil_of(size[1] - h, y.tap_step);
      const bool inside = depth >= 0 && depth < size[0];
      const View& from = in.view;
      row.strip = {y.tap_step * from.stride[3], low, inside ? high : low, count};
      row.y_row = row_step;
      for (int64_t i = 0; i < plan.c.phases(2); ++i) {
        const Phase x = plan.c.phase(2, i);
        if (x.count == 0) break;  // and in all that follow
        row.x = in.at(depth * from.stride[2] + h * from.stride[3] + x.in_first * from.stride[4]);
        row.y = to + x.out_first * column;
        row.x_pixel = x.in_step * from.stride[4];
        row.x_step = x.tap_step * from.stride[4];
        row.y_pixel = x.out_step * column;
        row.window.low = ceil_of(-x.in_first, x.tap_step);
        row.window.high = ceil_of(size[2] - x.in_first, x.tap_step);
        plan.strips->run(row, ceil_of(first - x.out_first, x.out_step),
                         min64(x.count, ceil_of(last - x.out_first, x.out_step)));
      }
    }

    // Rows [n, n + count) of outputs in depth d, of all phases.
    template <class Output>
    void compute_cells(int64_t d, int64_t n, int count, Output* to, int64_t row_step, int64_t column) {
      if (count == 1) {  // half a cell
        const int64_t phases = plan.c.phases(1), width = plan.c.target()[2];
        return compute(d, plan.c.phase(1, n % phases), n / phases, 1, 0, width, to, row_step, column);
      }
      const CellKernels<T>& kernels = *plan.cells;
      const auto& size = plan.c.source();
      const int64_t *pad = plan.c.window.pad, depth = d + pad[0];
      const int64_t top = n / 2 + pad[1] / 2 + kernels.first, left = pad[2] / 2 + kernels.first;
      WindowRows& window = row.window;
      window.low = -left;
      window.high = size[2] - left;
      window.inside = 0;
      for (int64_t q = 0; q < kernels.inputs; ++q) {
        const int64_t h = top + q;
        const bool inside = depth >= 0 && depth < size[0] && h >= 0 && h < size[1];
        window.x[q] = inside ? in.row(0, depth, h) : 0;
        window.inside |= uint64_t{inside} << q;
      }
      for (int64_t next = 0; next < 2; ++next) {
        const int64_t h = top + kernels.inputs - 1 + next;
        const bool fetches = plan.fetches && depth < size[0] && h >= 0 && h < size[1];
        if (fetches) fresh[next][0] = in.row(0, depth, h);
        row.fresh[next] = {fresh[next], fetches};
      }
      row.x = in.at(left * in.column());
      row.x_pixel = row.x_step = in.column();
      look_ahead(0, ceil_div(plan.c.target()[2], 2), (kernels.inputs - 1) * in.column());
      row.y = to;
      row.y_row = row_step;
      row.y_pixel = column;
      const bool crowded = column * static_cast<int64_t>(sizeof(Output)) % kPage == 0;
      kernels.run(row, plan.c.target()[2], window.inside + 1 == uint64_t{1} << kernels.inputs, crowded);
    }
  };

  // `rows` rows of outputs, [row][column][channel of the chunk], channels [base, last), to where they belong.
  static void deliver_rows(const Plan& plan, const View& to, S* target, int64_t row_step, int64_t rows,
                           const T* outputs, T* turned, int64_t base, int64_t last) {
    int64_t width = plan.c.target()[2];
    if (row_step == width * to.stride[4]) {  // rows that follow each other are one long row
      width *= rows;
      rows = 1;
    }
    for (; rows > 0; --rows, target += row_step, outputs += width * plan.chunk) {
      if (!plan.streamed) {
        RowCopy<S>::scatter(target, outputs, plan.chunk, base, last, to.stride[1], to.stride[4], width);
        continue;
      }
      RowCopy<T>::scatter(turned - base * width, outputs, plan.chunk, base, last, width, 1, width);
      for (int64_t c = base; c < last; ++c)
        copy_run<S>(target + c * to.stride[1], turned + (c - base) * width, width, true);
    }
  }

  static void launch(const DepthwiseProblem& problem, const Runtime& runtime, void* workspace) {
    const DepthwiseProblem p = seen(problem);
    const View& to = kTransposed ? p.grad_x : p.y;
    Plan plan = plan_of(p, runtime.threads);
    const int64_t own_bytes = slot_bytes(plan);
    Arena arena = arena_at(workspace);
    const BlockRow<T> shared = shared_row(p, plan, arena);
    auto body = [&](int64_t task, int64_t end, int64_t slot) {
      Arena own{arena.next + slot * own_bytes};
      T* outputs = take<T>(own, output_count(plan));
      T* turned = take<T>(own, turned_count(plan));
      Worker worker(plan, shared, own);
      if (plan.delivery == Delivery::staged) worker.row.staged = outputs;
      worker.row.narrow = kNarrows<S> && plan.delivery == Delivery::direct;
      const int64_t groups = ceil_div(plan.pairs, plan.group);
      for (; task < end; ++task) {
        int64_t image = task;
        const auto next_of = [&](int64_t count) {
          const int64_t index = image % count;
          image /= count;
          return index;
        };
        // Chunks of channels follow each other, so that threads have equal shares of unequal ones; but not where rows that
        // are in the ring would have to be copied again.
        int64_t chunk = plan.in.direct ? next_of(plan.chunks) : 0;
        const int64_t first = 2 * plan.group * next_of(groups), y_phase = next_of(plan.y_phases);
        if (!plan.in.direct) chunk = next_of(plan.chunks);
        const int64_t d = next_of(plan.c.target()[0]);
        const Phase y = output_rows(plan, y_phase);
        const int64_t last = min64(first + 2 * plan.group, y.count);
        if (first >= last) continue;
        worker.begin(image, chunk);
        const int64_t width = plan.c.target()[2], row_step = y.out_step * to.stride[3];
        S* target = static_cast<S*>(to.data) + image * to.stride[0] + d * to.stride[2] +
                    (y.out_first + first * y.out_step) * to.stride[3];
        if (plan.strips) {
          worker.compute_strips(d, y, first, last - first, 0, width, target, row_step, to.stride[4]);
          continue;
        }
        for (int64_t n = first; n < last; n += 2) {
          const auto compute = [&](auto* to, int64_t row_step, int64_t column) {
            const int rows = static_cast<int>(min64(2, last - n));
            if (plan.cells) return worker.compute_cells(d, n, rows, to, row_step, column);
            worker.compute(d, y, n, rows, 0, width, to, row_step, column);
          };
          if (plan.delivery == Delivery::rows) {
            T* row = outputs + (n - first) * width * plan.chunk - worker.in.base;
            compute(row, width * plan.chunk, plan.chunk);
          } else {
            compute(target + (n - first) * row_step, row_step, to.stride[4]);
          }
        }
        if (plan.delivery == Delivery::rows) {
          const int64_t base = worker.in.base, count = worker.row.last;
          deliver_rows(plan, to, target, row_step, last - first, outputs, turned, base, count);
        }
      }
      if (plan.streamed) end_stream();
    };
    for_slots(runtime, plan.tasks, thread_slots(runtime.threads, plan.tasks, depthwise_flops(p)), body);
  }
};

// Packed weights of bfloat16 are followed by those for pairs where a processor multiplies them.
template <class S>
struct RowsForward : Rows<S, false> {
  static bool has_pairs() { return kIsBFloat16<S> && has_avx512_bf16; }
  static int64_t count(const DepthwiseProblem& p) {
    return round_up(p.channels * p.multiplier, kLanes<Compute<S>>) * product(p.window.taps);
  }
  static size_t bytes(const DepthwiseProblem& p) { return sizeof(Compute<S>) * count(p) * (has_pairs() ? 2 : 1); }
  static void pack(const DepthwiseProblem& p, void* out) {
    const auto c = Correlation::of(p.window, false);
    auto* const packed = static_cast<Compute<S>*>(out);
    pack_taps<S>(packed, p, c, p.channels * p.multiplier, 1);
    if constexpr (kIsBFloat16<S>) {
      if (!has_pairs()) return;
      memcpy(packed + count(p), packed, sizeof(Compute<S>) * count(p));
      pair_taps(packed + count(p), count(p) / kLanes<Compute<S>>);
    }
  }
};
template <class S>
struct RowsGradInput : Rows<S, true> {};

}  // namespace dsconv::cpu::DSCONV_ISA

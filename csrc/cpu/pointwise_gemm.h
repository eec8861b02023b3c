// Pointwise (1x1) convolution as a matrix product over positions, its weight gradient, and the fused depthwise +
// pointwise forward.
#pragma once

#include "depthwise_rows.h"
#include "gemm.h"
#include "tiles.h"

namespace dsconv::cpu::DSCONV_ISA {

constexpr int64_t kRowElements = 64 * 1024;  // A rows of one task: stay in L2 beside the panels
constexpr int64_t kMaxTaskRows = 256;
constexpr int64_t kPackFlops = 8;  // that packing a weight is worth
// Products fetch the input of the next one beyond the first size, and outputs leave past the caches beyond the second (of
// input and output).
constexpr int64_t kFarBytes = kSmallCaches ? 1 << 20 : kNearBytes;
constexpr int64_t kPastBytes = kSmallCaches ? 4 << 20 : kStreamedBytes;

DSCONV_INLINE int64_t pointwise_flops(const PointwiseProblem& p) {
  return 2 * numel(p.batch, p.in_channels, p.size) * p.out_channels;
}

// Positions of one image as one task's rows of A.
DSCONV_INLINE TilePlan plan_rows(const int64_t (&size)[3], int64_t depth) {
  const int64_t rows = max64(8, min64(kMaxTaskRows, kRowElements / depth));
  return plan_tiles(size, rows);
}
// Tasks are cut into their panels where threads would have too few for equal shares.
DSCONV_INLINE int64_t panels_apart(const Runtime& runtime, int64_t tasks, int64_t panels) {
  return runtime.threads > 1 && tasks < 8 * runtime.threads && panels >= 4 ? panels : 1;
}
// Row stride of A, whole cache lines: not a multiple of 256 bytes, which would put a column of rows into few cache sets.
template <class A>
DSCONV_INLINE int64_t row_stride(int64_t depth) {
  const int64_t whole = round_up(depth, kBlock<A>);
  return whole + (whole * static_cast<int64_t>(sizeof(A)) % 256 == 0 ? kBlock<A> : 0);
}

// The rows of an input that the tile after `tile` (of those of all images) is the first to read, as one piece of memory;
// nothing where they are no such piece. A pointwise convolution has windows of one position.
template <class S>
static Ahead rows_ahead(const View& x, int64_t channels, const Window& w, int64_t batch, const TilePlan& plan,
                        int64_t tile) {
  const int64_t row = w.in[2] * x.stride[4], next = tile + 1;
  const bool plain = x.stride[1] == 1 && x.stride[4] == channels && x.stride[3] == row && w.in[0] == 1;
  if (!plain || numel(batch, channels, w.in) * static_cast<int64_t>(sizeof(S)) <= kFarBytes) return {};
  if (next >= batch * plan.tiles) return {};
  const auto rows_of = [&](int64_t tile) {  // up to the last one that it reads
    const Box box = tile_box(plan, w.out, tile % plan.tiles);
    const int64_t last = (box.origin[1] + box.extent[1] - 1) * w.stride[1] - w.pad[1] + (w.taps[1] - 1) * w.dilation[1];
    return min64(max64(last + 1, 0), w.in[1]);
  };
  const int64_t first = next % plan.tiles > 0 ? rows_of(tile) : 0, count = max64(rows_of(next) - first, 0);
  const S* const at = static_cast<const S*>(x.data) + next / plan.tiles * x.stride[0] + first * row;
  return {reinterpret_cast<const char*>(at), count * row * static_cast<int64_t>(sizeof(S))};
}

// One row of columns of a tensor: data, and the elements between channels and columns.
template <class S>
struct BoxRow {
  S* data;
  int64_t channel, column;
};
// fn(positions of the box before the row, BoxRow) for each row of columns of a box.
template <class S, class Fn>
DSCONV_INLINE void for_rows(const View& v, int64_t image, const Box& box, Fn fn) {
  int64_t position = 0;
  for (int64_t z = 0; z < box.extent[0]; ++z) {
    for (int64_t y = 0; y < box.extent[1]; ++y, position += box.extent[2]) {
      S* row = static_cast<S*>(v.data) + image * v.stride[0] + (box.origin[0] + z) * v.stride[2] +
               (box.origin[1] + y) * v.stride[3] + box.origin[2] * v.stride[4];
      fn(position, BoxRow<S>{row, v.stride[1], v.stride[4]});
    }
  }
}

// Channels [first, first + width) of the positions of a box as rows [position][width], zeros past `channels`.
template <class S, class T = Compute<S>>
static void gather_rows(T* a, int64_t width, const View& view, int64_t image, int64_t first, int64_t channels,
                        const Box& box) {
  for_rows<S>(view, image, box, [&](int64_t position, const BoxRow<S>& row) {
    RowCopy<S>::gather(a + position * width, width, row.data, {channels, 1, 1}, first, 0, row.channel, row.column,
                       box.extent[2], view.stride[3]);
  });
}

// Do the positions of any tile lie one column apart, channels side by side?
DSCONV_INLINE bool has_plain_rows(const View& v, const int64_t (&size)[3]) {
  return v.stride[1] == 1 && (size[1] == 1 || v.stride[3] == size[2] * v.stride[4]) &&
         (size[0] == 1 || v.stride[2] == size[1] * v.stride[3]);
}

// What multiplies: the type of the rows of A and how they are filled, how weights are packed, and a panel's product.
// This one is of vectors, in the compute type.
template <class S>
struct VectorProduct {
  using T = Compute<S>;
  using A = T;                                               // rows of A and packed weights
  static constexpr int kColumns = kPanel<T>, kRowBlock = 1;  // outputs of a panel, rows that are read together
  // Of one product: beyond a panel, those of the next one.
  static constexpr int kMostOutputs = kMostColumns<ChannelSteps<T>>;

  static void begin() {}
  static void end() {}

  static int64_t panel_values(int64_t depth) { return ChannelSteps<T>::panel_values(depth); }
  // Outputs [first, first + kColumns) of the weights [K, C] (any strides) as a panel [C][kColumns]; columns past K are zero.
  static void pack(T* panel, const View& weight, int64_t out_channels, int64_t in_channels, int64_t first) {
    RowCopy<S>::gather(panel, kColumns, static_cast<const S*>(weight.data), {out_channels, 1, 1}, first, 0,
                       weight.stride[0], weight.stride[1], in_channels, 0);
  }

  static void clear_tails(T*, int64_t, int64_t, int64_t) {}
  static void gather(T* a, int64_t lda, const View& view, int64_t image, int64_t channels, const Box& box) {
    gather_rows<S>(a, lda, view, image, 0, channels, box);
  }
  template <class Y>
  static void multiply(const T* a, int64_t lda, int64_t rows, const T* panel, int64_t depth, const Epilogue<T, Y>& e) {
    multiply_panel<ChannelSteps<T>>(a, lda, rows, panel, depth, e);
  }
};

// Packed weights, and the rows of A and of outputs of one thread.
template <class Product>
struct ProductBuffers {
  using T = typename Product::T;
  using A = typename Product::A;

  static int64_t panels(const PointwiseProblem& p) { return ceil_div(p.out_channels, Product::kColumns); }
  static int64_t packed_values(const PointwiseProblem& p) { return panels(p) * Product::panel_values(p.in_channels); }
  static void pack(A* packed, const PointwiseProblem& p, int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; ++panel) {
      Product::pack(packed + panel * Product::panel_values(p.in_channels), p.weight, p.out_channels, p.in_channels,
                    panel * Product::kColumns);
    }
  }
  static int64_t shared_bytes(const PointwiseProblem& p) { return piece_bytes<A>(p.packed ? 0 : packed_values(p)); }
  static const A* packed_weights(const PointwiseProblem& p, const Runtime& runtime, Arena& arena) {
    if (p.packed) return static_cast<const A*>(p.packed);
    A* packed = take<A>(arena, packed_values(p));
    auto body = [&](int64_t panel, int64_t end, int64_t) { pack(packed, p, panel, end); };
    for_slots(runtime, panels(p), thread_slots(runtime.threads, panels(p), kPackFlops * packed_values(p)), body);
    return packed;
  }

  static int64_t row_values(const PointwiseProblem& p, const TilePlan& plan) {
    return round_up(plan.staged, Product::kRowBlock) * row_stride<A>(p.in_channels);
  }
  static int64_t slot_bytes(const PointwiseProblem& p, const TilePlan& plan) {
    return piece_bytes<A>(row_values(p, plan)) + piece_bytes<T>(plan.staged * Product::kColumns);
  }
  A* a;
  T* c;
  ProductBuffers(const PointwiseProblem& p, const TilePlan& plan, Arena& own)
      : a(take<A>(own, row_values(p, plan))), c(take<T>(own, plan.staged * Product::kColumns)) {
    Product::clear_tails(a, plan.staged, row_stride<A>(p.in_channels), p.in_channels);
  }
};

template <class Product>
struct PackedWeights {
  using A = typename Product::A;
  static size_t bytes(const PointwiseProblem& p) { return ProductBuffers<Product>::packed_values(p) * sizeof(A); }
  static void pack(const PointwiseProblem& p, void* out) {
    ProductBuffers<Product>::pack(static_cast<A*>(out), p, 0, ProductBuffers<Product>::panels(p));
  }
};

// How the products of a pointwise convolution reach its output: written there by the product, or from a panel of the
// compute type that lies in L1.
template <class S, class Product>
struct PanelOutput {
  using T = Compute<S>;
  static constexpr int kColumns = Product::kColumns;
  const PointwiseProblem& p;
  bool direct, streamed;
  const T* bias;  // padded to whole panels

  static int64_t bias_count(const PointwiseProblem& p) { return round_up(p.out_channels, kColumns); }
  PanelOutput(const PointwiseProblem& p, int64_t input_bytes, Arena& arena) : p(p) {
    direct = has_plain_rows(p.y, p.size) && (!p.residual.data || has_plain_rows(p.residual, p.size));
    const int64_t bytes = input_bytes + numel(p.batch, p.out_channels, p.size) * static_cast<int64_t>(sizeof(S));
    const bool whole_lines = kColumns * sizeof(S) % kBlockBytes == 0 && has_whole_lines<S>(p.y, p.out_channels);
    streamed = kStreams && direct && bytes > kPastBytes && whole_lines;
    T* padded = take<T>(arena, bias_count(p));
    for (int64_t k = 0; k < bias_count(p); ++k) {
      const bool given = p.bias.data && k < p.out_channels;
      padded[k] = given ? widen(static_cast<const S*>(p.bias.data)[k * p.bias.stride[0]]) : T(0);
    }
    bias = padded;
  }

  // Panels [first, last) of one task, whose rows of A are ready; buffers.c holds a panel of outputs. `next` (its share is all
  // of it) is fetched meanwhile.
  void multiply(const ProductBuffers<Product>& buffers, const typename Product::A* panels, int64_t image,
                const Box& box, int64_t first, int64_t last, const Ahead& next) const {
    const int64_t lda = row_stride<typename Product::A>(p.in_channels), rows = product(box.extent);
    T* const c = buffers.c;
    const int64_t values = Product::panel_values(p.in_channels);
    const int64_t panel_bytes = values * static_cast<int64_t>(sizeof(typename Product::A));
    // The next panel instead, where the weights are far away and more than that input.
    const bool fetches_panels = (last - first) * panel_bytes > max64(kFetchedBytes, next.share);
    // The last panel has so few outputs that one product takes them with those of the panel before it.
    const bool joined = direct && last - first >= 2 && p.out_channels - (last - 2) * kColumns <= Product::kMostOutputs;
    const int64_t end = joined ? last - 1 : last;
    const int64_t share = fetches_panels ? ceil_div(panel_bytes, rows) : next.share / (rows * max64(end - first, 1));
    for (int64_t i = first; i < end; ++i) {
      const int64_t k = i * kColumns, most = joined && i + 1 == end ? Product::kMostOutputs : kColumns;
      const auto *panel = panels + i * values, *after = panels + (i + 1 < end ? i + 1 : first) * values;
      const Ahead ahead{fetches_panels ? reinterpret_cast<const char*>(after) : next.at + (i - first) * rows * share,
                        share};
      if (direct) {
        Epilogue<T, S> e{position(p.y, image, k, box), p.y.stride[4], min64(most, p.out_channels - k), bias + k};
        e.residual = p.residual.data ? position(p.residual, image, k, box) : nullptr;
        e.residual_step = p.residual.stride[4];
        e.activation = p.activation;
        e.streamed = streamed;
        e.ahead = ahead;
        Product::multiply(buffers.a, lda, rows, panel, p.in_channels, e);
        continue;
      }
      Epilogue<T> e{c, kColumns, kColumns, bias + k};
      e.activation = p.activation;
      e.ahead = ahead;
      if (p.residual.data) {
        gather_rows<S>(c, kColumns, p.residual, image, k, p.out_channels, box);
        e.residual = c;
        e.residual_step = kColumns;
      }
      Product::multiply(buffers.a, lda, rows, panel, p.in_channels, e);
      for_rows<S>(p.y, image, box, [&](int64_t position, const BoxRow<S>& row) {
        RowCopy<S>::scatter(row.data, c + position * kColumns, kColumns, k, p.out_channels, row.channel, row.column,
                            box.extent[2]);
      });
    }
  }
  static S* position(const View& v, int64_t image, int64_t channel, const Box& box) {
    return static_cast<S*>(v.data) + image * v.stride[0] + channel + box.origin[0] * v.stride[2] +
           box.origin[1] * v.stride[3] + box.origin[2] * v.stride[4];
  }
};

// fn(task, box, first panel, last panel) for the tasks, `apart` parts each, of which parts [part, end) are.
template <class Fn>
DSCONV_INLINE void for_panels(const PointwiseProblem& p, const TilePlan& plan, int64_t panels, int64_t part,
                              int64_t end, int64_t apart, Fn fn) {
  while (part < end) {
    const int64_t task = part / apart, first = part % apart, last = min64(apart, first + end - part);
    fn(task, tile_box(plan, p.size, task % plan.tiles), panels * first / apart, panels * last / apart);
    part += last - first;
  }
}

template <class S, class Product>
struct Pointwise {
  using Buffers = ProductBuffers<Product>;
  using Output = PanelOutput<S, Product>;
  using T = Compute<S>;

  static size_t workspace_bytes(const PointwiseProblem& p, int threads) {
    return kBlockBytes + Buffers::shared_bytes(p) + piece_bytes<T>(Output::bias_count(p)) +
           threads * Buffers::slot_bytes(p, plan_rows(p.size, p.in_channels));
  }
  static void launch(const PointwiseProblem& p, const Runtime& runtime, void* workspace) {
    const TilePlan plan = plan_rows(p.size, p.in_channels);
    Arena arena = arena_at(workspace);
    const auto* panels = Buffers::packed_weights(p, runtime, arena);
    const int64_t input_bytes = numel(p.batch, p.in_channels, p.size) * static_cast<int64_t>(sizeof(S));
    const Output output(p, input_bytes, arena);
    const Window window{
        {p.size[0], p.size[1], p.size[2]}, {p.size[0], p.size[1], p.size[2]}, {1, 1, 1}, {1, 1, 1}, {}, {}};
    const int64_t tasks = p.batch * plan.tiles, apart = panels_apart(runtime, tasks, Buffers::panels(p));
    auto body = [&](int64_t part, int64_t end, int64_t slot) {
      Arena own{arena.next + slot * Buffers::slot_bytes(p, plan)};
      const Buffers buffers(p, plan, own);
      Product::begin();
      for_panels(p, plan, Buffers::panels(p), part, end, apart,
                 [&](int64_t task, const Box& box, int64_t first, int64_t last) {
                   const int64_t image = task / plan.tiles;
                   Product::gather(buffers.a, row_stride<typename Product::A>(p.in_channels), p.a, image, p.in_channels,
                                   box);
                   output.multiply(buffers, panels, image, box, first, last,
                                   rows_ahead<S>(p.a, p.in_channels, window, p.batch, plan, task));
                 });
      Product::end();
      if (output.streamed) end_stream();
    };
    for_slots(runtime, tasks * apart, thread_slots(runtime.threads, tasks * apart, pointwise_flops(p)), body);
  }
};

// grad_weight[K, C] = sum over positions of grad[position, K] * a[position, C]; grad_bias[K] = sum of grad.
// task = some panels of C x block of K; each walks all positions in order, one chunk after the other, so nothing depends on
// the threads. The sums of the chunks, of which there are as many as there are positions, are added in float64.
template <class S>
struct PointwiseGradWeight {
  using T = Compute<S>;
  static constexpr int kColumns = kPanel<T>;
  static constexpr int64_t kChunk = kChain, kMostRows = 96, kLeastRows = kLanes<T> > 8 ? 48 : 24;  // whole vectors
  static constexpr int64_t kMostPanels = 4, kTasks = 16;

  struct Plan {
    TilePlan chunks;
    int64_t rows, blocks;    // of K
    int64_t panels, groups;  // of C: those of a task
  };
  static Plan plan_of(const PointwiseProblem& p) {
    Plan plan{plan_tiles(p.size, kChunk), kMostRows, 0, 1, 0};
    const int64_t all = ceil_div(p.in_channels, kColumns);
    while (plan.rows > kLeastRows && all * ceil_div(p.out_channels, plan.rows) < kTasks) plan.rows /= 2;
    plan.blocks = ceil_div(p.out_channels, plan.rows);
    plan.panels = max64(1, min64(kMostPanels, all * plan.blocks / kTasks));
    plan.groups = ceil_div(all, plan.panels);
    return plan;
  }
  static int64_t slot_bytes() {
    return piece_bytes<T>(kChunk * kColumns) + piece_bytes<T>(kChunk * kMostRows) +
           piece_bytes<T>(kMostRows * kColumns) + piece_bytes<double>(kMostPanels * kMostRows * kColumns) +
           piece_bytes<double>(kMostRows);
  }
  static size_t workspace_bytes(const PointwiseProblem&, int threads) { return kBlockBytes + threads * slot_bytes(); }

  static void launch(const PointwiseProblem& p, const Runtime& runtime, void* workspace) {
    const Plan plan = plan_of(p);
    Arena arena = arena_at(workspace);
    auto body = [&](int64_t task, int64_t end, int64_t slot) {
      Arena own{arena.next + slot * slot_bytes()};
      T* columns = take<T>(own, kChunk * kColumns);
      T* gradients = take<T>(own, kChunk * kMostRows);
      T* sums = take<T>(own, kMostRows * kColumns);
      double* total = take<double>(own, kMostPanels * kMostRows * kColumns);
      double* bias = take<double>(own, kMostRows);
      for (; task < end; ++task) {
        const int64_t group = task / plan.blocks, k0 = task % plan.blocks * plan.rows,
                      c0 = group * plan.panels * kColumns;
        const int64_t rows = min64(plan.rows, p.out_channels - k0),
                      width = min64(plan.panels * kColumns, p.in_channels - c0);
        const bool with_bias = p.grad_bias.data && group == 0;
        memset(total, 0, plan.panels * kMostRows * kColumns * sizeof(double));
        memset(bias, 0, kMostRows * sizeof(double));
        for (int64_t piece = 0; piece < p.batch * plan.chunks.tiles; ++piece) {
          const int64_t image = piece / plan.chunks.tiles;
          const Box box = tile_box(plan.chunks, p.size, piece % plan.chunks.tiles);
          const int64_t positions = product(box.extent);
          gather_rows<S>(gradients, plan.rows, p.grad, image, k0, p.out_channels, box);
          for (int64_t c = 0; c < width; c += kColumns) {
            gather_rows<S>(columns, kColumns, p.a, image, c0 + c, p.in_channels, box);
            multiply_panel<ChannelSteps<T, true>>(gradients, plan.rows, rows, columns, positions,
                                                  Epilogue<T>{sums, kColumns, kColumns});
            double* const to = total + c * kMostRows;
            for (int64_t i = 0; i < rows * kColumns; ++i) to[i] += sums[i];
          }
          if (with_bias) add_columns(bias, gradients, plan.rows, positions, sums);
        }
        for (int64_t k = 0; k < rows && p.grad_weight.data; ++k) {
          S* out =
              static_cast<S*>(p.grad_weight.data) + (k0 + k) * p.grad_weight.stride[0] + c0 * p.grad_weight.stride[1];
          for (int64_t c = 0; c < width; ++c) {
            const double sum = total[(c / kColumns * kMostRows + k) * kColumns + c % kColumns];
            narrow(static_cast<T>(sum), out + c * p.grad_weight.stride[1]);
          }
        }
        for (int64_t k = 0; k < rows && with_bias; ++k)
          narrow(static_cast<T>(bias[k]), static_cast<S*>(p.grad_bias.data) + (k0 + k) * p.grad_bias.stride[0]);
      }
    };
    const int64_t tasks = plan.groups * plan.blocks;
    for_slots(runtime, tasks, thread_slots(runtime.threads, tasks, pointwise_flops(p)), body);
  }

  // Adds the columns of [positions][count] to the totals.
  static void add_columns(double* totals, const T* values, int64_t count, int64_t positions, T* sums) {
    memset(sums, 0, count * sizeof(T));
    for (int64_t i = 0; i < positions; ++i, values += count) {
      for (int64_t k = 0; k < count; ++k) sums[k] += values[k];
    }
    for (int64_t k = 0; k < count; ++k) totals[k] += sums[k];
  }
};

// Rounds whole vectors of values to the storage type and back: what memory would have done to them.
template <class S, class T = Compute<S>>
DSCONV_INLINE void round_row(T* values, int64_t count) {
  if constexpr (sizeof(S) == sizeof(T)) return;
  for (int64_t i = 0; i < count; i += kLanes<T>) store(values + i, rounded<S>(load(values + i)));
}

// Depthwise into the rows of A, then the panels: the depthwise map of a task never leaves the cache.
template <class S, class Product>
struct Fused {
  using T = Compute<S>;
  using A = typename Product::A;
  using Depthwise = Rows<S, false>;
  using Buffers = ProductBuffers<Product>;
  using Output = PanelOutput<S, Product>;
  // Rows of A in the storage type are a tensor like others; those of the compute type are rounded as it would be.
  static constexpr bool kRounds = sizeof(A) == sizeof(T);
  static Delivery delivery_of(const DepthwiseProblem& p) {
    return kRounds || Depthwise::narrows(p) ? Delivery::direct : Delivery::staged;
  }

  static TilePlan plan_of(const SeparableProblem& p) {
    return plan_rows(p.depthwise.window.out, p.pointwise.in_channels);
  }
  static int64_t slot_bytes(typename Depthwise::Plan& rows, const SeparableProblem& p, const TilePlan& plan) {
    return Depthwise::slot_bytes(rows) + Buffers::slot_bytes(p.pointwise, plan);
  }
  static size_t workspace_bytes(const SeparableProblem& p, int threads) {
    typename Depthwise::Plan rows = Depthwise::plan_of(p.depthwise, delivery_of(p.depthwise), false, 1);
    return kBlockBytes + Depthwise::shared_bytes(p.depthwise, rows) + Buffers::shared_bytes(p.pointwise) +
           piece_bytes<T>(Output::bias_count(p.pointwise)) + threads * slot_bytes(rows, p, plan_of(p));
  }

  static void launch(const SeparableProblem& problem, const Runtime& runtime, void* workspace) {
    const DepthwiseProblem& dw = problem.depthwise;
    const PointwiseProblem& pw = problem.pointwise;
    const TilePlan plan = plan_of(problem);
    typename Depthwise::Plan rows = Depthwise::plan_of(dw, delivery_of(dw), false, 1);
    const int64_t lda = row_stride<A>(pw.in_channels), own_bytes = slot_bytes(rows, problem, plan);
    Arena arena = arena_at(workspace);
    const BlockRow<T> shared = Depthwise::shared_row(dw, rows, arena);
    const A* panels = Buffers::packed_weights(pw, runtime, arena);
    const int64_t input_bytes = numel(dw.batch, dw.channels, dw.window.in) * static_cast<int64_t>(sizeof(S));
    const Output output(pw, input_bytes, arena);
    const int64_t tasks = pw.batch * plan.tiles, apart = panels_apart(runtime, tasks, Buffers::panels(pw));
    auto body = [&](int64_t part, int64_t end, int64_t slot) {
      Arena own{arena.next + slot * own_bytes};
      const Buffers buffers(pw, plan, own);
      T* staged = take<T>(own, Depthwise::output_count(rows));
      typename Depthwise::Worker worker(rows, shared, own);
      if (rows.delivery == Delivery::staged) worker.row.staged = staged;
      worker.row.narrow = !kRounds && rows.delivery == Delivery::direct;
      Product::begin();
      for_panels(pw, plan, Buffers::panels(pw), part, end, apart,
                 [&](int64_t task, const Box& box, int64_t first, int64_t last) {
                   const int64_t image = task / plan.tiles;
                   for (int64_t chunk = 0; chunk < rows.chunks; ++chunk) {
                     worker.begin(image, chunk);
                     depthwise_tile(worker, rows.c, box, buffers.a, lda);
                   }
                   if constexpr (kRounds) {
                     for (int64_t i = 0; i < product(box.extent); ++i)
                       round_row<S>(buffers.a + i * lda, pw.in_channels);
                   }
                   output.multiply(buffers, panels, image, box, first, last,
                                   rows_ahead<S>(dw.x, dw.channels, dw.window, dw.batch, plan, task));
                 });
      Product::end();
      if (output.streamed) end_stream();
    };
    const int64_t flops = depthwise_flops(dw) + pointwise_flops(pw);
    for_slots(runtime, tasks * apart, thread_slots(runtime.threads, tasks * apart, flops), body);
  }

  // The depthwise values of a box as rows of A: by strips where there are rows enough, else two rows of the map at a time
  // where they are neighbours in a phase.
  static void depthwise_tile(typename Depthwise::Worker& worker, const Correlation& c, const Box& box, A* a,
                             int64_t lda) {
    constexpr int64_t kStripRows = 4;
    const int64_t width = box.extent[2], left = box.origin[2], phases = c.phases(1), pair = phases == 1 ? 2 : 1;
    const bool by_strips = worker.plan.strips && phases == 1 && box.extent[1] >= kStripRows;
    for (int64_t z = 0; z < box.extent[0]; ++z) {
      const int64_t d = box.origin[0] + z;
      if (by_strips) {
        A* to = a + (z * box.extent[1] * width - left) * lda;
        worker.compute_strips(d, c.phase(1, 0), box.origin[1], box.extent[1], left, left + width, to, width * lda, lda);
        continue;
      }
      for (int64_t y = 0; y < box.extent[1]; y += pair) {
        const int64_t h = box.origin[1] + y;
        const int count = static_cast<int>(min64(pair, box.extent[1] - y));
        A* to = a + ((z * box.extent[1] + y) * width - left) * lda;
        worker.compute(d, c.phase(1, h % phases), h / phases, count, left, left + width, to, width * lda, lda);
      }
    }
  }
};

// By storage type.
template <class S>
struct VectorPointwise : Pointwise<S, VectorProduct<S>> {};
template <class S>
struct VectorFused : Fused<S, VectorProduct<S>> {};
template <class S>
struct PackedPanels : PackedWeights<VectorProduct<S>> {};

}  // namespace dsconv::cpu::DSCONV_ISA

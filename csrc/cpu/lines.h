// Depthwise correlation along the rows of contiguous tensors: windows of one row, as conv1d has them.
//
// A vector holds neighbouring outputs. A column that is loaded for tap t of one output is that of tap t + kL of the output
// a vector before it, so several vectors of outputs, kept in registers, share what is loaded: the taps are taken in the
// order of their place within a vector. Borders as in planes.h: no weight meets padding.
#pragma once

#include "planes.h"

namespace dsconv::cpu::DSCONV_ISA {

// A vector of outputs of which some read columns outside the line, or which is shorter or not in step with the others. Its
// lanes for each tap: those whose column lies in the line.
template <class T>
struct LineEdge {
  int64_t first, count;
  const Lanes<T>* inside;
};

// A line is a plane of one row; its x is the column that output 0 reads first.
template <class S, class T = Compute<S>>
static void line_edge(const Plane<S>& line, int64_t taps, const LineEdge<T>& edge) {
  Vec<T> acc = splat(line.bias);
  const S* x = line.x + edge.first;
  for (int64_t t = 0; t < taps; ++t) {
    const Lanes<T>& inside = edge.inside[t];
    acc += widened<S>(inside.load(x + t)) * inside.of(splat(line.weights[t * kLanes<T>]));
  }
  put_outputs<S>(line.y + edge.first, acc, line.limits, edge.count);
}

// Adds to kVectors vectors of outputs the taps [begin, end) and those that are kTogether - 1 times a vector further on.
template <class S, int kVectors, int kTogether, class T = Compute<S>>
DSCONV_INLINE void add_taps(const S* x, const T* weights, int64_t begin, int64_t end, Vec<T>* acc) {
  constexpr int kL = kLanes<T>;
  for (int64_t t = begin; t < end; ++t) {
    Vec<T> w[kTogether];
    unroll<kTogether>([&]<int m>() __attribute__((always_inline)) { w[m] = splat(weights[(t + m * kL) * kL]); });
    unroll<kVectors + kTogether - 1>([&]<int j>() __attribute__((always_inline)) {
      const Vec<T> value = widened<S>(load_bits_once(x + t + j * kL));
      unroll<kTogether>([&]<int m>() __attribute__((always_inline)) {
        if constexpr (j - m >= 0 && j - m < kVectors) acc[j - m] += value * w[m];
      });
    });
  }
}

// kVectors vectors of outputs from output `first` on, whose columns lie in the line.
template <class S, int kVectors, class T = Compute<S>>
static void line_block(const Plane<S>& line, int64_t taps, int64_t first) {
  constexpr int kL = kLanes<T>, kTogether = 4;
  constexpr int64_t kAhead = 2048 / sizeof(S);
  Vec<T> acc[kVectors];
  unroll<kVectors>([&]<int v>() __attribute__((always_inline)) {
    acc[v] = splat(line.bias);
    __builtin_prefetch(line.x + first + v * kL + kAhead, 0, 2);
    __builtin_prefetch(line.y + first + v * kL + kAhead, 1, 2);
  });
  for (int64_t t = 0; t < taps; t += kTogether * kL) {
    const int64_t band = min64(kTogether * kL, taps - t), all = band / kL, rest = band % kL;
    const S* x = line.x + first + t;
    const T* weights = line.weights + t * kL;
    unroll<kTogether + 1>([&]<int together>() __attribute__((always_inline)) {
      if constexpr (together > 0) {
        if (together == all + 1) add_taps<S, kVectors, together>(x, weights, 0, rest, acc);
        if (together == all) add_taps<S, kVectors, together>(x, weights, rest, kL, acc);
      }
    });
  }
  unroll<kVectors>(
      [&]<int v>() __attribute__((always_inline)) { put_outputs<S>(line.y + first + v * kL, acc[v], line.limits); });
}

template <class S, bool kTransposed>
struct Lines {
  using T = Compute<S>;
  using Shared = Rows<S, kTransposed>;
  using Plan = typename Shared::Plan;
  static constexpr int kL = kLanes<T>, kBlockVectors = 8;
  static constexpr int64_t kTasks = 64, kLeastVectors = 64;  // of a task that is a part of a line

  static const char* can_run(const DepthwiseProblem& p) {
    const Window& w = p.window;
    const View &from = kTransposed ? p.grad : p.x, &to = kTransposed ? p.grad_x : p.y;
    if (!kWidens<S>) return "half types are widened by rows";
    if (from.stride[4] != 1 || to.stride[4] != 1) return "columns are no neighbours in memory";
    for (int dim = 0; dim < 2; ++dim) {
      const bool alone = w.taps[dim] == 1 && w.stride[dim] == 1 && w.pad[dim] == 0 && w.in[dim] == w.out[dim];
      if (!alone) return "taps, strides or padding of other dimensions";
    }
    if (w.stride[2] != 1 || w.dilation[2] != 1) return "strides or dilation";
    if (w.taps[2] > kChain) return "longer sums than this instruction set keeps in one chain";
    if (kTransposed && p.multiplier != 1) return "a gradient of multipliers";
    if (!has_wide_rows<S>(w)) return "rows of a half type that are shorter than a vector";
    return nullptr;
  }

  // Vectors of outputs of a line; [first, last) are read where they lie, in step and without a column outside.
  struct Cut {
    int64_t vectors, first, last, edges;
  };
  static Cut cut_of(const Window& w, int64_t low) {  // low: the first column of output 0
    const int64_t in = kTransposed ? w.out[2] : w.in[2], out = kTransposed ? w.in[2] : w.out[2];
    Cut cut{ceil_div(out, kL), 0, 0, 0};
    const int64_t whole = min64(out / kL, floor_div(in - low - w.taps[2] - kL + 1, kL) + 1);
    cut.first = min64(cut.vectors, ceil_div(max64(-low, 0), kL));
    cut.last = max64(cut.first, whole);
    cut.edges = cut.first + cut.vectors - cut.last;
    return cut;
  }
  static int64_t low_of(const Window& w) { return Correlation::of(w, kTransposed).phase(2, 0).in_first; }

  // Vectors at the ends take their taps one by one, with lanes to be kept out (kEdge: as long as so many others).
  static double part(const DepthwiseProblem& p) {
    constexpr double kEdge = 6;
    const Cut cut = cut_of(p.window, low_of(p.window));
    const int64_t out = kTransposed ? p.window.in[2] : p.window.out[2];
    return filled_lanes<T>(out) * cut.vectors / max64(1, cut.vectors + (kEdge - 1) * cut.edges);
  }

  static size_t workspace_bytes(const DepthwiseProblem& p, int) {
    const Cut cut = cut_of(p.window, low_of(p.window));
    return kBlockBytes + Shared::shared_bytes(p, Shared::plan_of(p)) + piece_bytes<LineEdge<T>>(cut.edges) +
           piece_bytes<Lanes<T>>(cut.edges * p.window.taps[2]);
  }
  static void launch(const DepthwiseProblem& p, const Runtime& runtime, void* workspace) {
    if constexpr (kWidens<S>) launch_lines(p, runtime, workspace);
  }

  static void launch_lines(const DepthwiseProblem& p, const Runtime& runtime, void* workspace) {
    const View &from = kTransposed ? p.grad : p.x, &to = kTransposed ? p.grad_x : p.y;
    const Plan plan = Shared::plan_of(p);
    Arena arena = arena_at(workspace);
    const BlockRow<T> shared = Shared::shared_row(p, plan, arena);
    const auto &in = plan.c.source(), &out = plan.c.target();
    const int64_t taps = p.window.taps[2], low = low_of(p.window), channels = plan.channels;
    const Cut cut = cut_of(p.window, low);
    LineEdge<T>* const edges = take<LineEdge<T>>(arena, cut.edges);
    Lanes<T>* inside = take<Lanes<T>>(arena, cut.edges * taps);
    for (int64_t e = 0; e < cut.edges; ++e, inside += taps) {
      const int64_t v = e < cut.first ? e : cut.last + e - cut.first, first = max64(0, min64(v * kL, out[2] - kL));
      edges[e] = {first, min64(kL, out[2]), inside};
      for (int64_t t = 0; t < taps; ++t) inside[t] = {-low - first - t, in[2] - low - first - t};
    }

    const int64_t rows = out[0] * out[1], lines = p.batch * channels * rows;
    const int64_t wanted = wanted_tasks(depthwise_flops(p), kTasks);
    const int64_t cuts = max64(1, min64(ceil_div(wanted, max64(lines, 1)), cut.vectors / kLeastVectors));
    const Limits<T> limits(shared.activation);
    auto body = [&](int64_t task, int64_t end, int64_t) {
      int64_t part = task % cuts, row = task / cuts % rows, channel = task / cuts / rows % channels;
      int64_t image = task / cuts / rows / channels;
      for (; task < end; ++task) {
        const int64_t base = block_channel<T>(channel / kL * kL, channels);
        const auto offset = [&](const View& view, int64_t channel) {
          return image * view.stride[0] + channel * view.stride[1] + row / out[1] * view.stride[2] +
                 row % out[1] * view.stride[3];
        };
        const int64_t source = kTransposed || p.multiplier == 1 ? channel : channel / p.multiplier;
        const Plane<S> line{static_cast<const S*>(from.data) + offset(from, source) + low,
                            static_cast<S*>(to.data) + offset(to, channel),
                            shared.weights + channel / kL * shared.weight_block + (channel - base),
                            shared.bias[channel], limits};
        compute(line, taps, cut, edges, cut.vectors * part / cuts, cut.vectors * (part + 1) / cuts);
        if (++part < cuts) continue;
        part = 0;
        if (++row < rows) continue;
        row = 0;
        if (++channel < channels) continue;
        channel = 0;
        ++image;
      }
    };
    const int64_t tasks = lines * cuts;
    for_slots(runtime, tasks, thread_slots(runtime.threads, tasks, depthwise_flops(p)), body);
  }

  // Vectors [v, last) of the outputs of a line.
  static void compute(const Plane<S>& line, int64_t taps, const Cut& cut, const LineEdge<T>* edges, int64_t v,
                      int64_t last) {
    for (; v < min64(last, cut.first); ++v) line_edge<S>(line, taps, edges[v]);
    const int64_t first = v, inner = min64(last, cut.last);
    const auto blocks = [&]<int kVectors>() __attribute__((always_inline)) {
      if (inner - first < kVectors) return;  // else the last one may compute anew what is there
      for (; v < inner; v += kVectors) line_block<S, kVectors>(line, taps, min64(v, inner - kVectors) * kL);
    };
    blocks.template operator()<kBlockVectors>();
    blocks.template operator()<kBlockVectors / 2>();
    blocks.template operator()<1>();
    for (v = max64(first, inner); v < last; ++v) line_edge<S>(line, taps, edges[v - cut.last + cut.first]);
  }
};

template <class S>
struct LinesForward : Lines<S, false> {};
template <class S>
struct LinesGradInput : Lines<S, true> {};

}  // namespace dsconv::cpu::DSCONV_ISA

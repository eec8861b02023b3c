// Depthwise correlation straight on channels_last memory: the forward pass and the input gradient.
#pragma once

#include "direct_blocks.h"
#include "kernel_of.h"
#include "phases.h"
#include "tasks.h"

namespace dsconv::cpu::DSCONV_ISA {

// The pass over a whole tensor.
template <class S, bool kTransposed>
struct Direct {
  using T = Compute<S>;
  static constexpr int kL = kLanes<T>, kTotals = 2 * BlockKernels<S>::kLong * kL;

  static const View& source(const DepthwiseProblem& p) { return kTransposed ? p.grad : p.x; }
  static const View& target(const DepthwiseProblem& p) { return kTransposed ? p.grad_x : p.y; }

  static const char* can_run(const DepthwiseProblem& p) {
    if (p.multiplier != 1) return "a depth multiplier above 1";
    if (p.channels < kL) return "fewer channels than a vector holds";
    if (source(p).stride[1] != 1 || target(p).stride[1] != 1) return "not channels_last";
    return nullptr;
  }

  // How the work is cut: a task is one or two output rows of one phase, over the whole width and all channels.
  struct Plan {
    Correlation c;
    int64_t blocks, taps, rows, segments, groups, pairs, tasks;
  };
  static Plan plan_of(const DepthwiseProblem& p) {
    Plan plan{{p.window, kTransposed}, ceil_div(p.channels, kL), product(p.window.taps), 0, 0, 0, 0, 0};
    const int64_t* k = p.window.taps;
    plan.rows = k[0] * (k[1] + min64(k[1], p.window.stride[1]));  // that two output rows meet
    plan.segments = plan.rows * k[2];
    plan.groups = max64(1, plan.rows * ceil_div(k[2], kChain / 2));
    plan.pairs = ceil_div(ceil_div(plan.c.target()[1], plan.c.phases(1)), 2);
    plan.tasks = p.batch * plan.c.target()[0] * plan.c.phases(1) * plan.pairs;
    return plan;
  }
  static int64_t slot_bytes(const Plan& plan) {
    return piece_bytes<T>(kTotals) + piece_bytes<InputRow>(plan.rows) + piece_bytes<Segment>(plan.segments) + piece_bytes<SegmentGroup>(plan.groups);
  }
  static size_t workspace_bytes(const DepthwiseProblem& p, int threads) {
    const Plan plan = plan_of(p);
    const int64_t packed = p.packed && !kTransposed ? 0 : packed_count(p);
    return kBlockBytes + piece_bytes<T>(packed) + piece_bytes<T>(p.channels) + threads * slot_bytes(plan);
  }

  static int64_t packed_count(const DepthwiseProblem& p) {
    return ceil_div(p.channels, kL) * product(p.window.taps) * kL;
  }
  // Weights as [block][tap in the correlation's order][lane]; the last block ends with the last channel.
  static void pack_weights(T* packed, const DepthwiseProblem& p) {
    const Correlation c{p.window, kTransposed};
    const int64_t *k = p.window.taps, *stride = p.weight.stride, taps = product(p.window.taps);
    for (int64_t next = 0; next < p.channels; next += kL, packed += taps * kL) {
      const S* block = static_cast<const S*>(p.weight.data) + min64(next, p.channels - kL) * stride[0];
      T* out = packed;
      for (int64_t z = 0; z < k[0]; ++z) {
        for (int64_t y = 0; y < k[1]; ++y) {
          const S* row = block + c.tap_at(0, z) * stride[2] + c.tap_at(1, y) * stride[3];
          for (int64_t x = 0; x < k[2]; ++x, out += kL) {
            const S* tap = row + c.tap_at(2, x) * stride[4];
            for (int l = 0; l < kL; ++l) out[l] = widen(tap[l * stride[0]]);
          }
        }
      }
    }
  }

  // The input rows that output rows n and n + 1 of phase y meet at output n_z of phase z.
  static int64_t list_rows(const Plan& plan, const View& from, const Phase& z, int64_t n_z, const Phase& y, int64_t n,
                           int rows, InputRow* list) {
    const auto& size = plan.c.source();
    const int64_t *k = plan.c.window.taps, apart = y.in_step / y.tap_step;
    InputRow* next = list;
    for (int64_t u = 0; u < z.taps; ++u) {
      const int64_t d = z.in_first + n_z * z.in_step + u * z.tap_step;
      if (d < 0 || d >= size[0]) continue;
      for (int64_t q = 0; q < y.taps + (rows - 1) * apart; ++q) {
        const int64_t h = y.in_first + n * y.in_step + q * y.tap_step;
        const bool first = q < y.taps, second = rows == 2 && q >= apart;
        if (h < 0 || h >= size[1] || !(first || second)) continue;
        auto weight = [&](int64_t v) { return ((z.tap_first + u) * k[1] + y.tap_first + v) * k[2] * kL; };
        *next++ = {first && second ? 1 : first ? 0 : 2, d * from.stride[2] + h * from.stride[3],
                   {weight(q), weight(q - apart)}};
      }
    }
    return next - list;
  }

  // The segments of those rows, in groups of up to kChain taps; returns the number of groups.
  static int64_t list_segments(const InputRow* rows, int64_t row_count, const Phase& x, int64_t x_step, int64_t width,
                               const BlockKernels<S>& kernels, Segment* segment, SegmentGroup* group) {
    const int64_t apart = x.in_step / x.tap_step, unit = kernels.stride == apart ? 1 : apart;
    const int64_t low = ceil_of(-x.in_first, x.tap_step), high = ceil_of(width - x.in_first, x.tap_step);
    const int64_t row_band = max64(1, kChain / max64(x.taps, 1)), tap_band = min64(x.taps, kChain / kernels.taps * kernels.taps);
    const SegmentGroup* begin = group;
    for (int64_t r = 0; r < row_count; r += row_band) {
      for (int64_t t = 0; t < x.taps; t += tap_band, ++group) {
        const int64_t taps = min64(tap_band, x.taps - t), whole = kernels.taps > 1 ? taps / kernels.taps * kernels.taps : 0;
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

  static void launch(const DepthwiseProblem& p, const Runtime& runtime, void* workspace) {
    const Plan plan = plan_of(p);
    Arena arena = arena_at(workspace);
    const T* weights = kTransposed ? nullptr : static_cast<const T*>(p.packed);
    if (!weights) {
      T* packed = take<T>(arena, packed_count(p));
      pack_weights(packed, p);
      weights = packed;
    }
    const bool has_bias = !kTransposed && p.bias.data;
    T* bias = take<T>(arena, p.channels);
    for (int64_t c = 0; c < (has_bias ? p.channels : kL); ++c)
      bias[c] = has_bias ? widen(static_cast<const S*>(p.bias.data)[c * p.bias.stride[0]]) : T(0);

    const View &from = source(p), &to = target(p);
    DirectRow<S> row{};
    row.weights = weights;
    row.weight_block = plan.taps * kL;
    row.bias = bias;
    row.bias_step = has_bias;
    row.channels = p.channels;
    row.activation = kTransposed ? ActivationSpec{Activation::none, 0} : p.activation;
    auto body = [&](int64_t task, int64_t end, int64_t slot) {
      Arena own{arena.next + slot * slot_bytes(plan)};
      InputRow* rows = take<InputRow>(own, plan.rows);
      Segment* segments = take<Segment>(own, plan.segments);
      SegmentGroup* groups = take<SegmentGroup>(own, plan.groups);
      DirectRow<S> mine = row;
      mine.groups = groups;
      mine.total = take<T>(own, kTotals);
      for (; task < end; ++task) {
        int64_t at = task;
        const int64_t n = 2 * (at % plan.pairs), y_phase = (at /= plan.pairs) % plan.c.phases(1);
        const int64_t d = (at /= plan.c.phases(1)) % plan.c.target()[0], image = at / plan.c.target()[0];
        const Phase z = plan.c.phase(0, d % plan.c.phases(0)), y = plan.c.phase(1, y_phase);
        const int row_count = static_cast<int>(min64(2, y.count - n));
        if (row_count <= 0) continue;
        const int64_t inputs = list_rows(plan, from, z, d / z.out_step, y, n, row_count, rows);
        const S* x0 = static_cast<const S*>(from.data) + image * from.stride[0];
        S* y0 = static_cast<S*>(to.data) + image * to.stride[0] + d * to.stride[2] +
                (y.out_first + n * y.out_step) * to.stride[3];
        mine.y_row = y.out_step * to.stride[3];
        for (int64_t i = 0; i < plan.c.phases(2); ++i) {
          const Phase x = plan.c.phase(2, i);
          const int64_t apart = x.in_step / x.tap_step, width = plan.c.source()[2], step = x.tap_step * from.stride[4];
          const BlockKernels<S>& kernels = block_kernels<S>(x.taps, apart);
          mine.group_count = list_segments(rows, inputs, x, step, width, kernels, segments, groups);
          mine.x = x0 + x.in_first * from.stride[4];
          mine.y = y0 + x.out_first * to.stride[4];
          mine.x_pixel = x.in_step * from.stride[4];
          mine.x_step = kernels.stride == apart ? step : mine.x_pixel;
          mine.y_pixel = x.out_step * to.stride[4];
          const int64_t low = ceil_of(-x.in_first, x.tap_step), high = ceil_of(width - x.in_first, x.tap_step);
          kernels.run(mine, row_count, x.count, ceil_of(low, apart), floor_div(high - x.taps, apart) + 1);
        }
      }
    };
    for_slots(runtime, plan.tasks, thread_slots(runtime, plan.tasks, depthwise_flops(p)), body);
  }
};

template <class S>
struct DirectForward : Direct<S, false> {
  // Packed weights; none for layers this kernel does not run.
  static size_t bytes(const DepthwiseProblem& p) {
    return p.channels < kLanes<Compute<S>> ? 0 : sizeof(Compute<S>) * Direct<S, false>::packed_count(p);
  }
  static void pack(const DepthwiseProblem& p, void* out) {
    if (bytes(p) > 0) Direct<S, false>::pack_weights(static_cast<Compute<S>*>(out), p);
  }
};
template <class S>
struct DirectGradInput : Direct<S, true> {};

}  // namespace dsconv::cpu::DSCONV_ISA

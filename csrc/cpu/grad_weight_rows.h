#pragma once

#include "grad_blocks.h"
#include "kernel_of.h"
#include "phases.h"
#include "row_stage.h"
#include "tasks.h"

namespace dsconv::cpu::DSCONV_ISA {

// Weight and bias gradients of a depthwise convolution by rows of columns. A task is a slab of output rows and a chunk of
// channels; the slabs depend on the problem alone and are added in their order.
template <class S>
struct RowsGradWeight {
  using T = Compute<S>;
  static constexpr int kL = kLanes<T>;
  static constexpr int64_t kRunBytes = 256 << 10;  // of a row and the inputs it meets: they are read once per tap group
  static constexpr int64_t kTasks = 16, kChunkBlocks = 8, kMaxChain = 32;

  struct Plan {
    Correlation c;
    int64_t channels, blocks, taps, rows, slabs, chunk, chunks, run;
    RowStage<S> x, grad;
    bool fetches;  // the next rows
  };
  static Plan plan_of(const DepthwiseProblem& p) {
    Plan plan{};
    const Window& w = p.window;
    plan.c = Correlation::of(w, false);
    plan.channels = p.channels * p.multiplier;
    plan.blocks = ceil_div(plan.channels, kL);
    plan.taps = product(w.taps);
    plan.fetches = is_large<S>(p);
    plan.rows = p.batch * w.out[0] * w.out[1];
    plan.x.view = p.x;
    plan.x.map = {plan.channels, 1, p.multiplier};
    plan.x.plane_step = w.dilation[0];
    plan.x.planes = min64(ceil_div(w.in[0], w.dilation[0]), w.taps[0]);
    // Neighbouring rows of outputs meet different rows where there is dilation: the ring keeps those of all, if it can.
    const int64_t reach = min64(w.in[1], (w.taps[1] - 1) * w.dilation[1] + 1);
    const bool keep = reach * w.in[2] * kL * static_cast<int64_t>(sizeof(T)) <= kRunBytes;
    plan.x.row_step = keep ? 1 : w.dilation[1];
    plan.x.rows = keep ? reach : min64(ceil_div(w.in[1], w.dilation[1]), w.taps[1]);
    plan.grad.view = p.grad;
    plan.grad.map = {plan.channels, 1, 1};
    plan.grad.planes = plan.grad.plane_step = plan.grad.rows = plan.grad.row_step = 1;
    plan.x.direct = RowStage<S>::is_direct(p.x, plan.x.map);
    plan.grad.direct = RowStage<S>::is_direct(p.grad, plan.grad.map);
    int64_t column = 0;  // elements per channel in the rings
    if (!plan.x.direct) column += plan.x.planes * plan.x.rows * w.in[2];
    if (!plan.grad.direct) column += w.out[2];
    const int64_t fit = column == 0 ? kChunkBlocks : kRingBytes / (column * kL * static_cast<int64_t>(sizeof(T)));
    const int64_t least = sizeof(S) < sizeof(T) ? 2 : 1;
    plan.chunk = min64(plan.blocks, min64(kChunkBlocks, max64(least, fit))) * kL;
    plan.chunks = ceil_div(plan.blocks * kL, plan.chunk);
    // Enough tasks for many threads, each worth one; chunks of channels first, because slabs must be added.
    const int64_t wanted = ceil_div(min64(kTasks, depthwise_flops(p) / kTaskFlops), plan.chunks);
    // And no long chain of row sums, which would lose the accuracy of the sums within the rows.
    const int64_t chains = min64(kTasks, ceil_div(plan.rows, kMaxChain));
    plan.slabs = max64(1, min64(plan.rows, max64(wanted, chains)));
    plan.x.lanes = plan.grad.lanes = plan.chunk;
    const int64_t pixel_bytes = plan.chunk * static_cast<int64_t>(sizeof(T)) * (1 + w.taps[0] * w.taps[1]);
    plan.run = min64(kChain, max64(14, kRunBytes / pixel_bytes / 14 * 14));
    return plan;
  }
  static int64_t slab_sums(const Plan& plan) { return plan.blocks * (plan.taps + 1) * kL; }
  static size_t workspace_bytes(const DepthwiseProblem& p, int threads) {
    Plan plan = plan_of(p);
    return kBlockBytes + piece_bytes<T>(plan.slabs * slab_sums(plan)) + threads * slot_bytes(plan);
  }
  static int64_t slot_bytes(Plan& plan) {
    plan.x.size = plan.c.window.in;
    plan.grad.size = plan.c.window.out;
    return piece_bytes<TapRun>(plan.taps) + piece_bytes<int64_t>(plan.taps) + plan.x.scratch() + plan.grad.scratch();
  }

  static void launch(const DepthwiseProblem& p, const Runtime& runtime, void* workspace) {
    Plan plan = plan_of(p);
    const int64_t own_bytes = slot_bytes(plan);
    Arena arena = arena_at(workspace);
    T* partial = take<T>(arena, plan.slabs * slab_sums(plan));
    auto body = [&](int64_t task, int64_t end, int64_t slot) {
      Arena own{arena.next + slot * own_bytes};
      TapRun* runs = take<TapRun>(own, plan.taps);
      int64_t* ahead = take<int64_t>(own, plan.taps);
      RowStage<S> x = plan.x, grad = plan.grad;
      x.take_scratch(own);
      grad.take_scratch(own);
      for (; task < end; ++task) {
        const int64_t slab = task / plan.chunks, chunk = task % plan.chunks;
        GradRow<T> row{};
        row.channels = plan.channels;
        row.first = chunk * plan.chunk;
        row.last = min64(row.first + plan.chunk, plan.channels);
        row.taps = plan.taps;
        row.sums = partial + slab * slab_sums(plan);
        memset(row.sums + row.first * (plan.taps + 1), 0,
               ceil_div(row.last - row.first, kL) * kL * (plan.taps + 1) * sizeof(T));
        for (int64_t r = plan.rows * slab / plan.slabs; r < plan.rows * (slab + 1) / plan.slabs; ++r)
          add_row(p, plan, row, x, grad, r, runs, ahead);
      }
    };
    const int64_t tasks = plan.slabs * plan.chunks;
    for_slots(runtime, tasks, thread_slots(runtime, tasks, depthwise_flops(p)), body);
    finish(p, plan, partial);
  }

  // The runs of `length` taps that lie in taps [first, last) of phase x, in every row of taps that meets output row (d, h).
  static int64_t list_runs(const Window& w, RowStage<S>& in, int64_t d, int64_t h, const Phase& x, int64_t first,
                           int64_t last, int64_t length, int64_t unit, TapRun* runs) {
    const int64_t low = ceil_of(-x.in_first, x.tap_step), high = ceil_of(w.in[2] - x.in_first, x.tap_step);
    const int64_t step = x.tap_step * in.column();
    int64_t count = 0;
    for (int64_t u = 0; u < w.taps[0]; ++u) {
      const int64_t z = d * w.stride[0] - w.pad[0] + u * w.dilation[0];
      if (z < 0 || z >= w.in[0]) continue;
      for (int64_t v = 0; v < w.taps[1]; ++v) {
        const int64_t y = h * w.stride[1] - w.pad[1] + v * w.dilation[1];
        if (y < 0 || y >= w.in[1]) continue;
        const int64_t offset = in.row(0, z, y) + x.in_first * in.column();
        for (int64_t t = first; t < last; t += length) {
          runs[count++] = {offset + t * step, (u * w.taps[1] + v) * w.taps[2] + t, ceil_of(low - t, unit),
                           ceil_of(high - t, unit)};
        }
      }
    }
    return count;
  }

  // The rows of the input that output row (d, h) meets and the ones before it have not.
  static int64_t list_ahead(const Window& w, RowStage<S>& in, int64_t d, int64_t h, int64_t* list) {
    int64_t count = 0;
    for (int64_t u = 0; u < w.taps[0]; ++u) {
      const int64_t z = d * w.stride[0] - w.pad[0] + u * w.dilation[0];
      if (z < 0 || z >= w.in[0]) continue;
      for (int64_t v = max64(0, w.taps[1] - max64(1, w.stride[1] / w.dilation[1])); v < w.taps[1]; ++v) {
        const int64_t y = h * w.stride[1] - w.pad[1] + v * w.dilation[1];
        if (y >= 0 && y < w.in[1]) list[count++] = in.row(0, z, y);
      }
    }
    return count;
  }

  // One row of outputs: all phases and taps.
  static void add_row(const DepthwiseProblem& p, const Plan& plan, GradRow<T>& row, RowStage<S>& in, RowStage<S>& grad,
                      int64_t r, TapRun* runs, int64_t* ahead) {
    const Window& w = p.window;
    const int64_t h = r % w.out[1], d = r / w.out[1] % w.out[0], image = r / w.out[1] / w.out[0];
    const int64_t base = block_channel<T>(row.first, plan.channels);
    in.begin(image, base);
    grad.begin(image, base);
    row.x = static_cast<const T*>(in.at(0));
    const T* gradients = static_cast<const T*>(grad.at(grad.row(0, d, h)));
    const bool more = plan.fetches && h + 1 < w.out[1];
    const int64_t ahead_count = more && in.direct ? list_ahead(w, in, d, h + 1, ahead) : 0;
    row.ahead = ahead;
    for (int64_t i = 0; i < plan.c.phases(2); ++i) {
      const Phase x = plan.c.phase(2, i);
      if (x.count == 0) break;
      const int64_t apart = x.apart;
      const GradKernels<T>&kernels = grad_kernels<T>(x.taps, apart), &singles = grad_kernels<T>(1, 1);
      row.grad = gradients + x.out_first * grad.column();
      row.g_pixel = x.out_step * grad.column();
      row.x_pixel = x.in_step * in.column();
      const int64_t low = ceil_of(-x.in_first, x.tap_step), high = ceil_of(w.in[2] - x.in_first, x.tap_step);
      const int64_t inner_first = ceil_of(low, apart), inner_last = floor_of(high - x.taps, apart) + 1;
      const int64_t whole = kernels.taps > 1 ? x.taps / kernels.taps * kernels.taps : 0;
      for (int64_t n = 0; n < x.count; n += plan.run) {
        const int64_t end = min64(n + plan.run, x.count);
        row.bias = p.grad_bias.data != nullptr;
        row.ahead_count = ahead_count;
        row.g_ahead = more && grad.direct ? p.grad.stride[3] : 0;
        auto run = [&](const GradKernels<T>& k, int64_t count) {
          for (int64_t done = 0; done < count;) {
            const int64_t size = ceil_div(count - done, ceil_div(count - done, kMaxRuns));
            row.runs = runs + done;
            k.block[size - 1](row, n, end, inner_first, inner_last);
            row.bias = false;
            row.ahead_count = row.g_ahead = 0;
            done += size;
          }
        };
        row.x_step = x.tap_step * in.column();
        if (whole > 0) run(kernels, list_runs(w, in, d, h, x, 0, whole, kernels.taps, 1, runs));
        row.x_step = row.x_pixel;
        if (whole < x.taps) run(singles, list_runs(w, in, d, h, x, whole, x.taps, 1, apart, runs));
        if (row.bias) sum_gradient(row, n, end);
      }
    }
  }

  // The bias alone, where no tap meets the row.
  static void sum_gradient(const GradRow<T>& row, int64_t pixel, int64_t last_pixel) {
    T* sums = row.sums + row.first * (row.taps + 1) + row.taps * kL;
    for (int64_t next = row.first; next < row.last; next += kL, sums += (row.taps + 1) * kL) {
      const T* grad = row.grad + block_channel<T>(next, row.channels);
      Vec<T> sum = splat(T(0));
      for (int64_t n = pixel; n < last_pixel; ++n) sum += load(grad + n * row.g_pixel);
      store(sums, load(sums) + sum);
    }
  }

  // Adds the slabs in their order and writes the gradients.
  static void finish(const DepthwiseProblem& p, const Plan& plan, const T* partial) {
    for (int64_t block = 0; block < plan.blocks; ++block) {
      const int64_t c = block_channel<T>(block * kL, plan.channels), lanes = min64(kL, plan.channels);
      auto total = [&](int64_t t) {
        const T* sums = partial + (block * (plan.taps + 1) + t) * kL;
        Vec<T> sum = load(sums);
        for (int64_t slab = 1; slab < plan.slabs; ++slab) sum += load(sums + slab * slab_sums(plan));
        return sum;
      };
      S* filters = static_cast<S*>(p.grad_weight.data) + c * p.grad_weight.stride[0];
      for (int64_t t = 0; t < plan.taps && p.grad_weight.data; t += kL) {
        const int64_t count = min64(kL, plan.taps - t);
        Vec<T> rows[kL];
        for (int64_t i = 0; i < kL; ++i) rows[i] = i < count ? total(t + i) : splat(T(0));
        store_taps<S>(filters, rows, p.grad_weight, p.window, lanes, t, count);
      }
      if (p.grad_bias.data) {
        T values[kL];
        store(values, total(plan.taps));
        S* bias = static_cast<S*>(p.grad_bias.data) + c * p.grad_bias.stride[0];
        for (int64_t l = 0; l < lanes; ++l) narrow(values[l], bias + l * p.grad_bias.stride[0]);
      }
    }
  }
};

}  // namespace dsconv::cpu::DSCONV_ISA

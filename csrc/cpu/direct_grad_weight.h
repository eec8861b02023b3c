// Weight and bias gradients of a depthwise convolution straight on channels_last memory.
//
// A block kernel walks along a run of neighbouring outputs of one row, one vector of channels at a time: a few gradients
// are held in registers, every input is loaded once and multiplied into the accumulators of all taps that pair it with
// one of them. The sums of a run go to memory, and so a chain of additions stays short; those of a slab of rows are added
// in the order of the slabs, which depend on the problem alone.
#pragma once

#include "kernel_of.h"
#include "phases.h"
#include "tasks.h"
#include "unroll.h"

namespace dsconv::cpu::DSCONV_ISA {

// Neighbouring taps that pair one row of the input with the row of gradients.
struct TapRun {
  int64_t x;          // offset of the input that output 0 pairs with the first of them
  int64_t tap;        // its index
  int64_t low, high;  // the columns inside the tensor, counted from the column that output 0 reads first
};

template <class S>
struct GradRow {
  using T = Compute<S>;
  const S *x, *grad;                // channel 0 of row 0 of the image; of output 0
  int64_t x_step, x_pixel, g_pixel;  // elements between columns, between outputs in the input and in the gradient
  int64_t first, last, channels;     // channels [first, last) of `channels`; `first` begins a block
  T* sums;                           // [block][tap, then the bias][lane]; the last block ends with the last channel
  int64_t taps;
  const TapRun* runs;
  bool bias;  // also sum the gradient itself
};

// kPixels outputs from output `pixel` on. `inside` has a bit for every column that lies in the tensor.
template <class S, int kTaps, int kStride, int kRuns, int kPixels, bool kEdge, class T = Compute<S>>
DSCONV_INLINE void accumulate_pixels(const GradRow<S>& row, const S* x, const S* grad, int64_t pixel, Vec<T>* sum,
                                     Vec<T>& bias) {
  constexpr int kColumns = (kPixels - 1) * kStride + kTaps;
  Vec<T> g[kPixels];
  unroll<kPixels>([&]<int p>() __attribute__((always_inline)) {
    g[p] = load_wide<S>(grad + (pixel + p) * row.g_pixel);
    keep(g[p]);
  });
  if (row.bias) unroll<kPixels>([&]<int p>() __attribute__((always_inline)) { bias += g[p]; });
  unroll<kRuns>([&]<int r>() __attribute__((always_inline)) {
    const TapRun& run = row.runs[r];
    const S* column = x + run.x + pixel * row.x_pixel;
    uint64_t inside = 0;
    if constexpr (kEdge) {
      const int64_t low = max64(run.low - pixel * kStride, 0), high = min64(run.high - pixel * kStride, kColumns);
      inside = high <= low ? 0 : ((uint64_t{1} << high) - 1) & ~((uint64_t{1} << low) - 1);
    }
    unroll<kColumns>([&]<int c>() __attribute__((always_inline)) {
      if (kEdge && !(inside & (uint64_t{1} << c))) return;
      Vec<T> value = load_wide<S>(column + c * row.x_step);
      keep(value);
      unroll<kTaps>([&]<int t>() __attribute__((always_inline)) {
        constexpr int offset = c - t, p = offset / kStride;
        if constexpr (offset >= 0 && offset % kStride == 0 && p < kPixels) sum[r * kTaps + t] += value * g[p];
      });
    });
  });
}

// The sums of kRuns runs of kTaps taps over outputs [pixel, last_pixel), of which [inner_first, inner_last) pair with no
// padding.
template <class S, int kTaps, int kStride, int kRuns>
static void grad_block(const GradRow<S>& row, int64_t pixel, int64_t last_pixel, int64_t inner_first,
                       int64_t inner_last) {
  using T = Compute<S>;
  constexpr int kL = kLanes<T>, kWide = DSCONV_VECTOR_BYTES == 64 ? 7 : 4, kNarrow = 3;
  T* sums = row.sums + row.first / kL * (row.taps + 1) * kL;
  for (int64_t next = row.first; next < row.last; next += kL, sums += (row.taps + 1) * kL) {
    const int64_t c = min64(next, row.channels - kL);
    const S *x = row.x + c, *grad = row.grad + c;
    Vec<T> sum[kRuns * kTaps], bias = splat(T(0));
    unroll<kRuns * kTaps>([&]<int i>() __attribute__((always_inline)) { sum[i] = splat(T(0)); });
    for (int64_t p = pixel; p < last_pixel;) {
      const int64_t left = last_pixel - p;
      if (left >= kWide && p >= inner_first && p + kWide <= inner_last) {
        accumulate_pixels<S, kTaps, kStride, kRuns, kWide, false>(row, x, grad, p, sum, bias);
        p += kWide;
      } else if (left >= kWide) {
        accumulate_pixels<S, kTaps, kStride, kRuns, kWide, true>(row, x, grad, p, sum, bias);
        p += kWide;
      } else if (left >= kNarrow) {
        accumulate_pixels<S, kTaps, kStride, kRuns, kNarrow, true>(row, x, grad, p, sum, bias);
        p += kNarrow;
      } else {
        accumulate_pixels<S, kTaps, kStride, kRuns, 1, true>(row, x, grad, p, sum, bias);
        ++p;
      }
    }
    unroll<kRuns * kTaps>([&]<int i>() __attribute__((always_inline)) {
      T* total = sums + (row.runs[i / kTaps].tap + i % kTaps) * kL;
      store(total, load(total) + sum[i]);
    });
    if (row.bias) store(sums + row.taps * kL, load(sums + row.taps * kL) + bias);
  }
}

// The block kernels of one number of taps and one stride, by the number of runs.
constexpr int kMaxRuns = 3;
template <class S>
struct GradKernels {
  using Block = void (*)(const GradRow<S>&, int64_t, int64_t, int64_t, int64_t);
  int taps, stride;
  Block block[kMaxRuns];

  template <int kTaps, int kStride>
  static constexpr GradKernels make() {
    return {kTaps,
            kStride,
            {grad_block<S, kTaps, kStride, 1>, grad_block<S, kTaps, kStride, 2>, grad_block<S, kTaps, kStride, 3>}};
  }
};

// Those whose taps divide a row of `taps` with the fewest left over. Defined in block_kernels.inc.
template <class S>
const GradKernels<S>& grad_kernels(int64_t taps, int64_t stride);

template <class S>
struct DirectGradWeight {
  using T = Compute<S>;
  static constexpr int kL = kLanes<T>;
  static constexpr int64_t kRunBytes = 256 << 10;  // of a row and the inputs it meets: they are read once per tap group
  static constexpr int64_t kSlabFlops = 4 << 20, kMaxSlabs = 16, kChunkBlocks = 8;

  static const char* can_run(const DepthwiseProblem& p) {
    if (p.multiplier != 1) return "a depth multiplier above 1";
    if (p.channels < kL) return "fewer channels than a vector holds";
    if (p.x.stride[1] != 1 || p.grad.stride[1] != 1) return "not channels_last";
    return nullptr;
  }

  // A task is a slab of output rows and a chunk of channels.
  struct Plan {
    Correlation c;
    int64_t blocks, taps, rows, slabs, chunks, run;
  };
  static Plan plan_of(const DepthwiseProblem& p) {
    Plan plan{{p.window, false}, ceil_div(p.channels, kL), product(p.window.taps), 0, 0, 0, 0};
    plan.rows = p.batch * p.window.out[0] * p.window.out[1];
    plan.slabs = max64(1, min64(min64(kMaxSlabs, plan.rows), depthwise_flops(p) / kSlabFlops));
    plan.chunks = ceil_div(plan.blocks, kChunkBlocks);
    const int64_t pixel_bytes = p.channels * static_cast<int64_t>(sizeof(S)) * (1 + p.window.taps[0] * p.window.taps[1]);
    plan.run = min64(kChain, max64(14, kRunBytes / pixel_bytes / 14 * 14));
    return plan;
  }
  static int64_t slab_sums(const Plan& plan) { return plan.blocks * (plan.taps + 1) * kL; }
  static size_t workspace_bytes(const DepthwiseProblem& p, int threads) {
    const Plan plan = plan_of(p);
    return kBlockBytes + plan.slabs * piece_bytes<T>(slab_sums(plan)) + threads * piece_bytes<TapRun>(plan.taps);
  }

  static void launch(const DepthwiseProblem& p, const Runtime& runtime, void* workspace) {
    const Plan plan = plan_of(p);
    Arena arena = arena_at(workspace);
    T* partial = take<T>(arena, plan.slabs * slab_sums(plan));
    auto body = [&](int64_t task, int64_t end, int64_t slot) {
      TapRun* runs = reinterpret_cast<TapRun*>(arena.next + slot * piece_bytes<TapRun>(plan.taps));
      for (; task < end; ++task) {
        const int64_t slab = task / plan.chunks, chunk = task % plan.chunks;
        GradRow<S> row{};
        row.channels = p.channels;
        row.first = plan.blocks * chunk / plan.chunks * kL;
        row.last = min64(plan.blocks * (chunk + 1) / plan.chunks * kL, p.channels);
        row.taps = plan.taps;
        row.sums = partial + slab * slab_sums(plan);
        memset(row.sums + row.first * (plan.taps + 1), 0,
               ceil_div(row.last - row.first, kL) * kL * (plan.taps + 1) * sizeof(T));
        for (int64_t r = plan.rows * slab / plan.slabs; r < plan.rows * (slab + 1) / plan.slabs; ++r)
          add_row(p, plan, row, r, runs);
      }
    };
    const int64_t tasks = plan.slabs * plan.chunks;
    for_slots(runtime, tasks, thread_slots(runtime, tasks, depthwise_flops(p)), body);
    finish(p, plan, partial);
  }

  // One row of outputs, all phases and taps.
  static void add_row(const DepthwiseProblem& p, const Plan& plan, GradRow<S>& row, int64_t r, TapRun* runs) {
    const Window& w = p.window;
    const int64_t h = r % w.out[1], d = r / w.out[1] % w.out[0], image = r / w.out[1] / w.out[0];
    row.x = static_cast<const S*>(p.x.data) + image * p.x.stride[0];
    const S* grad = static_cast<const S*>(p.grad.data) + image * p.grad.stride[0] + d * p.grad.stride[2] +
                    h * p.grad.stride[3];
    for (int64_t i = 0; i < plan.c.phases(2); ++i) {
      const Phase x = plan.c.phase(2, i);
      if (x.count == 0) break;
      const int64_t apart = x.in_step / x.tap_step, step = x.tap_step * p.x.stride[4];
      const GradKernels<S>&kernels = grad_kernels<S>(x.taps, apart), &singles = grad_kernels<S>(1, 1);
      row.grad = grad + x.out_first * p.grad.stride[4];
      row.g_pixel = x.out_step * p.grad.stride[4];
      row.x_pixel = x.in_step * p.x.stride[4];
      const int64_t low = ceil_of(-x.in_first, x.tap_step), high = ceil_of(w.in[2] - x.in_first, x.tap_step);
      const int64_t inner_first = ceil_of(low, apart), inner_last = floor_div(high - x.taps, apart) + 1;
      // The runs of `taps` taps from tap `first` on, in every row of taps.
      auto list = [&](int64_t first, int64_t last, int64_t taps, int64_t unit) {
        int64_t count = 0;
        for (int64_t u = 0; u < w.taps[0]; ++u) {
          const int64_t z = d * w.stride[0] - w.pad[0] + u * w.dilation[0];
          if (z < 0 || z >= w.in[0]) continue;
          for (int64_t v = 0; v < w.taps[1]; ++v) {
            const int64_t y = h * w.stride[1] - w.pad[1] + v * w.dilation[1];
            if (y < 0 || y >= w.in[1]) continue;
            for (int64_t t = first; t < last; t += taps) {
              runs[count++] = {z * p.x.stride[2] + y * p.x.stride[3] + x.in_first * p.x.stride[4] + t * step,
                               (u * w.taps[1] + v) * w.taps[2] + t, ceil_of(low - t, unit), ceil_of(high - t, unit)};
            }
          }
        }
        return count;
      };
      const int64_t whole = kernels.taps > 1 ? x.taps / kernels.taps * kernels.taps : 0;
      bool bias = p.grad_bias.data != nullptr;
      for (int64_t n = 0; n < x.count; n += plan.run) {
        auto run = [&](const GradKernels<S>& k, int64_t count) {
          for (int64_t done = 0; done < count;) {
            const int64_t left = ceil_div(count - done, kMaxRuns), size = ceil_div(count - done, left);
            row.runs = runs + done;
            row.bias = bias;
            k.block[size - 1](row, n, min64(n + plan.run, x.count), inner_first, inner_last);
            bias = false;
            done += size;
          }
        };
        bias = p.grad_bias.data != nullptr;
        row.x_step = step;
        if (whole > 0) run(kernels, list(0, whole, kernels.taps, 1));
        row.x_step = row.x_pixel;
        if (whole < x.taps) run(singles, list(whole, x.taps, 1, apart));
        if (bias) sum_gradient(row, n, min64(n + plan.run, x.count));
      }
    }
  }

  // The bias alone, where no tap meets the row.
  static void sum_gradient(const GradRow<S>& row, int64_t pixel, int64_t last_pixel) {
    T* sums = row.sums + row.first * (row.taps + 1) + row.taps * kL;
    for (int64_t next = row.first; next < row.last; next += kL, sums += (row.taps + 1) * kL) {
      const S* grad = row.grad + min64(next, row.channels - kL);
      Vec<T> sum = splat(T(0));
      for (int64_t n = pixel; n < last_pixel; ++n) sum += load_wide<S>(grad + n * row.g_pixel);
      store(sums, load(sums) + sum);
    }
  }

  // Adds the slabs in their order and writes the gradients.
  static void finish(const DepthwiseProblem& p, const Plan& plan, const T* partial) {
    const int64_t* k = p.window.taps;
    for (int64_t block = 0; block < plan.blocks; ++block) {
      const int64_t c = min64(block * kL, p.channels - kL);
      for (int64_t t = 0; t <= plan.taps; ++t) {
        const T* sums = partial + (block * (plan.taps + 1) + t) * kL;
        Vec<T> total = load(sums);
        for (int64_t slab = 1; slab < plan.slabs; ++slab) total += load(sums + slab * slab_sums(plan));
        const bool is_bias = t == plan.taps;
        const View& view = is_bias ? p.grad_bias : p.grad_weight;
        if (!view.data) continue;
        const int64_t *s = view.stride, at = is_bias ? 0 : t / k[2] / k[1] * s[2] + t / k[2] % k[1] * s[3] + t % k[2] * s[4];
        T lanes[kL];
        store(lanes, total);
        S* out = static_cast<S*>(view.data) + c * s[0] + at;
        for (int l = 0; l < kL; ++l) narrow(lanes[l], out + l * s[0]);
      }
    }
  }
};

}  // namespace dsconv::cpu::DSCONV_ISA

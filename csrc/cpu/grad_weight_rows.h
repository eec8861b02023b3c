#pragma once

#include "grad_blocks.h"
#include "grad_strips.h"
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
  static constexpr int64_t kBytes = sizeof(S);
  static constexpr int64_t kTasks = 16, kMaxChain = 32, kFewTaps = 9;
  static constexpr int64_t kSumBytes = 16 << 10, kManySumBytes = 64 << 10;  // of the sums of a chunk

  struct Plan {
    Correlation c;
    int64_t channels, blocks, taps, rows, slabs, chunk, chunks;
    int64_t run, group;  // outputs of a row, or rows, that add up in registers
    RowStage<S> x, grad;
    bool fetches;                       // what steps will read
    const GradStripKernels<T>* strips;  // null, or what adds several rows of a phase at once
    int64_t strip_rows;                 // at most
  };
  static Plan plan_of(const DepthwiseProblem& p) {
    Plan plan{};
    const Window& w = p.window;
    plan.c = Correlation::of(w, false);
    plan.channels = p.channels * p.multiplier;
    plan.blocks = ceil_div(plan.channels, kL);
    plan.taps = product(w.taps);
    plan.fetches = is_large<S>(p, kFetchedBytes);
    plan.rows = p.batch * w.out[0] * w.out[1];
    plan.x.view = p.x;
    plan.x.map = {plan.channels, 1, p.multiplier};
    plan.x.plane_step = w.dilation[0];
    plan.x.planes = min64(ceil_div(w.in[0], w.dilation[0]), w.taps[0]);
    plan.grad.view = p.grad;
    plan.grad.map = {plan.channels, 1, 1};
    plan.grad.planes = plan.grad.plane_step = plan.grad.row_step = 1;
    // Rows that crowd the cache are copied where several rows of outputs meet them.
    const int64_t apart = plan.fetches ? kPage : kHalfPage;
    const bool crowded = kHasLines<S> && w.stride[1] == 1 && w.taps[1] > 1 &&
                         (is_crowded<S>(p.x, apart) || is_crowded<S>(p.grad, apart));
    const bool plain_x = RowStage<S>::is_plain(p.x, plan.x.map),
               plain_grad = RowStage<S>::is_plain(p.grad, plan.grad.map);
    const bool alike = sizeof(S) == sizeof(T);  // else the kernels read both where they lie, or neither
    const bool direct_x = plain_x && (alike || (kWidens<S> && plain_grad));
    const bool direct_grad = plain_grad && (alike || (kWidens<S> && plain_x));
    plan.x.direct = direct_x && !crowded;
    plan.grad.direct = direct_grad && !crowded;
    int64_t column = plan_rings(plan), ring = crowded ? kCrowdedRingBytes : kRingBytes;
    if (crowded && column * kBlockBytes > ring) {  // the copies would crowd the cache too
      plan.x.direct = direct_x;
      plan.grad.direct = direct_grad;
      column = plan_rings(plan);
      ring = kRingBytes;
    }
    plan.strips = strips_of(plan);
    // What a phase reads of a row lies far apart. Tensors that are fetched for it are read row by row, all phases after each
    // other, and where caches do not keep rows until the next tap row meets them, by long pieces of columns.
    int64_t sum_bytes = kSumBytes;
    if (plan.fetches && !plan.strips && column == 0 && plan.c.phases(2) > 1) {
      plan.group = 1;
      const int64_t channels = min64(plan.blocks, most_blocks(plan, kSumBytes)) * kL;
      const int64_t reach = ((w.taps[1] - 1) * w.dilation[1] + 1) * w.in[2] * channels * kBytes;
      if (reach > kRunBytes * 3 / 2) sum_bytes = kManySumBytes;
    }
    const int64_t block = kL * static_cast<int64_t>(sizeof(T)), most = most_blocks(plan, sum_bytes);
    const int64_t fit = column == 0 ? most : min64(most, ring / (column * block));
    const int64_t least = sizeof(S) < sizeof(T) ? 2 : 1;
    plan.chunks = ceil_div(plan.blocks, min64(plan.blocks, max64(least, fit)));
    plan.chunk = min64(plan.blocks, round_up(ceil_div(plan.blocks, plan.chunks), least)) * kL;
    plan.chunks = ceil_div(plan.blocks * kL, plan.chunk);
    // Enough tasks for many threads, each worth one; chunks of channels first, because slabs must be added.
    const int64_t wanted = ceil_div(wanted_tasks(depthwise_flops(p), kTasks), plan.chunks);
    // And no long chain of row sums, which would lose the accuracy of the sums within the rows.
    const int64_t chains = min64(kTasks, ceil_div(plan.rows, kMaxChain));
    plan.slabs = max64(1, min64(plan.rows, max64(wanted, chains)));
    plan.x.lanes = plan.grad.lanes = plan.chunk;
    if (plan.strips) {
      plan.fetches = is_large<S>(p, kNearBytes);
      plan.strip_rows = strip_rows(plan);
    }
    const int64_t pixel_bytes = plan.chunk * static_cast<int64_t>(sizeof(T)) * (1 + w.taps[0] * w.taps[1]);
    plan.run = min64(kChain, max64(14, kRunBytes / pixel_bytes / 14 * 14));
    // Rows of few taps that meet no other row, of columns that crowd the cache: so few that a line stays for its second vector.
    const bool alone = w.taps[0] == 1 && w.taps[1] == 1 && w.taps[2] <= kFewTaps;
    if (kHasLines<S> && alone && plan.x.direct && plan.grad.direct && is_crowded<S>(p.x))
      plan.run = kGradWide + kGradNarrow;
    return plan;
  }
  // Whose sums have so many bytes.
  static int64_t most_blocks(const Plan& plan, int64_t sum_bytes) {
    return max64(8, sum_bytes / ((plan.taps + 1) * kL * static_cast<int64_t>(sizeof(T))));
  }
  // Strips want 3x3 windows in tensors that they read where those lie.
  static const GradStripKernels<T>* strips_of(const Plan& plan) {
    if constexpr (!kWidens<S>) return nullptr;
    const Window& w = plan.c.window;
    const int64_t apart = plan.c.phase(1, 0).apart;
    if (!plan.x.direct || !plan.grad.direct || w.taps[0] > 1 || w.taps[1] != w.taps[2]) return nullptr;
    const GradStripKernels<T>* kernels = grad_strip_kernels<S>(w.taps[1], apart);
    return kernels && plan.c.has_narrow_borders(apart) ? kernels : nullptr;
  }
  // As many as a chain of additions may have terms. But few where what is fetched of each row is a long piece, after which
  // the next one follows: the processor's own prefetchers go on from there, along few rows. And where columns share sets of
  // a cache: what they read brings its neighbours with it, which the next vector of channels should find there.
  static int64_t strip_rows(const Plan& plan) {
    constexpr int64_t kFew = 3, kSome = 6, kLeast = 4096 / kBytes, kMost = 5 << 10;  // the latter in bytes
    constexpr int64_t kPart = 512, kPages = 8192;
    const int64_t column = plan.c.phase(2, 0).tap_step * plan.x.view.stride[4] * kBytes;
    const bool near = sizeof(S) < sizeof(T) || !plan.fetches;
    if (plan.strips->stride > 1 && column % kPart == 0 && near) return kFew;
    const int64_t columns = plan.c.phase(2, 0).count, strip = ceil_div(columns, GradStripKernels<T>::count(columns));
    const int64_t piece = strip * plan.channels * kBytes;
    const bool follow = plan.c.phases(2) == 1 && plan.strips->stride == 1 && plan.chunks == 1 && columns >= 6 * strip;
    const bool few = plan.fetches && follow && piece >= kLeast && piece <= kMost;
    return few ? kFew : column % kPages == 0 ? kSome : kChain / strip;
  }
  // How many rows the rings keep; returns their elements per channel. Neighbouring rows of outputs meet different rows where
  // there is dilation: the ring keeps those of all, if it can.
  static int64_t plan_rings(Plan& plan) {
    const Window& w = plan.c.window;
    plan.group = min64(w.out[1], max64(1, kChain / ceil_div(w.out[2], plan.c.phases(2))));
    const auto reach = [&] {
      return min64(w.in[1], (w.taps[1] - 1) * w.dilation[1] + (plan.group - 1) * w.stride[1] + 1);
    };
    const auto keep = [&] { return reach() * w.in[2] * kL * static_cast<int64_t>(sizeof(T)) <= kRunBytes; };
    if (!plan.x.direct && !keep()) plan.group = 1;
    plan.x.row_step = keep() ? 1 : w.dilation[1];
    plan.x.rows = keep() ? reach() : min64(ceil_div(w.in[1], w.dilation[1]), w.taps[1]);
    plan.grad.rows = plan.group;
    plan.x.size = w.in;
    plan.grad.size = w.out;
    if (plan.x.has_small_planes()) {
      plan.x.row_step = 1;
      plan.x.rows = w.in[1];
    }
    if (plan.grad.has_small_planes()) plan.grad.rows = w.out[1];
    return (plan.x.direct ? 0 : plan.x.planes * plan.x.rows * w.in[2]) +
           (plan.grad.direct ? 0 : plan.grad.rows * w.out[2]);
  }
  static int64_t slab_sums(const Plan& plan) { return plan.blocks * (plan.taps + 1) * kL; }
  static double part(const DepthwiseProblem& p) {
    constexpr double kTurn = kVectorBytes == 64 ? 9 : 5.5;
    return part_of_turning<T>(p.x.stride[1] != 1, p.grad.stride[1] != 1, p.window, kTurn);
  }
  static size_t workspace_bytes(const DepthwiseProblem& problem, int threads) {
    const DepthwiseProblem p = along_rows(problem, problem.x, problem.grad);
    Plan plan = plan_of(p);
    return kBlockBytes + piece_bytes<T>(plan.slabs * slab_sums(plan)) + threads * slot_bytes(plan);
  }
  static int64_t slot_bytes(Plan& plan) {
    plan.x.size = plan.c.window.in;
    plan.grad.size = plan.c.window.out;
    return piece_bytes<TapRun>(plan.taps) + piece_bytes<GradStep>(kChain) + plan.x.scratch() + plan.grad.scratch();
  }

  static void launch(const DepthwiseProblem& problem, const Runtime& runtime, void* workspace) {
    const DepthwiseProblem p = along_rows(problem, problem.x, problem.grad);
    Plan plan = plan_of(p);
    const int64_t own_bytes = slot_bytes(plan);
    Arena arena = arena_at(workspace);
    T* partial = take<T>(arena, plan.slabs * slab_sums(plan));
    auto body = [&](int64_t task, int64_t end, int64_t slot) {
      Arena own{arena.next + slot * own_bytes};
      Worker worker(p, plan, own);
      for (; task < end; ++task) {
        const int64_t slab = task / plan.chunks, height = plan.c.window.out[1];
        worker.begin(task % plan.chunks, partial + slab * slab_sums(plan));
        const int64_t last = plan.rows * (slab + 1) / plan.slabs;
        for (int64_t r = plan.rows * slab / plan.slabs, count; r < last; r += count) {
          if (plan.strips) {
            count = worker.add_strips(r, last - r);
            continue;
          }
          count = min64(plan.group, min64(last - r, height - r % height));
          worker.add_rows(r, count);
        }
      }
    };
    const int64_t tasks = plan.slabs * plan.chunks;
    for_slots(runtime, tasks, thread_slots(runtime.threads, tasks, depthwise_flops(p)), body);
    finish(p, plan, partial);
  }

  // Neighbouring taps from tap t on of row v in plane u.
  struct TapRun {
    int64_t u, v, t;
  };

  // One thread's lists and rings, and the rows it adds with them.
  struct Worker {
    const Plan& plan;
    const Window& w;
    GradRow<T> row{};
    RowStage<S> x, grad;
    TapRun* runs;
    GradStep* steps;
    bool has_bias;

    Worker(const DepthwiseProblem& p, const Plan& plan, Arena& own)
        : plan(plan), w(p.window), x(plan.x), grad(plan.grad), has_bias(p.grad_bias.data != nullptr) {
      runs = take<TapRun>(own, plan.taps);
      steps = take<GradStep>(own, kChain);
      x.take_scratch(own);
      grad.take_scratch(own);
      row.channels = plan.channels;
      row.taps = plan.taps;
      row.steps = steps;
    }

    void begin(int64_t chunk, T* sums) {
      row.first = chunk * plan.chunk;
      row.last = min64(row.first + plan.chunk, plan.channels);
      row.sums = sums;
      memset(sums + row.first * (plan.taps + 1), 0,
             ceil_div(row.last - row.first, kL) * kL * (plan.taps + 1) * sizeof(T));
    }

    // The row of the input that output row h of plane d meets with tap row v of plane u; false if it lies outside.
    bool meets(int64_t d, int64_t h, int64_t u, int64_t v, int64_t& z, int64_t& y) const {
      z = d * w.stride[0] - w.pad[0] + u * w.dilation[0];
      y = h * w.stride[1] - w.pad[1] + v * w.dilation[1];
      return z >= 0 && z < w.in[0] && y >= 0 && y < w.in[1];
    }

    const GradKernels<T>& kernels_for(int64_t taps, int64_t stride) const {
      if constexpr (kWidens<S>) {
        if (x.direct) return grad_kernels<S>(taps, stride);
      }
      return grad_kernels<T>(taps, stride);
    }

    // Adds `count` rows of outputs, of one plane, from row r on: all phases and taps.
    void add_rows(int64_t r, int64_t count) {
      const int64_t h = r % w.out[1], d = r / w.out[1] % w.out[0], image = r / w.out[1] / w.out[0];
      const int64_t base = block_channel<T>(row.first, plan.channels);
      x.begin(image, base);
      grad.begin(image, base);
      row.x = x.at(0);
      row.grad = grad.at(0);
      for (int64_t i = 0; i < plan.c.phases(2); ++i) {
        const Phase phase = plan.c.phase(2, i);
        if (phase.count == 0) break;
        const GradKernels<T>&kernels = kernels_for(phase.taps, phase.apart), &singles = kernels_for(1, 1);
        row.x_pixel = phase.in_step * x.column();
        row.g_pixel = phase.out_step * grad.column();
        const int64_t whole = kernels.taps > 1 ? phase.taps / kernels.taps * kernels.taps : 0;
        const int64_t run = count > 1 ? phase.count : plan.run;
        for (int64_t n = 0; n < phase.count; n += run) {
          const int64_t end = min64(n + run, phase.count);
          row.bias = has_bias;
          look_ahead(r, count, phase, i, end);
          const auto add = [&](const GradKernels<T>& k, int64_t run_count) {
            row.x_step = k.stride == phase.apart ? phase.tap_step * x.column() : row.x_pixel;
            for (int64_t done = 0, size; done < run_count; done += size) {
              size = ceil_div(run_count - done, ceil_div(run_count - done, k.runs));
              list_steps(phase, k, d, h, count, n, end, runs + done, size);
              k.block[size - 1](row);
              row.bias = false;
              row.next.count = row.next.gradients = 0;
            }
          };
          if (whole > 0) add(kernels, list_runs(d, h, count, 0, whole, kernels.taps));
          if (whole < phase.taps) add(singles, list_runs(d, h, count, whole, phase.taps, 1));
          if (row.bias) {  // no tap meets the rows
            runs[0] = {0, 0, 0};
            add(singles, 1);
          }
        }
      }
    }

    // Rows of outputs of one phase, from row n of it on, and what they read first.
    struct PhaseRows {
      Phase y;
      int64_t n, z, h;       // plane and row of the input; perhaps outside
      const char *x, *grad;  // column 0
    };
    // The r-th row where rows of a phase follow each other.
    PhaseRows phase_rows(int64_t r) const {
      const int64_t d = r / w.out[1] % w.out[0], image = r / w.out[1] / w.out[0];
      PhaseRows rows{};
      rows.y = plan.c.phase(1, 0);
      rows.n = r % w.out[1];
      for (int64_t i = 0; rows.n >= rows.y.count; rows.y = plan.c.phase(1, ++i)) rows.n -= rows.y.count;
      rows.z = d * w.stride[0] - w.pad[0];
      rows.h = rows.y.in_first + rows.n * rows.y.in_step;
      const View &from = plan.x.view, &grads = plan.grad.view;
      const int64_t out = rows.y.out_first + rows.n * rows.y.out_step;
      rows.x = static_cast<const char*>(from.data) +
               (image * from.stride[0] + rows.z * from.stride[2] + rows.h * from.stride[3]) * kBytes;
      rows.grad = static_cast<const char*>(grads.data) +
                  (image * grads.stride[0] + d * grads.stride[2] + out * grads.stride[3]) * kBytes;
      return rows;
    }
    // Adds up to `most` of these by strips; returns how many.
    int64_t add_strips(int64_t r, int64_t most) const {
      const PhaseRows rows = phase_rows(r);
      const int64_t count = min64(min64(most, rows.y.count - rows.n), plan.strip_rows);
      const int64_t x_column = plan.x.view.stride[4] * kBytes, g_column = plan.grad.view.stride[4] * kBytes;
      GradStrips<T> strips{};
      strips.count = count;
      strips.x_row = rows.y.tap_step * plan.x.view.stride[3] * kBytes;
      strips.g_row = rows.y.out_step * plan.grad.view.stride[3] * kBytes;
      strips.low = ceil_of(-rows.h, rows.y.tap_step);
      strips.high = rows.z >= 0 && rows.z < w.in[0] ? ceil_of(w.in[1] - rows.h, rows.y.tap_step) : strips.low;
      strips.first = row.first;
      strips.last = row.last;
      strips.channels = row.channels;
      strips.sums = row.sums;
      strips.taps = row.taps;
      strips.bias = has_bias;
      for (int64_t i = 0; i < plan.c.phases(2); ++i) {
        const Phase x = plan.c.phase(2, i);
        if (x.count == 0) break;  // and in all that follow
        strips.x = rows.x + x.in_first * x_column;
        strips.grad = rows.grad + x.out_first * g_column;
        strips.x_step = x.tap_step * x_column;
        strips.g_step = x.out_step * g_column;
        strips.left = ceil_of(-x.in_first, x.tap_step);
        strips.right = ceil_of(w.in[2] - x.in_first, x.tap_step);
        if (plan.fetches) {
          const bool here = i + 1 < plan.c.phases(2);
          const PhaseRows then = here ? rows : phase_rows(min64(r + count, plan.rows - 1));
          const Phase next = plan.c.phase(2, here ? i + 1 : 0);
          strips.next_x = then.x + max64(0, next.in_first) * x_column;
          strips.next_grad = then.grad + next.out_first * g_column;
        }
        plan.strips->run(strips, x.count);
      }
      return count;
    }

    // The runs of `length` taps that lie in taps [first, last) and meet one of the rows; returns how many.
    int64_t list_runs(int64_t d, int64_t h, int64_t count, int64_t first, int64_t last, int64_t length) {
      TapRun* next = runs;
      for (int64_t u = 0; u < w.taps[0]; ++u) {
        for (int64_t v = 0; v < w.taps[1]; ++v) {
          bool met = false;
          for (int64_t q = 0, z, y; q < count; ++q) met |= meets(d, h + q, u, v, z, y);
          for (int64_t t = first; met && t < last; t += length) *next++ = {u, v, t};
        }
      }
      return next - runs;
    }

    // The steps along outputs [begin, end) of `count` rows, for `run_count` runs.
    void list_steps(const Phase& phase, const GradKernels<T>& k, int64_t d, int64_t h, int64_t count, int64_t begin,
                    int64_t end, const TapRun* run, int64_t run_count) {
      const int64_t unit = k.stride == phase.apart ? 1 : phase.apart;
      const int64_t low = ceil_of(-phase.in_first, phase.tap_step);
      const int64_t high = ceil_of(w.in[2] - phase.in_first, phase.tap_step);
      int64_t lows[kMaxRuns], highs[kMaxRuns], inner_first = 0, inner_last = end;
      for (int64_t i = 0; i < run_count; ++i) {
        lows[i] = ceil_of(low - run[i].t, unit);
        highs[i] = ceil_of(high - run[i].t, unit);
        inner_first = max64(inner_first, ceil_of(lows[i], k.stride));
        inner_last = min64(inner_last, floor_of(highs[i] - k.taps, k.stride) + 1);
        row.tap[i] = (run[i].u * w.taps[1] + run[i].v) * w.taps[2] + run[i].t;
      }
      GradStep* step = steps;
      for (int64_t q = 0; q < count; ++q) {
        int64_t offset[kMaxRuns];
        bool met[kMaxRuns], all_met = true;
        for (int64_t i = 0, z, y; i < run_count; ++i) {
          all_met &= met[i] = meets(d, h + q, run[i].u, run[i].v, z, y);
          offset[i] = (phase.in_first + run[i].t * phase.tap_step) * x.column() + (met[i] ? x.row(0, z, y) : 0);
        }
        const int64_t g = grad.row(0, d, h + q) + phase.out_first * grad.column();
        for (int64_t n = begin, pixels; n < end; n += pixels, ++step) {
          const int64_t left = end - n;
          const bool wide = left >= kGradWide && left != 2 * kGradNarrow;
          pixels = wide ? kGradWide : left >= kGradNarrow ? kGradNarrow : 1;
          step->grad = g + n * row.g_pixel;
          for (int64_t i = 0; i < run_count; ++i) step->x[i] = offset[i] + n * row.x_pixel;
          if (wide && all_met && n >= inner_first && n + pixels <= inner_last) {
            step->size = GradStep::inner;
            continue;
          }
          step->size = wide ? GradStep::wide : left >= kGradNarrow ? GradStep::narrow : GradStep::single;
          for (int64_t i = 0; i < run_count; ++i)
            step->inside[i] = met[i] ? columns_inside(lows[i], highs[i], n * k.stride) : 0;
        }
      }
      row.step_count = step - steps;
    }

    // What follows output `n` of a phase of `count` rows from row r on: the same rows from there on, or those after them; of
    // these, each of several phases takes its share.
    void look_ahead(int64_t r, int64_t count, const Phase& phase, int64_t index, int64_t n) {
      NextSteps& next = row.next;
      next = {};
      const bool here = count == 1 && plan.c.phases(2) == 1 && n < phase.count;
      if (!here) r += count;
      if (!plan.fetches || r >= plan.rows) return;
      const int64_t h = r % w.out[1], d = r / w.out[1] % w.out[0], image = r / w.out[1] / w.out[0];
      const int64_t column = here ? n : index * phase.count * count;
      if (grad.direct) {
        next.gradients = true;
        next.grad = static_cast<const S*>(plan.grad.view.data) + image * plan.grad.view.stride[0] + row.first +
                    grad.row(0, d, h) + column * grad.column();
        next.g_step = grad.column();
      }
      if (!x.direct) return;
      next.x_step = x.column();
      const S* const first = static_cast<const S*>(plan.x.view.data) + image * plan.x.view.stride[0] + row.first +
                             (column * phase.apart + (here ? max64(0, phase.taps - phase.apart) : 0)) * x.column();
      const int64_t fresh = min64(w.taps[1], w.stride[1]), rows = here ? 1 : min64(plan.group, w.out[1] - h);
      for (int64_t u = 0, z, y; u < w.taps[0]; ++u) {
        if (!meets(d, h, u, w.taps[1] - fresh, z, y)) continue;
        for (int64_t i = 0; i < fresh && y < w.in[1] && next.count < NextSteps::kMost; ++i, y += rows)
          next.x[next.count++] = first + x.row(0, z, y);
      }
    }
  };

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

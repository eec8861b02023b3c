// Pointwise (1x1) convolution as a matrix product over positions, its weight gradient, and the fused depthwise +
// pointwise forward.
#pragma once

#include "depthwise_rows.h"
#include "gemm.h"
#include "tiles.h"

namespace dsconv::cpu::DSCONV_ISA {

constexpr int64_t kRowElements = 64 * 1024;  // A rows of one task: stay in L2 beside the panels
constexpr int64_t kMaxTaskRows = 192;

DSCONV_INLINE int64_t pointwise_flops(const PointwiseProblem& p) {
  return 2 * numel(p.batch, p.in_channels, p.size) * p.out_channels;
}

// Positions of one image as one task's rows of A.
DSCONV_INLINE TilePlan plan_rows(const int64_t (&size)[3], int64_t depth) {
  const int64_t rows = max64(8, min64(kMaxTaskRows, kRowElements / depth));
  return plan_tiles(size, rows);
}
// Row stride of A: not a multiple of 256 bytes, which would put a column of rows into few cache sets.
template <class T>
DSCONV_INLINE int64_t row_stride(int64_t depth) {
  return round_up(depth, kBlock<T>) +
         kBlock<T> * (round_up(depth, kBlock<T>) * static_cast<int64_t>(sizeof(T)) % 256 == 0);
}

// Rows [positions of box][channels of `view`] of A in the compute type.
template <class S, class T = Compute<S>>
static void gather_rows(T* a, int64_t lda, const View& view, int64_t image, int64_t channels, const Box& box) {
  const int64_t* stride = view.stride;
  const S* source = static_cast<const S*>(view.data) + image * stride[0] + box.origin[0] * stride[2] +
                    box.origin[1] * stride[3] + box.origin[2] * stride[4];
  for (int64_t z = 0; z < box.extent[0]; ++z) {
    for (int64_t y = 0; y < box.extent[1]; ++y, a += box.extent[2] * lda) {
      const S* row = source + z * stride[2] + y * stride[3];
      if (stride[1] == 1) {
        for (int64_t x = 0; x < box.extent[2]; ++x) widen_row<S>(a + x * lda, row + x * stride[4], channels);
      } else {
        for (int64_t c = 0; c < channels; ++c) {
          for (int64_t x = 0; x < box.extent[2]; ++x) a[x * lda + c] = widen(row[c * stride[1] + x * stride[4]]);
        }
      }
    }
  }
}

// One panel of output channels over the positions of box: c[positions][kPanel] -> + bias, + residual, activation -> y.
template <class S, class T = Compute<S>>
static void finish_panel(const PointwiseProblem& p, T* c, int64_t image, int64_t first, const Box& box) {
  const int64_t columns = min64(kPanel<T>, p.out_channels - first), width = box.extent[2];
  T bias[kPanel<T>] = {};
  if (p.bias.data) {
    for (int64_t k = 0; k < columns; ++k)
      bias[k] = widen(static_cast<const S*>(p.bias.data)[(first + k) * p.bias.stride[0]]);
  }
  auto at = [&](const View& v, int64_t z, int64_t y) {
    return static_cast<S*>(v.data) + image * v.stride[0] + first * v.stride[1] + (box.origin[0] + z) * v.stride[2] +
           (box.origin[1] + y) * v.stride[3] + box.origin[2] * v.stride[4];
  };
  for (int64_t z = 0; z < box.extent[0]; ++z) {
    for (int64_t y = 0; y < box.extent[1]; ++y, c += width * kPanel<T>) {
      for (int64_t x = 0; x < width; ++x) {
        for (int k = 0; k < kPanel<T>; ++k) c[x * kPanel<T> + k] += bias[k];
      }
      if (p.residual.data) {
        const S* residual = at(p.residual, z, y);
        for (int64_t x = 0; x < width; ++x) {
          const S* pixel = residual + x * p.residual.stride[4];
          for (int64_t k = 0; k < columns; ++k) c[x * kPanel<T> + k] += widen(pixel[k * p.residual.stride[1]]);
        }
      }
      activate_row(p.activation, c, width * kPanel<T>);
      S* out = at(p.y, z, y);
      if (p.y.stride[1] == 1) {
        for (int64_t x = 0; x < width; ++x) narrow_row<S>(out + x * p.y.stride[4], c + x * kPanel<T>, columns);
      } else {
        for (int64_t k = 0; k < columns; ++k) {
          for (int64_t x = 0; x < width; ++x) narrow(c[x * kPanel<T> + k], out + k * p.y.stride[1] + x * p.y.stride[4]);
        }
      }
    }
  }
}

// All panels of one task: rows of A are ready.
template <class S, class T = Compute<S>>
static void multiply_task(const PointwiseProblem& p, const T* a, int64_t lda, const T* panels, T* c, int64_t image,
                          const Box& box) {
  for (int64_t first = 0; first < p.out_channels; first += kPanel<T>, panels += p.in_channels * kPanel<T>) {
    multiply_panel(a, lda, product(box.extent), panels, p.in_channels, c);
    finish_panel<S>(p, c, image, first, box);
  }
}

template <class S>
struct Pointwise {
  using T = Compute<S>;

  static int64_t slot_bytes(const PointwiseProblem& p, const TilePlan& plan) {
    return piece_bytes<T>(plan.staged * row_stride<T>(p.in_channels)) + piece_bytes<T>(plan.staged * kPanel<T>);
  }
  static size_t workspace_bytes(const PointwiseProblem& p, int threads) {
    const int64_t panels = p.packed ? 0 : packed_panels_count<T>(p.out_channels, p.in_channels);
    return kBlockBytes + piece_bytes<T>(panels) + threads * slot_bytes(p, plan_rows(p.size, p.in_channels));
  }
  static void launch(const PointwiseProblem& p, const Runtime& runtime, void* workspace) {
    const TilePlan plan = plan_rows(p.size, p.in_channels);
    const int64_t lda = row_stride<T>(p.in_channels);
    Arena arena = arena_at(workspace);
    const T* panels = static_cast<const T*>(p.packed);
    if (!panels) {
      T* packed = take<T>(arena, packed_panels_count<T>(p.out_channels, p.in_channels));
      pack_panels<S>(packed, p.weight, p.out_channels, p.in_channels);
      panels = packed;
    }
    auto body = [&](int64_t task, int64_t end, int64_t slot) {
      Arena own{arena.next + slot * slot_bytes(p, plan)};
      T* a = take<T>(own, plan.staged * lda);
      T* c = take<T>(own, plan.staged * kPanel<T>);
      for (; task < end; ++task) {
        const int64_t image = task / plan.tiles;
        const Box box = tile_box(plan, p.size, task % plan.tiles);
        gather_rows<S>(a, lda, p.a, image, p.in_channels, box);
        multiply_task<S>(p, a, lda, panels, c, image, box);
      }
    };
    const int64_t tasks = p.batch * plan.tiles;
    for_slots(runtime, tasks, thread_slots(runtime, tasks, pointwise_flops(p)), body);
  }
};

// grad_weight[K, C] = sum over positions of grad[position, K] * a[position, C]; grad_bias[K] = sum of grad.
// task = panel of C x block of K; each walks all positions in order, one chunk after the other, so nothing depends on
// the threads.
template <class S>
struct PointwiseGradWeight {
  using T = Compute<S>;
  static constexpr int64_t kChunk = kChain, kBlockRows = 48;

  static TilePlan plan_of(const PointwiseProblem& p) { return plan_tiles(p.size, kChunk); }
  static int64_t slot_bytes() {
    return piece_bytes<T>(kChunk * kPanel<T>) + 2 * piece_bytes<T>(kBlockRows * kChunk) +
           2 * piece_bytes<T>(kBlockRows * kPanel<T>) + piece_bytes<double>(kBlockRows);
  }
  static size_t workspace_bytes(const PointwiseProblem&, int threads) { return kBlockBytes + threads * slot_bytes(); }

  // A few channels of `view` over the positions of box, [position][channels <= width], zeros beyond.
  static void gather_columns(T* out, int64_t width, const View& view, int64_t image, int64_t first, int64_t channels,
                             const Box& box) {
    View shifted = view;
    shifted.data = static_cast<S*>(view.data) + first * view.stride[1];
    if (channels < width) memset(out, 0, product(box.extent) * width * sizeof(T));
    gather_rows<S>(out, width, shifted, image, channels, box);
  }

  static void launch(const PointwiseProblem& p, const Runtime& runtime, void* workspace) {
    const TilePlan plan = plan_of(p);
    const int64_t blocks = ceil_div(p.out_channels, kBlockRows), panels = ceil_div(p.in_channels, kPanel<T>);
    Arena arena = arena_at(workspace);
    auto body = [&](int64_t task, int64_t end, int64_t slot) {
      Arena own{arena.next + slot * slot_bytes()};
      T* columns = take<T>(own, kChunk * kPanel<T>);
      T* gathered = take<T>(own, kBlockRows * kChunk);
      T* rows = take<T>(own, kBlockRows * kChunk);
      T* chunk = take<T>(own, kBlockRows * kPanel<T>);
      T* total = take<T>(own, kBlockRows * kPanel<T>);
      double* bias = take<double>(own, kBlockRows);
      for (; task < end; ++task) {
        const int64_t block = task % blocks, panel = task / blocks, k0 = block * kBlockRows, c0 = panel * kPanel<T>;
        const int64_t count = min64(kBlockRows, p.out_channels - k0), width = min64(kPanel<T>, p.in_channels - c0);
        memset(total, 0, kBlockRows * kPanel<T> * sizeof(T));
        memset(bias, 0, kBlockRows * sizeof(double));
        for (int64_t piece = 0; piece < p.batch * plan.tiles; ++piece) {
          const int64_t image = piece / plan.tiles;
          const Box box = tile_box(plan, p.size, piece % plan.tiles);
          const int64_t positions = product(box.extent);
          gather_columns(columns, kPanel<T>, p.a, image, c0, width, box);
          gather_columns(gathered, kBlockRows, p.grad, image, k0, count, box);
          for (int64_t k = 0; k < count; ++k) {
            double sum = 0;
            for (int64_t i = 0; i < positions; ++i) sum += rows[k * kChunk + i] = gathered[i * kBlockRows + k];
            bias[k] += sum;
          }
          for (int64_t first = 0; first < positions; first += kPositionChain) {
            const int64_t depth = min64(kPositionChain, positions - first);
            multiply_panel(rows + first, kChunk, count, columns + first * kPanel<T>, depth, chunk);
            for (int64_t i = 0; i < count * kPanel<T>; ++i) total[i] += chunk[i];
          }
        }
        for (int64_t k = 0; k < count && p.grad_weight.data; ++k) {
          S* out =
              static_cast<S*>(p.grad_weight.data) + (k0 + k) * p.grad_weight.stride[0] + c0 * p.grad_weight.stride[1];
          for (int64_t c = 0; c < width; ++c) narrow(total[k * kPanel<T> + c], out + c * p.grad_weight.stride[1]);
        }
        for (int64_t k = 0; k < count && p.grad_bias.data && panel == 0; ++k) {
          narrow(static_cast<T>(bias[k]), static_cast<S*>(p.grad_bias.data) + (k0 + k) * p.grad_bias.stride[0]);
        }
      }
    };
    for_slots(runtime, blocks * panels, thread_slots(runtime, blocks * panels, pointwise_flops(p)), body);
  }
};

// Rounds values to the storage type and back: what memory would have done to them.
template <class S, class T = Compute<S>>
DSCONV_INLINE void round_row(T* values, int64_t count) {
  if constexpr (sizeof(S) == sizeof(T)) return;
  for (int64_t i = 0; i < count; ++i) {
    S s;
    narrow(values[i], &s);
    values[i] = widen(s);
  }
}

// Depthwise into the rows of A, then the panels: the depthwise map of a task never leaves the cache.
template <class S>
struct Fused {
  using T = Compute<S>;
  using Depthwise = Rows<S, false>;

  static TilePlan plan_of(const SeparableProblem& p) {
    return plan_rows(p.depthwise.window.out, p.pointwise.in_channels);
  }
  static int64_t slot_bytes(typename Depthwise::Plan& rows, const SeparableProblem& p, const TilePlan& plan) {
    return Depthwise::slot_bytes(rows) + Pointwise<S>::slot_bytes(p.pointwise, plan);
  }
  static size_t workspace_bytes(const SeparableProblem& p, int threads) {
    typename Depthwise::Plan rows = Depthwise::plan_of(p.depthwise, Delivery::direct, false);
    const int64_t panels =
        p.pointwise.packed ? 0 : packed_panels_count<T>(p.pointwise.out_channels, p.pointwise.in_channels);
    return kBlockBytes + Depthwise::shared_bytes(p.depthwise, rows) + piece_bytes<T>(panels) +
           threads * slot_bytes(rows, p, plan_of(p));
  }

  static void launch(const SeparableProblem& problem, const Runtime& runtime, void* workspace) {
    const DepthwiseProblem& dw = problem.depthwise;
    const PointwiseProblem& pw = problem.pointwise;
    const TilePlan plan = plan_of(problem);
    typename Depthwise::Plan rows = Depthwise::plan_of(dw, Delivery::direct, false);
    const int64_t lda = row_stride<T>(pw.in_channels), own_bytes = slot_bytes(rows, problem, plan);
    Arena arena = arena_at(workspace);
    const BlockRow<T> shared = Depthwise::shared_row(dw, rows, arena);
    const T* panels = static_cast<const T*>(pw.packed);
    if (!panels) {
      T* packed = take<T>(arena, packed_panels_count<T>(pw.out_channels, pw.in_channels));
      pack_panels<S>(packed, pw.weight, pw.out_channels, pw.in_channels);
      panels = packed;
    }
    auto body = [&](int64_t task, int64_t end, int64_t slot) {
      Arena own{arena.next + slot * own_bytes};
      T* a = take<T>(own, plan.staged * lda);
      T* c = take<T>(own, plan.staged * kPanel<T>);
      typename Depthwise::Worker worker(rows, shared, own);
      for (; task < end; ++task) {
        const int64_t image = task / plan.tiles;
        const Box box = tile_box(plan, dw.window.out, task % plan.tiles);
        for (int64_t chunk = 0; chunk < rows.chunks; ++chunk) {
          worker.begin(image, chunk);
          depthwise_tile(worker, rows.c, box, a, lda);
        }
        for (int64_t i = 0; i < product(box.extent); ++i) round_row<S>(a + i * lda, pw.in_channels);
        multiply_task<S>(pw, a, lda, panels, c, image, box);
      }
    };
    const int64_t tasks = pw.batch * plan.tiles;
    for_slots(runtime, tasks, thread_slots(runtime, tasks, depthwise_flops(dw) + pointwise_flops(pw)), body);
  }

  // The depthwise values of a box as rows of A, two rows of the map at a time where they are neighbours in a phase.
  static void depthwise_tile(typename Depthwise::Worker& worker, const Correlation& c, const Box& box, T* a,
                             int64_t lda) {
    const int64_t width = box.extent[2], phases = c.phases(1), pair = phases == 1 ? 2 : 1;
    for (int64_t z = 0; z < box.extent[0]; ++z) {
      for (int64_t y = 0; y < box.extent[1]; y += pair) {
        const int64_t h = box.origin[1] + y;
        const int count = static_cast<int>(min64(pair, box.extent[1] - y));
        T* to = a + ((z * box.extent[1] + y) * width - box.origin[2]) * lda;
        worker.compute(box.origin[0] + z, c.phase(1, h % phases), h / phases, count, box.origin[2],
                       box.origin[2] + width, to, width * lda, lda);
      }
    }
  }
};

}  // namespace dsconv::cpu::DSCONV_ISA

// Plain loops for every pass, accumulating in double: the definition in C++, the last resort of the table, an oracle of
// the tests.
#define DSCONV_ISA reference
#define DSCONV_VECTOR_BYTES 16

#include "cpu/activation_rows.h"
#include "cpu/kernel_of.h"
#include "cpu/tasks.h"

namespace dsconv::cpu::reference {

using T = double;

template <class S>
static S* at(const View& v, int64_t n, int64_t c, int64_t d, int64_t h, int64_t w) {
  return static_cast<S*>(v.data) + n * v.stride[0] + c * v.stride[1] + d * v.stride[2] + h * v.stride[3] +
         w * v.stride[4];
}

template <class S>
static T value(const View& v, int64_t n, int64_t c, int64_t d = 0, int64_t h = 0, int64_t w = 0) {
  return widen(*at<S>(v, n, c, d, h, w));
}
template <class S>
static void write(T sum, const View& v, int64_t n, int64_t c, int64_t d = 0, int64_t h = 0, int64_t w = 0) {
  narrow(static_cast<Compute<S>>(sum), at<S>(v, n, c, d, h, w));
}

// Calls body(d, h, w) for every position of a map.
template <class Body>
static void for_positions(const int64_t (&size)[3], Body body) {
  for (int64_t d = 0; d < size[0]; ++d) {
    for (int64_t h = 0; h < size[1]; ++h) {
      for (int64_t w = 0; w < size[2]; ++w) body(d, h, w);
    }
  }
}

// Calls body(u0, u1, u2, i0, i1, i2) for every tap u of output (d, h, w) that reads an input position i inside the map.
template <class Body>
static void for_taps(const Window& win, int64_t d, int64_t h, int64_t w, Body body) {
  for_positions(win.taps, [&](int64_t u0, int64_t u1, int64_t u2) {
    const int64_t i0 = d * win.stride[0] + u0 * win.dilation[0] - win.pad[0];
    const int64_t i1 = h * win.stride[1] + u1 * win.dilation[1] - win.pad[1];
    const int64_t i2 = w * win.stride[2] + u2 * win.dilation[2] - win.pad[2];
    if (i0 >= 0 && i0 < win.in[0] && i1 >= 0 && i1 < win.in[1] && i2 >= 0 && i2 < win.in[2])
      body(u0, u1, u2, i0, i1, i2);
  });
}

// Runs body(index) over [0, count) with the runtime's threads.
template <class Body>
static void for_each(const Runtime& runtime, int64_t count, Body body) {
  auto range = [&](int64_t i, int64_t end, int64_t) {
    for (; i < end; ++i) body(i);
  };
  for_slots(runtime, count, min64(runtime.threads, count), range);
}

template <class S>
struct Forward {
  static size_t workspace_bytes(const DepthwiseProblem&, int) { return 0; }
  static void launch(const DepthwiseProblem& p, const Runtime& runtime, void*) {
    const int64_t channels = p.channels * p.multiplier;
    for_each(runtime, p.batch * channels, [&](int64_t i) {
      const int64_t n = i / channels, o = i % channels;
      for_positions(p.window.out, [&](int64_t d, int64_t h, int64_t w) {
        T sum = p.bias.data ? value<S>(p.bias, o, 0) : T(0);
        for_taps(p.window, d, h, w, [&](int64_t u0, int64_t u1, int64_t u2, int64_t i0, int64_t i1, int64_t i2) {
          sum += value<S>(p.x, n, o / p.multiplier, i0, i1, i2) * value<S>(p.weight, o, 0, u0, u1, u2);
        });
        activate_row(p.activation, &sum, 1);
        write<S>(sum, p.y, n, o, d, h, w);
      });
    });
  }
};

template <class S>
struct GradInput {
  static size_t workspace_bytes(const DepthwiseProblem& p, int threads) {
    return threads * piece_bytes<T>(product(p.window.in)) + kBlockBytes;
  }
  static void launch(const DepthwiseProblem& p, const Runtime& runtime, void* workspace) {
    const Window& win = p.window;
    const Arena arena = arena_at(workspace);
    auto body = [&](int64_t i, int64_t end, int64_t slot) {
      T* sum = reinterpret_cast<T*>(arena.next + slot * piece_bytes<T>(product(win.in)));
      for (; i < end; ++i) {
        const int64_t n = i / p.channels, c = i % p.channels;
        memset(sum, 0, product(win.in) * sizeof(T));
        for (int64_t o = c * p.multiplier; o < (c + 1) * p.multiplier; ++o) {
          for_positions(win.out, [&](int64_t d, int64_t h, int64_t w) {
            const T g = value<S>(p.grad, n, o, d, h, w);
            for_taps(win, d, h, w, [&](int64_t u0, int64_t u1, int64_t u2, int64_t i0, int64_t i1, int64_t i2) {
              sum[(i0 * win.in[1] + i1) * win.in[2] + i2] += g * value<S>(p.weight, o, 0, u0, u1, u2);
            });
          });
        }
        for_positions(win.in, [&](int64_t d, int64_t h, int64_t w) {
          narrow(sum[(d * win.in[1] + h) * win.in[2] + w], at<S>(p.grad_x, n, c, d, h, w));
        });
      }
    };
    const int64_t tasks = p.batch * p.channels;
    for_slots(runtime, tasks, min64(runtime.threads, tasks), body);
  }
};

template <class S>
struct GradWeight {
  static size_t workspace_bytes(const DepthwiseProblem&, int) { return 0; }
  static void launch(const DepthwiseProblem& p, const Runtime& runtime, void*) {
    const Window& win = p.window;
    for_each(runtime, p.channels * p.multiplier, [&](int64_t o) {
      for_positions(win.taps, [&](int64_t u0, int64_t u1, int64_t u2) {
        T sum = T(0);
        for (int64_t n = 0; n < p.batch && p.grad_weight.data; ++n) {
          for_positions(win.out, [&](int64_t d, int64_t h, int64_t w) {
            const int64_t i0 = d * win.stride[0] + u0 * win.dilation[0] - win.pad[0];
            const int64_t i1 = h * win.stride[1] + u1 * win.dilation[1] - win.pad[1];
            const int64_t i2 = w * win.stride[2] + u2 * win.dilation[2] - win.pad[2];
            if (i0 < 0 || i0 >= win.in[0] || i1 < 0 || i1 >= win.in[1] || i2 < 0 || i2 >= win.in[2]) return;
            sum += value<S>(p.x, n, o / p.multiplier, i0, i1, i2) * value<S>(p.grad, n, o, d, h, w);
          });
        }
        if (p.grad_weight.data) write<S>(sum, p.grad_weight, o, 0, u0, u1, u2);
      });
      T sum = T(0);
      for (int64_t n = 0; n < p.batch && p.grad_bias.data; ++n) {
        for_positions(win.out, [&](int64_t d, int64_t h, int64_t w) { sum += value<S>(p.grad, n, o, d, h, w); });
      }
      if (p.grad_bias.data) write<S>(sum, p.grad_bias, o, 0);
    });
  }
};

template <class S>
struct Mask {
  static size_t workspace_bytes(const DepthwiseProblem&, int) { return 0; }
  static void launch(const DepthwiseProblem& p, const Runtime& runtime, void*) {
    for_each(runtime, p.batch * p.channels, [&](int64_t i) {
      const int64_t n = i / p.channels, c = i % p.channels;
      for_positions(p.window.out, [&](int64_t d, int64_t h, int64_t w) {
        T g = value<S>(p.grad, n, c, d, h, w);
        if (p.activation.kind != Activation::none) {
          const T saved = value<S>(p.saved, n, c, d, h, w);
          mask_row(p.activation, &g, &saved, 1);
        }
        write<S>(g, p.grad_x, n, c, d, h, w);
      });
    });
  }
};

template <class S>
struct Pointwise {
  static size_t workspace_bytes(const PointwiseProblem&, int) { return 0; }
  static void launch(const PointwiseProblem& p, const Runtime& runtime, void*) {
    for_each(runtime, p.batch * p.out_channels, [&](int64_t i) {
      const int64_t n = i / p.out_channels, k = i % p.out_channels;
      for_positions(p.size, [&](int64_t d, int64_t h, int64_t w) {
        T sum = p.bias.data ? value<S>(p.bias, k, 0) : T(0);
        for (int64_t c = 0; c < p.in_channels; ++c) sum += value<S>(p.a, n, c, d, h, w) * value<S>(p.weight, k, c);
        if (p.residual.data) sum += value<S>(p.residual, n, k, d, h, w);
        activate_row(p.activation, &sum, 1);
        write<S>(sum, p.y, n, k, d, h, w);
      });
    });
  }
};

template <class S>
struct PointwiseGradWeight {
  static size_t workspace_bytes(const PointwiseProblem&, int) { return 0; }
  static void launch(const PointwiseProblem& p, const Runtime& runtime, void*) {
    for_each(runtime, p.out_channels, [&](int64_t k) {
      auto total = [&](auto term) {
        T sum = T(0);
        for (int64_t n = 0; n < p.batch; ++n) {
          for_positions(p.size, [&](int64_t d, int64_t h, int64_t w) { sum += term(n, d, h, w); });
        }
        return sum;
      };
      auto gradient = [&](int64_t n, int64_t d, int64_t h, int64_t w) { return value<S>(p.grad, n, k, d, h, w); };
      for (int64_t c = 0; c < p.in_channels && p.grad_weight.data; ++c) {
        auto term = [&](int64_t n, int64_t d, int64_t h, int64_t w) {
          return gradient(n, d, h, w) * value<S>(p.a, n, c, d, h, w);
        };
        write<S>(total(term), p.grad_weight, k, c);
      }
      if (p.grad_bias.data) write<S>(total(gradient), p.grad_bias, k, 0);
    });
  }
};

extern const Kernel<DepthwiseProblem> depthwise_forward = kernel_of<DepthwiseProblem, Forward>();
extern const Kernel<DepthwiseProblem> depthwise_grad_input = kernel_of<DepthwiseProblem, GradInput>();
extern const Kernel<DepthwiseProblem> depthwise_grad_weight = kernel_of<DepthwiseProblem, GradWeight>();
extern const Kernel<DepthwiseProblem> depthwise_mask = kernel_of<DepthwiseProblem, Mask>();
extern const Kernel<PointwiseProblem> pointwise_forward = kernel_of<PointwiseProblem, Pointwise>();
extern const Kernel<PointwiseProblem> pointwise_grad_weight = kernel_of<PointwiseProblem, PointwiseGradWeight>();

}  // namespace dsconv::cpu::reference

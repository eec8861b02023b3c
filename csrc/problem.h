// The plain structs that travel from the torch-facing code to the kernels. No torch, no methods, no ownership.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dsconv {

enum class DType : uint8_t { f64, f32, bf16, f16 };

enum class Activation : uint8_t {
  none,
  relu,
  relu6,
  hardswish,
  hardsigmoid,
  silu,
  gelu,
  gelu_tanh,
  leaky_relu,
  sigmoid,
  tanh,
  elu
};

// An activation with its parameter: the negative slope of leaky_relu, the alpha of elu, unused by the others.
struct ActivationSpec {
  Activation kind;
  double param;
  bool hides_kinks = false;  // the output was rounded to a half type, maybe onto a kink of hardsigmoid
};

// Can the derivative be computed from the activation's output? (A negative slope or alpha loses the sign of the input.)
static inline constexpr bool derivative_from_output(ActivationSpec a) {
  switch (a.kind) {
    case Activation::relu:
    case Activation::relu6:
    case Activation::sigmoid:
    case Activation::tanh: return true;
    case Activation::hardsigmoid: return !a.hides_kinks;
    case Activation::leaky_relu:
    case Activation::elu: return a.param >= 0;
    default: return false;
  }
}

// A strided [N, C, D, H, W] tensor; tensors of lower rank have leading spatial sizes of 1. Strides in elements. data is
// null when absent.
struct View {
  void* data;
  int64_t stride[5];
};

// The window of a convolution over D, H, W. pad is the low side; the high side is implied by out.
struct Window {
  int64_t in[3];
  int64_t out[3];
  int64_t taps[3];
  int64_t stride[3];
  int64_t dilation[3];
  int64_t pad[3];
};

// Depthwise convolution with `multiplier` outputs per input channel, and its gradients. A pass uses the views it needs:
//   forward:     y = activation(x * weight + bias)
//   grad_input:  grad_x from grad and weight; grad is that of the pre-activation, as for grad_weight
//   grad_weight: grad_weight, grad_bias from x and grad
//   mask:        grad_x = grad times the activation's derivative at `saved` (absent without an activation), position by
//                position (in == out, no weight)
struct DepthwiseProblem {
  DType dtype;
  int64_t batch;
  int64_t channels;
  int64_t multiplier;
  Window window;
  ActivationSpec activation;
  View x;
  View weight;  // [C*m, 1, D, H, W]
  View bias;    // [C*m]
  View y;
  View grad;
  View saved;  // the forward's output when its derivative can be read off it, else the pre-activation
  View grad_x;
  View grad_weight;
  View grad_bias;
  const void*
      packed;  // weight as the target's Packer wrote it (read by the forward pass), or null; maybe instead of it
};

// 1x1 convolution over the positions of [N, C, D, H, W], and its weight gradient:
//   forward:     y = activation(a * weight + bias + residual)
//   grad_weight: grad_weight, grad_bias from a and grad
struct PointwiseProblem {
  DType dtype;
  int64_t batch;
  int64_t in_channels;
  int64_t out_channels;
  int64_t size[3];
  ActivationSpec activation;
  View a;
  View weight;  // [K, C]: stride[0] over K, stride[1] over C; transposed strides serve the input gradient
  View bias;    // [K]
  View residual;
  View y;
  View grad;
  View grad_weight;
  View grad_bias;
  const void* packed;  // as in DepthwiseProblem
  bool allow_tf32;     // GPUs only: factors of float32 may be rounded to tf32
};

// Depthwise, mid activation, pointwise in one pass: depthwise.y is never written, pointwise.a is never read.
struct SeparableProblem {
  DepthwiseProblem depthwise;
  PointwiseProblem pointwise;
};

struct Machine;  // choose.h

// What a kernel may use of the machine: on a CPU a blocking loop over [0, count) run by up to `threads` threads, on a GPU
// the multiprocessors and a stream.
struct Runtime {
  int threads;  // or multiprocessors
  void (*parallel)(int64_t count, void (*body)(void* context, int64_t index), void* context);
  void* stream;                      // CUDA rows only
  const Machine* machine = nullptr;  // CUDA rows only
};

// The implementation of one row of kernels.inc.
template <class Problem>
struct Kernel {
  const char* (*can_run)(const Problem&);  // null, or the reason why not
  size_t (*workspace_bytes)(const Problem&, int threads);
  void (*launch)(const Problem&, const Runtime&, void* workspace);
  int64_t (*threads)(const Problem&) = nullptr;  // CUDA rows: how many work at once, if the GPU has room
  int (*least_sm)(const Problem&) = nullptr;     // CUDA rows: the least Machine::sm with the instructions it needs
  bool reads_packed = false;                     // can do with packed weights alone
  // CUDA rows that know their cost better than choose.cpp does; infinite where the GPU has no room for a block.
  double (*estimate_us)(const Problem&, const Machine&, double efficiency) = nullptr;
  double (*part)(const Problem&) = nullptr;  // CPU rows: of the row's efficiency, what they reach on a problem
};

// Weights in the order in which a target's kernels read them (Problem::packed).
template <class Problem>
struct Packer {
  size_t (*bytes)(const Problem&);
  void (*pack)(const Problem&, void* out);
};

}  // namespace dsconv

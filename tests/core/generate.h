// Seeded problems over the whole legal space of a pass, thickest where kernels have their edges.
#pragma once

#include <algorithm>
#include <random>

#include "spec.h"

namespace dsconv::core_test {

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t below(int64_t n) { return static_cast<int64_t>(engine_() % static_cast<uint64_t>(n)); }
  int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }
  bool one_in(int64_t n) { return below(n) == 0; }
  double unit() { return static_cast<double>(engine_() >> 11) * 0x1p-53; }
  template <class T, size_t n>
  T of(const T (&choices)[n]) {
    return choices[below(n)];
  }

 private:
  std::mt19937_64 engine_;  // std distributions differ between libraries; the engine does not
};

// Multiply-adds of a small problem, and of one that several threads share (a kernel may give small work to one).
constexpr int64_t kSmallWork = 150'000, kSharedWork = 1'200'000, kLargestWork = 2 * kSharedWork,
                  kLargestElements = 800'000;

inline int64_t draw_channels(Random& r) {
  static constexpr int64_t kEdges[] = {1, 2, 3, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 37, 48, 63, 64, 65, 96, 100};
  return r.one_in(4) ? r.between(1, 100) : r.of(kEdges);
}

inline int64_t draw_size(Random& r, bool shared) {
  static constexpr int64_t kEdges[] = {1, 2, 3, 5, 7, 8, 14, 15, 16, 17, 28, 29, 33}, kLarge[] = {15, 16, 17, 28, 33};
  return shared ? r.of(kLarge) : r.of(kEdges);
}

inline ActivationSpec draw_activation(Random& r, Data data) {
  static constexpr Activation kExact[] = {Activation::relu, Activation::relu6, Activation::leaky_relu};
  // Powers of two, so that integers stay exact; below zero the derivative is read off the pre-activation.
  static constexpr double kParams[] = {0.5, 0.125, 2, -0.25};
  if (r.one_in(3)) return {Activation::none, 0};
  const auto any = static_cast<Activation>(r.below(std::size(kActivations)));
  const Activation kind = data == Data::reals ? any : r.of(kExact);
  const bool has_param = kind == Activation::leaky_relu || kind == Activation::elu;
  return {kind, has_param ? r.of(kParams) : 0};
}

inline Layout draw_layout(Random& r, Role role, Layout common) {
  static constexpr Layout kWritten[] = {Layout::contiguous, Layout::channels_last, Layout::sliced,
                                        Layout::channels_last_sliced};
  if (is_written(role)) return r.one_in(4) ? r.of(kWritten) : common;
  return r.one_in(3) ? static_cast<Layout>(r.below(std::size(kLayouts))) : common;
}

// Makes high padding or input up for a window that does not fit, and sets the output size.
inline void fit_window(Spec& s, int dim, int64_t high) {
  const int64_t span = (s.taps[dim] - 1) * s.dilation[dim] + 1;
  s.in[dim] = std::max(s.in[dim], span - s.pad[dim] - high);
  s.out[dim] = output_size(s.in[dim], s.taps[dim], s.stride[dim], s.dilation[dim], s.pad[dim], high);
}

struct WindowShape {
  int64_t taps, stride, dilation, low, high;
};

inline WindowShape draw_window(Random& r) {
  static constexpr int64_t kTaps[] = {1, 2, 3, 3, 3, 3, 4, 5, 5, 6, 7}, kStrides[] = {1, 1, 1, 2, 2, 3},
                           kDilations[] = {1, 1, 1, 1, 2, 3};
  WindowShape w{r.one_in(40) ? 31 : r.of(kTaps), r.of(kStrides), r.of(kDilations), 0, 0};
  const int64_t reach = (w.taps - 1) * w.dilation;
  w.low = w.high = reach / 2;
  if (r.one_in(3)) {  // asymmetric, and now and then wider than the window
    w.low = r.between(0, reach + (r.one_in(4) ? 3 : 0));
    w.high = r.between(0, reach + (r.one_in(4) ? 3 : 0));
  }
  return w;
}

inline void draw_geometry(Random& r, Spec& s, bool shared) {
  static constexpr int64_t kRanks[] = {1, 2, 2, 2, 2, 3};
  const int64_t rank = r.of(kRanks);
  const WindowShape same = draw_window(r);
  const bool alike = !r.one_in(4);
  const bool windowed = s.depthwise() && s.pass != Pass::mask;
  for (int dim = 3 - static_cast<int>(rank); dim < 3; ++dim) {
    s.in[dim] = s.out[dim] = rank == 3 && dim == 0 ? r.between(1, 5) : draw_size(r, shared);
    if (!windowed) continue;
    const WindowShape w = alike ? same : draw_window(r);
    s.taps[dim] = rank == 3 ? std::min<int64_t>(w.taps, 7) : w.taps;  // 31 x 31 x 31 would take all the time there is
    s.stride[dim] = w.stride;
    s.dilation[dim] = w.dilation;
    s.pad[dim] = w.low;
    fit_window(s, dim, w.high);
  }
}

// conv1d without stride and dilation: some kernels run nothing else.
inline void draw_line(Random& r, Spec& s) {
  static constexpr int64_t kTaps[] = {2, 3, 4, 5, 9, 15, 16, 17, 31};
  s.multiplier = 1;
  s.taps[2] = r.of(kTaps);
  s.in[2] = r.one_in(3) ? r.between(1, 40) : r.between(40, 300);
  s.pad[2] = r.between(0, s.taps[2] - 1);
  fit_window(s, 2, r.between(0, s.taps[2] - 1));
}

// Halves sizes until the reference can afford the problem, then repeats images until threads are worth it.
inline void limit_work(Random& r, Spec& s, bool shared) {
  int64_t* const halvable[] = {&s.batch, &s.channels, &s.filters, &s.out[0], &s.out[1], &s.out[2]};
  while (s.work() > (shared ? kLargestWork : kSmallWork) || s.elements() > kLargestElements) {
    int64_t* const size = r.of(halvable);
    if (*size < 2) continue;
    *size = ceil_div(*size, 2);
    for (int dim = 0; dim < 3; ++dim) {  // the input that the remaining outputs read, and a little more
      if (size != &s.out[dim]) continue;
      const int64_t read = input_extent(s.out[dim], s.taps[dim], s.stride[dim], s.dilation[dim]) - s.pad[dim];
      s.in[dim] = std::min(s.in[dim], std::max<int64_t>(1, read));
    }
  }
  if (shared)
    s.batch *= std::max<int64_t>(1, std::min(ceil_div(kSharedWork, s.work()), kLargestElements / s.elements()));
}

inline void draw_parts(Random& r, Spec& s) {
  const bool forward = s.pass == Pass::depthwise_fwd || s.pass == Pass::pointwise_fwd || s.pass == Pass::separable_fwd;
  if (forward || s.pass == Pass::mask) s.activation = draw_activation(r, s.data);
  if (s.pass == Pass::separable_fwd) s.mid = draw_activation(r, s.data);
  s.bias = forward && s.depthwise() && !r.one_in(3);
  s.pointwise_bias = forward && s.pointwise() && !r.one_in(3);
  s.residual = forward && s.pointwise() && r.one_in(3);
  s.packed = forward && r.one_in(2);
  if (s.pass != Pass::depthwise_wgrad && s.pass != Pass::pointwise_wgrad) return;
  const int64_t want = r.below(4);
  s.want_weight = want != 0;
  s.want_bias = want != 1;
}

inline void draw_layouts(Random& r, Spec& s, bool is_line) {
  const Layout common = is_line || r.one_in(3) ? Layout::contiguous : Layout::channels_last;
  for (int i = 0; i < kRoles; ++i) {
    const auto role = static_cast<Role>(i);
    if (shape_of(s, role)) s.layout[role] = draw_layout(r, role, common);
  }
  s.wild = r.one_in(4);
  s.offset = r.one_in(2) ? 0 : r.between(1, 31);
}

// Problem number `index` of a pass. Every fifth is large enough for several threads, every eighth a line.
inline Spec generate(Pass pass, int64_t seed, int64_t index) {
  static constexpr Data kDraws[] = {Data::integers, Data::integers, Data::reals, Data::reals, Data::nonfinite};
  Random r(static_cast<uint64_t>(seed) * 1'000'003 + static_cast<uint64_t>(index) * 16 + static_cast<uint64_t>(pass));
  const bool shared = index % 5 == 4;
  Spec s;
  s.pass = pass;
  s.dtype = r.of(kDTypes);
  s.data = r.of(kDraws);
  s.seed = r.between(1, 999'999);
  s.batch = r.between(1, 3);
  s.channels = draw_channels(r);
  s.multiplier = s.depthwise() && pass != Pass::mask && r.one_in(4) ? r.between(2, 3) : 1;
  if (s.pointwise()) s.filters = draw_channels(r);
  const bool is_line = index % 8 == 3 && s.depthwise() && pass != Pass::mask;
  if (is_line) {
    draw_line(r, s);
  } else {
    draw_geometry(r, s, shared);
  }
  draw_parts(r, s);
  // The operator asks for the bias gradient alone with one input channel that nobody reads.
  if (pass == Pass::pointwise_wgrad && !s.want_weight) s.channels = 1;
  limit_work(r, s, shared);
  draw_layouts(r, s, is_line);
  return s;
}

// The range of the forward's values that a derivative is read off.
inline double draw_saved(Random& r, const Spec& s) {
  const double param = s.activation.param;
  const double x = s.data == Data::reals ? 8 * r.unit() - 4 : static_cast<double>(r.between(-2, 7));
  if (!derivative_from_output(s.activation)) return x;
  switch (s.activation.kind) {
    case Activation::relu: return std::max(x, 0.0);
    case Activation::relu6: return std::clamp(1.75 * x, 0.0, 6.0);
    case Activation::hardsigmoid: return std::clamp(x / 6 + 0.5, 0.0, 1.0);
    case Activation::sigmoid: return 1 / (1 + std::exp(-x));
    case Activation::tanh: return std::tanh(x);
    case Activation::elu: return std::max(x, -param);
    default: return x;
  }
}

// A non-finite number may stand wherever the window meets it only inside the map: zero padding meets no Inf there.
inline bool may_be_nonfinite(const Spec& s, Role role) {
  return role == kWeight || role == kX || (role == kPointwiseWeight && s.pass == Pass::pointwise_fwd);
}

inline Values draw_values(const Spec& s, Role role, const Shape& shape) {
  static constexpr double kNonfinite[] = {INFINITY, -INFINITY, NAN};
  Random r(static_cast<uint64_t>(s.seed) * kRoles + role);
  Values values(count_of(shape));
  for (double& value : values) {
    value = role == kSaved          ? draw_saved(r, s)
            : s.data == Data::reals ? 4 * r.unit() - 2
                                    : static_cast<double>(r.between(-3, 3));
  }
  if (s.data == Data::nonfinite && may_be_nonfinite(s, role) && r.one_in(2))
    values[r.below(count_of(shape))] = r.of(kNonfinite);
  return values;
}

}  // namespace dsconv::core_test

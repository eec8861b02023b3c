// Depthwise convolution and its input gradient as one thing: correlations over phases.
//
// Neighbouring outputs of a dilated convolution read disjoint inputs, and so do neighbouring positions of the input
// gradient of a strided one. Outputs that are some positions apart share what they read: a phase. Within one,
// neighbouring outputs are `in_step` inputs apart and neighbouring taps `tap_step`, and in_step is a multiple of
// tap_step. Every position of every tap belongs to exactly one phase, so nothing is computed for inserted zeros.
#pragma once

#include "vec.h"

namespace dsconv::cpu::DSCONV_ISA {

// One phase of one dimension: output out_first + n * out_step reads input in_first + n * in_step + t * tap_step with
// the tap at place tap_first + t of the packed weights.
struct Phase {
  int64_t count;  // outputs
  int64_t out_first, out_step;
  int64_t in_first, in_step, tap_step, apart;  // apart = in_step / tap_step
  int64_t taps, tap_first;
};

DSCONV_INLINE constexpr int64_t gcd64(int64_t a, int64_t b) {
  while (b != 0) {
    const int64_t rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}

// Divisions that round up and down (divisor > 0); by 1, the usual case, none takes place.
DSCONV_INLINE constexpr int64_t ceil_of(int64_t a, int64_t b) { return b == 1 ? a : -floor_div(-a, b); }
DSCONV_INLINE constexpr int64_t floor_of(int64_t a, int64_t b) { return b == 1 ? a : floor_div(a, b); }

// From `source` to `target` positions: the forward pass reads window.in, the input gradient (transposed) window.out.
struct Correlation {
  Window window;
  bool transposed;
  int64_t phase_count[3], class_count[3];  // divisions are slow: done once

  static Correlation of(const Window& window, bool transposed) {
    Correlation c{window, transposed, {}, {}};
    for (int dim = 0; dim < 3; ++dim) {
      const int64_t s = window.stride[dim], d = window.dilation[dim], g = gcd64(s, d);
      c.phase_count[dim] = (transposed ? s : 1) * d / g;
      c.class_count[dim] = transposed ? s / g : 1;
    }
    return c;
  }

  const int64_t (&source() const)[3] { return transposed ? window.out : window.in; }
  const int64_t (&target() const)[3] { return transposed ? window.in : window.out; }

  int64_t phases(int dim) const { return phase_count[dim]; }

  // Tap classes of the input gradient: the taps u = u0 + i * classes meet the same phases. Packed weights hold class
  // after class, each with descending u, so that inputs ascend.
  int64_t classes(int dim) const { return class_count[dim]; }
  static constexpr int64_t class_size(int64_t taps, int64_t classes, int64_t u0) {
    return u0 < taps ? ceil_div(taps - u0, classes) : 0;
  }
  // The place of a tap in the packed order.
  int64_t place_of(int dim, int64_t tap) const {
    if (!transposed) return tap;
    const int64_t taps = window.taps[dim], step = classes(dim);
    if (step == 1) return taps - 1 - tap;
    int64_t place = class_size(taps, step, tap % step) - 1 - tap / step;
    for (int64_t u0 = 0; u0 < tap % step; ++u0) place += class_size(taps, step, u0);
    return place;
  }
  int64_t place_of(int64_t tap) const {
    const int64_t *k = window.taps, x = tap % k[2], y = tap / k[2] % k[1], z = tap / k[2] / k[1];
    return (place_of(0, z) * k[1] + place_of(1, y)) * k[2] + place_of(2, x);
  }

  Phase phase(int dim, int64_t index) const {
    const int64_t s = window.stride[dim], d = window.dilation[dim], pad = window.pad[dim], step = phases(dim);
    Phase p{step == 1 ? target()[dim] : max64(0, ceil_of(target()[dim] - index, step)), index, step, 0, 0, 0, 1, 0, 0};
    if (!transposed) {
      p.in_first = index * s - pad;
      p.in_step = s * step;
      p.tap_step = d;
      p.apart = step == d ? s : s * step / d;
      p.taps = window.taps[dim];
      return p;
    }
    const int64_t tap_classes = classes(dim);
    if (step == 1) {  // flipped taps
      p.in_step = p.tap_step = 1;
      p.taps = window.taps[dim];
      p.in_first = pad - (p.taps - 1);
      return p;
    }
    p.in_step = p.tap_step = step / s;
    for (int64_t u0 = 0; u0 < tap_classes; ++u0) {
      const int64_t taps = class_size(window.taps[dim], tap_classes, u0);
      const int64_t last = index + pad - (u0 + (taps - 1) * tap_classes) * d;
      if ((index + pad - u0 * d) % s == 0) {
        p.taps = taps;
        p.in_first = last / s;
        return p;
      }
      p.tap_first += taps;
    }
    p.tap_first = 0;
    return p;  // no tap reaches this phase: its outputs are zero
  }

  // Do the outputs of all phases of columns read `apart` columns after each other, with one outside at most on either side?
  bool has_narrow_borders(int64_t apart) const {
    for (int64_t i = 0; i < phases(2); ++i) {
      const Phase x = phase(2, i);
      const int64_t low = ceil_of(-x.in_first, x.tap_step), high = ceil_of(source()[2] - x.in_first, x.tap_step);
      if (x.apart != apart || low > 1 || (x.count - 1) * apart + x.taps - high > 1) return false;
    }
    return true;
  }
};

}  // namespace dsconv::cpu::DSCONV_ISA

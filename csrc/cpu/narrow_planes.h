// Narrow planes by rows: contiguous tensors whose rows fit into a vector or two (plane_rows.h), with AVX-512.
#pragma once

#include "planes.h"

namespace dsconv::cpu::DSCONV_ISA {

template <class S, int kTaps, int kStride, RowForm kForm>
struct ByRows : OutputRows<S, kTaps, kStride> {
  using StripOf = RowStrip<Compute<S>, kTaps, kStride, kForm>;
  using Work = StripWork<StripOf, StripOf>;
  static void run(const ImagePlanes<S>& image, int64_t first, int64_t last, const Work& work) {
    plane_rows<S, kTaps, kStride, kForm>(image, first, last, work.pieces, work.piece_count, *work.strips);
  }
};

template <class S, bool kTransposed>
struct NarrowPlanes : Planes<S, kTransposed> {
  using Base = Planes<S, kTransposed>;
  static constexpr int kL = Base::kL;

  static const char* can_run(const DepthwiseProblem& p) {
    const Window& w = p.window;
    if (const char* reason = Base::can_run(p)) return reason;
    if (kTransposed && w.stride[1] == 2) return "gradients of a stride";
    if (min64(w.in[2], w.out[2]) < 1 || w.out[2] > kL || w.in[2] > w.stride[2] * kL) return "rows wider than a vector";
    return nullptr;
  }
  // Lanes without outputs, the shuffles of a row, and what every plane begins with (in multiply-adds).
  static double part(const DepthwiseProblem& p) {
    const Window& w = p.window;
    const int64_t* out = kTransposed ? w.in : w.out;
    const RowForm form = form_of(p);
    const double taps = static_cast<double>(product(w.taps)), rows = static_cast<double>(max64(out[1], 1));
    const double shuffles = (form == RowForm::vector ? 1 : 2.5) * static_cast<double>(w.stride[1]);
    const double planes = form == RowForm::planes ? 2 : 1, begin = planes > 1 ? 50 + 2.5 * taps : 32;
    const double products = taps > 25 ? 1.15 * taps : taps;  // more do not stay in registers
    return planes * static_cast<double>(out[2]) / kL * taps * rows / (rows * (products + shuffles) + begin);
  }
  static RowForm form_of(const DepthwiseProblem& p) {
    const Window& w = p.window;
    const int64_t in = kTransposed ? w.out[2] : w.in[2], out = kTransposed ? w.in[2] : w.out[2];
    return in > kL ? RowForm::vectors : out > kL / 2 ? RowForm::vector : RowForm::planes;
  }

  static void launch(const DepthwiseProblem& p, const Runtime& runtime, void* workspace) {
    const RowForm form = form_of(p);
    unroll<6>([&]<int i>() __attribute__((always_inline)) {
      constexpr int kTaps = 3 + i / 2 * 2, kStride = 1 + i % 2;
      if constexpr (!kTransposed || kStride == 1) {
        if (p.window.taps[1] != kTaps || p.window.stride[1] != kStride) return;
        const auto launch_as = [&]<RowForm kForm>() {
          Base::template launch_strips<ByRows<S, kTaps, kStride, kForm>>(p, runtime, workspace);
        };
        if (form == RowForm::vector) return launch_as.template operator()<RowForm::vector>();
        if (form == RowForm::planes) return launch_as.template operator()<RowForm::planes>();
        if constexpr (kStride == 2) launch_as.template operator()<RowForm::vectors>();
      }
    });
  }
};

template <class S>
struct NarrowPlanesForward : NarrowPlanes<S, false> {};
template <class S>
struct NarrowPlanesGradInput : NarrowPlanes<S, true> {};

}  // namespace dsconv::cpu::DSCONV_ISA

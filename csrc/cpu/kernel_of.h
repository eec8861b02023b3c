// From a pass written per storage type to the Kernel that a row of kernels.inc names.
#pragma once

#include "vec.h"

namespace dsconv::cpu::DSCONV_ISA {

DSCONV_INLINE DType storage_of(const DepthwiseProblem& p) { return p.dtype; }
DSCONV_INLINE DType storage_of(const PointwiseProblem& p) { return p.dtype; }
DSCONV_INLINE DType storage_of(const SeparableProblem& p) { return p.depthwise.dtype; }

// Calls fn with a value of the storage type that dtype names.
template <class Fn>
DSCONV_INLINE void with_storage(DType dtype, Fn fn) {
  switch (dtype) {
    case DType::f64: return fn(double{});
    case DType::f32: return fn(float{});
    case DType::bf16: return fn(BFloat16{});
    case DType::f16: return fn(Float16{});
  }
}

constexpr bool kReadsPacked = true;

// Pass<S> has workspace_bytes and launch; can_run, unless it runs everything; part, if that depends on the problem. The kernel
// dispatches on the storage type.
template <class Problem, template <class> class Pass, bool reads_packed = false>
constexpr Kernel<Problem> kernel_of() {
  return {
      [](const Problem& p) {
        const char* reason = nullptr;
        with_storage(storage_of(p), [&](auto s) {
          if constexpr (requires { Pass<decltype(s)>::can_run(p); }) reason = Pass<decltype(s)>::can_run(p);
        });
        return reason;
      },
      [](const Problem& p, int threads) {
        size_t bytes = 0;
        with_storage(storage_of(p), [&](auto s) { bytes = Pass<decltype(s)>::workspace_bytes(p, threads); });
        return bytes;
      },
      [](const Problem& p, const Runtime& runtime, void* workspace) {
        with_storage(storage_of(p), [&](auto s) { Pass<decltype(s)>::launch(p, runtime, workspace); });
      },
      nullptr,
      nullptr,
      reads_packed,
      nullptr,
      [](const Problem& p) {
        double part = 1;
        with_storage(storage_of(p), [&](auto s) {
          if constexpr (requires { Pass<decltype(s)>::part(p); }) part = Pass<decltype(s)>::part(p);
        });
        return part;
      },
  };
}

// The same for Packed<S> with bytes and pack.
template <class Problem, template <class> class Packed>
constexpr Packer<Problem> packer_of() {
  return {
      [](const Problem& p) {
        size_t bytes = 0;
        with_storage(p.dtype, [&](auto s) { bytes = Packed<decltype(s)>::bytes(p); });
        return bytes;
      },
      [](const Problem& p, void* out) { with_storage(p.dtype, [&](auto s) { Packed<decltype(s)>::pack(p, out); }); },
  };
}

}  // namespace dsconv::cpu::DSCONV_ISA

// Loops whose index is a compile-time constant.
#pragma once

#include "vec.h"

namespace dsconv::cpu::DSCONV_ISA {

template <int... values>
struct Indices {};
#if defined(__clang__)
template <class, int... values>
struct IndicesOf {
  typedef Indices<values...> type;
};
template <int count>
using Range = typename __make_integer_seq<IndicesOf, int, count>::type;
#else
template <int count>
using Range = Indices<__integer_pack(count)...>;
#endif

template <class>
struct Unroll;
template <int... values>
struct Unroll<Indices<values...>> {
  template <class Fn>
  __attribute__((always_inline)) constexpr void operator()([[maybe_unused]] const Fn& fn) const {
    (fn.template operator()<values>(), ...);
  }
};

// unroll<count>(fn): fn.template operator()<i>() for i = 0 .. count - 1. Arrays that are indexed by i alone stay in
// registers. (An object, not a function with another inside: compilers spend most of their time on inlining these.)
template <int count>
static constexpr Unroll<Range<count>> unroll{};

// Goes down `count` rows, of which kLive are in work at a time: step j begins row j, works on rows j - m for m = 0 ..
// kLive - 1, and ends row j - kLive + 1; the last steps begin none. Calls advance<k, first, last, checked>(j) for each step,
// whose rows are those with m in [first, last), row j - m in place (k - m) modulo kLive in registers; steps in [from, to)
// are not checked. move_up<i>() fills place i from the one after it. With fewer than kLive - 1 rows, some of those that a
// step works on do not exist.
template <int kLive, class Advance, class MoveUp>
DSCONV_INLINE void go_down(int64_t count, int64_t from, int64_t to, const Advance& advance, const MoveUp& move_up) {
  constexpr int kNew = kLive - 1;
  const bool few = count < kNew;
  const int64_t end = few ? count + kNew : count;
  int64_t j = 0;
  if (!few) {
    unroll<kNew>([&]<int k>() __attribute__((always_inline)) { advance.template operator()<k, 0, k + 1, true>(k); });
    j = kNew;
  }
  while (j < end) {
    if (!few && j >= from && j + kLive <= to) {
      unroll<kLive>([&]<int i>() __attribute__((always_inline)) {
        advance.template operator()<(kNew + i) % kLive, 0, kLive, false>(j + i);
      });
      j += kLive;
    } else {
      advance.template operator()<kNew, 0, kLive, true>(j++);
      unroll<kNew>(move_up);
    }
  }
  if (few) return;
  unroll<kNew>([&]<int i>() __attribute__((always_inline)) {
    advance.template operator()<(kNew + i) % kLive, i + 1, kLive, true>(count + i);
  });
}

}  // namespace dsconv::cpu::DSCONV_ISA

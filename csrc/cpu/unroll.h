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

template <int... values, class Fn>
DSCONV_INLINE constexpr void for_indices(Indices<values...>, Fn fn) {
  (fn.template operator()<values>(), ...);
}

// fn.template operator()<i>() for i = 0 .. count - 1. Arrays that are indexed by i alone stay in registers.
template <int count, class Fn>
DSCONV_INLINE constexpr void unroll(Fn fn) {
  for_indices(Range<count>{}, fn);
}

}  // namespace dsconv::cpu::DSCONV_ISA

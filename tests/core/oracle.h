// What a problem must give, and how far from it a result may be: the reference rows in double, on dense copies.
//
// A sum of n products in any order is off by at most n eps sum|a||b|, so the bound is the reference run on absolute
// values. Integers and non-finite numbers allow nothing: their sums are exact.
#pragma once

#include "bind.h"
#include "generate.h"

namespace dsconv::core_test {

struct Expected {
  Values value, bound;  // bound is empty where only equality will do
};
using Results = std::map<Role, Expected>;
using Numbers = std::map<Role, Values>;

inline void run_serially(int64_t count, void (*body)(void*, int64_t), void* context) {
  for (int64_t i = 0; i < count; ++i) body(context, i);
}

inline const Row& reference_of(Pass pass) {
  for (const Row& row : kernel_table()) {
    if (row.pass == pass && std::string(row.name).ends_with("_reference")) return row;
  }
  throw std::runtime_error(std::string("the table has no reference row for ") + name_of(pass));
}

// The reference row of the pass in double, on contiguous copies of `numbers`.
inline Numbers evaluate(Spec s, const Numbers& numbers) {
  s.dtype = DType::f64;
  s.wild = s.offset = s.packed = 0;
  for (Layout& layout : s.layout) layout = Layout::contiguous;
  Tensors inputs = tensors_of(s, false), outputs = tensors_of(s, true);
  for (auto& [role, tensor] : inputs) tensor.fill(numbers.at(role));
  with_problem(s, views_of(inputs, outputs), {}, [&]<class Problem>(const Problem& problem) {
    const Row& row = reference_of(s.pass);
    if constexpr (!std::is_same_v<Problem, SeparableProblem>) {
      const auto& kernel = kernel_of<Problem>(row);
      std::vector<std::max_align_t> workspace(kernel.workspace_bytes(problem, 1) / sizeof(std::max_align_t) + 1);
      kernel.launch(problem, Runtime{1, run_serially, nullptr}, workspace.data());
    }
  });
  Numbers results;
  for (const auto& [role, tensor] : outputs) results[role] = tensor.values();
  return results;
}

template <class Fn>
Values mapped(Values values, Fn fn) {
  for (double& value : values) value = fn(value);
  return values;
}

inline Spec without_activation(Spec s) {
  s.activation = s.mid = {};
  return s;
}

// No activation here is steeper than 1.5, but for a slope or an alpha.
inline double steepness(const ActivationSpec& a) { return 1.5 * std::max(1.0, std::fabs(a.param)); }

// The products that one result of a pass is the sum of, bias and residual included.
inline double terms_of(const Spec& s) {
  switch (s.pass) {
    case Pass::depthwise_fwd: return s.tap_count() + 1.0;
    case Pass::depthwise_dgrad: return static_cast<double>(s.tap_count() * s.multiplier);
    case Pass::pointwise_fwd: return s.channels + 2.0;
    case Pass::mask: return 1;
    default: return static_cast<double>(s.batch * product(s.out));
  }
}

constexpr double kFunctionUlps = 64;  // an activation or its derivative, relative to 1 + its argument

inline double accumulation_eps(DType t) { return unit_roundoff_twice(t == DType::f64 ? DType::f64 : DType::f32); }

// The error of activation(sum) once stored, where the terms' absolute sum is `magnitude` and they were off by `inherited`.
inline double bound_of(const Spec& s, double value, double magnitude, double inherited) {
  const double eps = accumulation_eps(s.dtype);
  const bool plain = s.activation.kind == Activation::none;
  const double sum = terms_of(s) * eps * magnitude + inherited;
  const double activated = plain ? sum : steepness(s.activation) * (sum + kFunctionUlps * eps * (1 + magnitude));
  return 1.01 * activated + unit_roundoff_twice(s.dtype) * std::fabs(value) + smallest(s.dtype);
}

inline Results expect_single(const Spec& s, const Numbers& numbers, const Values* inherited = nullptr) {
  Results results;
  for (auto& [role, value] : evaluate(s, numbers)) results[role].value = value;
  if (s.data != Data::reals) return results;
  // The mask multiplies by a derivative: |grad * derivative| <= steepness * |grad|.
  const bool forward = s.pass == Pass::depthwise_fwd || s.pass == Pass::pointwise_fwd;
  const double derivative = forward || s.activation.kind == Activation::none
                                ? 1
                                : steepness(s.activation) * (1 + kFunctionUlps / terms_of(s));
  Numbers sizes;
  for (const auto& [role, values] : numbers)
    sizes[role] = mapped(values, [&](double x) { return std::fabs(x) * (role == kGrad ? derivative : 1); });
  const Spec bare = without_activation(s);
  for (const auto& [role, magnitude] : evaluate(bare, sizes)) {
    Expected& e = results[role];
    for (size_t i = 0; i < magnitude.size(); ++i)
      e.bound.push_back(bound_of(forward ? s : bare, e.value[i], magnitude[i], inherited ? (*inherited)[i] : 0));
  }
  return results;
}

inline Spec stage_of(Spec s, Pass pass) {
  s.pass = pass;
  if (pass == Pass::depthwise_fwd) {
    s.activation = s.mid;
    s.filters = s.pointwise_bias = s.residual = 0;
  } else {
    s.channels = s.map_channels();
    s.multiplier = 1;
    s.bias = 0;
    std::copy(s.out, s.out + 3, s.in);
  }
  s.mid = {};
  return s;
}

// To the 10 stored bits of a tf32, ties away from zero.
constexpr double kTf32Ulp = 0x1p-10;
inline double rounded_to_tf32(double x) {
  if (!std::isfinite(x) || x == 0) return x;
  int exponent;
  std::frexp(x, &exponent);
  return std::ldexp(std::round(std::ldexp(x, 11 - exponent)), exponent - 11);
}

// Depthwise, rounded to the storage type as memory would or to tf32, then pointwise.
inline Results expect_separable(const Spec& s, Numbers numbers) {
  const Spec first = stage_of(s, Pass::depthwise_fwd), second = stage_of(s, Pass::pointwise_fwd);
  Expected map = expect_single(first, numbers).at(kOutput);
  const auto factor = [&](double x) { return s.tf32 ? rounded_to_tf32(x) : rounded(s.dtype, x); };
  if (s.tf32) {
    for (size_t i = 0; i < map.bound.size(); ++i) map.bound[i] += kTf32Ulp * std::fabs(map.value[i]);
  }
  numbers[kX] = mapped(map.value, factor);
  numbers[kPointwiseWeight] = mapped(numbers.at(kPointwiseWeight), factor);
  if (s.data != Data::reals) return expect_single(second, numbers);
  Spec spread = without_activation(second);
  spread.pointwise_bias = spread.residual = 0;
  const Values& weight = numbers.at(kPointwiseWeight);
  // A value and its neighbour: twice the map's bound covers a result that was rounded the other way.
  const Numbers off = {{kX, mapped(map.bound, [](double x) { return 2 * x; })},
                       {kPointwiseWeight, mapped(weight, [](double x) { return std::fabs(x); })}};
  const Values inherited = evaluate(spread, off).at(kOutput);
  return expect_single(second, numbers, &inherited);
}

inline Results expect(const Spec& s, const Numbers& numbers) {
  return s.pass == Pass::separable_fwd ? expect_separable(s, numbers) : expect_single(s, numbers);
}

// "" or the first difference.
inline std::string difference(const Spec& s, Role role, const Values& got, const Expected& expected) {
  for (size_t i = 0; i < got.size(); ++i) {
    const bool exact = expected.bound.empty();
    const double want = exact ? rounded(s.dtype, expected.value[i]) : expected.value[i];
    const bool both_nan = s.data == Data::nonfinite && std::isnan(got[i]) && std::isnan(want);
    // Written so that a NaN is a difference.
    if (both_nan || (exact ? got[i] == want : std::fabs(got[i] - want) <= expected.bound[i])) continue;
    std::ostringstream text;
    text.precision(17);
    text << kRoleNames[role] << "[" << i << " of " << got.size() << "]: got " << got[i] << ", expected " << want;
    if (!exact) text << " +- " << expected.bound[i];
    return text.str();
  }
  return "";
}

}  // namespace dsconv::core_test

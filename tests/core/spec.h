// One problem as one line of text, and the tensors it consists of.
#pragma once

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "choose.h"
#include "memory.h"

namespace dsconv::core_test {

constexpr Pass kPasses[] = {Pass::depthwise_fwd, Pass::depthwise_dgrad, Pass::depthwise_wgrad, Pass::mask,
                            Pass::pointwise_fwd, Pass::pointwise_wgrad, Pass::separable_fwd};
constexpr DType kDTypes[] = {DType::f64, DType::f32, DType::bf16, DType::f16};
constexpr const char* kActivations[] = {"none", "relu",      "relu6",      "hardswish", "hardsigmoid", "silu",
                                        "gelu", "gelu_tanh", "leaky_relu", "sigmoid",   "tanh",        "elu"};

// What the numbers are: small integers and nonfinite must come out exactly, reals within a bound.
enum class Data : uint8_t { integers, reals, nonfinite };
constexpr const char* kData[] = {"integers", "reals", "nonfinite"};

enum class Layout : uint8_t {
  contiguous,
  channels_last,
  sliced,                // part of a larger contiguous tensor
  channels_last_sliced,  // part of a larger channels_last tensor
  stepped,               // every second column of a larger tensor
  permuted,              // the batch innermost
  transposed,            // the last two dimensions swapped
  expanded,              // one image for the whole batch: stride 0
  broadcast,             // one channel for all: stride 0
  constant               // one number, as the gradient of a sum
};
constexpr const char* kLayouts[] = {"contiguous", "channels_last", "sliced",     "channels_last_sliced",
                                    "stepped",    "permuted",      "transposed", "expanded",
                                    "broadcast",  "constant"};

// The tensors of a problem; the last three are written.
enum Role {
  kX,  // also the pointwise input
  kWeight,
  kBias,
  kPointwiseWeight,
  kPointwiseBias,
  kResidual,
  kGrad,
  kSaved,
  kOutput,  // y or grad_x
  kGradWeight,
  kGradBias,
  kRoles
};
constexpr const char* kRoleNames[kRoles] = {"x",        "weight", "bias",  "pointwise_weight", "pointwise_bias",
                                            "residual", "grad",   "saved", "output",           "grad_weight",
                                            "grad_bias"};
constexpr bool is_written(Role role) { return role >= kOutput; }

struct Spec {
  Pass pass = Pass::depthwise_fwd;
  DType dtype = DType::f32;
  Data data = Data::integers;
  int64_t seed = 1;
  int64_t batch = 1, channels = 1, multiplier = 1, filters = 0;  // filters: output channels of the pointwise stage
  int64_t in[3] = {1, 1, 1}, taps[3] = {1, 1, 1}, stride[3] = {1, 1, 1}, dilation[3] = {1, 1, 1}, pad[3] = {0, 0, 0},
          out[3] = {1, 1, 1};
  ActivationSpec mid{}, activation{};
  int64_t bias = 0, pointwise_bias = 0, residual = 0, packed = 0;
  int64_t tf32 = 0;                        // float32 factors of the pointwise stage are rounded
  int64_t want_weight = 0, want_bias = 0;  // the gradients of a wgrad pass
  Layout layout[kRoles] = {};
  int64_t wild = 0;    // dimensions of size 1 have meaningless strides
  int64_t offset = 0;  // elements by which every tensor misses a cache line

  bool depthwise() const { return pass != Pass::pointwise_fwd && pass != Pass::pointwise_wgrad; }
  bool pointwise() const { return !depthwise() || pass == Pass::separable_fwd; }
  int64_t map_channels() const { return channels * multiplier; }
  int64_t tap_count() const { return product(taps); }
  int64_t work() const;      // multiply-adds, or what is worth as much
  int64_t elements() const;  // of the largest tensors
};

inline int64_t Spec::work() const {
  const int64_t positions = batch * product(out), maps = positions * map_channels();
  if (pass == Pass::mask) return 4 * maps;
  return (depthwise() ? maps * tap_count() : 0) + (pointwise() ? maps * filters : 0);
}

inline int64_t Spec::elements() const {
  return batch * (channels * product(in) + std::max(map_channels(), filters) * product(out));
}

// The shape of a tensor of the problem; nothing when the problem has no such tensor.
inline std::optional<Shape> shape_of(const Spec& s, Role role) {
  auto when = [](bool present, Shape shape) { return present ? std::optional(shape) : std::nullopt; };
  auto map = [&](int64_t channels, const int64_t (&size)[3]) {
    return Shape{s.batch, channels, size[0], size[1], size[2]};
  };
  const bool forward = s.pass == Pass::depthwise_fwd || s.pass == Pass::pointwise_fwd || s.pass == Pass::separable_fwd;
  const bool wgrad = s.pass == Pass::depthwise_wgrad || s.pass == Pass::pointwise_wgrad;
  const int64_t upstream = s.pass == Pass::pointwise_wgrad ? s.filters : s.map_channels();
  const bool input_sized = s.pass == Pass::depthwise_dgrad;
  switch (role) {
    case kX: return when(forward || wgrad, map(s.channels, s.in));
    case kWeight:
      return when(s.depthwise() && !wgrad && s.pass != Pass::mask,
                  {s.map_channels(), 1, s.taps[0], s.taps[1], s.taps[2]});
    case kBias: return when(s.depthwise() && s.bias, {s.map_channels(), 1, 1, 1, 1});
    case kPointwiseWeight: return when(s.pointwise() && forward, {s.filters, s.map_channels(), 1, 1, 1});
    case kPointwiseBias: return when(s.pointwise() && s.pointwise_bias, {s.filters, 1, 1, 1, 1});
    case kResidual: return when(s.residual, map(s.filters, s.out));
    case kGrad: return when(!forward, map(upstream, s.out));
    case kSaved: return when(s.pass == Pass::mask && s.activation.kind != Activation::none, map(upstream, s.out));
    case kOutput:
      if (wgrad) return std::nullopt;
      return map(s.pointwise() ? s.filters : input_sized ? s.channels : s.map_channels(), input_sized ? s.in : s.out);
    case kGradWeight:
      if (!s.want_weight) return std::nullopt;
      return s.pointwise() ? Shape{s.filters, s.channels, 1, 1, 1}
                           : Shape{s.map_channels(), 1, s.taps[0], s.taps[1], s.taps[2]};
    case kGradBias: return when(s.want_bias, {upstream, 1, 1, 1, 1});
    default: return std::nullopt;
  }
}

inline Shape strides_of(Layout layout, const Shape& shape, bool wild) {
  using Order = std::array<int, 5>;  // dimensions from the innermost outwards
  const bool last = layout == Layout::channels_last || layout == Layout::channels_last_sliced;
  const Order order = last                           ? Order{1, 4, 3, 2, 0}
                      : layout == Layout::permuted   ? Order{0, 4, 3, 2, 1}
                      : layout == Layout::transposed ? Order{3, 4, 2, 1, 0}
                                                     : Order{4, 3, 2, 1, 0};
  const bool sliced = layout == Layout::sliced || layout == Layout::channels_last_sliced;
  Shape stride{};
  int64_t step = layout == Layout::stepped ? 2 : 1;
  for (int i = 0; i < 5; ++i) {
    const int dim = order[i];
    stride[dim] = step;
    step *= shape[dim] + (sliced ? 1 + i % 3 : 0);
  }
  if (layout == Layout::expanded) stride[0] = 0;
  if (layout == Layout::broadcast) stride[1] = 0;
  if (layout == Layout::constant) stride = {};
  for (int dim = 0; dim < 5 && wild; ++dim) {
    if (shape[dim] == 1) stride[dim] = 1000003 + dim;
  }
  return stride;
}

inline Tensor tensor_of(const Spec& s, Role role, const Shape& shape) {
  return Tensor(s.dtype, shape, strides_of(s.layout[role], shape, s.wild), s.offset * element_size(s.dtype),
                !is_written(role));
}

// Text <-> fields. Every field is named once, in fields().
template <class Enum, size_t n>
void read_name(const std::string& text, const char* const (&names)[n], Enum& value) {
  for (size_t i = 0; i < n; ++i) {
    if (text == names[i]) return void(value = static_cast<Enum>(i));
  }
  throw std::invalid_argument("no such name: " + text);
}
template <class Enum, size_t n>
void read_named(const std::string& text, const Enum (&all)[n], Enum& value) {
  for (Enum one : all) {
    if (text == name_of(one)) return void(value = one);
  }
  throw std::invalid_argument("no such name: " + text);
}
inline void read(const std::string& text, Pass& v) { read_named(text, kPasses, v); }
inline void read(const std::string& text, DType& v) { read_named(text, kDTypes, v); }
inline void read(const std::string& text, Data& v) { read_name(text, kData, v); }
inline void read(const std::string& text, Layout& v) { read_name(text, kLayouts, v); }
inline void read(const std::string& text, int64_t& v) { v = std::stoll(text); }
inline void read(const std::string& text, int64_t (&v)[3]) {
  std::istringstream in(text);
  char x;
  if (!(in >> v[0] >> x >> v[1] >> x >> v[2])) throw std::invalid_argument("not three sizes: " + text);
}
inline void read(const std::string& text, ActivationSpec& v) {
  const size_t colon = text.find(':');
  read_name(text.substr(0, colon), kActivations, v.kind);
  v.param = colon == std::string::npos ? 0 : std::stod(text.substr(colon + 1));
}

inline std::string show(Pass v) { return name_of(v); }
inline std::string show(DType v) { return name_of(v); }
inline std::string show(Data v) { return kData[static_cast<int>(v)]; }
inline std::string show(Layout v) { return kLayouts[static_cast<int>(v)]; }
inline std::string show(int64_t v) { return std::to_string(v); }
inline std::string show(const int64_t (&v)[3]) {
  std::ostringstream out;
  out << v[0] << 'x' << v[1] << 'x' << v[2];
  return out.str();
}
inline std::string show(const ActivationSpec& v) {
  std::ostringstream out;
  out << kActivations[static_cast<int>(v.kind)];
  if (v.param != 0) out << ":" << v.param;
  return out.str();
}

template <class AnySpec, class Visit>
void fields(AnySpec& s, Visit visit) {
  visit("pass", s.pass);
  visit("dtype", s.dtype);
  visit("data", s.data);
  visit("seed", s.seed);
  visit("n", s.batch);
  visit("c", s.channels);
  visit("m", s.multiplier);
  visit("k", s.filters);
  visit("in", s.in);
  visit("taps", s.taps);
  visit("stride", s.stride);
  visit("dilation", s.dilation);
  visit("pad", s.pad);
  visit("out", s.out);
  visit("mid", s.mid);
  visit("act", s.activation);
  visit("has_bias", s.bias);
  visit("has_pointwise_bias", s.pointwise_bias);
  visit("has_residual", s.residual);
  visit("packed", s.packed);
  visit("tf32", s.tf32);
  visit("want_weight", s.want_weight);
  visit("want_bias", s.want_bias);
  visit("wild", s.wild);
  visit("offset", s.offset);
  for (int role = 0; role < kRoles; ++role) visit(kRoleNames[role], s.layout[role]);
}

// Only what differs from a default Spec: a line that a person can read.
inline std::string line_of(const Spec& s) {
  const Spec defaults{};
  std::vector<std::string> usual;
  fields(defaults, [&](const char*, const auto& value) { usual.push_back(show(value)); });
  std::string line;
  size_t i = 0;
  fields(s, [&](const char* name, const auto& value) {
    const std::string text = show(value);
    if (i < 2 || text != usual[i]) {
      if (!line.empty()) line += ' ';
      line.append(name).append("=").append(text);
    }
    ++i;
  });
  return line;
}

inline Spec parse(const std::string& line) {
  Spec s;
  std::istringstream words(line);
  for (std::string word; words >> word;) {
    const std::string name = word.substr(0, word.find('='));
    bool known = false;
    fields(s, [&](const char* field, auto& value) {
      if (name != field || name.size() == word.size()) return;
      read(word.substr(name.size() + 1), value);
      known = true;
    });
    if (!known) throw std::invalid_argument("no such field: " + word);
  }
  return s;
}

}  // namespace dsconv::core_test

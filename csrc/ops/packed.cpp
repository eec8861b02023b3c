#include "ops/packed.h"

#include <cstring>
#include <type_traits>

#include "machine.h"
#include "ops/depthwise.h"
#include "ops/separable.h"

namespace dsconv {
namespace {

constexpr char kMagic[8] = {'d', 's', 'c', 'o', 'n', 'v', '0', '4'};

// A part of the packed bytes: where it starts and how long it is; of no length when absent.
struct Part {
  int64_t offset, bytes;
};

enum class Kind : uint8_t { depthwise, separable, pointwise };

struct Header {
  char magic[8];
  Target target;
  Kind kind;
  int64_t rank, channels;  // of the input
  Part weight, bias, pointwise_weight, pointwise_bias;
  int64_t bytes;         // of everything
  SeparableLayer layer;  // without its data
};
static_assert(std::is_trivially_copyable_v<Header>);

constexpr int64_t kAlignment = 64;

// The next part of a layer whose header counts them.
Part take_part(Header& header, int64_t bytes) {
  const Part part{header.bytes, bytes};
  header.bytes = round_up(header.bytes + bytes, kAlignment);
  return part;
}

void* at(const Tensor& packed, const Part& part) { return static_cast<char*>(packed.data_ptr()) + part.offset; }

View bias_at(const Tensor& packed, const Part& part) { return part.bytes ? View{at(packed, part), {1}} : View{}; }

Header new_header(Kind kind, int64_t rank, int64_t channels) {
  Header header{};
  std::memcpy(header.magic, kMagic, sizeof kMagic);
  header.target = cpu_machine().target;
  header.kind = kind;
  header.rank = rank;
  header.channels = channels;
  header.bytes = round_up(sizeof header, kAlignment);
  return header;
}

void copy_bias(const Tensor& packed, const Part& part, const View& bias, DType dtype) {
  const int64_t size = element_size(dtype);
  const char* from = static_cast<const char*>(bias.data);
  char* to = static_cast<char*>(at(packed, part));
  for (int64_t i = 0; i < part.bytes / size; ++i) std::memcpy(to + i * size, from + i * bias.stride[0] * size, size);
}

// The parts of a pointwise convolution, and their contents.
void take_pointwise(Header& header, const PointwiseProblem& p) {
  header.pointwise_weight = take_part(header, packer_of(p, header.target).bytes(p));
  if (p.bias.data) header.pointwise_bias = take_part(header, p.out_channels * element_size(p.dtype));
}
void write_pointwise(const Tensor& packed, const Header& header, const PointwiseProblem& p) {
  packer_of(p, header.target).pack(p, at(packed, header.pointwise_weight));
  copy_bias(packed, header.pointwise_bias, p.bias, p.dtype);
}

const Header& header_of(const Tensor& packed) {
  const auto* header = static_cast<const Header*>(packed.data_ptr());
  const bool readable = packed.is_cpu() && packed.element_size() == 1 && packed.is_contiguous() &&
                        packed.numel() >= static_cast<int64_t>(sizeof(Header)) &&
                        std::memcmp(header->magic, kMagic, sizeof kMagic) == 0;
  DSCONV_CHECK(readable, "packed", "a tensor that dsconv::pack did not make", "its result");
  DSCONV_CHECK(packed.numel() == header->bytes, "packed", std::to_string(packed.numel()) + " bytes", header->bytes);
  DSCONV_CHECK(header->target == cpu_machine().target, "packed", name_of(header->target), name_of(cpu_machine().target),
               ", the instruction set of this process");
  return *header;
}

}  // namespace

Tensor pack(const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& pointwise_weight,
            const OptionalTensor& pointwise_bias, int64_t groups, const IntList& stride, const IntList& padding,
            const IntList& dilation, const std::string& mid_activation, double mid_param, const std::string& activation,
            double activation_param, const std::string& fuse) {
  DSCONV_CHECK(weight.is_cpu(), "weight", "a tensor that is not on the CPU", "a CPU tensor");
  const ActivationSpec mid = parse_activation("mid_activation", mid_activation, mid_param);
  const ActivationSpec last = parse_activation("activation", activation, activation_param);
  Header header = new_header(pointwise_weight ? Kind::separable : Kind::depthwise, weight.dim(), groups);
  DepthwiseLayer depthwise = depthwise_layer(weight, bias, {stride, padding, dilation}, pointwise_weight ? mid : last);
  DSCONV_CHECK(groups > 0 && weight.size(0) % groups == 0, "groups", groups, "a divisor of the ", weight.size(0),
               " filters");
  const Packer<DepthwiseProblem>& depthwise_packer = packer_of(depthwise.problem, header.target);
  const int64_t size = element_size(depthwise.problem.dtype);
  header.weight = take_part(header, depthwise_packer.bytes(depthwise.problem));
  if (bias) header.bias = take_part(header, bias->numel() * size);
  PointwiseProblem pointwise{};
  if (pointwise_weight) {
    pointwise =
        pointwise_layer(*pointwise_weight, pointwise_bias, depthwise.rank, depthwise.problem.channels, weight, last);
    take_pointwise(header, pointwise);
  }
  Tensor packed = empty_bytes(weight, header.bytes);
  depthwise_packer.pack(depthwise.problem, at(packed, header.weight));
  copy_bias(packed, header.bias, depthwise.problem.bias, depthwise.problem.dtype);
  if (pointwise_weight) {
    write_pointwise(packed, header, pointwise);
  }
  depthwise.problem.weight = depthwise.problem.bias = pointwise.weight = pointwise.bias = View{};
  header.layer = {depthwise, pointwise, parse_fuse(fuse)};
  std::memcpy(packed.data_ptr(), &header, sizeof header);
  return packed;
}

Tensor pack_pointwise(const Tensor& weight, const OptionalTensor& bias, const std::string& activation,
                      double activation_param) {
  DSCONV_CHECK(weight.is_cpu(), "pointwise_weight", "a tensor that is not on the CPU", "a CPU tensor");
  DSCONV_CHECK(weight.dim() >= 3 && weight.dim() <= 5, "pointwise_weight", std::to_string(weight.dim()) + " dimensions",
               "3 to 5: [K, C, 1...]");
  const ActivationSpec last = parse_activation("activation", activation, activation_param);
  Header header = new_header(Kind::pointwise, weight.dim(), weight.size(1));
  PointwiseProblem p = pointwise_layer(weight, bias, weight.dim(), weight.size(1), weight, last);
  take_pointwise(header, p);
  Tensor packed = empty_bytes(weight, header.bytes);
  write_pointwise(packed, header, p);
  p.weight = p.bias = View{};
  header.layer.pointwise = p;
  std::memcpy(packed.data_ptr(), &header, sizeof header);
  return packed;
}

Tensor run_packed(const Tensor& x, const Tensor& packed, const OptionalTensor& residual) {
  const Header& header = header_of(packed);
  DSCONV_CHECK(x.dim() == header.rank, "x", std::to_string(x.dim()) + " dimensions", header.rank);
  DSCONV_CHECK(x.size(1) == header.channels, "x", std::to_string(x.size(1)) + " channels", header.channels);
  const auto complete = [&](DepthwiseProblem& p) {
    p.packed = at(packed, header.weight);
    p.bias = bias_at(packed, header.bias);
  };
  const auto complete_pointwise = [&](PointwiseProblem& p) {
    p.packed = at(packed, header.pointwise_weight);
    p.bias = bias_at(packed, header.pointwise_bias);
  };
  if (header.kind == Kind::pointwise) {
    PointwiseProblem p = problem_of(header.layer.pointwise, x, residual);
    complete_pointwise(p);
    return pointwise_forward("pointwise", p, x);
  }
  if (header.kind == Kind::depthwise) {
    DSCONV_CHECK(!residual, "residual", "a tensor", "none after a depthwise convolution alone");
    DepthwiseProblem p = problem_of(header.layer.depthwise, x);
    complete(p);
    return depthwise_forward("depthwise", p, p.activation, x);
  }
  SeparableProblem p = problem_of(header.layer, x, residual);
  complete(p.depthwise);
  complete_pointwise(p.pointwise);
  return separable_forward(p, header.layer.fuse, x);
}

}  // namespace dsconv

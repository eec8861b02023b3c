#include "ops/packed.h"

#include <cstring>
#include <type_traits>

#include "machine.h"
#include "ops/depthwise.h"
#include "ops/separable.h"

namespace dsconv {
namespace {

constexpr char kMagic[8] = {'d', 's', 'c', 'o', 'n', 'v', '0', '3'};

// A part of the packed bytes: where it starts and how long it is; of no length when absent.
struct Part {
  int64_t offset, bytes;
};

struct Header {
  char magic[8];
  Target target;
  bool is_separable;
  int64_t groups;
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

void copy_bias(const Tensor& packed, const Part& part, const View& bias, DType dtype) {
  const int64_t size = element_size(dtype);
  const char* from = static_cast<const char*>(bias.data);
  char* to = static_cast<char*>(at(packed, part));
  for (int64_t i = 0; i < part.bytes / size; ++i) std::memcpy(to + i * size, from + i * bias.stride[0] * size, size);
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
  Header header{};
  std::memcpy(header.magic, kMagic, sizeof kMagic);
  header.target = cpu_machine().target;
  header.is_separable = pointwise_weight.has_value();
  header.groups = groups;
  header.bytes = round_up(sizeof header, kAlignment);
  DepthwiseLayer depthwise = depthwise_layer(weight, bias, {stride, padding, dilation}, pointwise_weight ? mid : last);
  DSCONV_CHECK(groups > 0 && weight.size(0) % groups == 0, "groups", groups, "a divisor of the ", weight.size(0),
               " filters");
  const Packer<DepthwiseProblem>& depthwise_packer = packer_of(depthwise.problem, header.target);
  const int64_t size = element_size(depthwise.problem.dtype);
  header.weight = take_part(header, depthwise_packer.bytes(depthwise.problem));
  if (bias) header.bias = take_part(header, bias->numel() * size);
  PointwiseProblem pointwise{};
  if (pointwise_weight) {
    pointwise = pointwise_layer(*pointwise_weight, pointwise_bias, depthwise, weight, last);
    header.pointwise_weight = take_part(header, packer_of(pointwise, header.target).bytes(pointwise));
    if (pointwise_bias) header.pointwise_bias = take_part(header, pointwise_bias->numel() * size);
  }
  Tensor packed = empty_bytes(weight, header.bytes);
  depthwise_packer.pack(depthwise.problem, at(packed, header.weight));
  copy_bias(packed, header.bias, depthwise.problem.bias, depthwise.problem.dtype);
  if (pointwise_weight) {
    packer_of(pointwise, header.target).pack(pointwise, at(packed, header.pointwise_weight));
    copy_bias(packed, header.pointwise_bias, pointwise.bias, pointwise.dtype);
  }
  depthwise.problem.weight = depthwise.problem.bias = pointwise.weight = pointwise.bias = View{};
  header.layer = {depthwise, pointwise, parse_fuse(fuse)};
  std::memcpy(packed.data_ptr(), &header, sizeof header);
  return packed;
}

Tensor run_packed(const Tensor& x, const Tensor& packed, const OptionalTensor& residual) {
  const Header& header = header_of(packed);
  DSCONV_CHECK(x.dim() < 2 || x.size(1) == header.groups, "x", std::to_string(x.size(1)) + " channels", header.groups);
  const auto complete = [&](DepthwiseProblem& p) {
    p.packed = at(packed, header.weight);
    p.bias = bias_at(packed, header.bias);
  };
  if (!header.is_separable) {
    DSCONV_CHECK(!residual, "residual", "a tensor", "none after a depthwise convolution alone");
    DepthwiseProblem p = problem_of(header.layer.depthwise, x);
    complete(p);
    return depthwise_forward("depthwise", p, p.activation, x);
  }
  SeparableProblem p = problem_of(header.layer, x, residual);
  complete(p.depthwise);
  p.pointwise.packed = at(packed, header.pointwise_weight);
  p.pointwise.bias = bias_at(packed, header.pointwise_bias);
  return separable_forward(p, header.layer.fuse, x);
}

}  // namespace dsconv

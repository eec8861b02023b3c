#include "ops/packed.h"

#include <cstring>

#include "machine.h"

namespace dsconv {
namespace {

// Followed by the depthwise and then by the pointwise part, each as long as its packer says.
struct Header {
  char magic[8];
  int64_t target, dtype;
  int64_t channels, taps[3];  // depthwise
  int64_t out_channels;       // pointwise, 0 when there are none
};
static_assert(sizeof(Header) == 64);
constexpr char kMagic[8] = {'d', 's', 'c', 'o', 'n', 'v', '0', '2'};

DepthwiseProblem depthwise_part(const Header& h) {
  DepthwiseProblem p{};
  p.dtype = static_cast<DType>(h.dtype);
  p.channels = h.channels;
  p.multiplier = 1;
  for (int dim = 0; dim < 3; ++dim) {
    p.window.taps[dim] = h.taps[dim];
    p.window.stride[dim] = p.window.dilation[dim] = 1;
  }
  return p;
}
PointwiseProblem pointwise_part(const Header& h) {
  PointwiseProblem p{};
  p.dtype = static_cast<DType>(h.dtype);
  p.in_channels = h.channels;
  p.out_channels = h.out_channels;
  return p;
}
int64_t depthwise_bytes(const Header& h) {
  return round_up(packer_of<DepthwiseProblem>(static_cast<Target>(h.target)).bytes(depthwise_part(h)), 64);
}
int64_t pointwise_bytes(const Header& h) {
  if (h.out_channels == 0) return 0;
  return packer_of<PointwiseProblem>(static_cast<Target>(h.target)).bytes(pointwise_part(h));
}

// The header of `packed`, checked against the channels, dtype and target it is to be used for; null for another target.
const Header* header_of(const OptionalTensor& packed, DType dtype, int64_t channels, const Row& row) {
  if (!packed || packed->numel() == 0) return nullptr;
  const auto* header = static_cast<const Header*>(packed->data_ptr());
  const bool readable = packed->is_cpu() && packed->element_size() == 1 && packed->is_contiguous() &&
                        packed->numel() >= static_cast<int64_t>(sizeof(Header)) &&
                        std::memcmp(header->magic, kMagic, sizeof kMagic) == 0;
  DSCONV_CHECK(readable, "packed", "a tensor that dsconv::pack did not make", "its result");
  DSCONV_CHECK(header->dtype == static_cast<int64_t>(dtype) && header->channels == channels, "packed",
               std::to_string(header->channels) + " channels of " + name_of(static_cast<DType>(header->dtype)),
               channels, " of ", name_of(dtype));
  if (header->target != static_cast<int64_t>(row.target)) return nullptr;
  const int64_t bytes = sizeof(Header) + depthwise_bytes(*header) + pointwise_bytes(*header);
  DSCONV_CHECK(packed->numel() == bytes, "packed", std::to_string(packed->numel()) + " bytes", bytes);
  return header;
}

}  // namespace

void use_packed(const OptionalTensor& packed, DepthwiseProblem& p, const Row& row) {
  const Header* header = header_of(packed, p.dtype, p.channels * p.multiplier, row);
  if (!header) return;
  for (int dim = 0; dim < 3; ++dim) {
    DSCONV_CHECK(header->taps[dim] == p.window.taps[dim], "packed",
                 std::to_string(header->taps[dim]) + " taps in dimension " + std::to_string(dim), p.window.taps[dim]);
  }
  if (depthwise_bytes(*header) > 0) p.packed = header + 1;
}
void use_packed(const OptionalTensor& packed, PointwiseProblem& p, const Row& row) {
  const Header* header = header_of(packed, p.dtype, p.in_channels, row);
  if (!header) return;
  DSCONV_CHECK(header->out_channels == p.out_channels, "packed",
               std::to_string(header->out_channels) + " output channels", p.out_channels);
  p.packed = reinterpret_cast<const char*>(header + 1) + depthwise_bytes(*header);
}
void use_packed(const OptionalTensor& packed, SeparableProblem& p, const Row& row) {
  use_packed(packed, p.depthwise, row);
  use_packed(packed, p.pointwise, row);
}

Tensor pack(const Tensor& depthwise_weight, const OptionalTensor& pointwise_weight) {
  const Target target = cpu_machine().target;
  const int64_t rank = depthwise_weight.dim();
  DSCONV_CHECK(rank >= 3 && rank <= 5, "depthwise_weight", std::to_string(rank) + " dimensions", "3 to 5");
  DSCONV_CHECK(depthwise_weight.is_cpu(), "depthwise_weight", "a tensor that is not on the CPU", "a CPU tensor");
  Header header{{},
                static_cast<int64_t>(target),
                static_cast<int64_t>(dtype_of("depthwise_weight", depthwise_weight)),
                depthwise_weight.size(0),
                {1, 1, 1},
                0};
  std::memcpy(header.magic, kMagic, sizeof kMagic);
  for (int64_t i = 2; i < rank; ++i) header.taps[5 - rank + i - 2] = depthwise_weight.size(i);
  if (pointwise_weight) {
    IntList size(rank, 1);
    size[0] = header.out_channels = pointwise_weight->size(0);
    size[1] = header.channels;
    check_like("pointwise_weight", *pointwise_weight, depthwise_weight, size);
  }
  Tensor packed = empty_bytes(depthwise_weight, sizeof header + depthwise_bytes(header) + pointwise_bytes(header));
  char* out = static_cast<char*>(packed.data_ptr());
  std::memcpy(out, &header, sizeof header);
  DepthwiseProblem depthwise = depthwise_part(header);
  depthwise.weight = view_of(depthwise_weight);
  packer_of<DepthwiseProblem>(target).pack(depthwise, out += sizeof header);
  if (pointwise_weight) {
    PointwiseProblem pointwise = pointwise_part(header);
    pointwise.weight = view_of(*pointwise_weight);
    packer_of<PointwiseProblem>(target).pack(pointwise, out + depthwise_bytes(header));
  }
  return packed;
}

}  // namespace dsconv

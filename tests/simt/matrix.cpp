#include "simt/matrix.h"

#include <cuda_fp16.h>

#include <bit>
#include <cmath>
#include <cstring>

#include "simt/simt.h"
#include "simt/trace.h"

namespace simt {
namespace {

constexpr uint32_t kBelowTf32 = (1u << 13) - 1;  // bits of a float that tf32 has not
constexpr int kRow = 16;                         // bytes

float float_of(uint16_t bits, Element element) {
  if (element == Element::bf16) return std::bit_cast<float>(uint32_t{bits} << 16);
  return __half2float(std::bit_cast<__half>(bits));
}

// The operands of a lane as floats, in the order of their registers.
struct Operands {
  float a[8], b[4];
};
static_assert(sizeof(Operands) <= Lanes::kBytes);

void unpack(Element element, const uint32_t* registers, int count, float* values) {
  for (int i = 0; i < count; ++i) {
    const uint32_t bits = registers[i];
    if (element != Element::tf32) {
      *values++ = float_of(static_cast<uint16_t>(bits), element);
      *values++ = float_of(static_cast<uint16_t>(bits >> 16), element);
      continue;
    }
    const auto value = std::bit_cast<float>(bits);
    if ((bits & kBelowTf32) != 0 && !std::isnan(value)) fail("multiplies a float that to_tf32 has not seen");
    *values++ = value;
  }
}

}  // namespace

// Four neighbouring lanes share a row of a and a column of b; a register holds `packed` neighbours in k.
void mma(Element element, int k, float* d, const uint32_t* a, const uint32_t* b, const std::source_location& site) {
  const int packed = element == Element::tf32 ? 1 : 2, span = 4 * packed;  // of k, by one register of the four lanes
  Operands mine{};
  unpack(element, a, 2 * k / span, mine.a);
  unpack(element, b, k / span, mine.b);
  const Lanes& all = warp_exchange(~0u, mine, site);
  const int row = lane() / 4, column = lane() % 4 * 2;
  for (int at = 0; at < k; ++at) {
    const int neighbour = at % span / packed, step = at / span, half = at % packed;
    const auto of_row = all.from<Operands>(4 * row + neighbour);
    for (int j = 0; j < 2; ++j) {
      const float factor = all.from<Operands>(4 * (column + j) + neighbour).b[packed * step + half];
      for (int i = 0; i < 2; ++i) d[2 * i + j] += of_row.a[packed * (2 * step + i) + half] * factor;
    }
  }
}

void ldmatrix(uint32_t* registers, int count, bool transposed, const void* row, const std::source_location& site) {
  struct Row {
    const unsigned char* at;
    uint16_t element[8];
  } mine{static_cast<const unsigned char*>(row), {}};
  if (reinterpret_cast<uintptr_t>(row) % kRow != 0) {
    fail("loads a matrix row from a misaligned address");
  } else if (!in_shared_memory(row, kRow)) {
    fail("loads a matrix row from outside shared memory");
  } else if (lane() < 8 * count) {
    trace::access(row, kRow, trace::Kind::read, __builtin_return_address(0));
    std::memcpy(mine.element, row, kRow);
  }
  const Lanes& all = warp_exchange(~0u, mine, site);
  for (int i = 0; i < count; ++i) {
    uint16_t pair[2];
    for (int half = 0; half < 2; ++half) {
      const int outer = lane() / 4, inner = lane() % 4 * 2 + half;
      const auto from = all.from<Row>(8 * i + (transposed ? inner : outer));
      const int column = transposed ? outer : inner;
      pair[half] = from.element[column];
      // This lane reads of another's row: what that lane wrote needs a barrier too.
      trace::check(from.at + column * sizeof(uint16_t), sizeof(uint16_t), trace::Kind::read);
    }
    std::memcpy(registers + i, pair, sizeof pair);
  }
}

uint32_t to_tf32(float value) {
  if (std::isnan(value)) return 0x7fffffff;
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return std::isinf(value) ? bits : (bits + (kBelowTf32 + 1) / 2) & ~kBelowTf32;  // the carry may reach infinity
}

}  // namespace simt

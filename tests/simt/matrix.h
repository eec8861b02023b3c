// The matrix instructions of a warp, on the CPU: mma.sync, ldmatrix and the conversion to tf32. Every lane must come.
#pragma once

#include <cstdint>
#include <source_location>

namespace simt {

enum class Element : uint8_t { f16, bf16, tf32 };

// d[16][8] += a[16][k] * b[k][8]: the registers of this lane. Sums are in float, in the order of k.
void mma(Element element, int k, float* d, const uint32_t* a, const uint32_t* b, const std::source_location& site);

// `count` registers, one of each matrix; `row` is the address that this lane brings.
void ldmatrix(uint32_t* registers, int count, bool transposed, const void* row, const std::source_location& site);

uint32_t to_tf32(float value);

}  // namespace simt

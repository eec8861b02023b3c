// Kernels with one bug each, and the same kernels without: each build of the harness must notice its own.
#pragma once

#include <cstdint>
#include <span>

namespace dsconv::simt_test {

struct Plant {
  std::span<const char* const> bugs;  // the first is none
  std::span<const int64_t> bytes;     // of its buffers, which the driver makes
  void (*launch)(int bug, void* const* buffers);
  int (*wrong)(void* const* buffers);  // how many of the results
};
extern const Plant kStreamPlant;  // plants.cu
extern const Plant kMatrixPlant;  // matrix_plants.cu

}  // namespace dsconv::simt_test

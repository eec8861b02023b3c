// csrc/cuda/launch.cuh for the CPU: the launch becomes a run of simt.h.
#pragma once

#include <algorithm>
#include <cstring>

#include "cuda/device.h"
#include "problem.h"
#include "simt/simt.h"

namespace dsconv::cuda {

template <class Parameters>
void launch(const char* name, void (*kernel)(Parameters), int64_t blocks, int threads, int64_t shared_bytes,
            const Runtime&, const Parameters& parameters) {
  simt::run({name, reinterpret_cast<const void*>(kernel), &parameters, sizeof parameters},
            {blocks, threads, shared_bytes}, [&] { kernel(parameters); });
}

inline int opaque(int number) { return number; }

template <class T>
T* shared_memory() {
  return static_cast<T*>(simt::shared_memory());
}

}  // namespace dsconv::cuda

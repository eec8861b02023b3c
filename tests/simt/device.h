// The vocabulary of CUDA device code for g++; comes before every .cu file. Types are NVIDIA's own.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <math.h>

#include "simt/simt.h"

#undef __global__
#undef __device__
#undef __host__
#undef __shared__  // static shared memory is not supported: shared_memory() of cuda/launch.cuh
#undef __launch_bounds__
#undef __forceinline__
#undef __noinline__
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __noinline__

using std::max, std::min;

using simt::blockDim, simt::blockIdx, simt::gridDim, simt::threadIdx;

using SimtSite = std::source_location;

inline void __syncthreads(SimtSite site = SimtSite::current()) { simt::block_barrier(site); }
inline void __syncwarp(unsigned mask = ~0u, SimtSite site = SimtSite::current()) { simt::warp_barrier(mask, site); }

// Every lane of the mask brings its value and leaves with all of them.
template <class T>
T simt_shuffle(unsigned mask, T value, int from, SimtSite site) {
  const simt::Lanes& all = simt::warp_exchange(mask, value, site);
  return all.from<T>(from < 0 || from > 31 ? simt::lane() : from);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int from, SimtSite site = SimtSite::current()) {
  return simt_shuffle(mask, value, from & 31, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int by, SimtSite site = SimtSite::current()) {
  return simt_shuffle(mask, value, simt::lane() - by, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int by, SimtSite site = SimtSite::current()) {
  return simt_shuffle(mask, value, simt::lane() + by, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int by, SimtSite site = SimtSite::current()) {
  return simt_shuffle(mask, value, simt::lane() ^ by, site);
}
inline unsigned __ballot_sync(unsigned mask, bool vote, SimtSite site = SimtSite::current()) {
  const simt::Lanes& all = simt::warp_exchange(mask, vote, site);
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i) votes |= (mask >> i & 1) && all.from<bool>(i) ? 1u << i : 0;
  return votes;
}
inline bool __all_sync(unsigned mask, bool vote, SimtSite site = SimtSite::current()) {
  return __ballot_sync(mask, vote, site) == mask;
}
inline bool __any_sync(unsigned mask, bool vote, SimtSite site = SimtSite::current()) {
  return __ballot_sync(mask, vote, site) != 0;
}

template <class T>
__attribute__((no_sanitize("thread"))) T atomicAdd(T* to, T value) {
  simt::note_atomic(to, sizeof *to);
  const T before = *to;
  *to = before + value;
  return before;
}
template <class T>
T __ldg(const T* from) {
  return *from;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }

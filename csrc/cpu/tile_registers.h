// The tile registers of AMX and what is done with them, one instruction each: what only a processor with AMX runs.
#pragma once

#include <cpuid.h>
#include <stdint.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dsconv::cpu::amx {

// What ldtilecfg reads.
struct TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

static inline bool processor_has_tiles() {
#if defined(__linux__)
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (~edx & (kBf16 | kTiles))) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

static inline void configure_tiles(const TileConfig& config) { asm volatile("ldtilecfg %0" : : "m"(config)); }
static inline void release_tiles() { asm volatile("tilerelease" : : : "memory"); }

template <int tile>
static inline void clear_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(tile));
}
// Rows `step` bytes apart.
template <int tile>
static inline void load_tile(const void* rows, int64_t step) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(step), "i"(tile) : "memory");
}
template <int tile>
static inline void store_tile(void* rows, int64_t step) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(rows), "r"(step), "i"(tile) : "memory");
}
template <int sums, int a, int b>
static inline void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(a), "i"(b));
}

}  // namespace dsconv::cpu::amx

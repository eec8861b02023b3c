// csrc/cpu/tile_registers.h for processors without AMX: the same names, each doing what Intel's manual says of the
// instruction ("TDPBF16PS", Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2). What a processor
// would trap on ends the process.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace dsconv::cpu::amx {

struct TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);

struct TileRegisters {
  TileConfig config{};
  unsigned char rows[8][16][64];
};
inline thread_local TileRegisters tiles;

[[noreturn]] inline void trap(const char* what) {
  std::printf("emulated AMX: %s\n", what);
  std::fflush(stdout);
  std::abort();
}

inline bool processor_has_tiles() { return true; }

inline void configure_tiles(const TileConfig& config) {
  if (config.palette != 1 || config.start_row != 0) trap("a configuration of another palette");
  for (int i = 0; i < 14; ++i) {
    if (config.reserved[i] != 0) trap("reserved bytes of the configuration are set");
  }
  for (int tile = 0; tile < 16; ++tile) {
    const int rows = config.rows[tile], bytes = config.row_bytes[tile];
    if (rows > 16 || bytes > 64 || (rows == 0) != (bytes == 0) || (tile >= 8 && rows != 0))
      trap("a configuration of tiles that there are not");
  }
  if (tiles.config.palette != 0) trap("configured again before it was released");
  tiles.config = config;
  std::memset(tiles.rows, 0, sizeof tiles.rows);
}
inline void release_tiles() { tiles.config = {}; }

// The tile's rows and bytes, for an instruction that uses it.
template <int tile>
void use_tile(int& rows, int& bytes) {
  static_assert(tile >= 0 && tile < 8);
  rows = tiles.config.rows[tile];
  bytes = tiles.config.row_bytes[tile];
  if (rows == 0) trap("a tile that is not configured");
}

template <int tile>
void clear_tile() {
  int rows, bytes;
  use_tile<tile>(rows, bytes);
  std::memset(tiles.rows[tile], 0, sizeof tiles.rows[tile]);
}
template <int tile>
void load_tile(const void* from, int64_t step) {
  int rows, bytes;
  use_tile<tile>(rows, bytes);
  std::memset(tiles.rows[tile], 0, sizeof tiles.rows[tile]);
  for (int i = 0; i < rows; ++i) std::memcpy(tiles.rows[tile][i], static_cast<const char*>(from) + i * step, bytes);
}
template <int tile>
void store_tile(void* to, int64_t step) {
  int rows, bytes;
  use_tile<tile>(rows, bytes);
  for (int i = 0; i < rows; ++i) std::memcpy(static_cast<char*>(to) + i * step, tiles.rows[tile][i], bytes);
}

// A subnormal result is zero, and so is a subnormal operand.
inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }
inline float bf16_at(const unsigned char* row, int index) {
  uint16_t half;
  std::memcpy(&half, row + 2 * index, sizeof half);
  const uint32_t bits = uint32_t{half} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return flushed(value);
}

// sums[m][n] += the sum over pairs k of a[m][2k] * b[k][2n], plus that of a[m][2k + 1] * b[k][2n + 1].
template <int sums, int a, int b>
void multiply_tiles() {
  static_assert(sums != a && sums != b && a != b);
  int sum_rows, sum_bytes, a_rows, a_bytes, b_rows, b_bytes;
  use_tile<sums>(sum_rows, sum_bytes);
  use_tile<a>(a_rows, a_bytes);
  use_tile<b>(b_rows, b_bytes);
  if (sum_rows != a_rows || b_rows != a_bytes / 4 || b_bytes != sum_bytes) trap("tiles that do not fit each other");
  for (int m = 0; m < sum_rows; ++m) {
    for (int n = 0; n < sum_bytes / 4; ++n) {
      float parts[2] = {0, 0};
      for (int k = 0; k < b_rows; ++k) {
        for (int half = 0; half < 2; ++half) {
          const float x = bf16_at(tiles.rows[a][m], 2 * k + half), w = bf16_at(tiles.rows[b][k], 2 * n + half);
          parts[half] = flushed(std::fma(x, w, parts[half]));
        }
      }
      float sum;
      std::memcpy(&sum, tiles.rows[sums][m] + 4 * n, sizeof sum);
      sum = flushed(flushed(sum) + flushed(parts[0] + parts[1]));
      std::memcpy(tiles.rows[sums][m] + 4 * n, &sum, sizeof sum);
    }
  }
}

}  // namespace dsconv::cpu::amx

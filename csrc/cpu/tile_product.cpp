#if DSCONV_X86
#include "cpu/tile_product.h"

#include "cpu/tile_registers.h"

namespace dsconv::cpu::amx {

bool is_available() {
  static const bool available = processor_has_tiles();
  return available;
}

void begin() {
  TileConfig config{};
  config.palette = 1;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = kTile;
  }
  configure_tiles(config);
}

void end() { release_tiles(); }

namespace {

// Tiles 0 to 3 are sums, 4 and 5 rows of A, 6 and 7 columns of B.
template <bool two_rows, bool two_columns>
void multiply_block(const uint16_t* a, int64_t lda, const uint16_t* b, int64_t steps, float* sums) {
  constexpr int64_t kRowBytes = 64;
  const int64_t a_step = lda * static_cast<int64_t>(sizeof *a);
  clear_tile<0>();
  clear_tile<1>();
  clear_tile<2>();
  clear_tile<3>();
  for (; steps > 0; --steps, a += kStep, b += kStepValues) {
    load_tile<6>(b, kRowBytes);
    load_tile<4>(a, a_step);
    multiply_tiles<0, 4, 6>();
    if constexpr (two_columns) {
      load_tile<7>(b + kStepValues / 2, kRowBytes);
      multiply_tiles<1, 4, 7>();
    }
    if constexpr (two_rows) {
      load_tile<5>(a + kTile * lda, a_step);
      multiply_tiles<2, 5, 6>();
      if constexpr (two_columns) multiply_tiles<3, 5, 7>();
    }
  }
  constexpr int64_t kSumStep = kBlock * sizeof(float);
  store_tile<0>(sums, kSumStep);
  if constexpr (two_columns) store_tile<1>(sums + kTile, kSumStep);
  if constexpr (two_rows) store_tile<2>(sums + kTile * kBlock, kSumStep);
  if constexpr (two_rows && two_columns) store_tile<3>(sums + kTile * kBlock + kTile, kSumStep);
}

}  // namespace

void multiply(const uint16_t* a, int64_t lda, const uint16_t* b, int64_t steps, bool two_rows, bool two_columns,
              float* sums) {
  using Block = void (*)(const uint16_t*, int64_t, const uint16_t*, int64_t, float*);
  static constexpr Block kBlocks[2][2] = {{multiply_block<false, false>, multiply_block<false, true>},
                                          {multiply_block<true, false>, multiply_block<true, true>}};
  kBlocks[two_rows][two_columns](a, lda, b, steps, sums);
}

}  // namespace dsconv::cpu::amx
#endif

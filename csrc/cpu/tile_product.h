// The matrix product of bfloat16 on the tiles of AMX. What calls it knows neither instructions nor registers.
#pragma once

#include <stdint.h>

namespace dsconv::cpu::amx {

// A tile holds 16 rows of 64 bytes: 32 values of rows of A, or 16 sums. A step multiplies 32 channels; a block of 2 x 2
// tiles is what the registers hold.
constexpr int kTile = 16, kStep = 32, kBlock = 2 * kTile;

// Values of B for a step of a block: [tile of columns][pair of channels][column][channel of the pair].
constexpr int kStepValues = kStep * kBlock;

// Does the processor have such tiles, and does the system keep them for this process? It is asked to.
bool is_available();

// What a thread calls before its first product and after its last.
void begin();
void end();

// sums[kBlock][kBlock] = rows of a (bits of bfloat16, lda apart) x B, over `steps` steps. The second tile of rows or of
// columns is left out if it is not wanted; of others all rows are read.
void multiply(const uint16_t* a, int64_t lda, const uint16_t* b, int64_t steps, bool two_rows, bool two_columns,
              float* sums);

}  // namespace dsconv::cpu::amx
